"""Linearizations that hide nothing: flat directions, confident softmax, any scale."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg
from helpers import count_compilations, linear_outputs

from flatopt import curvature, stability
from flatopt.stability import _moments

KEY = jax.random.key(0)


def _linear(params, inputs):
    return inputs @ params


def _flat_problem(scale, n=60, d=6):
    """Half of the features are ``scale`` times smaller, and wrong in these alone."""
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 1, 1, scale, scale, scale])
    inputs = (rng.normal(size=(n, d)) * scales).astype("f4")
    best = 0.5 / scales
    targets = (inputs.astype("f8") @ best + 0.1 * rng.normal(size=n)).astype("f4")
    params = best.astype("f4")
    params[3:] = 0
    return jnp.asarray(params), jnp.asarray(inputs), jnp.asarray(targets)


def _truth(params, inputs, targets):
    """What the linear model could still lose, and the gradient's norm, in float64."""
    x, y, w = (np.asarray(a, "f8") for a in (inputs, targets, params))
    error = x @ w - y
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    reducible = (np.mean(error**2) - np.mean((x @ best - y) ** 2)) / 2
    return reducible, np.linalg.norm(x.T @ error / len(x))


@pytest.mark.parametrize("scale", [8e-3, 1e-4])
def test_flat_directions_do_not_hide_a_reducible_loss(scale):
    problem = _flat_problem(scale)
    reducible, norm = _truth(*problem)
    assert reducible > 0.3
    lin = stability.linearize(_linear, *problem)
    assert len(lin.eigenvalues) == 6
    np.testing.assert_allclose(lin.reducible_loss, reducible, rtol=1e-4)
    np.testing.assert_allclose(lin.gradient_norm, norm, rtol=1e-4)
    assert not stability.report(_linear, *problem, 0.1, 8, loss_scale=1.0).is_minimum
    x = np.asarray(problem[1], "f8")
    np.testing.assert_allclose(
        lin.eigenvalues, np.linalg.eigvalsh(x.T @ x / len(x))[::-1], rtol=1e-4
    )


@pytest.mark.heart
def test_a_bfloat16_model_does_not_hide_a_reducible_loss():
    params, inputs, targets = (x.astype(jnp.bfloat16) for x in _flat_problem(0.01))
    reducible, _ = _truth(params, inputs, targets)
    lin = stability.linearize(_linear, params, inputs, targets)
    np.testing.assert_allclose(lin.reducible_loss, reducible, rtol=0.02)


def test_settling_sees_flat_directions():
    params, inputs, targets = _flat_problem(8e-3)
    lin = stability.linearize(_linear, params, inputs, targets)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x, "f8")) for x in (params, inputs, targets))
        exact = stability.stationary_covariance(
            stability.linearize(_linear, *wide), 0.2, 8
        )
    found = stability.stationary_covariance(lin, 0.2, 8)
    for name in ("mean_square_distance", "excess_loss", "mean_square_gradient"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(exact, name), rtol=1e-3
        )


def test_rank_deficient_rows_keep_their_rank_in_float32():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(5, 8)).astype("f4")
    mixed = np.concatenate([rows, rng.normal(size=(30, 5)).astype("f4") @ rows])
    lin = stability.linearize(
        _linear,
        jnp.zeros(8),
        jnp.asarray(mixed),
        jnp.asarray(rng.normal(size=35), "f4"),
    )
    assert len(lin.eigenvalues) == 5


# A loss given beside its scale


