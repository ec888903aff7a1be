"""What networks keep when their weights change after training: rounding, noise, pruning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import kernels, sharpness

from . import side_by_side
from .methods import TUNING_SEED, gradients_a_step

BITS = (8, 6, 5, 4, 3, 2)
NOISE = (0.02, 0.05, 0.1, 0.15, 0.2)
PRUNED = (0.3, 0.5, 0.7, 0.8, 0.9)
LEVELS = {"bits": BITS, "noise": NOISE, "pruned": PRUNED}


def are_weights(params):
    """Which leaves are weights: biases and norms stay as they are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and "bias" not in jax.tree_util.keystr(path),
        params,
    )


# Gaussian, of the largest weight of each layer.
WEIGHT_NOISE = kernels.masked(kernels.relative_to_max(()), are_weights)


@dataclasses.dataclass(frozen=True)
class Method(side_by_side.Method):
    """What comes before SGD: ``make(radius, key, num_steps)``; or a mean of its weights."""

    averaged: bool = False
    """Whether the network is a moving average of the weights along training."""


def prune(params, share):
    """This share of the weights of each layer set to zero, the smallest ones."""

    def pruned(is_weight, leaf):
        size = jnp.abs(leaf)
        small = is_weight & (size < jnp.quantile(size, share))
        return jnp.where(small, 0.0, leaf)

    return jax.tree.map(pruned, are_weights(params), params)


def kept(metric_fn, params, batch, num_draws):
    """The metric as trained, after rounding, under noise (a mean of draws), and pruned."""
    noise = sharpness.perturbed_accuracy(
        metric_fn,
        params,
        jax.random.key(0),
        WEIGHT_NOISE,
        NOISE,
        num_samples=num_draws,
        data=batch,
    )
    changed = [params]
    changed += [sharpness.round_filters(params, bits) for bits in BITS]
    changed += [prune(params, share) for share in PRUNED]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *changed)
    found = jax.lax.map(lambda params: metric_fn(params, batch), stacked)
    bits, pruned = jnp.split(found[1:], [len(BITS)])
    return {"float": found[0], "bits": bits, "noise": noise.value, "pruned": pruned}


def average(decay):
    """A link that keeps a moving average of the weights and changes no update."""

    def init_fn(params):
        return {"average": params, "steps": jnp.float32(0)}

    def update_fn(updates, state, params):
        steps = state["steps"]
        now = jnp.minimum(decay, (1 + steps) / (10 + steps))  # forgets the start
        moved = optax.apply_updates(params, updates)
        mean = optax.incremental_update(moved, state["average"], 1 - now)
        return updates, {"average": mean, "steps": steps + 1}

    return optax.GradientTransformation(init_fn, update_fn)


def optimizer(method, run, num_steps):
    """SGD with momentum behind a method's link, at the setting and seed of a run."""
    setting = run["setting"]

    def learning_rate(count):
        shape = (1 + jnp.cos(jnp.pi * count / num_steps)) / 2
        shape = jnp.where(setting.get("constant", 0.0) > 0, 1.0, shape)
        return setting["learning_rate"] * shape

    links = [
        optax.add_decayed_weights(setting["weight_decay"]),
        optax.sgd(learning_rate, momentum=0.9),
    ]
    if method.make is not None:
        key = side_by_side.noise_key(run)
        links.insert(0, method.make(setting["radius"], key, num_steps))
    if method.averaged:
        links.append(average(setting["radius"]))
    return optax.chain(*links)


class Training(side_by_side.Training):
    """Networks side by side, of all settings or seeds, and what they keep."""

    def optimizer(self, method, run, num_steps):
        return optimizer(method, run, num_steps)

    def runs_of(self, chosen):
        return self.runs([(setting, seed, 0.0) for setting, seed in chosen])

    def networks(self, method, chosen, num_steps):
        """Train networks side by side, from ``(setting, seed)`` of each."""
        runs = self.runs_of(chosen)
        carry = self.init(method, runs)
        params, state = self.advance(method, carry, runs, 0, num_steps, num_steps)
        return optax.tree.get(state, "average") if method.averaged else params

    def tune_kept(self, method, num_steps):
        """What every setting keeps on validation images, a mean over tuning seeds."""
        settings = self.settings(method)
        seeds = range(TUNING_SEED, TUNING_SEED + self.config.tuning_seeds)
        chosen = [(setting, seed) for setting in settings for seed in seeds]
        params = self.networks(method, chosen, num_steps)
        found = self.kept(params, self.validation, 8)
        return {"settings": settings} | {
            name: np.reshape(x, (len(settings), -1, *x.shape[1:])).mean(axis=1)
            for name, x in found.items()
        }

    def finish_kept(self, method, num_steps, places):
        """What final runs of some settings keep on test images, by place and seed."""
        settings = self.settings(method)
        seeds = range(1, 1 + self.config.seeds)
        chosen = [(settings[place], seed) for place in places for seed in seeds]
        params = self.networks(method, chosen, num_steps)
        found = self.kept(params, self.test, self.config.draws)
        found["train_loss"] = self.losses(params, self.runs_of(chosen)["data"])
        return {
            place: {
                name: np.reshape(x, (len(places), -1, *x.shape[1:]))[index]
                for name, x in found.items()
            }
            for index, place in enumerate(places)
        }

    def cost(self, method, num_steps=20):
        """Gradients of a batch a step, the mean of a short training."""
        run = self.problem(0, 0.0) | {"setting": method.settings[0]}
        batch = jax.tree.map(lambda x: x[: self.config.batch_size], run["data"])
        carry = run["start"], self.optimizer(method, run, num_steps).init(run["start"])
        step = functools.partial(self.step, method, run, num_steps)
        return gradients_a_step(step, self.loss_fn, carry, batch, num_steps=num_steps)

    def accuracy(self, params, batch):
        images, labels = batch
        return (self.model_fn(params, images).argmax(axis=-1) == labels).mean()

    @functools.partial(jax.jit, static_argnums=(0, 3))
    @functools.partial(jax.vmap, in_axes=(None, 0, None, None))
    def kept(self, params, batch, num_draws):
        return kept(self.accuracy, params, batch, num_draws)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def losses(self, params, batch):
        return self.loss_fn(params, batch)
