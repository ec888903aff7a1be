"""Precision and memory: bfloat16, donation, rematerialization, accumulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import assert_close, loss_fn, regression
from optax.microbatching import AccumulationType, microbatch

import flatopt
from flatopt import kernels

STEP = 2.0**-7
"""Distance between neighbouring bfloat16 numbers in [1, 2)."""


def _on_the_grid(num):
    """Numbers of bfloat16 well inside [1, 2)."""
    steps = jax.random.randint(jax.random.key(0), (num,), 32, 96)
    return (1 + STEP * steps.astype(jnp.float32)).astype(jnp.bfloat16)


def _rounded(params):
    """The parameters that a bfloat16 network sees, in float32.

    Under jit XLA may drop the rounding of float32 to bfloat16 and back.
    """
    return jax.lax.reduce_precision(params.astype(jnp.float32), 8, 7)


def _half_square(params, centre):
    return jnp.sum((_rounded(params) - centre) ** 2) / 2


# bfloat16 parameters


@jax.jit
def _filters_and_units(key, params):
    draws = kernels.filterwise(), kernels.isotropic()
    return [draw(key, params)["w"] for draw in draws]


@pytest.mark.heart
@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll"])
def test_noise_is_float32_and_rounded_once(strategy):
    params = {"w": jax.random.normal(jax.random.key(1), (40, 5), jnp.bfloat16)}
    key = jax.random.key(2)

    def value_fn(params):
        return jnp.sum(params["w"].astype(jnp.float32)), params

    f = flatopt.smooth_value_and_grad(
        value_fn,
        0.3,
        kernels.filterwise(),
        num_samples=2,
        antithetic=True,
        has_aux=True,
        strategy=strategy,
    )
    (_, moved), grads = jax.jit(f)(key, params)
    assert moved["w"].dtype == grads["w"].dtype == jnp.bfloat16
    wide = np.asarray(params["w"], np.float32)
    lengths = np.linalg.norm(wide.astype(np.float64), axis=0)
    for j in range(2):
        noise, unit = _filters_and_units(jax.random.fold_in(key, j), params)
        assert noise.dtype == jnp.float32
        np.testing.assert_allclose(noise, np.asarray(unit) * lengths, rtol=1e-6)
        for i, sign in enumerate((1, -1)):
            step = np.float32(0.3) * np.asarray(noise)
            expected = (wide + sign * step).astype(jnp.bfloat16)
            # One ulp of float32 before the rounding may turn a tie.
            unequal = np.asarray(moved["w"][j, i]) != expected
            assert unequal.mean() <= 0.01


@pytest.mark.parametrize("strategy", ["vmap", "scan", 32])
def test_gradients_of_many_samples_are_added_in_float32(strategy):
    num_samples = 512
    naive = jax.lax.fori_loop(
        0, num_samples, lambda _, t: t + jnp.bfloat16(1), jnp.bfloat16(0)
    )
    assert naive == 256  # where bfloat16 stops counting

    def value_fn(params, batch):
        return (params * batch.astype(params.dtype)).sum()

    f = flatopt.smooth_value_and_grad(
        value_fn,
        0.1,
        num_samples=num_samples,
        batch_argnames=("batch",),
        strategy=strategy,
    )
    params = jnp.zeros((), jnp.bfloat16)
    batch = jnp.repeat(jnp.array([1.0, 3.0]), num_samples // 2)
    value, grads = jax.jit(f)(jax.random.key(0), params, batch=batch)
    assert grads.dtype == jnp.bfloat16
    assert grads == 2
    # The losses are not alike, and their mean is that of the noise.
    assert 0 < abs(float(value)) < 5 * 0.1 * (5 / num_samples) ** 0.5


def test_noise_under_half_a_rounding_step_moves_nothing():
    params = _on_the_grid(1000)

    def moves(scale):
        f = flatopt.smooth_value_and_grad(
            lambda p: (_half_square(p, 0.0), p),
            scale,
            kernels.isotropic(kernels.signs),
            has_aux=True,
        )
        (_, moved), grads = jax.jit(f)(jax.random.key(0), params)
        return jnp.abs(moved[0].astype(jnp.float32) - params.astype(jnp.float32)), grads

    distance, grads = moves(0.49 * STEP)
    np.testing.assert_array_equal(distance, 0.0)
    np.testing.assert_array_equal(grads, params)  # the plain gradient, bit for bit
    distance, _ = moves(0.51 * STEP)
    np.testing.assert_array_equal(distance, STEP)


def _moments(ratio):
    """Second and fourth moment of noise of ``ratio`` steps, rounded to whole steps."""
    k = np.arange(-200, 201)
    upper, lower = ((k + sign * 0.5) / ratio for sign in (1, -1))
    mass = scipy.stats.norm.cdf(upper) - scipy.stats.norm.cdf(lower)
    return [np.sum((k / ratio) ** power * mass) for power in (2, 4)]


@pytest.mark.parametrize("ratio", [0.15, 0.25, 0.5, 1.0, 3.0])
def test_the_variance_that_bfloat16_keeps_follows_its_formula(ratio):
    params = _on_the_grid(60_000)
    smoothed = jax.jit(flatopt.smooth(_half_square, ratio * STEP))
    penalty = smoothed(jax.random.key(3), params, params.astype(jnp.float32))
    measured = 2 * penalty / params.size / (ratio * STEP) ** 2
    kept, fourth = _moments(ratio)
    assert abs(measured - kept) < 5 * np.sqrt((fourth - kept**2) / params.size)
    assert (abs(kept - 1) < 0.15) == (ratio >= 1)


def test_float32_parameters_keep_the_noise_of_a_bfloat16_model():
    num, scale = 100_000, 0.2 * STEP
    params = jax.random.uniform(jax.random.key(4), (num,), minval=1.25, maxval=1.75)

    def share(params):
        """The smoothing effect of a model computed in bfloat16, over that wanted."""
        centre = params.astype(jnp.float32)

        def value_fn(params):
            return _half_square(params, centre)

        smoothed = flatopt.smooth(value_fn, scale, num_samples=16, strategy="scan")
        effect = jax.jit(smoothed)(jax.random.key(5), params) - value_fn(params)
        return 2 * effect / num / scale**2

    np.testing.assert_allclose(share(params), 1.0, atol=0.05)
    rounded = params.astype(jnp.bfloat16)
    kept, _ = _moments(0.2)
    np.testing.assert_allclose(share(rounded), kept, atol=0.05)
    assert kept < 0.35


# Donation

CHAINS = {
    "lpf_sgd": flatopt.lpf_sgd(0.1, 0.1),
    "trees in the state": optax.chain(
        flatopt.track_stability(0.1, 64, every=2),
        flatopt.friendly_sam_gradients(0.1),
        optax.sgd(0.1, momentum=0.9),
        flatopt.anti_pgd(0.1),
    ),
}


def _num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.heart
@pytest.mark.parametrize("name", CHAINS)
def test_donated_parameters_and_state_are_reused_in_place(name):
    params, batch = regression()
    tx = CHAINS[name]

    def step(params, state, batch):
        zeros = optax.tree.zeros_like(params)
        updates, state = tx.update(zeros, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    expected = params, tx.init(params)
    given = jax.tree.map(jnp.copy, expected)
    kept = jax.jit(step)
    donated = jax.jit(step, donate_argnums=(0, 1)).lower(*given, batch).compile()
    # Loss and scale of the last step are written but not read, and so no arguments.
    unread = 8
    aliased = donated.memory_analysis().alias_size_in_bytes
    assert aliased == _num_bytes(given) - unread
    for _ in range(3):
        expected = kept(*expected, batch)
        before, given = given, donated(*given, batch)
        left = [leaf for leaf in jax.tree.leaves(before) if not leaf.is_deleted()]
        assert _num_bytes(left) == unread
    assert_close(given, expected, rtol=0, atol=0)


# Rematerialization: a deep network, whose activations are most of the memory

DEPTH, WIDTH, EXAMPLES = 24, 16, 256


def _deep_problem():
    keys = jax.random.split(jax.random.key(6), 2)
    layers = jax.random.normal(keys[0], (DEPTH, WIDTH, WIDTH)) / WIDTH**0.5
    return {"layers": layers}, jax.random.normal(keys[1], (EXAMPLES, WIDTH))


def _deep_loss(params, batch, *, remat=False):
    def layer(hidden, weights):
        return jnp.tanh(hidden @ weights), None

    body = jax.checkpoint(layer) if remat else layer
    return jnp.mean(jax.lax.scan(body, batch, params["layers"])[0] ** 2)


def _compile(f, *args, **kwargs):
    compiled = jax.jit(f).lower(*args, **kwargs).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def _hand_written_lpf(key, params, batch, num_samples):
    grads = []
    for j in range(num_samples):
        noise = kernels.isotropic()(jax.random.fold_in(key, j), params)
        moved = jax.tree.map(lambda p, u: p + 0.05 * u, params, noise)
        grads.append(jax.grad(_deep_loss)(moved, batch[j::num_samples]))
    return jax.tree.map(lambda *g: sum(g) / num_samples, *grads)


def _sampled_memory(value_fn, num_samples=2):
    params, batch = _deep_problem()
    key = jax.random.key(7)
    f = flatopt.smooth_value_and_grad(
        value_fn,
        0.05,
        num_samples=num_samples,
        batch_argnames=("batch",),
        strategy="scan",
    )
    compiled, temporary = _compile(f, key, params, batch=batch)
    return compiled(key, params, batch=batch)[1], temporary


def test_rematerialized_layers_spare_memory_and_change_nothing():
    params, batch = _deep_problem()
    plain, most = _sampled_memory(_deep_loss)
    layers, less = _sampled_memory(functools.partial(_deep_loss, remat=True))
    whole, _ = _sampled_memory(jax.checkpoint(_deep_loss))
    expected = jax.jit(_hand_written_lpf, static_argnums=3)(
        jax.random.key(7), params, batch, 2
    )
    for grads in (plain, layers, whole):
        assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    activation = EXAMPLES // 2 * WIDTH * 4
    assert less < most - (DEPTH // 2) * activation


def test_rematerialized_losses_keep_their_keywords():
    @jax.checkpoint
    def value_fn(params, batch, *, sample_key):
        kept = jax.random.bernoulli(sample_key, 0.5, batch.shape)
        return jnp.sum(params[None] * jnp.where(kept, batch, 0.0))

    tx = flatopt.smooth_gradients(0.1, num_samples=2, batch_argnames=("batch",))
    params = jnp.ones(3)
    updates, _ = jax.jit(
        lambda batch: tx.update(
            None, tx.init(params), params, value_fn=value_fn, batch=batch, other=1
        )
    )(jnp.full((200, 3), 2.0))
    # 100 examples a chunk, half of them kept, each 2.
    np.testing.assert_allclose(updates, 100.0, atol=5 * 2 * 5 / 2**0.5)
    assert np.unique(updates).size > 1


# Gradient accumulation


def test_chunks_of_a_batch_accumulate_its_gradient_in_less_memory():
    params, batch = _deep_problem()
    compiled, whole = _compile(jax.grad(_deep_loss), params, batch)
    f = flatopt.smooth_value_and_grad(
        _deep_loss,
        0.0,
        num_samples=8,
        batch_argnames=("batch",),
        strategy="scan",
    )
    key = jax.random.key(0)
    chunked, parts = _compile(f, key, params, batch=batch)
    assert_close(
        chunked(key, params, batch=batch)[1], compiled(params, batch), rtol=1e-4
    )
    assert parts < 0.4 * whole


def _pair_by_hand(key, params, batch):
    noise = kernels.isotropic()(jax.random.fold_in(key, 0), params)
    return jax.tree.map(
        lambda a, b: (a + b) / 2,
        *[
            jax.grad(_deep_loss)(
                jax.tree.map(lambda p, u, s=s: p + s * 0.05 * u, params, noise), batch
            )
            for s in (1, -1)
        ],
    )


def test_microbatches_around_a_pair_share_its_noise():
    params, batch = _deep_problem()
    key = jax.random.key(8)
    f = flatopt.smooth_value_and_grad(_deep_loss, 0.05, antithetic=True)
    compiled, whole = _compile(f, key, params, batch)
    small, parts = _compile(
        microbatch(f, argnums=2, microbatch_size=32, accumulator=AccumulationType.MEAN),
        key,
        params,
        batch,
    )
    expected = jax.jit(_pair_by_hand)(key, params, batch)
    assert_close(compiled(key, params, batch)[1], expected, rtol=1e-4)
    assert_close(small(key, params, batch)[1], expected, rtol=1e-4)
    assert parts < 0.4 * whole


def test_microbatches_inside_the_loss_serve_every_link():
    params, batch = _deep_problem()
    value_fn = microbatch(
        jax.checkpoint(_deep_loss),
        argnums=(),
        argnames="batch",
        microbatch_size=32,
        accumulator=AccumulationType.MEAN,
    )

    def update(tx, value_fn, params, batch):
        state = tx.init(params)
        return tx.update(None, state, params, value_fn=value_fn, batch=batch)[0]

    smooth = flatopt.smooth_gradients(0.05, antithetic=True, key=8)
    key = jax.random.fold_in(jax.random.key(8), 0)
    expected = jax.jit(_pair_by_hand)(key, params, batch)
    found, parts = _compile(functools.partial(update, smooth, value_fn), params, batch)
    _, whole = _compile(functools.partial(update, smooth, _deep_loss), params, batch)
    assert_close(found(params, batch), expected, rtol=1e-4)
    assert parts < 0.4 * whole


def test_multi_steps_after_the_noise_averages_its_gradients(standard_promotion):
    params, batch = jax.tree.map(np.asarray, regression())
    tx = optax.chain(
        flatopt.smooth_gradients(0.1, key=2),
        optax.MultiSteps(optax.sgd(0.5), 3).gradient_transformation(),
    )
    update = jax.jit(functools.partial(tx.update, value_fn=loss_fn))

    @jax.jit
    def gradient(step, chunk):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), step), 0)
        noise = kernels.isotropic()(key, params)
        moved = jax.tree.map(lambda p, u: p + 0.1 * u, params, noise)
        return jax.grad(loss_fn)(moved, chunk)

    state, grads = tx.init(params), []
    for step in range(3):
        chunk = jax.tree.map(lambda x, s=step: x[s::4], batch)
        updates, state = update(None, state, params, batch=chunk)
        grads.append(jax.device_get(gradient(step, chunk)))
    expected = jax.tree.map(lambda *g: -0.5 * sum(g) / 3, *grads)
    assert_close(updates, expected, rtol=1e-4)
