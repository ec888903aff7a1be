"""Does flatness pay on small real data? SGD, SAM, ASAM, LPF-SGD, NSO and WP-SGD on digits.

Two small networks learn handwritten digits from few images, some of them with wrong labels.
Every method tunes learning rate, weight decay and its own radius on a validation split, among
the same number of settings. All get the same number of gradients of single examples, counted
by flatopt; those of several gradients a step are also given as many epochs as SGD. Then
ablations of LPF-SGD and NSO, and a bound of PAC-Bayes type.
"""

import dataclasses
import functools

import common
import matplotlib.pyplot as plt
import numpy as np
from common import bound, cells, figures, grid, statistics
from common.side_by_side import Method, Training

import flatopt

# NSO: abstract of arXiv 2306.08553, two versions of it. LPF-SGD: section 5 and official code.
PAPER = {
    "accuracy_gain": [0.018, 0.024],
    "trace_reduction": [0.177, 0.158],
    "max_eigenvalue_reduction": [0.128, 0.097],
    "chunks": 8,
    "growth": 15,
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    networks: tuple[str, ...] = ("MLP", "CNN")
    """Networks to train."""
    methods: tuple[str, ...] = (
        "SGD",
        "SAM",
        "ASAM",
        "LPF-SGD",
        "NSO, k = 1",
        "NSO, k = 2",
        "NSO, k = 4",
        "WP-SGD",
    )
    """Methods to compare; SGD and NSO with k = 1 must be among them."""
    ablations: tuple[str, ...] = ("chunks", "draws", "regularizers")
    """Ablations of LPF-SGD and NSO, on the first network."""
    rows: int = 5
    """Number of rows of each ablation, from the last."""
    settings: int = 48
    """Number of settings that each method chooses from, spread over its grid."""
    label_noise: tuple[float, ...] = (0.0, 0.2, 0.4)
    """Shares of training labels that are replaced by random ones."""
    ablation_noise: float = 0.4
    """The share for the ablations."""
    seeds: int = 20
    """Number of final runs: images, wrong labels, start, batches and noise change."""
    tuning_seeds: int = 3
    """Number of runs of each setting to choose from; other seeds than the final ones."""
    train_images: int = 192
    """Number of training images."""
    batch_size: int = 32
    """Images of a batch."""
    epochs: int = 64
    """Passes over the training images of a method of one gradient a step."""
    points: int = 16
    """Number of points of each curve."""


SMOKE = {
    "methods": ("SGD", "NSO, k = 1"),
    "networks": ("MLP",),
    "ablations": ("regularizers",),
    "rows": 1,
    "settings": 2,
    "label_noise": (0.4,),
    "seeds": 2,
    "tuning_seeds": 1,
    "train_images": 32,
    "batch_size": 16,
    "epochs": 4,
    "points": 2,
}


# Methods: SGD with momentum behind another first link


def sam(radius, key, _):
    return flatopt.sam_gradients(radius, key=key)


def asam(radius, key, _):
    return flatopt.asam_gradients(radius, key=key)


def lpf(num_samples=8, growth=1):
    def link(radius, key, num_steps):
        return flatopt.smooth_gradients(
            flatopt.schedules.cosine_growth(radius, growth, num_steps),
            flatopt.kernels.filterwise(),
            num_samples=num_samples,
            batch_argnames=("batch",),
            key=key,
        )

    return link


def noise(num_samples=1, antithetic=False):
    def link(radius, key, _):
        return flatopt.smooth_gradients(
            radius, num_samples=num_samples, antithetic=antithetic, key=key
        )

    return link


RATES, DECAYS = (0.03, 0.1, 0.3, 0.6), (3e-3, 1e-2, 3e-2)
MANY_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2)
MANY_DECAYS = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 6e-2)
GAMMAS, NOISE = (0.04, 0.08, 0.12, 0.18), (0.03, 0.08, 0.15, 0.25)


def flat_grid(*radii):
    return grid(learning_rate=RATES, weight_decay=DECAYS, radius=radii)


# 48 settings each.
METHODS = {
    "SGD": Method(None, grid(learning_rate=MANY_RATES, weight_decay=MANY_DECAYS)),
    "SAM": Method(sam, flat_grid(0.05, 0.1, 0.2, 0.5)),
    "ASAM": Method(asam, flat_grid(0.25, 0.5, 1.0, 2.0)),
    "LPF-SGD": Method(lpf(), flat_grid(*GAMMAS)),
    "NSO, k = 1": Method(noise(1, antithetic=True), flat_grid(*NOISE)),
    "NSO, k = 2": Method(noise(2, antithetic=True), flat_grid(*NOISE)),
    "NSO, k = 4": Method(noise(4, antithetic=True), flat_grid(*NOISE)),
    "WP-SGD": Method(noise(), flat_grid(*NOISE)),
}
NO_DECAY_RATES = np.geomspace(0.01, 1.2, 48).round(4).tolist()
NO_DECAY = Method(None, grid(learning_rate=NO_DECAY_RATES, weight_decay=(0.0,)))
PLAIN = METHODS["SGD"]


