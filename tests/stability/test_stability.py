"""Stability against dense Kronecker matrices, simulation, and known examples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import linear_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from flatopt import curvature, stability
from flatopt.stability import _gram
from flatopt.stability._checks import SAMPLINGS

NECESSARY = (
    "gradient_descent",
    "trace_ratio",
    "rank_one",
    "top_direction",
    "trace",
    "frobenius",
)


def _linear(jacobian, residuals=None):
    """The linearization of a model with this Jacobian, shape (n, c, d)."""
    n, c, d = jacobian.shape
    residuals = np.zeros((n, c)) if residuals is None else np.asarray(residuals)
    start, rows, targets = jax.device_put(
        (np.zeros(d, jacobian.dtype), jacobian, -residuals.astype(jacobian.dtype))
    )
    return stability.linearize(linear_outputs, start, rows, targets)


def _exact_linear(jacobian):
    """The same at zero loss, by NumPy alone."""
    n, c, d = jacobian.shape
    rows = jacobian.reshape(-1, d)
    vectors, scales, _ = np.linalg.svd(rows, full_matrices=False)
    keep = scales > 1e-10 * scales[0]
    return stability.Linearization(
        coordinates=(vectors * scales)[:, keep].reshape(n, c, -1),
        eigenvalues=scales[keep] ** 2 / n,
        residuals=np.zeros((n, c)),
        loss=0.0,
        gradient_norm=0.0,
        num_params=d,
        reducible_loss=0.0,
    )


def _dense(jacobian, batch_size, sampling):
    """H, and D and C of the second moment's recursion as d^2 x d^2 matrices."""
    n = len(jacobian)
    each = np.einsum("ncd,nce->nde", jacobian, jacobian)
    hessian = each.mean(axis=0)
    eye = np.eye(len(hessian))
    pairs = np.mean([np.kron(h, h) for h in each], axis=0)
    p = {
        "without_replacement": (n - batch_size) / (batch_size * (n - 1)),
        "with_replacement": 1 / batch_size,
        "bernoulli": (n - batch_size) / (n * batch_size),
    }[sampling]
    q = 1 if sampling == "bernoulli" else 1 - p
    noise = q * np.kron(hessian, hessian) + p * pairs
    drift = (np.kron(hessian, eye) + np.kron(eye, hessian)) / 2
    return hessian, drift, noise


def _problems():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(4, 1, 6))
    many = rng.normal(size=(9, 1, 4))
    outputs = rng.normal(size=(5, 2, 4))
    wide = rng.normal(size=(3, 2, 8))
    deficient = np.concatenate([few, few[:1] * 2, few[:2] @ np.diag([1] * 6)])
    duplicated = np.concatenate([many[:3], many[:3]])
    return {
        "n < d": few,
        "n > d": many,
        "two outputs": outputs,
        "two outputs, n < d": wide,
        "rank deficient": deficient,
        "duplicated examples": duplicated,
        "orthogonal": 2 * np.eye(4)[:, None],
    }


PROBLEMS = _problems()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_threshold_and_growth_equal_dense_kronecker_matrices(name, sampling, x64):
    jacobian = PROBLEMS[name]
    lin = _linear(jacobian)
    n = len(jacobian)
    for batch_size in sorted({1, 2, n - 1, n}):
        hessian, drift, noise = _dense(jacobian, batch_size, sampling)
        root = np.linalg.pinv(drift, rcond=1e-10)
        expected = 2 / np.linalg.eigvals(root @ noise).real.max()
        found = stability.thresholds(lin, batch_size, sampling=sampling)
        np.testing.assert_allclose(found.mean_square, expected, rtol=1e-6)
        # In the range of H, where the recursion moves.
        values, vectors = np.linalg.eigh(hessian)
        basis = vectors[:, values > 1e-9 * values[-1]]
        basis = np.kron(basis, basis)
        for factor in (0.5, 1.0, 1.7):
            rate = factor * expected
            step = np.eye(len(drift)) - 2 * rate * drift + rate**2 * noise
            growth = np.linalg.eigvalsh(basis.T @ step @ basis)[-1]
            np.testing.assert_allclose(
                stability.growth_rate(lin, rate, batch_size, sampling=sampling),
                growth,
                rtol=1e-6,
                atol=1e-12,
            )
            if factor == 1.0:
                assert growth == pytest.approx(1, abs=1e-6)
        if batch_size == n and sampling == "without_replacement":
            np.testing.assert_allclose(
                found.mean_square, found.gradient_descent, rtol=1e-6
            )


