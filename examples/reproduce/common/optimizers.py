"""Momentum and AdamW as optax runs them: training, sharpness, escapes from a minimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import stability

from . import square_loss

BETA = 0.9

OPTIMIZERS = {
    "SGD": optax.sgd,
    "heavy ball": functools.partial(optax.sgd, momentum=BETA),
    "Nesterov": functools.partial(optax.sgd, momentum=BETA, nesterov=True),
    "AdamW": optax.adamw,
}

# Largest eigenvalue times learning rate at which each stays on all data in one batch;
# Cohen et al., 2021 and 2022, arXiv 2103.00065 and 2207.14484.
LIMITS = {
    "SGD": 2.0,
    "heavy ball": 2 * (1 + BETA),
    "Nesterov": 2 * (1 + BETA) / (1 + 2 * BETA),
    "AdamW": 2 * (1 + BETA) / (1 - BETA),
}


def step(model_fn, make, batch_size, rate, carry, key, inputs, targets):
    """A step of an optax optimizer on a random batch."""
    params, state = carry
    chosen = square_loss.draw_batch(key, len(inputs), batch_size, False)
    loss_fn = functools.partial(square_loss.square_loss, model_fn)
    grads = jax.grad(loss_fn)(params, inputs[chosen], targets[chosen])
    updates, state = make(rate).update(grads, state, params)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train(model_fn, make, batch_size, stops, params, keys, rates, data):
    """Runs side by side: parameters, states and losses at each stop, (runs, stops)."""

    def run(params, key, rate, data):
        def body(index, carry):
            now = rate * jnp.minimum(1, (index + 1) / (stops[-1] // 4))
            own = jax.random.fold_in(key, index)
            return step(model_fn, make, batch_size, now, carry, own, *data)

        def segment(carry, ends):
            carry = jax.lax.fori_loop(*ends, body, carry)
            loss = square_loss.square_loss(model_fn, carry[0], *data)
            return carry, (*carry, loss)

        ends = jnp.array([0, *stops[:-1]]), jnp.array(stops)
        return jax.lax.scan(segment, (params, make(rate).init(params)), ends)[1]

    return jax.vmap(run)(params, keys, rates, data)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sharpness(model_fn, make, params, state, rate, factors, data):
    """The critical sharpness of the next step, and the largest eigenvalue, on all data.

    The eigenvalue is that of the Hessian times ``factors``, the optimizer's preconditioner.
    """

    def loss_fn(params):
        return square_loss.square_loss(model_fn, params, *data)

    grads = jax.grad(loss_fn)(params)
    updates, _ = make(rate).update(grads, state, params)
    found = stability.critical_learning_rate(
        loss_fn, params, updates, learning_rate=rate
    )
    roots = jax.tree.map(jnp.sqrt, factors)

    def power(_, carry):
        _, vector = carry
        norm = optax.tree.norm(vector)
        vector = jax.tree.map(lambda r, v: r * v / norm, roots, vector)
        _, product = jax.jvp(jax.grad(loss_fn), (params,), (vector,))
        value = optax.tree.vdot(vector, product)
        return value, jax.tree.map(jnp.multiply, roots, product)

    start = jax.tree.map(jnp.multiply, roots, grads)
    value, _ = jax.lax.fori_loop(0, 40, power, (jnp.float32(0), start))
    return found.sharpness, value


def factors_of(name, state, params):
    """The preconditioner of an optimizer's state: ones but for AdamW."""
    if name == "AdamW":
        return stability.preconditioner(optax.adamw, state, params)
    return optax.tree.ones_like(params)


def at(task, optimizer, batch_size, params, state, data):
    """The linearization that an optimizer sees, and its exact threshold."""
    is_adaptive = optimizer == "AdamW"
    factors = factors_of(optimizer, state, params) if is_adaptive else None
    lin = stability.linearize(
        task.model_fn, params, *data, preconditioner=factors, progress=False
    )
    limits = stability.thresholds(
        lin,
        batch_size,
        optimizer=OPTIMIZERS[optimizer],
        opt_state=state,
        progress=False,
    )
    return lin, limits.mean_square


