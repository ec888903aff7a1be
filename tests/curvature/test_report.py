"""The diagonal and the page of a matrix, against dense ones."""

import html.parser
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import count_compilations, leaves_array
from test_curvature import SPECTRA, spectrum
from test_parts import DATA, HALVES, KEY, OF_OUT, _dense, _operator

from flatopt import curvature
from flatopt._core import host, risk


def _quadratic(params, batch):
    flat = jnp.concatenate([params["a"].ravel(), params["b"]])
    return flat @ batch[0] @ flat / 2


PARAMS = {"a": np.zeros((6, 5), "f4"), "b": np.zeros(50, "f4")}


def _of(name):
    """A matrix with a known spectrum in random directions, and its operator."""
    matrix = spectrum(SPECTRA[name])
    batch = matrix.astype("f4")[None]
    return matrix, curvature.hessian(_quadratic, PARAMS, batch)


def _flat(tree):
    return np.concatenate(
        [np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(tree)], 1
    )


@jax.jit
def _diagonals(operator, keys):
    found = jax.vmap(lambda key: curvature.diagonal(operator, key)[:2])(keys)
    signs = jax.vmap(
        lambda key: curvature.probe(operator, key, 48, num_deflated=0).diagonal.value
    )(keys)
    return *found, signs


@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_of_the_diagonal_hold_and_sketches_pay(name):
    matrix, operator = _of(name)
    truth = np.diag(matrix)[None]
    keys = jax.random.split(jax.random.key(1), 300)
    value, error, signs = map(_flat, _diagonals(operator, keys))
    quantile = scipy.stats.t.ppf(0.975, 15)  # of 48 products 16 are signs
    held = np.abs(value - truth) <= quantile * error + 1e-6 * np.abs(truth)
    assert 0.92 <= held.mean() <= 0.98
    deviation = lambda x: np.sqrt(((x - truth) ** 2).mean())  # noqa: E731
    if name != "indefinite":  # whose spectrum has no end to project out
        assert deviation(value) < 0.9 * deviation(signs)


@pytest.mark.heart
@pytest.mark.parametrize("data", [DATA, HALVES], ids=["whole", "streamed"])
def test_the_diagonal_of_a_block_is_that_of_the_dense_matrix(data):
    operator = _operator("hessian", data, mask="out")
    found = curvature.diagonal(operator, KEY)
    assert found.value["in"]["kernel"] is None
    truth = np.diag(_dense("hessian")[OF_OUT, OF_OUT])
    value = leaves_array(found.value)
    np.testing.assert_allclose(value, truth, rtol=1e-3, atol=1e-5)
    assert max(map(np.max, jax.tree.leaves(found.standard_error))) < 1e-3


