"""Optimizers with slots against the dense second moment of the real optax chains."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import linear_outputs

import flatopt
from flatopt import stability
from flatopt.stability._checks import SAMPLINGS


def _ema(rate):
    return optax.chain(optax.ema(0.8), optax.scale_by_learning_rate(rate))


def _coupled(rate):
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate, momentum=0.9))


def _decoupled(rate):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.trace(0.9),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(rate),
    )


OPTIMIZERS = {
    "plain": optax.sgd,
    "heavy ball": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "moving average": _ema,
    "coupled decay": _coupled,
    "decoupled decay": _decoupled,
    "two slots": lambda rate: optax.chain(
        optax.trace(0.5), optax.trace(0.6), optax.scale(-rate)
    ),
    "lpf_sgd": flatopt.lpf_sgd,
    "nso_sgd": flatopt.nso_sgd,
}


def _batches(n, size, sampling):
    """All batches, as example indices, with their probabilities."""
    if sampling == "without_replacement":
        found = list(itertools.combinations(range(n), size))
        return found, np.full(len(found), 1 / len(found))
    if sampling == "with_replacement":
        found = list(itertools.product(range(n), repeat=size))
        return found, np.full(len(found), 1 / len(found))
    found = [b for k in range(n + 1) for b in itertools.combinations(range(n), k)]
    share = size / n
    return found, np.array(
        [share ** len(b) * (1 - share) ** (n - len(b)) for b in found]
    )


@functools.partial(jax.jit, static_argnums=0)
def _columns(optimizer, rate, hessian, moments):
    """One real step of a chain at tiny units of (parameters, slots)."""
    tx, d = optimizer(rate), len(hessian)
    leaves, structure = jax.tree.flatten(tx.init(jnp.zeros(d)))
    places = [i for i, x in enumerate(leaves) if x.shape == (d,)]
    settled = [
        jnp.asarray(10**6, x.dtype) if jnp.issubdtype(x.dtype, jnp.signedinteger) else x
        for x in leaves
    ]
    if moments is not None:
        settled[places.pop()] = moments / 0.999  # a step decays them

    def step(z):
        state = list(settled)
        for i, part in zip(places, z[1:], strict=True):
            state[i] = part
        grads = hessian @ z[0]
        extra = {}
        if isinstance(tx, optax.GradientTransformationExtraArgs):
            extra = {"value_fn": lambda p, batch: p @ jax.lax.stop_gradient(grads)}
            extra["batch"] = jnp.zeros(8)
        state = jax.tree.unflatten(structure, state)
        updates, new = tx.update(grads, state, z[0], **extra)
        new = jax.tree.leaves(new)
        return jnp.stack([z[0] + updates, *(new[i] for i in places)])

    k = 1 + len(places)
    return jax.vmap(step)(UNIT * jnp.eye(k * d).reshape(-1, k, d)).reshape(-1, k * d)


UNIT = 1e-20  # where clipping and Adam's own decay of squares are not at work


def _chain_matrix(optimizer, rate, hessian, moments=None):
    """The matrix of one real step of a chain on (parameters, slots), by its columns.

    Slots are the floating vectors of the state; with ``moments`` the last one is Adam's
    second moments, held at these.
    """
    with jax.numpy_dtype_promotion("standard"):  # of optax.ema
        return np.asarray(_columns(optimizer, rate, hessian, moments)).T / UNIT


def _dense(optimizer, rate, jacobian, size, sampling, moments=None):
    """The second moment's operator of the real chain, on the span of the rows."""
    n, _, d = jacobian.shape
    scales = np.ones(d) if moments is None else 1 / (np.sqrt(moments) + 1e-8)
    rows = jacobian.reshape(-1, d) * scales  # updates are in this span
    basis = np.linalg.svd(rows, full_matrices=False)
    basis = basis[2][basis[1] > 1e-9]
    # A step is affine in the Hessian: two Hessians tell the rest.
    zero = _chain_matrix(optimizer, rate, np.zeros((d, d)), moments)
    k = len(zero) // d
    right = _chain_matrix(optimizer, rate, np.eye(d), moments) - zero
    found = 0.0
    for batch, share in zip(*_batches(n, size, sampling), strict=True):
        part = jacobian[list(batch)].reshape(-1, d)
        hessian = part.T @ part / size
        whole = np.zeros((k * d, k * d))
        whole[:d, :d] = hessian
        step = zero + right @ whole
        slots_basis = _slots_basis(basis, k, moments)
        step = slots_basis[0] @ step @ slots_basis[1]
        found = found + share * np.kron(step, step)
    return found