def follow(task, optimizer, batch_size, rate, points, data):
    """Sharpness at each point of a run, and the thresholds where it ended."""
    make, (_, targets) = OPTIMIZERS[optimizer], data
    *carries, losses = points
    constant = float(jnp.sum((targets - targets.mean(0)) ** 2) / (2 * len(targets)))
    end = square_loss.outcome(float(losses[-1]), constant)
    row = {"outcome": end, "loss": losses, "critical": [], "max_eigenvalue": []}
    if not np.isfinite(losses).all():
        return row
    for index in range(len(losses)):
        params, state = jax.tree.map(lambda x, i=index: x[i], carries)
        factors = factors_of(optimizer, state, params)
        found = sharpness(task.model_fn, make, params, state, rate, factors, data)
        for name, value in zip(("critical", "max_eigenvalue"), found, strict=True):
            row[name].append(float(value))
    lin, limit = at(task, optimizer, batch_size, params, state, data)
    return row | {
        "over_limit": float(lin.eigenvalues[0]) * rate / LIMITS[optimizer],
        "over_exact": rate / limit,
    }


def minimum(config, task, seed):
    """A minimum that gradient descent fits."""
    params, data = task.init(seed), task.data(seed)
    start = stability.linearize(task.model_fn, params, *data, progress=False)
    rate = 0.1 / start.eigenvalues[0]
    return square_loss.fit(config.fit_steps, config.momentum, params, rate, *data)


def rested(config, task, optimizer, seed, params):
    """The state of an optimizer at rest; AdamW with the second moments of a run."""
    make = OPTIMIZERS[optimizer]
    state = make(1.0).init(params)
    if optimizer != "AdamW":
        return state
    stops, start = (config.gather_steps // 2, config.gather_steps), task.init(seed)
    own = start, jax.random.key(2000 + seed), jnp.float32(1e-3), task.data(seed)
    own = jax.tree.map(lambda x: x[None], own)
    state = jax.tree.map(
        lambda x: x[0, -1], train(task.model_fn, make, 1, stops, *own)[1]
    )
    return optax.tree.set(state, mu=optax.tree.zeros_like(params))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def leave(
    model_fn, make, batch_size, num_steps, num_runs, start, spread, key, rate, data
):
    """Losses of runs of the real optimizer from displaced parameters, (runs, steps + 1)."""
    params, state = start

    def run(key):
        start_key, key = jax.random.split(key)
        noise = optax.tree.random_like(start_key, params, jax.random.normal)
        moved = jax.tree.map(lambda p, s, z: p + s * z, params, spread, noise)

        def body(carry, key):
            loss = square_loss.square_loss(model_fn, carry[0], *data)
            return step(model_fn, make, batch_size, rate, carry, key, *data), loss

        keys = jax.random.split(key, num_steps + 1)
        return jax.lax.scan(body, (moved, state), keys)[1]

    return jax.lax.map(run, jax.random.split(key, num_runs), batch_size=32)


def seen(losses, exact):
    """Growth a step of the mean and of the median, and the share that leaves.

    Taken while the exact mean grows from 10 to 1000 times its start, or over the second
    half where it does not grow so far. A run has left once it is at 1000 times.
    """
    first, last = (np.flatnonzero(exact >= factor)[:1] for factor in (10, 1000))
    if len(last):
        first, last = int(first[0]), int(last[0])
    else:
        first, last = len(exact) // 2, len(exact) - 1

    def growth(curve):
        with np.errstate(all="ignore"):
            return float((curve[last] / curve[first]) ** (1 / (last - first)))

    return {
        "mean": growth(losses.mean(axis=0)),
        "median": growth(np.median(losses, axis=0)),
        "left": float(np.mean(~(losses.max(axis=1) <= 1000))),
    }