def _mse(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


@pytest.mark.parametrize("moved", [0.0, 1e-8, 1e-7, 1e-6, 1e-4])
def test_the_convention_is_seen_at_a_fitted_minimum(moved):
    rng = np.random.default_rng(0)
    inputs, params = rng.normal(size=(10, 40)).astype("f4"), rng.normal(size=40)
    params = params.astype("f4")
    targets = inputs @ params
    point = jnp.asarray(params * np.float32(1 + moved))
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
    lin = stability.linearize(
        _linear, point, inputs, targets, loss_scale=2.0, loss_fn=_mse
    )
    np.testing.assert_allclose(lin.loss, _mse(inputs @ point, targets), atol=1e-10)
    with pytest.raises(ValueError, match=r"^loss_fn returned .* pass loss_scale=2\.$"):
        stability.linearize(
            _linear, point, inputs, targets, loss_scale=1.0, loss_fn=_mse
        )
    found = stability.report(_linear, point, inputs, targets, 0.1, 2, loss_fn=_mse)
    assert found.loss_scale == 2


def _huber(outputs, targets):
    return optax.huber_loss(outputs, targets, delta=0.3).mean()


def _weighted(outputs, targets):
    weights = jnp.arange(10, dtype=outputs.dtype) / 4.5
    return jnp.mean(weights * (outputs - targets) ** 2)


@pytest.mark.parametrize("loss_fn", [_huber, _weighted])
def test_other_losses_are_no_squared_errors(loss_fn):
    rng = np.random.default_rng(2)
    inputs = jnp.asarray(rng.normal(size=(10, 4)), jnp.float32)
    targets = jnp.asarray(rng.normal(size=10), jnp.float32)
    with pytest.raises(ValueError, match="use linearize_gauss_newton") as error:
        stability.linearize(_linear, jnp.ones(4), inputs, targets, loss_fn=loss_fn)
    assert "nan" not in str(error.value)


# Confident classifiers


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _classifier(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


def _trained(factor):
    """A classifier of its own labels, more confident by a factor on the logits."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(6, 12)), factor * rng.normal(size=(12, 4))
    inputs = rng.normal(size=(30, 6))
    labels = np.argmax(np.tanh(inputs @ first) @ second, axis=1)
    params = {"first": jnp.asarray(first, "f4"), "second": jnp.asarray(second, "f4")}
    return params, jnp.asarray(inputs, "f4"), jnp.asarray(labels)


def _dense_softmax(params, inputs, labels):
    """The classifier's Gauss-Newton matrix and gradient in float64 NumPy."""
    w, v, x = (np.asarray(a, "f8") for a in (params["first"], params["second"], inputs))
    hidden = np.tanh(x @ w)
    logits = hidden @ v
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    total, slope = 0, 0
    for i in range(len(x)):
        first = np.einsum("a,h,hc->cah", x[i], 1 - hidden[i] ** 2, v)
        second = np.einsum("h,cd->chd", hidden[i], np.eye(4))
        jacobian = np.concatenate([first.reshape(4, -1), second.reshape(4, -1)], axis=1)
        total = total + jacobian.T @ (np.diag(p[i]) - np.outer(p[i], p[i])) @ jacobian
        slope = slope + jacobian.T @ (p[i] - np.eye(4)[labels[i]])
    return total / len(x), p.max(axis=1), np.linalg.norm(slope) / len(x)


@pytest.mark.parametrize("factor", [1.0, 5.0, 30.0])
def test_a_confident_softmax_has_its_gauss_newton_matrix(factor):
    params, inputs, labels = _trained(factor)
    dense, confidence, norm = _dense_softmax(params, inputs, labels)
    if factor == 30:
        assert np.sum(1 - confidence < 1e-9) > 10
    lin = stability.linearize_gauss_newton(
        _classifier, _cross_entropy, params, inputs, labels
    )
    values = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(lin.eigenvalues[:4], values[:4], rtol=2e-3)
    np.testing.assert_allclose(lin.gradient_norm, norm, rtol=2e-3)
    assert np.isfinite(stability.thresholds(lin, 4).mean_square)


def test_a_softmax_confident_beyond_float32_and_in_bfloat16():
    params, inputs, labels = _trained(3.0)
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda x, d=dtype: x.astype(d), params)
        stability.linearize_gauss_newton(
            _classifier, _cross_entropy, cast, inputs.astype(dtype), labels
        )
    scaled = params | {"second": 1e4 * params["second"]}  # p = 1 in float64 too
    with pytest.raises(ValueError, match="the Jacobian of the model is zero"):
        stability.linearize_gauss_newton(
            _classifier, _cross_entropy, scaled, inputs, labels
        )


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_a_sum_is_refused_at_a_fit_too(offset):
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    model_fn = lambda params, x: x @ params  # noqa: E731
    targets = model_fn(jnp.ones(3), inputs) + offset
    with pytest.raises(ValueError, match="loss_fn must be the mean over examples"):
        stability.linearize_gauss_newton(
            model_fn, lambda o, t: jnp.sum((o - t) ** 2), jnp.ones(3), inputs, targets
        )


def test_a_loss_that_casts_by_itself_is_expanded_in_float32():
    def narrow(logits, labels):
        return _cross_entropy(logits.astype(jnp.float32), labels) + jnp.float32(0)

    params, inputs, labels = _trained(8.0)
    expected = stability.linearize_gauss_newton(
        _classifier, _cross_entropy, params, inputs, labels
    )
    found = stability.linearize_gauss_newton(
        _classifier, narrow, params, inputs, labels
    )
    np.testing.assert_allclose(
        found.eigenvalues[:3], expected.eigenvalues[:3], rtol=1e-2
    )


def test_the_report_of_a_classifier_says_what_the_theory_does_not(standard_promotion):
    params, inputs, labels = _trained(2.0)
    arguments = _classifier, params, inputs, labels, 0.1, 4
    found = stability.report(*arguments, loss_fn=_cross_entropy)
    with count_compilations() as compiled:
        stability.report(*arguments, loss_fn=_cross_entropy)
    assert not compiled
    counts = np.bincount(labels, minlength=4) / 30
    entropy = -np.sum(counts[counts > 0] * np.log(counts[counts > 0]))
    np.testing.assert_allclose(found.constant_loss, entropy, rtol=1e-3)
    assert found.loss_scale is None
    assert "no squared error" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["thresholds"]["rank_one"] > 0
    whole = curvature.hessian(
        lambda p, b: _cross_entropy(_classifier(p, b[0]), b[1]),
        params,
        (inputs, labels),
    )
    top = np.linalg.eigvalsh(whole.dense())[-1]
    np.testing.assert_allclose(found.hessian_eigenvalue, top, rtol=1e-3)


# Compilations, memory, convergence


def _relu(params, inputs):
    return jax.nn.relu(inputs @ params["first"]) @ params["second"]


def test_checkpoints_of_another_rank_do_not_compile_again():
    rng = np.random.default_rng(4)
    inputs, targets, first, second = (
        rng.normal(size=shape).astype("f4")
        for shape in ((16, 5), (16, 1), (5, 6), (6, 1))
    )
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
    checkpoints = [
        {
            "first": jnp.asarray(np.where(np.arange(6)[None] < gone, 0, first)),
            "second": jnp.asarray(np.where(np.arange(6)[:, None] < gone, 0, second)),
        }
        for gone in (0, 4, 2)
    ]

    def measure(params):
        lin = stability.linearize(_relu, params, inputs, targets)
        rate = 0.1 * stability.thresholds(lin, 4).mean_square
        stability.alignment(lin)
        stability.growth_rate(lin, rate, 4)
        stability.expected_losses(lin, rate, 4, 6)
        stability.simulate(lin, KEY, rate, 4, 6, num_runs=2)
        stability.stationary_covariance(lin, rate, 4)
        return len(lin.eigenvalues), stability.escape_time(lin, 30 * rate, 4)

    ranks = [measure(checkpoints[0])[0]]
    with count_compilations() as compiled:
        ranks += [measure(params)[0] for params in checkpoints[1:]]
    assert len(set(ranks)) == 3
    assert not compiled


def test_directions_that_no_example_sees_change_nothing():
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(9, 3)).astype("f4")
    wide = np.concatenate([rows, rows @ np.ones((3, 4), "f4")], axis=1)
    targets = jnp.asarray(rng.normal(size=9), jnp.float32)
    seen, _ = np.linalg.qr(wide.astype("f8").T @ np.eye(9)[:, :3])
    same = jnp.asarray(wide.astype("f8") @ seen, jnp.float32)
    wide = jnp.asarray(wide)
    lin = stability.linearize(_linear, jnp.zeros(7), wide, targets)
    other = stability.linearize(_linear, jnp.zeros(3), same, targets)
    assert len(lin.eigenvalues) == len(other.eigenvalues) == 3
    limit = stability.thresholds(other, 2).mean_square
    for function, arguments in (
        (lambda x: stability.thresholds(x, 2).mean_square, ()),
        (stability.growth_rate, (0.5 * limit, 2)),
        (stability.growth_rate, (1.5 * limit, 2)),
        (stability.expected_losses, (0.5 * limit, 2, 5)),
        (lambda x: stability.stationary_covariance(x, 0.5 * limit, 2).excess_loss, ()),
    ):
        np.testing.assert_allclose(
            function(lin, *arguments), function(other, *arguments), rtol=1e-4
        )


