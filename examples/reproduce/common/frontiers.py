"""What is kept of one task against what is learned of another: curves, areas, choices."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import figures, statistics
from .methods import TUNING_SEED

GOALS = ("float", "matched", "best")
LABELS = dict(zip(GOALS, ("as trained", "matched", "any accuracy"), strict=True))


class Levels(NamedTuple):
    """Accuracies on the second task at which to compare."""

    curve: np.ndarray
    """Those whose mean is the area."""
    learned: float
    """The one at which a table says what is kept."""
    tolerance: float
    """Accuracy on the first task below the best of the base that counts as matched."""


def frontier(old: Any, new: Any, levels: Any) -> np.ndarray:
    """The most that is kept of the old task where so much is learned of the new, or 0."""
    old, new = np.ravel(old), np.ravel(new)
    return np.array([old[new >= level].max(initial=0) for level in levels])


def area(old: Any, new: Any, levels: Any) -> float:
    """The mean of the frontier over levels of the new task."""
    return frontier(old, new, levels).mean()


def study(
    piece: Callable, network: str, training: Any, methods: dict, levels: Levels
) -> dict:
    """Tune every method on validation data, then train what was chosen.

    Args:
      piece: as in `runs.shown`.
      network: a name for the pieces.
      training: has ``cost``, ``num_steps``, ``settings``, ``tune_again``,
        ``finish_again``.
      methods: by name; the first is what others are compared with.
      levels: where to compare.

    Returns:
      The methods with what they chose and their runs, a summary, and `predictor`.
    """
    found = {}
    for name, method in methods.items():
        cost = piece(f"{network}, {name}, cost", lambda m=method: training.cost(m))
        steps = int(training.num_steps / cost)
        run = functools.partial(training.tune_again, method, steps)
        tuned = piece(f"{network}, {name}, tuning", run)
        settings = training.settings(method)
        base = next(iter(found.values()))["validation"] if found else tuned
        chosen = chosen_of(tuned, base, levels.tolerance)
        places = sorted({*chosen.values()})
        run = functools.partial(training.finish_again, method, steps, places)
        found[name] = {
            "gradients_a_step": cost,
            "num_steps": steps,
            "validation": tuned,
            "chosen": chosen,
            "settings": {place: settings[place] for place in places},
            "runs": piece(f"{network}, {name}, final", run),
        }
    return {
        "methods": found,
        "summary": {goal: summarize(found, goal, levels) for goal in GOALS},
        "predictor": predictor(found, levels),
    }


def chosen_of(tuned: dict, base: dict, tolerance: float) -> dict[str, int]:
    """The place of the setting that each goal chooses on validation data."""
    before, areas = (np.nan_to_num(tuned[name]) for name in ("before", "area"))
    enough = min(max(base["before"]) - tolerance, before.max())
    chosen = {
        "float": before,
        "matched": np.where(before >= enough, areas, -1),
        "best": areas,
    }
    return {goal: int(np.argmax(score)) for goal, score in chosen.items()}


def runs_for(method, goal):
    return method["runs"][str(method["chosen"][goal])]


def summarize(found: dict, goal: str, levels: Levels) -> dict:
    """What is kept and learned, and against the first method seed by seed."""
    tables = {n: measure(runs_for(method, goal), levels) for n, method in found.items()}
    base = next(iter(tables.values()))
    return {
        name: statistics.columns_of(own)
        | {
            f"{key}_gain": statistics.with_interval(own[key] - base[key])
            for key in ("area", "kept")
        }
        for name, own in tables.items()
    }


def measure(runs: dict, levels: Levels) -> dict[str, np.ndarray]:
    """Of each seed what it knew before, kept and learned, and its curvature."""
    before, sharpness = (np.asarray(runs[name]) for name in ("before", "sharpness"))
    curves = [*zip(runs["old"], runs["new"], strict=True)]
    kept = [frontier(*curve, [levels.learned])[0] for curve in curves]
    return {
        "before": before,
        "sharpness": sharpness,
        "area": np.array([area(*curve, levels.curve) for curve in curves]),
        "kept": np.array(kept),
        "learned": np.array([np.max(new) for _, new in curves]),
    }


def predictor(found: dict, levels: Levels) -> dict:
    """Whether curvature before the second task tells what is kept, over all final runs."""
    tables = [
        measure(runs, levels)
        for method in found.values()
        for runs in method["runs"].values()
    ]
    columns = {
        name: np.concatenate([table[name] for table in tables])
        for name in ("sharpness", "area")
    }
    means = {name: [table[name].mean() for table in tables] for name in columns}
    return {
        "runs": len(columns["area"]),
        "settings": len(tables),
        "kendall": statistics.rank_correlation(*columns.values()),
        "kendall_of_means": statistics.rank_correlation(*means.values()),
    }


# Networks one after the other


class OneByOne:
    """Tuning and final runs of networks that are trained one after the other.

    Needs ``again(method, setting, seed, num_steps, split)``: accuracy before the second
    task, accuracies on both along it, shape (rates, points), and the curvature; and
    ``levels``.
    """

    def tune_again(self, method, num_steps):
        """What every setting keeps on validation data, at the first tuning seed."""
        settings, columns = self.settings(method), {"before": [], "area": []}
        for setting in settings:
            found = self.again(method, setting, TUNING_SEED, num_steps, "validation")
            columns["before"].append(found["before"])
            places = found["old"], found["new"], self.levels.curve
            columns["area"].append(area(*places))
        return columns

    def finish_again(self, method, num_steps, places):
        """What final runs of some settings keep on test data, by place and seed."""
        settings, found = self.settings(method), {}
        for place in places:
            runs = [
                self.again(method, settings[place], seed, num_steps, "test")
                for seed in range(1, 1 + self.config.seeds)
            ]
            found[place] = {name: np.stack([r[name] for r in runs]) for name in runs[0]}
        return found


# Figure and table


def figure(network: dict, levels: Levels) -> Figure:
    """The three panels of one network."""
    found, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    draw(axes, network, "", levels.curve)
    return found


def draw(row: Any, network: dict, label: str, levels: Any) -> None:
    """Curves, areas above those of the first method, and areas by curvature."""
    limits = Levels(levels, levels[0], 0.0)
    for method, found in network["methods"].items():
        runs = runs_for(found, "matched")
        curves = [
            frontier(*points, levels)
            for points in zip(runs["old"], runs["new"], strict=True)
        ]
        row[0].plot(100 * levels, 100 * np.mean(curves, axis=0), label=method)
        tables = [measure(runs, limits) for runs in found["runs"].values()]
        row[2].plot(
            np.concatenate([table["sharpness"] for table in tables]),
            100 * np.concatenate([table["area"] for table in tables]),
            ".",
            alpha=0.6,
            label=method,
        )
    row[0].set(
        xlabel="learned of the second task (%)",
        ylabel=f"{label}kept of the first (%)",
    )
    draw_gains(row[1], network["summary"])
    row[2].set(
        xscale="log",
        xlabel="curvature of the first loss along the second's gradient",
        ylabel="area below the curve (%)",
    )
    row[2].xaxis.set(
        major_locator=ticker.LogLocator(subs=(1, 2, 5)),
        major_formatter="{x:g}",
        minor_formatter=ticker.NullFormatter(),
    )
    row[0].legend(fontsize=7)
    row[1].legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_gains(axis: Axes, summary: dict) -> None:
    """The area above the first method's for each goal, with 95 % intervals."""
    for index, (goal, rows) in enumerate(summary.items()):
        gains = {name: row["area_gain"] for name, row in [*rows.items()][1:]}
        means = np.array([100 * gain["mean"] for gain in gains.values()])
        ends = [100 * (gain["high"] - gain["mean"]) for gain in gains.values()]
        places = np.arange(len(gains)) + 0.2 * (index - 1)
        label = LABELS[goal]
        axis.errorbar(means, places, xerr=ends, fmt="o", markersize=4, label=label)
    figures.set_rows(axis, list(gains), fontsize=8)
    axis.axvline(0, color="black", linestyle=":")
    axis.set(xlabel="area above the first method's, points, 95 % intervals")


def lines(network: str, found: dict) -> Iterator[str]:
    """A line for each method and goal, and one of the predictor."""
    for goal, rows in found["summary"].items():
        for name, row in rows.items():
            gain = row["area_gain"]
            yield (
                f"{network}, {goal}, {name:22} "
                f"before {100 * row['before']['mean']:.2f} "
                f"learned {100 * row['learned']['mean']:.2f} "
                f"kept {100 * row['kept']['mean']:.2f} ± "
                f"{100 * row['kept']['error']:.2f} "
                f"area {100 * row['area']['mean']:.2f}, gain "
                f"{100 * gain['mean']:+.2f} "
                f"[{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]"
            )
    yield f"{network}, predictor {found['predictor']}"