@pytest.mark.heart
def test_orthogonal_examples_have_a_closed_form(x64):
    n, scale = 4, 2.0
    lin = _linear(np.sqrt(n) * scale * np.eye(n)[:, None])
    for batch_size in (1, 2, 4):
        p = (n - batch_size) / (batch_size * (n - 1))
        found = stability.thresholds(lin, batch_size)
        expected = 2 / (scale**2 * (1 - p + p * n))
        np.testing.assert_allclose(found.mean_square, expected, rtol=1e-8)


def test_one_dimension_makes_the_bounds_exact(x64):
    lin = _linear(np.array([1.0, 2.0, 0.5])[:, None, None])
    h = np.array([1.0, 4.0, 0.25])
    p = 2 / (1 * 2) / 1
    found = stability.thresholds(lin, 1)
    expected = 2 * h.mean() / ((1 - p) * h.mean() ** 2 + p * np.mean(h**2))
    for name in ("mean_square", "trace_ratio", "rank_one", "top_direction"):
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-8)


def test_the_theories_are_ordered_on_gaussian_data(x64):
    rng = np.random.default_rng(0)
    lin = _linear(rng.normal(size=(30, 1, 5)))
    one = stability.thresholds(lin, 1)
    assert one.mean_square < one.trace_ratio < 1.1 * one.mean_square
    assert one.trace_ratio < one.top_direction < one.gradient_descent
    assert one.mean_square < one.frobenius
    rates = [stability.thresholds(lin, b).mean_square for b in (1, 2, 5, 15, 30)]
    assert all(np.diff(rates) > 0)
    np.testing.assert_allclose(rates[-1], one.gradient_descent, rtol=1e-6)


SHAPES = ((2, 1, 1), (3, 1, 5), (4, 2, 3), (5, 1, 4), (6, 1, 2), (6, 2, 5))


@settings(max_examples=1000, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    batch=st.floats(0, 1, exclude_max=True),
    sampling=st.sampled_from(SAMPLINGS),
)
def test_necessary_conditions_are_never_below_the_exact_threshold(
    seed, shape, batch, sampling
):
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=shape) * rng.exponential(size=(shape[0], 1, 1))
    with jax.enable_x64(True):
        lin = _exact_linear(jacobian)
        batch_size = 1 + int(batch * shape[0])
        found = stability.thresholds(lin, batch_size, sampling=sampling)
    rates = found.rates
    for name in (*NECESSARY, *(["coherence"] if sampling == "bernoulli" else [])):
        assert rates[name] >= found.mean_square * (1 - 1e-6), name


def test_the_estimate_with_the_measured_alignment_is_no_necessary_condition(x64):
    below = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        jacobian = rng.normal(size=(6, 1, 4)) * rng.exponential(size=(6, 1, 1))
        displacement = 1e-3 * rng.normal(size=4)
        lin = _linear(jacobian, jacobian @ displacement)
        found = stability.thresholds(lin, 1)
        below += found.frobenius_estimate < found.mean_square
        assert found.frobenius >= found.mean_square * (1 - 1e-9)
    assert below


# Alignment


