"""Methods of two gradients where the loss scans over layers: one loop of two rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, maker, take_ways_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt
from flatopt import kernels

RHO = 0.3
OPTIONS = {
    "sam": {},
    "usam": {},
    "gsam": {"alpha": 0.4},
    "asam": {"eta": 0.05},
    "filterwise_asam": {"eta": 0.05},
    "fisher_sam": {"eta": 0.5},
    "friendly_sam": {"sigma": 0.8},
    "random_sam": {"sigma": 0.1},
    "noisy_sam": {"sigma": 0.1},
}
PARTS = {"num_microbatches": 4, "batch_argnames": ("batch",)}
MORE = [
    ("sam", {"start_step": 1}),
    ("gsam", PARTS),
    ("friendly_sam", {"mask": {"head": True, "layers": False}}),
    ("sam", {"direction": optax.scale_by_adam()}),
    # Its state holds a random key, which is no number to begin a loop with.
    ("sam", {"direction": optax.add_noise(0.1, 0.5, jax.random.key(1))}),
]


def _problem():
    keys = jax.random.split(jax.random.key(3), 3)
    params = {
        "layers": jax.random.normal(keys[0], (3, 4, 4)) / 2,
        "head": jax.random.normal(keys[1], (4, 2)),
    }
    return params, jax.random.normal(keys[2], (16, 4))


def _scanned(params, batch):
    layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    x, _ = jax.lax.scan(layer, batch, params["layers"])
    return jnp.mean((x @ params["head"] - 1) ** 2)


def _unrolled(params, batch):
    for w in params["layers"]:
        batch = jnp.tanh(batch @ w)
    return jnp.mean((batch @ params["head"] - 1) ** 2)


def _update(tx, value_fn):
    def update(state, params, batch):
        return tx.update(None, state, params, value_fn=value_fn, batch=batch)

    return update


def _make(name, **options):
    return maker(f"{name}_gradients")(rho=RHO, **OPTIONS[name], **options)


# Whose second step is their first at other parameters.
STATELESS = [
    (name, {})
    for name in ("sam", "usam", "gsam", "asam", "filterwise_asam", "fisher_sam")
]


@pytest.mark.parametrize(
    ("name", "options"), [*[(name, {}) for name in OPTIONS], *MORE]
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_scanned_network_makes_the_steps_of_the_same_network_without_a_loop(
    name, options
):
    params, batch = _problem()
    tx = _make(name, **options)
    jitted = jax.jit(_update(tx, _scanned))
    state = expected = tx.init(params)
    for _ in range(1 if (name, options) in STATELESS else 2):
        updates, state = jitted(state, params, batch)
        others, expected = _update(tx, _unrolled)(expected, params, batch)
        assert_close(updates, others, rtol=1e-4, atol=1e-6)
        assert_close(state.clean_value, expected.clean_value, rtol=1e-5)
        params = optax.apply_updates(params, updates)


@pytest.mark.heart
@pytest.mark.parametrize("name", OPTIONS)
def test_the_second_pass_is_a_round_of_a_loop_or_on_tpu_a_computation_of_its_own(name):
    params, batch = _problem()
    tx = _make(name)
    traced = jax.jit(_update(tx, _scanned)).trace(tx.init(params), params, batch)
    texts = [
        traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cuda", "tpu")
    ]
    # The layers forward, the layers backward, and the two rounds around them; or both twice.
    assert [text.count("stablehlo.while") for text in texts] == [3, 4]
    on_gpu, on_tpu = (text.count("stablehlo.case") for text in texts)
    assert on_tpu == on_gpu + 1


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_each_device_takes_two_passes_of_its_own_under_shard_map(platform, monkeypatch):
    take_ways_of(monkeypatch, platform)
    params, batch = _problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = _make("sam", axis_name="data")
    step = jax.jit(
        jax.shard_map(
            _update(tx, _scanned),
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
        )
    )
    updates, _ = step(tx.init(params), params, batch)
    tx = _make("sam")
    alone = _update(tx, _unrolled)
    parts = [alone(tx.init(params), params, x)[0] for x in jnp.split(batch, 8)]
    mean = jax.tree.map(lambda *x: sum(x) / 8, *parts)
    assert_close(updates, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_parameters_may_be_sharded(axis_type, platform, monkeypatch):
    take_ways_of(monkeypatch, platform)
    params, batch = _problem()
    tx = _make("sam")
    expected, _ = _update(tx, _unrolled)(tx.init(params), params, batch)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        placed = {
            "layers": jax.device_put(params["layers"], whole),
            "head": jax.device_put(params["head"], whole),
        }
        step = jax.jit(_update(tx, _scanned))
        updates, _ = step(tx.init(placed), placed, jax.device_put(batch, split))
    assert_close(updates, expected, rtol=1e-4, atol=1e-6)


# The pair of NSO


@pytest.mark.parametrize("sampler", [kernels.normal, kernels.signs])
def test_noise_drawn_once_more_is_the_same(sampler, monkeypatch):
    params, batch = _problem()
    kernel = kernels.filterwise(sampler)
    tx = flatopt.smooth_gradients(0.1, kernel, antithetic=True, num_samples=2)
    expected, _ = _update(tx, _unrolled)(tx.init(params), params, batch)
    for name in ("cpu", "gpu", "tpu"):
        take_ways_of(monkeypatch, name)
        step = jax.jit(lambda *args: _update(tx, _scanned)(*args))
        found, _ = step(tx.init(params), params, batch)
        assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_gpu_keeps_no_noise_through_a_pass():
    params, batch = _problem()
    tx = flatopt.smooth_gradients(0.1, antithetic=True)
    traced = jax.jit(_update(tx, _scanned)).trace(tx.init(params), params, batch)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    barriers = {
        platform: [line for line in text.splitlines() if "optimization_barrier" in line]
        for platform, text in texts.items()
    }
    of_noise = lambda line: "tensor<3x4x4xf32>" in line  # noqa: E731
    assert any(map(of_noise, barriers["cpu"]))
    # Words of a key and the sign of the pass: drawn anew once the sign is there.
    assert any("ui32" in x and "tensor<f32>" in x for x in barriers["cuda"])


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_pair_is_differentiated_and_batched_on_every_platform(platform, monkeypatch):
    params, batch = _problem()
    smoothed = flatopt.smooth(_unrolled, 0.1, antithetic=True)
    keys = jax.random.split(jax.random.key(9), 2)
    gradient = lambda f, key: jax.grad(lambda p: f(key, p, batch=batch))(params)  # noqa: E731
    expected = [gradient(smoothed, key) for key in keys]
    take_ways_of(monkeypatch, platform)
    scanned = flatopt.smooth(_scanned, 0.1, antithetic=True)
    found = jax.jit(jax.vmap(lambda key: gradient(scanned, key)))(keys)
    assert_close(found, jax.tree.map(lambda *x: jnp.stack(x), *expected), atol=1e-6)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", None])
def test_keys_of_draws_are_those_of_fold_in(impl):
    from flatopt._core import random

    key = jax.random.PRNGKey(4) if impl is None else jax.random.key(4, impl=impl)
    key_at = random.keys_of_draws(key, 3)
    for index in range(3):
        expected = jax.random.fold_in(key, index)
        for found in (key_at(index), jax.jit(key_at)(jnp.int32(index))):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(
                random.key_data(found), random.key_data(expected)
            )


# Convolutions that XLA would run slowly in a loop on CPU


def _with_convolutions(convolve):
    """The scanned network behind two convolutions."""

    def value_fn(params, batch):
        images = convolve(batch.reshape(4, 4, 4, 1), params["stem"])
        images = convolve(jnp.tanh(images), params["second"])
        return _scanned(params, jnp.tanh(images).mean((1, 2)))

    params, batch = _problem()
    keys = jax.random.split(jax.random.key(8))
    params["stem"] = jax.random.normal(keys[0], (3, 3, 1, 4)) / 3
    params["second"] = jax.random.normal(keys[1], (3, 3, 4, 4)) / 6
    return params, batch, value_fn


def _convolve(images, kernel):
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


OF_TWO_PASSES = {
    "sam": lambda: _make("sam"),
    "gsam": lambda: _make("gsam"),
    "nso": lambda: flatopt.smooth_gradients(
        0.1, kernels.filterwise(kernels.signs), antithetic=True
    ),
}


@pytest.mark.heart
@pytest.mark.parametrize("name", OF_TWO_PASSES)
@pytest.mark.parametrize("is_reached", [True, False])
def test_convolutions_out_of_reach_stand_in_two_copies_on_cpu_alone(name, is_reached):
    convolve = _convolve if is_reached else jax.checkpoint(_convolve)
    params, batch, value_fn = _with_convolutions(convolve)
    tx = OF_TWO_PASSES[name]()
    state = tx.init(params)
    traced = jax.jit(_update(tx, value_fn)).trace(state, params, batch)
    loops = {}
    for platform in ("cpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        loops[platform] = text.count("stablehlo.while")
    # The layers forward and backward; the rounds around them, or all of it twice. On CPU
    # NSO draws its leaves in one loop more.
    draws = int(name == "nso")
    assert loops == {"cpu": (3 if is_reached else 4) + draws, "cuda": 3}


@pytest.mark.parametrize("name", OF_TWO_PASSES)
def test_copies_rounds_and_a_computation_apart_make_the_same_step(name, monkeypatch):
    params, batch, value_fn = _with_convolutions(jax.checkpoint(_convolve))
    tx = OF_TWO_PASSES[name]()
    expected, _ = _update(tx, value_fn)(tx.init(params), params, batch)
    for platform in ("cpu", "gpu", "tpu"):
        take_ways_of(monkeypatch, platform)
        step = jax.jit(lambda *args: _update(tx, value_fn)(*args))
        found, _ = step(tx.init(params), params, batch)
        assert_close(found, expected, rtol=1e-4, atol=1e-6)
