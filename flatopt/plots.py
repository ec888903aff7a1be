"""Figures of curvature and of the loss around a point. Needs matplotlib.

Each function draws into ``ax``, or into a new figure, and returns the axes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import curvature, kernels, stability
from flatopt._core import binding, trees
from flatopt._core.risk import Risk
from flatopt._core.types import KernelFn, LossFn, Sampling, WeightFn
from flatopt.stability import _checks

try:
    import matplotlib.pyplot as plt
except ImportError as error:
    raise ImportError(
        "flatopt.plots needs matplotlib, which is not installed; run "
        "pip install 'flatopt[plot]'."
    ) from error


def _axes(ax, **labels):
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    ax.set(**labels)
    return ax


def spectral_density(
    density: curvature.SpectralDensity,
    *,
    width: float | None = None,
    num_points: int = 1000,
    ax: Any = None,
):
    """The eigenvalue density on a logarithmic scale.

    Args:
      density: from :func:`flatopt.curvature.spectral_density`.
      width: of the Gaussian that blurs each node; default: a hundredth of the range.
      num_points: number of points of the curve.
      ax: matplotlib axes to draw into.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import numpy as np
      >>> from flatopt import curvature, plots
      >>> nodes, weights = np.array([[0.0, 1.0, 5.0]]), np.array([[0.8, 0.1, 0.1]])
      >>> ax = plots.spectral_density(curvature.SpectralDensity(nodes, weights))
      >>> ax.get_xlabel()
      'eigenvalue'
    """
    _checks.check_count(num_points, "num_points", "points of the curve")
    low, high = density.nodes.min(), density.nodes.max()
    if width is not None:
        _checks.check_rate(width, "width")
    else:
        width = max((high - low) / 100, 1e-6 * max(abs(low), abs(high))) or 1.0
    points = np.linspace(low - 5 * width, high + 5 * width, num_points)
    ax = _axes(ax, xlabel="eigenvalue", ylabel="density", yscale="log")
    heights = density.density(points, width)
    ax.plot(points, heights)
    floor = max(heights.max() * 1e-8, np.finfo("f8").tiny)
    ax.set_ylim(bottom=floor)
    return ax


def layer_traces(probe: curvature.Probe, *, ax: Any = None):
    """The trace of each layer's block as bars, with 95 % intervals.

    Args:
      probe: from :func:`flatopt.curvature.probe`.
      ax: matplotlib axes to draw into.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature, plots
      >>> operator = curvature.hessian(lambda p: jnp.sum(p["w"] ** 2), {"w": jnp.ones(9)})
      >>> ax = plots.layer_traces(curvature.probe(operator, jax.random.key(0)))
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['w']
    """
    low, _ = probe.layer_traces.interval()
    names = [
        trees.path_name(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(probe.layer_traces.value)
    ]
    values = np.array(jax.tree.leaves(probe.layer_traces.value), "f8")
    errors = values - np.array(jax.tree.leaves(low), "f8")
    ax = _axes(ax, xlabel="trace of the Hessian's block")
    ax.barh(names, values, xerr=errors, capsize=2)
    ax.invert_yaxis()
    return ax


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
    losses = np.asarray(risk.losses(move, jnp.asarray(rows), keys))
    if not np.isfinite(losses).any():
        raise ValueError(
            f"the loss is finite at none of the {len(losses)} points, got "
            f"{losses[len(losses) // 2]:g} in the middle; look at the loss at params "
            "first, and choose a smaller radius."
        )
    return losses


def loss_line(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    radius: float = 1.0,
    num_points: int = 41,
    kernel: KernelFn | None = None,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    ax: Any = None,
):
    """The loss along a random direction through the parameters.

    The direction is a draw of a kernel: by default Gaussian and filter-normalized, so that
    curves of differently scaled networks compare. Where the loss is not finite there is
    a gap.

    Args:
      loss_fn: ``loss_fn(params)`` or ``loss_fn(params, batch)``.
      params: the parameters, in the middle.
      key: a JAX random key, for the direction.
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
    steps = _steps(radius, num_points)
    rows = steps[:, None].astype("f4")
    losses = _grid_losses(loss_fn, params, key, rows, kernel, data, weight_fn)
    ax = _axes(ax, xlabel="step (filter norms)", ylabel="loss")
    ax.plot(steps, losses)
    return ax


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
    ax: Any = None,
):
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
    ax = _axes(
        ax, xlabel="step (filter norms)", ylabel="step (filter norms)", aspect="equal"
    )
    filled = ax.contourf(
        steps, steps, losses.reshape(num_points, num_points), levels=20
    )
    ax.figure.colorbar(filled, ax=ax, label="loss")
    return ax