def test_alignment_equals_its_dense_definition(x64):
    rng = np.random.default_rng(3)
    for shape, scale in itertools.product([(7, 1, 4), (5, 3, 9)], [1.0, 0.25]):
        jacobian, errors = rng.normal(size=shape), rng.normal(size=shape[:2])
        rows = jnp.asarray(jacobian)
        lin = stability.linearize(
            linear_outputs,
            jnp.zeros(shape[2]),
            rows,
            jnp.asarray(-errors),
            loss_scale=scale,
        )
        found = stability.alignment(lin)
        grads = np.einsum("nc,ncd->nd", errors, jacobian)
        noise = grads.T @ grads / len(grads) - np.outer(grads.mean(0), grads.mean(0))
        newton = np.einsum("ncd,nce->de", jacobian, jacobian) / len(jacobian)
        loss = np.sum(errors**2) / (2 * len(jacobian))
        size, spread = np.linalg.norm(newton), np.linalg.norm(noise)
        product = np.trace(noise @ newton)
        np.testing.assert_allclose(found.mu, product / (2 * loss * size**2), rtol=1e-8)
        np.testing.assert_allclose(found.alpha, product / (size * spread), rtol=1e-8)
        np.testing.assert_allclose(found.beta, spread / (2 * loss * size), rtol=1e-8)
        np.testing.assert_allclose(found.mu, found.alpha * found.beta, rtol=1e-8)
        np.testing.assert_allclose(found.loss, scale * loss, rtol=1e-8)


def test_alignment_of_a_gaussian_linear_model(x64):
    rng = np.random.default_rng(4)
    scales = np.array([2.0, 1.0, 0.5])
    jacobian = rng.normal(size=(20_00, 1, 3)) * scales
    delta = rng.normal(size=3)
    lin = _linear(jacobian, jacobian @ delta)
    s = np.diag(scales**2)
    form = delta @ s @ delta * np.sum(s**2)
    expected = 1 + delta @ s @ s @ s @ delta / form
    np.testing.assert_allclose(stability.alignment(lin).mu, expected, rtol=0.15)


def test_isotropic_noise_is_aligned_by_the_participation_ratio_over_d(x64):
    rng = np.random.default_rng(14)
    rows = rng.normal(size=(5, 1, 8))
    # Each row with errors 1 and -1: the gradient is zero and the noise is 2 L G.
    lin = _linear(np.concatenate([rows, rows]), np.repeat([1.0, -1.0], 5)[:, None])
    found = stability.alignment(lin)
    values = np.asarray(lin.eigenvalues)
    ratio = np.sum(values) ** 2 / np.sum(values**2) / 8
    np.testing.assert_allclose(found.isotropic_mu, ratio, rtol=1e-8)
    for value in (found.mu, found.alpha, found.beta):
        np.testing.assert_allclose(value, 1, rtol=1e-8)


def _tanh(params, inputs):
    return jnp.tanh(inputs @ params)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_estimated_alignment_covers_the_exact_one(streamed):
    rng = np.random.default_rng(15)
    params = jnp.asarray(rng.normal(size=(12, 2)), jnp.float32)
    inputs = rng.normal(size=(40, 12)).astype("f4")
    targets = rng.normal(size=(40, 2)).astype("f4")
    exact = stability.alignment(stability.linearize(_tanh, params, inputs, targets))
    data = (inputs, targets)
    if streamed:
        data = [(inputs[:25], targets[:25]), (inputs[25:], targets[25:])]
    num_seeds = 3 if streamed else 100
    inside = dict.fromkeys(("mu", "alpha", "beta", "isotropic_mu"), 0)
    for seed in range(num_seeds):
        found = stability.estimate_alignment(
            _tanh, params, data, jax.random.key(seed), 24, num_deflated=2
        )
        np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-5)
        for name in inside:
            low, high = getattr(found, name).interval(0.99 if streamed else 0.95)
            inside[name] += bool(low <= getattr(exact, name) <= high)
    assert all(0.89 * num_seeds <= count for count in inside.values()), inside
    if not streamed:
        assert any(count < num_seeds for count in inside.values())


