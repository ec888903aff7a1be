"""What do networks keep of a task when they learn another one?

Small networks learn upright handwritten digits by SGD, at larger learning rates, with an
average of its weights, and by flat methods, all with the same number of gradients, counted
by flatopt. Then plain SGD goes on with digits that lie on their side, at five learning
rates. What is kept of the first task is drawn against what is learned of the second, and
the area below is compared. Every method chooses its settings on validation images.
"""

import dataclasses

import common
import matplotlib.pyplot as plt
import numpy as np
from common import frontiers, grid, links
from common.after import Method
from common.again import LEVELS, Training
from common.links import MANY_DECAYS, SGD

# The share by which a phase of SAM at the end of pre-training lowers forgetting in a
# language model of 1B parameters (abstract of arXiv 2605.02105).
PAPER = {"forgetting": 0.31}
# All above those that SGD chooses among its own; as many settings as the others have.
LARGER_RATES = (0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2)
LARGER = Method(None, grid(learning_rate=LARGER_RATES, weight_decay=MANY_DECAYS))
METHODS = links.METHODS | {"SGD, larger rate": LARGER}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    networks: tuple[str, ...] = ("deep MLP", "CNN")
    """Networks to train."""
    methods: tuple[str, ...] = (
        SGD,
        "SGD, larger rate",
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
    "methods": (SGD,),
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
            training = Training(config, name)
            networks[name] = frontiers.study(piece, name, training, methods, LEVELS)
    return {
        "paper": PAPER,
        "tolerance": LEVELS.tolerance,
        "learned": LEVELS.learned,
        "num_settings": config.settings,
        "networks": networks,
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
        frontiers.draw(row, network, f"{name}: ", np.linspace(0.4, 1, 61))
    return figure


def lines(report):
    for network, found in report["results"]["networks"].items():
        yield from frontiers.lines(network, found)


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
