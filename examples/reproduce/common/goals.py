"""Which setting a method takes by what is kept after a change, and what it gains by it.

A target is a change and its level, such as ``("bits", 3)``; targets have names.
"""

import functools
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from . import figures, statistics
from .after import LEVELS
from .links import SGD

GOALS = ("float", "matched", "best")
RATE = "SGD, largest rate"
LABELS = {
    "bits": "bits of the weights, by channel",
    "noise": "noise on the weights, in max|W|",
    "pruned": "share of weights set to zero",
}


def column_of(found: dict, target: tuple) -> np.ndarray:
    """What was kept at a target, of every run."""
    change, level = target
    return np.asarray(found[change])[:, LEVELS[change].index(level)]


def study(piece, network, training, methods, targets, tolerance):
    """Tune every method on validation images, then train what was chosen.

    Args:
      piece: as in `runs.shown`.
      network: a name for the pieces.
      training: has ``cost``, ``num_steps``, ``settings``, ``tune_kept``, ``finish_kept``.
      methods: by name; SGD comes first.
      targets: by name.
      tolerance: accuracy below the best of SGD that still counts as matched.

    Returns:
      The methods with what they chose and their runs, a summary, `rates` and `claims`.
    """
    found, tried, enough = {}, {}, None
    for name, method in methods.items():
        cost = piece(f"{network}, {name}, cost", lambda m=method: training.cost(m))
        steps = int(training.num_steps / cost)
        run = functools.partial(training.tune_kept, method, steps)
        tuned = piece(f"{network}, {name}, tuning", run)
        settings = training.settings(method)
        if name == SGD:
            enough = max(tuned["float"]) - tolerance
        tried[name] = tried_of(settings, tuned)
        found[name] = {
            "gradients_a_step": cost,
            "num_steps": steps,
            "validation": shortened(tuned, targets),
            "chosen": chosen_of(name, settings, tuned, enough, targets),
        }
        places = sorted({*found[name]["chosen"].values()})
        run = functools.partial(training.finish_kept, method, steps, places)
        found[name]["runs"] = piece(f"{network}, {name}, final", run)
        found[name]["settings"] = {place: settings[place] for place in places}
    return {
        "methods": found,
        "summary": summarize([found], targets),
        "rates": rates(tried[SGD]),
        "claims": claims(tried),
    }


def shortened(tuned, targets):
    """Validation accuracies of every setting as trained and at the targets."""
    kept = {name: column_of(tuned, target) for name, target in targets.items()}
    return {"float": tuned["float"]} | kept


def chosen_of(
    name: str, settings: list[dict], tuned: dict, enough: float, targets: dict
) -> dict[str, int]:
    """The place of the setting that each goal chooses on validation images."""
    trained = np.nan_to_num(tuned["float"])
    enough = min(enough, trained.max())  # the best one, where none is good enough
    chosen = {}
    for target, at in targets.items():
        kept = np.nan_to_num(column_of(tuned, at))
        within = np.where(trained >= enough, kept, -1)
        chosen[f"float, {target}"] = np.argmax(trained)
        chosen[f"matched, {target}"] = np.argmax(within)
        chosen[f"best, {target}"] = np.argmax(kept)
        if name == SGD:
            speed = np.array([setting["learning_rate"] for setting in settings])
            fastest = speed == speed[trained >= enough].max()
            chosen[f"{RATE}, {target}"] = np.argmax(np.where(fastest, within, -2))
    return {goal: int(place) for goal, place in chosen.items()}


def rows_of(found: dict) -> Iterator[tuple]:
    """Each method, and the name of its goals: SGD at its largest rate is one more."""
    yield from ((name, name, None) for name in found)
    yield RATE, SGD, RATE


def runs_for(method, goal, target):
    return method["runs"][str(method["chosen"][f"{goal}, {target}"])]


def summarize(networks: list[dict], targets: dict) -> dict:
    """Accuracy as trained and after a change, and against SGD seed by seed."""
    return {
        goal: {
            target: {
                row: against(
                    [runs_for(found[name], own or goal, target) for found in networks],
                    [runs_for(found[SGD], goal, target) for found in networks],
                    at,
                    whole_curve=goal == "matched",
                )
                for row, name, own in rows_of(networks[0])
            }
            for target, at in targets.items()
        }
        for goal in GOALS
    }


