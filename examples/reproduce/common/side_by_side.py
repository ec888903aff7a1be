"""Networks on digits trained side by side: all settings, then all seeds, of a method."""

import dataclasses
import functools
import itertools
import operator
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt

from . import methods, networks
from .data import split_digits
from .methods import TUNING_SEED, gradients_a_step, step
from .statistics import columns_of


@dataclasses.dataclass(frozen=True)
class Method(methods.Method):
    """What comes before SGD with momentum: ``make(radius, key, num_steps)``, or nothing."""

    shifted: bool = False
    """Whether images are moved by up to a pixel."""


class Training:
    """One network, and how to train many of it side by side."""

    def __init__(self, config, network):
        self.config = config
        self.model_fn, shapes = networks.NETWORKS[network]
        self.initialize = jax.jit(functools.partial(networks.initialize, shapes))
        self.problem = functools.cache(self._problem)
        self.num_steps = config.epochs * config.train_images // config.batch_size
        digits = split_digits(0, 0)
        self.validation, self.test = (
            jax.tree.map(jnp.asarray, digits[name]) for name in ("validation", "test")
        )

    def loss_fn(self, params, batch):
        images, labels = batch
        logits = self.model_fn(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def _problem(self, seed, label_noise):
        """Training data, start and batches of a seed."""
        config = self.config
        digits = split_digits(seed, config.train_images, label_noise)
        images, labels = digits["train"]
        rng = np.random.default_rng(seed)
        orders = rng.permuted(
            np.tile(np.arange(len(images)), (config.epochs, 1)), axis=1
        )
        start = jax.tree.map(np.asarray, self.initialize(jax.random.key(seed)))
        return {
            "seed": np.int32(seed),
            "label_noise": np.float32(label_noise),
            "data": (images, labels),
            "batches": orders.reshape(-1, config.batch_size),
            "start": start,
        }

    def optimizer(self, method, run, num_steps):
        setting = run["setting"]

        def learning_rate(count):
            return (
                setting["learning_rate"] * (1 + jnp.cos(jnp.pi * count / num_steps)) / 2
            )

        links = [
            optax.add_decayed_weights(setting["weight_decay"]),
            optax.sgd(learning_rate, momentum=0.9),
        ]
        if method.make is not None:
            key = noise_key(run)
            links.insert(0, method.make(setting["radius"], key, self.num_steps))
        return optax.chain(*links)

    def step(self, method, run, num_steps, value_fn, carry, batch):
        setting = run["setting"]

        def loss_fn(params, batch):
            if "distance_penalty" not in setting:
                return value_fn(params, batch)
            distance = square_distance(params, run["start"])
            return value_fn(params, batch) + setting["distance_penalty"] * distance / 2

        tx = self.optimizer(method, run, num_steps)
        return step(tx, loss_fn, carry, method.make is not None, batch=batch)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def init(self, method, run):
        return run["start"], self.optimizer(method, run, 1).init(run["start"])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def advance(self, method, carry, runs, first, last, num_steps):
        """Steps ``first`` to ``last`` of all runs."""

        def one(carry, run):
            images, labels = run["data"]

            def body(index, carry):
                chosen = run["batches"][index]
                batch = images[chosen], labels[chosen]
                if method.shifted:
                    key = jax.random.fold_in(noise_key(run), index)
                    batch = shift(key, images[chosen]), labels[chosen]
                return self.step(method, run, num_steps, self.loss_fn, carry, batch)

            return jax.lax.fori_loop(first, last, body, carry)

        return jax.vmap(one)(carry, runs)

    def runs(self, chosen):
        """Runs side by side, from ``(setting, seed, label noise)`` of each."""
        trees = [
            self.problem(seed, share) | {"setting": setting}
            for setting, seed, share in chosen
        ]
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)

    def gradients_a_step(self, method):
        """Gradients of a batch a step, as flatopt counts those of single examples."""
        run = self.problem(0, 0.0) | {"setting": method.settings[0]}
        batch = jax.tree.map(lambda x: x[: self.config.batch_size], run["data"])
        carry = run["start"], self.optimizer(method, run, 1).init(run["start"])
        step = functools.partial(self.step, method, run, 1)
        return gradients_a_step(step, self.loss_fn, carry, batch)

    def settings(self, method):
        """The settings to choose from."""
        return method.settings[:: len(method.settings) // self.config.settings]

    def tune(self, method, num_steps, label_noise):
        """Mean validation accuracy of every setting."""
        settings = self.settings(method)
        seeds = range(TUNING_SEED, TUNING_SEED + self.config.tuning_seeds)
        chosen = itertools.product(settings, seeds, (label_noise,))
        runs = self.runs(list(chosen))
        carry = self.init(method, runs)
        params, _ = self.advance(method, carry, runs, 0, num_steps, num_steps)
        correct = self.correct(params, self.validation)
        return np.asarray(correct).reshape(len(settings), -1).mean(axis=1)

    def train(self, method, settings, num_steps):
        """Final runs of the settings chosen for each share of label noise."""
        config, shares = self.config, [*settings]
        seeds = range(1, 1 + config.seeds)
        runs = self.runs([(settings[p], s, float(p)) for p in shares for s in seeds])
        carry = self.init(method, runs)
        problems = {name: x for name, x in runs.items() if name != "setting"}
        curves, seconds = [self.look(carry[0], problems)], []
        marks = np.linspace(0, num_steps, config.points + 1).astype(int)
        for first, last in itertools.pairwise(marks.tolist()):
            start = time.perf_counter()
            carry = jax.block_until_ready(
                self.advance(method, carry, runs, first, last, num_steps)
            )
            seconds.append(time.perf_counter() - start)
            curves.append(self.look(carry[0], problems))
        found = {f"{k} curve": np.stack([c[k] for c in curves]).T for k in curves[0]}
        found |= self.measure(carry[0], problems)
        found["max_eigenvalue"] = self.max_eigenvalues(carry[0], problems)
        shape = len(shares), len(seeds)
        columns = jax.tree.map(
            lambda x: np.reshape(x, (*shape, *np.shape(x)[1:])), found
        )
        return {
            # Of one run, without compilation, which is in the first part.
            "seconds": float(np.median(seconds))
            * config.points
            / len(shares)
            / len(seeds),
            "runs": {
                p: {name: column[index] for name, column in columns.items()}
                for index, p in enumerate(shares)
            },
        }

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0, None))
    def correct(self, params, batch):
        images, labels = batch
        return (self.model_fn(params, images).argmax(axis=-1) == labels).mean()

    def trace(self, params, run, num_probes):
        # The same probes for all methods of a seed.
        hessian = flatopt.curvature.hessian(self.loss_fn, params, run["data"])
        return flatopt.curvature.trace(
            hessian, noise_key(run), num_probes, num_deflated=0
        )

    @functools.partial(jax.jit, static_argnums=0)
    def look(self, params, runs):
        def one(params, run):
            return {
                "loss": self.loss_fn(params, run["data"]),
                "trace": self.trace(params, run, 4).value,
            }

        found = jax.vmap(one)(params, runs)
        return found | {"test_accuracy": self.correct(params, self.test)}

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def measure(self, params, run):
        """Where a run ended. Gaps are to test labels as noisy as those of training."""
        train, share = run["data"], run["label_noise"]
        log_odds = jax.nn.log_softmax(self.model_fn(params, self.test[0]))
        losses = -jnp.take_along_axis(log_odds, self.test[1][:, None], axis=1)[:, 0]
        noisy_losses = (1 - share) * losses - share * log_odds.mean(axis=1)
        accuracy = (log_odds.argmax(axis=1) == self.test[1]).mean()
        noisy_accuracy = (1 - share) * accuracy + share / 10
        logits = self.model_fn(params, train[0])
        train_accuracy = (logits.argmax(axis=1) == train[1]).mean()
        train_loss = self.loss_fn(params, train)
        trace = self.trace(params, run, 64)
        return {
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": losses.mean(),
            "test_accuracy": accuracy,
            "loss_gap": noisy_losses.mean() - train_loss,
            "accuracy_gap": train_accuracy - noisy_accuracy,
            "largest_loss": -log_odds.min(),
            "trace": trace.value,
            "trace_error": trace.standard_error,
            "distance": square_distance(params, run["start"]) ** 0.5,
        }

    def max_eigenvalues(self, params, problems):
        """The largest eigenvalue of each network's Hessian, one after the other."""
        networks = jax.tree.map(np.asarray, (params, problems["data"]))
        return np.array(
            [
                self.max_eigenvalue(*jax.tree.map(operator.itemgetter(i), networks))
                for i in range(len(problems["seed"]))
            ]
        )

    def max_eigenvalue(self, params, data):
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            return np.nan
        hessian = flatopt.curvature.hessian(self.loss_fn, params, data)
        found = flatopt.curvature.eigenpairs(hessian, jax.random.key(0), rtol=1e-2)
        return found.values[0]

    def choose(self, piece, stage, shares, name, method, equal_epochs=False):
        """Choose a setting on validation data for each share of label noise, and train."""
        label = f"{stage}, {name}, equal {'epochs' if equal_epochs else 'gradients'}"
        cost = piece(f"{name}, cost", lambda: self.gradients_a_step(method))
        num_steps = self.num_steps if equal_epochs else int(self.num_steps / cost)
        tuned = {
            str(share): piece(
                f"{label}, tuning at noise {share}",
                functools.partial(self.tune, method, num_steps, share),
            )
            for share in shares
        }
        settings = {
            share: self.settings(method)[int(np.argmax(scores))]
            for share, scores in tuned.items()
        }
        found = self.finish(piece, label, method, settings, num_steps)
        return {"gradients_a_step": cost, "validation": tuned} | found

    def finish(self, piece, label, method, settings, num_steps):
        """Train all seeds with the settings of each share of label noise."""
        train = functools.partial(self.train, method, settings, num_steps)
        found = piece(f"{label}, final", train)
        summary = {share: summarize(runs) for share, runs in found["runs"].items()}
        return {
            "num_steps": num_steps,
            "settings": settings,
            "summary": summary,
        } | found


def summarize(runs):
    """Means and errors of what was measured in the end, and how many runs went wrong."""
    names = [name for name in runs if not name.endswith("curve")]
    return columns_of(runs, names) | {
        "diverged": int(np.sum(~np.isfinite(runs["train_loss"]))),
        "stuck": int(np.sum(np.less(runs["test_accuracy"], 0.2))),
    }


def noise_key(run):
    return jax.random.fold_in(jax.random.key(run["seed"]), 1)


def square_distance(tree, other):
    return optax.tree.norm(optax.tree.sub(tree, other), squared=True)


def shift(key, images):
    """Each image moved by up to a pixel in both directions, zeros moved in."""
    padded = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    offsets = jax.random.randint(key, (len(images), 2), 0, 3)
    moved = jax.vmap(lambda i, o: jax.lax.dynamic_slice(i, o, (8, 8)))(padded, offsets)
    return moved.reshape(images.shape)
