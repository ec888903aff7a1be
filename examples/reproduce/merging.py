"""Do networks that were fine-tuned on different tasks merge better where they are flat?

Small networks learn upright handwritten digits by SGD. From there copies are fine-tuned on
four tasks (digits turned by quarters of a circle, and mirrored), by SGD, also at larger
learning rates, and by flat methods, at equal gradients, counted by flatopt, and at equal
steps. Two or four copies are then merged: their weights are averaged, or their changes are
added to the start with a weight that validation images choose (task arithmetic). Every
method chooses its settings on validation images, for the accuracy of the copies alone or
of what they merge to.
"""

import dataclasses
import functools

import common
import matplotlib.pyplot as plt
import numpy as np
from common import figures, grid, links, statistics
from common.after import Method
from common.links import FILTERWISE, SGD
from common.merge import COUNTS, LINE, WEIGHTS, Training

BASE = Method(None, [{"learning_rate": 0.1, "weight_decay": 3e-3}])
GOALS = ("alone", "2", "4")
RATES, DECAYS = (0.01, 0.03, 0.1), (1e-3,)
MANY_RATES, MANY_DECAYS = (0.003, 0.01, 0.03, 0.06, 0.1, 0.2), (1e-3, 1e-2)
LARGER_RATES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # above those that SGD chooses


def flat_grid(*radii):
    return grid(learning_rate=RATES, weight_decay=DECAYS, radius=radii)


