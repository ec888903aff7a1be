"""Networks that learn a second task, and what they keep of the first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import curvature

from . import after, side_by_side
from .data import split_digits
from .frontiers import Levels, area
from .methods import TUNING_SEED

LEVELS = Levels(np.linspace(0.5, 1, 101), learned=0.85, tolerance=0.005)


def turned(images, quarters=1):
    """Digits turned by quarters of a circle."""
    square = images.reshape(*images.shape[:-1], 8, 8)
    return jnp.rot90(square, quarters, axes=(-2, -1)).reshape(images.shape)


class Training(after.Training):
    """Networks side by side that learn upright digits, then turned ones."""

    def _problem(self, seed, label_noise):
        config = self.config
        count = config.train_images
        images, labels = split_digits(seed, count + config.new_images)["train"]
        new = np.asarray(turned(images[count:])), labels[count:]
        return super()._problem(seed, label_noise) | {"new": new}

    @functools.partial(jax.jit, static_argnums=0)
    def again(self, params, runs, split):
        """Accuracies on both tasks along plain SGD on the second, for every rate.

        Returns:
          Old and new accuracies, shape (runs, rates, points).
        """
        config = self.config
        images, labels = split
        both = split, (turned(images), labels)
        length = config.new_steps // config.points

        def of_rate(params, run, rate):
            def body(index, carry):
                key = jax.random.fold_in(side_by_side.noise_key(run), index)
                size = min(config.batch_size, config.new_images)
                chosen = jax.random.choice(
                    key, config.new_images, (size,), replace=False
                )
                batch = jax.tree.map(lambda x: x[chosen], run["new"])
                params, state = carry
                grads = jax.grad(self.loss_fn)(params, batch)
                updates, state = tx.update(grads, state)
                return optax.apply_updates(params, updates), state

            def part(carry, index):
                first = index * length
                carry = jax.lax.fori_loop(first, first + length, body, carry)
                return carry, [self.accuracy(carry[0], batch) for batch in both]

            schedule = optax.cosine_decay_schedule(1.0, config.new_steps)
            tx = optax.sgd(lambda count: rate * schedule(count), momentum=0.9)
            carry = params, tx.init(params)
            return jax.lax.scan(part, carry, jnp.arange(config.points))[1]

        rates = jnp.array(config.new_rates)
        of_run = jax.vmap(of_rate, in_axes=(None, None, 0))
        return jax.vmap(of_run, in_axes=(0, 0, None))(params, runs, rates)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def relative_sharpness(self, params, run):
        """Curvature of the first loss along the gradient of the second."""
        grads = jax.grad(self.loss_fn)(params, run["new"])
        hessian = curvature.hessian(self.loss_fn, params, run["data"])
        return hessian.quadratic_form(grads) / optax.tree.norm(grads, squared=True)

    def tune_again(self, method, num_steps):
        """What every setting keeps on validation images, a mean over tuning seeds."""
        settings = self.settings(method)
        seeds = range(TUNING_SEED, TUNING_SEED + self.config.tuning_seeds)
        chosen = [(setting, seed) for setting in settings for seed in seeds]
        params = self.networks(method, chosen, num_steps)
        before = self.correct(params, self.validation)
        curves = self.again(params, self.runs_of(chosen), self.validation)
        points = zip(*map(np.asarray, curves), strict=True)
        areas = [area(*curve, LEVELS.curve) for curve in points]
        return {
            name: np.reshape(column, (len(settings), -1)).mean(axis=1)
            for name, column in (("before", before), ("area", areas))
        }

    def finish_again(self, method, num_steps, places):
        """What final runs of some settings keep on test images, by place and seed."""
        settings = self.settings(method)
        seeds = range(1, 1 + self.config.seeds)
        chosen = [(settings[place], seed) for place in places for seed in seeds]
        params, runs = self.networks(method, chosen, num_steps), self.runs_of(chosen)
        old, new = self.again(params, runs, self.test)
        found = {
            "before": self.correct(params, self.test),
            "sharpness": self.relative_sharpness(params, runs),
            "old": old,
            "new": new,
        }
        return {
            place: {
                name: np.reshape(x, (len(places), -1, *x.shape[1:]))[index]
                for name, x in found.items()
            }
            for index, place in enumerate(places)
        }
