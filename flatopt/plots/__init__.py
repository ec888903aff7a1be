"""Figures of curvature and of the loss around a point. Needs matplotlib.

Each function draws into ``ax``, or into a new figure, and returns the axes.
"""

try:
    import matplotlib.pyplot as _pyplot  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flatopt.plots needs matplotlib, which is not installed; run "
        "pip install 'flatopt[plot]'."
    ) from error

from flatopt.plots._curvature import (
    layer_traces,
    spectral_density,
    spectrum_over_training,
)
from flatopt.plots._losses import loss_line, loss_plane
from flatopt.plots._radius import radius
from flatopt.plots._stability import (
    stability_losses,
    stability_plane,
    stability_report,
    stability_thresholds,
)

__all__ = [
    "layer_traces",
    "loss_line",
    "loss_plane",
    "radius",
    "spectral_density",
    "spectrum_over_training",
    "stability_losses",
    "stability_plane",
    "stability_report",
    "stability_thresholds",
]
