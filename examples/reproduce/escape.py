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

import alignment
import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
import tyro
from alignment import digits, init_mlp, mlp, square_loss

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
NOISES = ("SGD", "gradient descent", "isotropic noise")


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


def network(params, inputs):
    """The network of the escapes: smooth, so that the linear model holds for long."""
    hidden = jnp.tanh(inputs @ params["hidden"] + params["bias"])
    return hidden @ params["output"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def fit(num_steps, momentum, params, rate, inputs, targets):
    """Gradient descent with momentum to a minimum."""

    def body(carry, _):
        params, trace = carry
        grads = jax.grad(square_loss, argnums=1)(network, params, inputs, targets)
        trace = jax.tree.map(lambda t, g: momentum * t + g, trace, grads)
        return (jax.tree.map(lambda p, t: p - rate * t, params, trace), trace), None

    start = params, optax.tree.zeros_like(params)
    return jax.lax.scan(body, start, None, length=num_steps)[0][0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def leave(noise, num_steps, num_runs, snapshot, params, key, rate, start_scale, data):
    """Losses of runs from displaced parameters, shape (num_runs, num_steps + 1).

    Also the residuals at step ``snapshot``. SGD draws one example a step.

    Isotropic noise has at each step the trace of the noise of SGD's batch at the same
    point, spread evenly over all parameters.
    """
    inputs, targets = data

    def step_gradient(params, key):
        if noise == "SGD":
            chosen = alignment.draw_batch(key, len(inputs), 1, False)
            return jax.grad(square_loss, argnums=1)(
                network, params, inputs[chosen], targets[chosen]
            )
        if noise == "gradient descent":
            return jax.grad(square_loss, argnums=1)(network, params, inputs, targets)
        grads, spread = gradient_and_spread(params, inputs, targets)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        return displace(grads, key, jnp.sqrt(spread / size))

    def run(key):
        start_key, key = jax.random.split(key)

        def body(carry, moment):
            params, kept = carry
            step, key = moment
            residuals = network(params, inputs) - targets
            kept = jnp.where(step == snapshot, residuals, kept)
            grads = step_gradient(params, key)
            params = jax.tree.map(lambda x, g: x - rate * g, params, grads)
            return (params, kept), jnp.sum(residuals**2) / (2 * len(inputs))

        start = displace(params, start_key, start_scale), jnp.zeros_like(targets)
        moments = jnp.arange(num_steps + 1), jax.random.split(key, num_steps + 1)
        (_, kept), losses = jax.lax.scan(body, start, moments)
        return losses, kept

    return jax.lax.map(run, jax.random.split(key, num_runs), batch_size=16)


def gradient_and_spread(params, inputs, targets):
    """The gradient, and the trace of the covariance of the examples' gradients."""

    def of_one(x, y):
        return jax.grad(square_loss, argnums=1)(network, params, x[None], y[None])

    each = jax.vmap(of_one)(inputs, targets)
    mean = jax.tree.map(lambda x: x.mean(axis=0), each)
    pairs = zip(jax.tree.leaves(each), jax.tree.leaves(mean), strict=True)
    return mean, sum(jnp.sum((x - m) ** 2) for x, m in pairs) / len(inputs)


def displace(params, key, scale):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [
            leaf + scale * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys, strict=True)
        ]
    )


