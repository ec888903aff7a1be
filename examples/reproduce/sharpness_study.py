"""Which measure of sharpness tells how well a network generalises?

Trains some thousand small networks on real digits, some labels wrong, to the same training
loss: every combination of learning rate, batch size, width, weight decay, momentum,
skip connections and normalization. Ranks them by every measure of ``flatopt.sharpness`` and
by their generalization gap, and gives Kendall's tau of the two. Then the same along label
noise, input noise and width. The protocol is that of Bisla, Wang, Choromanska (arXiv
2201.08025), section 4; theirs are narrow ResNets on CIFAR-10.
"""

import dataclasses
import functools

import common
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import measures, one_loss, statistics
from common.measures import LOW_PASS
from common.statistics import correlation_within as within
from common.statistics import rank_correlation as tau

# Kendall's tau: over all networks (printed by the authors' code), then read off the titles
# of their figures on label noise, input noise and width. The Shannon entropy has its sign
# turned, as flatopt's; their PAC-Bayes measure takes the distance from zero.
PAPER = {
    "gap": {
        "low_pass": 0.606,
        "frobenius_norm": 0.481,
        "pac_bayes, from zero": 0.466,
        "epsilon_sharpness": 0.383,
        "shannon_entropy": -0.296,
        "fisher_rao_hessian": 0.270,
        "local_entropy_gradient": -0.064,
    },
}
PAPER_ALONG = {
    "max_eigenvalue": (0.778, 0.674, 0.778),
    "frobenius_norm": (0.733, 0.947, 0.823),
    "trace": (0.733, 0.800, 0.794),
    "effective_dimension": (0.689, 0.800, 0.149),
    "epsilon_sharpness": (-0.200, 0.684, 0.774),
    "pac_bayes, from zero": (0.911, 0.916, 0.440),
    "fisher_rao_hessian": (0.644, 0.442, 0.810),
    "shannon_entropy": (0.333, -0.611, -0.617),
    "local_entropy_gradient": (0.600, 0.811, -0.141),
    "low_pass": (0.867, 0.916, 0.851),
}
for column, name in enumerate(("label_noise", "input_noise", "width")):
    PAPER[name] = {measure: taus[column] for measure, taus in PAPER_ALONG.items()}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the study."""

    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Learning rates of SGD, constant; the step is taken times 1 less the momentum."""
    momenta: tuple[float, ...] = (0.0, 0.9)
    """Coefficients of the momentum buffer."""
    weight_decays: tuple[float, ...] = (0.0, 5e-4, 2e-3)
    """Coefficients of the parameters added to the gradient."""
    batch_sizes: tuple[int, ...] = (10, 50)
    """Images a step."""
    widths: tuple[int, ...] = (16, 24, 32)
    """Units of each hidden layer."""
    skips: tuple[bool, ...] = (False, True)
    """Whether hidden layers are added to what comes in."""
    norms: tuple[bool, ...] = (False, True)
    """Whether there are layer norms."""
    seeds: int = 3
    """Networks of each configuration: start and batches change, the data stay."""
    train_images: int = 200
    """Number of training images."""
    label_noise: float = 0.2
    """Share of training labels replaced by random ones."""
    target_loss: float = 0.05
    """Training loss at which a network is measured."""
    epochs: int = 800
    """Longest training; a network that is not at the target by then is left out."""
    noise_seeds: int = 5
    """Networks of each level of label or input noise and of each width."""
    label_noises: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(10))
    """Levels of label noise."""
    input_noises: tuple[float, ...] = tuple(round(0.2 * i, 1) for i in range(20))
    """Levels of Gaussian noise on the training images, in their standard deviations."""
    many_widths: tuple[int, ...] = (*range(1, 9), 10, 12, 14, 16, 20, 24, 32, 48, 64)
    """Widths along which to look for double descent."""
    width_epochs: int = 1000
    """Training along the widths, the same for all."""
    radii: tuple[float, ...] = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    """Scales of the low-pass measure."""
    resamples: int = 1000
    """Bootstrap samples of an interval."""


SMOKE = {
    "learning_rates": (0.1, 0.2),
    "momenta": (0.9,),
    "weight_decays": (0.0,),
    "batch_sizes": (10,),
    "widths": (8,),
    "skips": (False,),
    "norms": (False,),
    "seeds": 2,
    "train_images": 20,
    "target_loss": 1.0,
    "epochs": 60,
    "noise_seeds": 1,
    "label_noises": (0.0, 0.5),
    "input_noises": (0.0, 1.0),
    "many_widths": (4, 8),
    "width_epochs": 60,
    "radii": (0.01, 0.1),
    "resamples": 10,
}

