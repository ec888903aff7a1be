"""Differences at several steps: which are fitted, what comes out, what is told of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flatopt import curvature
from flatopt.curvature import _steps

STEPS, DIMENSION = _steps.STEPS, 200
fit = jax.jit(_steps.fit)


def differences(noise, cubic=0.0, fifth=0.0, seed=0):
    """The truth, and differences with errors of these sizes at step 1."""
    rng = np.random.default_rng(seed)
    truth, first, second = rng.normal(size=(3, DIMENSION)) / DIMENSION**0.5
    rounding = rng.normal(size=(len(STEPS), DIMENSION)) / DIMENSION**0.5
    rows = (
        truth
        + cubic * STEPS[:, None] ** 2 * first
        + fifth * STEPS[:, None] ** 4 * second
    )
    rows = rows + noise * rounding / STEPS[:, None]
    halves = np.split(rows, 2, axis=1)
    return truth, [jnp.asarray(x, jnp.float32) for x in halves]


def wrong_and_told(rows, truth, rounding, scale=1.0):
    product, weights, error = fit(rows, jnp.float32(rounding))
    found = np.concatenate([np.asarray(x, "f8") for x in product]) / scale
    return np.linalg.norm(found - truth), float(error) / scale, np.asarray(weights)


@pytest.mark.heart
@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_takes_all_steps_as_least_squares_does(seed):
    truth, rows = differences(noise=0.1, seed=seed)
    wrong, told, weights = wrong_and_told(rows, truth, 0.1)
    # numpy.polyfit weighs residuals, not their squares.
    own = np.polyfit(STEPS**2, np.eye(len(STEPS)), 1, w=STEPS)[1]
    np.testing.assert_allclose(weights, own, rtol=1e-5, atol=1e-6)
    assert wrong <= told <= 7 * wrong
    terms = np.stack([STEPS, STEPS**3], axis=1)
    deviation = 0.1 * np.linalg.inv(terms.T @ terms)[0, 0] ** 0.5
    np.testing.assert_allclose(wrong, deviation, rtol=0.3)


@pytest.mark.parametrize(("fifth", "largest"), [(1e-3, 4.0), (0.1, 1.0), (20.0, 0.5)])
def test_steps_go_that_are_off_by_more_than_rounding(fifth, largest):
    truth, rows = differences(noise=0.05, cubic=0.2, fifth=fifth)
    wrong, told, weights = wrong_and_told(rows, truth, 0.05)
    assert STEPS[weights != 0].max() <= largest
    assert wrong <= told
    every = np.concatenate([np.asarray(x, "f8") for x in rows], axis=1)
    assert wrong <= 1.01 * np.linalg.norm(_steps.WEIGHTS[-1] @ every - truth)


def test_more_rounding_than_is_known_is_seen():
    truth, rows = differences(noise=0.1)
    wrong, told, _ = wrong_and_told(rows, truth, 0.0)
    assert wrong <= told <= 10 * wrong


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    truth, rows = differences(noise=0.1)
    expected = wrong_and_told(rows, truth, 0.1)
    rows = [scale * x for x in rows]
    found = wrong_and_told(rows, truth, 0.1 * scale, scale)
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_what_is_not_finite_is_left_out(value, first):
    truth, rows = differences(noise=0.05)
    rows = [x.at[first:, 0].set(value) for x in rows]
    wrong, told, weights = wrong_and_told(rows, truth, 0.05)
    if first < 2:  # too few are left
        assert not np.isfinite(wrong)
    else:
        assert (weights[first:] == 0).all()
        assert wrong <= told


def test_differences_that_agree_give_that_product_and_no_error():
    rows = [jnp.ones((len(STEPS), 3)), jnp.zeros((len(STEPS), 2))]
    (ones, zeros), _, error = fit(rows, jnp.float32(0.0))
    np.testing.assert_allclose(ones, 1, rtol=1e-6)
    np.testing.assert_array_equal(zeros, 0)
    assert error == 0


def relu_network(params, inputs):
    for w in params[:-1]:
        inputs = jax.nn.relu(inputs @ w)
    return inputs @ params[-1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kinks_are_told(dtype):
    """Differences step over the kinks of a ReLU, where a gradient jumps."""
    rng = np.random.default_rng(0)
    shapes = (6, 16), (16, 16), (16, 4)
    params = [jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, "f4") for s in shapes]
    inputs, labels = jnp.asarray(rng.normal(size=(64, 6)), "f4"), rng.integers(0, 4, 64)

    def loss_fn(params, batch, dtype=jnp.float32):
        narrow = jax.tree.map(lambda x: x.astype(dtype), (params, batch[0]))
        logits = relu_network(*narrow).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    data = inputs, jnp.asarray(labels)
    exact = curvature.hessian(loss_fn, params, data)
    operator = curvature.finite_difference_hessian(
        lambda p, b: loss_fn(p, b, dtype), params, data
    )
    offs = []
    for _ in range(6):
        vector = [jnp.asarray(rng.normal(size=s), "f4") for s in shapes]
        truth = exact.matvec(vector)
        off = optax.tree.norm(optax.tree.sub(operator.matvec(vector), truth))
        assert off <= 1.2 * operator.product_error(vector)
        offs.append(off / optax.tree.norm(truth))
    assert max(offs) > 0.3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_few_digits_streamed_and_inside_jit_and_vmap(dtype):
    rng = np.random.default_rng(0)
    params = [
        jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, "f4") for s in ((6, 8), (8, 4))
    ]
    inputs = jnp.asarray(rng.normal(size=(48, 6)), "f4")
    labels = jnp.asarray(rng.integers(0, 4, 48))

    def loss_fn(params, batch, dtype=jnp.float32):
        first, second = (x.astype(dtype) for x in params)
        logits = jnp.tanh(batch[0].astype(dtype) @ first) @ second
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def narrow(params, batch):
        return loss_fn(params, batch, dtype)

    data = inputs, labels
    batches = [(inputs[:16], labels[:16]), (inputs[16:], labels[16:])]
    vector = [jnp.asarray(rng.normal(size=x.shape), "f4") for x in params]
    truth = curvature.hessian(loss_fn, params, data).matvec(vector)

    def check(found, told):
        off = optax.tree.norm(optax.tree.sub(found, truth))
        assert off <= told
        assert off <= 0.1 * optax.tree.norm(truth)

    def measure(params, vector):
        operator = curvature.finite_difference_hessian(narrow, params, data)
        return operator.matvec(vector), operator.product_error(vector)

    streamed = curvature.finite_difference_hessian(narrow, params, batches)
    check(streamed.matvec(vector), streamed.product_error(vector))
    check(*jax.jit(measure)(params, vector))
    pair = jax.tree.map(lambda x: jnp.stack([x, -x]), vector)
    found = jax.vmap(measure, in_axes=(None, 0))(params, pair)
    check(*jax.tree.map(lambda x: x[0], found))
    np.testing.assert_allclose(found[0][0][1], -found[0][0][0], rtol=1e-4, atol=1e-6)
