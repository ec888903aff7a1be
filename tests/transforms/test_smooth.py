"""smooth_gradients and skip_nonfinite in optax chains."""

import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_close,
    count_compilations,
    leaves_array,
    loss_fn,
    regression,
    types,
)

import flatopt
from flatopt import kernels, smooth_gradients


def _zeros(params):
    return optax.tree.zeros_like(params)


@pytest.mark.heart
def test_updates_are_the_gradient_of_smooth_value_and_grad_at_the_step_key():
    params, batch = regression()
    tx = smooth_gradients(
        0.1, kernels.filterwise(), num_samples=4, batch_argnames=("batch",), key=5
    )
    state = tx.init(params)
    f = flatopt.smooth_value_and_grad(
        loss_fn, 0.1, kernels.filterwise(), num_samples=4, batch_argnames=("batch",)
    )
    for step in range(3):
        updates, state = tx.update(
            _zeros(params), state, params, value_fn=loss_fn, batch=batch
        )
        key = jax.random.fold_in(jax.random.key(5), step)
        value, grads = f(key, params, batch=batch)
        assert_close(updates, grads)
        np.testing.assert_allclose(state.smoothed_value, value, rtol=1e-6)
        assert state.count == step + 1


def test_only_named_keywords_are_forwarded():
    def named(params, *, batch):
        return (params * batch).sum()

    def everything(params, **kwargs):
        assert sorted(kwargs) == ["batch", "unknown"]
        return (params * kwargs["batch"]).sum()

    tx = smooth_gradients(0.1)
    params = jnp.ones(2)
    for value_fn in (named, everything):
        updates, _ = tx.update(
            None,
            tx.init(params),
            params,
            value_fn=value_fn,
            batch=jnp.arange(2.0),
            unknown=3,
        )
        np.testing.assert_allclose(updates, [0.0, 1.0])


def test_scale_may_be_a_schedule_of_the_count():
    params = jnp.ones(3)
    tx = smooth_gradients(
        lambda count: 0.5 * count.astype(jnp.float32), antithetic=True
    )
    state = tx.init(params)
    for step in range(3):
        _, state = tx.update(
            None, state, params, value_fn=lambda p: jnp.sum((p - 1) ** 2)
        )
        assert (state.smoothed_value == 0) == (step == 0)


def test_same_key_same_noise_other_key_other_noise():
    params, batch = regression()

    def run(key):
        tx = smooth_gradients(0.1, key=key)
        return tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)[
            0
        ]

    assert_close(run(3), run(jax.random.key(3)), rtol=0, atol=0)
    assert np.abs(leaves_array(run(3)) - leaves_array(run(4))).max() > 1e-4
    generator = jax.random.key(3, impl="rbg")
    assert np.abs(leaves_array(run(3)) - leaves_array(run(generator))).max() > 1e-4


# Masks


@pytest.mark.parametrize(
    "mask",
    [
        {"first": False, "second": True},
        lambda p: {"first": False, "second": jax.tree.map(lambda _: True, p["second"])},
    ],
)
def test_masked_leaves_get_neither_noise_nor_gradient(mask):
    params, batch = regression()
    seen = []

    def value_fn(params, batch):
        seen.append(params["first"]["kernel"])
        return loss_fn(params, batch)

    def gradient(mask):
        tx = smooth_gradients(0.1, mask=mask)
        return tx.update(None, tx.init(params), params, value_fn=value_fn, batch=batch)[
            0
        ]

    masked = gradient(mask)
    assert jax.tree.structure(masked) == jax.tree.structure(params)
    np.testing.assert_array_equal(masked["first"]["kernel"], np.zeros((5, 4)))
    assert seen[0] is params["first"]["kernel"]
    assert jnp.all(masked["second"]["kernel"] != 0)

    only = kernels.masked(kernels.isotropic(), {"first": False, "second": True})
    unmasked = smooth_gradients(0.1, only)
    expected, _ = unmasked.update(
        None, unmasked.init(params), params, value_fn=loss_fn, batch=batch
    )
    assert_close(masked["second"], expected["second"])


@pytest.mark.heart
def test_functions_and_integers_may_be_masked_out_of_recipes():
    params = {"w": jnp.ones(2), "steps": jnp.arange(2), "activation": jnp.tanh}
    mask = {"w": True, "steps": False, "activation": False}
    tx = smooth_gradients(0.1, mask=mask)
    value_fn = lambda p: p["activation"](p["w"]).sum()  # noqa: E731
    updates, _ = tx.update(None, tx.init(params), params, value_fn=value_fn)
    assert jnp.all(updates["w"] != 0)

    arrays = {"w": jnp.ones(2), "steps": jnp.arange(2)}
    recipe = flatopt.lpf_sgd(
        0.1, num_samples=1, mask={"w": True, "steps": False}, batch_argnames=()
    )
    state = recipe.init(arrays)
    value_fn = lambda p: (p["w"] ** 2).sum()  # noqa: E731
    updates, new_state = recipe.update(None, state, arrays, value_fn=value_fn)
    assert types(updates) == types(arrays)
    assert types(new_state) == types(state)
    assert sum(x.size for x in jax.tree.leaves(optax.tree.get(state, "trace"))) == 2


