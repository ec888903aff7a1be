"""The monitor beside training, against closed forms on quadratics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt

HEAVY_BALL = optax.sgd(0.1, momentum=0.9)
CURVATURE = np.array([10.0, 4.0, 1.0])


def _loss(params, scale):
    return scale * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * params["p"] ** 2) / 2


@functools.cache  # a monitor compiles its own programs
def _watch(tx, num_steps=40, every=1):
    params = {"p": jnp.ones(3)}
    state, monitor = tx.init(params), flatopt.monitor(_loss, tx, every=every)

    @jax.jit
    def step(params, state):
        grads = jax.grad(_loss)(params, 1.0)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    extra = {}
    if getattr(tx.update, "makes_gradient", None):
        extra = {"value_fn": _loss, "scale": 1.0}
    results = []
    for _ in range(num_steps):
        with jax.numpy_dtype_promotion("standard"):  # of optax's own links
            params, state = step(params, state)
            results.append(monitor(params, state, scale=1.0))
    return results, params, state


@pytest.mark.heart
@pytest.mark.parametrize(
    ("tx", "top", "margin"),
    [
        (optax.sgd(0.1), 1.0, 2.0),
        (HEAVY_BALL, 1.0, 3.8),
        (optax.inject_hyperparams(optax.sgd)(0.05, momentum=0.5), 0.5, 6.0),
        (flatopt.nso_sgd(0.1), 1.0, 3.8),
    ],
)
def test_margins_are_those_of_the_chain_on_a_quadratic(tx, top, margin):
    results, *_ = _watch(tx)
    assert all(results)
    np.testing.assert_allclose(results[-1]["max_eigenvalue"], top, rtol=1e-4)
    np.testing.assert_allclose(results[-1]["eigenvalue_margin"], margin, rtol=1e-4)


def test_the_margin_of_adam_is_38_over_the_preconditioned_curvature():
    rate = 0.01
    results, _, state = _watch(optax.adam(rate))
    nu = np.asarray(optax.tree.get(state, "nu")["p"]) / (1 - 0.999**40)
    factor = 1 / ((1 - 0.9**40) * (np.sqrt(nu) + 1e-8))
    expected = 38 / rate / np.max(factor * CURVATURE)
    # The next step decays nu once more, and the last product is a step old.
    np.testing.assert_allclose(results[-1]["eigenvalue_margin"], expected, rtol=0.03)


def test_a_schedule_is_followed_and_a_start_at_zero_waited_out():
    tx = optax.sgd(optax.linear_schedule(0.0, 0.2, 40))
    results, *_ = _watch(tx)
    assert (
        np.isnan(results[0]["eigenvalue_margin"]) or results[0]["max_eigenvalue"] < 0.1
    )
    # The last measurement of curvature is after step 39, where the rate is 39 / 40 of 0.2.
    np.testing.assert_allclose(results[-1]["max_eigenvalue"], 10 * 0.195, rtol=0.02)


def test_the_critical_rate_is_that_of_the_next_update():
    results, params, state = _watch(HEAVY_BALL)
    slopes = CURVATURE * np.asarray(params["p"])
    update = -0.1 * (slopes + 0.9 * np.asarray(state[0].trace["p"]))
    expected = -2 * (slopes @ update) / (update**2 @ CURVATURE)
    found = results[-1]["critical_rate"]
    if expected <= 0:
        assert found == 0
    else:
        np.testing.assert_allclose(found, expected, rtol=1 / 16)


def test_between_measurements_nothing_is_measured():
    results, *_ = _watch(optax.sgd(0.1), num_steps=9, every=4)
    assert [found is not None for found in results] == [True, *[False] * 3] * 2 + [True]


def test_an_optimizer_that_is_not_linear_has_curvature_without_a_margin():
    results, *_ = _watch(optax.lion(1e-3))
    np.testing.assert_allclose(results[-1]["max_eigenvalue"], 10, rtol=1e-3)
    assert np.isnan(results[-1]["eigenvalue_margin"])
    assert results[-1]["critical_rate"] > 0


def test_a_negative_eigenvalue_of_the_largest_size_leaves_no_margin():
    def loss_fn(params):
        return jnp.sum(jnp.array([3.0, -5.0]) * params**2) / 2

    tx, params = optax.sgd(0.1), jnp.ones(2)
    found = flatopt.monitor(loss_fn, tx, every=1)(params, tx.init(params))
    np.testing.assert_allclose(found["max_eigenvalue"], -0.5, rtol=1e-2)
    assert np.isnan(found["eigenvalue_margin"])


def test_errors():
    with pytest.raises(TypeError, match="value_fn must be a function"):
        flatopt.monitor(0.1, optax.sgd(0.1))
    with pytest.raises(TypeError, match="tx must be"):
        flatopt.monitor(_loss, optax.sgd)
    with pytest.raises(ValueError, match="every"):
        flatopt.monitor(_loss, optax.sgd(0.1), every=0)
