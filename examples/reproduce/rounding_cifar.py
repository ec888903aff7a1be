"""What does a small ResNet keep when its weights are rounded, noisy or pruned?

The study of rounding.py on photographs: CIFAR-10, a few images halved to 16 by 16. Every
method gets the same number of gradients, counted by flatopt, and the same number of
settings to choose from on validation images. BatchNorm computes its statistics from a pass
over training images after training; a change of the weights leaves them as they are, or
they are computed again after it: both are measured.
"""

import dataclasses
import hashlib
import pathlib
import sys

import common
import jax
import matplotlib.pyplot as plt
import numpy as np
from common import figures, goals, grid, links, photographs
from common.after import LEVELS, Method
from common.links import FILTERWISE, SGD

import flatopt

sys.path.append(str(common.ROOT / "examples"))
import cifar10_data

TARGETS = {"3 bits": ("bits", 3), "noise 0.1": ("noise", 0.1), "50 %": ("pruned", 0.5)}
TOLERANCE = 0.01  # of accuracy, below the best of SGD on validation images
RATES, DECAYS = (0.1, 0.2), (5e-3,)
MANY_RATES, MANY_DECAYS = (0.1, 0.2, 0.4), (5e-4, 5e-3)


def flat_grid(*radii):
    return grid(learning_rate=RATES, weight_decay=DECAYS, radius=radii)


AVERAGES = {"radius": (0.98,), "constant": (0.0, 1.0)}
# Six settings each.
METHODS = {
    SGD: Method(None, grid(learning_rate=MANY_RATES, weight_decay=MANY_DECAYS)),
    "average of weights": Method(
        None,
        grid(learning_rate=MANY_RATES, weight_decay=DECAYS, **AVERAGES),
        averaged=True,
    ),
    "SAM": Method(links.sam, flat_grid(0.02, 0.05, 0.1)),
    "SAM, last 10 %": Method(links.sam_at_the_end, flat_grid(0.05, 0.1, 0.2)),
    "NSO": Method(links.nso, flat_grid(0.01, 0.03, 0.06)),
    "LPF-SGD": Method(links.lpf(FILTERWISE), flat_grid(0.02, 0.04, 0.06)),
    "LPF-SGD, rounding": Method(
        links.lpf(flatopt.kernels.rounding(3)), flat_grid(0.5, 1, 2)
    ),
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    data_dir: pathlib.Path | None = None
    """Folder of CIFAR-10: binary files, Python pickles or parquet files. Without it,
    tensorflow_datasets or datasets; with --smoke, scikit-learn's digits enlarged."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare; SGD must come first."""
    settings: int = 6
    """Number of settings that each method chooses from, spread over its grid."""
    seeds: int = 5
    """Number of final runs: start, batches and noise change, the images stay."""
    tuning_seeds: int = 1
    """Number of runs of each setting to choose from; other seeds than the final ones."""
    train_images: int = 2000
    """Training images."""
    validation_images: int = 800
    """Validation images."""
    test_images: int = 800
    """Test images."""
    width: int = 8
    """Channels of the network's first stage."""
    blocks: tuple[int, ...] = (1, 1, 1)
    """Blocks of each stage."""
    dtype: str = "float32"
    """What to train in."""
    batch_size: int = 64
    """Images of a batch."""
    epochs: int = 8
    """Passes over the training images of a method of one gradient a step."""
    draws: int = 2
    """Draws of the noise on the weights of a network."""


SMOKE = {
    "methods": (SGD,),
    "settings": 1,
    "seeds": 2,
    "train_images": 32,
    "validation_images": 16,
    "test_images": 16,
    "width": 4,
    "blocks": (),
    "batch_size": 16,
    "epochs": 1,
    "draws": 1,
}


def compute(config, piece):
    try:
        splits = photographs.load(config, cifar10_data.load)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    training = photographs.Training(config, splits)
    methods = {name: METHODS[name] for name in config.methods}
    with common.shown(piece) as piece:
        found = goals.study(piece, "ResNet", training, methods, TARGETS, TOLERANCE)
    updated = {name: with_updated(own) for name, own in found["methods"].items()}
    return {
        "levels": LEVELS,
        "tolerance": TOLERANCE,
        "num_settings": config.settings,
        "sha256": {
            name: hashlib.sha256(images.tobytes()).hexdigest()
            for name, (images, _) in splits.items()
        },
        "parameters": sum(x.size for x in jax.tree.leaves(training.network.start(0))),
        "updated": goals.summarize([updated], TARGETS),
        **found,
    }


def with_updated(method):
    """The method with what it keeps where statistics follow the weights."""
    runs = {
        place: {
            name.removeprefix("updated_"): column
            for name, column in own.items()
            if name.startswith("updated_")
        }
        for place, own in method["runs"].items()
    }
    return method | {"runs": runs}


# Figure and table


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(
        1, 4, figsize=(16, 4), layout="constrained", width_ratios=(1, 1, 1, 1.3)
    )
    for axis, target in zip(axes, TARGETS.items(), strict=False):
        goals.draw_curves(axis, results["methods"], *target)
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend(fontsize=7, loc="lower left")
    draw_both(axes[3], results)
    return figure


def draw_both(axis, results):
    """What each method keeps more than SGD, statistics as they were and computed again."""
    parts = {"": results["summary"], ", updated": results["updated"]}
    for index, target in enumerate(("3 bits", "noise 0.1")):
        for part, (label, summary) in enumerate(parts.items()):
            rows = summary["matched"][target]
            gains = {name: row["gain"] for name, row in rows.items() if name != SGD}
            means = np.array([100 * gain["mean"] for gain in gains.values()])
            ends = [100 * (gain["high"] - gain["mean"]) for gain in gains.values()]
            places = np.arange(len(gains)) + 0.2 * (2 * index + part - 1.5)
            style = {"color": f"C{index}", "fmt": "s" if part else "o"}
            label = f"{target}{label}"
            axis.errorbar(means, places, xerr=ends, markersize=4, label=label, **style)
    figures.set_rows(axis, list(gains), fontsize=8)
    axis.axvline(0, color="black", linestyle=":")
    axis.set(xlabel="percentage points above SGD, 95 % intervals")
    axis.legend(fontsize=6, loc="lower left")


def lines(report):
    yield from goals.lines("as it was", report["results"]["summary"])
    yield from goals.lines("updated", report["results"]["updated"])


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
