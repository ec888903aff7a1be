"""Meshes: the same result on one and on eight devices, and nothing gathered."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import process_worker
import pytest
from helpers import (
    STRATEGIES,
    TRANSFORMATIONS,
    assert_close,
    collectives,
    loss_fn,
    regression,
    takes,
    transformation,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt
from flatopt import kernels
from flatopt._core import random

NUM_DEVICES = 8
CHUNKS = {"num_samples": 4, "batch_argnames": ("batch",)}
KERNELS = {
    "filterwise": kernels.filterwise(),
    "signs": kernels.isotropic(kernels.signs),
    "polynomial": kernels.polynomial((0.5, 0.2)),
    "shared": kernels.shared_magnitude(kernels.isotropic()),
}


def _mesh(axis_type):
    return jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(axis_type,))


def _place(tree, mesh, spec):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)


def _collectives(jitted, *arguments, **kwargs):
    return collectives(jitted.lower(*arguments, **kwargs))


def _num_values(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def _regression():
    """Parameters and batch in NumPy, where slices and means compile nothing."""
    return jax.tree.map(np.asarray, regression())


def _part(batch, index, count):
    return jax.tree.map(lambda x: np.split(x, count)[index], batch)


def _mean(trees):
    return jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *trees)


def _alone(loss_fn, kernel, **options):
    """The function of one device, in the layout that compiles fastest: all agree."""
    return jax.jit(
        flatopt.smooth_value_and_grad(loss_fn, 0.1, kernel, strategy="scan", **options)
    )


# Each layout with one kernel, each type of axis with half of them.
@pytest.mark.parametrize(
    ("axis_type", "kernel", "strategy"),
    [
        (AxisType.Auto, "filterwise", "vmap"),
        (AxisType.Auto, "signs", "scan"),
        (AxisType.Explicit, "signs", "unroll"),
        (AxisType.Explicit, "shared", 2),
    ],
)
def test_data_parallel_gives_the_result_of_one_device(axis_type, kernel, strategy):
    params, batch = _regression()
    num_samples = 4 if strategy == 2 else 2
    options = {"num_samples": num_samples, "batch_argnames": ("batch",)}
    f = jax.jit(
        flatopt.smooth_value_and_grad(
            loss_fn, 0.1, KERNELS[kernel], strategy=strategy, **options
        )
    )
    alone = _alone(loss_fn, KERNELS[kernel], **options)
    expected = alone(jax.random.key(0), params, batch=batch)
    mesh = _mesh(axis_type)
    with jax.set_mesh(mesh):
        placed = _place(params, mesh, P()), _place(batch, mesh, P("data"))
        result = f(jax.random.key(0), placed[0], batch=placed[1])
        assert_close(result, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.heart
@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll"])
def test_under_jit_a_sharded_batch_moves_no_more_than_a_gradient_a_chunk(strategy):
    params, batch = _regression()
    mesh = _mesh(AxisType.Auto)
    f = flatopt.smooth_value_and_grad(
        loss_fn, 0.1, num_samples=4, batch_argnames=("batch",), strategy=strategy
    )
    placed = _place(params, mesh, P()), _place(batch, mesh, P("data"))
    moved = _collectives(jax.jit(f), jax.random.key(0), placed[0], batch=placed[1])
    rounds = 4 if strategy == "scan" else 1
    assert {kind for kind, _ in moved} == {"all-reduce"}
    total = rounds * sum(values for _, values in moved)
    size = _num_values(params)
    assert size <= total <= 4 * (size + 1)


@pytest.mark.heart
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_under_shard_map_one_gradient_is_reduced_whatever_the_number_of_chunks(
    strategy,
):
    params, batch = _regression()
    chunks = {"num_samples": 2, "batch_argnames": ("batch",)}
    f = flatopt.smooth_value_and_grad(
        loss_fn, 0.1, strategy=strategy, axis_name="data", **chunks
    )
    mapped = jax.shard_map(
        lambda key, params, batch: f(key, params, batch=batch),
        mesh=_mesh(AxisType.Auto),
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    moved = _collectives(jax.jit(mapped), jax.random.key(0), params, batch)
    assert moved == [("all-reduce", _num_values(params) + 2)]  # the value, its weight


FSDP_KERNELS = {name: KERNELS[name] for name in ("filterwise", "polynomial", "signs")}


@functools.cache
def _on_one_device(kernel):
    params, batch = process_worker.problem()
    alone = _alone(process_worker.loss_fn, KERNELS[kernel], **CHUNKS)
    return alone(jax.random.key(0), params, batch=batch)


@pytest.mark.parametrize(
    ("axis_type", "kernel", "strategy"),
    [
        (AxisType.Auto, "filterwise", "vmap"),
        (AxisType.Auto, "signs", "scan"),
        (AxisType.Explicit, "filterwise", "scan"),
        (AxisType.Explicit, "polynomial", "vmap"),
        (AxisType.Explicit, "signs", "vmap"),
    ],
)
def test_sharded_parameters_give_the_result_of_one_device(axis_type, kernel, strategy):
    params, batch = process_worker.problem()
    f = jax.jit(
        flatopt.smooth_value_and_grad(
            process_worker.loss_fn, 0.1, KERNELS[kernel], strategy=strategy, **CHUNKS
        )
    )
    expected = _on_one_device(kernel)
    mesh = _mesh(axis_type)
    with jax.set_mesh(mesh):
        placed = _place(params, mesh, P("data")), _place(batch, mesh, P("data"))
        result = f(jax.random.key(0), placed[0], batch=placed[1])
    assert_close(result, expected, rtol=2e-5, atol=2e-6)
    if axis_type == AxisType.Explicit:
        kept = NamedSharding(mesh, P("data"))
        for grad in jax.tree.leaves(result[1]):
            assert grad.sharding.is_equivalent_to(kept, grad.ndim)


LEARNING = {
    "ivon": {"ess": 100.0, "beta2": 0.9, "num_samples": 2},
    "arwp_gradients": {"eta": 5.0},
    "sam_gradients": {"direction": optax.scale_by_adam()},
    "ire": {"every": 1},
}


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_what_is_learned_is_sharded_as_the_parameters(
    name, axis_type, standard_promotion
):
    params, batch = process_worker.problem()
    mesh = _mesh(axis_type)
    with jax.set_mesh(mesh):
        found = _two_steps(name)(
            _place(params, mesh, P("data")), _place(batch, mesh, P("data"))
        )
    assert_close(found, _two_steps_of_one_device(name), rtol=1e-4, atol=1e-5)


@functools.cache
def _two_steps(name):
    tx = transformation(name, **LEARNING[name])

    def two_steps(params, batch):
        def step(state, _):
            updates, state = tx.update(
                params, state, params, value_fn=process_worker.loss_fn, batch=batch
            )
            return state, updates

        return jax.lax.scan(step, tx.init(params), length=2)

    return jax.jit(two_steps)


@functools.cache
def _two_steps_of_one_device(name):
    return _two_steps(name)(*process_worker.problem())


@pytest.mark.parametrize("kernel", FSDP_KERNELS)
def test_sharded_parameters_are_gathered_once_a_pass_and_their_noise_never(
    kernel, monkeypatch
):
    # As on accelerators: on CPU the noise of small leaves is drawn together.
    monkeypatch.setattr(random, "can_sample_leaves", lambda keys: False)
    params, batch = process_worker.problem()
    mesh = _mesh(AxisType.Auto)
    params, batch = _place(params, mesh, P("data")), _place(batch, mesh, P("data"))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)

    def gathered(grad):
        moved = _collectives(jax.jit(grad, out_shardings=shardings), params, batch)
        assert {kind for kind, _ in moved} <= {"all-gather", "all-reduce"}
        return sum(values for kind, values in moved if kind == "all-gather")

    def smoothed(**options):
        f = flatopt.smooth_value_and_grad(
            process_worker.loss_fn, 0.1, KERNELS[kernel], strategy="unroll", **options
        )
        return lambda params, batch: f(jax.random.key(0), params, batch=batch)[1]

    once = _num_values(params)
    assert gathered(smoothed(antithetic=True)) == 2 * once
    chunks = smoothed(num_samples=2, batch_argnames=("batch",))
    assert gathered(chunks) == 2 * once


@pytest.mark.heart
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_noise_of_sharded_parameters_is_drawn_in_place(axis_type, kernel):
    specs = [P("data", None), P(None, "data")]
    if kernel not in ("signs", "polynomial"):  # which have an axis of their own
        specs = specs[:1] if axis_type == AxisType.Auto else specs[1:]
    kernel = kernels.isotropic() if kernel == "filterwise" else KERNELS[kernel]
    mesh = _mesh(axis_type)
    for spec in specs:
        params = {"w": np.ones((64, 512), "f4")}
        expected = kernel(jax.random.key(0), params)
        with jax.set_mesh(mesh):
            placed = _place(params, mesh, spec)
            draw = jax.jit(
                lambda key, params: jax.tree.map(jnp.add, params, kernel(key, params))
            )
            compiled = draw.lower(jax.random.key(0), placed).compile()
            noise = compiled(jax.random.key(0), placed)
        assert noise["w"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        assert_close(noise, {"w": np.asarray(expected["w"]) + 1})
        text = compiled.as_text()
        assert "all-gather" not in text
        assert not re.search(r"f32\[64,512\]", text)  # no device holds the whole


@pytest.mark.parametrize(
    ("kernel", "check_vma", "strategy"),
    [
        ("filterwise", True, "scan"),
        ("filterwise", False, "scan"),
        ("filterwise", True, "vmap"),
        ("filterwise", False, 3),
        ("filterwise", True, "auto"),
        ("masked", False, "vmap"),
        ("masked", True, "unroll"),
    ],
)
def test_shard_map_averages_over_devices_with_their_own_noise(
    kernel, check_vma, strategy
):
    params, batch = _regression()
    f = flatopt.smooth_value_and_grad(
        loss_fn, 0.1, OWN[kernel], axis_name="data", strategy=strategy, **CHUNKS
    )
    mesh = _mesh(AxisType.Auto)
    mapped = jax.shard_map(
        lambda key, params, batch: f(key, params, batch=batch),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    result = jax.jit(mapped)(jax.random.key(0), params, batch)
    assert_close(result, _device_by_device(kernel), rtol=2e-5, atol=2e-6)


OWN = {
    "filterwise": kernels.filterwise(),
    "masked": kernels.masked(kernels.filterwise(), {"first": True, "second": False}),
}


@functools.cache
def _device_by_device(kernel):
    params, batch = _regression()
    local = _alone(loss_fn, OWN[kernel], **CHUNKS)
    parts = []
    for device in range(NUM_DEVICES):
        key = jax.random.fold_in(jax.random.key(0), device)
        parts.append(local(key, params, batch=_part(batch, device, NUM_DEVICES)))
    return _mean(parts)


def _mapped_gradient(f, check_vma, batch_spec, mesh=None, axis_names=None):
    mapped = jax.shard_map(
        lambda key, params, batch: f(key, params, batch),
        mesh=_mesh(AxisType.Auto) if mesh is None else mesh,
        in_specs=(P(), P(), batch_spec),
        out_specs=P(),
        check_vma=check_vma,
        axis_names=axis_names or {"data"},
    )
    return jax.jit(mapped)


def test_eight_devices_average_eight_times_as_many_draws():
    params, batch = _regression()
    kernel = kernels.filterwise()
    options = {"num_samples": 2, "strategy": "unroll"}
    f = flatopt.smooth_value_and_grad(loss_fn, 0.1, kernel, axis_name="data", **options)
    key = jax.random.key(0)

    def compiled(jitted):
        return jitted.lower(key, params, batch).compile()

    mapped = compiled(_mapped_gradient(f, True, P()))
    _, result = mapped(key, params, batch)

    @jax.jit
    def gradient(device, sample):
        own = jax.random.fold_in(jax.random.fold_in(key, device), sample)
        moved = jax.tree.map(lambda p, u: p + 0.1 * u, params, kernel(own, params))
        return jax.grad(loss_fn)(moved, batch)

    draws = [gradient(*own) for own in itertools.product(range(NUM_DEVICES), range(2))]
    assert_close(result, _mean(draws), rtol=2e-5, atol=2e-6)

    alone = compiled(
        jax.jit(flatopt.smooth_value_and_grad(loss_fn, 0.1, kernel, **options))
    )
    cost = mapped.cost_analysis()["flops"]
    assert cost < 1.1 * alone.cost_analysis()["flops"]


_one_draw = jax.jit(flatopt.smooth_value_and_grad(loss_fn, 0.1, strategy="unroll"))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_mean_written_by_hand_is_eight_times_too_large_where_jax_sums(check_vma):
    params, batch = _regression()
    f = _one_draw
    mapped = _mapped_gradient(
        lambda *args: jax.lax.pmean(f(*args)[1], "data"), check_vma, P("data")
    )
    key = jax.random.key(0)
    result = mapped(key, params, batch)
    parts = [
        f(key, params, _part(batch, device, NUM_DEVICES))[1]
        for device in range(NUM_DEVICES)
    ]
    factor = NUM_DEVICES if check_vma else 1
    expected = jax.tree.map(lambda x: factor * x, _mean(parts))
    assert_close(result, expected, rtol=2e-5, atol=5e-6)


def test_groups_of_devices_draw_while_each_group_shards_its_parameters():
    params, batch = process_worker.problem()
    axis_types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("draws", "chips"), axis_types=axis_types)
    f = flatopt.smooth_value_and_grad(
        process_worker.loss_fn, 0.1, kernels.filterwise(), axis_name="draws"
    )
    mapped = _mapped_gradient(f, True, P("draws"), mesh, {"draws"})
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        placed = _place(params, mesh, P("chips"))
        _, result = mapped(key, placed, _place(batch, mesh, P(("draws", "chips"))))
    alone = jax.jit(
        flatopt.smooth_value_and_grad(process_worker.loss_fn, 0.1, kernels.filterwise())
    )
    parts = [
        alone(jax.random.fold_in(key, group), params, _part(batch, group, 2))[1]
        for group in range(2)
    ]
    assert_close(result, _mean(parts), rtol=2e-5, atol=2e-6)


MAPPED = [
    name
    for name in TRANSFORMATIONS
    if takes(name, "axis_name")
    and hasattr(transformation(name).init(jnp.zeros(2)), "clean_value")
]
"""Links that average over devices; smoothed losses and the tracker have tests apart."""


def _mapped_steps(tx, params, batch, num_steps, check_vma, batch_spec):
    def step(state, params, batch):
        return tx.update(None, state, params, value_fn=loss_fn, batch=batch)

    mesh = _mesh(AxisType.Auto)
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), batch_spec),
        out_specs=P(),
        check_vma=check_vma,
    )
    step, state = jax.jit(mapped), _place(tx.init(params), mesh, P())
    for _ in range(num_steps):
        updates, state = step(state, params, batch)
    return updates, state.clean_value


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        (name, check_vma)
        for name in MAPPED
        for check_vma in (True, False)
        if check_vma or TRANSFORMATIONS[name].is_resumed
    ],
)
def test_shard_map_averages_the_steps_of_the_devices(name, check_vma):
    params, batch = _regression()
    tx = transformation(name, "quiet", axis_name="data")
    result, value = _mapped_steps(tx, params, batch, 2, check_vma, P("data"))
    updates, clean_value = _steps_by_hand(name)
    assert_close(result, updates, rtol=2e-5, atol=2e-6)
    assert_close(value, clean_value, rtol=2e-5)


@functools.cache
def _steps_by_hand(name):
    params, batch = _regression()
    local = transformation(name, "quiet")
    device_step = jax.jit(
        lambda state, part: local.update(
            None, state, params, value_fn=loss_fn, batch=part
        )
    )
    state = local.init(params)
    for _ in range(2):
        parts = [
            device_step(state, _part(batch, device, NUM_DEVICES))
            for device in range(NUM_DEVICES)
        ]
        updates, memory, clean_value = _mean(
            [(u, getattr(s, "memory", ()), s.clean_value) for u, s in parts]
        )
        state = parts[0][1]
        if hasattr(state, "memory"):
            state = state._replace(memory=memory)
    return updates, clean_value


@pytest.mark.parametrize(
    "name", [name for name in MAPPED if TRANSFORMATIONS[name].quiet]
)
def test_devices_draw_their_own_noise(name):
    params, batch = _regression()
    (noise,) = TRANSFORMATIONS[name].quiet
    tx = transformation(name, axis_name="data", **{noise: 0.5})
    local = transformation(name, **{noise: 0.5})
    result, _ = _mapped_steps(tx, params, batch, 1, True, P())
    alone, _ = local.update(
        None, local.init(params), params, value_fn=loss_fn, batch=batch
    )
    with pytest.raises(AssertionError):
        assert_close(result, alone, rtol=1e-2, atol=1e-3)


@functools.cache
def _first_steps_of_devices():
    params, batch = _regression()
    alone = _alone(loss_fn, kernels.isotropic(), **CHUNKS)
    step_key = jax.random.fold_in(jax.random.key(0), 0)
    return [
        alone(
            jax.random.fold_in(step_key, device),
            params,
            batch=_part(batch, device, NUM_DEVICES),
        )
        for device in range(NUM_DEVICES)
    ]


@pytest.mark.parametrize("check_vma", [True, False])
def test_smooth_gradients_under_shard_map_is_the_mean_over_the_devices(check_vma):
    params, batch = _regression()
    tx = flatopt.smooth_gradients(0.1, axis_name="data", strategy="scan", **CHUNKS)

    def update(key, params, batch):
        del key
        state = tx.init(params)
        return tx.update(None, state, params, value_fn=loss_fn, batch=batch)

    mapped = _mapped_gradient(update, check_vma, P("data"))
    updates, state = mapped(jax.random.key(0), params, batch)
    value, grads = _mean(_first_steps_of_devices())
    assert_close(updates, grads, rtol=2e-5, atol=2e-6)
    assert_close(state.smoothed_value, value, rtol=2e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P()])
def test_the_norm_of_sam_is_that_of_all_devices(axis_type, spec):
    params = np.arange(1, 17, dtype="f4")
    tx = flatopt.sam_gradients(0.5)

    def half_square(params):
        return jnp.sum(params**2) / 2

    mesh = _mesh(axis_type)
    with jax.set_mesh(mesh):
        placed = _place(params, mesh, spec)
        found, _ = jax.jit(
            lambda p: tx.update(None, tx.init(p), p, value_fn=half_square)
        )(placed)
    # The gradient is the parameters; the step is along all of them, of length 0.5.
    expected = np.arange(1.0, 17.0) * (1 + 0.5 / np.linalg.norm(np.arange(1.0, 17.0)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    of_a_part = np.linalg.norm(np.arange(1.0, 3.0))  # what one device holds
    assert abs(np.asarray(found)[0] - (1 + 0.5 / of_a_part)) > 0.1
