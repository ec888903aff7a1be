"""The loss along a line and over a plane of parameters."""

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
from flatopt.plots._axes import check_axes, new_axes
from flatopt.plots._planes import plane_of
from flatopt.stability import _checks

MARGIN = 0.15  # of the extent of a path, left free around it
LEVELS = 20  # of contours
ROUNDING = 1e-6  # of the largest loss: a barrier below it is none


def loss_line(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array | None = None,
    *,
    to: Any = None,
    radius: float | None = None,
    num_points: int = 41,
    kernel: KernelFn | None = None,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The loss along a random direction through the parameters, or on the way to others.

    The direction is a draw of a kernel: by default Gaussian and filter-normalized, so that
    curves of differently scaled networks compare. Where the loss is not finite there is a
    gap.

    With ``to`` the line leads straight to those parameters, such as another fine-tuning of
    the same network. The barrier is marked: how far the loss rises at most above the
    straight line between its ends. It is read off the points, so it may be a little higher.

    .. math:: \max_t L((1 - t)\, \theta + t\, \theta') - (1 - t)\, L(\theta)
        - t\, L(\theta')

    Args:
      loss_fn: ``loss_fn(params)`` or ``loss_fn(params, batch)``.
      params: the parameters, in the middle; with ``to``, at 0.
      key: a JAX random key, for the direction.
      to: other parameters, of the same structure and shapes, at 1; instead of a key.
      radius: how far to go to either side of ``params`` in units of the kernel; default: 1.
      num_points: number of points.
      kernel: the direction; default: :func:`flatopt.kernels.filterwise`.
      data: one batch, or a re-iterable of batches.
      weight_fn: weight of a batch; default: its number of examples.
      ax: matplotlib axes to draw into.

    Returns:
      The axes.

    Raises:
      ValueError: for a loss that is finite nowhere, a radius or a kernel beside ``to``.

    References:
      Li, Xu, Taylor, Studer, Goldstein, `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, NeurIPS 2018. In filter norms; the paper also
      divides a direction by its own norms. The barrier: Frankle, Dziugaite, Roy, Carbin,
      `Linear Mode Connectivity <https://arxiv.org/abs/1912.05671>`_, ICML 2020; above the
      straight line as in Entezari, Sedghi, Saukh, Neyshabur, `Permutation Invariance
      <https://arxiv.org/abs/2110.06296>`_, ICLR 2022.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import plots
      >>> ax = plots.loss_line(lambda p: jnp.sum(p ** 2), jnp.ones(3), jax.random.key(0))
      >>> x, y = ax.lines[0].get_data()
      >>> round(float(y[20]), 3)  # the loss at the parameters
      3.0
      >>> ax = plots.loss_line(
      ...     lambda p: jnp.sum((p ** 2 - 1) ** 2), -jnp.ones(1), to=jnp.ones(1))
      >>> ax.get_legend().get_texts()[0].get_text()
      'barrier 1'
    """
    check_axes(ax)
    if to is not None:
        _check_unused("to", key=key, radius=radius, kernel=kernel)
        return _line_to(loss_fn, params, to, num_points, data, weight_fn, ax)
    steps = _steps(1.0 if radius is None else radius, num_points)
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
    kinds = {jnp.result_type(x) for x in jax.tree.leaves(other)}
    if not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        raise TypeError(
            f"to must be floating point, got {', '.join(map(str, kinds))}; give the "
            "parameters of the same network."
        )
    risk = Risk.of(loss_fn, params, data, weight_fn)
    steps = (_steps(0.5, num_points) + 0.5).astype("f4")
    losses = _check_some_finite(
        np.asarray(risk.losses(_toward, jnp.asarray(steps), other))
    )
    ax = new_axes(ax, xlabel="share of the way", ylabel="loss")
    ax.plot(steps, losses)
    _mark_barrier(ax, steps, losses)
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


def _mark_barrier(ax, shares, losses):
    """The straight line between the ends, and the largest rise above it."""
    shares, losses = np.asarray(shares, "f8"), np.asarray(losses, "f8")
    chord = (1 - shares) * losses[0] + shares * losses[-1]
    rises = losses - chord
    ax.plot(shares[[0, -1]], losses[[0, -1]], "--", color="0.6", linewidth=1)
    if np.isfinite(rises).all():
        top = int(rises.argmax())
        height = float(rises[top])
        if height <= ROUNDING * np.abs(losses).max():
            label = "no barrier"
        else:
            label = f"barrier {height:.3g}"
    else:
        top, label = 0, "barrier not finite"
    ax.plot(
        shares[[top, top]],
        [chord[top], losses[top]],
        color="C3",
        marker="_",
        label=label,
        gid="barrier",
    )
    ax.legend()


def loss_plane(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array | None = None,
    *,
    directions: Any = None,
    trajectory: Any = None,
    radius: float | None = None,
    num_points: int = 21,
    kernel: KernelFn | None = None,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The loss over a plane through the parameters, as filled contours.

    The plane is that of two random directions, as in :func:`loss_line`; of two that are
    given, such as eigenvectors; or that in which a trajectory varies most, by its first two
    principal components. A trajectory is drawn as a line, projected on the plane; the axes
    say which share of its variance lies along each. Where that is little, the loss under
    the line is not the loss on the way.

    Args:
      loss_fn, params, data, weight_fn, ax: see :func:`loss_line`.
      key: a JAX random key, for random directions.
      directions: two trees like ``params``, in a list or stacked along a leading axis as in
        ``eigenpairs(operator, key, 2).vectors``; None in place of a leaf stands for zeros.
      trajectory: parameters of several steps, likewise; without directions at least three.
      radius: how far to go to either side of ``params``, in units of the directions;
        default: 1, or as far as the trajectory.
      num_points: number of points along each axis.
      kernel: random directions; default: :func:`flatopt.kernels.filterwise`.

    Returns:
      The axes.

    Raises:
      ValueError: for a loss that is finite nowhere, directions that span no plane, trees of
        other shapes than ``params``, a kernel beside what is given.

    References:
      Li, Xu, Taylor, Studer, Goldstein, `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, NeurIPS 2018, section 7 for trajectories.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import plots
      >>> ax = plots.loss_plane(
      ...     lambda p: jnp.sum(p ** 2), jnp.ones(3), jax.random.key(0), num_points=5)
      >>> ax.get_ylabel()
      'step (filter norms)'
      >>> path = jnp.array([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> ax = plots.loss_plane(
      ...     lambda p: jnp.sum(p ** 2), path[-1], trajectory=path, num_points=5)
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('step (93 % of the variance)', 'step (7 % of the variance)')
    """
    check_axes(ax)
    if directions is None and trajectory is None:
        return _random_plane(
            loss_fn, params, key, radius, num_points, kernel, data, weight_fn, ax
        )
    name = "trajectory" if directions is None else "directions"
    _check_unused(name, key=key, kernel=kernel)
    risk = Risk.of(loss_fn, params, data, weight_fn)
    plane = plane_of(risk.params, directions, trajectory)
    across, up = _sides(plane.path, radius, num_points)
    losses = risk.losses(_within, _rows(across, up), plane.directions)
    labels = ["step along the first direction", "step along the second direction"]
    if plane.path is not None:
        labels = [f"step ({100 * x:.0f} % of the variance)" for x in plane.shares]
    ax = new_axes(ax, xlabel=labels[0], ylabel=labels[1])
    if radius is not None or plane.path is None:
        ax.set_aspect("equal")
    _fill(ax, across, up, np.asarray(losses))
    if plane.path is not None:
        _draw_path(ax, plane.path)
        ax.set(xlim=(across[0], across[-1]), ylim=(up[0], up[-1]))
    return ax


def _random_plane(
    loss_fn, params, key, radius, num_points, kernel, data, weight_fn, ax
):
    steps = _steps(1.0 if radius is None else radius, num_points)
    rows = _rows(steps, steps)
    losses = _grid_losses(loss_fn, params, key, rows, kernel, data, weight_fn)
    label = "step (filter norms)"
    ax = new_axes(ax, xlabel=label, ylabel=label, aspect="equal")
    _fill(ax, steps, steps, losses)
    return ax


def _check_unused(name, **others):
    for other, value in others.items():
        if value is not None:
            raise ValueError(
                f"{other} belongs to random directions, got it beside {name}; leave one "
                "of them out."
            )


def _steps(radius, num_points):
    _checks.check_rate(radius, "radius")
    _check_points(num_points)
    return np.linspace(-radius, radius, num_points)


def _check_points(num_points):
    _checks.check_count(num_points, "num_points", "points along an axis")
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2 for a line, got {num_points}.")


def _sides(path, radius, num_points):
    """The points along both axes: around the parameters, or around them and a path."""
    if path is None or radius is not None:
        steps = _steps(1.0 if radius is None else radius, num_points)
        return steps, steps
    _check_points(num_points)
    points = np.concatenate([path, np.zeros((1, 2))])
    low, high = points.min(axis=0), points.max(axis=0)
    # Given directions may see nothing of the path: an axis needs some extent.
    margin = np.maximum(MARGIN * (high - low), 0.05 * (high - low).max())
    low, high = low - margin, high + margin
    return [np.linspace(low[i], high[i], num_points) for i in range(2)]


def _rows(across, up):
    grid = np.stack(np.meshgrid(across, up), axis=-1)
    return jnp.asarray(grid.reshape(-1, 2).astype("f4"))


def _within(row, params, directions):
    return jax.tree.map(
        lambda p, d: (
            trees.widen(p)
            + row[0].astype(d.dtype) * d[0]
            + row[1].astype(d.dtype) * d[1]
        ),
        params,
        directions,
    )


def _fill(ax, across, up, losses):
    _check_some_finite(losses)
    losses = np.ma.masked_invalid(losses.reshape(len(up), len(across)))
    filled = ax.contourf(across, up, losses, levels=LEVELS)
    ax.figure.colorbar(filled, ax=ax, label="loss")


def _draw_path(ax, path):
    ax.plot(*path.T, color="w", linewidth=3.5)  # seen on dark and on light contours
    ax.plot(*path.T, ".-", color="C3", label="trajectory", gid="trajectory")
    ax.plot(*path[-1], "*", color="C3", markeredgecolor="w", markersize=14)


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
