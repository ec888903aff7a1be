"""Where do momentum and AdamW settle, and do they leave minima when theory says?

A small network on digits and a small Transformer on text, both with square loss, so that
the exact threshold at each batch size is known. Training starts sharp with SGD, heavy ball,
Nesterov's momentum and AdamW: where does it settle, and does the critical sharpness, which
needs forward passes alone, follow the largest eigenvalue on the way? Then each optimizer is
started beside a fitted minimum at rates about its threshold, as optax runs it on the
network and as the linear model has it.
"""

import dataclasses
import functools
import pathlib

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import fitted, optimizers, square_loss, statistics
from common import settling as summaries
from common.optimizers import LIMITS, OPTIMIZERS

from flatopt import stability

PAPER = {
    "references": [
        "Cohen et al., ICLR 2021, arXiv 2103.00065",
        "Cohen et al., 2022, arXiv 2207.14484",
        "Mulayoff, Michaeli, 2023, arXiv 2306.07850",
        "A scalable measure of loss landscape curvature, 2026, arXiv 2601.16979",
    ],
    "statements": [
        "on all data in one batch training settles where the largest eigenvalue, for Adam "
        "preconditioned, is the largest at which the optimizer stays",
        "on batches the exact threshold of the second moment is the limit",
        "the critical sharpness follows the largest eigenvalue",
    ],
    "over_limit": 1.0,
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings."""

    text: pathlib.Path | None = None
    """A text file, or a folder of Python files. Default: Python's standard library."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Optimizers to compare."""
    tasks: tuple[str, ...] = ("digits", "text")
    """Networks: an MLP on digits, a Transformer on text."""
    num_examples: int = 32
    """Training examples of each."""
    hidden: int = 32
    """Hidden units of the MLP."""
    width: int = 16
    """Width of the Transformer of one block."""
    length: int = 8
    """Characters of an example of text."""
    init_scale: float = 2.0
    """Factor of the MLP's initial weights where training settles: a sharp start."""
    digits_over_start: float = 2.0
    """Learning rate over the exact threshold at the start, which cannot be stayed at."""
    text_over_start: float = 1.0
    """That on text, where training sharpens first."""
    adaptive_rate: float = 5e-3
    """Learning rate of AdamW, which has no threshold before it has seen gradients."""
    digits_steps: int = 10_000
    """Steps of each run on digits, the first quarter warming up."""
    text_steps: int = 2000
    """Those on text."""
    digits_batch_sizes: tuple[int, ...] = (1, 4, 32)
    """Batch sizes on digits, drawn without replacement; the last is all examples."""
    text_batch_sizes: tuple[int, ...] = (4, 32)
    """Those on text."""
    points: int = 8
    """Points of a run at which critical sharpness and eigenvalue are measured."""
    factors: tuple[float, ...] = (0.7, 0.9, 1.1, 1.5)
    """Learning rates of the escapes over the exact threshold."""
    fit_steps: int = 10_000
    """Steps of gradient descent with momentum to the minimum of the escapes."""
    momentum: float = 0.99
    """Momentum of it."""
    gather_steps: int = 3000
    """Steps of AdamW on single examples that its second moments come from."""
    escape_steps: int = 200
    """Steps from the minimum."""
    start_loss: float = 1e-6
    """Expected loss of the displacement from the minimum."""
    num_runs: int = 64
    """Runs from each minimum, of the network and of the linear model."""
    num_seeds: int = 5
    """Seeds: examples, initial parameters, displacements and batches."""


SMOKE = dict(
    optimizers=("heavy ball",),
    tasks=("digits",),
    num_examples=8,
    hidden=8,
    digits_steps=200,
    digits_batch_sizes=(2,),
    points=2,
    factors=(1.5,),
    fit_steps=500,
    escape_steps=20,
    num_runs=8,
    num_seeds=1,
)


CELL = ["optimizer", "batch_size"]


def task_of(config, name, scale=1.0):
    if name == "digits":
        return fitted.digits(config.num_examples, config.hidden, scale)
    return fitted.text(config.text, config.num_examples, config.width, config.length)


# Where training settles


def settle(config, name, optimizer, batch_size):
    """A row for each seed: what a run did, and where it ended."""
    task, make = task_of(config, name, config.init_scale), OPTIMIZERS[optimizer]
    seeds = range(config.num_seeds)
    starts, data = [task.init(s) for s in seeds], [task.data(s) for s in seeds]
    rates = [config.adaptive_rate] * config.num_seeds
    if optimizer != "AdamW":
        over_start = getattr(config, f"{name}_over_start")
        rates = [
            over_start * optimizers.at(task, optimizer, batch_size, p, None, d)[1]
            for p, d in zip(starts, data, strict=True)
        ]
    last = getattr(config, f"{name}_steps")
    stops = tuple(
        np.geomspace(min(50, last // 2), last, config.points).astype(int).tolist()
    )
    found = optimizers.train(
        task.model_fn,
        make,
        batch_size,
        stops,
        square_loss.stack(starts),
        jnp.stack([jax.random.key(1000 + seed) for seed in seeds]),
        jnp.array(rates),
        square_loss.stack(data),
    )
    rows = []
    for seed, rate in enumerate(rates):
        own = jax.tree.map(lambda x, s=seed: x[s], found)
        row = {"task": name, "optimizer": optimizer, "batch_size": batch_size}
        row |= {"seed": seed, "learning_rate": rate, "step": stops}
        rows.append(
            row | optimizers.follow(task, optimizer, batch_size, rate, own, data[seed])
        )
    return rows


# Escapes from a fitted minimum


def escape(config, optimizer, batch_size):
    """A row for each minimum and factor of the exact threshold: growth seen and predicted."""
    task = task_of(config, "digits")
    return [
        row
        for seed in range(config.num_seeds)
        for row in escapes_from(config, task, optimizer, batch_size, seed)
    ]


def escapes_from(config, task, optimizer, batch_size, seed):
    """Those from the minimum of a seed."""
    params, data = optimizers.minimum(config, task, seed), task.data(seed)
    state = optimizers.rested(config, task, optimizer, seed, params)
    lin, limit = optimizers.at(task, optimizer, batch_size, params, state, data)
    scale = (2 * config.start_loss / jnp.sum(lin.eigenvalues)) ** 0.5
    factors = optimizers.factors_of(optimizer, state, params)
    spread = jax.tree.map(lambda f: scale * jnp.sqrt(f), factors)
    key, make = jax.random.key(3000 + seed), OPTIMIZERS[optimizer]
    steps, runs = config.escape_steps, config.num_runs
    for factor in config.factors:
        given = lin, factor * limit, batch_size
        chain = {"optimizer": make, "opt_state": state}
        exact = np.asarray(stability.expected_losses(*given, steps, **chain))
        linear = stability.simulate(lin, key, *given[1:], steps, num_runs=runs, **chain)
        setting = task.model_fn, make, batch_size, steps, runs
        start = (params, state), spread, key, factor * limit
        network = np.asarray(optimizers.leave(*setting, *start, data))
        yield {
            "optimizer": optimizer,
            "batch_size": batch_size,
            "seed": seed,
            "factor": factor,
            "minimum_loss": lin.loss,
            "learning_rate": factor * limit,
            "growth_rate": stability.growth_rate(*given, **chain, progress=False),
            "expected": optimizers.seen(exact[None], exact)["mean"],
            "linear": optimizers.seen(np.asarray(linear), exact),
            "network": optimizers.seen(network / config.start_loss, exact),
        }


def compute(config, piece):
    pairs = {
        name: [
            (optimizer, size)
            for optimizer in config.optimizers
            for size in getattr(config, f"{name}_batch_sizes")
        ]
        for name in config.tasks
    }
    total = len(pairs["digits"]) + sum(map(len, pairs.values()))
    settled, escapes = [], []
    with common.shown(piece, total) as piece:
        for name, own in pairs.items():
            for optimizer, size in own:
                run = functools.partial(settle, config, name, optimizer, size)
                settled += piece(f"settle {name} {optimizer} {size}", run)
        for optimizer, size in pairs["digits"]:
            run = functools.partial(escape, config, optimizer, size)
            escapes += piece(f"escape {optimizer} {size}", run)
    return {
        "paper": PAPER,
        "limits": LIMITS,
        "settled": grouped(settled, ["task", *CELL], summaries.settled),
        "critical": grouped(settled, ["task", *CELL], summaries.critical),
        "escape": grouped(escapes, [*CELL, "factor"], summaries.escapes),
        "all_escapes": grouped(escapes, ["optimizer"], summaries.escapes),
        "settled_runs": settled,
        "escape_runs": escapes,
    }


def grouped(rows, by, function):
    return statistics.by_group(pd.json_normalize(rows, max_level=1), by, function)


def draw(report):
    results, settings = report["results"], report["settings"]
    settled = pd.DataFrame(results["settled_runs"])
    escapes = pd.json_normalize(results["escape_runs"], max_level=1)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    colors = {name: f"C{index}" for index, name in enumerate(settings["optimizers"])}
    draw_settled(axes[0, 0], settled, "over_limit", colors)
    draw_settled(axes[0, 1], settled, "over_exact", colors)
    draw_critical(axes[0, 2], settled, colors)
    draw_growth(axes[1, 0], escapes, "mean", "expected", colors)
    draw_growth(axes[1, 1], escapes, "median", "linear.median", colors)
    draw_left(axes[1, 2], escapes, colors)
    return figure


LABELS = {
    "over_limit": r"$\lambda_{max}$ over the limit on all data",
    "over_exact": "learning rate over the exact threshold",
}


def draw_settled(axis, settled, column, colors):
    """A point a run: filled digits, hollow text; crosses for what is no minimum."""
    sizes = sorted(settled["batch_size"].unique())
    for index, (name, color) in enumerate(colors.items()):
        own = settled[settled["optimizer"] == name]
        for task, end, mark in [
            ("digits", True, "o"),
            ("text", True, "s"),
            ("digits", False, "x"),
            ("text", False, "+"),
        ]:
            rows = own[(own["task"] == task) & ((own["outcome"] == "minimum") == end)]
            if not len(rows):
                continue
            place = rows["batch_size"].map(sizes.index) + (index - 1.5) / 6
            place += 0.06 * (task == "text")
            style = {"mfc": "none"} if task == "text" else {}
            label = name if mark == "o" else None
            axis.plot(
                place, rows[column], mark, color=color, ms=4, label=label, **style
            )
    axis.axhline(1, color="0.5", zorder=0)
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set(xlabel="batch size", ylabel=LABELS[column], ylim=(0, None))
    if column == "over_exact":
        axis.legend(fontsize=8, title="circles digits, squares text", title_fontsize=8)


def draw_critical(axis, settled, colors):
    """At each point of a run on all data, one against the other."""
    largest_batch = settled.groupby("task")["batch_size"].transform("max")
    rows = settled[settled["batch_size"] == largest_batch]
    for name, color in colors.items():
        for task, mark in (("digits", "o"), ("text", "s")):
            own = rows[(rows["optimizer"] == name) & (rows["task"] == task)]
            own = own[["loss", "critical", "max_eigenvalue"]]
            own = own.explode([*own.columns]).astype(float)
            own = own[own["loss"] > summaries.ROUNDING]
            label = name if task == "digits" else None
            style = {"color": color, "ms": 4, "label": label, "mfc": "none"}
            axis.loglog(own["max_eigenvalue"], own["critical"], mark, **style)
    ends = axis.get_xlim()
    axis.plot(ends, ends, color="0.5", zorder=0)
    axis.set(xlabel=r"$\lambda_{max}$ along training", ylabel="critical sharpness")
    axis.set_title("all data in one batch", fontsize=9)
    axis.legend(fontsize=8)


def draw_growth(axis, escapes, what, theory, colors):
    """Growth a step of the network and of the linear model against what is expected."""
    for name, color in colors.items():
        own = escapes[escapes["optimizer"] == name]
        x = np.log(own[theory])
        axis.plot(x, np.log(own[f"network.{what}"]), ".", color=color, label=name)
        if what == "mean":
            style = {"color": color, "mfc": "none", "ms": 5, "mew": 0.7}
            axis.plot(x, np.log(own[f"linear.{what}"]), "o", **style)
    ends = axis.get_xlim()
    axis.plot(ends, ends, color="0.5", zorder=0)
    labels = {
        "expected": "exact, of the mean",
        "linear.median": "linear model, of the median",
    }
    axis.set(xlabel=f"log growth a step: {labels[theory]}", ylabel=f"network, {what}")
    axis.legend(fontsize=8, title="circles: linear" if what == "mean" else None)


def draw_left(axis, escapes, colors):
    """The share of runs that leave: network, and dotted the linear model."""
    sizes = sorted(escapes["batch_size"].unique())
    for name, color in colors.items():
        for size, mark in zip((sizes[0], sizes[-1]), "ov", strict=True):
            own = escapes[
                (escapes["optimizer"] == name) & (escapes["batch_size"] == size)
            ]
            means = own.groupby("factor")[["network.left", "linear.left"]].mean()
            label = f"{name}, B = {size}"
            style = {"color": color, "marker": mark, "ms": 4}
            axis.plot(means.index, means["network.left"], label=label, **style)
            axis.plot(means.index, means["linear.left"], ":", **style)
    axis.axvline(1, color="0.5", zorder=0)
    axis.set(xlabel=LABELS["over_exact"], ylabel="share of runs that leave")
    axis.legend(fontsize=7)


def lines(report):
    results = report["results"]
    for task, name, size, own in walk(results["settled"]):
        critical = results["critical"][task][name][size]
        found = own["finite"]
        shares = "over_limit", "over_exact"
        text = ", ".join(
            f"{n.replace('_', ' ')} {found[n]['mean']:.2f} ± {found[n]['error']:.2f}"
            for n in shares
            if n in found
        )
        yield (
            f"{task}, {name}, B = {size}: {own['outcomes']}, {text}, critical sharpness "
            f"over largest eigenvalue {critical['ratio']['mean']:.2f}"
        )
    for name, size, factor, own in walk(results["escape"]):
        yield (
            f"{name}, B = {size}, {factor} of the threshold: growth exact "
            f"{own['expected']['mean']:.3f}, network {own['network.mean']['mean']:.3f}, "
            f"left {own['network.left']['mean']:.2f}"
        )


def walk(nested):
    """The leaves of a summary of three levels, with their names."""
    for first, inner in nested.items():
        for second, own in inner.items():
            for third, found in own.items():
                yield first, second, third, found


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
