"""Operators in the forms that SciPy and other libraries of JAX take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from flatopt import curvature


def _problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)
    targets = jnp.asarray(rng.normal(size=(12, 2)), jnp.float32)
    params = {
        "w": jnp.asarray(rng.normal(size=(4, 2)), dtype),
        "b": jnp.asarray(rng.normal(size=2), dtype),
    }

    def loss_fn(params, batch):
        inputs, targets = batch
        outputs = jnp.tanh(inputs @ params["w"].astype(jnp.float32))
        return jnp.mean(
            (outputs + params["b"].astype(jnp.float32)[None] - targets) ** 2
        )

    return loss_fn, params, (inputs, targets)


def _operators():
    loss_fn, params, batch = _problem()
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    return {
        "whole": curvature.hessian(loss_fn, params, batch),
        "streamed": curvature.hessian(loss_fn, params, parts),
        "fisher": curvature.empirical_fisher(loss_fn, params, batch),
    }


@pytest.mark.heart
@pytest.mark.parametrize("name", ["whole", "streamed", "fisher"])
def test_flat_and_scipy_are_the_dense_matrix(name):
    operator = _operators()[name]
    dense = np.asarray(operator.dense())
    product, like = operator.flat()
    assert like.shape == (10,)
    vectors = np.random.default_rng(1).normal(size=(10, 3)).astype("f4")
    for vector in vectors.T:
        found = product(jnp.asarray(vector))
        np.testing.assert_allclose(found, dense @ vector, rtol=1e-4, atol=1e-5)
    linear = operator.to_scipy()
    assert linear.shape == (10, 10)
    for found in (linear @ vectors, linear.T @ vectors):
        np.testing.assert_allclose(found, dense @ vectors, rtol=1e-4, atol=1e-5)
    top = scipy.sparse.linalg.eigsh(linear, k=2, return_eigenvectors=False)
    expected = np.linalg.eigvalsh(dense)
    largest = expected[np.argsort(-np.abs(expected))[:2]]
    np.testing.assert_allclose(np.sort(top), np.sort(largest), rtol=1e-3)


def test_vectors_are_wide_where_parameters_are_narrow():
    loss_fn, params, batch = _problem(jnp.bfloat16)
    product, like = curvature.hessian(loss_fn, params, batch).flat()
    assert like.dtype == jnp.float32
    assert product(jnp.ones(10)).dtype == jnp.float32
    assert jax.jit(product)(jnp.ones(10)).shape == (10,)
