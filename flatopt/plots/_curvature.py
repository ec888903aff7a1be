"""Figures of curvature: its spectrum, and its trace layer by layer."""

import jax
import numpy as np
from matplotlib.axes import Axes

from flatopt import curvature
from flatopt._core import trees
from flatopt.plots._axes import new_axes
from flatopt.stability import _checks


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
        width = max((high - low) / 100, 1e-6 * max(abs(low), abs(high))) or 1.0
    points = np.linspace(low - 5 * width, high + 5 * width, num_points)
    ax = new_axes(ax, xlabel="eigenvalue", ylabel="density", yscale="log")
    heights = density.density(points, width)
    ax.plot(points, heights)
    floor = max(heights.max() * 1e-8, np.finfo("f8").tiny)
    ax.set_ylim(bottom=floor)
    return ax


def layer_traces(probe: curvature.Probe, *, ax: Axes | None = None) -> Axes:
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
    ax = new_axes(ax, xlabel="trace of the Hessian's block")
    ax.barh(names, values, xerr=errors, capsize=2)
    ax.invert_yaxis()
    return ax
