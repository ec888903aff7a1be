"""One of several processes that train together; ``test_processes.py`` starts them.

Each process holds its own part of the batch, as a data loader would, and saves what it
sees of the trained parameters.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt

NUM_STEPS = 3
NUM_EXAMPLES = 64
RECIPES = {
    "lpf": lambda: flatopt.lpf_sgd(0.1, 0.1, num_samples=4),
    "nso": lambda: flatopt.nso_sgd(0.1, sigma=0.1),
    "sam": lambda: flatopt.sam_sgd(0.1, rho=0.2),
}
LAYOUTS = {
    "data parallel": (P(), AxisType.Auto, ["lpf", "nso"]),
    "FSDP": (P("data"), AxisType.Auto, ["lpf", "nso", "sam"]),
    "FSDP, Explicit": (P("data"), AxisType.Explicit, ["lpf"]),
}
RUNS = [
    (recipe, name) for name, (_, _, recipes) in LAYOUTS.items() for recipe in recipes
]


def problem():
    """Parameters whose leading axes divide by eight, and a batch, in NumPy."""
    rng = np.random.default_rng(3)
    shapes = {"first": (8, 16), "second": (16, 8), "bias": (8,)}
    params = {k: rng.normal(size=s).astype("f4") / 3 for k, s in shapes.items()}
    inputs = rng.normal(size=(NUM_EXAMPLES, 8)).astype("f4")
    targets = rng.normal(size=(NUM_EXAMPLES, 8)).astype("f4")
    return params, {"inputs": inputs, "targets": targets}


def loss_fn(params, batch):
    """Weights are gathered where they are used, as FSDP does."""
    params = jax.tree.map(_gathered, params)
    hidden = jnp.tanh(batch["inputs"] @ params["first"])
    outputs = hidden @ params["second"] + params["bias"][None]
    return jnp.mean((outputs - batch["targets"]) ** 2)


def _gathered(leaf):
    explicit = AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types
    return jax.sharding.reshard(leaf, P()) if explicit else leaf


def train(tx, params, batch):
    """The parameters after a few steps."""

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(
            optax.tree.zeros_like(params), state, params, value_fn=loss_fn, batch=batch
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(NUM_STEPS):
        params, state = step(params, state, batch)
    return params


def train_spread(params, batch, mesh):
    """One gradient for which each device draws its own noise."""
    f = flatopt.smooth_value_and_grad(loss_fn, 0.1, num_samples=2, axis_name="data")
    mapped = jax.shard_map(
        lambda params, batch: f(jax.random.key(5), params, batch)[1],
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    return jax.jit(mapped)(params, batch)


def results(make_array):
    """Whatever is trained here, by name; ``make_array(value, sharding, is_batch)``."""
    params, batch = problem()
    trained = {}
    for layout, (spec, axis_type, recipes) in LAYOUTS.items():
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(axis_type,))
        kept = NamedSharding(mesh, spec)
        split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        with jax.set_mesh(mesh):
            placed = {k: make_array(x, kept, False) for k, x in params.items()}
            parts = {k: make_array(x, split, True) for k, x in batch.items()}
            trees = {
                f"{r}, {layout}": train(RECIPES[r](), placed, parts) for r in recipes
            }
            if spec == P():
                trees["spread draws"] = train_spread(placed, parts, mesh)
            for name, tree in trees.items():
                for leaf, x in tree.items():
                    trained[f"{name}: {leaf}"] = jax.device_put(x, whole)
    return {name: np.asarray(x.addressable_data(0)) for name, x in trained.items()}


def _local_part(value, sharding, is_batch):
    if not is_batch:
        return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])
    rows = value.reshape(jax.process_count(), -1, *value.shape[1:])
    part = rows[jax.process_index()]
    return jax.make_array_from_process_local_data(sharding, part, value.shape)


def main(port, process, num_processes, path):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(num_processes), int(process))
    assert jax.process_count() == int(num_processes)
    assert jax.local_device_count() < jax.device_count() == 8
    np.savez(path, **results(_local_part))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