def test_all_directions_deflated_the_alignment_is_exact(x64):
    rng = np.random.default_rng(16)
    params, inputs = rng.normal(size=(3, 1)), rng.normal(size=(20, 3))
    data = jnp.asarray(inputs), jnp.asarray(rng.normal(size=(20, 1)))
    exact = stability.alignment(stability.linearize(_tanh, params, *data))
    found = stability.estimate_alignment(
        _tanh, params, data, jax.random.key(0), 2, num_deflated=3
    )
    for name in ("mu", "alpha", "beta", "isotropic_mu"):
        np.testing.assert_allclose(
            getattr(found, name).value, getattr(exact, name), rtol=1e-8
        )
    with pytest.raises(ValueError, match="the loss must be positive, got 0"):
        stability.estimate_alignment(
            _tanh, 0 * params, (data[0], 0 * data[1]), jax.random.key(0)
        )


# Minima that do not fit their data


@pytest.mark.heart
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_stationary_covariance_solves_the_dense_equation(sampling, batch_size, x64):
    rng = np.random.default_rng(17)
    jacobian, errors = rng.normal(size=(9, 2, 4)), rng.normal(size=(9, 2))
    hessian, drift, noise = _dense(jacobian, batch_size, sampling)
    lin = _linear(jacobian, errors)
    limit = stability.thresholds(lin, batch_size, sampling=sampling).mean_square
    rate = 0.7 * limit
    rows = jacobian.reshape(-1, 4)
    best = np.linalg.lstsq(rows, -errors.ravel(), rcond=None)[0]
    at_best = errors + jacobian @ best
    grads = np.einsum("nc,ncd->nd", at_best, jacobian)
    spread = grads.T @ grads / 9
    p = {
        "without_replacement": (9 - batch_size) / (batch_size * 8),
        "with_replacement": 1 / batch_size,
        "bernoulli": (9 - batch_size) / (9 * batch_size),
    }[sampling]
    covariance = rate * p * np.linalg.solve(2 * drift - rate * noise, spread.ravel())
    covariance = covariance.reshape(4, 4)
    found = stability.stationary_covariance(lin, rate, batch_size, sampling=sampling)
    trace, loss = np.trace(covariance), np.trace(hessian @ covariance) / 2
    np.testing.assert_allclose(found.mean_square_distance, trace, rtol=1e-8)
    np.testing.assert_allclose(found.excess_loss, loss, rtol=1e-8)
    gradient = np.trace(hessian @ hessian @ covariance)
    np.testing.assert_allclose(found.mean_square_gradient, gradient, rtol=1e-8)
    with pytest.raises(
        ValueError, match="learning_rate must be below the exact thresh"
    ):
        stability.stationary_covariance(
            lin, 1.01 * limit, batch_size, sampling=sampling
        )


def test_sgd_settles_at_the_predicted_excess_loss(x64):
    rng = np.random.default_rng(18)
    rows, errors = rng.normal(size=(12, 3)), rng.normal(size=12)
    lin = _linear(rows[:, None], errors[:, None])
    rate = 0.4 * stability.thresholds(lin, 2).mean_square
    point = np.zeros((4000, 3))
    losses = []
    for _ in range(300):
        order = np.argsort(rng.random((4000, 12)), axis=1)[:, :2]
        slopes = np.einsum("rbd,rd->rb", rows[order], point) + errors[order]
        point -= rate * np.einsum("rb,rbd->rd", slopes, rows[order]) / 2
        losses.append(np.mean((point @ rows.T + errors) ** 2) / 2)
    best = errors + rows @ np.linalg.lstsq(rows, -errors, rcond=None)[0]
    excess = np.mean(losses[100:]) - np.mean(best**2) / 2
    found = stability.stationary_covariance(lin, rate, 2)
    np.testing.assert_allclose(excess, found.excess_loss, rtol=0.02)
    fits = _linear(rows[:, None])
    assert stability.stationary_covariance(fits, rate, 2).excess_loss == 0


