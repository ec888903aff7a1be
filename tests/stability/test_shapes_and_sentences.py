"""Shapes that never broadcast, arguments that are refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flatopt import stability
from flatopt.stability import _gram

KEY = jax.random.key(0)


def _data(n=12):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(n, 4)), jnp.float32)
    return jnp.ones(4), inputs, jnp.asarray(rng.normal(size=n), jnp.float32)


def _flat(params, inputs):
    return inputs @ params


def _column(params, inputs):
    return (inputs @ params)[:, None]


def _squeezed(params, inputs):
    return (inputs @ params[:, None]).squeeze()


def _two(params, inputs):
    return jnp.stack([inputs @ params, -inputs @ params], axis=1)


def _mean_square(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


MISMATCHES = [
    (_flat, lambda y: y[:, None], r"\(12,\)", r"\(12, 1\)"),
    (_column, lambda y: y, r"\(12, 1\)", r"\(12,\)"),
    (_two, lambda y: y, r"\(12, 2\)", r"\(12,\)"),
    (_two, lambda y: y[:, None], r"\(12, 2\)", r"\(12, 1\)"),
    (_flat, lambda y: y[:1], r"\(12,\)", r"\(1,\)"),
    (_two, lambda y: jnp.zeros(12, jnp.int32), r"\(12, 2\)", r"\(12,\).*one_hot"),
    (_column, lambda y: y.tolist(), r"\(12, 1\)", r"\(12,\)"),
]


@pytest.mark.heart
@pytest.mark.parametrize(("model_fn", "change", "outputs", "targets"), MISMATCHES)
def test_a_mismatch_is_an_error_that_names_both_shapes(
    model_fn, change, outputs, targets, standard_promotion
):
    params, inputs, right = _data()
    given = change(right)
    both = rf"(?=.*{outputs})(?=.*{targets})"
    calls = [
        lambda: stability.linearize(model_fn, params, inputs, given),
        lambda: stability.report(
            model_fn, params, inputs, given, 0.1, 2, loss_scale=1.0
        ),
    ]
    if not isinstance(given, list):
        calls.append(
            lambda: stability.estimate_alignment(model_fn, params, (inputs, given), KEY)
        )
        calls.append(
            lambda: stability.estimate_alignment(
                model_fn, params, [(inputs, given)], KEY
            )
        )
    for call in calls:
        with pytest.raises(ValueError, match=both):
            call()


@pytest.mark.parametrize("model_fn", [_flat, _column])
def test_a_loss_that_would_broadcast_is_refused(model_fn, standard_promotion):
    params, inputs, right = _data()
    other = right[:, None] if model_fn is _flat else right
    both = r"(?=.*\(12,\))(?=.*\(12, 1\))"
    with pytest.raises(ValueError, match=both):
        stability.linearize(model_fn, params, inputs, other, loss_fn=_mean_square)
    with pytest.raises(ValueError, match=both):
        stability.linearize_gauss_newton(model_fn, _mean_square, params, inputs, other)
    with pytest.raises(ValueError, match=both):
        stability.report(model_fn, params, inputs, other, 0.1, 2, loss_fn=_mean_square)


def test_lists_and_integers_are_targets_of_a_square_loss():
    params, inputs, targets = _data()
    whole = jnp.round(targets * 3)
    expected = stability.linearize(_flat, params, inputs, whole)
    for given in (whole.astype(int), whole.tolist(), np.asarray(whole, "f8")):
        found = stability.linearize(_flat, params, inputs, given)
        np.testing.assert_allclose(found.residuals, expected.residuals)


def test_squeezed_outputs_are_refused():
    params, inputs, targets = _data()
    with pytest.raises(ValueError, match=r"got shape \(\) for one example and \(12,\)"):
        stability.linearize(_squeezed, params, inputs, targets)
    with pytest.raises(ValueError, match=r"got shape \(\) for one example and \(12,\)"):
        stability.linearize_gauss_newton(
            _squeezed, _mean_square, params, inputs, targets
        )
    with pytest.raises(ValueError, match=r"\(1,\) for outputs \(\)"):
        stability.estimate_alignment(_squeezed, params, (inputs, targets), KEY)
    with pytest.raises(
        ValueError, match=r"outputs of shape \(n,\) or \(n, c\), got \(\)"
    ):
        stability.linearize(lambda p, x: jnp.sum(x @ p), params, inputs, targets)


RATES = [
    (0, ValueError, "learning_rate must be positive, got 0"),
    (-0.1, ValueError, "learning_rate must be positive, got -0.1"),
    (np.nan, ValueError, "learning_rate must be finite, got nan"),
    (np.inf, ValueError, "learning_rate must be finite, got inf"),
    (np.ones(2), ValueError, r"learning_rate must be one number, got shape \(2,\)"),
    (True, TypeError, "learning_rate must be a real number, got True"),
    ("0.1", TypeError, "learning_rate must be a real number, got '0.1'"),
    (None, TypeError, "learning_rate must be a real number, got None"),
    (1j, TypeError, "learning_rate must be a real number, got 1j"),
    (optax.constant_schedule(0.1), TypeError, "got a function; evaluate a schedule at"),
]


@pytest.fixture(scope="module")
def lin():
    return stability.linearize(_flat, *_data())


@pytest.mark.parametrize(("rate", "error", "match"), RATES)
def test_rates_that_are_no_positive_number(rate, error, match, lin):
    params, inputs, targets = _data()
    calls = [
        lambda: stability.growth_rate(lin, rate, 2),
        lambda: stability.expected_losses(lin, rate, 2, 3),
        lambda: stability.escape_time(lin, rate, 2),
        lambda: stability.smallest_batch_size(lin, rate),
        lambda: stability.simulate(lin, KEY, rate, 2, 3),
        lambda: stability.stationary_covariance(lin, rate, 2),
        lambda: stability.sharpest_minimum(rate, 2),
        lambda: stability.report(
            _flat, params, inputs, targets, rate, 2, loss_scale=1.0
        ),
    ]
    for call in calls:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.heart
def test_counts_and_words(lin):
    for size, match in (
        (
            0,
            "batch_size must be an int of at least 1, got 0; it is the number of examples",
        ),
        (True, "batch_size must be an int of at least 1, got True"),
        (2.0, "batch_size must be an int of at least 1, got 2.0"),
        (13, "batch_size must be at most the number of examples, 12, got 13"),
    ):
        with pytest.raises(ValueError, match=match):
            stability.thresholds(lin, size)
        with pytest.raises(ValueError, match=match):
            stability.report(_flat, *_data(), 0.1, size, loss_scale=1.0)
    with pytest.raises(
        ValueError, match="num_steps must be an int of at least 1, got 0"
    ):
        stability.expected_losses(lin, 0.1, 2, 0)
    with pytest.raises(
        ValueError, match="num_runs must be an int of at least 1, got 0"
    ):
        stability.simulate(lin, KEY, 0.1, 2, 3, num_runs=0)
    with pytest.raises(ValueError, match="sampling must be one of .*, got 'epoch'"):
        stability.smallest_batch_size(lin, 0.1, sampling="epoch")
    with pytest.raises(TypeError, match="key must be one JAX random key, got 0"):
        stability.simulate(lin, 0, 0.1, 2, 3)
    params, *data = _data()
    with pytest.raises(TypeError, match="key must be one JAX random key, got 0"):
        stability.estimate_alignment(_flat, params, tuple(data), 0)
    with pytest.raises(TypeError, match="progress must be None, a bool or a function"):
        stability.thresholds(lin, 2, progress=3)


def test_values_that_are_not_finite_and_models_without_size():
    params, inputs, targets = _data()
    bad = targets.at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="targets must be finite"):
        stability.linearize(_flat, params, inputs, bad)
    with pytest.raises(ValueError, match="targets must be finite"):
        stability.linearize_gauss_newton(_flat, _mean_square, params, inputs, bad)
    with pytest.raises(
        ValueError, match="model_fn returned outputs that are not finite"
    ):
        stability.report(
            _flat, jnp.nan * params, inputs, targets, 0.1, 2, loss_scale=1.0
        )
    with pytest.raises(ValueError, match="params must hold at least one number"):
        stability.linearize(_flat, jnp.zeros(0), jnp.zeros((12, 0)), targets)
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        stability.report(_flat, params, inputs[:1], targets[:1], 0.1, 1, loss_scale=1.0)
    with pytest.raises(ValueError, match="inputs must hold arrays with a leading axis"):
        stability.linearize(
            lambda p, x: x["x"] @ p, params, {"x": inputs, "t": 1.0}, targets
        )


def test_a_report_needs_the_convention_of_the_loss():
    params, inputs, targets = _data()
    with pytest.raises(
        ValueError, match="report needs loss_fn or loss_scale, got neither"
    ):
        stability.report(_flat, params, inputs, targets, 0.1, 2)
    with pytest.raises(ValueError, match=r"pass loss_scale=2\.$"):
        stability.report(
            _flat, params, inputs, targets, 0.1, 2, loss_scale=1.0, loss_fn=_mean_square
        )
    with pytest.raises(ValueError, match="loss_scale is for squared errors, got 1"):
        stability.report(
            _flat,
            params,
            inputs,
            targets,
            0.1,
            2,
            loss_scale=1.0,
            loss_fn=lambda f, y: jnp.mean(jnp.logaddexp(0.0, -f * y)),
        )
    found = stability.report(
        _flat, params, inputs, targets, 0.1, 2, loss_fn=_mean_square
    )
    assert found.loss_scale == 2
    np.testing.assert_allclose(found.constant_loss, np.var(targets), rtol=1e-5)
    np.testing.assert_allclose(found.loss, _mean_square(_flat(params, inputs), targets))


def test_odd_containers_are_one_sentence():
    params, inputs, targets = _data()
    for given, error, match in (
        (
            {"y": targets},
            TypeError,
            "targets must be one array of the shape of the out",
        ),
        (None, TypeError, "targets must be one array of the shape of the outputs"),
        ([[1.0], [1.0, 2.0]], ValueError, "targets must be rows of one length"),
        (targets.astype(complex), TypeError, "targets must be real, got complex64"),
    ):
        with pytest.raises(error, match=match):
            stability.linearize(_flat, params, inputs, given)
    with pytest.raises(TypeError, match="model_fn must return one array .*, got tuple"):
        stability.linearize(lambda p, x: (x @ p, 1), params, inputs, targets)
    for data in (None, [], {"x": inputs, "y": targets}):
        with pytest.raises(ValueError, match=r"data must be pairs \(inputs, targets\)"):
            stability.estimate_alignment(_flat, params, data, KEY)


def test_leaves_of_size_zero_change_nothing():
    params, inputs, targets = _data()
    expected = stability.linearize(_flat, params, inputs, targets).eigenvalues
    tree = {"none": jnp.zeros((0, 3)), "w": params}
    found = stability.linearize(lambda p, x: x @ p["w"], tree, inputs, targets)
    np.testing.assert_allclose(found.eigenvalues, expected)
    crossing = stability.critical_learning_rate(
        lambda p: jnp.sum(p["w"] ** 2), tree, jax.tree.map(jnp.negative, tree)
    )
    low, high = crossing.bracket
    assert low <= 2 <= high


def test_outputs_whose_products_do_not_fit_are_refused(monkeypatch):
    free = _gram._free_memory()
    assert 0 < free <= _gram._host_memory()
    monkeypatch.setattr(_gram, "_free_memory", lambda: 6 * 8 * 100**2)
    _gram.check_size(100)  # a matrix, its eigenvectors and LAPACK's work space
    with pytest.raises(ValueError, match="inputs give 101 outputs in all"):
        _gram.check_size(101)
    monkeypatch.setattr(_gram, "_free_memory", lambda: 1 << 50)
    with pytest.raises(
        ValueError, match=r"at most 32,000 outputs; ask for num_directions"
    ):
        _gram.check_size(32_767)  # LAPACK's 2 n ** 2 no longer fits 32 bits