def test_too_many_outputs_are_an_error_that_names_size_and_memory(monkeypatch):
    inputs, many = jnp.ones((60_000, 1)), jnp.ones(40_000)
    with pytest.raises(
        ValueError, match=r"60,000 outputs .* 173 GB of .* GB of free memory"
    ):
        stability.linearize(lambda w, x: x @ w[:1], many, inputs, jnp.ones(60_000))
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    few = jnp.ones((4, 1))
    stability.linearize(lambda w, x: x @ w, jnp.ones(1), few, jnp.zeros(4))


@pytest.mark.heart
def test_an_eigenvalue_that_does_not_converge_is_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise scipy.sparse.linalg.ArpackNoConvergence("no", np.zeros(0), np.zeros(0))

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", fail)
    rng = np.random.default_rng(6)
    rows = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)
    lin = stability.linearize(_linear, jnp.zeros(5), rows, jnp.zeros(9))
    with pytest.raises(RuntimeError, match="did not converge to 1 %"):
        stability.thresholds(lin, 2)


def test_progress_is_told():
    rng = np.random.default_rng(7)
    rows = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)
    told = []
    lin = stability.linearize(
        _linear,
        jnp.zeros(5),
        rows,
        jnp.zeros(9),
        chunk_size=4,
        progress=lambda *x: told.append(x),
    )
    assert told[0] == (0, 6, "linearize")
    assert told[-1] == (6, 6, "linearize")
    for function, arguments in (
        (stability.thresholds, (2,)),
        (stability.growth_rate, (0.1, 2)),
    ):
        told.clear()
        function(lin, *arguments, progress=lambda *x: told.append(x))
        assert [x[0] for x in told] == list(range(len(told)))
        assert len(told) > 10


