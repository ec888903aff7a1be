"""Zeroth-order smoothing against the gradient of the smoothed loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, types

import flatopt


def quartic(params):
    return jnp.sum(params**4)


def test_mean_is_the_gradient_of_the_smoothed_loss(x64):
    theta, sigma = jnp.array([0.5, -1.0]), 0.3
    keys = jax.random.split(jax.random.key(0), 20_000)

    def gradient(key):
        tx = flatopt.smooth_gradients_zeroth_order(sigma, key=key)
        return tx.update(None, tx.init(theta), theta, value_fn=quartic)[0]

    grads = np.asarray(jax.jit(jax.vmap(gradient))(keys))
    error = grads.std(axis=0, ddof=1) / np.sqrt(len(keys))
    expected = 4 * np.asarray(theta) ** 3 + 12 * sigma**2 * np.asarray(theta)
    assert np.all(np.abs(grads.mean(axis=0) - expected) < 5 * error)
    plain = 4 * np.asarray(theta) ** 3
    assert np.all(np.abs(grads.mean(axis=0) - plain) > 10 * error)


@pytest.mark.heart
@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", 2])
def test_it_is_its_formula_on_the_same_noise(strategy):
    theta, sigma, num_samples = jnp.array([0.5, -1.0, 2.0]), 0.3, 3
    tx = flatopt.smooth_gradients_zeroth_order(
        sigma, num_samples=num_samples, strategy=strategy, key=7
    )
    grads, state = jax.jit(
        lambda: tx.update(None, tx.init(theta), theta, value_fn=quartic)
    )()
    expected, values = np.zeros(3), []
    for j in range(num_samples):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), j)
        noise = np.asarray(flatopt.kernels.isotropic()(key, theta), "f8")
        ends = [np.sum((np.asarray(theta) + s * sigma * noise) ** 4) for s in (1, -1)]
        expected += (ends[0] - ends[1]) / (2 * sigma) * noise / num_samples
        values.append(np.mean(ends))
    np.testing.assert_allclose(grads, expected, rtol=1e-4)
    np.testing.assert_allclose(state.smoothed_value, np.mean(values), rtol=1e-5)


def test_it_takes_two_values_a_draw_and_no_gradient():
    calls = []

    def value_fn(params):
        calls.append(1)
        return jnp.round(1000 * jnp.sum(params**2)) / 1000  # gradient zero everywhere

    tx = flatopt.smooth_gradients_zeroth_order(0.5, num_samples=3)
    params = jnp.array([3.0, 4.0])
    grads, _ = tx.update(None, tx.init(params), params, value_fn=value_fn)
    assert len(calls) == 6
    assert jnp.vdot(grads, params) > 0


@pytest.mark.heart
def test_it_trains_and_keeps_types():
    params = {"w": jnp.array([2.0, -3.0], jnp.bfloat16), "frozen": jnp.arange(2)}
    tx = optax.chain(
        flatopt.smooth_gradients_zeroth_order(
            0.1, num_samples=16, mask={"w": True, "frozen": False}
        ),
        optax.masked(optax.sgd(0.1), {"w": True, "frozen": False}),
    )
    state = tx.init(params)

    def value_fn(params):
        return jnp.sum(params["w"].astype(jnp.float32) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    first = params
    for _ in range(40):
        new, new_state = step(params, state)
        assert types(new) == types(params)
        assert types(new_state) == types(state)
        params, state = new, new_state
    assert value_fn(params) < 0.1 * value_fn(first)
    assert_close(params["frozen"], first["frozen"])


def test_scale_zero_is_an_error():
    with pytest.raises(
        ValueError, match="scale must be greater than 0, got 0; differen"
    ):
        flatopt.smooth_gradients_zeroth_order(0.0)


@pytest.mark.parametrize("num_samples", [None, 3])
def test_a_donated_step_holds_one_parameter_size_more(num_samples):
    params = {f"w{i}": jnp.ones((256, 256)) for i in range(8)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tx = optax.chain(
        flatopt.smooth_gradients_zeroth_order(1e-3, num_samples=num_samples),
        optax.sgd(0.1),
    )
    state = tx.init(params)

    def value_fn(params, batch):
        for leaf in params.values():
            batch = jnp.tanh(batch @ leaf)
        return jnp.mean(batch**2)

    def step(params, state, batch):
        zeros = optax.tree.zeros_like(params)
        updates, state = tx.update(zeros, state, params, value_fn=value_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    def temporary(function, donated):
        jitted = jax.jit(function, donate_argnums=donated)
        lowered = jitted.lower(params, state, jnp.ones((2, 256)))
        return lowered.compile().memory_analysis().temp_size_in_bytes / size

    forward = temporary(lambda p, s, b: value_fn(p, b), ())
    assert temporary(step, (0, 1)) <= forward + 1.2
