"""Figures of curvature: its spectrum, also over training, and its trace by layer."""

from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes

from flatopt import curvature
from flatopt._core import checks, trees
from flatopt.plots._axes import ink, new_axes
from flatopt.stability import _checks

FAINT = 1e-6  # of the largest density: shown as the same color below
FAR = 4.0  # times the largest eigenvalue: a limit beyond it leaves the figure


def spectral_density(
    density: curvature.SpectralDensity,
    *,
    width: float | None = None,
    num_points: int = 1000,
    ax: Axes | None = None,
) -> Axes:
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
        width = _blur(low, high)
    points = np.linspace(low - 5 * width, high + 5 * width, num_points)
    ax = new_axes(ax, xlabel="eigenvalue", ylabel="density", yscale="log")
    heights = density.density(points, width)
    ax.plot(points, heights)
    floor = max(heights.max() * 1e-8, np.finfo("f8").tiny)
    ax.set_ylim(bottom=floor)
    return ax


def _blur(low, high):
    """A hundredth of the range; of a single point a little of its magnitude."""
    return max((high - low) / 100, 1e-6 * max(abs(low), abs(high))) or 1.0


def layer_traces(
    probe: curvature.Probe, *, depth: int | None = None, ax: Axes | None = None
) -> Axes:
    """The trace of each layer's block as bars, with 95 % intervals.

    Args:
      probe: from :func:`flatopt.curvature.probe`.
      depth: number of keys of a path that name a layer: with 2, ``encoder/layer_3`` is one
        bar, whatever is in it. Its interval adds those of its leaves, which is the widest
        that it can be. None: a bar for each leaf.
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
    if not isinstance(probe, curvature.Probe):
        raise TypeError(
            f"probe must be what curvature.probe returned, got {checks.described(probe)}; "
            "write plots.layer_traces(curvature.probe(operator, key))."
        )
    if depth is not None:
        checks.check_count(depth, "depth", "it counts the keys that name a layer")
    low, _ = probe.layer_traces.interval()
    named = jax.tree_util.tree_leaves_with_path(probe.layer_traces.value)
    bars: dict[Any, np.ndarray] = {}  # by keys: layers of one name stay apart
    for (path, value), end in zip(named, jax.tree.leaves(low), strict=True):
        layer = path[:depth]
        bar = np.array([float(value), float(value) - float(end)])
        bars[layer] = bars.get(layer, 0.0) + bar
    places = np.arange(len(bars))
    values, errors = np.array(list(bars.values())).T
    ax = new_axes(ax, xlabel="trace of the block")
    ax.barh(places, values, xerr=errors, capsize=2, ecolor=ink())
    ax.set_yticks(places, [trees.path_name(layer) for layer in bars])
    ax.invert_yaxis()
    return ax


def spectrum_over_training(
    steps: Any,
    spectra: Any,
    *,
    learning_rate: Any = None,
    num_points: int = 200,
    ax: Axes | None = None,
) -> Axes:
    """Eigenvalues, or their whole density, against the steps of training.

    Args:
      steps: shape (steps,), ascending: when each spectrum was measured.
      spectra: one a step. Either all from :func:`flatopt.curvature.spectral_density`: then
        the density is shown by color, on a logarithmic scale, blurred by a hundredth of the
        range of all. Or eigenvalues, as lines: from :func:`flatopt.curvature.eigenpairs`,
        with bands of their bounds, or plain numbers of shape (steps,) or (steps, k).
      learning_rate: that of training, one number or one a step, to mark 2 over it, above
        which plain gradient descent leaves.
      num_points: number of points of the density along the eigenvalues.
      ax: matplotlib axes to draw into.

    Returns:
      The axes.

    Raises:
      TypeError, ValueError: for spectra of several kinds, or not one a step.

    References:
      Ghorbani, Krishnan, Xiao, `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, ICML 2019; Cohen, Kaur, Li,
      Kolter, Talwalkar, `Gradient Descent on Neural Networks Typically Occurs at the Edge
      of Stability <https://arxiv.org/abs/2103.00065>`_, ICLR 2021.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> from flatopt import plots
      >>> ax = plots.spectrum_over_training([0, 10, 20], [5.0, 9.0, 20.0], learning_rate=0.1)
      >>> [float(y) for y in ax.lines[-1].get_ydata()]
      [20.0, 20.0, 20.0]
    """
    steps, spectra = _check_steps(steps, spectra)
    _checks.check_count(num_points, "num_points", "points of the density")
    limits = _limits(learning_rate, len(steps))
    is_density = [isinstance(x, curvature.SpectralDensity) for x in spectra]
    ax = new_axes(ax, xlabel="step", ylabel="eigenvalue")
    if all(is_density):
        top = _draw_densities(ax, steps, spectra, num_points)
    else:
        top = _draw_eigenvalues(ax, steps, *_values_and_bounds(spectra))
    if limits is not None:
        _draw_limits(ax, steps, limits, top)
    return ax


def _check_steps(steps, spectra):
    """Ascending numbers, and as many spectra."""
    try:
        numbers, spectra = np.asarray(steps, "f8"), list(spectra)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "steps and spectra must be lists of one length, got "
            f"{checks.described(steps)} and {checks.described(spectra)}; give one spectrum "
            "for each step."
        ) from error
    if numbers.shape != (len(spectra),) or not len(spectra):
        raise ValueError(
            f"spectra must be one a step, got {len(spectra)} for steps of shape "
            f"{numbers.shape}; give lists of one length."
        )
    if not np.isfinite(numbers).all() or (np.diff(numbers) <= 0).any():
        raise ValueError(
            f"steps must ascend, got {checks.described(steps)}; sort both lists by it."
        )
    return numbers, spectra


def _limits(learning_rate, count):
    """2 over the learning rate at each step."""
    if learning_rate is None:
        return None
    rates = learning_rate
    if not isinstance(rates, list | tuple) and np.ndim(rates) == 0:
        rates = [learning_rate] * count
    if np.shape(rates) != (count,):
        raise ValueError(
            "learning_rate must be one number, or one a step, got shape "
            f"{np.shape(rates)} for {count} steps; evaluate a schedule at the steps."
        )
    for rate in rates:
        _checks.check_rate(rate)
    return np.array([2 / float(rate) for rate in rates])


def _values_and_bounds(spectra):
    """Eigenvalues and their bounds, shape (steps, k) each."""
    pairs = [
        (x.values, x.residuals) if isinstance(x, curvature.Eigenpairs) else (x, None)
        for x in spectra
    ]
    try:
        if any(hasattr(x, "_fields") for x, _ in pairs):
            raise TypeError("numbers of other kinds")
        values = np.stack([np.asarray(x, "f8").reshape(-1) for x, _ in pairs])
    except (TypeError, ValueError) as error:
        raise TypeError(
            "spectra must all be densities, or as many eigenvalues at each step, got "
            f"{', '.join(sorted({type(x).__name__ for x in spectra}))} that do not go "
            "together; give one kind, and as many eigenvalues of each."
        ) from error
    bounds = [
        0 * row if b is None else b for row, (_, b) in zip(values, pairs, strict=True)
    ]
    return values, np.stack(bounds)


def _draw_eigenvalues(ax, steps, values, bounds):
    for index, (value, bound) in enumerate(zip(values.T, bounds.T, strict=True), 1):
        (line,) = ax.plot(steps, value, ".-", label=f"eigenvalue {index}")
        ax.fill_between(
            steps, value - bound, value + bound, alpha=0.2, color=line.get_color()
        )
    ax.legend()
    return np.max(values, where=np.isfinite(values), initial=0.0)


def _draw_densities(ax, steps, spectra, num_points):
    low = min(x.nodes.min() for x in spectra)
    high = max(x.nodes.max() for x in spectra)
    width = _blur(low, high)
    points = np.linspace(low - 3 * width, high + 3 * width, num_points)
    heights = np.stack([x.density(points, width) for x in spectra], axis=1)
    shown = np.log10(np.maximum(heights, heights.max() * FAINT))
    colors = ax.pcolormesh(_edges(steps), _edges(points), shown)
    ax.figure.colorbar(colors, ax=ax, label="log10 of the density")
    return max(high, 0.0)


def _edges(centers):
    """The edges of cells around points; a single point has a cell of length 1."""
    if len(centers) < 2:
        return centers[0] + np.array([-0.5, 0.5])
    middles = (centers[1:] + centers[:-1]) / 2
    first, last = 2 * centers[0] - middles[0], 2 * centers[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def _draw_limits(ax, steps, limits, top):
    """The line, unless it is so far above that it would flatten what is below."""
    label, is_near = "2 / learning rate", limits.min() <= FAR * top
    if not is_near:
        lowest = np.format_float_positional(limits.min(), 3, fractional=False, trim="-")
        label += f": {lowest} or more, above the figure"
    bottom, ceiling = ax.get_ylim()
    ax.plot(steps, limits, "--", color="C3", label=label, gid="limit")
    if not is_near:
        ax.set_ylim(bottom, ceiling)
    ax.legend()
