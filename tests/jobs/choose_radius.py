"""Job 10: a radius from how fast the loss rises, then training with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt

SIGMAS = (0.01, 0.03, 0.1, 0.3)
BEARABLE = 0.1  # rise of the loss


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def main():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(64, 4)).astype("f4")
    batch = {"x": inputs, "y": inputs.sum(axis=-1)}
    params = jnp.ones(4)
    found = flatopt.radius(
        loss_fn, params, jax.random.key(0), radii=SIGMAS, data=batch, num_samples=32
    )
    rises = dict(zip(SIGMAS, map(float, found.rise.value), strict=True))
    chosen = max(sigma for sigma, rise in rises.items() if rise < BEARABLE)
    tx = flatopt.nso_sgd(0.05, sigma=chosen)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    start = params = jnp.zeros(4)
    state = tx.init(params)
    for _ in range(20):
        params, state = step(params, state)
    return {
        "rises": rises,
        "second moments": (inputs**2).sum(axis=1).mean(),
        "chosen": chosen,
        "scale": float(flatopt.metrics(state)["scale"]),
        "start": float(loss_fn(start, batch)),
        "end": float(loss_fn(params, batch)),
    }


if __name__ == "__main__":
    print(main())
