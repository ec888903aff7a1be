"""Job 7: a loss in bfloat16, and one in float16 whose gradients are scaled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt

FACTOR = 2.0**12  # gradients below 6e-8 would vanish in float16


def loss_fn(params, batch, dtype):
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (params, batch))
    hidden = jnp.tanh(batch["x"] @ params["first"])
    errors = (hidden @ params["second"] - batch["y"]).astype(jnp.float32)
    return jnp.mean(errors**2)


def unscale(factor):
    """The link that takes a factor out of the gradients, after the one that made them."""
    return optax.scale(1 / factor)


def train(tx, value_fn, params, batch, num_steps=20):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=value_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    state, losses = tx.init(params), []
    for _ in range(num_steps):
        params, state = step(params, state)
        losses.append(float(flatopt.loss(state)))
    return losses


def main():
    random = np.random.default_rng(0)
    params = {
        "first": jnp.asarray(random.normal(size=(8, 16)) / 3, jnp.float32),
        "second": jnp.asarray(random.normal(size=(16, 4)) / 4, jnp.float32),
    }
    inputs = random.normal(size=(32, 8)).astype("f4")
    batch = {"x": jnp.asarray(inputs), "y": jnp.asarray(inputs[:, :4])}
    link, rest = flatopt.nso_gradients(0.01), optax.sgd(0.5)
    narrow = functools.partial(loss_fn, dtype=jnp.bfloat16)
    half = functools.partial(loss_fn, dtype=jnp.float16)
    tx = flatopt.skip_nonfinite(flatopt.chain(link, unscale(FACTOR), rest))
    scaled = train(
        tx, lambda params, batch: FACTOR * half(params, batch), params, batch
    )
    wide = functools.partial(loss_fn, dtype=jnp.float32)
    return {
        "float32": train(flatopt.chain(link, rest), wide, params, batch),
        "bfloat16": train(flatopt.chain(link, rest), narrow, params, batch),
        "float16, scaled": [loss / FACTOR for loss in scaled],
    }


if __name__ == "__main__":
    print(main())