def _slots_basis(basis, k, moments):
    """Left and right bases of the subspace in which updates and slots stay."""
    if moments is None:
        both = np.kron(np.eye(k), basis)
        return both, both.T
    scales = np.sqrt(moments) + 1e-8
    # The parameters move in P times the span of the gradients, the averages in the span.
    spans = [basis.T, np.linalg.qr(scales[:, None] * basis.T)[0]]
    whole = np.zeros((k * len(scales), k * basis.shape[0]))
    for i in range(k):
        d, r = len(scales), basis.shape[0]
        whole[i * d : (i + 1) * d, i * r : (i + 1) * r] = spans[min(i, 1)]
    return whole.T, whole


def _growth(operator):
    return np.abs(np.linalg.eigvals(operator)).max()


def _linear(jacobian, dtype=jnp.float32, preconditioner=None):
    n, c, d = jacobian.shape
    return stability.linearize(
        linear_outputs,
        jnp.zeros(d, dtype),
        jnp.asarray(jacobian, dtype),
        jnp.zeros((n, c), dtype),
        preconditioner=preconditioner,
    )


@pytest.mark.heart
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_threshold_and_growth_equal_the_dense_operator_of_the_real_chain(
    name, sampling, x64
):
    optimizer = OPTIMIZERS[name]
    shape = (5, 1, 3) if sampling == "bernoulli" else (4, 2, 3)
    jacobian = np.random.default_rng(len(name)).normal(size=shape)
    lin = _linear(jacobian, jnp.float64)
    asked = dict(sampling=sampling, optimizer=optimizer)
    limit = stability.thresholds(lin, 2, **asked).mean_square
    for factor, is_stable in ((0.999, True), (1.001, False), (0.3, True), (3.0, False)):
        rate = factor * limit
        dense = _growth(_dense(optimizer, rate, jacobian, 2, sampling))
        assert (dense <= 1) == is_stable
        found = stability.growth_rate(lin, rate, 2, **asked)
        np.testing.assert_allclose(found, dense, rtol=1e-7)


@pytest.mark.parametrize("shape", [(5, 1, 8), (4, 3, 5), (5, 2, 5)])
def test_float32_and_deficient_rows_keep_five_digits(shape):
    jacobian = np.random.default_rng(3).normal(size=shape)
    jacobian[1] = 2 * jacobian[0]  # rank below the number of outputs and of parameters
    for name in ("heavy ball", "nesterov", "coupled decay"):
        optimizer = OPTIMIZERS[name]
        lin = _linear(jacobian)
        limit = stability.thresholds(lin, 2, optimizer=optimizer).mean_square
        with jax.enable_x64(True):
            for factor in (1 - 1e-4, 1 + 1e-4):
                dense = _dense(
                    optimizer, factor * limit, jacobian, 2, "without_replacement"
                )
                assert (_growth(dense) <= 1) == (factor < 1), name
            dense = _growth(
                _dense(optimizer, 0.7 * limit, jacobian, 2, "without_replacement")
            )
        found = stability.growth_rate(lin, 0.7 * limit, 2, optimizer=optimizer)
        np.testing.assert_allclose(found, dense, rtol=1e-5)


def _adamw(rate):
    return optax.adamw(rate, weight_decay=0.3)


def _adam_state(optimizer, moments):
    state = optimizer(0.1).init(jnp.zeros(len(moments)))
    adam = state[0]._replace(
        count=jnp.asarray(10**6, jnp.int32), nu=jnp.asarray(moments)
    )
    return (adam, *state[1:])