def test_away_from_a_minimum_the_report_says_so():
    found = stability.report(*_mlp(), 0.1, 4, loss_scale=1.0)
    hessian = curvature.hessian(_mlp_loss, _mlp()[1], _mlp()[2:]).dense()
    top = np.linalg.eigvalsh(hessian)[-1]
    np.testing.assert_allclose(found.hessian_eigenvalue, top, rtol=1e-3)
    assert not found.is_minimum
    assert "not at a minimum" in found.verdict
    variance = np.var(_mlp()[3], axis=0).sum()
    np.testing.assert_allclose(found.constant_loss, variance / 2, rtol=1e-5)
    assert found.thresholds.loss == found.loss > 0
    assert found.thresholds.gradient_norm == found.gradient_norm > 0
    # At the linearized model's own minimum nothing is left to take off.
    rng = np.random.default_rng(19)
    rows, errors = rng.normal(size=(12, 3)), rng.normal(size=12)
    best = errors + rows @ np.linalg.lstsq(rows, -errors, rcond=None)[0]
    lin = _linear(rows[:, None].astype("f4"), best[:, None].astype("f4"))
    assert lin.reducible_loss < 1e-6 < lin.loss
    moved = _linear(rows[:, None].astype("f4"), errors[:, None].astype("f4"))
    rest = moved.loss - moved.reducible_loss
    np.testing.assert_allclose(rest, np.mean(best**2) / 2, rtol=1e-4)


# Other losses


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _binary(logits, labels):
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def _half_square(outputs, targets):
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)) / 2


@pytest.mark.parametrize("loss_fn", [_cross_entropy, _binary, _half_square])
def test_other_losses_have_their_gauss_newton_matrix(loss_fn, x64):
    rng = np.random.default_rng(20)
    params, inputs = jnp.asarray(rng.normal(size=(4, 3))), rng.normal(size=(10, 4))
    inputs = jnp.asarray(inputs)
    targets = {
        _cross_entropy: jnp.asarray(np.arange(10) % 3),
        _binary: jnp.asarray(rng.integers(0, 2, (10, 3)), float),
        _half_square: jnp.asarray(rng.normal(size=(10, 3))),
    }[loss_fn]
    lin = stability.linearize_gauss_newton(_tanh, loss_fn, params, inputs, targets)
    newton = curvature.gauss_newton(_tanh, loss_fn, params, (inputs, targets)).dense()
    rank = len(lin.eigenvalues)
    np.testing.assert_allclose(
        lin.eigenvalues, np.linalg.eigvalsh(newton)[::-1][:rank], rtol=1e-6
    )
    grads = jax.jit(
        jax.vmap(
            lambda x, y: jax.grad(lambda p: loss_fn(_tanh(p, x[None]), y[None]))(params)
        )
    )(inputs, targets)
    grads = np.asarray(grads).reshape(10, -1)
    np.testing.assert_allclose(lin.gradient_norm, np.linalg.norm(grads.mean(0)))
    found = np.einsum("nc,ncr->nr", lin.residuals, lin.coordinates)
    np.testing.assert_allclose(found @ found.T, grads @ grads.T, atol=1e-9)
    if loss_fn is _half_square:
        same = stability.linearize(_tanh, params, inputs, targets)
        np.testing.assert_allclose(lin.eigenvalues, same.eigenvalues, rtol=1e-9)
        np.testing.assert_allclose(lin.loss, same.loss, rtol=1e-9)


def test_losses_without_a_convex_expansion_are_refused():
    params, inputs = jnp.ones((2, 1)), jnp.ones((3, 2))
    for loss_fn, match in (
        (lambda f, y: jnp.mean(jnp.cos(f - y)), "must be convex in the outputs"),
        (
            lambda f, y: jnp.mean(jnp.abs(f - y)),
            "slope in directions without curvature",
        ),
        (lambda f, y: jnp.mean(jnp.sqrt(f - f)), "derivatives in the outputs that are"),
    ):
        with pytest.raises(ValueError, match=match):
            stability.linearize_gauss_newton(
                _tanh, loss_fn, params, inputs, jnp.ones((3, 1))
            )


# Simulation


