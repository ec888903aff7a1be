"""The tracker against dense Hessians; it changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, loss_fn, regression, types

import flatopt

RNG = np.random.default_rng(0)
Q, _ = np.linalg.qr(RNG.normal(size=(30, 30)))
VALUES = np.r_[10.0, 4.0, np.linspace(0, 1, 28)]
MATRIX = jnp.asarray((Q * VALUES) @ Q.T, jnp.float32)


def quadratic(params):
    return params @ MATRIX @ params / 2


def _run(tx, params, num_steps, value_fn=quadratic, **extra):
    @jax.jit
    def update(state):
        grads = jax.tree.map(jnp.ones_like, params)
        return tx.update(grads, state, params, value_fn=value_fn, **extra)

    state = tx.init(params)
    for _ in range(num_steps):
        updates, state = update(state)
    return updates, state


def test_values_converge_to_those_of_the_hessian_and_margins_follow():
    tx = flatopt.track_stability(0.1, 16, every=1, decay=0.98)
    updates, state = _run(tx, jnp.ones(30), 400)
    np.testing.assert_array_equal(updates, np.ones(30))
    np.testing.assert_allclose(state.max_eigenvalue, 10, rtol=1e-3)
    np.testing.assert_allclose(state.trace, VALUES.sum(), rtol=0.2)
    norm = np.linalg.norm(VALUES)
    np.testing.assert_allclose(state.frobenius_norm, norm, rtol=0.2)
    np.testing.assert_allclose(state.eigenvalue_margin, 20 / 10, rtol=1e-3)
    margin = 4 / 0.1 / state.frobenius_norm
    np.testing.assert_allclose(state.frobenius_margin, margin, rtol=1e-5)


def test_it_measures_at_every_few_steps_alone_and_compiles_once():
    calls = []

    def value_fn(params):
        calls.append(1)
        return quadratic(params)

    tx = flatopt.track_stability(optax.constant_schedule(0.1), 16, every=4)
    params = jnp.ones(30)
    state = tx.init(params)
    changes = []
    for _ in range(9):
        before = state
        calls.clear()
        _, state = tx.update(jnp.ones(30), state, params, value_fn=value_fn)
        changes.append(bool(jnp.any(state.direction != before.direction)))
        assert bool(calls) == (int(before.count) % 4 == 0)
    assert changes == [True, *[False] * 7, True]  # the fifth was a probe
    step = jax.jit(lambda s: tx.update(params, s, params, value_fn=quadratic)[1])
    step(state)
    with count_compilations() as compiled:
        step(state)
    assert not compiled


def test_training_is_the_same_with_it():
    params, batch = regression()
    for base in (optax.sgd(0.1, momentum=0.9), flatopt.lpf_sgd(0.1)):
        found = []
        for tx in (base, optax.chain(flatopt.track_stability(0.1, 64, every=2), base)):
            point, state = params, tx.init(params)
            for _ in range(4):
                updates, state = tx.update(
                    jax.grad(loss_fn)(point, batch),
                    state,
                    point,
                    value_fn=loss_fn,
                    batch=batch,
                )
                point = optax.apply_updates(point, updates)
            found.append(point)
        for one, other in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        assert optax.tree.get(state, "max_eigenvalue") > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_types_never_change(dtype, x64):
    params, batch = regression(16, jnp.dtype(dtype))
    tx = flatopt.track_stability(0.1, 16)
    state = tx.init(params)
    new = jax.eval_shape(
        lambda s: tx.update(params, s, params, value_fn=loss_fn, batch=batch)[1], state
    )
    assert types(new) == types(state)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((-0.1, 8), ValueError, "learning_rate must be finite and not negative"),
        ((0.1, 0), ValueError, "batch_size must be an int of at least 1, got 0"),
        ((0.1, 8, 0), ValueError, "every must be an int of at least 1, got 0"),
        ((0.1, 8, 5, 1.0), ValueError, "decay must be less than 1, got 1.0"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    names = ("learning_rate", "batch_size", "every", "decay")
    with pytest.raises(error, match=match):
        flatopt.track_stability(**dict(zip(names, arguments, strict=False)))
    tx = flatopt.track_stability(0.1, 8)
    with pytest.raises(ValueError, match="track_stability needs value_fn, which was"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