TRAINING = ["learning_rate", "momentum", "weight_decay", "batch_size"]
ARCHITECTURE = ["width", "skip", "norm"]
HYPERPARAMETERS = [*TRAINING, *ARCHITECTURE]
SHOWN = LOW_PASS.format(0.01)


# The study


def compute(config, piece):
    with common.shown(piece, len(shapes_of(config)) + 4) as piece:
        run = functools.partial
        grid = train_grid(config, piece)
        along = {
            "label_noise": piece("label noise", run(along_label_noise, config)),
            "input_noise": piece("input noise", run(along_input_noise, config)),
            "width": piece("widths", run(along_width, config)),
        }
        table, values = measures.average(grid, HYPERPARAMETERS)
        gap = piece("statistics", run(gap_statistics, table, values, config.resamples))
    return {
        "paper": PAPER,
        "gap": gap,
        "networks": counts(grid, table),
        **{name: along_statistics(found, name) for name, found in along.items()},
        "configurations": {**table, "measures": values},
    }


def settings_of(config):
    """What networks of one shape and batch size differ in."""
    return common.grid(
        learning_rate=config.learning_rates,
        momentum=config.momenta,
        weight_decay=config.weight_decays,
        seed=range(1, 1 + config.seeds),
    )


def shapes_of(config):
    return common.grid(
        width=config.widths,
        batch_size=config.batch_sizes,
        skip=config.skips,
        norm=config.norms,
    )


def train_grid(config, piece):
    """Every combination of hyperparameters, one piece for each shape and batch size."""
    splits = common.split_digits(0, config.train_images, config.label_noise)
    found = []
    for own in shapes_of(config):
        width, batch_size, skip, norm = own.values()
        settings = [setting | own for setting in settings_of(config)]
        train = functools.partial(
            measures.train_and_measure,
            one_loss.FUNCTIONS[skip],
            config.radii,
            (width, norm, batch_size),
            config.epochs,
            config.target_loss,
            settings,
            [np.stack([part] * len(settings)) for part in splits["train"]],
            splits["test"],
        )
        name = f"width {width}, batches of {batch_size}, skip {skip}, norm {norm}"
        found += piece(name, train)
    return found


# Of the networks whose data or widths are varied, which have no skips or norms.
TYPICAL = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def train_along(config, cases, epochs, target):
    """Networks of several seeds for each case: its level, its settings, its data."""
    settings, data = [], []
    for level, setting, own in cases:
        for seed in range(1, 1 + config.noise_seeds):
            fixed = {"width": config.widths[-1], "level": level, "seed": seed}
            settings.append(TYPICAL | fixed | setting)
            data.append(own)
    widest = max(setting["width"] for setting in settings)
    return measures.train_and_measure(
        one_loss.FUNCTIONS[False],
        config.radii,
        (widest, False, config.batch_sizes[0]),
        epochs,
        target,
        settings,
        [np.stack(part) for part in zip(*data, strict=True)],
        common.split_digits(0, config.train_images)["test"],
    )


def along_label_noise(config):
    cases = [
        (noise, {}, common.split_digits(0, config.train_images, noise)["train"])
        for noise in config.label_noises
    ]
    return train_along(config, cases, config.epochs, config.target_loss)


def along_input_noise(config):
    images, labels = common.split_digits(0, config.train_images)["train"]
    noise = images.std() * np.random.default_rng(0).normal(size=images.shape)
    cases = [
        (level, {}, (np.float32(images + level * noise), labels))
        for level in config.input_noises
    ]
    return train_along(config, cases, config.epochs, config.target_loss)


def along_width(config):
    """All trained equally long, without weight decay: the narrow ones do not fit."""
    data = common.split_digits(0, config.train_images, config.label_noise)["train"]
    cases = [
        (width, {"width": width, "weight_decay": 0.0}, data)
        for width in config.many_widths
    ]
    return train_along(config, cases, config.width_epochs, target=0.0)


# Statistics


def counts(networks, table):
    """How many there are, how far they got, and how much there is to explain."""
    gaps = np.array(list(table["gaps"]))
    others = [np.delete(gaps, seed, axis=1).mean(axis=1) for seed in range(len(gaps.T))]
    measured = [network["measures"] for network in networks if "measures" in network]
    losses = [values["training loss"] for values in measured]
    return {
        "trained": len(networks),
        "measured": len(measured),
        "left_out": len(networks) - len(measured),
        "configurations": len(table),
        "training_loss": {"smallest": min(losses), "largest": max(losses)},
        "gap": {
            "smallest": gaps.mean(axis=1).min(),
            "largest": gaps.mean(axis=1).max(),
            "deviation": gaps.mean(axis=1).std(ddof=1),
            "deviation_of_a_seed": gaps.std(axis=1, ddof=1).mean(),
        },
        "tau_of_one_seed_with_the_others": np.mean(
            [tau(one, rest) for one, rest in zip(gaps.T, others, strict=True)]
        ),
    }


