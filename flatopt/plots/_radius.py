"""A figure of what each radius does."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from flatopt._core import checks
from flatopt.plots._axes import new_axes


def radius(found: Any, *, ax: Axes | None = None) -> Axes:
    """The rise of the loss and the change of the predictions against the radius.

    Logarithmic on both axes, with 95 % intervals; shaded where radii do nothing and beyond
    the cliff; dashed lines at the radii to try.

    Args:
      found: from :func:`flatopt.radius`.
      ax: matplotlib axes to draw into.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax, jax.numpy as jnp, flatopt
      >>> from flatopt import plots
      >>> found = flatopt.radius(lambda p: jnp.sum(p ** 2), jnp.ones(3), jax.random.key(0))
      >>> plots.radius(found).get_xscale()
      'log'
    """
    if not hasattr(found, "does_nothing"):
        raise TypeError(
            f"found must be what flatopt.radius returned, got {checks.described(found)}; "
            "write plots.radius(flatopt.radius(...))."
        )
    ax = new_axes(ax, xlabel="radius", ylabel="nats", xscale="log", yscale="log")
    for name, estimate in (("rise of the loss", found.rise), ("KL", found.kl)):
        if estimate is not None:
            _curve(ax, found.radii, estimate, name)
    for name, is_there in (
        ("does nothing", found.does_nothing),
        ("beyond the cliff", found.beyond_cliff),
    ):
        if is_there.any():
            there = found.radii[is_there]
            color = "0.85" if name == "does nothing" else "mistyrose"
            ax.axvspan(there[0], there[-1], color=color, label=name, zorder=0)
    for index, value in enumerate(found.bracket):
        label = None if index else "to try"
        ax.axvline(value, color="0.3", linestyle="--", label=label, gid="try")
    ax.legend()
    return ax


def _curve(ax, radii, estimate, name):
    """Values above zero, which a logarithm can show, with their intervals."""
    values = np.asarray(estimate.value, float)
    shown = np.isfinite(values) & (values > 0)
    (line,) = ax.plot(radii[shown], values[shown], marker=".", label=name)
    if estimate.num_probes > 1:
        low, high = (np.asarray(x, float)[shown] for x in estimate.interval())
        low = np.maximum(low, values[shown] / 100)
        ax.fill_between(radii[shown], low, high, alpha=0.2, color=line.get_color())
