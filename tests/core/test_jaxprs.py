"""Convolutions in loops and branches on CPU: XLA's fast kernels, the same numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TRANSFORMATIONS, assert_close, transformation

import flatopt
from flatopt import kernels
from flatopt._core import jaxprs, platforms

FAST = "b01f_01io->b01f"

# spec of inputs, kernel and outputs; shapes; options
CASES = {
    "plain": (("NHWC", "HWIO", "NHWC"), (2, 7, 6, 4), (3, 3, 4, 5), {}),
    "strides": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 7, 6, 4),
        (3, 2, 4, 5),
        {"window_strides": (2, 3)},
    ),
    "dilation": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 9, 8, 4),
        (3, 3, 4, 5),
        {"rhs_dilation": (2, 1), "lhs_dilation": (1, 2)},
    ),
    "channels first": (("NCHW", "OIHW", "NCHW"), (2, 4, 7, 6), (5, 4, 3, 3), {}),
    "groups": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 7, 6, 4),
        (3, 3, 2, 6),
        {"feature_group_count": 2},
    ),
    "one axis": (("NWC", "WIO", "NWC"), (2, 7, 4), (3, 4, 5), {}),
    "three axes": (("NDHWC", "DHWIO", "NDHWC"), (2, 5, 4, 3, 2), (2, 2, 2, 2, 3), {}),
    "no space": (("NC", "IO", "NC"), (2, 4), (4, 5), {}),
}


@pytest.mark.heart
@pytest.mark.parametrize("case", CASES)
def test_rewritten_convolutions_and_their_gradients_are_the_same(case):
    specs, inputs_shape, kernel_shape, options = CASES[case]
    inputs, kernel = _normal(inputs_shape, kernel_shape)
    options = {
        "window_strides": (1,) * (inputs.ndim - 2),
        "padding": [(1, 0)] * (inputs.ndim - 2)
        if "lhs_dilation" in options
        else "SAME",
        **options,
    }

    @jax.jit
    def convolve(inputs, kernel):
        return jax.lax.conv_general_dilated(
            inputs, kernel, dimension_numbers=specs, **options
        )

    def run(inputs, kernel):
        outputs, pullback = jax.vjp(convolve, inputs, kernel)
        return outputs, pullback(jnp.cos(outputs))

    traced, jaxpr = jaxprs.trace(run, inputs, kernel)
    assert jaxprs.has_convolution(jaxpr)
    assert jaxprs.are_fast_in_loops(jaxpr) == (case != "groups")
    both = jax.jit(lambda *args: (traced(*args), run(*args)))
    found, expected = both(inputs, kernel)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _normal(*shapes):
    rng = np.random.default_rng(3)
    return [rng.normal(size=shape).astype("f4") for shape in shapes]


def _network():
    first, second, head, images = _normal(
        (3, 3, 2, 4), (3, 3, 4, 4), (4, 3), (8, 6, 6, 2)
    )
    params = {"first": first / 3, "second": second / 6, "head": head / 2}
    batch = {"images": images, "labels": np.arange(8, dtype="i4") % 3}

    def value_fn(params, images, labels):
        specs = ("NHWC", "HWIO", "NHWC")
        for name in ("first", "second"):
            images = jax.lax.conv_general_dilated(
                images, params[name], (1, 1), "SAME", dimension_numbers=specs
            )
            images = jnp.tanh(images)
        logits = images.mean(axis=(1, 2)) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return params, batch, value_fn


def _layouts(function, *args):
    """Layouts of all convolutions in the optimized program, fast kernels and others."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return re.findall(r"convolution\(.*dim_labels=(\S+?)[,\n]", text)


BRANCHES = [
    (name, more) for name, row in TRANSFORMATIONS.items() for more in row.branches
]


@pytest.mark.parametrize(("name", "more"), BRANCHES)
def test_loops_and_branches_keep_the_fast_layout(name, more):
    if "batch_argnames" in more:
        more = {**more, "batch_argnames": ("images", "labels")}
    params, batch, value_fn = _network()
    tx = transformation(name, **more)

    def update(state, params, batch):
        return tx.update(None, state, params, value_fn=value_fn, **batch)[0]

    layouts = _layouts(update, tx.init(params), params, batch)
    assert layouts
    assert set(layouts) == {FAST}


def test_jax_alone_leaves_slow_layouts_in_branches():
    # The reason for all this: when this fails, XLA does it by itself.
    params, batch, value_fn = _network()

    def update(flag, params, batch):
        return jax.lax.cond(
            flag,
            lambda: jax.grad(value_fn)(params, **batch),
            lambda: jax.tree.map(jnp.zeros_like, params),
        )

    assert set(_layouts(update, True, params, batch)) - {FAST}


@pytest.mark.heart
@pytest.mark.parametrize("strategy", ["scan", "vmap", 2])
def test_loops_over_convolutions_agree_with_unrolling(strategy):
    assert_close(_run(strategy), _run("unroll"))


@functools.cache
def _run(strategy):
    params, batch, value_fn = _network()
    f = flatopt.smooth_value_and_grad(
        value_fn,
        0.1,
        kernels.filterwise(),
        num_samples=4,
        batch_argnames=("images", "labels"),
        strategy=strategy,
    )
    return jax.jit(f)(jax.random.key(0), params, **batch)


def test_convolutions_out_of_reach_are_left_and_unrolled():
    params, batch, value_fn = _network()

    def looped(params, images, labels):
        def body(total, _):
            return total + jax.checkpoint(value_fn)(params, images, labels), None

        return jax.lax.scan(body, 0.0, None, length=2)[0]

    def text(value_fn):
        f = flatopt.smooth_value_and_grad(value_fn, 0.1, num_samples=4)
        return str(jax.make_jaxpr(f)(jax.random.key(0), params, **batch))

    assert text(looped).count("scan[") > 2  # four samples of two loops each
    f = flatopt.smooth_value_and_grad(looped, 0.1, num_samples=4, strategy="scan")
    g = flatopt.smooth_value_and_grad(looped, 0.1, num_samples=4, strategy="unroll")
    assert_close(
        jax.jit(f)(jax.random.key(0), params, **batch),
        jax.jit(g)(jax.random.key(0), params, **batch),
    )


def test_which_convolutions_are_slow_in_a_loop_on_cpu():
    params, batch, value_fn = _network()

    def looped(params):
        return jax.lax.scan(
            lambda total, _: (total + value_fn(params, **batch), None), 0.0, length=2
        )[0]

    def is_fast(function, *args, **options):
        _, jaxpr = jaxprs.trace(function, *args)
        return jaxprs.are_fast_in_loops(jaxpr, **options)

    plain = jax.grad(lambda params: value_fn(params, **batch))
    kept = jax.grad(jax.checkpoint(lambda params: value_fn(params, **batch)))
    assert is_fast(plain, params)
    assert not is_fast(kept, params)
    # Inside a loop that was traced here before they are rewritten already.
    traced, _ = jaxprs.trace(plain, params)
    assert is_fast(lambda p: jax.lax.map(lambda _: traced(p), jnp.arange(2)), params)
    # What counts is the way on CPU.
    assert is_fast(lambda p: platforms.choose(traced, kept, p), params)
    assert not is_fast(lambda p: platforms.choose(kept, traced, p), params)
    loops = jax.grad(looped)
    assert not is_fast(loops, params)
    assert is_fast(loops, params, apart_from=("scan",))
    beside = lambda params: (kept(params), loops(params))  # noqa: E731
    assert not is_fast(beside, params, apart_from=("scan",))


def test_what_cannot_be_rewritten_runs_as_jax_traced_it(monkeypatch):
    def broken(*args, **params):
        raise AttributeError("no such parameter")

    monkeypatch.setattr(jaxprs, "_convolution", broken)
    inputs, kernel = jnp.arange(16.0).reshape(1, 1, 4, 4), jnp.ones((1, 1, 2, 2))

    def run(inputs, kernel):
        return jax.lax.conv(inputs, kernel, (1, 1), "VALID")

    traced, _ = jaxprs.trace(run, inputs, kernel)
    with pytest.warns(
        UserWarning, match="layout that JAX gave them.*no such parameter"
    ):
        result = traced(inputs, kernel)
    sums = np.arange(16.0).reshape(4, 4)
    expected = sums[:3, :3] + sums[1:, :3] + sums[:3, 1:] + sums[1:, 1:]
    np.testing.assert_array_equal(result[0, 0], expected)


def test_the_precision_is_that_of_what_depends_on_the_parameters():
    def narrow_inside(x):
        return jax.jit(lambda y: jnp.sin(y.astype(jnp.bfloat16)))(x).astype(x.dtype)

    def narrow_beside(x):
        table = jnp.ones(3, jnp.bfloat16) * jnp.bfloat16(2)
        return x * table.astype(x.dtype)

    def dtypes(function):
        return jaxprs.float_dtypes(jax.make_jaxpr(function)(jnp.ones(3)).jaxpr)

    assert dtypes(narrow_inside) == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    assert dtypes(narrow_beside) == {jnp.dtype("float32")}


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_of_a_convolution_and_of_its_gradients(groups):
    """Two for each product: batch x places x outputs x (inputs of a group x window)."""
    images, kernel = jnp.ones((5, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def convolution(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def flops(function):
        return jaxprs.convolution_flops(jax.make_jaxpr(function)(images, kernel).jaxpr)

    one = 2 * 5 * 8 * 8 * 6 * (4 // groups * 3 * 3)
    assert flops(convolution) == [one]
    loss = lambda *args: convolution(*args).sum()  # noqa: E731
    assert flops(jax.jit(jax.grad(loss, argnums=(0, 1)))) == [one] * 3