@pytest.mark.parametrize("batch_size", [1, 2, 8, 12])
def test_simulation_is_bounded_below_the_threshold_and_diverges_above(batch_size):
    rng = np.random.default_rng(5)
    lin = _linear(rng.normal(size=(12, 1, 4)).astype("f4"))
    rate = stability.thresholds(lin, batch_size).mean_square
    stays = stability.expected_losses(lin, 0.95 * rate, batch_size, 400)
    leaves = stability.expected_losses(lin, 1.05 * rate, batch_size, 400)
    assert stays[-1] < 1 < leaves[-1]
    growth = stability.growth_rate(lin, 1.05 * rate, batch_size)
    measured = (leaves[-1] / leaves[-101]) ** 0.01
    np.testing.assert_allclose(measured, growth, rtol=1e-3)
    assert stability.escape_time(lin, 0.95 * rate, batch_size) == np.inf
    steps = stability.escape_time(lin, 1.05 * rate, batch_size)
    assert leaves[int(steps)] >= 10 > leaves[int(steps) - 1]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_simulated_runs_average_to_the_exact_recursion(sampling):
    rng = np.random.default_rng(6)
    lin = _linear(rng.normal(size=(10, 2, 3)).astype("f4"))
    rate = 0.5 * stability.thresholds(lin, 2, sampling=sampling).mean_square
    losses = stability.simulate(
        lin, jax.random.key(0), rate, 2, 6, num_runs=40_000, sampling=sampling
    )
    exact = stability.expected_losses(lin, rate, 2, 6, sampling=sampling)
    losses = np.asarray(losses, "f8")
    error = losses.std(axis=0, ddof=1) / 200
    assert np.all(np.abs(losses.mean(axis=0) - exact) < 5 * error + 1e-4)


def test_isotropic_noise_of_equal_trace_does_not_escape_where_sgd_does():
    rng = np.random.default_rng(7)
    lin = _linear(rng.normal(size=(8, 1, 60)).astype("f4") / 8)
    rate = 1.3 * stability.thresholds(lin, 1).mean_square
    assert rate < stability.thresholds(lin, 1).gradient_descent
    key = jax.random.key(0)
    final = {
        noise: np.mean(
            np.asarray(
                stability.simulate(lin, key, rate, 1, 60, num_runs=200, noise=noise)
            )[:, -1]
        )
        for noise in ("sgd", "gd", "isotropic", "langevin")
    }
    assert final["gd"] < 1
    assert final["isotropic"] < 1
    assert final["gd"] < final["langevin"] < 1
    assert final["sgd"] > 100


def test_langevin_noise_settles_where_its_constant_size_predicts():
    rng = np.random.default_rng(21)
    jacobian = rng.normal(size=(8, 1, 3))
    lin = _linear(jacobian.astype("f4"))
    values = np.asarray(lin.eigenvalues, "f8")
    rate = 0.5 / values[0]
    each = np.mean(np.sum(jacobian**2, axis=(1, 2)) ** 2)
    variance = 2 / values.sum() * (each - np.sum(values**2)) / 3
    # x' = (1 - rate h) x + rate noise has the variance rate^2 v / (1 - (1 - rate h)^2).
    spread = rate**2 * variance / (1 - (1 - rate * values) ** 2)
    losses = stability.simulate(
        lin, jax.random.key(0), rate, 1, 200, num_runs=4000, noise="langevin"
    )
    found = np.asarray(losses)[:, 100:].mean()
    np.testing.assert_allclose(found, np.sum(values * spread) / 2, rtol=0.03)


# A real model, conventions, errors


