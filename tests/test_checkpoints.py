"""Checkpoints: Orbax, Flax and NumPy, a killed process, other meshes."""

import functools
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training import train_state
from helpers import (
    TRANSFORMATIONS,
    assert_close,
    environment,
    leaves_array,
    loss_fn,
    optimizer,
    regression,
    transformation,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt
import flatopt.flax

WORKER = pathlib.Path(__file__).parent / "checkpoint_worker.py"
BEFORE, AFTER = 3, 3


def _accumulating():
    inner = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2)
    growth = flatopt.schedules.cosine_growth(0.1, 3.0, 6)
    link = flatopt.smooth_gradients(growth, key=jax.random.key(1, impl="rbg"))
    return optax.chain(link, inner.gradient_transformation())


def _injected():
    link = optax.inject_hyperparams(flatopt.smooth_gradients)(scale=0.1)
    return optax.chain(link, optax.sgd(0.1, momentum=0.9), flatopt.anti_pgd(0.1))


def _directed():
    link = flatopt.sam_gradients(0.1, optax.scale_by_adam())
    return optax.chain(link, optax.sgd(0.1, momentum=0.9))


def _watched():
    link = transformation("track_stability")
    return optax.chain(link, flatopt.skip_nonfinite(flatopt.lpf_sgd(0.1, 0.1)))


CHAINS = {
    name: functools.partial(optimizer, name, rate=0.1)
    for name, row in TRANSFORMATIONS.items()
    if row.is_resumed
} | {
    "track_stability": _watched,
    "inject_hyperparams": _injected,
    "a direction": _directed,
    "accumulation": _accumulating,
    "bfloat16": lambda: optimizer("friendly_sam_gradients", rate=0.1),
}
"""Every kind of state; LookSAM resumes on a step that reuses its kept direction."""


def _problem(name):
    return regression(dtype=jnp.bfloat16 if name == "bfloat16" else jnp.float32)


@functools.cache
def _step(name):
    tx, batch = CHAINS[name](), _problem(name)[1]

    def step(params, state):
        zeros = optax.tree.zeros_like(params)
        updates, state = tx.update(zeros, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def _run(name, params, state, num_steps):
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps mixes dtypes
        for _ in range(num_steps):
            params, state = _step(name)(params, state)
    return {"params": params, "state": state}


def _start(name):
    params = _problem(name)[0]
    carry = {"params": params, "state": CHAINS[name]().init(params)}
    # On a device for good, as restored arrays are: then jit compiles once for both.
    return jax.device_put(carry, jax.devices()[0])


@pytest.fixture(scope="module")
def runs():
    """What each chain holds after the first steps, and after all of them."""
    saved = {name: _run(name, **_start(name), num_steps=BEFORE) for name in CHAINS}
    final = {name: _run(name, **saved[name], num_steps=AFTER) for name in CHAINS}
    return saved, final


def _orbax(tree, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "checkpoint", like)


def _orbax_manager(tree, like, folder):
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder / "run", options=options) as manager:
        wrong = jax.tree.map(jnp.zeros_like, tree)
        for step, value in enumerate([wrong, wrong, tree]):
            manager.save(step, args=ocp.args.StandardSave(value))
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
        latest = manager.latest_step()
        return manager.restore(latest, args=ocp.args.StandardRestore(like))


def _msgpack(tree, like, folder):
    (folder / "checkpoint").write_bytes(serialization.to_bytes(tree))
    target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    return serialization.from_bytes(target, (folder / "checkpoint").read_bytes())


def _npz(tree, like, folder):
    named = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in named}
    np.savez(folder / "checkpoint.npz", **arrays)
    loaded = np.load(folder / "checkpoint.npz")

    def leaf(path, like):
        # NumPy has no bfloat16 and hands back bytes.
        return loaded[jax.tree_util.keystr(path)].view(like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, like)


@functools.cache
def _shapes():
    return jax.eval_shape(lambda: {name: _start(name) for name in CHAINS})


