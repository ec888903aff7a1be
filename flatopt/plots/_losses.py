"""The loss along a random line and over a random plane."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from flatopt import kernels
from flatopt._core import binding, trees
from flatopt._core.risk import Risk
from flatopt._core.types import KernelFn, LossFn, WeightFn
from flatopt.plots._axes import new_axes
from flatopt.stability import _checks


def loss_line(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array | None = None,
    *,
    to: Any = None,
    radius: float = 1.0,
    num_points: int = 41,
    kernel: KernelFn | None = None,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The loss along a random direction through the parameters, or on the way to others.

    The direction is a draw of a kernel: by default Gaussian and filter-normalized, so that
    curves of differently scaled networks compare. With ``to`` the line leads straight to
    those parameters, such as another fine-tuning of the same network: a rise between them
    is a barrier, which their average cannot pass. Where the loss is not finite there is a
    gap.

    Args:
      loss_fn: ``loss_fn(params)`` or ``loss_fn(params, batch)``.
      params: the parameters, in the middle; with ``to``, at 0.
      key: a JAX random key, for the direction.
      to: other parameters, of the same structure and shapes, at 1; instead of a key.
      radius: how far to go to either side, in units of the kernel.
      num_points: number of points.
      kernel: the direction; default: :func:`flatopt.kernels.filterwise`.
      data: one batch, or a re-iterable of batches.
      weight_fn: weight of a batch; default: its number of examples.
      ax: matplotlib axes to draw into.

    Returns:
      The axes.

    Raises:
      ValueError: for a loss that is finite nowhere.

    References:
      Li, Xu, Taylor, Studer, Goldstein, `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, NeurIPS 2018. In filter norms; the paper also
      divides a direction by its own norms.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import plots
      >>> ax = plots.loss_line(lambda p: jnp.sum(p ** 2), jnp.ones(3), jax.random.key(0))
      >>> x, y = ax.lines[0].get_data()
      >>> round(float(y[20]), 3)  # the loss at the parameters
      3.0
    """
    if to is not None:
        return _line_to(loss_fn, params, to, num_points, data, weight_fn, ax)
    steps = _steps(radius, num_points)
    rows = steps[:, None].astype("f4")
    losses = _grid_losses(loss_fn, params, key, rows, kernel, data, weight_fn)
    ax = new_axes(ax, xlabel="step (filter norms)", ylabel="loss")
    ax.plot(steps, losses)
    return ax


def _line_to(loss_fn, params, other, num_points, data, weight_fn, ax):
    """The loss from parameters to others, the share of the way along the axis."""
    shapes = [
        jax.tree.structure(tree).unflatten(map(jnp.shape, jax.tree.leaves(tree)))
        for tree in (other, params)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"to must have the structure and shapes of params, got {shapes[0]}; give the "
            "parameters of the same network."
        )
    risk = Risk.of(loss_fn, params, data, weight_fn)
    steps = (_steps(0.5, num_points) + 0.5).astype("f4")
    losses = _check_some_finite(
        np.asarray(risk.losses(_toward, jnp.asarray(steps), other))
    )
    ax = new_axes(ax, xlabel="share of the way", ylabel="loss")
    ax.plot(steps, losses)
    return ax


def _toward(share, params, other):
    return jax.tree.map(
        lambda p, q: (
            (1 - share).astype(trees.widen(p).dtype) * trees.widen(p)
            + share.astype(trees.widen(p).dtype) * trees.widen(q)
        ),
        params,
        other,
    )


def loss_plane(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    radius: float = 1.0,
    num_points: int = 21,
    kernel: KernelFn | None = None,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The loss over the plane of two random directions, as filled contours.

    Args:
      loss_fn, params, key, radius, kernel, data, weight_fn, ax: see :func:`loss_line`.
      num_points: number of points along each axis.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import plots
      >>> ax = plots.loss_plane(
      ...     lambda p: jnp.sum(p ** 2), jnp.ones(3), jax.random.key(0), num_points=5)
      >>> ax.get_ylabel()
      'step (filter norms)'
    """
    steps = _steps(radius, num_points)
    rows = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2).astype("f4")
    losses = _grid_losses(loss_fn, params, key, rows, kernel, data, weight_fn)
    ax = new_axes(
        ax, xlabel="step (filter norms)", ylabel="step (filter norms)", aspect="equal"
    )
    filled = ax.contourf(
        steps, steps, losses.reshape(num_points, num_points), levels=20
    )
    ax.figure.colorbar(filled, ax=ax, label="loss")
    return ax


def _steps(radius, num_points):
    _checks.check_rate(radius, "radius")
    _checks.check_count(num_points, "num_points", "points along an axis")
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2 for a line, got {num_points}.")
    return np.linspace(-radius, radius, num_points)


def _grid_losses(loss_fn, params, key, rows, kernel, data, weight_fn):
    _checks.check_key(key)
    risk = Risk.of(loss_fn, params, data, weight_fn)
    keys = tuple(jax.random.split(key, rows.shape[1]))
    move = _plane(FILTERWISE if kernel is None else kernel)
    return _check_some_finite(np.asarray(risk.losses(move, jnp.asarray(rows), keys)))


def _check_some_finite(losses):
    if not np.isfinite(losses).any():
        raise ValueError(
            f"the loss is finite at none of the {len(losses)} points, got "
            f"{losses[len(losses) // 2]:g} in the middle; look at the loss at params "
            "first, and choose a smaller radius."
        )
    return losses


@functools.lru_cache(maxsize=64)
def _plane(kernel):
    def move(row, params, fixed):
        directions = [binding.bind(kernel, key, params)(key) for key in fixed]
        return jax.tree.map(
            lambda p, *d: (
                trees.widen(p)
                + sum(row[i].astype(u.dtype) * u for i, u in enumerate(d))
            ),
            params,
            *directions,
        )

    return move


FILTERWISE = kernels.filterwise()
