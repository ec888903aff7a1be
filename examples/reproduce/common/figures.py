"""What several figures draw."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator


def band(axis: Axes, x: Any, values: Any, label: str, **style: Any) -> Line2D:
    """The mean of curves, shape (curves, points), and the range of them in that style."""
    values = np.asarray(values)
    (line,) = axis.plot(x, values.mean(axis=0), label=label)
    ends = values.min(axis=0), values.max(axis=0)
    axis.fill_between(x, *ends, facecolor=line.get_color(), alpha=0.25, **style)
    return line


def means(
    axis: Axes, rows: Any, summaries: list[dict], factor: float = 1, **style: Any
) -> None:
    """Means with error bars of ``factor`` errors, one below the other."""
    axis.errorbar(
        [found["mean"] for found in summaries],
        rows,
        xerr=[factor * found["error"] for found in summaries],
        **style,
    )


def set_rows(axis: Axes, labels: Any, **style: Any) -> None:
    """Name the rows, the first on top."""
    axis.set_yticks(range(len(labels)), labels, **style)
    axis.invert_yaxis()


def set_ticks(axis: Axes, ticks: Any) -> None:
    """These ticks alone, on an axis of any scale."""
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def by_batch_size(axis: Axes, minima: pd.DataFrame, x: str, y: str) -> None:
    """Points of one color for each batch size, both axes logarithmic."""
    for index, (size, rows) in enumerate(minima.groupby("batch_size")):
        axis.loglog(rows[x], rows[y], ".", color=f"C{index}", label=f"B = {size}")


def legend_of_lost(axis: Axes, rows: pd.DataFrame) -> None:
    """A legend that tells how many runs found no minimum."""
    lost = int((rows["outcome"] != "minimum").sum())
    axis.legend(fontsize=8, title=f"{lost} of {len(rows)} runs lost", title_fontsize=8)
