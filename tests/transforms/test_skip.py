"""Skipped steps: those that optax skips on the same gradients, with any optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TRANSFORMATIONS, assert_close, takes, transformation

import flatopt

BAD = (1, 4)  # steps with a loss or a gradient that is not finite
STEPS = 8
FOLLOWERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1),
    "sign_sgd": optax.sign_sgd(0.1),
    "signs of an average": optax.chain(
        optax.ema(0.9, debias=False), optax.scale_by_sign(), optax.scale(-0.1)
    ),
    "rmsprop": optax.rmsprop(0.1),
    "adagrad": optax.adagrad(0.1),
    "clip and adam": optax.chain(optax.clip(1.0), optax.adam(0.1)),
    "clip by norm and sgd": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "lamb": optax.lamb(0.1),
    "yogi": optax.yogi(0.1),
    "adafactor": optax.adafactor(0.1),
    "schedule in the state": optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0.01, 10)
    ),
    "masked": optax.masked(optax.adam(0.1), {"a": True, "b": False}),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1)),
    "nothing": optax.identity(),
}
BADNESS = {"nan": jnp.nan, "inf": jnp.inf, "-inf": -jnp.inf}


def _loss(params, factor):
    a, b = params["a"], params["b"]
    return factor * jnp.sum(a**2) / 2 + jnp.sum(jnp.cos(b))


def _gradient(params, factor):
    return {"a": factor * params["a"], "b": -jnp.sin(params["b"])}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_the_steps_are_those_of_apply_if_finite(name, standard_promotion):
    link = flatopt.smooth_gradients(0.0) if len(name) % 2 else flatopt.sam_gradients(0)
    tx = flatopt.skip_nonfinite(optax.chain(link, FOLLOWERS[name]))
    reference = optax.apply_if_finite(FOLLOWERS[name], 100)
    start = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([1.0, 2.0])}

    @jax.jit
    def step(params, state, expected, own_state, factor):
        updates, state = tx.update(None, state, params, value_fn=_loss, factor=factor)
        params = optax.apply_updates(params, updates)
        updates, own_state = reference.update(
            _gradient(expected, factor), own_state, expected
        )
        return params, state, optax.apply_updates(expected, updates), own_state

    carry = start, tx.init(start), start, reference.init(start)
    for index in range(STEPS):
        bad = [jnp.inf, jnp.nan][BAD.index(index)] if index in BAD else 1.0
        carry = step(*carry, jnp.float32(bad))
    params, state, expected, own_state = carry
    assert_close(params, expected, rtol=1e-5, atol=1e-5)
    assert int(state.num_skipped) == int(own_state.total_notfinite) == len(BAD)
    kept = [x for x in jax.tree.leaves(own_state.inner_state) if x.dtype == jnp.float32]
    found = jax.tree.leaves(state.inner_state[1])
    assert_close([x for x in found if x.dtype == jnp.float32], kept, 1e-4, 1e-5)


@pytest.mark.parametrize("bad", BADNESS)
@pytest.mark.parametrize(
    "name", [n for n in TRANSFORMATIONS if takes(n, "rho") or takes(n, "scale")]
)
def test_every_link_says_that_its_gradient_is_not_finite(name, bad):
    # A clip bounds what comes out: nothing but the link itself can tell.
    row = TRANSFORMATIONS[name]
    if row.is_last or row.is_optimizer:
        return
    tx = flatopt.skip_nonfinite(
        optax.chain(transformation(name), optax.clip(1.0), optax.scale(-1.0))
    )
    params = jnp.array([3.0, 4.0])
    state = tx.init(params)

    def update(state, factor):
        return tx.update(
            None, state, params, value_fn=lambda p: factor * jnp.sum(p**2) / 2
        )

    updates, after = update(state, BADNESS[bad])
    np.testing.assert_array_equal(updates, 0)
    assert after.num_skipped == 1
    link = after.inner_state[0]
    assert link.count == 1
    assert not np.isfinite(flatopt.loss(after))
    if hasattr(link, "memory"):
        assert_close(link.memory, state.inner_state[0].memory)
    updates, after = update(after, 1.0)
    assert (updates < 0).all()
    assert after.num_skipped == 1


@pytest.mark.heart
def test_a_loss_that_overflows_with_finite_gradients_is_skipped():
    tx = flatopt.skip_nonfinite(flatopt.sam_sgd(0.1))
    params = jnp.ones(2)
    updates, state = tx.update(
        None, tx.init(params), params, value_fn=lambda p: p.sum() + jnp.inf
    )
    np.testing.assert_array_equal(updates, 0)
    assert state.num_skipped == 1
    assert flatopt.loss(state) == jnp.inf


def test_infinities_that_were_in_the_state_skip_nothing(standard_promotion):
    plateau = optax.contrib.reduce_on_plateau()  # its best value starts at infinity
    late = optax.conditionally_transform(
        flatopt.sam_gradients(0.0), lambda step: step >= 2
    )
    tx = flatopt.skip_nonfinite(optax.chain(late, optax.sgd(0.1), plateau))
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(
            jnp.ones(2), state, params, value_fn=jnp.sum, value=jnp.float32(1)
        )
        np.testing.assert_allclose(updates, -0.1)
    assert state.num_skipped == 0


def test_states_of_integers_of_keys_and_of_nothing_pass():
    mask = {"w": True, "n": False}
    tx = flatopt.skip_nonfinite(flatopt.nso_sgd(0.1, mask=mask))
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    updates, state = tx.update(
        None, tx.init(params), params, value_fn=lambda p: jnp.nan * p["w"].sum()
    )
    np.testing.assert_array_equal(updates["w"], 0)
    np.testing.assert_array_equal(updates["n"], 0)
    assert updates["n"].dtype == params["n"].dtype
    assert state.num_skipped == 1
    empty = flatopt.skip_nonfinite(optax.identity())
    assert empty.update({}, empty.init({}), {})[1].num_skipped == 0


@pytest.mark.heart
def test_one_inside_of_another_counts_its_own():
    inner = flatopt.skip_nonfinite(flatopt.sam_sgd(0.1))
    blowing_up = optax.stateless(lambda updates, _: optax.tree.scale(jnp.inf, updates))
    tx = flatopt.skip_nonfinite(optax.chain(inner, blowing_up))
    params = jnp.ones(2)
    state = tx.init(params)
    for factor in (1.0, jnp.nan):
        _, state = tx.update(
            None, state, params, value_fn=lambda p, f=factor: f * jnp.sum(p**2)
        )
    assert state.inner_state[0].num_skipped == 1  # the second step
    assert state.num_skipped == 2  # inf, and inf times zero


def test_the_flag_is_made_where_it_is_read_alone():
    params = jnp.ones(2)
    assert flatopt.sam_gradients(0.1).init(params).is_finite == ()
    guarded = flatopt.skip_nonfinite(flatopt.sam_gradients(0.1)).init(params)
    assert guarded.inner_state.is_finite.dtype == bool
    assert flatopt.sam_gradients(0.1).init(params).is_finite == ()


def test_a_bad_step_is_skipped_around_accumulation(standard_promotion):
    inner = flatopt.accumulate(flatopt.sam_gradients(0.0), optax.sgd(0.1), 1)
    tx = flatopt.skip_nonfinite(inner)
    params = jnp.array([3.0, 4.0])
    state = tx.init(params)
    found = []
    for factor in (1.0, jnp.nan, 1.0):
        updates, state = tx.update(
            jnp.zeros(2),
            state,
            params,
            value_fn=lambda p, f=factor: f * jnp.sum(p**2) / 2,
        )
        found.append(updates)
    np.testing.assert_allclose(found, [-0.1 * params, [0, 0], -0.1 * params], rtol=1e-6)
    assert state.num_skipped == 1
