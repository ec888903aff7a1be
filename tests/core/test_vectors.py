"""Norms of trees: every size, every mixture of precisions, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from flatopt._core import vectors


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