# Ablations: tables of methods, a comparison a row


def chunks():
    """LPF-SGD with fewer chunks, and with a gamma that grows to 15 times its start."""
    share = 2 / (
        1 + PAPER["growth"]
    )  # start with this, for the same mean over training
    radii = (share * np.array(GAMMAS)).tolist()
    return {
        f"M = {num_samples}": {
            "fixed": Method(lpf(num_samples), flat_grid(*GAMMAS)),
            "growing": Method(lpf(num_samples, PAPER["growth"]), flat_grid(*radii)),
        }
        for num_samples in (1, 2, 4, 8)
    }


def draws():
    """NSO, and as many gradients at independent draws."""
    return {
        f"k = {k}": {
            "mirror image": METHODS[f"NSO, k = {k}"],
            "independent": Method(noise(2 * k), METHODS[f"NSO, k = {k}"].settings),
        }
        for k in (1, 2, 4)
    }


def regularizers():
    """SGD and NSO with weight decay, distance to the start, and shifted images."""
    link, settings = METHODS["NSO, k = 1"].make, METHODS["NSO, k = 1"].settings
    no_decay = grid(
        learning_rate=MANY_RATES,
        weight_decay=(0.0,),
        radius=(0.02, 0.05, 0.08, 0.12, 0.18, 0.25),
    )
    all_three = grid(
        learning_rate=RATES,
        weight_decay=DECAYS,
        distance_penalty=(1e-3, 3e-3, 1e-2, 3e-2),
    )
    all_four = grid(
        learning_rate=(0.05, 0.1, 0.2),
        weight_decay=(3e-3, 1e-2),
        distance_penalty=(3e-3, 1e-2),
        radius=NOISE,
    )

    def row(sgd, nso, shifted=False):
        return {
            "SGD": Method(None, sgd, shifted=shifted),
            "NSO": Method(link, nso, shifted=shifted),
        }

    return {
        "nothing": row(NO_DECAY.settings, no_decay),
        "decay": row(PLAIN.settings, settings),
        "distance": row(at_start(PLAIN.settings), at_start(settings)),
        "shifts": row(NO_DECAY.settings, no_decay, shifted=True),
        "all three": row(all_three, all_four, shifted=True),
    }


def at_start(settings):
    """Weight decay towards the start in place of zero: a penalty on the distance."""
    return [
        setting | {"distance_penalty": setting["weight_decay"], "weight_decay": 0.0}
        for setting in settings
    ]


ABLATIONS = {"chunks": chunks, "draws": draws, "regularizers": regularizers}


# What is computed


def compute(config, piece):
    ablations = {}
    with common.shown(piece) as piece:
        trainings = {name: Training(config, name) for name in config.networks}
        networks = {
            name: compare(config, piece, name, training)
            for name, training in trainings.items()
        }
        for name in config.ablations:
            rows = dict([*ABLATIONS[name]().items()][-config.rows :])
            training = trainings[config.networks[0]]
            ablations[name] = ablate(config, piece, name, training, rows)
    runs = cells.runs_of(networks)
    pairs = cells.paired(runs, runs.xs("SGD", level="method"))
    return {
        "paper": PAPER,
        "num_settings": config.settings,
        "networks": {
            name: {
                "methods": {n: cells.shortened(m) for n, m in methods.items()},
                "against_sgd": against_sgd(methods, pairs.loc[name]),
            }
            for name, methods in networks.items()
        },
        "over_cells": cells.over_cells(pairs),
        "nso_against": against_ascent(runs),
        "ablations": ablations,
        "bound": bound.summarize(bound.of_runs(networks, config.train_images)),
    }


def compare(config, piece, network, training):
    """All methods of a network, at equal gradients and, where it differs, at equal epochs."""
    found = {}
    chosen = {name: METHODS[name] for name in config.methods}
    run = functools.partial(training.choose, piece, network, config.label_noise)
    for name, method in (chosen | {"SGD, no decay": NO_DECAY}).items():
        found[name] = run(name, method)
        if found[name]["gradients_a_step"] > 1:
            found[f"{name}, equal epochs"] = run(name, method, equal_epochs=True)
    settings = {
        share: {n: v for n, v in setting.items() if n != "radius"}
        for share, setting in found["NSO, k = 1, equal epochs"]["settings"].items()
    }
    label = f"{network}, SGD, settings of NSO"
    last = training.finish(piece, label, PLAIN, settings, training.num_steps)
    return found | {"SGD, settings of NSO": last}


