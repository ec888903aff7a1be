"""Axes to draw into."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def new_axes(ax, **labels):
    check_axes(ax)
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    ax.set(**labels)
    return ax


def check_axes(ax):
    """Reject what is no matplotlib axes, such as the array of ``plt.subplots(1, 2)``."""
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(
            f"ax must be one matplotlib Axes, got {type(ax).__name__}; give one that "
            "plt.subplots() returns, or leave it out."
        )


def ink():
    """The color of lines in a style, light or dark."""
    return plt.rcParams["axes.edgecolor"]