def test_the_diagonal_of_a_small_matrix_is_exact():
    """Of 16 random directions in 16 dimensions two in five draws lack one."""
    matrix = np.random.default_rng(0).normal(size=(16, 16)).astype("f4")
    matrix += matrix.T
    batch = matrix[None]
    params = {"a": np.zeros((3, 2), "f4"), "b": np.zeros(10, "f4")}
    operator = curvature.hessian(_quadratic, params, batch)
    keys = jax.random.split(KEY, 12)
    find = jax.jit(jax.vmap(lambda key: curvature.diagonal(operator, key)[:2]))
    value, error = map(_flat, find(keys))
    truth = np.broadcast_to(np.diag(matrix), value.shape)
    np.testing.assert_allclose(value, truth, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(error, 0, atol=1e-5)


def test_too_few_products():
    with pytest.raises(ValueError, match=r"at least 4 for a standard error, got 3\."):
        curvature.diagonal(_of("step")[1], KEY, 3)


class _Cells(html.parser.HTMLParser):
    """The texts of an HTML table."""

    def __init__(self, text):
        super().__init__()
        self.texts = []
        self.feed(text)

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_says_what_the_dense_matrix_says():
    matrix, operator = _of("indefinite")
    calls = []
    found = curvature.report(
        operator, KEY, 3, progress=lambda *call: calls.append(call)
    )
    assert [done for done, _, _ in calls] == [0, 1, 2, 3, 4]
    assert {total for _, total, _ in calls} == {4}
    values = np.linalg.eigvalsh(matrix)[::-1]
    np.testing.assert_array_less(np.abs(found.eigenvalues - values[:3]), found.bounds)
    np.testing.assert_allclose(found.critical_learning_rate, 2 / 20, rtol=1e-3)
    low, high = found.trace.interval(0.999)
    assert low <= np.trace(matrix) <= high
    low, high = found.frobenius_norm.interval(0.999)
    assert low <= np.linalg.norm(matrix) <= high
    diagonal = np.diag(matrix)
    for name, part in (("a", diagonal[:30]), ("b", diagonal[30:])):
        low, high = found.layer_traces[name].interval(0.999)
        assert low <= part.sum() <= high
        assert found.layer_sizes[name] == len(part)
    counts = {
        "num_negative": (values < -0.2).sum(),
        "num_near_zero": (np.abs(values) <= 0.2).sum(),
        "num_positive": (values > 0.2).sum(),
    }
    for name, count in counts.items():
        assert abs(found.counts[name].value - count) < 0.25 * len(matrix)
    np.testing.assert_allclose(
        sum(float(x.value) for x in found.counts.values()), len(matrix), rtol=1e-5
    )
    np.testing.assert_allclose(found.density.nodes.min(), values[-1], rtol=0.05)
    assert (found.loss, found.gradient_norm) == (0, 0)

    text = str(found)
    assert max(map(len, text.splitlines())) <= 96
    assert "Hessian of 80 parameters" in text
    cells = _Cells(found._repr_html_()).texts
    for word in ("eigenvalue 3", "num_negative", "critical_learning_rate", "a", "b"):
        assert word in cells
        assert word in text
    kept = found.to_dict()
    assert json.loads(json.dumps(kept)) == kept
    assert kept["layer_traces"] == {
        name: float(x.value) for name, x in found.layer_traces.items()
    }


def test_pages_of_streamed_blocks_and_of_other_matrices():
    truth = _dense("gradient_covariance")[OF_OUT, OF_OUT]
    operator = _operator("gradient_covariance", HALVES, mask="out")
    found = curvature.report(operator, KEY, progress=False)
    largest = np.linalg.eigvalsh(truth)[::-1]
    np.testing.assert_allclose(found.eigenvalues, largest, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.trace.value, np.trace(truth), rtol=1e-3)
    assert {*found.layer_traces} == {"out/bias", "out/kernel"}
    text = str(found)
    assert text.startswith("covariance of gradient noise of 3 parameters.")
    assert "learning" not in text
    assert "loss^2/p^2" in text


def _page(matrix, eigenvalue, bound=0.01):
    estimate = curvature.Estimate(np.float32(eigenvalue), np.float32(0), 2)
    nodes = np.full((2, 1), min(eigenvalue, 0.0))
    return curvature.Report(
        matrix,
        1,
        0.0,
        0.0,
        estimate,
        estimate,
        np.array([eigenvalue]),
        np.array([bound]),
        {"w": estimate},
        {"w": 1},
        curvature.SpectralDensity(nodes, np.ones((2, 1))),
    )


def test_a_page_says_whether_the_search_was_complete():
    whole = _page("Hessian", 3.0)
    short = whole._replace(is_complete=False)
    words = (
        "the search was complete",
        "the search was cut short, so some may be missing",
    )
    for found, said, unsaid in ((whole, *words), (short, *words[::-1])):
        for text in (" ".join(str(found).split()), found._repr_html_()):
            assert said in text
            assert unsaid not in text
        assert found.to_dict()["is_complete"] is found.is_complete


@pytest.mark.heart
@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ((1.0, 0.0), "curvature.report will take about 8 minutes more"),
        ((0.0, 0.5), "curvature.report will take about 10 seconds more"),
        ((0.0, 0.0), ""),
    ],
)
def test_a_page_says_beforehand_how_long_it_takes(monkeypatch, capfd, seconds, said):
    monkeypatch.setattr(risk.Risk, "time_gradient", lambda self: seconds)
    monkeypatch.setattr(risk.Risk, "gradient", property(_stop))
    for progress in (None, False):
        with pytest.raises(InterruptedError):
            curvature.report(_of("step")[1], KEY, progress=progress)
        text = capfd.readouterr().err
        assert said in text if progress is None else "will take" not in text


