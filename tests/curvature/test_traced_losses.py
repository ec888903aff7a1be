"""Losses that hold what ``jax.vmap`` or ``jax.jit`` traces, while nothing else is traced."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from flatopt import curvature, sharpness

KEY = jax.random.key(0)
SCALES = jnp.array([1.0, 3.0])
SIZE = 20


def _operator(scale, make=curvature.hessian, data=None):
    """Its matrix is 2 scale I."""
    return make(lambda p, *batch: scale * jnp.sum(p**2), jnp.ones(SIZE), data)


DEFLATED = ("trace", "probe", "diagonal")
MEASURES = {
    "product": lambda o: o.quadratic_form(jnp.ones(SIZE)),
    "dense": lambda o: jnp.trace(o.dense()),
    "trace": lambda o: curvature.trace(o, KEY, 4, num_deflated=2).value,
    "trace without deflation": lambda o: (
        curvature.trace(o, KEY, 4, num_deflated=0).value
    ),
    "probe": lambda o: curvature.probe(o, KEY, 9, num_deflated=2).trace.value,
    "probe without deflation": lambda o: jnp.sum(
        curvature.probe(o, KEY, 4, num_deflated=0).diagonal.value
    ),
    "diagonal": lambda o: jnp.sum(curvature.diagonal(o, KEY, 12).value),
    "whole diagonal": lambda o: jnp.sum(curvature.diagonal(o, KEY, 3 * SIZE).value),
    "xtrace": lambda o: curvature.xtrace(o, KEY, 4).value,
    "block_lanczos": lambda o: SIZE * curvature.block_lanczos(o, KEY).values[0],
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_work_under_vmap(name):
    if name == "xtrace":
        pytest.importorskip("matfree")
    measure = lambda scale: MEASURES[name](_operator(scale))  # noqa: E731
    found = jax.vmap(measure)(SCALES)
    # Signs estimate an identity without an error, but for what deflation takes of them.
    assert_close(found, 2 * SIZE * SCALES, rtol=0.2 if name in DEFLATED else 1e-4)
    assert_close(found[1], measure(SCALES[1]), rtol=1e-4)


@pytest.mark.heart
def test_differences_under_vmap():
    def measure(scale):
        operator = _operator(scale, curvature.finite_difference_hessian)
        vector = jnp.ones(SIZE)
        probed = curvature.probe(operator, KEY, 4, num_deflated=0).trace.value
        return operator.matvec(vector), operator.product_error(vector), probed

    found, error, probed = jax.vmap(measure)(SCALES)
    wrong = np.linalg.norm(found - 2 * SCALES[:, None], axis=1)
    assert (wrong <= error).all()
    assert_close(probed, 2 * SIZE * SCALES, rtol=1e-3)


def test_gradients_of_examples_under_vmap():
    """Their matrix is scale^2 times the mean of x x^T."""
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)

    def measure(scale):
        loss_fn = lambda p, batch: scale * jnp.mean(batch @ p)  # noqa: E731
        operator = curvature.empirical_fisher(loss_fn, jnp.ones(3), batch)
        return curvature.trace(operator, KEY, 4).value

    truth = SCALES**2 * jnp.sum(batch**2) / 5
    assert_close(jax.vmap(measure)(SCALES), truth, rtol=1e-4)


def _sharpness(measure, **options):
    def of(scale):
        loss_fn = lambda p, batch: scale * jnp.mean((batch @ p) ** 2)  # noqa: E731
        return measure(loss_fn, jnp.ones(2), data=jnp.eye(2), **options)

    return of


def _of_batches(measure, *arguments):
    batches = [jnp.ones(1), jnp.ones(2)]
    return lambda scale: measure(_operator(scale, data=batches), *arguments)


REFUSED = {
    "eigenpairs": lambda s: curvature.eigenpairs(_operator(s), KEY),
    "spectral_density": lambda s: curvature.spectral_density(_operator(s), KEY),
    "report": lambda s: curvature.report(_operator(s), KEY),
    "probe with rtol": lambda s: curvature.probe(_operator(s), KEY, rtol=0.1),
    "trace with rtol": lambda s: curvature.trace(_operator(s), KEY, rtol=0.1),
    "batches": _of_batches(curvature.trace, KEY),
    "eigenpairs of batches": _of_batches(curvature.eigenpairs, KEY),
    "population": _of_batches(curvature.population_frobenius_norm, KEY),
    "sharpness.report": _sharpness(sharpness.report, key=KEY),
    "worst_case": _sharpness(sharpness.worst_case, key=KEY, rho=0.1),
    "epsilon": _sharpness(sharpness.epsilon_sharpness),
    "entropy": _sharpness(sharpness.local_entropy_gradient, key=KEY),
    "fisher_rao": _sharpness(sharpness.fisher_rao_hessian),
    "pac_bayes": _sharpness(
        sharpness.pac_bayes, key=KEY, initial_params=jnp.zeros(2), num_examples=2
    ),
}


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("transform", [jax.vmap, lambda f: lambda s: jax.jit(f)(s[0])])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_host_decides_says_so_in_one_sentence(name, transform):
    with pytest.raises(TypeError) as caught:
        transform(REFUSED[name])(SCALES)
    assert re.fullmatch(r"[^\n]* got [^\n]*(jit|vmap)[^\n]*\.", str(caught.value))
    assert "/flatopt/" in str(caught.traceback[-1].path)
