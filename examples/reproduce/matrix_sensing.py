"""Matrix sensing: noise stability finds the low-rank truth, gradient descent does not.

A symmetric matrix of rank 5 is to be found from a quarter of its entries' worth of random
linear measurements, as a product of full-size factors. Many factors fit the measurements;
the flattest of them is the truth. Compares gradient descent (GD), gradients at one
perturbed point (WP-GD), at two independent ones, and at a point and its mirror image
(NSO): one chain of optax, four settings of its first link. The setting is that of Zhang,
Li, Ju, Noise Stability Optimization for Finding Flat Minima (arXiv 2306.08553).
"""

import dataclasses
import functools

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import figures, methods, statistics

import flatopt

# Read off the paper's figure, one seed, sigma = 0.08.
PAPER = {
    "distance_squared": {"GD": 1.75, "WP-GD": 2.6e-3, "NSO": 5.7e-4},
    "WP-GD over NSO": 4.5,
    "NSO at epoch 1000": 9e-3,
    "decay an epoch": 5.4e-3,
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    seeds: int = 5
    """Number of runs: truth, start and noise change, the measurements stay."""
    epochs: int = 5000
    """Steps of every method, each on all measurements."""
    dimension: int = 100
    """Rows and columns of the matrix."""
    rank: int = 5
    """Rank of the truth. There are 5 * dimension * rank measurements."""
    learning_rate: float = 0.0025
    """Step size of every method."""
    sigma: float = 0.08
    """Standard deviation of the noise."""
    small_sigma: float = 0.008
    """One that does nothing."""
    points: int = 50
    """Number of points of each curve."""
    measurement_seed: int = 0
    """Seed of the measurements."""


SMOKE = {"seeds": 2, "epochs": 50, "dimension": 10, "rank": 1, "points": 25}


def links_of(config):
    """What comes before gradient descent in the chain of each method."""
    link = functools.partial(flatopt.smooth_gradients, strategy="vmap")
    return {
        "GD": lambda key: link(0.0, key=key),
        "WP-GD": lambda key: link(config.sigma, key=key),
        "WP-GD, two draws": lambda key: link(config.sigma, num_samples=2, key=key),
        "NSO": lambda key: link(config.sigma, antithetic=True, key=key),
        "NSO, small noise": lambda key: link(
            config.small_sigma, antithetic=True, key=key
        ),
    }


def measure(factor, measurements):
    """Inner products of the measurement matrices with the factor's product."""
    rows, columns = np.triu_indices(len(factor))
    return measurements @ (factor @ factor.T)[rows, columns]


def loss_fn(factor, measurements, targets):
    """A quarter of the mean squared error, as in the paper."""
    return jnp.mean((measure(factor, measurements) - targets) ** 2) / 4


def draw_measurements(key, config):
    """Symmetric matrices (G + G') / 2, one a row: diagonal, and off-diagonal twice."""
    rows, columns = np.triu_indices(config.dimension)
    count = 5 * config.dimension * config.rank
    deviation = jnp.where(rows == columns, 1.0, 2.0**0.5)
    return deviation * jax.random.normal(key, (count, len(rows)))


def draw_problem(seed, measurements, config):
    """The truth, its measurements, a start, and the key of the noise."""
    keys = jax.random.split(jax.random.key(seed), 3)
    truth = jax.random.normal(keys[0], (config.dimension, config.rank))
    start = jax.random.normal(keys[1], (config.dimension, config.dimension))
    return truth, measure(truth, measurements), start, keys[2]


def distance_squared(factor, truth):
    product, target = factor @ factor.T, truth @ truth.T
    return jnp.sum((product - target) ** 2) / jnp.sum(target**2)


def batch_loss_fn(factor, batch):
    return loss_fn(factor, *batch)


def hessian_trace(factor, measurements, targets, num_probes, num_deflated):
    operator = flatopt.curvature.hessian(batch_loss_fn, factor, (measurements, targets))
    return flatopt.curvature.trace(
        operator, jax.random.key(0), num_probes, num_deflated=num_deflated
    )


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, 0))
def precise_trace(factor, measurements, targets):
    found = hessian_trace(factor, measurements, targets, 64, num_deflated=8)
    return {"value": found.value, "error": found.standard_error}


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None))
def look(factor, truth, targets, measurements, fresh):
    """How near a factor is to the truth, and how flat the loss is there."""
    checks = measure(truth, fresh)
    trace = hessian_trace(factor, measurements, targets, 8, num_deflated=0)
    return {
        "distance_squared": distance_squared(factor, truth),
        "training_error": normalized_error(factor, measurements, targets),
        "validation_error": normalized_error(factor, fresh, checks),
        "trace": trace.value,
    }


def normalized_error(factor, measurements, targets):
    return 4 * loss_fn(factor, measurements, targets) / jnp.mean(targets**2)