def _stop(self):
    raise InterruptedError


def test_a_page_compiles_little_and_another_one_of_its_shape_nothing():
    def loss_fn(params, batch):
        return jnp.mean(jnp.cos(batch @ params["w"])) + jnp.sum(params["b"] ** 4)

    params = {"w": np.arange(6, dtype="f4"), "b": np.ones(5, "f4")}
    other, batch = jax.tree.map(lambda x: x + 1, params), np.eye(9, 6, dtype="f4")
    with count_compilations() as compiled:
        curvature.report(curvature.hessian(loss_fn, params, batch), KEY)
    # The loss, its gradient, one product, eight; draws, keys and other small things.
    assert len(compiled) <= 30
    with count_compilations() as compiled:
        curvature.report(curvature.hessian(loss_fn, other, batch), KEY)
    assert not compiled


@pytest.mark.heart
@pytest.mark.parametrize(
    ("name", "data"),
    [("hessian", DATA), ("gradient_covariance", HALVES)],
    ids=["whole", "streamed"],
)
def test_small_problems_on_the_host_have_the_numbers_of_the_device(
    monkeypatch, name, data
):
    def numbers():
        operator = _operator(name, data)
        pairs = curvature.eigenpairs(operator, KEY, 3)
        density = curvature.spectral_density(operator, KEY, num_draws=2, num_steps=6)
        return {
            "probe": curvature.probe(operator, KEY, 9, num_deflated=2),
            "diagonal": curvature.diagonal(operator, KEY, 6),
            "values": pairs.values,
            "again": curvature.eigenpairs(operator, KEY, 2, start=pairs).values,
            "nodes": (density.nodes, density.weights),
        }

    found = numbers()
    monkeypatch.setattr(host, "SMALL", 0)
    truth = numbers()
    assert jax.tree.structure(found) == jax.tree.structure(truth)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        assert type(x) is type(y)
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("eigenvalue", [0.0, -3.0, 0.005])
def test_without_positive_curvature_no_learning_rate_is_critical(eigenvalue):
    found = _page("Hessian", eigenvalue)
    assert found.critical_learning_rate == np.inf
    for text in (str(found), found._repr_html_()):
        assert "learning" not in text
        assert "no eigenvalue is positive beyond its error" in text
        assert "nan" not in text
    assert "Infinity" not in json.dumps(found.to_dict())
    assert "above 0.667" in " ".join(str(_page("Hessian", 3.0)).split())


def test_other_matrices_have_no_critical_learning_rate():
    assert np.isnan(_page("empirical Fisher matrix", 3.0).critical_learning_rate)


def test_results_lie_on_the_device_of_the_parameters():
    device = jax.devices()[1]
    params = jax.device_put(jnp.arange(1.0, 4.0), device)
    operator = curvature.hessian(lambda p: jnp.sum(p**4), params)
    key = jax.random.key(0)
    found = (
        curvature.eigenpairs(operator, key, 2).vectors,
        curvature.diagonal(operator, key).value,
        curvature.probe(operator, key).diagonal.value,
    )
    assert all(x.devices() == {device} for x in found)
    np.testing.assert_allclose(found[1], 12 * np.arange(1.0, 4.0) ** 2, rtol=1e-4)


def test_a_loss_may_hold_what_is_traced():
    params, key = jnp.arange(1.0, 4.0), jax.random.key(0)

    def measure(scale):
        operator = curvature.hessian(lambda p: scale * jnp.sum(p**2), params)
        return (
            curvature.probe(operator, key, 8).trace.value,
            curvature.block_lanczos(operator, key, 2).values,
        )

    trace, values = jax.jit(measure)(2.0)
    np.testing.assert_allclose(trace, 12, rtol=1e-5)
    np.testing.assert_allclose(values, 4, rtol=1e-5)