@pytest.mark.parametrize("store", [_orbax, _orbax_manager, _msgpack, _npz])
def test_every_state_continues_bit_equal_from_a_file(store, runs, tmp_path):
    saved, final = runs
    restored = jax.device_put(store(saved, _shapes(), tmp_path), jax.devices()[0])
    for name in CHAINS:
        continued = _run(name, **restored[name], num_steps=AFTER)
        assert_close(continued, final[name], rtol=0, atol=0)


@pytest.mark.heart
@pytest.mark.parametrize("name", CHAINS)
def test_parameters_alone_do_not_continue_the_run(name, runs):
    saved, final = runs
    fresh = {**saved[name], "state": _start(name)["state"]}
    continued = _run(name, **fresh, num_steps=AFTER)
    difference = leaves_array(continued["params"]) - leaves_array(final[name]["params"])
    assert np.abs(difference).max() > 1e-4


@pytest.mark.heart
def test_states_hold_numbers_only(runs):
    for leaf in jax.tree.leaves(runs[0]):
        assert isinstance(leaf, jax.Array)
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


# Flax


class Network(nnx.Module):
    """BatchNorm and dropout: statistics, typed keys and counters are state too."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, inputs):
        hidden = self.norm(self.dense(inputs))
        return self.head(self.dropout(nnx.relu(hidden)))


def _model_loss(model, batch):
    return jnp.mean((model(batch["inputs"]) - batch["targets"]) ** 2)


def _new_nnx():
    model = Network(nnx.Rngs(0))
    tx = optimizer("friendly_sam_gradients", rate=0.1)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def _nnx_step(model, optimizer, batch):
    return flatopt.flax.update(optimizer, model, _model_loss, batch=batch)


def test_an_nnx_model_and_optimizer_continue_bit_equal_from_orbax(tmp_path):
    batch = regression()[1]

    def train(model, optimizer):
        return [_nnx_step(model, optimizer, batch) for _ in range(2)]

    graphdef, start = nnx.split(_new_nnx())
    unbroken = nnx.merge(graphdef, jax.device_put(start, jax.devices()[0]))
    train(*unbroken)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", nnx.state(unbroken))
    losses = train(*unbroken)

    graphdef, like = nnx.split(nnx.eval_shape(_new_nnx))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "checkpoint", like)
    resumed = nnx.merge(graphdef, state)
    assert train(*resumed) == losses
    for x, y in zip(
        jax.tree.leaves(nnx.state(resumed)),
        jax.tree.leaves(nnx.state(unbroken)),
        strict=True,
    ):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def test_a_linen_train_state_continues_bit_equal_from_orbax(tmp_path, runs):
    saved, final = runs
    name = "look_sam_gradients"

    def create(params, state):
        return train_state.TrainState(
            step=BEFORE, apply_fn=loss_fn, params=params, tx=None, opt_state=state
        )

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", create(**saved[name]))
        checkpointer.wait_until_finished()
        like = create(**_shapes()[name])
        restored = checkpointer.restore(tmp_path / "checkpoint", like)
    assert restored.step == BEFORE
    continued = _run(name, restored.params, restored.opt_state, AFTER)
    assert_close(continued, final[name], rtol=0, atol=0)


# A killed process


def _launch(*arguments):
    return subprocess.Popen(
        [sys.executable, WORKER, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(1),
    )


@pytest.mark.program
def test_a_killed_process_resumes_bit_equal(tmp_path):
    folder = tmp_path / "killed"
    with _launch(folder, tmp_path / "killed.npz", 16) as killed:
        lines = [killed.stdout.readline() for _ in range(2)]
        killed.kill()  # while the checkpoint of step 16 is being written
    assert lines == ["start 0\n", "paused\n"]
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed.npz").exists()

    with (
        _launch(folder, tmp_path / "killed.npz") as resumed,
        _launch(tmp_path / "unbroken", tmp_path / "unbroken.npz") as unbroken,
    ):
        assert resumed.communicate()[0] in ("start 12\n", "start 16\n")
        assert unbroken.communicate()[0] == "start 0\n"
    assert resumed.returncode == unbroken.returncode == 0
    result, expected = (
        dict(np.load(tmp_path / f"{name}.npz")) for name in ("killed", "unbroken")
    )
    assert len(expected) == 18
    assert sorted(result) == sorted(expected)
    for name in expected:
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)


# Other meshes

MESHES = {
    "one device": ((1,), ("x",), P()),
    "eight": ((8,), ("x",), P(None, "x")),
    "two by four": ((2, 4), ("x", "y"), P("x", "y")),
}
LINKS = {
    "smooth_gradients": {
        "kernel": flatopt.kernels.filterwise(),
        "num_samples": 2,
        "batch_argnames": ("batch",),
    },
    "friendly_sam_gradients": {},
}


def _wide_loss(params, batch):
    hidden = jnp.tanh(batch @ params["first"])
    return jnp.mean((hidden @ params["second"] - batch) ** 2)


def _wide_problem():
    keys = jax.random.split(jax.random.key(2), 3)
    params = {
        "first": jax.random.normal(keys[0], (8, 16)) / 3,
        "second": jax.random.normal(keys[1], (16, 8)) / 4,
    }
    return params, jax.random.normal(keys[2], (32, 8))


def _mesh(name):
    shape, names, spec = MESHES[name]
    return jax.make_mesh(shape, names, (AxisType.Auto,) * len(names)), spec


@functools.cache
def _chain(link):
    last = transformation(link, **LINKS[link]), optax.sgd(0.2, 0.9)
    if link == "friendly_sam_gradients":
        return optax.chain(flatopt.track_stability(0.1, 32, every=2), *last)
    return optax.chain(*last)


def _like(link, mesh, spec):
    """Shapes, dtypes and shardings of parameters and state."""
    params = jax.eval_shape(lambda: _wide_problem()[0])

    def place(x, spec):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    state = optax.tree.map_params(
        _chain(link),
        lambda x: place(x, spec),
        jax.eval_shape(_chain(link).init, params),
        transform_non_params=lambda x: place(x, P()),
    )
    return {"params": jax.tree.map(lambda x: place(x, spec), params), "state": state}


@functools.cache
def _wide_step(link):
    def step(carry, batch):
        params, state = carry["params"], carry["state"]
        updates, state = _chain(link).update(
            None, state, params, value_fn=_wide_loss, batch=batch
        )
        return {"params": optax.apply_updates(params, updates), "state": state}

    return jax.jit(step)


def _train_on(link, mesh, carry, num_steps):
    batch = jax.device_put(_wide_problem()[1], NamedSharding(mesh, P("x")))
    for _ in range(num_steps):
        carry = _wide_step(link)(carry, batch)
    return carry


@functools.cache
def _first_steps(link, mesh_name):
    mesh, spec = _mesh(mesh_name)
    params, _ = _wide_problem()
    carry = {"params": params, "state": _chain(link).init(params)}
    shardings = jax.tree.map(lambda x: x.sharding, _like(link, mesh, spec))
    return _train_on(link, mesh, jax.device_put(carry, shardings), BEFORE)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("one device", "eight"),
        ("two by four", "eight"),
        ("two by four", "one device"),
    ],
)
def test_a_run_continues_on_another_mesh(source, target, link, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", _first_steps(link, source))

    mesh, spec = _mesh(target)
    like = _like(link, mesh, spec)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", like)
    for leaf, expected in zip(
        jax.tree.leaves(restored), jax.tree.leaves(like), strict=True
    ):
        assert leaf.sharding == expected.sharding
    is_friendly = link == "friendly_sam_gradients"
    for name in ("direction", "memory") if is_friendly else ("trace",):
        tree = optax.tree.get(restored["state"], name, filtering=_is_tree)
        assert tree["first"].sharding.spec == spec
    continued = _train_on(link, mesh, restored, AFTER)

    single, _ = _mesh("one device")
    unbroken = _first_steps(link, "one device")
    unbroken = _train_on(link, single, unbroken, AFTER)
    assert_close(continued, unbroken, rtol=1e-4, atol=1e-5)


def _is_tree(path, value):
    return isinstance(value, dict)
