"""What do networks keep when their weights are rounded, noisy or pruned after training?

Two small networks learn handwritten digits by SGD, by SGD with an average of its weights,
and by flat methods, all with the same number of gradients, counted by flatopt. Afterwards
their weights are rounded to 8 to 2 bits a channel, get Gaussian noise as analog hardware
adds it, or are pruned. Every method chooses learning rate, decay and its own radius on
validation images, among the same number of settings, for three goals: the accuracy as
trained; the accuracy after a change, among settings that are as accurate as SGD when
trained; and the accuracy after a change, whatever it costs.
"""

import dataclasses
import functools

import common
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import after, figures, statistics
from common.after import LEVELS, NOISE
from common.links import METHODS, SGD

# Shares by which a phase of SAM at the end of pre-training lowers what a language model of
# 1B parameters loses: by fine-tuning, by rounding to 4 bits (abstract of arXiv 2605.02105).
PAPER = {"forgetting": 0.31, "rounding": 0.40, "bits": 4}
TARGETS = {"3 bits": ("bits", 3), "noise 0.1": ("noise", 0.1), "80 %": ("pruned", 0.8)}
TOLERANCE = 0.005  # of accuracy, below the best of SGD on validation images
RATE = "SGD, largest rate"
GOALS = ("float", "matched", "best")
SHOWN = (
    "average of weights",
    "SAM",
    "NSO",
    "LPF-SGD",
    "LPF-SGD, rounding",
    "LPF-SGD, weight noise",
)


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    networks: tuple[str, ...] = ("deep MLP", "CNN")
    """Networks to train."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare; SGD must come first."""
    settings: int = 48
    """Number of settings that each method chooses from, spread over its grid."""
    seeds: int = 10
    """Number of final runs: images, start, batches and noise change."""
    tuning_seeds: int = 2
    """Number of runs of each setting to choose from; other seeds than the final ones."""
    train_images: int = 512
    """Number of training images."""
    batch_size: int = 32
    """Images of a batch."""
    epochs: int = 60
    """Passes over the training images of a method of one gradient a step."""
    draws: int = 32
    """Draws of the noise on the weights of a final network."""


SMOKE = {
    "networks": ("deep MLP",),
    "methods": ("SGD", "average of weights"),
    "settings": 2,
    "seeds": 2,
    "tuning_seeds": 1,
    "train_images": 32,
    "batch_size": 16,
    "epochs": 2,
    "draws": 2,
}


# What is computed


def compute(config, piece):
    networks, methods = {}, {name: METHODS[name] for name in config.methods}
    with common.shown(piece) as piece:
        for name in config.networks:
            training = after.Training(config, name)
            networks[name] = study(piece, name, training, methods)
    return {
        "paper": PAPER,
        "levels": LEVELS,
        "tolerance": TOLERANCE,
        "num_settings": config.settings,
        "networks": networks,
        "over_networks": summarize([n["methods"] for n in networks.values()]),
    }


def study(piece, network, training, methods):
    """Tune every method on validation images, then train what was chosen."""
    found, enough = {}, None
    for name, method in methods.items():
        cost = piece(f"{network}, {name}, cost", lambda m=method: training.cost(m))
        steps = int(training.num_steps / cost)
        run = functools.partial(training.tune_kept, method, steps)
        tuned = piece(f"{network}, {name}, tuning", run)
        settings = training.settings(method)
        if name == SGD:
            enough, follows = max(tuned["float"]) - TOLERANCE, rates(tuned)
        found[name] = {
            "gradients_a_step": cost,
            "num_steps": steps,
            "validation": shortened(tuned),
            "chosen": chosen_of(name, settings, tuned, enough),
        }
        places = sorted({*found[name]["chosen"].values()})
        run = functools.partial(training.finish_kept, method, steps, places)
        found[name]["runs"] = piece(f"{network}, {name}, final", run)
        found[name]["settings"] = {place: settings[place] for place in places}
    return {"methods": found, "summary": summarize([found]), "rates": follows}


def column_of(found, target):
    change, level = TARGETS[target]
    return np.asarray(found[change])[:, LEVELS[change].index(level)]


def shortened(tuned):
    """Validation accuracies of every setting as trained and at the targets."""
    targets = {target: column_of(tuned, target) for target in TARGETS}
    return {"float": tuned["float"]} | targets


def chosen_of(name, settings, tuned, enough):
    """The place of the setting that each goal chooses on validation images."""
    trained = np.nan_to_num(tuned["float"])
    enough = min(enough, trained.max())  # the best one, where none is good enough
    chosen = {}
    for target in TARGETS:
        kept = np.nan_to_num(column_of(tuned, target))
        within = np.where(trained >= enough, kept, -1)
        chosen[f"float, {target}"] = np.argmax(trained)
        chosen[f"matched, {target}"] = np.argmax(within)
        chosen[f"best, {target}"] = np.argmax(kept)
        if name == SGD:
            speed = np.array([setting["learning_rate"] for setting in settings])
            fastest = speed == speed[trained >= enough].max()
            chosen[f"{RATE}, {target}"] = np.argmax(np.where(fastest, within, -2))
    return {goal: int(place) for goal, place in chosen.items()}


def rows_of(found):
    """Each method, and the name of its goals: SGD at its largest rate is one more."""
    yield from ((name, name, None) for name in found)
    yield RATE, SGD, RATE


