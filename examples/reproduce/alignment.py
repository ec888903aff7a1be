"""Is SGD's noise aligned with the curvature, and does that bound what SGD finds?

Two experiments after Wu, Wang and Su (NeurIPS 2022), on real handwritten digits with square
loss. The first follows the alignment of SGD's noise along training for four models, beside
isotropic noise of the same trace. The second trains a network from a sharp start over a
grid of learning rates and batch sizes and holds the Frobenius norm of the Hessian it ends
with against the paper's bound and against the exact threshold.
"""

import dataclasses
import functools
import itertools

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import figures, square_loss, statistics
from common.data import regression_digits

from flatopt import stability

PAPER = {
    "reference": "Wu, Wang, Su, NeurIPS 2022, arXiv 2207.02628",
    "statements": [
        "the noise concentrates in sharp directions and its size is proportional to the loss",
        "proved for linear networks and random features, seen for nonlinear networks",
        "a minimum that is linearly stable has a Frobenius norm of at most sqrt(B / mu) / eta",
        "so what SGD finds is bounded by a constant times sqrt(B) / eta",
    ],
    "aligned_mu": 1.0,
    "slope": 1.0,
    "power_of_batch_size": 0.5,
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings."""

    models: tuple[str, ...] = ("linear", "random features", "MLP", "CNN")
    """Models whose alignment is followed."""
    outputs: tuple[int, ...] = (1, 10)
    """Their outputs: even or odd, ten classes."""
    num_images: int = 64
    """Training images."""
    hidden: int = 32
    """Hidden units of the network."""
    num_features: int = 256
    """Random features."""
    batch_size: int = 8
    """Batch size along training."""
    checkpoints: tuple[int, ...] = (0, 10, 30, 100, 300, 1000, 3000)
    """Steps at which the alignment is measured."""
    learning_rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    """Learning rates of the grid."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 16, 64)
    """Batch sizes of the grid, drawn with replacement."""
    num_steps: int = 20_000
    """Steps of each run of the grid, the first quarter warming up."""
    init_scale: float = 2.0
    """Factor of the initial weights of the grid: a sharp start."""
    num_seeds: int = 5
    """Seeds: images, initial parameters and batches."""


SMOKE = dict(
    models=("linear", "CNN"),
    outputs=(1,),
    num_images=12,
    hidden=8,
    num_features=32,
    batch_size=4,
    checkpoints=(0, 10),
    learning_rates=(0.1, 0.2),
    batch_sizes=(4,),
    num_steps=1000,
    num_seeds=1,
)


def tasks(config):
    """Name, inputs of seed, initial parameters and model of the four models."""
    linear, init_linear = square_loss.linear, square_loss.init_linear

    def features(seed, images):
        key = jax.random.key(100 + seed)
        weights = square_loss.dense(key, 64, config.num_features)
        return jax.nn.relu(images @ weights) * (2 / config.num_features) ** 0.5

    def plain(_, images):
        return images

    return {
        "linear": (plain, lambda k, c: init_linear(k, 64, c), linear),
        "random features": (
            features,
            lambda k, c: init_linear(k, config.num_features, c),
            linear,
        ),
        "MLP": (
            plain,
            lambda k, c: square_loss.init_mlp(k, config.hidden, c),
            square_loss.mlp,
        ),
        "CNN": (plain, square_loss.init_cnn, square_loss.cnn),
    }


def follow(config, name, num_outputs, seed):
    """The alignment at the checkpoints of one run of SGD.

    The learning rate is half of that at which the trace forbids batches of one, at the
    initial parameters.
    """
    prepare, init, model_fn = tasks(config)[name]
    images, targets = regression_digits(seed, config.num_images, num_outputs)
    inputs, params = prepare(seed, images), init(jax.random.key(seed), num_outputs)
    start = stability.linearize(model_fn, params, inputs, targets)
    rate = num_outputs / float(jnp.sum(start.eigenvalues))
    keys = jax.random.split(jax.random.key(1000 + seed), max(config.checkpoints))
    rows = []
    for step in range(max(config.checkpoints) + 1):
        if step in config.checkpoints:
            lin = stability.linearize(model_fn, params, inputs, targets)
            found = stability.alignment(lin)._asdict()
            rows.append({"step": step, **{k: float(v) for k, v in found.items()}})
        if step < len(keys):
            params = square_loss.sgd_step(
                model_fn,
                config.batch_size,
                False,
                params,
                keys[step],
                rate,
                inputs,
                targets,
            )
    return rows


def summarize_training(runs, num_outputs):
    """Means over seeds at each checkpoint, times the outputs where the theory is about 1/c."""
    tables = [pd.DataFrame(run) for run in runs]
    mu, alpha, beta, isotropic_mu, loss = (
        np.stack([table[field] for table in tables])
        for field in ("mu", "alpha", "beta", "isotropic_mu", "loss")
    )
    curves = {
        "mu": num_outputs * mu,
        "alpha": alpha,
        "beta": num_outputs * beta,
        "isotropic_mu": num_outputs * isotropic_mu,
        "loss": loss,
        "over_isotropic": mu / isotropic_mu,
    }
    return {
        "step": tables[0]["step"],
        **{name: common.mean_and_error(values) for name, values in curves.items()},
        "smallest_mu": num_outputs * mu.min(),
    }


def minima_of(config, batch_size):
    runs = square_loss.sharp_starts(config, 1, batch_size, replace=True)
    return [measure_minimum(config, row, params) for row, params in runs]


def measure_minimum(config, row, params):
    """Sharpness of what a run found, with the bounds on it."""
    if row["outcome"] != "minimum":
        return row
    inputs, targets = regression_digits(row["seed"], config.num_images, 1)
    lin = stability.linearize(square_loss.mlp, params, inputs, targets)
    batch_size, rate = row["batch_size"], row["learning_rate"]
    limits = stability.thresholds(lin, batch_size, sampling="with_replacement")
    norm = float(jnp.linalg.norm(lin.eigenvalues))
    mu = square_loss.near_alignment(square_loss.mlp, params, inputs, targets)
    return row | {
        "frobenius_norm": norm,
        "max_eigenvalue": float(lin.eigenvalues[0]),
        "mu": mu,
        "root_bound": batch_size**0.5 / rate,
        "mu_bound": (batch_size / mu) ** 0.5 / rate,
        "theorem_bound": norm * limits.frobenius / rate,
        "exact_bound": norm * limits.mean_square / rate,
    }


BOUNDS = {
    "root_bound": r"$\sqrt{B}/\eta$",
    "mu_bound": r"$\sqrt{B/\mu}/\eta$",
    "exact_bound": "exact threshold",
}


def summarize_grid(rows):
    """How the norm follows each bound; slopes by seed, so that they have an error."""
    table = pd.DataFrame(rows)
    minima = table[table["outcome"] == "minimum"]
    minima = minima.assign(inverse_learning_rate=1 / minima["learning_rate"])
    found = statistics.outcomes(table)
    found |= {"smallest_mu": minima["mu"].min(), "largest_mu": minima["mu"].max()}
    for bound in [*BOUNDS, "theorem_bound"]:
        shares = minima["frobenius_norm"] / minima[bound]
        found[bound] = {
            "slope": powers(minima, [bound]).get(bound),
            "largest_share": shares.max(),
            "median_share": shares.median(),
            "above": int((shares > 1).sum()),
        }
    return found | {"at_the_edge": summarize_edge(minima)}


def summarize_edge(minima):
    """The same for learning rates of 0.1 and more, for which every start is too sharp."""
    sharp = minima[minima["learning_rate"] >= 0.1]
    causes = ["inverse_learning_rate", "batch_size"]
    shares = sharp[["batch_size"]].assign(
        **{bound: sharp["frobenius_norm"] / sharp[bound] for bound in BOUNDS}
    )
    return {
        **{bound: {"slope": powers(sharp, [bound]).get(bound)} for bound in BOUNDS},
        "powers": powers(sharp, causes),
        "powers_small_batches": powers(sharp[sharp["batch_size"] <= 4], causes),
        **{
            f"B = {size}": statistics.columns_of(group, BOUNDS)
            for size, group in shares.groupby("batch_size")
        },
    }


def powers(minima, causes):
    """Powers of the causes that the norm follows: slopes of logarithms, over seeds.

    Nothing where no seed has more minima than causes.
    """
    found = []
    for _, rows in minima.groupby("seed"):
        if len(rows) > len(causes):
            logs = np.log(rows[causes]).assign(constant=1.0)
            found.append(np.linalg.lstsq(logs, np.log(rows["frobenius_norm"]))[0])
    slopes = pd.DataFrame(found, columns=[*causes, "constant"])
    return statistics.columns_of(slopes, causes) if found else {}


def compute(config, piece):
    pairs = [*itertools.product(config.models, config.outputs)]
    total = len(pairs) * config.num_seeds + len(config.batch_sizes)
    runs, rows = {}, []
    with common.shown(piece, total) as piece:
        for name, c in pairs:
            runs[f"{name}, {c}"] = [
                piece(
                    f"{name} {c} {seed}",
                    functools.partial(follow, config, name, c, seed),
                )
                for seed in range(config.num_seeds)
            ]
        for size in config.batch_sizes:
            rows += piece(f"grid {size}", functools.partial(minima_of, config, size))
    return {
        "paper": PAPER,
        "training": {
            name: summarize_training(found, int(name.split(", ")[1]))
            for name, found in runs.items()
        },
        "training_runs": runs,
        "grid": summarize_grid(rows),
        "grid_runs": rows,
    }


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(3, 3, figsize=(12, 10.5), layout="constrained")
    for row, c in zip(axes, report["settings"]["outputs"], strict=False):
        draw_training(row, results["training"], c)
    draw_grid(axes[2], results["grid_runs"])
    return figure


def draw_training(axes, training, num_outputs):
    title = "even or odd, 1 output" if num_outputs == 1 else "ten classes, 10 outputs"
    times = "" if num_outputs == 1 else "10 "
    labels = {"mu": rf"{times}$\mu$", "alpha": r"$\alpha$", "beta": rf"{times}$\beta$"}
    names = [name for name in training if name.endswith(f", {num_outputs}")]
    for axis, (field, label) in zip(axes, labels.items(), strict=True):
        for index, name in enumerate(names):
            found, style = training[name], {"color": f"C{index}", "marker": "."}
            steps = np.array(found["step"]) + 1
            shown = found[field]["mean"], found[field]["error"]
            axis.errorbar(steps, *shown, label=name.split(",")[0], **style)
            if field == "mu":
                axis.plot(steps, found["isotropic_mu"]["mean"], ":", **style)
        axis.set(xscale="log", xlabel="step of SGD + 1", ylabel=label, title=title)
        axis.axhline(1, color="0.7", zorder=0)
    axes[0].set_yscale("log")
    axes[1].legend(title="left, dotted: isotropic noise", fontsize=8, title_fontsize=8)


def draw_grid(axes, rows):
    rows = pd.DataFrame(rows)
    minima = rows[rows["outcome"] == "minimum"]
    ends = minima["frobenius_norm"].min(), minima["exact_bound"].max()
    for axis, (bound, label) in zip(axes, BOUNDS.items(), strict=True):
        figures.by_batch_size(axis, minima, bound, "frobenius_norm")
        axis.plot(ends, ends, color="0.5", zorder=0)
        axis.set(
            xlabel=f"largest stable norm, {label}", ylabel=r"$\|H\|_F$ found by SGD"
        )
    figures.legend_of_lost(axes[0], rows)


def lines(report):
    results = report["results"]
    for name, found in results["training"].items():
        yield (
            f"{name:20} mu (times outputs) {found['mu']['mean'][0]:.2f} at the start, "
            f"{found['mu']['mean'][-1]:.2f} at the end; isotropic noise "
            f"{found['isotropic_mu']['mean'][-1]:.4f}"
        )
    for bound in BOUNDS:
        share = results["grid"][bound]["median_share"]
        yield f"median norm over {bound.replace('_', ' ')}: {share:.2f}"


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
