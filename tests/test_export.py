"""Programs for machines that are not here: every transformation lowers for them."""

import jax
import jax.export
import optax
import pytest
from helpers import (
    TRANSFORMATIONS,
    assert_close,
    loss_fn,
    regression,
    run_program_of,
    transformation,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt

ACCELERATORS = ("tpu", "cuda")
MORE = {
    "sam_gradients": {"start_step": 3},
    "smooth_gradients": {
        "kernel": flatopt.kernels.isotropic(flatopt.kernels.signs),
        "num_samples": 2,
    },
}


def _step(tx):
    @jax.jit
    def step(params, state, batch):
        updates = optax.tree.ones_like(params)
        return tx.update(updates, state, params, value_fn=loss_fn, batch=batch)

    return step


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.usefixtures("standard_promotion")
def test_a_step_lowers_for_accelerators_that_are_not_here(name):
    tx = transformation(name, **MORE.get(name, {}))
    params, batch = regression()
    arguments = jax.eval_shape(lambda p, b: (p, tx.init(p), b), params, batch)
    exported = jax.export.export(_step(tx), platforms=ACCELERATORS)(*arguments)
    assert exported.platforms == ACCELERATORS
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(arguments[:2])]
    assert [(x.shape, x.dtype) for x in exported.out_avals] == shapes
    assert "lapack" not in exported.mlir_module()


@pytest.mark.heart
@pytest.mark.parametrize(
    "name", ["lpf_sgd", "sam_gradients", "track_stability", "smooth_gradients"]
)
def test_an_exported_step_makes_the_step(name):
    tx = transformation(name, **MORE.get(name, {}))
    params, batch = regression()
    arguments = params, tx.init(params), batch
    step = _step(tx)
    exported = jax.export.export(step, platforms=("cpu", *ACCELERATORS))(*arguments)
    assert_close(exported.call(*arguments), step(*arguments))


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize(
    "name", ["lpf_sgd", "nso_sgd", "look_sam_gradients", "smooth_gradients"]
)
def test_the_program_of_an_accelerator_makes_the_step_of_cpu(name, platform):
    """The operations that are handed to another compiler, run on CPU: noise and all."""
    tx = transformation(name, **MORE.get(name, {}))
    params, batch = regression()
    arguments = params, tx.init(params), batch
    step = _step(tx)
    assert_close(run_program_of(platform, step, *arguments), step(*arguments))


@pytest.mark.heart
@pytest.mark.parametrize("name", ["smooth", "smooth_value_and_grad"])
@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", 2])
def test_the_functions_lower_under_every_layout(name, strategy):
    options = {"num_samples": 3, "strategy": strategy}
    f = getattr(flatopt, name)(loss_fn, 0.1, flatopt.kernels.filterwise(), **options)
    arguments = jax.eval_shape(lambda: (jax.random.key(0), *regression()))
    exported = jax.export.export(jax.jit(f), platforms=ACCELERATORS)(*arguments)
    assert exported.platforms == ACCELERATORS


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_program_for_eight_devices_travels_with_its_shardings(axis_type):
    params, batch = regression()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    tx = flatopt.lpf_sgd(0.1, 0.1, 2)
    step = _step(tx)
    expected = step(params, tx.init(params), batch)
    whole, split = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
    with jax.set_mesh(mesh):
        arguments = jax.device_put(
            (params, tx.init(params), batch), (whole, whole, split)
        )
        exported = jax.export.export(step, platforms=("cpu", *ACCELERATORS))(*arguments)
        result = exported.call(*arguments)
    assert exported.nr_devices == 8
    assert_close(result, expected, rtol=2e-5, atol=2e-6)
