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

import common
import matplotlib.pyplot as plt
import numpy as np
from common import after, figures, goals
from common.after import LEVELS, NOISE
from common.links import METHODS, SGD

# Shares by which a phase of SAM at the end of pre-training lowers what a language model of
# 1B parameters loses: by fine-tuning, by rounding to 4 bits (abstract of arXiv 2605.02105).
PAPER = {"forgetting": 0.31, "rounding": 0.40, "bits": 4}
TARGETS = {"3 bits": ("bits", 3), "noise 0.1": ("noise", 0.1), "80 %": ("pruned", 0.8)}
TOLERANCE = 0.005  # of accuracy, below the best of SGD on validation images
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
            networks[name] = goals.study(
                piece, name, training, methods, TARGETS, TOLERANCE
            )
    return {
        "paper": PAPER,
        "levels": LEVELS,
        "tolerance": TOLERANCE,
        "num_settings": config.settings,
        "networks": networks,
        "over_networks": goals.summarize(
            [found["methods"] for found in networks.values()], TARGETS
        ),
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
        for axis, target in zip(row, TARGETS.items(), strict=False):
            goals.draw_curves(axis, network["methods"], *target)
            axis.set_ylim(30, 100)
        row[0].set_ylabel(f"{name}: test accuracy (%)")
        goals.draw_gains(row[3], network["summary"]["matched"])
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


def lines(report):
    for network, found in report["results"]["networks"].items():
        yield from goals.lines(network, found["summary"])


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
