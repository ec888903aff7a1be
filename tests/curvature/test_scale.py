"""Products, norms, errors and bounds from 1e-25 to 1e25 in float32, against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from flatopt import curvature
from flatopt._core import host
from flatopt.curvature import Estimate

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(24, 30))
SCALES = [1e-25, 1e-18, 1.0, 1e18, 1e25]


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """Where the algebra is done: on the host, as for all small problems, or not."""
    if request.param == "device":
        monkeypatch.setattr(host, "SMALL", 0)


def _model(params, batch):
    return batch[0] @ params


def _loss(outputs, batch):
    return jnp.mean(batch[1] * outputs**2) / 2


def _whole(params, batch):
    return _loss(_model(params, batch), batch)


def _model_pair(params, inputs):
    return _model(params, inputs)


def _make(kind, scale, signs=1.0, streamed=False):
    """An operator whose scale is data, so that all scales share compiled code."""
    weights = scale * signs * np.ones(24)
    data = INPUTS.astype("f4"), weights.astype("f4")
    matrix = (INPUTS.T * (signs * np.ones(24))) @ INPUTS / 24
    if streamed:
        data = [jax.tree.map(lambda x: x[:12], data), tuple(x[12:] for x in data)]
    if kind == "hessian":
        return curvature.hessian(_whole, np.zeros(30, "f4"), data), matrix
    pair = lambda d: ((d[0],), d)  # noqa: E731
    data = [pair(d) for d in data] if streamed else pair(data)
    return curvature.gauss_newton(_model_pair, _loss, np.zeros(30, "f4"), data), matrix


def _relative(estimate, scale):
    value, error = (np.asarray(x, "f8") / scale for x in estimate[:2])
    return Estimate(value, error, estimate.num_probes)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_probes_say_the_same_at_every_scale(kind):
    found = {}
    for scale in SCALES:
        operator, matrix = _make(kind, scale)
        probe = curvature.probe(operator, KEY, 64)
        found[scale] = [
            _relative(e, scale)
            for e in (*probe[:3], *probe[3:], curvature.trace(operator, KEY, 64))
        ]
    trace, diagonal, norm, layers, rows, alone = found[1.0]
    for estimate in (trace, layers, alone):
        assert abs(estimate.value - np.trace(matrix)) < 4 * estimate.standard_error
    assert abs(norm.value - np.linalg.norm(matrix)) < 4 * norm.standard_error
    np.testing.assert_allclose(rows.value, np.linalg.norm(matrix, axis=1), rtol=0.2)
    assert np.median(np.abs(diagonal.value - np.diag(matrix))) < 0.1
    for scale in SCALES:
        for one, other in zip(found[scale], found[1.0], strict=True):
            np.testing.assert_allclose(one.value, other.value, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(
                one.standard_error, other.standard_error, rtol=2e-3, atol=1e-5
            )


@pytest.mark.heart
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_eigenpairs_and_densities_are_honest_at_every_scale(kind):
    signs = np.where(np.arange(24) % 3, 1.0, -1.0) if kind == "hessian" else 1.0
    for scale in SCALES:
        operator, matrix = _make(kind, scale, signs)
        values = np.linalg.eigvalsh(matrix)
        for which, expected in (("largest", values[-1]), ("smallest", values[0])):
            pairs = curvature.eigenpairs(operator, KEY, which=which)
            value, bound = (
                float(x[0]) / scale for x in (pairs.values, pairs.residuals)
            )
            assert np.abs(values - value).min() <= bound <= 3e-3 * values[-1]
            np.testing.assert_allclose(value, expected, atol=3e-3 * values[-1])
            assert np.isfinite(np.asarray(pairs.vectors)).all()
        density = curvature.spectral_density(operator, KEY, num_draws=8, num_steps=20)
        np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-5)
        for power in (1, 2, 3):
            moment = density.moment(power)
            low, high = _relative(moment, scale**power).interval(0.999)
            assert low <= np.mean(values**power) <= high
        points = np.linspace(3 * values[0] - 9, 3 * values[-1] + 9, 4001) * scale
        mass = density.density(points).sum() * (points[1] - points[0])
        np.testing.assert_allclose(mass, 1, rtol=1e-3)


def test_norms_of_a_population_at_every_scale():
    expected = None
    for scale in SCALES:
        operator, _ = _make("hessian", scale, streamed=True)
        found = _relative(curvature.population_frobenius_norm(operator, KEY, 64), scale)
        expected = expected or found
        np.testing.assert_allclose(found.value, expected.value, rtol=1e-3)
        np.testing.assert_allclose(
            found.standard_error, expected.standard_error, rtol=1e-3
        )
    halves = [INPUTS[:12].T @ INPUTS[:12] / 12, INPUTS[12:].T @ INPUTS[12:] / 12]
    truth = np.sqrt(np.sum(halves[0] * halves[1]))
    assert abs(expected.value - truth) < 4 * expected.standard_error


@pytest.mark.heart
@pytest.mark.usefixtures("place")
def test_layers_of_scales_far_apart_keep_their_errors():
    matrix = INPUTS.T @ INPUTS / 24

    def loss_fn(params, batch):
        first, second = params
        return (
            1e18 * first @ batch[0] @ first + 1e-18 * second @ batch[0] @ second
        ) / 2

    operator = curvature.hessian(
        loss_fn,
        (np.zeros(30, "f4"), np.zeros(30, "f4")),
        matrix.astype("f4")[None],
    )
    found = curvature.probe(operator, KEY, 64, num_deflated=0)
    for index, scale in ((0, 1e18), (1, 1e-18)):
        value = float(found.layer_traces.value[index]) / scale
        error = float(found.layer_traces.standard_error[index]) / scale
        assert 0 < error < np.trace(matrix)
        assert abs(value - np.trace(matrix)) < 4 * error
        rows = np.asarray(found.row_norms.value[index], "f8") / scale
        np.testing.assert_allclose(rows, np.linalg.norm(matrix, axis=1), rtol=0.4)


def test_intervals_of_norms_hold_at_small_and_large_scales():
    keys = jax.random.split(jax.random.key(1), 1000)
    norms = jax.jit(
        lambda operator, keys: jax.vmap(
            lambda key: curvature.probe(operator, key).frobenius_norm[:2]
        )(keys)
    )
    for scale in (1e-15, 1.0, 1e15):
        operator, matrix = _make("hessian", scale)
        value, error = (np.asarray(x, "f8") / scale for x in norms(operator, keys))
        factor = scipy.stats.t.ppf(0.975, 31)
        held = np.mean(np.abs(value - np.linalg.norm(matrix)) <= factor * error)
        assert 0.92 <= held <= 0.98


def test_xtrace_at_every_scale():
    for scale in SCALES:
        operator, matrix = _make("hessian", scale)
        found = curvature.xtrace(operator, KEY, 50)
        np.testing.assert_allclose(
            float(found.value) / scale, np.trace(matrix), rtol=0.05
        )
        assert np.isinf(found.standard_error)


def _linear(params, batch):
    examples, weights = batch
    slopes = examples @ params["a"] + jnp.sum(params["b"]) * examples[:, 0]
    return jnp.sum(weights * slopes) / jnp.sum(weights)


def _total_weight(batch):
    return batch[1].sum()


def _noisy_gradients(ratio, weights):
    """Gradients of a mean ``ratio`` times their noise, and their covariance.

    The mean is a power of two, so that the noise is not rounded in float32.
    """
    rng = np.random.default_rng(3)
    noise = np.round(rng.normal(size=(24, 5)) * 128) / 128
    examples = 2.0 ** round(np.log2(ratio)) + noise
    gradients = np.concatenate([examples, examples[:, :1], examples[:, :1]], axis=1)
    shares = weights / weights.sum()
    centered = gradients - shares @ gradients
    return examples, (centered.T * shares) @ centered


@pytest.mark.heart
@pytest.mark.parametrize("sizes", [[24], [8, 8, 8]], ids=["whole", "streamed"])
def test_a_covariance_does_not_feel_the_mean_gradient(sizes):
    weights = np.random.default_rng(4).integers(1, 4, 24)
    params = {"a": np.zeros(5, "f4"), "b": np.zeros(2, "f4")}
    vector = jax.tree.map(np.ones_like, params)
    for ratio in (1, 1e3, 3e4):
        examples, expected = _noisy_gradients(ratio, weights)
        data = [
            (examples[i:j].astype("f4"), weights[i:j].astype("f4"))
            for i, j in itertools.pairwise(np.cumsum([0, *sizes]))
        ]
        operator = curvature.gradient_covariance(
            _linear,
            params,
            data if len(data) > 1 else data[0],
            weight_fn=_total_weight,
        )
        error = 1e-5 + 3e-7 * ratio
        wrong = np.abs(operator.dense() - expected).max()
        assert wrong < error * np.abs(expected).max()
        form = operator.quadratic_form(vector)
        np.testing.assert_allclose(form, expected.sum(), rtol=10 * error)
