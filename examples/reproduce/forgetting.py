"""What do networks keep of a task when they learn another one?

Small networks learn upright handwritten digits by SGD, by SGD with an average of its
weights, and by flat methods, all with the same number of gradients, counted by flatopt.
Then plain SGD goes on with digits that lie on their side, at five learning rates. What is
kept of the first task is drawn against what is learned of the second, and the area below
is compared. Every method chooses its settings on validation images.
"""

import dataclasses
import functools

import common
import matplotlib.pyplot as plt
import numpy as np
from common import figures, statistics
from common.again import Training, area, frontier
from common.links import METHODS, SGD

# The share by which a phase of SAM at the end of pre-training lowers forgetting in a
# language model of 1B parameters (abstract of arXiv 2605.02105).
PAPER = {"forgetting": 0.31}
GOALS = ("float", "matched", "best")
LABELS = dict(zip(GOALS, ("as trained", "matched", "any accuracy"), strict=True))
TOLERANCE = 0.005  # of accuracy, below the best of SGD on validation images
LEARNED = 0.85  # accuracy on the second task at which to compare


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    networks: tuple[str, ...] = ("deep MLP", "CNN")
    """Networks to train."""
    methods: tuple[str, ...] = (
        "SGD",
        "average of weights",
        "SAM",
        "SAM, last 10 %",
        "NSO",
        "LPF-SGD",
        "LPF-SGD, last 10 %",
    )
    """Methods of the first training; SGD must come first."""
    settings: int = 48
    """Number of settings that each method chooses from, spread over its grid."""
    seeds: int = 10
    """Number of final runs: images, start, batches and noise change."""
    tuning_seeds: int = 2
    """Number of runs of each setting to choose from; other seeds than the final ones."""
    train_images: int = 384
    """Number of training images of the first task."""
    new_images: int = 192
    """Number of training images of the second task, all others."""
    batch_size: int = 32
    """Images of a batch."""
    epochs: int = 60
    """Passes over the first task for a method of one gradient a step."""
    new_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Learning rates of the second task."""
    new_steps: int = 180
    """Steps of plain SGD on the second task."""
    points: int = 6
    """Points along the second task."""


SMOKE = {
    "networks": ("deep MLP",),
    "methods": ("SGD",),
    "settings": 2,
    "seeds": 2,
    "tuning_seeds": 1,
    "train_images": 32,
    "new_images": 32,
    "batch_size": 16,
    "epochs": 2,
    "new_rates": (0.1,),
    "new_steps": 4,
    "points": 2,
}


def compute(config, piece):
    networks, methods = {}, {name: METHODS[name] for name in config.methods}
    with common.shown(piece) as piece:
        for name in config.networks:
            networks[name] = study(piece, name, Training(config, name), methods)
    return {
        "paper": PAPER,
        "tolerance": TOLERANCE,
        "learned": LEARNED,
        "num_settings": config.settings,
        "networks": networks,
    }


def study(piece, network, training, methods):
    """Tune every method on validation images, then train what was chosen."""
    found = {}
    for name, method in methods.items():
        cost = piece(f"{network}, {name}, cost", lambda m=method: training.cost(m))
        steps = int(training.num_steps / cost)
        run = functools.partial(training.tune_again, method, steps)
        tuned = piece(f"{network}, {name}, tuning", run)
        settings = training.settings(method)
        chosen = chosen_of(tuned, found.get(SGD, {}).get("validation", tuned))
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
        "summary": {goal: summarize(found, goal) for goal in GOALS},
        "predictor": predictor(found),
    }


def chosen_of(tuned, sgd):
    """The place of the setting that each goal chooses on validation images."""
    before, areas = (np.nan_to_num(tuned[name]) for name in ("before", "area"))
    enough = min(max(sgd["before"]) - TOLERANCE, before.max())
    chosen = {
        "float": before,
        "matched": np.where(before >= enough, areas, -1),
        "best": areas,
    }
    return {goal: int(np.argmax(score)) for goal, score in chosen.items()}


def runs_for(method, goal):
    return method["runs"][str(method["chosen"][goal])]


def summarize(found, goal):
    """What is kept and learned, and against SGD seed by seed."""
    tables = {name: measure(runs_for(method, goal)) for name, method in found.items()}
    return {
        name: statistics.columns_of(own)
        | {
            f"{key}_gain": statistics.with_interval(own[key] - tables[SGD][key])
            for key in ("area", "kept")
        }
        for name, own in tables.items()
    }


def measure(runs):
    before, sharpness = (np.asarray(runs[name]) for name in ("before", "sharpness"))
    curves = [*zip(runs["old"], runs["new"], strict=True)]
    return {
        "before": before,
        "sharpness": sharpness,
        "area": np.array([area(*curve) for curve in curves]),
        "kept": np.array([frontier(*curve, [LEARNED])[0] for curve in curves]),
        "learned": np.array([np.max(new) for _, new in curves]),
    }


def predictor(found):
    """Whether curvature before the second task tells what is kept, over all final runs."""
    tables = [
        measure(runs) for method in found.values() for runs in method["runs"].values()
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
    levels = np.linspace(0.4, 1, 61)
    for row, (name, network) in zip(axes, networks.items(), strict=True):
        for method, found in network["methods"].items():
            runs = runs_for(found, "matched")
            curves = [
                frontier(*points, levels)
                for points in zip(runs["old"], runs["new"], strict=True)
            ]
            row[0].plot(100 * levels, 100 * np.mean(curves, axis=0), label=method)
            tables = [measure(runs) for runs in found["runs"].values()]
            row[2].plot(
                np.concatenate([table["sharpness"] for table in tables]),
                100 * np.concatenate([table["area"] for table in tables]),
                ".",
                alpha=0.6,
                label=method,
            )
        row[0].set(
            xlabel="learned of the second task (%)",
            ylabel=f"{name}: kept of the first (%)",
        )
        draw_gains(row[1], network["summary"])
        row[2].set(
            xscale="log",
            xlabel="curvature of the first loss along the second's gradient",
            ylabel="area below the curve (%)",
        )
    axes[0, 0].legend(fontsize=7)
    axes[0, 1].legend(fontsize=7)
    return figure


def draw_gains(axis, summary):
    """The area above SGD's for each goal, with 95 % intervals."""
    for index, (goal, rows) in enumerate(summary.items()):
        gains = {n: row["area_gain"] for n, row in rows.items() if n != SGD}
        means = np.array([100 * gain["mean"] for gain in gains.values()])
        ends = [100 * (gain["high"] - gain["mean"]) for gain in gains.values()]
        places = np.arange(len(gains)) + 0.2 * (index - 1)
        label = LABELS[goal]
        axis.errorbar(means, places, xerr=ends, fmt="o", markersize=4, label=label)
    figures.set_rows(axis, list(gains), fontsize=8)
    axis.axvline(0, color="black", linestyle=":")
    axis.set(xlabel="area above SGD's, points, 95 % intervals")


def lines(report):
    for network, found in report["results"]["networks"].items():
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


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
