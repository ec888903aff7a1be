"""Does SGD leave minima as fast as theory says, and stop where theory says?

Two experiments on real handwritten digits with square loss, on the network itself. The
first starts SGD, gradient descent, and gradient descent with isotropic noise of SGD's trace
a little away from a minimum that gradient descent found, and compares the growth of the
loss with the exact rate and with that of Wu, Wang and Su (NeurIPS 2022). The second trains
from sharp starts with a warm-up, so that SGD stops at the edge of stability, and compares
the sharpness there with 2 / eta and the thresholds of Mulayoff and Michaeli (2023).
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
from common.square_loss import NOISES

from flatopt import stability

PAPER = {
    "references": [
        "Wu, Wang, Su, NeurIPS 2022, arXiv 2207.02628",
        "Mulayoff, Michaeli, 2023, arXiv 2306.07850",
    ],
    "statements": [
        "from a minimum that is not linearly stable SGD escapes exponentially fast, by a "
        "factor of at least eta^2 mu |H|_F^2 / B a step",
        "gradient descent and isotropic noise do not",
        "for B = 1, 2 the sharpness is far below 2 / eta, for B >= 32 it is on 2 / eta",
        "the left side of (24) is on 2 / eta for B = 1, 2",
    ],
    "learning_rates": [0.002, 0.012, 0.043],
    "edge": 1.0,
}

CURVE_EVERY = 4  # steps between the points of a curve in the JSON file
COLORS = dict(zip(NOISES, ("C0", "C2", "C1"), strict=True))


@dataclasses.dataclass
class Config(common.Config):
    """Settings."""

    num_images: int = 64
    """Training images of the edge."""
    hidden: int = 32
    """Hidden units of the network of the escapes."""
    edge_hidden: int = 64
    """Hidden units of the network of the edge."""
    escape_outputs: tuple[int, ...] = (1, 10)
    """Outputs of the escapes: even or odd, ten classes."""
    num_escape_images: int = 32
    """Training images of the escapes."""
    fit_steps: int = 40_000
    """Steps of gradient descent with momentum to the minimum."""
    momentum: float = 0.99
    """Momentum of it."""
    ways: tuple[float, ...] = (-0.5, 0.25, 0.5, 0.75)
    """Learning rates at the minimum: how far the logarithm is on its way from the exact
    threshold (0) to that of gradient descent (1)."""
    escape_steps: int = 200
    """Steps from the minimum."""
    start_loss: float = 1e-8
    """Expected loss of the displacement from the minimum."""
    num_runs: int = 512
    """Runs of SGD with batches of one from each minimum."""
    num_quiet_runs: int = 32
    """Runs of gradient descent and isotropic noise, which spread little."""
    learning_rates: tuple[float, ...] = (0.03, 0.05, 0.1, 0.2)
    """Learning rates of the edge."""
    batch_sizes: tuple[int, ...] = (1, 2, 8, 32, 64)
    """Batch sizes of the edge, drawn without replacement; the last is all images."""
    num_steps: int = 60_000
    """Steps of each run to the edge, the first quarter warming up."""
    init_scale: float = 3.0
    """Factor of the initial weights at the edge: a sharp start."""
    num_seeds: int = 5
    """Seeds of the escapes: images, initial parameters, displacements and batches."""
    num_edge_seeds: int = 3
    """Seeds of the edge."""


SMOKE = dict(
    num_images=12,
    hidden=12,
    edge_hidden=12,
    escape_outputs=(1,),
    num_escape_images=12,
    fit_steps=2000,
    ways=(0.5,),
    escape_steps=30,
    num_runs=8,
    num_quiet_runs=4,
    learning_rates=(0.1,),
    batch_sizes=(4,),
    num_steps=1000,
    num_seeds=1,
    num_edge_seeds=1,
)


def escapes(config, num_outputs, seed):
    """Growth of the loss from one minimum, at each learning rate."""
    model_fn = square_loss.smooth_mlp
    data = regression_digits(seed, config.num_escape_images, num_outputs)
    params = square_loss.init_mlp(jax.random.key(seed), config.hidden, num_outputs)
    start = stability.linearize(model_fn, params, *data)
    params = square_loss.fit(
        config.fit_steps, config.momentum, params, 0.1 / start.eigenvalues[0], *data
    )
    lin = stability.linearize(model_fn, params, *data)
    limits = stability.thresholds(lin, 1)
    mu = square_loss.near_alignment(model_fn, params, *data)
    growths = functools.partial(growths_at, config, params, data, lin, limits, mu)
    return {
        "seed": seed,
        "loss": float(lin.loss),
        "mu": mu,
        "frobenius_norm": jnp.linalg.norm(lin.eigenvalues),
        "gradient_descent": limits.gradient_descent,
        "mean_square": limits.mean_square,
        "rows": [growths(jax.random.key(1000 + seed), way) for way in config.ways],
    }


def growths_at(config, params, data, lin, limits, mu, key, way):
    """Growth of the loss from a minimum at one learning rate, run and predicted."""
    rate = limits.mean_square ** (1 - way) * limits.gradient_descent**way
    norm = jnp.linalg.norm(lin.eigenvalues)
    scale = (2 * config.start_loss / jnp.sum(lin.eigenvalues)) ** 0.5
    exact = stability.expected_losses(lin, rate, 1, config.escape_steps)
    exact = config.start_loss * np.asarray(exact)
    expected = curve(exact[None], exact)
    noises = {}
    for noise in NOISES:
        num_runs = config.num_runs if noise == "SGD" else config.num_quiet_runs
        losses, residuals = square_loss.leave(
            noise,
            config.escape_steps,
            num_runs,
            expected["window"][1],
            params,
            key,
            rate,
            scale,
            data,
        )
        noises[noise] = curve(np.asarray(losses), exact)
        if noise == "SGD":
            mu_along = square_loss.mean_alignment(lin, residuals)
    losses = stability.simulate(
        lin, key, rate, 1, config.escape_steps, num_runs=config.num_runs
    )
    noises["linearized SGD"] = curve(config.start_loss * np.asarray(losses), exact)
    return {
        "way": way,
        "over_exact": rate / limits.mean_square,
        "learning_rate": rate,
        "over_gradient_descent": rate / limits.gradient_descent,
        "exact": stability.growth_rate(lin, rate, 1),
        "wu": rate**2 * mu * norm**2,
        "wu_smallest": (rate / limits.frobenius) ** 2,
        "expected": expected,
        "noises": noises,
        "mu_along": mu_along,
        "wu_along": rate**2 * mu_along * norm**2,
    }


def curve(losses, exact):
    """Mean of runs, and its growth a step while the exact mean is moderate.

    The growth is taken between the steps at which the exact mean has grown by 10 and by
    1000, or over the second half where it does not grow so far.
    """
    first, last = (np.flatnonzero(exact >= f * exact[0])[:1] for f in (10, 1000))
    if len(last):
        first, last = int(first[0]), int(last[0])
    else:
        first, last = len(exact) // 2, len(exact) - 1
    with np.errstate(all="ignore"):
        mean = losses.mean(axis=0)
        growth = (mean[last] / mean[first]) ** (1 / (last - first))
    return {
        "mean": np.minimum(mean, 1e9)[::CURVE_EVERY],
        "growth": growth,
        "window": [first, last],
        "diverged": int((~np.isfinite(losses[:, -1])).sum()),
        "left": int((~(losses.max(axis=1) <= 1000 * exact[0])).sum()),
        "runs": len(losses),
    }


def summarize_escapes(minima):
    """Means over minima at each learning rate; rates as logarithms, which add up."""
    table = pd.DataFrame(minima)
    share = table["mean_square"] / table["gradient_descent"]
    rows = pd.json_normalize(minima, "rows")
    return {
        "mu": common.mean_and_error(table["mu"]),
        "exact_over_gradient_descent": common.mean_and_error(share),
        "largest_loss": table["loss"].max(),
        **{
            f"{way:g}": summarize_way(own)
            for way, own in rows.groupby("way", sort=False)
        },
    }


def summarize_way(rows):
    """The growth a step at one learning rate, and what the theories say of it."""
    expected, sgd = rows["expected.growth"], rows["noises.SGD.growth"]
    linearized, wu = rows["noises.linearized SGD.growth"], rows["wu_along"]
    names = "wu", "wu_along", "mu_along", "wu_smallest", "over_exact"
    columns = {"exact": rows["exact"], "exact_in_window": expected}
    columns |= {name: rows[name] for name in (*names, "over_gradient_descent")}
    ratios = {
        "log_growth_over_exact": np.log(sgd) / np.log(expected),
        "log_growth_over_linearized": np.log(sgd) / np.log(linearized),
        "wu_along_over_sgd": wu / sgd,
    }
    return {
        **statistics.columns_of(columns),
        **{noise: count_runs(rows, noise) for noise in (*NOISES, "linearized SGD")},
        **statistics.columns_of(ratios),
        "wu_along_at_most_sgd": int((wu <= sgd).sum()),
        "wu_along_above_one": int((wu > 1).sum()),
    }


def count_runs(rows, noise):
    column = {n: rows[f"noises.{noise}.{n}"] for n in ("left", "diverged", "runs")}
    growth = common.mean_and_error(rows[f"noises.{noise}.growth"])
    return {"growth": growth} | {name: int(c.sum()) for name, c in column.items()}


def measure_edge(config, row, params):
    """Sharpness of what a run found, as the theories read it: 2 / the largest stable rate."""
    if row["outcome"] != "minimum":
        return row
    inputs, targets = regression_digits(row["seed"], config.num_images, 10)
    lin = stability.linearize(square_loss.mlp, params, inputs, targets)
    limits = stability.thresholds(lin, row["batch_size"])
    return row | {name: 2 / getattr(limits, name) for name in SHARPNESS}


SHARPNESS = {
    "gradient_descent": r"$\lambda_{max}$",
    "rank_one": "left side of (24)",
    "mean_square": r"exact, $2 / \eta^*$",
}


def summarize_edge(rows):
    """Sharpness over 2 / eta, by batch size, and by learning rate too."""
    table = pd.DataFrame(rows)
    minima = table[table["outcome"] == "minimum"]
    shares = minima.reindex(columns=[*SHARPNESS])
    shares = shares.mul(minima["learning_rate"] / 2, axis=0)
    return {
        **statistics.outcomes(table),
        "by_batch_size": {
            size: {
                f"{rate:g}": statistics.columns_of(shares.loc[group.index])
                for rate, group in own.groupby("learning_rate")
            }
            for size in sorted(table["batch_size"].unique())
            for own in [minima[minima["batch_size"] == size]]
        },
        **{
            name: {"largest": share.max(), "above": int((share > 1).sum())}
            for name, share in shares.items()
            if len(share)
        },
    }


def edge(config, batch_size):
    setting = dataclasses.replace(
        config, num_seeds=config.num_edge_seeds, hidden=config.edge_hidden
    )
    runs = square_loss.sharp_starts(setting, 10, batch_size, replace=False)
    return [measure_edge(config, row, params) for row, params in runs]


def compute(config, piece):
    minima, rows = {c: [] for c in config.escape_outputs}, []
    pairs = [*itertools.product(config.escape_outputs, range(config.num_seeds))]
    with common.shown(piece, len(pairs) + len(config.batch_sizes)) as piece:
        for c, seed in pairs:
            run = functools.partial(escapes, config, c, seed)
            minima[c].append(piece(f"escape {c} {seed}", run))
        for size in config.batch_sizes:
            rows += piece(f"edge {size}", functools.partial(edge, config, size))
    return {
        "paper": PAPER,
        "escape": {c: summarize_escapes(found) for c, found in minima.items()},
        "escape_runs": minima,
        "edge": summarize_edge(rows),
        "edge_runs": rows,
    }


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    ways = report["settings"]["ways"]
    for axis, c in zip(axes[0], results["escape_runs"], strict=False):
        draw_escape(axis, results["escape_runs"][c], shown_way(ways), c)
    draw_growth(axes[0, 2], results["escape_runs"])
    for axis, (name, label) in zip(axes[1], SHARPNESS.items(), strict=True):
        draw_edge(axis, results["edge_runs"], name, label)
    return figure


def shown_way(ways):
    return ways.index(0.5) if 0.5 in ways else len(ways) - 1


def draw_escape(axis, minima, index, num_outputs):
    rows = [m["rows"][index] for m in minima]
    steps = CURVE_EVERY * np.arange(len(rows[0]["expected"]["mean"]))
    for row in rows:
        for noise, color in COLORS.items():
            label = f"{noise}, mean" if row is rows[0] else None
            axis.semilogy(
                steps, row["noises"][noise]["mean"], color=color, lw=0.9, label=label
            )
        label = "exact, linearized SGD" if row is rows[0] else None
        axis.semilogy(steps, row["expected"]["mean"], "k:", lw=0.9, label=label)
    start = rows[0]["expected"]["mean"][0]
    outputs = "1 output" if num_outputs == "1" else f"{num_outputs} outputs"
    axis.set(
        xlabel="step from the minimum",
        ylabel="training loss",
        ylim=(start / 1000, 20),
        title=f"{outputs}, half-way to $2 / \\lambda_{{max}}$",
    )
    axis.legend(fontsize=8)


def draw_growth(axis, minima):
    for mark, (c, found) in zip("o^", minima.items(), strict=False):
        rows = [row for minimum in found for row in minimum["rows"]]
        exact = [row["expected"]["growth"] for row in rows]
        for noise, color in COLORS.items():
            grown = [row["noises"][noise]["growth"] for row in rows]
            axis.plot(
                exact, grown, mark, color=color, ms=4, label=f"{noise}, {c} outputs"
            )
        wu = [row["wu_along"] for row in rows]
        axis.plot(
            exact, wu, mark, color="C3", mfc="none", ms=4, label=f"Wu's rate, {c}"
        )
    ends = axis.get_xlim()
    axis.plot(ends, ends, color="0.5", zorder=0)
    axis.set(xlabel="exact growth a step", ylabel="growth a step")
    axis.legend(fontsize=7)


def draw_edge(axis, rows, name, label):
    rows = pd.DataFrame(rows)
    minima = rows[rows["outcome"] == "minimum"]
    figures.by_batch_size(axis, minima, "learning_rate", name)
    rates = np.sort(rows["learning_rate"].unique())
    axis.plot(rates, 2 / rates, color="0.5", label=r"$2 / \eta$")
    axis.set(xlabel=r"learning rate $\eta$", ylabel=label)
    figures.set_ticks(axis, rates)
    figures.legend_of_lost(axis, rows)


def lines(report):
    results = report["results"]
    for c, found in results["escape"].items():
        for way in report["settings"]["ways"]:
            entry = found[f"{way:g}"]
            grown = ", ".join(
                f"{noise} {entry[noise]['growth']['mean']:.3f}" for noise in NOISES
            )
            yield (
                f"{c} outputs, {entry['over_exact']['mean']:.2f} of the exact threshold: "
                f"growth a step {grown}; exact {entry['exact_in_window']['mean']:.3f}, "
                f"Wu {entry['wu_along']['mean']:.3f}"
            )
    for name in [name for name in SHARPNESS if name in results["edge"]]:
        yield f"largest {name} over 2 / eta: {results['edge'][name]['largest']:.3f}"


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
