"""A loop that holds what a perturbation undoes: the radius follows the effect in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt

from . import side_by_side

TARGETS = (0.05, 0.1, 0.2)  # shares of what was learned
EVERY, DRAWS = 10, 4  # steps between measurements, and losses of each
GAIN, LARGEST = 0.5, 0.7
ROOM = 0.5  # of what a guess loses: the largest radius raises the first loss by that


def share_undone(here, there, guess):
    """What the perturbation undoes of what was learned: all of it where nothing was.

    Args:
      here: the loss.
      there: the mean loss under perturbation.
      guess: what a guess loses.
    """
    learned = guess - here
    share = jnp.where(learned > 0, (there - here) / learned, jnp.inf)
    return jnp.where(jnp.isnan(share), jnp.inf, share)


def follow(log_radius, share, target, log_cap):
    """The next logarithm of the radius."""
    pull = jnp.log(target) - jnp.log(jnp.maximum(share, 1e-30))
    moved = log_radius + GAIN * jnp.clip(pull / 2, -LARGEST, LARGEST)
    return jnp.minimum(moved, log_cap)


class Held:
    """Training whose radius is held by the loop, beside `radii.Training`."""

    def share(self, name, params, batch, radius, key, loss_fn=None):
        """The share undone at a radius, on one batch; of another loss where one is given."""
        loss_fn = self.loss_fn if loss_fn is None else loss_fn
        kernel = self.kernels[name]
        if kernel is None:  # SAM: one step along the gradient
            here, gradient = jax.value_and_grad(loss_fn)(params, batch)
            step = radius / jnp.maximum(optax.tree.norm(gradient), 1e-30)
            there = loss_fn(optax.tree.add_scale(params, step, gradient), batch)
        else:

            def moved(key):
                noise = kernel(key, params)
                return loss_fn(optax.tree.add_scale(params, radius, noise), batch)

            here = loss_fn(params, batch)
            there = jax.lax.map(moved, jax.random.split(key, DRAWS)).mean()
        return share_undone(here, there, jnp.log(self.num_classes))

    def gradients_a_measurement(self, name):
        """Gradients of a batch, as flatopt counts those of single examples."""
        size = self.config.batch_size
        problem = self.problem(1, 0.0)
        batch = jax.tree.map(lambda x: jnp.asarray(x[:size]), problem["data"])
        counter = flatopt.GradientCounter(self.loss_fn)
        jax.jit(
            lambda params: self.share(
                name, params, batch, 0.1, jax.random.key(0), counter
            )
        )(problem["start"])
        return counter.count / size

    def hold(self, name, problems, starts, caps, rows=None):
        """Train from each problem's start at every target, and measure.

        Args:
          name: of the method.
          problems: seeds and shares of wrong labels.
          starts: the first radius of each problem.
          caps: the largest.
          rows: radii that stay as they are, (problems, radii).

        Returns:
          A dict of ``(problems, targets and radii)`` arrays: what was measured, the last and
          largest radius, and the median share of the second half of training.
        """
        rows = [()] * len(problems) if rows is None else rows
        config = self.config
        rates = {
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
        }
        chosen = [
            (rates | {"radius": radius, "target": target, "cap": largest}, *problem)
            for problem, start, cap, row in zip(
                problems, starts, caps, rows, strict=True
            )
            for radius, target, largest in (
                *((float(start), target, float(cap)) for target in TARGETS),
                *((float(radius), 0.0, np.inf) for radius in row),
            )
        ]
        runs = self.runs(chosen)
        params, radii, shares = self.held(name, runs)
        late = shares[:, shares.shape[1] // 2 :]
        found = self.measure(params) | {
            "last": radii[:, -1],
            "largest": radii.max(axis=1),
            "share": jnp.median(late, axis=1),
        }
        shape = len(problems), len(TARGETS) + len(rows[0])
        return jax.tree.map(lambda x: jnp.reshape(x, shape), found)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def held(self, name, runs):
        """Parameters after training; radius and share at each measurement."""
        method, steps = self.links[name], self.config.steps

        def one(run):
            inputs, targets = run["data"]
            setting = run["setting"]
            log_cap = jnp.log(setting["cap"])

            def at(index, radius, carry):
                chosen = run["batches"][index]
                own = run | {"setting": setting | {"radius": radius}}
                batch = inputs[chosen], targets[chosen]
                return self.step(method, own, steps, self.loss_fn, carry, batch)

            def block(state, index):
                (carry, log_radius), first = state, EVERY * index
                chosen = run["batches"][first]
                key = jax.random.fold_in(side_by_side.noise_key(run), steps + index)
                batch = inputs[chosen], targets[chosen]
                share = self.share(name, carry[0], batch, jnp.exp(log_radius), key)
                moved = follow(log_radius, share, setting["target"], log_cap)
                moves = (index > 0) & (setting["target"] > 0)
                log_radius = jnp.where(moves, moved, log_radius)
                radius = jnp.exp(log_radius)
                last = jnp.minimum(first + EVERY, steps)
                carry = jax.lax.fori_loop(
                    first, last, lambda i, carry: at(i, radius, carry), carry
                )
                return (carry, log_radius), (radius, share)

            start = run["start"], self.optimizer(method, run, steps).init(run["start"])
            log_start = jnp.minimum(jnp.log(setting["radius"]), log_cap)
            blocks = jnp.arange(-(-steps // EVERY))
            (carry, _), (radii, shares) = jax.lax.scan(
                block, (start, log_start), blocks
            )
            return carry[0], radii, shares

        return jax.vmap(one)(runs)
