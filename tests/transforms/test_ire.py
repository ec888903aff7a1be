"""Larger steps along flat coordinates, against NumPy."""

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
)

import flatopt

RATE, KAPPA = 0.2, 1.5


def _flags(grads, sharp_share):
    """Which coordinates are flat: by sorting all magnitudes together."""
    flat = np.concatenate([np.abs(grads[name]).ravel() for name in sorted(grads)])
    count = int(np.round((1 - sharp_share) * flat.size))
    threshold = np.sort(flat)[count - 1] if count else -1.0
    return {name: np.abs(g) <= threshold for name, g in grads.items()}


@pytest.mark.heart
@pytest.mark.parametrize("sharp_share", [0.0, 0.2, 0.5, 1.0])
def test_twenty_steps_follow_the_formula(sharp_share, x64):
    params, inputs, labels = softmax_regression()
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    inputs = inputs.astype(jnp.float64)
    x, y = np.asarray(inputs), np.asarray(labels)
    expected = {k: np.asarray(v) for k, v in params.items()}
    tx = optax.chain(optax.sgd(RATE), flatopt.ire(KAPPA, sharp_share, every=3))
    state = tx.init(params)

    @jax.jit
    def update(params, state):
        data = {"inputs": inputs, "labels": labels}
        grads = jax.grad(softmax_loss)(params, **data)
        updates, state = tx.update(grads, state, params, value_fn=softmax_loss, **data)
        return optax.apply_updates(params, updates), state

    for step in range(20):
        params, state = update(params, state)
        g = softmax_gradient(expected, x, y)
        if step % 3 == 0:
            flags = _flags(g, sharp_share)
        for name in expected:
            rate = RATE * np.where(flags[name], 1 + KAPPA, 1)
            expected[name] = expected[name] - rate * g[name]
            np.testing.assert_array_equal(state[1].is_flat[name], flags[name])
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_ties_and_sizes_of_the_gradient(size):
    slope = size * jnp.array([0.0, 0.0, 1.0, 1.0, 2.0, 5.0])
    tx = flatopt.ire(KAPPA, 0.5)
    params = jnp.zeros(6)
    updates, _ = tx.update(
        jnp.ones(6), tx.init(params), params, value_fn=lambda p: jnp.sum(slope * p)
    )
    # Three are wanted; the fourth ties with the third.
    np.testing.assert_allclose(updates, [2.5, 2.5, 2.5, 2.5, 1, 1])


def test_a_measurement_that_is_not_finite_is_left_out():
    tx = flatopt.ire(KAPPA, 0.5, every=1)
    params = jnp.array([1.0, 2.0])

    def update(state, factor):
        return tx.update(
            jnp.ones(2), state, params, value_fn=lambda p: factor * jnp.sum(p**2)
        )

    _, state = update(tx.init(params), 1.0)
    for bad in (jnp.nan, jnp.inf):
        updates, state = update(state, bad)
        np.testing.assert_allclose(updates, [2.5, 1.0])


def test_leaves_masked_out_are_not_measured_and_stay():
    params, batch = regression()
    tx = flatopt.ire(KAPPA, 0.0, mask={"first": False, "second": True})
    ones = optax.tree.ones_like(params)
    updates, state = tx.update(
        ones, tx.init(params), params, value_fn=loss_fn, batch=batch
    )
    assert state.is_flat["first"]["kernel"] is None
    np.testing.assert_array_equal(updates["first"]["kernel"], 1)
    np.testing.assert_array_equal(updates["second"]["kernel"], 1 + KAPPA)


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_measure_their_batches_together(check_vma):
    params, batch = regression()
    ones = optax.tree.ones_like(params)

    def update(params, batch, axis_name=None):
        tx = flatopt.ire(KAPPA, 0.5, axis_name=axis_name)
        return tx.update(ones, tx.init(params), params, value_fn=loss_fn, batch=batch)

    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda params, batch: update(params, batch, "data"),
        mesh=mesh,
        in_specs=(spec(), spec("data")),
        out_specs=spec(),
        check_vma=check_vma,
    )
    assert_close(jax.jit(mapped)(params, batch), jax.jit(update)(params, batch))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_updates_keep_their_type(dtype):
    params, batch = regression(16, jnp.dtype(dtype))
    tx = flatopt.ire(2.0, 0.0)
    ones = jax.tree.map(np.ones_like, params)
    update = jax.jit(
        lambda s: tx.update(ones, s, params, value_fn=loss_fn, batch=batch)[0]
    )
    updates = update(tx.init(params))
    for leaf in jax.tree.leaves(updates):
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf, "f4"), 3.0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kappa": -1.0}, ValueError, "kappa must be finite and not negative, got -1"),
        ({"sharp_share": 1.5}, ValueError, "sharp_share must be between 0 and 1, got"),
        ({"sharp_share": "x"}, TypeError, "sharp_share must be a number"),
        ({"every": 0}, ValueError, "every must be an int of at least 1, got 0"),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        flatopt.ire(**{"kappa": 1.0, "sharp_share": 0.5, **options})
