"""Job 2: AdamW with warm-up, clipping, accumulation over 4 microbatches and an EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt

NUM_CALLS = 24


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def main():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(NUM_CALLS, 16, 3)).astype("f4")
    targets = inputs.sum(axis=-1) + 1
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.3, 2, NUM_CALLS // 4)
    tx = flatopt.accumulate(
        flatopt.lpf_gradients(1e-3, num_samples=4),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
        num_microbatches=4,
    )
    ema = optax.ema(0.5)

    @jax.jit
    def step(params, state, averages, batch):
        updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=batch)
        params = optax.apply_updates(params, updates)
        average, averages = ema.update(params, averages)
        return params, state, averages, average

    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    state, averages = tx.init(params), ema.init(params)
    whole = {"x": inputs.reshape(-1, 3), "y": targets.reshape(-1)}
    start, moved = float(loss_fn(params, whole)), []
    for x, y in zip(inputs, targets, strict=True):
        before = params
        params, state, averages, average = step(
            params, state, averages, {"x": x, "y": y}
        )
        moved.append(bool((params["w"] != before["w"]).any()))
    return {
        "start": start,
        "end": float(loss_fn(params, whole)),
        "end, averaged": float(loss_fn(average, whole)),
        "moved": moved,
        **{name: float(value) for name, value in flatopt.metrics(state).items()},
    }


if __name__ == "__main__":
    print(main())