@pytest.mark.parametrize("shape", [(5, 1, 3), (4, 2, 3), (3, 1, 4)])
def test_frozen_adam_equals_the_dense_operator_of_the_real_chain(shape, x64):
    rng = np.random.default_rng(1)
    jacobian, moments = rng.normal(size=shape), rng.uniform(0.1, 4, shape[2])
    state = _adam_state(_adamw, moments)
    factors = stability.preconditioner(_adamw, state, jnp.zeros(shape[2]))
    np.testing.assert_allclose(factors, 1 / (np.sqrt(moments) + 1e-8), rtol=1e-6)
    lin = _linear(jacobian, jnp.float64, factors)
    sampling = "without_replacement"
    for opt_state in (None, state):
        asked = dict(optimizer=_adamw, opt_state=opt_state)
        limit = stability.thresholds(lin, 2, **asked).mean_square
        for factor in (0.9999, 1.0001, 0.3, 2.0):
            rate = factor * limit
            dense = _growth(_dense(_adamw, rate, jacobian, 2, sampling, moments))
            assert (dense <= 1) == (factor < 1)
            found = stability.growth_rate(lin, rate, 2, **asked)
            np.testing.assert_allclose(found, dense, rtol=1e-6)


CLOSED_FORMS = {
    "heavy ball": (OPTIMIZERS["heavy ball"], lambda top: 2 * 1.9 / top),
    "nesterov": (OPTIMIZERS["nesterov"], lambda top: 2 * 1.9 / (2.8 * top)),
    "moving average": (_ema, lambda top: 2 * 1.8 / (0.2 * top)),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_whole_data_in_one_batch_has_closed_forms(name):
    jacobian = np.random.default_rng(0).normal(size=(6, 2, 4))
    lin = _linear(jacobian)
    optimizer, limit = CLOSED_FORMS[name]
    found = stability.thresholds(lin, 6, optimizer=optimizer)
    expected = limit(float(lin.eigenvalues[0]))
    np.testing.assert_allclose(found.mean_square, expected, rtol=1e-6)
    np.testing.assert_allclose(found.gradient_descent, expected, rtol=1e-6)
    assert math.isnan(found.trace_ratio)
    assert list(found.rates) == ["gradient_descent", "mean_square"]


def test_adam_at_full_batch_stays_up_to_38_over_the_rate():
    jacobian = np.random.default_rng(0).normal(size=(6, 2, 4))
    moments = np.array([0.3, 1.0, 2.0, 0.1])
    factors = stability.preconditioner(
        optax.adam, _adam_state(optax.adam, moments), jnp.zeros(4)
    )
    lin = _linear(jacobian, preconditioner=factors)
    rows = jacobian.reshape(-1, 4) / np.sqrt(np.sqrt(moments) + 1e-8)
    top = np.linalg.eigvalsh(rows.T @ rows / 6)[-1]
    found = stability.thresholds(lin, 6, optimizer=optax.adam).mean_square
    np.testing.assert_allclose(found, 38 / top, rtol=1e-5)


@pytest.mark.parametrize("name", ["heavy ball", "coupled decay"])
def test_real_training_has_the_expected_losses(name, x64):
    optimizer = OPTIMIZERS[name]
    rng = np.random.default_rng(2)
    jacobian = jnp.asarray(rng.normal(size=(6, 1, 4)))
    lin = _linear(np.asarray(jacobian), jnp.float64)
    rate = 0.7 * stability.thresholds(lin, 2, optimizer=optimizer).mean_square
    expected = stability.expected_losses(lin, rate, 2, 30, optimizer=optimizer)
    tx = optimizer(rate)

    def loss_fn(params, rows):
        return jnp.mean((rows @ params) ** 2) / 2

    def run(key):
        start_key, key = jax.random.split(key)
        size = jnp.sqrt(2 / lin.eigenvalues.sum())
        params = size * jax.random.normal(start_key, (4,))

        def step(carry, key):
            params, state = carry
            batch = jax.random.choice(key, 6, (2,), replace=False)
            grads = jax.grad(loss_fn)(params, jacobian[batch, 0])
            updates, state = tx.update(grads, state, params)
            loss = loss_fn(params, jacobian[:, 0])
            return (optax.apply_updates(params, updates), state), loss

        keys = jax.random.split(key, 31)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    losses = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4000))
    errors = np.std(losses, axis=0) / math.sqrt(len(losses))
    apart = np.abs(np.mean(losses, axis=0) - np.asarray(expected)) / errors
    # 31 correlated comparisons: 3 standard errors at most of them.
    assert np.mean(apart < 3) > 0.95
    assert apart.max() < 4.5
    simulated = stability.simulate(
        lin, jax.random.key(1), rate, 2, 30, num_runs=4000, optimizer=optimizer
    )
    errors = np.std(simulated, axis=0) / math.sqrt(len(simulated))
    apart = np.abs(np.mean(simulated, axis=0) - np.asarray(expected)) / errors
    assert np.mean(apart < 3) > 0.95
    assert apart.max() < 4.5