# Scale


@pytest.mark.parametrize("size", [1e-15, 1e-8, 1e8, 1e15])
def test_rates_scale_with_the_data_squared(size):
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(10, 2, 4))
    rows[0] *= 3
    errors = rng.normal(size=(10, 2))

    def at(scale, error_scale):
        return stability.linearize(
            linear_outputs,
            jnp.zeros(4),
            jnp.asarray(scale * rows, jnp.float32),
            jnp.asarray(-error_scale * errors, jnp.float32),
        )

    lin, scaled = at(1.0, 1.0), at(size, size)
    for sampling in ("without_replacement", "bernoulli"):
        expected = stability.thresholds(lin, 3, sampling=sampling).rates
        found = stability.thresholds(scaled, 3, sampling=sampling).rates
        assert set(found) == set(expected)
        for name, rate in found.items():
            np.testing.assert_allclose(
                rate * size**2, expected[name], rtol=2e-5, err_msg=name
            )
    one, other = stability.alignment(lin), stability.alignment(scaled)
    for name in ("mu", "alpha", "beta", "isotropic_mu"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=1e-5)
    rate = 1.4 * stability.thresholds(lin, 3).mean_square
    setting = (rate, 3), (rate / size**2, 3)
    np.testing.assert_allclose(
        stability.growth_rate(scaled, *setting[1]),
        stability.growth_rate(lin, *setting[0]),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        stability.expected_losses(scaled, *setting[1], 6),
        stability.expected_losses(lin, *setting[0], 6),
        rtol=1e-4,
    )
    assert stability.escape_time(scaled, *setting[1]) == stability.escape_time(
        lin, *setting[0]
    )
    assert stability.smallest_batch_size(
        scaled, rate / size**2
    ) == stability.smallest_batch_size(lin, rate)
    settled = stability.stationary_covariance(scaled, 0.2 * rate / size**2, 3)
    expected = stability.stationary_covariance(lin, 0.2 * rate, 3)
    factor = size**2
    np.testing.assert_allclose(
        settled.excess_loss / np.float64(factor), expected.excess_loss, rtol=1e-4
    )


@pytest.mark.parametrize("loss_scale", [1e-25, 1e25])
def test_rates_scale_inversely_with_the_loss(loss_scale):
    rng = np.random.default_rng(9)
    rows = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    targets = jnp.asarray(rng.normal(size=8), jnp.float32)
    one = stability.linearize(_linear, jnp.ones(3), rows, targets)
    lin = stability.linearize(
        _linear, jnp.ones(3), rows, targets, loss_scale=loss_scale
    )
    expected, found = (stability.thresholds(x, 2).rates for x in (one, lin))
    for name, rate in found.items():
        np.testing.assert_allclose(rate * loss_scale, expected[name], rtol=2e-5)
    np.testing.assert_allclose(
        stability.alignment(lin).mu, stability.alignment(one).mu, rtol=1e-5
    )


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_curvature_beyond_float32_is_an_error(size):
    rows = jnp.asarray(size * np.eye(3), jnp.float32)
    with pytest.raises(
        ValueError, match="the largest eigenvalue of H, .* beyond float32"
    ):
        stability.linearize(_linear, jnp.zeros(3), rows, jnp.ones(3))