def gap_statistics(table, values, resamples):
    """Kendall's tau of every measure with the gap: of all, and where little changes."""
    gap = table["gap"]
    drawn = statistics.resampled_correlations(values, gap, resamples)
    taus = {name: tau(value, gap) for name, value in values.items()}
    best = max(taus, key=taus.get)
    return {
        name: {
            "tau": taus[name],
            "interval": statistics.interval(drawn[name]),
            "behind_best": statistics.interval(drawn[best] - drawn[name]),
            "granulated": granulated(table, value),
            "same_architecture": within(table[ARCHITECTURE], value, gap),
            "not_finite": int(np.sum(~np.isfinite(value))),
        }
        for name, value in values.items()
    }


def granulated(table, value):
    """Tau where one hyperparameter changes, for each, and their mean."""
    found = {
        changed: within(
            table[[name for name in HYPERPARAMETERS if name != changed]],
            value,
            table["gap"],
        )
        for changed in HYPERPARAMETERS
    }
    means = [each["mean"] for each in found.values() if each["count"]]
    return found | {"mean": np.mean(means) if means else np.nan}


def along_statistics(networks, name):
    """Tau of every measure with the level, and with the test error; curves of both."""
    table, values = measures.average(networks, ["level"])
    x, y = table["level"], table["test_error"]
    return {
        "levels": x,
        "test_error": y,
        "left_out": sum("measures" not in network for network in networks),
        "measures": {
            measure: {
                "tau": tau(value, y if name == "width" else x),
                "tau_with_test_error": tau(value, y),
            }
            for measure, value in values.items()
        },
        "curves": values,
    }


# Figure


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 5), layout="constrained")
    draw_taus(axes[0], results)
    draw_radii(axes[1], results, report["settings"]["radii"])
    draw_networks(axes[2], results)
    return figure


def draw_taus(axis, results):
    taus = results["gap"]
    names = sorted(taus, key=lambda name: taus[name]["tau"])
    middle = np.array([taus[name]["tau"] for name in names])
    ends = np.array([taus[name]["interval"] for name in names]).T
    axis.errorbar(middle, range(len(names)), xerr=abs(ends - middle), fmt="o", ms=4)
    paper = {n.replace("low_pass", SHOWN): v for n, v in PAPER["gap"].items()}
    rows = [names.index(name) for name in paper if name in names]
    values = [paper[names[row]] for row in rows]
    axis.plot(values, rows, "x", color="black", label="the paper's networks")
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_xlabel("Kendall's tau with the generalization gap")
    axis.legend(fontsize=8, loc="lower right")


def draw_radii(axis, results, radii):
    for label, taus in {
        "gap": results["gap"],
        "label noise": results["label_noise"]["measures"],
        "input noise": results["input_noise"]["measures"],
        "test error along width": results["width"]["measures"],
    }.items():
        values = [taus[LOW_PASS.format(sigma)]["tau"] for sigma in radii]
        axis.plot(radii, values, "o-", label=label)
    axis.set(
        xscale="log",
        xlabel="radius of the low-pass measure",
        ylabel="Kendall's tau",
        ylim=(-1.05, 1.05),
    )
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.legend(fontsize=8)


def draw_networks(axis, results):
    table = dict(results["configurations"])
    value = table.pop("measures")[SHOWN]
    groups = pd.DataFrame(table).assign(value=value).groupby(["norm", "skip"])
    for (norm, skip), own in groups:
        label = f"{'norm' if norm else 'no norm'}, {'skip' if skip else 'no skip'}"
        axis.plot(own["value"], own["gap"], ".", label=label)
    axis.set(
        xscale="log",
        xlabel="low-pass measure, radius 0.01",
        ylabel="generalization gap",
    )
    axis.legend(fontsize=8)


def lines(report):
    taus = report["results"]["gap"]
    for name in sorted(taus, key=lambda name: -taus[name]["tau"]):
        low, high = taus[name]["interval"]
        yield (
            f"{name:24} tau with the gap {taus[name]['tau']:.3f} ({low:.3f} to {high:.3f}), "
            f"granulated {taus[name]['granulated']['mean']:.3f}"
        )


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