def test_donating_the_state_leaves_the_users_key_alone():
    params, key = jnp.ones(2), jax.random.key(3)
    tx = smooth_gradients(0.1, key=key)

    def step(state):
        return tx.update(None, state, params, value_fn=lambda p: p.sum())[1]

    jax.jit(step, donate_argnums=0)(tx.init(params))
    jax.jit(step, donate_argnums=0)(tx.init(params))
    assert not key.is_deleted()


def test_integer_leaves_may_be_masked_out():
    params = {"w": jnp.ones(2), "steps": jnp.arange(3)}
    tx = smooth_gradients(0.1, mask={"w": True, "steps": False})
    updates, _ = tx.update(
        None,
        tx.init(params),
        params,
        value_fn=lambda p: p["w"].sum() * p["steps"].sum().astype(jnp.float32),
    )
    np.testing.assert_allclose(updates["w"], [3.0, 3.0])
    assert updates["steps"].dtype == params["steps"].dtype
    assert_close(optax.apply_updates(params, updates)["steps"], params["steps"])


# State


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_types_never_change(dtype, x64):
    params, batch = regression(dtype=jnp.dtype(dtype))
    tx = flatopt.lpf_sgd(0.1, 0.1)
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert types(jax.eval_shape(tx.init, shapes)) == types(state)
    found = jax.eval_shape(
        lambda s: tx.update(params, s, params, value_fn=loss_fn, batch=batch), state
    )
    assert types(found) == (types(params), types(state))


def test_state_goes_through_scan_cond_map_and_pickle():
    params = {"w": jnp.array([[0.5, -1.0], [2.0, 0.3]])}
    tx = flatopt.lpf_sgd(0.1, 0.1, 2, batch_argnames=())

    def value_fn(params):
        return jnp.sum(jnp.cos(params["w"]))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(_zeros(params), state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    looped = start
    for _ in range(4):
        looped, _ = step(looped, None)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=4))(start)
    assert_close(scanned, looped, rtol=1e-4)

    conditional = jax.jit(
        lambda c, go: jax.lax.cond(go, lambda c: step(c, None)[0], lambda c: c, c)
    )
    assert_close(conditional(start, True), step(start, None)[0], rtol=1e-4)
    assert_close(conditional(start, False), start)

    leaves, treedef = jax.tree.flatten(jax.tree.map(np.asarray, looped))
    restored = treedef.unflatten(pickle.loads(pickle.dumps(leaves)))
    assert_close(step(restored, None)[0], step(looped, None)[0], rtol=0, atol=0)
    buffer = io.BytesIO()
    np.savez(buffer, *leaves)  # no typed keys inside: NumPy can store the state


def test_init_accepts_placeholders_of_tree_map_params():
    params, _ = regression()
    tx = flatopt.lpf_sgd(0.1)
    state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(params))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_smoothed_value_is_read_by_optax():
    params, batch = regression()
    tx = flatopt.nso_sgd(0.1)
    state = tx.init(params)
    assert optax.tree.get(state, "smoothed_value") == jnp.inf
    _, state = tx.update(_zeros(params), state, params, value_fn=loss_fn, batch=batch)
    assert 0 < optax.tree.get(state, "smoothed_value") < 10


@pytest.mark.heart
def test_jitted_second_call_compiles_nothing():
    params, batch = regression()
    tx = flatopt.lpf_sgd(0.1)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            _zeros(params), state, params, value_fn=loss_fn, batch=batch
        )
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    with count_compilations() as compiled:
        step(params, state)
    assert not compiled


def test_inject_hyperparams_changes_the_scale_without_compiling():
    params, batch = regression()
    tx = optax.inject_hyperparams(smooth_gradients)(scale=0.0)
    recipe = optax.inject_hyperparams(flatopt.lpf_sgd)(learning_rate=0.1, gamma=0.0)
    fixed = optax.inject_hyperparams(
        lambda scale: smooth_gradients(scale, num_samples=2, antithetic=True)
    )(scale=0.0)
    for inner, name in ((tx, "scale"), (recipe, "gamma"), (fixed, "scale")):

        @jax.jit
        def step(state, inner=inner):
            return inner.update(
                _zeros(params), state, params, value_fn=loss_fn, batch=batch
            )

        state = inner.init(params)
        updates, state = step(state)
        state.hyperparams[name] = jnp.float32(0.2)
        with count_compilations() as compiled:
            other, _ = step(state)
        assert not compiled
        assert np.abs(leaves_array(other) - leaves_array(updates)).max() > 1e-4


