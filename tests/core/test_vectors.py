"""Norms of trees: every size, every mixture of precisions, and their derivatives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from flatopt._core import blocks, filters, vectors


@pytest.mark.heart
@pytest.mark.parametrize("size", [1e-37, 1e-20, 1.0, 1e20, 1e37])
def test_a_norm_neither_underflows_nor_overflows(size):
    unit, length = vectors.normalize(
        {"a": jnp.float32([3 * size]), "b": jnp.float32(-4 * size)}
    )
    np.testing.assert_allclose(length, 5 * size, rtol=1e-6)
    assert_close(unit, {"a": np.array([0.6]), "b": np.array(-0.8)}, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-39, 1e-45])
def test_what_is_too_small_for_a_direction_has_none(value):
    for normalize in (vectors.normalize, jax.jit(vectors.normalize)):
        unit, length = normalize(jnp.full(3, value))
        np.testing.assert_array_equal(unit, 0)
        assert length == 0


@pytest.mark.heart
def test_precisions_may_be_mixed(x64):
    tree = {
        "wide": jnp.full(4, 1e-60, jnp.float64),
        "narrow": jnp.zeros(2, jnp.float32),
    }
    unit, length = vectors.normalize(tree)
    np.testing.assert_allclose(length, 2e-60, rtol=1e-12)
    np.testing.assert_allclose(unit["wide"], 0.5, rtol=1e-12)
    np.testing.assert_array_equal(unit["narrow"], 0)


def test_derivatives_are_those_of_calculus_and_zero_at_zero():
    point = np.array([3.0, 4.0])
    unit = point / 5
    jacobian = (np.eye(2) - np.outer(unit, unit)) / 5
    for transform in (jax.jacfwd, jax.jacrev):
        by_unit, by_length = transform(vectors.normalize)(jnp.float32(point))
        np.testing.assert_allclose(by_unit, jacobian, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(by_length, unit, rtol=1e-6)
        for derivative in transform(vectors.normalize)(jnp.zeros(2)):
            np.testing.assert_array_equal(derivative, 0)


SIZES = [1e-30, 1e-20, 1e-12, 1e-9, 1e-8, 1e-7, 1e-6, 1.0, 1e17, 1e18, 1e36]


@pytest.mark.parametrize("size", SIZES)
def test_norms_of_many_entries_are_those_of_float64(size):
    # On both sides of the sizes whose squares are in range, and must be read but once.
    values = np.random.default_rng(0).uniform(-size, size, 4000).astype("float32")
    exact = np.linalg.norm(values.astype("float64"))
    unit, length = jax.jit(vectors.normalize)(values)
    np.testing.assert_allclose(length, exact, rtol=1e-6)
    np.testing.assert_allclose(unit, values / exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("is_whole", [True, False])
def test_norms_of_large_filters_are_those_of_float64(is_whole):
    sizes = np.array([1.0, 1e-3, 5.0]) if is_whole else np.array([0.0, 1e-30, 1e30])
    values = np.random.default_rng(0).standard_normal((filters.LARGE, 3)) * sizes
    values = values.astype("float32")
    norms = jax.jit(filters.filter_norm(None), static_argnums=0)("kernel", values)
    exact = np.linalg.norm(values.astype("float64"), axis=0, keepdims=True)
    np.testing.assert_allclose(norms, exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_powers_of_two_are_at_or_below_the_largest_magnitude(dtype, x64):
    limits = np.finfo(dtype)
    exponents = np.random.default_rng(0).uniform(limits.minexp + 1, -limits.minexp, 200)
    values = np.array([1.0, -8.0, 0.75, limits.max, *2.0**exponents], dtype)
    least, most = limits.minexp + 1, -limits.minexp - 1
    exact = [2.0 ** np.clip(math.frexp(x)[1] - 1, least, most) for x in values]
    powers = jax.jit(jax.vmap(blocks.power_of_two))(values[:, None])
    np.testing.assert_array_equal(powers, exact)
    np.testing.assert_array_equal([blocks.power_of_two(x[None]) for x in values], exact)
    for value in (0.0, np.inf, np.nan):
        assert blocks.power_of_two(jnp.full(2, value, dtype)) == 1
