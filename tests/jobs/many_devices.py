"""Job 6: all devices, with the batch split over them (data parallel) and parameters (FSDP)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"])
    return jnp.mean((hidden @ params["second"] - batch["y"]) ** 2)


def main():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    random = np.random.default_rng(0)
    params = {
        "first": random.normal(size=(8, 16)).astype("f4") / 3,
        "second": random.normal(size=(16, 8)).astype("f4") / 4,
    }
    inputs = random.normal(size=(64, 8)).astype("f4")
    batch = {"x": inputs, "y": inputs[:, ::-1]}
    tx = flatopt.chain(
        flatopt.sam_gradients(0.1), optax.clip_by_global_norm(1.0), optax.adamw(0.05)
    )

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    layouts = {
        "one device": None,
        "data parallel": whole,
        "FSDP": split,
    }
    losses, specs = {}, {}
    for name, placement in layouts.items():
        moved = jax.tree.map(jnp.asarray, params)
        given = batch
        if placement is not None:
            moved, given = jax.device_put((params, batch), (placement, split))
        state = tx.init(moved)
        if placement is not None:
            # Moments lie where the parameters do; counts and keys go to every device, or
            # the second step, which finds them there, compiles anew.
            state = optax.tree.map_params(
                tx,
                lambda moment: moment,
                state,
                transform_non_params=lambda leaf: jax.device_put(leaf, whole),
            )
        for _ in range(5):
            moved, state = step(moved, state, given)
        losses[name] = float(flatopt.loss(state))
        specs[name] = str(getattr(moved["first"].sharding, "spec", None))
    start = float(loss_fn(params, batch))
    return {"start": start, "end": losses, "specs": specs}


if __name__ == "__main__":
    print(main())
