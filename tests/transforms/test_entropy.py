"""Entropy-SGD against its algorithm in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_close,
    loss_fn,
    regression,
    softmax_gradient,
    softmax_loss,
    softmax_regression,
    types,
)

import flatopt
from flatopt import kernels


def _noise(params, step, index):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), step), index)
    like = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}
    noise = kernels.isotropic()(key, like)
    return {name: np.asarray(leaf, "f8") for name, leaf in noise.items()}


@pytest.mark.parametrize("split", [False, True])
def test_ten_steps_follow_the_algorithm(split, x64):
    gamma, steps, rate, scale, decay = 0.3, 4, 0.2, 0.05, 0.75
    params, inputs, labels = softmax_regression()
    params = {name: leaf.astype(jnp.float64) for name, leaf in params.items()}
    inputs = inputs.astype(jnp.float64)
    tx = optax.chain(
        flatopt.entropy_sgd_gradients(
            lambda count: gamma * 1.1 ** count.astype(jnp.float64),
            steps,
            rate,
            scale,
            decay,
            batch_argnames=("inputs", "labels") if split else (),
            key=3,
        ),
        optax.sgd(0.7),
    )
    expected = {name: np.asarray(leaf) for name, leaf in params.items()}

    @jax.jit
    def update(params, state):
        updates, state = tx.update(
            None, state, params, value_fn=softmax_loss, inputs=inputs, labels=labels
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for step in range(10):
        params, state = update(params, state)
        point, mean = dict(expected), dict(expected)
        for index in range(steps):
            rows = slice(index, None, steps) if split else slice(None)
            grads = softmax_gradient(
                point, np.asarray(inputs)[rows], np.asarray(labels)[rows]
            )
            noise = _noise(expected, step, index)
            for name in point:
                pull = gamma * 1.1**step * (point[name] - expected[name])
                point[name] = (
                    point[name]
                    - rate * (grads[name] + pull)
                    + np.sqrt(rate) * scale * noise[name]
                )
                mean[name] = decay * mean[name] + (1 - decay) * point[name]
        for name in expected:
            expected[name] = expected[name] - 0.7 * (expected[name] - mean[name])
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-7, atol=1e-8)


@pytest.mark.heart
def test_on_a_quadratic_without_noise_the_walk_has_a_closed_form():
    # theta' - theta shrinks to the minimum of L + gamma/2 |.|^2.
    curvature, gamma = 2.0, 0.5
    tx = flatopt.entropy_sgd_gradients(gamma, 400, 0.1, 0.0, decay=0.9)
    params = jnp.array([3.0])
    updates, state = jax.jit(
        lambda state: tx.update(
            None, state, params, value_fn=lambda p: curvature * jnp.sum(p**2) / 2
        )
    )(tx.init(params))
    np.testing.assert_allclose(
        updates, params * curvature / (curvature + gamma), rtol=1e-5
    )
    assert state.clean_value == 9.0


def test_gradient_counts_are_exact():
    params, batch = regression()
    calls = []

    def value_fn(params, batch):
        calls.append(len(batch["targets"]))
        return loss_fn(params, batch)

    for names, expected in (((), [64] * 4), (("batch",), [16] * 4)):
        calls.clear()
        tx = flatopt.entropy_sgd_gradients(num_steps=4, batch_argnames=names)
        tx.update(None, tx.init(params), params, value_fn=value_fn, batch=batch)
        assert calls == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_types_never_change(dtype, x64):
    params, batch = regression(16, jnp.dtype(dtype))
    tx = flatopt.entropy_sgd_gradients(num_steps=2)
    state = tx.init(params)
    found = jax.eval_shape(
        lambda s: tx.update(None, s, params, value_fn=loss_fn, batch=batch), state
    )
    assert types(found) == (types(params), types(state))


@pytest.mark.heart
def test_jit_and_eager_agree_and_masked_leaves_stay():
    params, batch = regression()
    tx = flatopt.entropy_sgd_gradients(
        1e-2, 3, noise_scale=0.1, mask={"first": False, "second": True}
    )

    def update(state):
        return tx.update(None, state, params, value_fn=loss_fn, batch=batch)

    updates, _ = update(tx.init(params))
    assert_close(jax.jit(update)(tx.init(params))[0], updates)
    np.testing.assert_array_equal(updates["first"]["kernel"], np.zeros((5, 4)))
    assert jnp.all(updates["second"]["kernel"] != 0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gamma": -1}, ValueError, "gamma must be finite and not negative, got -1"),
        ({"num_steps": 0}, ValueError, "num_steps must be an int of at least 1, got 0"),
        ({"inner_learning_rate": -1}, ValueError, "inner_learning_rate must be finite"),
        ({"noise_scale": True}, TypeError, "noise_scale must be a number or a scalar"),
        ({"decay": 1.0}, ValueError, "decay must be less than 1, got 1.0; it is the"),
        ({"batch_argnames": "batch"}, TypeError, "batch_argnames must be a tuple of"),
        ({"key": 0.5}, TypeError, "key must be an int or a single JAX random key"),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        flatopt.entropy_sgd_gradients(**options)


def test_wrong_arguments_of_update():
    params = jnp.ones(2)
    tx = flatopt.entropy_sgd_gradients(num_steps=3, batch_argnames=("batch",))
    state = tx.init(params)
    with pytest.raises(ValueError, match="entropy_sgd_gradients needs value_fn"):
        tx.update(None, state, params)
    with pytest.raises(ValueError, match="which value_fn does not take"):
        tx.update(None, state, params, value_fn=lambda p: p.sum())
    with pytest.raises(ValueError, match="a batch of 4 examples does not divide"):
        tx.update(
            None,
            state,
            params,
            value_fn=lambda p, batch: (batch @ p).mean(),
            batch=jnp.ones((4, 2)),
        )
