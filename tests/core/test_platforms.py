"""Programs take the ways of the platform that they are for, not of the one that traces."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    loss_fn,
    regression,
    run_program_of,
    take_ways_of,
)

import flatopt
from flatopt import kernels
from flatopt._core import platforms, random

ACCELERATORS = ("tpu", "cuda")
KEY = jax.random.key(5)


def _program(traced, platform):
    return traced.lower(lowering_platforms=(platform,)).as_text()


def _trace(loss, params, batch, **options):
    options = {"num_samples": 4, "batch_argnames": ("batch",), **options}
    kernel = options.pop("kernel", kernels.isotropic())
    f = flatopt.smooth_value_and_grad(loss, 0.1, kernel, **options)
    return jax.jit(f).trace(KEY, params, batch=batch)


def _convolutional(params, batch):
    outputs = jax.lax.conv_general_dilated(
        batch, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.mean(jnp.tanh(outputs) ** 2)


def _scanned(params, batch):
    layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return jnp.mean(jax.lax.scan(layer, batch, params)[0] ** 2)


@pytest.mark.heart
def test_a_dense_network_takes_a_loop_on_cpu_and_all_chunks_at_once_elsewhere():
    traced = _trace(loss_fn, *regression())
    assert _program(traced, "cpu").count("stablehlo.while") >= 1
    for platform in ACCELERATORS:
        assert "stablehlo.while" not in _program(traced, platform)


@pytest.mark.parametrize(
    ("options", "num_loops"),
    [
        ({"batch_argnames": ()}, 1),  # whole batches: activations would multiply
        ({"strategy": "scan"}, 1),
        ({"strategy": "vmap"}, 0),
        ({"strategy": "unroll"}, 0),
        ({"strategy": 2}, 1),
    ],
)
def test_whole_batches_and_named_layouts_are_laid_out_as_said(options, num_loops):
    traced = _trace(loss_fn, *regression(), **options)
    for platform in ACCELERATORS:
        assert _program(traced, platform).count("stablehlo.while") == num_loops


def test_a_small_convolution_is_unrolled_on_cpu_looped_on_gpu_and_batched_on_tpu():
    params = {"w": jnp.ones((3, 4, 5))}
    traced = _trace(_convolutional, params, jnp.ones((8, 6, 4)))
    # A forward and a backward convolution for each of the four samples, or for all.
    num_convolutions = {"cpu": 8, "cuda": 2, "tpu": 2}
    for platform, expected in num_convolutions.items():
        text = _program(traced, platform)
        assert text.count("stablehlo.convolution(") == expected
        if platform != "cpu":  # where generators are loops
            assert text.count("stablehlo.while") == (platform == "cuda")


@pytest.mark.parametrize(
    ("num_features", "num_rows", "expected"),
    [
        (64, 2048, 0),  # 3 x 64 x 64 x 4,096 x 2 operations a chunk: 0.1 billion
        (512, 2048, 1),  # 6 billion
        (2000, 8, 0),  # 12 million parameters
        (4000, 8, 1),  # 4 x 48 million x 4 bytes
    ],
)
def test_large_convolutions_keep_the_loop_of_samples_on_tpu(
    num_features, num_rows, expected
):
    shapes = (3, num_features, num_features), (4, num_rows, num_features)
    params, batch = (jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes)
    traced = _trace(_convolutional, {"w": params}, batch)
    assert _program(traced, "tpu").count("stablehlo.while") == expected


def test_convolutions_in_loops_are_rewritten_on_cpu_alone():
    params = {"w": jnp.ones((3, 4, 5))}
    traced = _trace(_convolutional, params, jnp.ones((8, 6, 4)), strategy="scan")
    fast = "[b, 0, f]x[0, i, o]->[b, 0, f]"
    for platform in ("cpu", *ACCELERATORS):
        text = _program(traced, platform)
        layouts = re.findall(r"dim_numbers = (\S+ \S+ \S+?), window", text)
        layouts = layouts or re.findall(r"dim_numbers = (.*?), window", text)
        assert len(layouts) == 2
        assert (set(layouts) == {fast}) == (platform == "cpu"), layouts


def test_scanned_layers_take_all_chunks_at_once_on_accelerators():
    traced = _trace(_scanned, jnp.ones((3, 4, 4)), jnp.ones((8, 4)))
    # The samples, the layers, and the layers backward; on CPU the generator too.
    assert _program(traced, "cpu").count("stablehlo.while") == 4
    for platform in ACCELERATORS:
        assert _program(traced, platform).count("stablehlo.while") == 2


def test_loops_of_unknown_length_keep_the_loop_of_samples():
    def loss(params, batch):
        rows = jax.lax.stop_gradient(batch)
        length = jnp.int32(rows.sum())
        rows = jax.lax.fori_loop(0, length, lambda _, x: jnp.tanh(x), rows)
        return jnp.mean((rows @ params) ** 2)

    traced = _trace(loss, jnp.ones((4, 4)), jnp.ones((8, 4)))
    for platform in ACCELERATORS:
        assert _program(traced, platform).count("stablehlo.while") == 2


@pytest.mark.parametrize(("width", "num_loops"), [(4096, 0), (8192, 1)])
def test_a_large_network_keeps_the_loop_of_samples(width, num_loops):
    params = {"w": jax.ShapeDtypeStruct((width, width), jnp.float32)}
    batch = jax.ShapeDtypeStruct((8, width), jnp.float32)
    loss = lambda params, batch: jnp.mean((batch @ params["w"]) ** 2)  # noqa: E731
    traced = _trace(loss, params, batch)  # 4 x width x width x 4 bytes
    for platform in ACCELERATORS:
        assert _program(traced, platform).count("stablehlo.while") == num_loops


@pytest.mark.parametrize("sampler", ["uniform", "irwin_hall", "laplace", "signs"])
def test_a_sampler_is_the_same_arithmetic_in_every_program(sampler):
    """Same key, same values: integer words by one formula, then the same operations."""
    draw = jax.jit(
        lambda key: getattr(kernels, sampler)(key, (4, 6)),
    )
    traced = draw.trace(KEY)
    texts = [_operations(_program(traced, p)) for p in ("cpu", *ACCELERATORS)]
    assert texts[0] == texts[1] == texts[2]
    assert "stablehlo.xor" in texts[0]  # the generator is written out
    assert not {"stablehlo.custom_call", "stablehlo.rng_bit_generator"} & set(texts[0])


def _operations(text):
    return re.findall(r"stablehlo\.\w+", text)


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize(
    "sampler", ["normal", "uniform", "irwin_hall", "laplace", "signs"]
)
def test_the_program_of_an_accelerator_draws_the_noise_of_cpu(sampler, platform):
    """All leaves, of any size, where one compiler makes both programs: bit for bit.

    Of normal values the words: their inverse error function on CPU is flatopt's own.
    """
    params = {"a": jnp.ones((64, 96)), "b": jnp.ones((3, 7)), "c": jnp.ones(())}
    kernel = kernels.isotropic(getattr(kernels, sampler))
    draw = jax.jit(lambda key: kernel(key, params))
    found, expected = run_program_of(platform, draw, KEY), draw(KEY)
    for name, leaf in expected.items():
        if sampler == "normal":
            np.testing.assert_allclose(found[name], leaf, rtol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], leaf)


@pytest.mark.heart
@pytest.mark.parametrize("sampler", ["normal", "signs"])
@pytest.mark.parametrize("shape", [(5,), (64, 96)])
def test_both_ways_of_drawing_give_the_same_values(sampler, shape, monkeypatch):
    params = {"a": jnp.ones(shape), "b": jnp.ones((3, 7))}
    kernel = kernels.isotropic(getattr(kernels, sampler))
    found = {}
    for name in ("cpu", "gpu"):
        take_ways_of(monkeypatch, name)
        found[name] = jax.jit(lambda key: kernel(key, params))(KEY)
    rtol = 1e-5 if sampler == "normal" else 0
    for name, leaf in found["cpu"].items():
        np.testing.assert_allclose(leaf, found["gpu"][name], rtol=rtol)


def test_small_leaves_are_drawn_by_one_generator_on_cpu_and_apart_elsewhere():
    params = {str(i): jnp.ones((3, i + 2)) for i in range(6)}
    draw = jax.jit(lambda key: kernels.isotropic(kernels.signs)(key, params))
    traced = draw.trace(KEY)
    # Each generator makes five key injections, each with a rotation by 13 or by 17.
    assert _program(traced, "cpu").count("stablehlo.while") == 1
    assert _program(traced, "tpu").count("stablehlo.while") == 0


def test_a_program_for_many_platforms_makes_the_step_of_each():
    params, batch = regression()
    f = flatopt.smooth_value_and_grad(
        loss_fn, 0.1, kernels.isotropic(kernels.signs), num_samples=4,
        batch_argnames=("batch",),
    )  # fmt: skip
    run = jax.jit(lambda key, params, batch: f(key, params, batch=batch))
    exported = jax.export.export(run, platforms=("cpu", *ACCELERATORS))
    assert_close(
        exported(KEY, params, batch).call(KEY, params, batch), run(KEY, params, batch)
    )


def test_outside_a_trace_the_platform_is_that_of_the_arrays():
    assert platforms.platform_of([KEY]) == "cpu"
    assert platforms.platform_of([np.ones(3)]) == jax.default_backend()
    with jax.default_device(jax.devices("cpu")[1]):
        assert platforms.platform_of([]) == "cpu"
    ways = lambda x: "cpu", lambda x: "elsewhere"  # noqa: E731
    assert platforms.choose(*ways, jnp.ones(2)) == "cpu"


def test_the_default_backend_is_asked_nowhere_else():
    import pathlib

    folder = pathlib.Path(flatopt.__file__).parent
    asking = [
        p.name for p in folder.rglob("*.py") if "default_backend" in p.read_text()
    ]
    assert asking == ["platforms.py"]
    assert random.can_sample_leaves(KEY)
