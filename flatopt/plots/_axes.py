"""Axes to draw into."""

import matplotlib.pyplot as plt


def new_axes(ax, **labels):
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    ax.set(**labels)
    return ax


def ink():
    """The color of lines in a style, light or dark."""
    return plt.rcParams["axes.edgecolor"]