def test_the_batch_that_stays_and_the_time_to_escape_follow_the_threshold(x64):
    jacobian = np.random.default_rng(2).normal(size=(6, 1, 4))
    lin, optimizer = _linear(jacobian, jnp.float64), OPTIMIZERS["heavy ball"]
    limits = [
        stability.thresholds(lin, size, optimizer=optimizer).mean_square
        for size in range(1, 7)
    ]
    assert np.all(np.diff(limits) > 0)
    for size in (2, 4):
        for factor, expected in ((0.999, size), (1.001, size + 1)):
            rate = factor * limits[size - 1]
            found = stability.smallest_batch_size(lin, rate, optimizer=optimizer)
            assert found == expected
    assert (
        stability.smallest_batch_size(lin, 1.1 * limits[5], optimizer=optimizer) is None
    )
    rate = 1.3 * limits[1]
    steps = int(stability.escape_time(lin, rate, 2, optimizer=optimizer))
    losses = stability.expected_losses(lin, rate, 2, steps, optimizer=optimizer)
    assert losses[steps] >= 10 > losses[steps - 1]
    assert (
        stability.escape_time(lin, limits[1] / 1.1, 2, optimizer=optimizer) == math.inf
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_stationary_covariance_is_the_fixed_point_of_the_dense_recursion(
    sampling, x64
):
    rng = np.random.default_rng(4)
    n, size, optimizer = 5, 2, OPTIMIZERS["heavy ball"]
    jacobian, targets = rng.normal(size=(n, 1, 2)), rng.normal(size=(n, 1))
    lin = stability.linearize(
        linear_outputs,
        jnp.zeros(2),
        jnp.asarray(jacobian),
        jnp.asarray(targets),
    )
    rate = (
        0.5
        * stability.thresholds(
            lin, size, sampling=sampling, optimizer=optimizer
        ).mean_square
    )
    found = stability.stationary_covariance(
        lin, rate, size, sampling=sampling, optimizer=optimizer
    )
    # Dense: z' = T_B z + b g_B with the gradient of the batch at the minimum.
    rows = jacobian[:, 0]
    minimum = np.linalg.lstsq(rows, targets[:, 0], rcond=None)[0]
    slopes = (rows @ minimum - targets[:, 0])[:, None] * rows
    operator = _dense(optimizer, rate, jacobian, size, sampling)
    zero = _chain_matrix(optimizer, rate, np.zeros((2, 2)))
    gain = (_chain_matrix(optimizer, rate, np.eye(2)) - zero)[:, :2]
    basis = np.kron(np.eye(2), np.linalg.svd(rows, full_matrices=False)[2])
    drift, mean = 0.0, 0.0
    shares = zip(*_batches(n, size, sampling), strict=True)
    steps = []
    for batch, share in shares:
        part = rows[list(batch)]
        whole = np.zeros((4, 4))
        whole[:2, :2] = part.T @ part / size
        step = basis @ (zero + (_pad(gain) @ whole)) @ basis.T
        push = basis @ gain @ (slopes[list(batch)].sum(axis=0) / size)
        steps.append((step, push, share))
        drift, mean = drift + share * step, mean + share * push
    mean = np.linalg.solve(np.eye(4) - drift, mean)
    source = sum(
        share * (np.outer(p, p) + np.outer(s @ mean, p) + np.outer(p, s @ mean))
        for s, p, share in steps
    )
    moment = np.linalg.solve(np.eye(16) - operator, source.ravel()).reshape(4, 4)
    np.testing.assert_allclose(
        found.mean_square_distance, np.trace(moment[:2, :2]), rtol=1e-6
    )


def _pad(gain):
    return np.concatenate([gain, np.zeros((4, 2))], axis=1)