def _mlp_model(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


def _mlp(dtype="f4"):
    rng = np.random.default_rng(0)
    first, second, inputs, targets = (
        jax.device_put(rng.normal(size=shape).astype(dtype))
        for shape in ((3, 5), (5, 2), (30, 3), (30, 2))
    )
    return _mlp_model, {"first": first, "second": second / 2}, inputs, targets


def _mlp_loss(params, batch):
    return _half_square(_mlp_model(params, batch[0]), batch[1])


def _l2(outputs, targets):
    return optax.l2_loss(outputs, targets).mean()


def _l2_of_mlp(params, inputs, targets):
    return _l2(_mlp_model(params, inputs), targets)


@pytest.mark.parametrize(("chunk_size", "held"), [(64, True), (7, True), (7, False)])
def test_linearize_is_the_gauss_newton_matrix(chunk_size, held, x64, monkeypatch):
    if not held:
        monkeypatch.setattr(_gram, "most_held", lambda: 0)
    model_fn, params, inputs, targets = _mlp("f8")
    lin = stability.linearize(
        model_fn,
        params,
        inputs,
        targets,
        loss_scale=1 / 2,
        loss_fn=_l2,
        chunk_size=chunk_size,
    )
    newton = curvature.gauss_newton(model_fn, _l2, params, (inputs, targets))
    values = np.linalg.eigvalsh(newton.dense())[::-1]
    np.testing.assert_allclose(
        lin.eigenvalues, values[: len(lin.eigenvalues)], rtol=1e-6
    )
    grads = jax.jit(jax.grad(_l2_of_mlp))(params, inputs, targets)
    norm = np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in grads.values()))
    np.testing.assert_allclose(lin.gradient_norm, norm, rtol=1e-6)
    assert lin.num_params == 25


def test_errors_within_rounding_count_as_zero():
    model_fn, params, inputs, _ = _mlp()
    outputs = np.asarray(model_fn(params, inputs))
    found = stability.linearize(
        model_fn, params, inputs, outputs * np.float32(1 + 2e-7)
    )
    assert found.loss == 0
    found = stability.linearize(
        model_fn, params, inputs, outputs * np.float32(1 + 1e-5)
    )
    np.testing.assert_allclose(found.loss, 0.5e-10 * np.sum(outputs**2) / 30, rtol=0.1)


@pytest.mark.heart
@pytest.mark.parametrize(
    ("loss_fn", "factor"),
    [
        (lambda f, y: optax.l2_loss(f, y).mean(), "0.5"),
        (lambda f, y: jnp.mean((f - y) ** 2), "1"),
        (lambda f, y: jnp.mean(jnp.sum((f - y) ** 2, axis=1)), "2"),
    ],
)
def test_the_wrong_convention_is_an_error_that_names_the_factor(loss_fn, factor):
    model = _mlp()
    with pytest.raises(
        ValueError, match=rf"loss_fn returned .* pass loss_scale={factor}\.$"
    ):
        stability.linearize(*model, loss_scale=3.0, loss_fn=loss_fn)
    stability.linearize(*model, loss_scale=float(factor), loss_fn=loss_fn)


def test_errors():
    model_fn, params, inputs, targets = _mlp()
    with pytest.raises(ValueError, match="targets must have the shape of the outputs"):
        stability.linearize(model_fn, params, inputs, targets[:, 0])
    with pytest.raises(ValueError, match="inputs must hold at least 2 examples, got 1"):
        stability.linearize(model_fn, params, inputs[:1], targets[:1])
    with pytest.raises(ValueError, match="the Jacobian of the model is zero"):
        stability.linearize(lambda p, x: 0 * model_fn(p, x), params, inputs, targets)
    with pytest.raises(ValueError, match="model_fn returned outputs that are not fin"):
        stability.linearize(
            lambda p, x: jnp.nan * model_fn(p, x), params, inputs, targets
        )
    with pytest.raises(ValueError, match="the Jacobian is not finite"):
        stability.linearize(
            lambda p, x: jnp.sqrt(0 * model_fn(p, x)), params, inputs, targets
        )
    lin = stability.linearize(model_fn, params, inputs, targets)
    with pytest.raises(ValueError, match="batch_size must be at most the number of ex"):
        stability.thresholds(lin, 31)
    with pytest.raises(ValueError, match="sampling must be one of 'without_replace"):
        stability.thresholds(lin, 2, sampling="shuffled")
    with pytest.raises(ValueError, match="noise must be one of 'sgd', 'gd'"):
        stability.simulate(lin, jax.random.key(0), 0.1, 2, 3, noise="white")
    exact = stability.linearize(model_fn, params, inputs, model_fn(params, inputs))
    with pytest.raises(ValueError, match="lin must have a nonzero loss, got 0"):
        stability.alignment(exact)
    assert np.isnan(stability.thresholds(exact, 2).frobenius_estimate)
    with pytest.raises(ValueError, match="factor must be greater than 1"):
        stability.escape_time(lin, 0.1, 2, factor=1.0)


