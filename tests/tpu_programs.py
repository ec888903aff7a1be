"""What a TPU's compiler makes of training steps, without a TPU: ``make test-tpu``.

Seven small programs for a v5e. Needs Python 3.12 and jax[tpu]; `make test` leaves it out.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt
from benchmarks import accelerators, contenders, hlo, planning
from benchmarks.collectives import count_collectives
from benchmarks.large import Decoder
from benchmarks.problems import Problem
from flatopt import kernels

TOPOLOGY = accelerators.find_topology("tpu")
ON_THE_HOST = ("callback", " send(", " recv(", " outfeed(", " infeed(")


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _problem(name, value_fn, arrays):
    params, batch = jax.eval_shape(arrays)
    return Problem(name, value_fn, params, batch)


@functools.cache
def _decoder():
    """Activations take many times the memory of parameters, as in training they do."""
    model = Decoder(6, 128, 2, 256, 256)

    def arrays():
        tokens = jnp.zeros((64, model.length), jnp.int32)
        return model.init(jax.random.key(0)), {"inputs": tokens, "labels": tokens}

    return _problem("decoder", model.value_fn, arrays)


def _dense_value(params, inputs, labels):
    return jnp.mean((jnp.tanh(inputs @ params["w"]) - labels) ** 2)


def _dense(width):
    def arrays():
        rows = jnp.zeros((64, width))
        return {"w": jnp.zeros((width, width))}, {"inputs": rows, "labels": rows}

    return _problem("dense", _dense_value, arrays)


@functools.cache
def _compiled(name):
    if name == "dense, signs":
        make, problem = contenders.lpf("signs", "auto"), _dense(8192)
    elif name == "decoder, pair":
        make, problem = contenders.nso(kernels.signs), _decoder()
    elif name == "decoder, SAM":
        make, problem = contenders.sam, _decoder()
    else:
        make, problem = contenders.plain, _decoder()
    return problem, accelerators.compile_step(problem, make, TOPOLOGY)


TWO_PASSES = ["decoder, pair", "decoder, SAM"]


@pytest.mark.parametrize("name", TWO_PASSES)
def test_two_passes_hold_the_activations_of_one(name):
    _, plain = _compiled("decoder, plain")
    problem, compiled = _compiled(name)
    sizes = [x.memory_analysis().temp_size_in_bytes for x in (plain, compiled)]
    assert sizes[0] > 10 * _bytes(problem.params)
    assert sizes[1] <= 1.2 * sizes[0]


@pytest.mark.parametrize("name", TWO_PASSES)
def test_two_passes_write_no_zeros_for_their_activations(name):
    """Stacked activations begin as memory that nothing wrote, as in a plain step."""
    counts = [
        _compiled(n)[1].as_text().count('"AllocateBuffer"')
        for n in ("decoder, plain", name)
    ]
    assert counts[0] > 0
    assert counts[1] >= counts[0]


@pytest.mark.parametrize("name", TWO_PASSES)
def test_two_passes_take_the_cycles_of_two(name):
    cycles = [
        hlo.Program(_compiled(n)[1].as_text()).cycles()
        for n in ("decoder, plain", name)
    ]
    assert cycles[1] <= 2.1 * cycles[0]


def test_signs_are_never_stored_at_the_size_of_the_parameters():
    """A step holds perturbed parameters and the sum of gradients; stored noise is a third."""
    problem, compiled = _compiled("dense, signs")
    size = compiled.memory_analysis().temp_size_in_bytes
    assert size <= 2.1 * _bytes(problem.params)


@pytest.mark.parametrize("name", ["dense, signs", *TWO_PASSES])
def test_parameters_and_state_are_written_in_place_and_the_host_is_not_asked(name):
    problem, compiled = _compiled(name)
    donated = 2 * _bytes(problem.params)  # and the momentum
    assert compiled.memory_analysis().alias_size_in_bytes >= donated
    text = compiled.as_text()
    assert not [word for word in ON_THE_HOST if word in text]


def test_one_gradient_is_reduced_under_shard_map():
    problem = _dense(512)
    mesh = accelerators.make_mesh(TOPOLOGY, "data")
    f = flatopt.smooth_value_and_grad(
        problem.value_fn, 0.1, num_samples=8, axis_name="data", strategy="scan"
    )
    mapped = jax.shard_map(
        lambda key, params, batch: f(key, params, **batch),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = accelerators.place((key, problem.params), whole)
    batch = accelerators.place(problem.batch, rows)
    text = jax.jit(mapped).lower(*arguments, batch).compile().as_text()
    found = count_collectives(text)
    assert set(found) == {"all-reduce of 4"}
    gradient = _bytes(problem.params)
    assert (
        gradient <= sum(found["all-reduce of 4"]["bytes"].values()) <= 1.01 * gradient
    )


@pytest.mark.parametrize("in_two_steps", [True, False])
def test_a_gradient_over_a_grid_of_chips_is_scattered_in_two_steps_alone(in_two_steps):
    setup = planning.SETUPS["7B"]
    devices = planning.find_devices("tpu", setup)
    mesh = planning.PLANS["AdamW"].mesh(devices)
    own = planning.reduced_in_two_steps if in_two_steps else lambda weight: weight
    rows, width = 8 * setup.num_chips, 4096
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((width, width), jnp.float32)
    place = NamedSharding(mesh, P(planning.CHIPS))
    x, w = accelerators.place((x, w), place)

    def loss_fn(w, x):
        return jnp.mean(jnp.square(x @ own(w)))

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss_fn), out_shardings=place)
        found = count_collectives(gradient.lower(w, x).compile().as_text())
    whole = 4 * width**2
    if in_two_steps:
        # The compiler may pad the first step.
        size = found["reduce-scatter of 16"]["bytes"]["f32"]
        assert whole * 17 / 16 <= size <= 1.1 * whole * 17 / 16
        assert not [name for name in found if name.startswith("all-reduce")]
    else:
        assert found["all-reduce of 256"]["bytes"]["f32"] == whole
