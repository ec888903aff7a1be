"""Transposed sums of matrix products: what is rewritten, what is left, and the values."""

import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import curvature
from flatopt._core import jaxprs


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def scanned(params, x):
    return jnp.sum(
        jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0] ** 2
    )


def rematerialized(params, x):
    layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
    for w in params:
        x = layer(x, w)
    return jnp.sum(x**2)


def heads(params, x):
    """Kernels of several axes, as those of attention."""
    into, out = params
    x = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, into))
    return jnp.sum(jnp.tanh(jnp.einsum("bthk,hkd->btd", x, out)) ** 2)


def grouped(params, x):
    """A matrix for each group: products with a batch axis."""
    for w in params:
        x = jnp.tanh(jnp.einsum("gbd,gde->gbe", x, w))
    return jnp.sum(x**2)


CASES = {
    "dense": (dense, [normal((3, 4), 0), normal((4, 5), 1), normal((5, 2), 2)], (6, 3)),
    "scanned": (scanned, normal((3, 4, 4), 0), (6, 4)),
    "rematerialized": (rematerialized, [normal((4, 4), i) for i in range(3)], (6, 4)),
    "heads": (heads, [normal((6, 2, 3), 0), normal((2, 3, 6), 1)], (2, 5, 6)),
    "grouped": (grouped, [normal((2, 3, 4), 0), normal((2, 4, 3), 1)], (2, 6, 3)),
}


def products_of(loss, params, x):
    _, product = jax.linearize(jax.grad(lambda p: loss(p, x)), params)
    return product


def count(jaxpr, name, made=()):
    """Transposes of what one of ``made`` has made, in a jaxpr and its bodies."""
    makers = {v: e.primitive.name for e in jaxpr.eqns for v in e.outvars}
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            found += makers.get(equation.invars[0]) in made
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += count(inner, name, made)
    return found


@pytest.mark.heart
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_jax_without_transposed_sums(name):
    loss, params, shape = CASES[name]
    x = normal(shape, 7)
    product = products_of(loss, params, x)
    vector = jax.tree.map(lambda p: normal(p.shape, 8), params)
    swapped = jaxprs.swap_factors(product, params)
    before = jax.make_jaxpr(product)(vector).jaxpr
    after = jax.make_jaxpr(swapped)(vector).jaxpr
    assert count(before, "transpose", ("add_any",)) > 0
    assert count(after, "transpose", ("add_any",)) == 0
    for one, other in zip(
        jax.tree.leaves(swapped(vector)), jax.tree.leaves(product(vector)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)
    operator = curvature.hessian(loss, params, x)
    dense_truth = jax.jvp(jax.grad(lambda p: loss(p, x)), (params,), (vector,))[1]
    for one, other in zip(
        jax.tree.leaves(operator.matvec(vector)),
        jax.tree.leaves(dense_truth),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)


def test_a_sum_that_is_read_elsewhere_stays():
    def both(pair):
        y = pair[0] @ pair[1]
        return y.T, y

    pair = normal((3, 4), 0), normal((4, 5), 1)
    _, product = jax.linearize(both, pair)
    swapped = jaxprs.swap_factors(product, pair)
    assert count(jax.make_jaxpr(swapped)(pair).jaxpr, "transpose", ("add_any",)) == 1
    transposed, whole = swapped(pair)
    np.testing.assert_allclose(whole, 2 * pair[0] @ pair[1], rtol=1e-5)
    np.testing.assert_array_equal(transposed, whole.T)


def test_xla_alone_copies_a_transposed_sum():
    loss, params, shape = CASES["dense"]
    product = products_of(loss, params, normal(shape, 7))
    swapped = jaxprs.swap_factors(product, params)

    def copies(function):
        text = jax.jit(function).lower(params).compile().as_text()
        return len(re.findall(r" transpose\(", text))

    assert copies(swapped) < copies(product)