def test_smallest_batch_size_is_where_the_threshold_passes_the_rate(x64):
    rng = np.random.default_rng(8)
    lin = _linear(rng.normal(size=(12, 1, 4)))
    rates = [stability.thresholds(lin, b).mean_square for b in range(1, 13)]
    for rate in (0.5 * rates[0], 0.999 * rates[4], 0.999 * rates[-1], 1.1 * rates[-1]):
        enough = [b for b, limit in enumerate(rates, 1) if rate <= limit]
        expected = enough[0] if enough else None
        assert stability.smallest_batch_size(lin, rate) == expected


def test_the_sharpest_minimum_is_where_the_theories_meet_the_rate(x64):
    rng = np.random.default_rng(22)
    lin = _linear(rng.normal(size=(12, 2, 4)))
    for batch_size, sampling in itertools.product((1, 3), SAMPLINGS):
        found = stability.thresholds(lin, batch_size, sampling=sampling)
        values = np.asarray(lin.eigenvalues)
        for rate, name, norm in (
            (found.gradient_descent, "max_eigenvalue", values[0]),
            (found.trace, "trace", values.sum()),
        ):
            bounds = stability.sharpest_minimum(
                rate, batch_size, 12, num_outputs=2, sampling=sampling
            )
            np.testing.assert_allclose(getattr(bounds, name), norm, rtol=1e-8)
    bounds = stability.sharpest_minimum(0.1, 8, mu=2.0)
    np.testing.assert_allclose(bounds.frobenius_norm, np.sqrt(8 / 2) / 0.1)
    assert stability.sharpest_minimum(0.1, 9, 9).trace == np.inf
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        stability.sharpest_minimum(0.0, 8)
    with pytest.raises(ValueError, match="mu must be positive, got 0"):
        stability.sharpest_minimum(0.1, 8, mu=0)


def test_batch_sharpness_is_the_mean_ratio_of_its_batches():
    rng = np.random.default_rng(9)
    batches = [jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(5)]
    params = jnp.asarray(rng.normal(size=3), jnp.float32)

    def loss_fn(params, batch):
        return jnp.mean(jnp.cos(batch @ params))

    ratios = []
    for batch in np.asarray(batches, "f8"):
        outputs = batch @ np.asarray(params, "f8")
        g = -np.sin(outputs) @ batch / 4
        h = -(batch.T * np.cos(outputs)) @ batch / 4
        ratios.append(g @ h @ g / (g @ g))
    found = stability.batch_sharpness(loss_fn, params, batches)
    np.testing.assert_allclose(found.value, np.mean(ratios), rtol=1e-4)
    error = np.std(ratios, ddof=1) / 5**0.5
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-4)
    with pytest.raises(ValueError, match="batches must hold batches, got none"):
        stability.batch_sharpness(loss_fn, params, [])


def test_report_says_what_holds():
    model_fn, params, inputs, targets = _mlp()
    lin = stability.linearize(model_fn, params, inputs, targets)
    limit = stability.thresholds(lin, 4).mean_square
    for factor, word in ((0.5, "stays"), (1.01, "leaves"), (50.0, "unstable even")):
        found = stability.report(
            model_fn, params, inputs, targets, factor * limit, 4, loss_scale=1.0
        )
        assert word in found.verdict
        assert ("violated" in str(found)) == (factor > 1)
    np.testing.assert_allclose(found.trace, np.sum(lin.eigenvalues), rtol=1e-5)