def runs_for(method, goal, target):
    return method["runs"][str(method["chosen"][f"{goal}, {target}"])]


def summarize(networks):
    """Accuracy as trained and after a change, and against SGD seed by seed."""
    return {
        goal: {
            target: {
                row: against(
                    [runs_for(found[name], own or goal, target) for found in networks],
                    [runs_for(found[SGD], goal, target) for found in networks],
                    target,
                    whole_curve=goal == "matched",
                )
                for row, name, own in rows_of(networks[0])
            }
            for target in TARGETS
        }
        for goal in GOALS
    }


def against(own, base, target, whole_curve=True):
    """Of runs of the same seeds, a list of networks each: means over the networks."""
    change, level = TARGETS[target]

    def mean(runs, name):
        return np.mean([found[name] for found in runs], axis=0)

    trained, base_trained = (mean(runs, "float") for runs in (own, base))
    kept, base_kept = (mean(runs, change).T for runs in (own, base))
    levels = {
        str(at): {
            "kept": common.mean_and_error(kept[column]),
            "gain": statistics.with_interval(kept[column] - base_kept[column]),
        }
        for column, at in enumerate(LEVELS[change])
    }
    return (
        {
            "float": common.mean_and_error(trained),
            "float_gain": statistics.with_interval(trained - base_trained),
        }
        | levels[str(level)]
        | ({"levels": levels} if whole_curve else {})
    )


def rates(tuned):
    """Whether what 3 bits take away from SGD follows learning rate and decay."""
    trained = np.asarray(tuned["float"])
    lost = trained - column_of(tuned, "3 bits")
    table = pd.DataFrame(tuned["settings"]).assign(lost=lost)
    table = table[trained >= trained.max() - 0.02]
    names = ["learning_rate", "weight_decay"]
    return {"settings": len(table)} | {
        name: statistics.correlation_within(table[[other]], table[name], table["lost"])
        for name, other in zip(names, names[::-1], strict=True)
    }


# Figure and table


def draw(report):
    networks = report["results"]["networks"]
    figure, axes = plt.subplots(
        len(networks),
        4,
        figsize=(15, 4 * len(networks)),
        layout="constrained",
        squeeze=False,
        width_ratios=(1, 1, 1, 1.3),
    )
    for row, (name, network) in zip(axes, networks.items(), strict=True):
        for axis, target in zip(row, TARGETS, strict=False):
            draw_curves(axis, network["methods"], target)
        row[0].set_ylabel(f"{name}: test accuracy (%)")
        draw_gains(row[3], network["summary"]["matched"])
    axes[0, 0].legend(fontsize=7, loc="lower left")
    axes[0, 3].legend(fontsize=7)
    return {"": figure, "_at_a_glance": draw_at_a_glance(report["results"])}


def draw_at_a_glance(results):
    """Accuracy under noise, and what each method gains as trained and after a change."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(1, 1.2)
    )
    summary = results["over_networks"]["matched"]
    for name, row in summary["noise 0.1"].items():
        if name in (SGD, *SHOWN):
            kept = [row["float"], *(found["kept"] for found in row["levels"].values())]
            means, errors = (
                100 * np.array([found[key] for found in kept])
                for key in ("mean", "error")
            )
            left.errorbar([0, *NOISE], means, errors, capsize=2, label=name)
    left.set(xlabel="noise on the weights, in max|W|", ylabel="test accuracy (%)")
    left.legend(fontsize=8)
    columns = {
        "as trained": ("3 bits", "float_gain"),
        "rounded to 3 bits": ("3 bits", "gain"),
        "weight noise of 0.1": ("noise 0.1", "gain"),
    }
    for index, (label, (target, key)) in enumerate(columns.items()):
        gains = [
            summary[target][name][key] for name in SHOWN if name in summary[target]
        ]
        means = np.array([100 * gain["mean"] for gain in gains])
        ends = np.array([100 * gain["high"] for gain in gains]) - means
        places = np.arange(len(gains)) + 0.2 * (index - 1)
        style = {"color": "grey"} if index == 0 else {"color": f"C{index - 1}"}
        right.errorbar(means, places, xerr=ends, fmt="o", label=label, **style)
    figures.set_rows(right, [name for name in SHOWN if name in summary["3 bits"]])
    right.axvline(0, color="black", linestyle=":")
    right.set(xlabel="points of test accuracy above SGD, 95 % intervals")
    right.legend(fontsize=8)
    return figure


LABELS = {
    "bits": "bits of the weights, by channel",
    "noise": "noise on the weights, in max|W|",
    "pruned": "share of weights set to zero",
}


def draw_curves(axis, methods, target):
    """Accuracy by the strength of a change, at the setting chosen at matched accuracy."""
    change, level = TARGETS[target]
    levels = LEVELS[change]
    places = range(len(levels)) if change == "bits" else levels
    for row, name, own in rows_of(methods):
        runs = runs_for(methods[name], own or "matched", target)
        found = common.mean_and_error(100 * np.asarray(runs[change]))
        axis.errorbar(places, found["mean"], found["error"], capsize=2, label=row)
    if change == "bits":
        axis.set_xticks(places, levels)
    axis.axvline(places[levels.index(level)], color="black", linestyle=":")
    axis.set(xlabel=LABELS[change], ylim=(30, 100))


def draw_gains(axis, summary):
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


def lines(report):
    for network, found in report["results"]["networks"].items():
        for goal, targets in found["summary"].items():
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


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