# Non-finite values


def _bad_batch():
    params, batch = regression()
    bad = {**batch, "inputs": batch["inputs"].at[13, 2].set(jnp.nan)}
    return params, batch, bad


def test_skip_nonfinite_skips_the_step_and_draws_new_noise():
    params, batch, bad = _bad_batch()
    plain = flatopt.lpf_sgd(0.1, 0.1)
    tx = flatopt.skip_nonfinite(plain)
    state = tx.init(params)

    def update(state, batch):
        return tx.update(_zeros(params), state, params, value_fn=loss_fn, batch=batch)

    good, state = update(state, batch)
    skipped, after = update(state, bad)
    assert not leaves_array(skipped).any()
    assert after.num_skipped == 1
    smoothing, rest = after.inner_state
    before, rest_before = state.inner_state
    assert smoothing.count == before.count + 1
    assert jnp.isnan(smoothing.smoothed_value)
    assert_close(rest, rest_before, rtol=0, atol=0)
    resumed, final = update(after, batch)
    assert np.isfinite(leaves_array(resumed)).all()
    assert final.num_skipped == 1
    again, _ = update(state, batch)
    assert np.abs(leaves_array(resumed) - leaves_array(again)).max() > 1e-6


def test_apply_if_finite_guards_after_us_and_not_around_us(standard_promotion):
    params, _, bad = _bad_batch()

    def update(tx):
        return tx.update(
            _zeros(params), tx.init(params), params, value_fn=loss_fn, batch=bad
        )[0]

    after = optax.chain(smooth_gradients(0.1), optax.apply_if_finite(optax.sgd(0.1), 5))
    around = optax.apply_if_finite(
        optax.chain(smooth_gradients(0.1), optax.sgd(0.1)), 5
    )
    assert not leaves_array(update(after)).any()
    assert not np.isfinite(leaves_array(update(around))).all()


def test_anti_pgd_without_its_noise_follows_gradients_at_noisy_parameters():
    params, batch = regression()
    rate, scale, key = 0.2, 0.05, 4
    tx = optax.chain(optax.sgd(rate), flatopt.anti_pgd(scale, key=key))
    gradient = jax.jit(jax.grad(loss_fn))
    kernel = flatopt.kernels.isotropic()

    def noise(step):
        if step == 0:
            return optax.tree.zeros_like(params)
        drawn = kernel(jax.random.fold_in(jax.random.key(key), step), params)
        return optax.tree.scale(scale, drawn)

    point, state = params, tx.init(params)
    update = jax.jit(tx.update)
    for step in range(10):
        updates, state = update(gradient(params, batch), state, params)
        params = optax.apply_updates(params, updates)
        noisy = jax.tree.map(jnp.add, point, noise(step))
        point = jax.tree.map(lambda p, g: p - rate * g, point, gradient(noisy, batch))
    assert_close(params, jax.tree.map(jnp.add, point, noise(10)), atol=1e-5)
    with pytest.raises(AssertionError):
        assert_close(params, point, atol=1e-3)


def test_anti_pgd_leaves_masked_leaves_and_skipped_steps_alone():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    link = flatopt.anti_pgd(0.1, mask={"a": True, "b": False})
    tx = flatopt.skip_nonfinite(optax.chain(optax.sgd(0.1), link))
    zeros = optax.tree.zeros_like(params)
    state, point = tx.init(params), params
    for step in range(6):
        grads = jax.tree.map(lambda z, s=step: z + (jnp.nan if s == 2 else 0), zeros)
        updates, state = tx.update(grads, state, point)
        point = optax.apply_updates(point, updates)
    np.testing.assert_array_equal(point["b"], params["b"])
    # One noise of scale 0.1 and no more, though five steps were made.
    fifth = flatopt.kernels.isotropic()(
        jax.random.fold_in(jax.random.key(0), 5), params
    )
    np.testing.assert_allclose(point["a"], 1 + 0.1 * fifth["a"], rtol=1e-5)
    assert state.num_skipped == 1


def test_anti_pgd_wrong_arguments():
    with pytest.raises(ValueError, match="scale must be finite and not negative"):
        flatopt.anti_pgd(-1.0)
    with pytest.raises(TypeError, match="key must be an int or a single JAX random"):
        flatopt.anti_pgd(0.1, key=None)
    tx = flatopt.anti_pgd(0.1)
    with pytest.raises(ValueError, match="anti_pgd needs params, got None; call"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