def against(own, base, target, whole_curve=True):
    """Of runs of the same seeds, a list of networks each: means over the networks."""
    change, level = target

    def mean(runs, name):
        return np.mean([found[name] for found in runs], axis=0)

    trained, base_trained = (mean(runs, "float") for runs in (own, base))
    kept, base_kept = (mean(runs, change).T for runs in (own, base))
    levels = {
        str(at): {
            "kept": statistics.mean_and_error(kept[column]),
            "gain": statistics.with_interval(kept[column] - base_kept[column]),
        }
        for column, at in enumerate(LEVELS[change])
    }
    return (
        {
            "float": statistics.mean_and_error(trained),
            "float_gain": statistics.with_interval(trained - base_trained),
        }
        | levels[str(level)]
        | ({"levels": levels} if whole_curve else {})
    )


# What the papers claim, over all settings on validation images


def tried_of(settings: list[dict], tuned: dict) -> pd.DataFrame:
    """A row for each setting that trains within 0.02 of the best: what changes took."""
    trained = np.asarray(tuned["float"])
    table = pd.DataFrame(settings)
    for name, target in (("lost", ("bits", 3)), ("noise", ("noise", 0.1))):
        table[name] = trained - column_of(tuned, target)
    return table[trained >= trained.max() - 0.02]


def rates(table: pd.DataFrame) -> dict:
    """Whether what 3 bits take away from SGD follows learning rate and decay."""
    names = ["learning_rate", "weight_decay"]
    return {"settings": len(table)} | {
        name: statistics.correlation_within(table[[other]], table[name], table["lost"])
        for name, other in zip(names, names[::-1], strict=True)
    }


def claims(tried: dict[str, pd.DataFrame]) -> dict:
    """What a falling rate adds to what 3 bits take, and whether flatness tells it.

    Flatness is what noise takes. Pairs of settings of the average of weights differ in
    whether the learning rate falls.
    """
    found = {
        name: {
            "settings": len(table),
            "kendall": statistics.rank_correlation(table["noise"], table["lost"]),
        }
        for name, table in (tried | {"all": pd.concat(tried.values())}).items()
    }
    table = next((t for t in tried.values() if "constant" in t), None)
    if table is None:
        return {"flatness": found}
    names = ["learning_rate", "weight_decay", "radius"]
    pairs = table.pivot_table("lost", names, "constant").reindex(columns=[0.0, 1.0])
    falling = (pairs[0.0] - pairs[1.0]).dropna()
    return {"flatness": found, "falling_rate": statistics.mean_and_error(falling)}


# Figure and table


def draw_curves(axis: Axes, methods: dict, name: str, target: tuple) -> None:
    """Accuracy by the strength of a change, at the setting chosen at matched accuracy."""
    change, level = target
    levels = LEVELS[change]
    places = range(len(levels)) if change == "bits" else levels
    for row, method, own in rows_of(methods):
        runs = runs_for(methods[method], own or "matched", name)
        found = statistics.mean_and_error(100 * np.asarray(runs[change]))
        axis.errorbar(places, found["mean"], found["error"], capsize=2, label=row)
    if change == "bits":
        axis.set_xticks(places, levels)
    axis.axvline(places[levels.index(level)], color="black", linestyle=":")
    axis.set(xlabel=LABELS[change])


def draw_gains(axis: Axes, summary: dict) -> None:
    """What each method keeps more than SGD, with 95 % intervals."""
    for index, (target, rows) in enumerate(summary.items()):
        gains = {name: row["gain"] for name, row in rows.items() if name != SGD}
        means = np.array([100 * gain["mean"] for gain in gains.values()])
        ends = [100 * (gain["high"] - gain["mean"]) for gain in gains.values()]
        places = np.arange(len(gains)) + 0.2 * (index - 1)
        label = f"{target} pruned" if target.endswith("%") else target
        axis.errorbar(means, places, xerr=ends, fmt="o", markersize=4, label=label)
    figures.set_rows(axis, list(gains), fontsize=8)
    axis.axvline(0, color="black", linestyle=":")
    axis.set(xlabel="percentage points above SGD, 95 % intervals")


def lines(network: str, summary: dict) -> Iterator[str]:
    """A line for each method, goal and target."""
    for goal, targets in summary.items():
        for target, rows in targets.items():
            for name, row in rows.items():
                gain = row["gain"]
                yield (
                    f"{network}, {goal}, {target:9} {name:22} "
                    f"trained {100 * row['float']['mean']:.2f} "
                    f"kept {100 * row['kept']['mean']:.2f} "
                    f"± {100 * row['kept']['error']:.2f}, "
                    f"gain {100 * gain['mean']:+.2f} "
                    f"[{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]"
                )
