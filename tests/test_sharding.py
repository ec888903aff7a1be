"""Meshes: the same result on one and on eight devices, and nothing gathered."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, loss_fn, regression
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt
from flatopt import kernels

NUM_DEVICES = 8
KERNELS = {
    "filterwise": kernels.filterwise(),
    "signs": kernels.isotropic(kernels.signs),
    "shared": kernels.shared_magnitude(kernels.isotropic()),
}


def _mesh(axis_type):
    return jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(axis_type,))


def _place(tree, mesh, spec):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", 2])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_data_parallel_gives_the_result_of_one_device(axis_type, kernel, strategy):
    params, batch = regression()
    f = jax.jit(
        flatopt.smooth_value_and_grad(
            loss_fn,
            0.1,
            KERNELS[kernel],
            num_samples=4,
            batch_argnames=("batch",),
            strategy=strategy,
        )
    )
    expected = f(jax.random.key(0), params, batch=batch)
    mesh = _mesh(axis_type)
    with jax.set_mesh(mesh):
        placed = _place(params, mesh, P()), _place(batch, mesh, P("data"))
        result = f(jax.random.key(0), placed[0], batch=placed[1])
        assert_close(result, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("strategy", ["vmap", "unroll"])
def test_a_sharded_batch_moves_nothing_but_one_gradient(strategy):
    params, batch = regression()
    mesh = _mesh(AxisType.Auto)
    f = flatopt.smooth_value_and_grad(
        loss_fn, 0.1, num_samples=4, batch_argnames=("batch",), strategy=strategy
    )
    text = (
        jax.jit(f)
        .lower(
            jax.random.key(0),
            _place(params, mesh, P()),
            batch=_place(batch, mesh, P("data")),
        )
        .compile()
        .as_text()
    )
    assert re.search(r"= \S.* all-reduce", text)
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert not re.search(rf"= \S.* {collective}", text), collective


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_noise_of_sharded_parameters_is_drawn_in_place(axis_type, kernel):
    kernel = kernels.isotropic() if kernel == "filterwise" else KERNELS[kernel]
    mesh = _mesh(axis_type)
    for spec in (P("data", None), P(None, "data")):
        params = {"w": jnp.ones((64, 512))}
        expected = kernel(jax.random.key(0), params)
        with jax.set_mesh(mesh):
            placed = _place(params, mesh, spec)
            draw = jax.jit(
                lambda key, params: jax.tree.map(jnp.add, params, kernel(key, params))
            )
            noise = draw(jax.random.key(0), placed)
            assert noise["w"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
            assert_close(noise, {"w": expected["w"] + 1})
            text = draw.lower(jax.random.key(0), placed).compile().as_text()
        assert "all-gather" not in text
        assert not re.search(r"f32\[64,512\]", text)  # no device holds the whole


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kernel", ["filterwise", "masked"])
def test_shard_map_averages_over_devices_with_their_own_noise(
    kernel, check_vma, strategy
):
    params, batch = regression()
    kernel = {
        "filterwise": kernels.filterwise(),
        "masked": kernels.masked(
            kernels.filterwise(), {"first": True, "second": False}
        ),
    }[kernel]
    options = {"num_samples": 4, "batch_argnames": ("batch",), "strategy": strategy}
    f = flatopt.smooth_value_and_grad(loss_fn, 0.1, kernel, axis_name="data", **options)
    mesh = _mesh(AxisType.Auto)
    mapped = jax.shard_map(
        lambda key, params, batch: f(key, params, batch=batch),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    result = jax.jit(mapped)(jax.random.key(0), params, batch)

    local = jax.jit(flatopt.smooth_value_and_grad(loss_fn, 0.1, kernel, **options))
    parts = []
    for device in range(NUM_DEVICES):
        rows = slice(8 * device, 8 * device + 8)
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        key = jax.random.fold_in(jax.random.key(0), device)
        parts.append(local(key, params, batch=part))
    mean = jax.tree.map(lambda *x: sum(x) / NUM_DEVICES, *parts)
    assert_close(result, mean, rtol=2e-5, atol=2e-6)


LINKS = {
    "sam": (flatopt.sam_gradients, (0.3,)),
    "random_sam": (flatopt.random_sam_gradients, (0.3, 0.0)),
    "gsam": (flatopt.gsam_gradients, (0.3, 0.4)),
    "friendly_sam": (flatopt.friendly_sam_gradients, (0.3,)),
    "look_sam": (flatopt.look_sam_gradients, (0.3,)),
    "entropy_sgd": (flatopt.entropy_sgd_gradients, (0.3, 4, 0.1, 0.0)),
}


def _mapped_steps(tx, params, batch, num_steps, check_vma, batch_spec):
    def steps(params, batch):
        state = tx.init(params)
        for _ in range(num_steps):
            updates, state = tx.update(
                None, state, params, value_fn=loss_fn, batch=batch
            )
        return updates, state.clean_value

    mapped = jax.shard_map(
        steps,
        mesh=_mesh(AxisType.Auto),
        in_specs=(P(), batch_spec),
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(params, batch)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", LINKS)
def test_shard_map_averages_the_steps_of_the_devices(name, check_vma):
    params, batch = regression()
    make, arguments = LINKS[name]
    tx = make(*arguments, axis_name="data")
    result, value = _mapped_steps(tx, params, batch, 2, check_vma, P("data"))

    local = make(*arguments)
    device_step = jax.jit(
        lambda state, part: local.update(
            None, state, params, value_fn=loss_fn, batch=part
        )
    )
    state = local.init(params)
    for _ in range(2):
        parts = []
        for device in range(NUM_DEVICES):
            rows = slice(8 * device, 8 * device + 8)
            part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
            parts.append(device_step(state, part))
        updates, memory, clean_value = jax.tree.map(
            lambda *x: sum(x) / NUM_DEVICES,
            *[(updates, s.memory, s.clean_value) for updates, s in parts],
        )
        state = parts[0][1]._replace(memory=memory)
    assert_close(result, updates, rtol=2e-5, atol=2e-6)
    assert_close(value, clean_value, rtol=2e-5)


@pytest.mark.parametrize("name", ["random_sam", "entropy_sgd"])
def test_devices_draw_their_own_noise(name):
    params, batch = regression()
    make = LINKS[name][0]
    arguments = (0.3, 0.2) if name == "random_sam" else (0.3, 4, 0.1, 0.5)
    tx, local = make(*arguments, axis_name="data"), make(*arguments)
    result, _ = _mapped_steps(tx, params, batch, 1, True, P())
    alone, _ = local.update(
        None, local.init(params), params, value_fn=loss_fn, batch=batch
    )
    with pytest.raises(AssertionError):
        assert_close(result, alone, rtol=1e-2, atol=1e-3)
