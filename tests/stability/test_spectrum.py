"""Linearizations of larger problems: fewer parameters than outputs, some directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import stability
from flatopt.stability import _spectrum


def _problem(n, c, d, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.geomspace(3, 0.1, d)
    inputs = jnp.asarray(rng.normal(size=(n, d)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(d, c)) * scales[:, None], jnp.float32)
    targets = jnp.asarray(rng.normal(size=(n, c)), jnp.float32)

    def model_fn(params, inputs):
        return jnp.tanh(inputs * params["scale"][None]) @ params["out"]

    params = {"scale": jnp.asarray(scales, jnp.float32) / 3, "out": weights}
    return model_fn, params, inputs, targets


def _close(found, expected):
    for name in ("eigenvalues", "gradient_norm", "reducible_loss", "loss"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-4, err_msg=name
        )


@pytest.mark.heart
def test_fewer_parameters_than_outputs_give_the_same_linearization(monkeypatch):
    problem = _problem(40, 3, 5)
    expected = stability.linearize(*problem)
    monkeypatch.setattr(_spectrum, "MANY_OUTPUTS", 0)
    monkeypatch.setattr(_spectrum, "_of_few_outputs", None)  # not called
    found = stability.linearize(*problem, chunk_size=7)
    _close(found, expected)
    # Coordinates up to a sign of each direction: the examples' inner products.
    grams = [
        np.einsum("ncr,mdr->ncmd", *2 * [np.asarray(x.coordinates, "f8")])
        for x in (found, expected)
    ]
    np.testing.assert_allclose(*grams, atol=1e-4 * np.abs(grams[1]).max())
    limits = [stability.thresholds(x, 2).mean_square for x in (found, expected)]
    np.testing.assert_allclose(*limits, rtol=1e-4)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_some_directions_are_the_sharpest_and_bound_the_threshold(preconditioned):
    model_fn, params, inputs, targets = _problem(20, 2, 30)
    factors = None
    if preconditioned:
        factors = jax.tree.map(lambda p: 0.5 + jnp.abs(p), params)
    data = model_fn, params, inputs, targets
    whole = stability.linearize(*data, preconditioner=factors)
    found = stability.linearize(*data, preconditioner=factors, num_directions=12)
    np.testing.assert_allclose(found.eigenvalues, whole.eigenvalues[:12], rtol=1e-4)
    np.testing.assert_allclose(found.gradient_norm, whole.gradient_norm, rtol=1e-4)
    assert found.reducible_loss == found.loss  # what is known for sure
    rows = np.asarray(whole.coordinates, "f8")
    own = np.linalg.eigvalsh(np.einsum("ncr,ndr->ncd", rows, rows))[:, -1].max()
    np.testing.assert_allclose(found.largest_example, own, rtol=1e-4)
    if preconditioned:
        return
    for batch_size in (1, 4, 20):
        exact = stability.thresholds(whole, batch_size)
        bounds = stability.thresholds(found, batch_size)
        np.testing.assert_allclose(bounds.sufficient, exact.sufficient, rtol=1e-4)
        assert exact.sufficient <= exact.mean_square * (1 + 1e-5)
        assert exact.mean_square <= bounds.mean_square * (1 + 1e-5)
        rate = 1.2 * exact.mean_square
        assert (
            stability.growth_rate(found, rate, batch_size)
            <= stability.growth_rate(whole, rate, batch_size) + 1e-5
        )
        assert set(bounds.rates) == {"gradient_descent", "mean_square", "sufficient"}


@pytest.mark.parametrize("sampling", ["with_replacement", "bernoulli"])
def test_the_sufficient_rate_is_never_above_the_exact_one(sampling):
    for seed in range(5):
        lin = stability.linearize(*_problem(6, 2, 4, seed))
        for batch_size in (1, 3, 6):
            found = stability.thresholds(lin, batch_size, sampling=sampling)
            assert found.sufficient <= found.mean_square * (1 + 1e-5)


def test_what_needs_all_directions_says_so():
    lin = stability.linearize(*_problem(20, 2, 30), num_directions=4)
    calls = {
        "alignment": lambda: stability.alignment(lin),
        "losses": lambda: stability.expected_losses(lin, 0.1, 2, 3),
        "smallest_batch_size": lambda: stability.smallest_batch_size(lin, 0.1),
        "stationary_covariance": lambda: stability.stationary_covariance(lin, 0.1, 2),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} needs a linearization of all"):
            call()
    with pytest.raises(ValueError, match="num_directions must be an int"):
        stability.linearize(*_problem(20, 2, 30), num_directions=0)