def escapes(config, num_outputs, seed):
    """Growth of the loss from one minimum, at each learning rate."""
    data = digits(seed, config.num_escape_images, num_outputs)
    params = init_mlp(jax.random.key(seed), config.hidden, num_outputs)
    start = stability.linearize(network, params, *data)
    params = fit(
        config.fit_steps, config.momentum, params, 0.1 / start.eigenvalues[0], *data
    )
    lin = stability.linearize(network, params, *data)
    limits = stability.thresholds(lin, 1)
    trace, norm = jnp.sum(lin.eigenvalues), jnp.linalg.norm(lin.eigenvalues)
    mu = alignment.near_alignment(network, params, *data)
    key = jax.random.key(1000 + seed)
    rows = []
    for way in config.ways:
        rate = limits.mean_square ** (1 - way) * limits.gradient_descent**way
        exact = stability.expected_losses(lin, rate, 1, config.escape_steps)
        exact = config.start_loss * np.asarray(exact)
        row = {
            "way": way,
            "over_exact": rate / limits.mean_square,
            "learning_rate": rate,
            "over_gradient_descent": rate / limits.gradient_descent,
            "exact": stability.growth_rate(lin, rate, 1),
            "wu": rate**2 * mu * norm**2,
            "wu_smallest": (rate / limits.frobenius) ** 2,
            "expected": curve(exact[None], exact),
            "noises": {},
        }
        snapshot = row["expected"]["window"][1]
        for noise in NOISES:
            losses, residuals = leave(
                noise,
                config.escape_steps,
                config.num_runs if noise == "SGD" else config.num_quiet_runs,
                snapshot,
                params,
                key,
                rate,
                (2 * config.start_loss / trace) ** 0.5,
                data,
            )
            row["noises"][noise] = curve(np.asarray(losses), exact)
            if noise == "SGD":
                row["mu_along"] = mean_alignment(lin, residuals)
                row["wu_along"] = rate**2 * row["mu_along"] * norm**2
        losses = stability.simulate(
            lin, key, rate, 1, config.escape_steps, num_runs=config.num_runs
        )
        row["noises"]["linearized SGD"] = curve(
            config.start_loss * np.asarray(losses), exact
        )
        rows.append(row)
    return {
        "seed": seed,
        "loss": float(lin.loss),
        "mu": mu,
        "frobenius_norm": norm,
        "gradient_descent": limits.gradient_descent,
        "mean_square": limits.mean_square,
        "rows": rows,
    }


def mean_alignment(lin, residuals):
    """The alignment at the points of some runs, each weighing as its loss."""
    found, weights = [], []
    for errors in residuals[:128]:
        weights.append(float(jnp.sum(errors**2)))
        found.append(float(stability.alignment(lin._replace(residuals=errors)).mu))
    return np.average(found, weights=weights)


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


def summarize_escapes(config, minima):
    """Means over minima at each learning rate; rates as logarithms, which add up."""
    found = {"mu": common.mean_and_error([m["mu"] for m in minima])}
    share = [m["mean_square"] / m["gradient_descent"] for m in minima]
    found["exact_over_gradient_descent"] = common.mean_and_error(share)
    found["largest_loss"] = max(m["loss"] for m in minima)
    for index, way in enumerate(config.ways):
        rows = [m["rows"][index] for m in minima]
        average = lambda values: common.mean_and_error(list(values))  # noqa: E731
        entry = {
            "exact": average(r["exact"] for r in rows),
            "exact_in_window": average(r["expected"]["growth"] for r in rows),
            "wu": average(r["wu"] for r in rows),
            "wu_along": average(r["wu_along"] for r in rows),
            "mu_along": average(r["mu_along"] for r in rows),
            "wu_smallest": average(r["wu_smallest"] for r in rows),
            "over_exact": average(r["over_exact"] for r in rows),
            "over_gradient_descent": average(r["over_gradient_descent"] for r in rows),
        }
        for noise in (*NOISES, "linearized SGD"):
            mine = [r["noises"][noise] for r in rows]
            entry[noise] = {
                "growth": average(x["growth"] for x in mine),
                "left": sum(x["left"] for x in mine),
                "diverged": sum(x["diverged"] for x in mine),
                "runs": sum(x["runs"] for x in mine),
            }
        sgd = np.log([r["noises"]["SGD"]["growth"] for r in rows])
        bases = {
            "exact": [r["expected"]["growth"] for r in rows],
            "linearized": [r["noises"]["linearized SGD"]["growth"] for r in rows],
        }
        for name, base in bases.items():
            entry[f"log_growth_over_{name}"] = average(sgd / np.log(base))
        entry["wu_along_over_sgd"] = average(
            r["wu_along"] / r["noises"]["SGD"]["growth"] for r in rows
        )
        entry["wu_along_at_most_sgd"] = sum(
            r["wu_along"] <= r["noises"]["SGD"]["growth"] for r in rows
        )
        entry["wu_along_above_one"] = sum(r["wu_along"] > 1 for r in rows)
        found[f"{way:g}"] = entry
    return found


def measure_edge(config, row, params):
    """Sharpness of what a run found, as the theories read it: 2 / the largest stable rate."""
    if row["outcome"] != "minimum":
        return row
    inputs, targets = digits(row["seed"], config.num_images, 10)
    lin = stability.linearize(mlp, params, inputs, targets)
    limits = stability.thresholds(lin, row["batch_size"])
    return row | {name: 2 / getattr(limits, name) for name in SHARPNESS}