@pytest.mark.parametrize(
    ("streamed", "sizes"),
    [
        (False, [(1e-25, 1.0), (1.0, 1e25)]),
        (True, [(1e25, 1.0), (1.0, 1e-25)]),
    ],
)
def test_the_estimated_alignment_depends_on_no_scale(streamed, sizes):
    rng = np.random.default_rng(10)
    rows = rng.normal(size=(12, 3))
    errors = rng.normal(size=12)
    lin = stability.linearize(
        _linear, jnp.zeros(3), jnp.asarray(rows, jnp.float32), jnp.asarray(errors, "f4")
    )
    exact = stability.alignment(lin)
    for size, error_size in sizes:
        data = (size * rows).astype("f4"), (error_size * errors).astype("f4")
        if streamed:  # in batches of one size, which share their programs
            data = [tuple(x[:6] for x in data), tuple(x[6:] for x in data)]
        found = stability.estimate_alignment(
            _linear, jnp.zeros(3), data, KEY, 4, num_deflated=3
        )
        for name in ("mu", "alpha", "beta", "isotropic_mu"):
            np.testing.assert_allclose(
                getattr(found, name).value, getattr(exact, name), rtol=1e-3
            )
        np.testing.assert_allclose(
            found.loss, np.mean(errors**2) / 2 * error_size**2, rtol=1e-4
        )


# Batch sharpness


def _square(params, batch):
    return jnp.mean((batch[0] @ params - batch[1]) ** 2) / 2


def _batches(sizes=(8, 8, 8)):
    rng = np.random.default_rng(11)
    ends = np.cumsum(sizes)
    inputs = rng.normal(size=(ends[-1], 4)).astype("f4")
    parts = [inputs[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [(x, (x.astype("f8") @ np.ones(4)).astype("f4")) for x in parts]


def _ratio(batch, params):
    x, y = (np.asarray(a, "f8") for a in batch)
    grad = x.T @ (x @ params - y) / len(x)
    return np.mean((x @ grad) ** 2) / (grad @ grad)


def test_batches_may_be_lists_and_of_unequal_size():
    batches = _batches((8, 8, 3))
    params = np.array([2.0, 0, 1, -1])
    ratios = np.array([_ratio(batch, params) for batch in batches])
    shares = np.array([8, 8, 3]) / 19
    mean = shares @ ratios
    error = np.sqrt(shares**2 @ (ratios - mean) ** 2 * 3 / 2)
    given = jnp.asarray(params, jnp.float32)
    for form in (tuple, list):
        found = stability.batch_sharpness(_square, given, [form(b) for b in batches])
        np.testing.assert_allclose(found.value, mean, rtol=1e-5)
        np.testing.assert_allclose(found.standard_error, error, rtol=1e-4)
    named = [{"x": x, "y": y} for x, y in batches]
    found = stability.batch_sharpness(
        lambda p, b: _square(p, (b["x"], b["y"])), given, iter(named)
    )
    np.testing.assert_allclose(found.value, mean, rtol=1e-5)


@pytest.mark.heart
def test_fitted_batches_are_left_out():
    batches = _batches()
    batches[1] = np.zeros((8, 4), "f4"), np.zeros(8, "f4")
    params = np.array([2.0, 0, 1, -1])
    found = stability.batch_sharpness(_square, jnp.asarray(params, "f4"), batches)
    assert found.num_probes == 2
    ratios = [_ratio(batches[i], params) for i in (0, 2)]
    np.testing.assert_allclose(found.value, np.mean(ratios), rtol=1e-5)
    with pytest.warns(UserWarning, match="batches have no gradients, got 1 whose"):
        found = stability.batch_sharpness(_square, jnp.ones(4), batches[1:2])
    assert np.isnan([found.value, found.standard_error]).all()
    assert found.num_probes == 0


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10])
def test_batch_sharpness_does_not_depend_on_the_size_of_the_errors(size):
    rng = np.random.default_rng(12)
    inputs, errors = rng.normal(size=(8, 4)), rng.normal(size=8)
    batch = inputs.astype("f4"), (size * errors).astype("f4")
    found = stability.batch_sharpness(_square, jnp.zeros(4), [batch])
    expected = _ratio((inputs, errors), np.zeros(4))
    np.testing.assert_allclose(found.value, expected, rtol=1e-4)