def stability_thresholds(
    lin: stability.Linearization,
    *,
    batch_sizes: Any = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    sampling: Sampling = "without_replacement",
    ax: Any = None,
):
    """The largest stable learning rate against the batch size, by each theory.

    Args:
      lin: from :func:`flatopt.stability.linearize`.
      batch_sizes: the batch sizes; default: powers of two up to all examples.
      learning_rate: with ``batch_size``, a setting to mark.
      batch_size: with ``learning_rate``, a setting to mark.
      sampling: see :func:`flatopt.stability.thresholds`.
      ax: matplotlib axes to draw into.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax.numpy as jnp
      >>> from flatopt import plots, stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> ax = plots.stability_thresholds(lin)
      >>> ax.get_xlabel()
      'batch size'
    """
    _check_mark(learning_rate, batch_size, lin)
    found = _thresholds(lin, batch_sizes, sampling)
    return _draw_thresholds(found, learning_rate, batch_size, ax)


def _thresholds(lin, batch_sizes, sampling):
    """Thresholds by batch size."""
    if batch_sizes is not None and not np.size(batch_sizes):
        raise ValueError("batch_sizes must hold batch sizes, got none; write [1, 8].")
    if batch_sizes is None:
        n = len(lin.coordinates)
        batch_sizes = sorted({*(2 ** np.arange(int(np.log2(n)) + 1)).tolist(), n})
    sizes = np.atleast_1d(batch_sizes).tolist()
    return {b: stability.thresholds(lin, b, sampling=sampling) for b in sizes}


def _setting_axes(ax):
    return _axes(
        ax, xlabel="batch size", ylabel="learning rate", xscale="log", yscale="log"
    )


def _draw_thresholds(found, learning_rate, batch_size, ax):
    ax = _setting_axes(ax)
    batch_sizes, found = list(found), list(found.values())
    for name in found[0].rates:
        rates = np.array([f.rates[name] for f in found])
        rates[~np.isfinite(rates)] = np.nan
        exact = name == "mean_square"
        ax.plot(
            batch_sizes,
            rates,
            label=name.replace("_", " ") + (" (exact)" if exact else ""),
            linewidth=3 if exact else 1,
        )
    _mark(ax, learning_rate, batch_size)
    ax.legend(fontsize="small")
    return ax


def _check_mark(learning_rate, batch_size, lin):
    """A setting to mark is both, or none."""
    _checks.check_linearization(lin)
    if (learning_rate is None) != (batch_size is None):
        raise ValueError(
            "learning_rate and batch_size mark a setting together, got "
            f"{learning_rate!r} and {batch_size!r}; give both or none."
        )
    if learning_rate is not None:
        _checks.check_rate(learning_rate)
        _checks.check_batch(batch_size, len(lin.coordinates), "bernoulli")


def _mark(ax, learning_rate, batch_size):
    if learning_rate is not None:
        ax.plot(batch_size, learning_rate, "k*", markersize=12, label="this setting")


def stability_plane(
    lin: stability.Linearization,
    *,
    mu: float | None = None,
    batch_sizes: Any = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    sampling: Sampling = "without_replacement",
    ax: Any = None,
):
    r"""The Frobenius norm over its bound, for each learning rate and batch size.

    Colors show :math:`\|H\|_F` over :math:`1 / (\eta \sqrt{p \mu})`, which is
    :math:`\sqrt{B / \mu} / \eta` for much data; above the thin line, where they are equal,
    the theory of Wu, Wang and Su has SGD leave. The thick line is the exact threshold.

    Args:
      lin: from :func:`flatopt.stability.linearize`.
      mu: the alignment; default: that of ``lin``, or 1 at zero loss.
      batch_sizes, learning_rate, batch_size, sampling, ax: see
        :func:`stability_thresholds`.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax.numpy as jnp
      >>> from flatopt import plots, stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> ax = plots.stability_plane(lin)
      >>> ax.get_ylabel()
      'learning rate'
    """
    _check_mark(learning_rate, batch_size, lin)
    if mu is not None:
        _checks.check_rate(mu, "mu")
    found = _thresholds(lin, batch_sizes, sampling)
    return _draw_plane(lin, found, mu, learning_rate, batch_size, sampling, ax)