# Twelve settings each.
METHODS = {
    SGD: Method(None, grid(learning_rate=MANY_RATES, weight_decay=MANY_DECAYS)),
    "SGD, larger rate": Method(
        None, grid(learning_rate=LARGER_RATES, weight_decay=MANY_DECAYS)
    ),
    "average of weights": Method(
        None,
        grid(
            learning_rate=RATES,
            weight_decay=DECAYS,
            radius=(0.95, 0.99),
            constant=(0.0, 1.0),
        ),
        averaged=True,
    ),
    "SAM": Method(links.sam, flat_grid(0.05, 0.1, 0.2, 0.4)),
    "NSO": Method(links.nso, flat_grid(0.03, 0.06, 0.1, 0.15)),
    "LPF-SGD": Method(links.lpf(FILTERWISE), flat_grid(0.02, 0.04, 0.08, 0.12)),
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    networks: tuple[str, ...] = ("deep MLP", "CNN")
    """Networks to train."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods of fine-tuning; SGD must come first."""
    settings: int = 12
    """Number of settings that each method chooses from, spread over its grid."""
    seeds: int = 10
    """Number of final runs: images, start, batches and noise change."""
    tuning_seeds: int = 2
    """Number of runs of each setting to choose from; other seeds than the final ones."""
    train_images: int = 384
    """Number of training images of the start."""
    new_images: int = 192
    """Number of training images of each task, all others."""
    batch_size: int = 32
    """Images of a batch."""
    epochs: int = 60
    """Passes over the images of the start."""
    new_steps: int = 180
    """Steps of a fine-tuning of one gradient a step."""


SMOKE = {
    "networks": ("deep MLP",),
    "methods": (SGD,),
    "settings": 2,
    "seeds": 2,
    "tuning_seeds": 1,
    "train_images": 32,
    "new_images": 32,
    "batch_size": 16,
    "epochs": 2,
    "new_steps": 4,
}


def compute(config, piece):
    networks = {}
    with common.shown(piece) as piece:
        for name in config.networks:
            training = Training(config, name, BASE, BASE.settings[0])
            networks[name] = study(config, piece, name, training)
    return {
        "base": BASE.settings[0],
        "weights": WEIGHTS,
        "num_settings": config.settings,
        "networks": networks,
    }


def study(config, piece, network, training):
    """Tune every method on validation images, then train what was chosen."""
    found = {}
    for name in config.methods:
        method = METHODS[name]
        cost = piece(f"{network}, {name}, cost", lambda m=method: training.cost(m))
        budgets = {name: int(config.new_steps / cost)}
        if cost > 1:
            budgets[f"{name}, equal steps"] = config.new_steps
        for row, steps in budgets.items():
            run = functools.partial(training.tune_merged, method, steps)
            tuned = piece(f"{network}, {row}, tuning", run)
            chosen = chosen_of(tuned)
            places = sorted({place for place, _ in chosen.values()})
            run = functools.partial(training.finish_merged, method, steps, places)
            settings = training.settings(method)
            found[row] = {
                "gradients_a_step": cost,
                "num_steps": steps,
                "validation": tuned,
                "chosen": chosen,
                "settings": {place: settings[place] for place in places},
                "runs": piece(f"{network}, {row}, final", run),
            }
    return {
        "methods": found,
        "summary": {goal: summarize(found, goal) for goal in GOALS},
    }


def chosen_of(tuned):
    """For each goal the place of the setting, and that of the weight of its merge.

    The first weight is that of the average; for the accuracy alone it is taken.
    """
    alone = np.mean(tuned["alone"], axis=1)
    chosen = {"alone": (int(np.argmax(alone)), 0)}
    for count in map(str, COUNTS):
        merged = np.asarray(tuned[count])
        place, weight = np.unravel_index(np.argmax(merged), merged.shape)
        chosen[count] = int(place), int(weight)
    return chosen


def measure(method, goal):
    """Accuracies of each seed: alone, averaged, and merged with the chosen weight."""
    place, weight = method["chosen"][goal]
    runs = method["runs"][str(place)]
    columns = {"alone": np.mean(runs["alone"], axis=1)}
    for count in map(str, COUNTS):
        columns[f"average of {count}"] = np.asarray(runs[count])[:, 0]
        if goal == count:
            columns[f"merge of {count}"] = np.asarray(runs[count])[:, weight]
    return columns


def summarize(found, goal):
    tables = {name: measure(method, goal) for name, method in found.items()}
    base = tables[SGD]
    return {
        name: {
            key: common.mean_and_error(column)
            | {"gain": statistics.with_interval(column - base[key])}
            for key, column in own.items()
        }
        for name, own in tables.items()
    }


# Figure and table


def draw(report):
    networks = report["results"]["networks"]
    figure, axes = plt.subplots(
        len(networks),
        3,
        figsize=(14, 4 * len(networks)),
        layout="constrained",
        squeeze=False,
    )
    for row, (name, network) in zip(axes, networks.items(), strict=True):
        for method, found in network["methods"].items():
            place, _ = found["chosen"]["alone"]
            line = np.asarray(found["runs"][str(place)]["line"])
            mean = common.mean_and_error(100 * line)
            row[0].errorbar(LINE, mean["mean"], mean["error"], capsize=2, label=method)
        row[0].set(
            xlabel="from one copy to another",
            ylabel=f"{name}: accuracy on both tasks (%)",
        )
        for axis, goal in zip(row[1:], ("alone", "merge"), strict=True):
            draw_gains(axis, network["summary"], goal)
    axes[0, 0].legend(fontsize=7)
    axes[0, 1].legend(fontsize=7, loc="lower left")
    axes[0, 1].set_title("settings of the best copies, averaged")
    axes[0, 2].set_title("settings and weight of the best merge")
    return figure


def draw_gains(axis, summary, goal):
    """What merges have more than SGD's, with 95 % intervals."""
    for index, count in enumerate(COUNTS):
        rows = summary["alone"] if goal == "alone" else summary[str(count)]
        key = f"{'average' if goal == 'alone' else 'merge'} of {count}"
        gains = {n: row[key]["gain"] for n, row in rows.items() if n != SGD}
        means = np.array([100 * gain["mean"] for gain in gains.values()])
        ends = [100 * (gain["high"] - gain["mean"]) for gain in gains.values()]
        places = np.arange(len(gains)) + 0.2 * (index - 0.5)
        label = f"{count} tasks"
        axis.errorbar(means, places, xerr=ends, fmt="o", markersize=4, label=label)
    figures.set_rows(axis, list(gains), fontsize=8)
    axis.axvline(0, color="black", linestyle=":")
    axis.set(xlabel="percentage points above SGD's, 95 % intervals")


def lines(report):
    for network, found in report["results"]["networks"].items():
        for goal, rows in found["summary"].items():
            for name, row in rows.items():
                cells = (
                    f"{key} {100 * x['mean']:.1f} ({100 * x['gain']['mean']:+.1f} "
                    f"[{100 * x['gain']['low']:+.1f}, {100 * x['gain']['high']:+.1f}])"
                    for key, x in row.items()
                )
                yield "  ".join([f"{network}, {goal}, {name:20}", *cells])


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