def test_second_calls_compile_nothing():
    batches, params = _batches(), jnp.zeros(4)
    lin = stability.linearize(_linear, params, *map(jnp.asarray, batches[0]))
    calls = [
        lambda: stability.batch_sharpness(_square, params, batches),
        lambda: stability.expected_losses(lin, 0.1, 2, 5),
        lambda: stability.escape_time(lin, 3.0, 2),
        lambda: stability.thresholds(lin, 2),
        lambda: stability.linearize(_linear, params, *map(jnp.asarray, batches[0])),
        lambda: stability.report(
            _linear, params, *map(jnp.asarray, batches[0]), 0.1, 2, loss_scale=1.0
        ),
    ]
    for call in calls:
        call()
        with count_compilations() as compiled:
            call()
        assert not compiled


def test_wrong_batches_are_one_sentence():
    batches = _batches()
    bad = [batches[0], (batches[1][0] * np.float32(np.nan), batches[1][1])]
    with pytest.raises(ValueError, match="the loss of batch 2 is nan"):
        stability.batch_sharpness(_square, jnp.zeros(4), bad)
    with pytest.raises(TypeError, match="batches must be a list or another iterable"):
        stability.batch_sharpness(_square, jnp.zeros(4), {"x": batches[0][0]})
    with pytest.raises(ValueError, match="arrays with one leading axis"):
        stability.batch_sharpness(
            _square, jnp.zeros(4), [(batches[0][0], batches[0][1][:, None].T)]
        )


def test_the_tables_of_a_report_are_aligned():
    params, inputs, targets = _flat_problem(0.1, n=20)
    found = stability.report(_linear, params, inputs, targets, 0.1, 2, loss_scale=2.0)
    head, *tables = str(found).split("\n\n")
    assert head.startswith("SGD, learning rate 0.1, batch size 2: ")
    *tables, note = tables
    assert "It took " in note
    assert 0 < found.seconds < 600
    shown = [found.max_eigenvalue, found.thresholds.mean_square]
    for table, num_rows, column, number in zip(
        tables, (14, 9), ("unit", "yours"), shown, strict=True
    ):
        header, *lines = table.splitlines()
        rows = [line for line in lines if not line.startswith("    ")]
        assert len(rows) == num_rows
        assert len(lines) >= 2 * num_rows
        start = header.index(column)
        assert all(row[start - 2 : start] == "  " != row[start] for row in rows)
        assert any(f"{number:.4g}" in row.split() for row in rows)
    assert max(map(len, str(found).splitlines())) <= 78
    assert "in the convention of loss_scale 2" in tables[0]
    # What is usual at this rate: the limit of gradient descent, 2 / 0.1.
    assert " < 20" in next(x for x in tables[0].splitlines() if x.startswith("top"))
    shown = found._repr_html_()
    assert shown.count("<tr>") == 2 + 14 + 9
    assert found.verdict in shown
    assert found.to_dict()["seconds"] == found.seconds


def _decaying(seed):
    """A spectrum of six decades."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(14, 1, 9)) * 10.0 ** -np.arange(9)[None, None]
    return rows.astype("f4")


def _one_flat_example():
    """All examples share a direction; one has another, flat on average, to itself."""
    rows = np.zeros((40, 1, 4), "f4")
    rows[:, 0, 0] = 1.0
    rows[7, 0, 1] = 4.0  # 0.4 of H, and 16 of its own Hessian
    rows[:, 0, 2:] = 1e-4 * np.random.default_rng(0).normal(size=(40, 2))
    return rows


@pytest.mark.parametrize("rows", [_decaying(0), _decaying(1), _one_flat_example()])
def test_flat_directions_are_left_out_where_they_decide_nothing(rows, monkeypatch):
    lin = stability.linearize(
        linear_outputs,
        jnp.zeros(rows.shape[2]),
        jnp.asarray(rows),
        jnp.zeros(rows.shape[:2]),
    )

    def measure():
        rate = stability.thresholds(lin, 1).mean_square
        growths = [stability.growth_rate(lin, x * rate, 1) for x in (0.5, 0.99, 1.5)]
        return rate, *growths

    whole = measure()
    monkeypatch.setattr(_moments, "LARGE_RANK", 2)
    monkeypatch.setattr(_moments, "FIXED_WIDTH", 2)
    assert _moments.sharp_space(lin).rank < len(lin.eigenvalues)
    np.testing.assert_allclose(measure(), whole, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 600, 900, 1000])
def test_widths_are_few_and_hold_the_rank(rank):
    width = _moments._width(rank, 1000)
    assert rank <= width <= 1000
    assert width <= max(1.2 * rank, _moments.FIXED_WIDTH)
    assert len({_moments._width(r, 1000) for r in range(1, 1001)}) <= 6