def _draw_plane(lin, found, mu, learning_rate, batch_size, sampling, ax):
    batch_sizes, found = list(found), list(found.values())
    if mu is None:
        mu = (
            float(stability.alignment(lin).mu)
            if np.any(np.asarray(lin.residuals))
            else 1.0
        )
    exact = np.array([f.mean_square for f in found])
    rates = np.geomspace(exact.min() / 10, 4 * found[0].gradient_descent, 60)
    norm = float(np.linalg.norm(np.asarray(lin.eigenvalues, "f8")))
    n = len(lin.coordinates)
    bounds_at_one = np.array(
        [
            stability.sharpest_minimum(
                1.0, b, n, mu=mu, sampling=sampling
            ).frobenius_norm
            for b in batch_sizes
        ]
    )
    bounds = bounds_at_one[None] / rates[:, None]
    ax = _setting_axes(ax)
    ratio = np.log10(np.maximum(norm / bounds, 1e-2))
    filled = ax.contourf(batch_sizes, rates, ratio, levels=20, cmap="coolwarm")
    ax.figure.colorbar(filled, ax=ax, label="log10 of Frobenius norm over its bound")
    if ratio.min() < 0 < ratio.max():
        ax.contour(batch_sizes, rates, ratio, levels=[0], colors="k", linewidths=1)
        ax.plot([], [], "k", linewidth=1, label="norm at its bound")
    ax.plot(batch_sizes, exact, linewidth=3, label="exact threshold")
    _mark(ax, learning_rate, batch_size)
    ax.legend(fontsize="small")
    return ax


def stability_losses(
    lin: stability.Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    num_steps: int = 100,
    num_runs: int = 200,
    key: jax.Array | None = None,
    sampling: Sampling = "without_replacement",
    ax: Any = None,
):
    """Losses of linearized SGD: the exact mean, and the median and spread of runs.

    Rare runs carry the mean: it can grow while a typical run shrinks.

    Args:
      lin: from :func:`flatopt.stability.linearize`.
      learning_rate: the step size.
      batch_size: B.
      num_steps: number of steps.
      num_runs: number of runs.
      key: a JAX random key for the runs; default: ``jax.random.key(0)``.
      sampling, ax: see :func:`stability_thresholds`.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax.numpy as jnp
      >>> from flatopt import plots, stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> ax = plots.stability_losses(lin, 3.0, 1, num_steps=3)
      >>> round(float(ax.lines[0].get_ydata()[-1]), 3)  # 2.5 to the third
      15.625
    """
    arguments = learning_rate, batch_size, num_steps
    exact = stability.expected_losses(lin, *arguments, sampling=sampling)
    key = jax.random.key(0) if key is None else key
    runs = np.asarray(
        stability.simulate(lin, key, *arguments, num_runs=num_runs, sampling=sampling)
    )
    ax = _axes(ax, xlabel="step", ylabel="loss, linearized", yscale="log")
    ax.plot(exact, linewidth=2, label="mean, exact")
    (line,) = ax.plot(np.median(runs, axis=0), "--", label="median run")
    low, high = np.quantile(runs, [0.05, 0.95], axis=0)
    ax.fill_between(
        np.arange(num_steps + 1),
        low,
        high,
        alpha=0.2,
        color=line.get_color(),
        label="nine runs of ten",
    )
    ax.legend(fontsize="small")
    return ax


def stability_report(
    lin: stability.Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    sampling: Sampling = "without_replacement",
):
    """Thresholds, norms and losses at one setting, side by side.

    Args:
      lin: from :func:`flatopt.stability.linearize`.
      learning_rate: the step size.
      batch_size: B.
      sampling: see :func:`flatopt.stability.thresholds`.

    Returns:
      The three axes, of :func:`stability_thresholds`, :func:`stability_plane` and
      :func:`stability_losses`.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax.numpy as jnp
      >>> from flatopt import plots, stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> len(plots.stability_report(lin, 1.0, 1))
      3
    """
    _check_mark(learning_rate, batch_size, lin)
    _, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    setting = learning_rate, batch_size
    found = _thresholds(lin, None, sampling)
    _draw_thresholds(found, *setting, axes[0])
    _draw_plane(lin, found, None, *setting, sampling, axes[1])
    stability_losses(lin, *setting, sampling=sampling, ax=axes[2])
    return tuple(axes)