class Sensing:
    """Measurements, and the problems of all seeds side by side."""

    def __init__(self, config):
        self.config = config
        keys = jax.random.split(jax.random.key(config.measurement_seed), 2)
        self.measurements = draw_measurements(keys[0], config)
        self.fresh = draw_measurements(keys[1], config)
        problems = jax.vmap(lambda s: draw_problem(s, self.measurements, config))
        self.truth, self.targets, self.start, self.keys = problems(
            1 + jnp.arange(config.seeds)
        )

    def chain(self, link, key):
        return optax.chain(link(key), optax.sgd(self.config.learning_rate))

    def train(self, link):
        """Curves of one method, the seeds of one point in a row, and final traces."""
        config = self.config
        length = config.epochs // config.points

        @functools.partial(jax.jit, donate_argnums=0)
        @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
        def advance(carry, key, targets, measurements):
            tx = self.chain(link, key)

            def step(carry, _):
                batch = {"measurements": measurements, "targets": targets}
                return common.step(tx, loss_fn, carry, **batch), None

            return jax.lax.scan(step, carry, None, length=length)[0]

        factor = jnp.array(self.start)
        carry = (
            factor,
            jax.vmap(lambda f, k: self.chain(link, k).init(f))(factor, self.keys),
        )
        curves = [self.look(factor)]
        for _ in range(config.points):
            carry = advance(carry, self.keys, self.targets, self.measurements)
            curves.append(self.look(carry[0]))
        final = precise_trace(carry[0], self.measurements, self.targets)
        return {
            **{name: np.stack([c[name] for c in curves]) for name in curves[0]},
            "final_trace": final["value"],
            "final_trace_error": final["error"],
            "diverged": int(np.sum(~np.isfinite(curves[-1]["distance_squared"]))),
        }

    def look(self, factor):
        return look(factor, self.truth, self.targets, self.measurements, self.fresh)

    def true_traces(self):
        """Traces at the truth, its factor filled up with columns of zeros."""
        missing = self.config.dimension - self.config.rank
        factor = jnp.pad(self.truth, ((0, 0), (0, 0), (0, missing)))
        return precise_trace(factor, self.measurements, self.targets)

    def gradients_a_step(self, link):
        tx, factor = self.chain(link, 0), self.start[0]

        def step(value_fn, carry, measurements, targets):
            batch = {"measurements": measurements, "targets": targets}
            return common.step(tx, value_fn, carry, **batch)

        carry = factor, tx.init(factor)
        data = self.measurements, self.targets[0]
        return methods.gradients_a_step(step, loss_fn, carry, *data)


def compute(config, piece):
    sensing = Sensing(config)
    links = links_of(config)
    found, costs = {}, {}
    with common.shown(piece, len(links), "method") as piece:
        truth = piece("truth", sensing.true_traces, size=0)
        for name, link in links.items():
            count = functools.partial(sensing.gradients_a_step, link)
            costs[name] = piece(f"cost of {name}", count, size=0)
            found[name] = piece(name, functools.partial(sensing.train, link))
    marks = np.linspace(0, config.epochs, config.points + 1).astype(int)
    return {
        "paper": PAPER,
        "epochs": marks,
        "gradients_a_step": costs,
        "trace_of_truth": truth,
        "curves": found,
        "summary": {n: summary(f, truth, config) for n, f in found.items()},
        "ratios": ratios(found, costs, config),
    }


def floor(curves, name="distance_squared"):
    """Of each seed, the mean over the last tenth of training."""
    values = np.asarray(curves[name])
    return values[-max(1, len(values) // 10) :].mean(axis=0)


def summary(curves, truth, config):
    distance = np.asarray(curves["distance_squared"])
    columns = {
        "distance_squared": floor(curves),
        "distance_squared_at_a_fifth": distance[config.points // 5],
        "training_error": floor(curves, "training_error"),
        "validation_error": floor(curves, "validation_error"),
        "trace": curves["final_trace"],
        "trace_over_truth": np.divide(curves["final_trace"], truth["value"]),
    }
    return statistics.columns_of(columns) | {"diverged": curves["diverged"]}


def ratios(found, costs, config):
    """What the page quotes, from the same numbers."""
    floors = {name: floor(curves) for name, curves in found.items()}
    nso = np.asarray(found["NSO"]["distance_squared"])
    share = costs["WP-GD"] / costs["NSO"]
    fifth, late = config.points // 25, config.points // 5
    epochs = (late - fifth) * config.epochs // config.points
    average = common.mean_and_error
    decay = 4 * config.learning_rate * (config.dimension + 1)
    return {
        "WP-GD over NSO": average(floors["WP-GD"] / floors["NSO"]),
        "two draws over NSO": average(floors["WP-GD, two draws"] / floors["NSO"]),
        "two draws, predicted": np.mean(floors["WP-GD"] + floors["NSO"]) / 2,
        "NSO, small noise over GD": average(floors["NSO, small noise"] / floors["GD"]),
        "NSO with the gradients of WP-GD": average(nso[int(config.points * share)]),
        "NSO, decay an epoch": average(np.log(nso[fifth] / nso[late]) / epochs),
        "decay an epoch, predicted": decay * config.sigma**2,
        "decay an epoch, predicted for small noise": decay * config.small_sigma**2,
    }


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    truth = np.asarray(results["trace_of_truth"]["value"])
    style = {"edgecolor": "face"}
    for name, curves in results["curves"].items():
        epochs = np.asarray(results["epochs"])
        distance = np.asarray(curves["distance_squared"])
        share = np.asarray(curves["trace"]) / truth
        gradients = epochs * results["gradients_a_step"][name]
        figures.band(axes[0], epochs, distance.T, name, **style)
        figures.band(axes[1], gradients, distance.T, name, **style)
        figures.band(axes[2], epochs, share.T, name, **style)
    for axis in axes[:2]:
        axis.set(yscale="log", ylabel="squared distance to the truth, normalized")
    axes[2].axhline(1, color="black", linestyle=":")
    axes[2].set(yscale="log", ylabel="trace of the Hessian over the truth's")
    for axis, label in zip(
        axes, ("epoch", "gradients of the loss", "epoch"), strict=True
    ):
        axis.set_xlabel(label)
    axes[0].legend(fontsize=8)
    return figure


def lines(report):
    for name, row in report["results"]["summary"].items():
        distance, share = row["distance_squared"], row["trace_over_truth"]
        yield (
            f"{name:18} distance squared {distance['mean']:.3g} ± {distance['error']:.1g}, "
            f"trace over the truth's {share['mean']:.3f} ± {share['error']:.1g}"
        )


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