SHARPNESS = {
    "gradient_descent": r"$\lambda_{max}$",
    "rank_one": "left side of (24)",
    "mean_square": r"exact, $2 / \eta^*$",
}


def summarize_edge(rows):
    """Sharpness over 2 / eta, by batch size, and by learning rate too."""
    outcomes = [row["outcome"] for row in rows]
    found = {
        "runs": len(rows),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        "by_batch_size": {},
    }
    minima = [row for row in rows if row["outcome"] == "minimum"]
    for name in SHARPNESS if minima else ():
        shares = np.array([r[name] * r["learning_rate"] / 2 for r in minima])
        found[name] = {"largest": shares.max(), "above": int((shares > 1).sum())}
    for size in sorted({row["batch_size"] for row in rows}):
        found["by_batch_size"][size] = {}
        for rate in sorted({row["learning_rate"] for row in rows}):
            mine = [
                r
                for r in minima
                if (r["batch_size"], r["learning_rate"]) == (size, rate)
            ]
            if mine:
                found["by_batch_size"][size][f"{rate:g}"] = {
                    name: common.mean_and_error([r[name] * rate / 2 for r in mine])
                    for name in SHARPNESS
                }
    return found


def compute(config, piece):
    pairs = [
        (c, seed) for c in config.escape_outputs for seed in range(config.num_seeds)
    ]
    bar = tqdm.tqdm(total=len(pairs) + len(config.batch_sizes))
    minima = {c: [] for c in config.escape_outputs}
    for c, seed in pairs:
        bar.set_description(f"escape, {c} outputs")
        run = functools.partial(escapes, config, c, seed)
        minima[c].append(piece(f"escape {c} {seed}", run))
        bar.update()

    def edge(batch_size):
        setting = dataclasses.replace(
            config, num_seeds=config.num_edge_seeds, hidden=config.edge_hidden
        )
        found = alignment.sharp_starts(setting, 10, batch_size, False)
        return [measure_edge(config, *run) for run in found]

    rows = []
    for batch_size in config.batch_sizes:
        bar.set_description(f"edge, B = {batch_size}")
        rows += piece(f"edge {batch_size}", functools.partial(edge, batch_size))
        bar.update()
    bar.close()
    return {
        "paper": PAPER,
        "escape": {c: summarize_escapes(config, found) for c, found in minima.items()},
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
        for color, noise in zip(("C0", "C2", "C1"), NOISES, strict=True):
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
        for color, noise in zip(("C0", "C2", "C1"), NOISES, strict=True):
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
    minima = [row for row in rows if row["outcome"] == "minimum"]
    for index, size in enumerate(sorted({row["batch_size"] for row in minima})):
        mine = [row for row in minima if row["batch_size"] == size]
        values = ([row[key] for row in mine] for key in ("learning_rate", name))
        axis.loglog(*values, ".", color=f"C{index}", label=f"B = {size}")
    rates = np.array(sorted({row["learning_rate"] for row in rows}))
    axis.plot(rates, 2 / rates, color="0.5", label=r"$2 / \eta$")
    axis.set(xlabel=r"learning rate $\eta$", ylabel=label)
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.xaxis.set_minor_locator(plt.NullLocator())
    lost = len(rows) - len(minima)
    axis.legend(fontsize=8, title=f"{lost} of {len(rows)} runs lost", title_fontsize=8)


def main(config: Config) -> None:
    config = common.prepare(config, SMOKE)
    results = common.run("escape", config, compute, draw)["results"]
    for c, found in results["escape"].items():
        for way in config.ways:
            entry = found[f"{way:g}"]
            grown = ", ".join(
                f"{noise} {entry[noise]['growth']['mean']:.3f}" for noise in NOISES
            )
            print(
                f"{c} outputs, {entry['over_exact']['mean']:.2f} of the exact threshold: "
                f"growth a step {grown}; exact {entry['exact_in_window']['mean']:.3f}, "
                f"Wu {entry['wu_along']['mean']:.3f}"
            )
    for name in [name for name in SHARPNESS if name in results["edge"]]:
        print(f"largest {name} over 2 / eta: {results['edge'][name]['largest']:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
