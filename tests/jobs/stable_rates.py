"""Job 9: the largest stable learning rate with momentum, and with AdamW as trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from flatopt import stability


def model_fn(params, inputs):
    return inputs @ params


def loss_fn(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def momentum(rate):
    return optax.sgd(rate, momentum=0.9)


def adamw(rate):
    return optax.adamw(rate, weight_decay=0.0)


def main():
    random = np.random.default_rng(0)
    inputs = jnp.asarray(random.normal(size=(12, 3)), jnp.float32)
    params = jnp.array([1.0, -2.0, 0.5])
    targets = inputs @ params  # a minimum that fits its data
    lin = stability.linearize(
        model_fn, params, inputs, targets, loss_scale=2.0, loss_fn=loss_fn
    )
    rates = {
        "SGD": stability.thresholds(lin, 12).mean_square,
        "momentum": stability.thresholds(lin, 12, optimizer=momentum).mean_square,
    }
    tx = adamw(0.01)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: loss_fn(model_fn(p, inputs), targets))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    moved = params + 0.1
    for _ in range(10):
        moved, state = step(moved, state)
    report = stability.report(
        model_fn,
        params,
        inputs,
        targets,
        0.01,
        12,
        loss_fn=loss_fn,
        optimizer=adamw,
        opt_state=state,
    )
    monitor = flatopt.monitor(
        lambda p, batch: loss_fn(model_fn(p, batch[0]), batch[1]), tx, every=1
    )
    watched = monitor(moved, state, batch=(inputs, targets))
    return {
        "rates": {name: float(rate) for name, rate in rates.items()},
        "gradient descent": float(2 / lin.eigenvalues[0]),
        "report": report.to_dict(),
        "text": str(report),
        "watched": {name: float(value) for name, value in watched.items()},
    }


if __name__ == "__main__":
    print(main())