def ablate(config, piece, stage, training, table):
    """Each method of a table, and against the first of its row and of its column."""
    shares = (config.ablation_noise,)
    found = {
        row: {
            name: training.choose(piece, stage, shares, f"{row}, {name}", method)
            for name, method in methods.items()
        }
        for row, methods in table.items()
    }
    tables = cells.by_method(cells.runs_of(found))
    top, first = next(iter(found)), next(iter(next(iter(table.values()))))

    def against(row, name, other_row, other_name):
        own, base = tables[row][name], tables[other_row][other_name]
        return cells.means(cells.paired(own, base))

    return {
        row: {
            name: {key: method[key] for key in ("gradients_a_step", "settings")}
            | {
                "summary": method["summary"][str(config.ablation_noise)],
                "against_first": against(row, name, row, first),
                "against_top": against(row, name, top, name),
            }
            for name, method in methods.items()
        }
        for row, methods in found.items()
    }


def against_sgd(methods, pairs):
    """Differences and ratios seed by seed, for each method and share of label noise."""
    seconds = methods["SGD"]["seconds"]
    return {
        name: {
            "seconds_ratio": methods[name]["seconds"] / seconds,
            "by_noise": statistics.by_group(own, "noise", cells.means),
        }
        for name, own in pairs.groupby("method", sort=False)
    }


def against_ascent(runs):
    """NSO with one pair against SAM and ASAM, which cost the same: means over cells."""
    columns = ["accuracy_gain", "trace_ratio", "max_eigenvalue_ratio"]
    tables = statistics.by_group(runs, "method", lambda own: own.droplevel("method"))
    return {
        f"{base}{mode}": cells.means_over_cells(
            cells.paired(tables[f"NSO, k = 1{mode}"], tables[f"{base}{mode}"])[columns]
        )
        for base in ("SAM", "ASAM")
        for mode in ("", ", equal epochs")
        if base in tables
    }


# Figure and table


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    draw_methods(axes[0], results, "accuracy_gain", 100)
    draw_methods(axes[1], results, "matched_trace_ratio", 1)
    axes[0].set_xscale("symlog", linthresh=3)
    axes[0].set(xlim=(-25, 4), xlabel="test accuracy less SGD's, percentage points")
    figures.set_ticks(axes[0], (-20, -10, -5, -2, 0, 2))
    axes[0].axvline(0, color="black", linestyle=":")
    axes[1].set(xscale="log", xlim=(0.28, 4.5))
    figures.set_ticks(axes[1], (0.3, 0.5, 0.7, 1, 1.5, 2))
    axes[1].axvline(1, color="black", linestyle=":")
    axes[1].set(xlabel="trace over SGD's at the same training loss", yticks=[])
    axes[1].legend(fontsize=8, loc="upper right")
    networks = {n: network["methods"] for n, network in results["networks"].items()}
    runs = bound.of_runs(networks, report["settings"]["train_images"])
    for name, found in runs.groupby("network", sort=False):
        axes[2].plot(found["bound"], found["loss_gap"], ".", alpha=0.3, label=name)
    axes[2].axline((1, 1), slope=1, color="black", linestyle=":", label="equal")
    axes[2].set(
        xlabel=r"shape of the bound, $\sqrt{C\,\mathrm{tr}H\,r^2/n}$",
        ylabel="test loss less training loss",
        xscale="log",
        yscale="log",
    )
    axes[2].legend(fontsize=8, loc="lower left")
    return figure


def draw_methods(axis, results, key, factor):
    """Every cell of a method as a point of its network, and the mean over cells."""
    means = {n: row for n, row in results["over_cells"]["all"].items() if n != "SGD"}
    for index, (name, network) in enumerate(results["networks"].items()):
        points = [
            (factor * cell[key]["mean"], row)
            for row, method in enumerate(means)
            for cell in network["against_sgd"][method]["by_noise"].values()
        ]
        axis.plot(
            *np.transpose(points), "os"[index], alpha=0.6, markersize=4, label=name
        )
    figures.means(
        axis,
        range(len(means)),
        [{n: factor * v for n, v in row[key].items()} for row in means.values()],
        factor=2,
        fmt="kD",
        capsize=3,
        markersize=4,
        label="mean ± 2 errors",
    )
    figures.set_rows(axis, means)


def lines(report):
    for name, row in report["results"]["over_cells"]["all"].items():
        gain, trace = row["accuracy_gain"], row["trace_ratio"]
        yield (
            f"{name:26} wins {row['wins']}, losses {row['losses']}, ties {row['ties']}, "
            f"accuracy {100 * gain['mean']:+.2f} ± {100 * gain['error']:.2f}, "
            f"trace over SGD's {trace['mean']:.2f} ± {trace['error']:.2f}"
        )


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
