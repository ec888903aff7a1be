"""Top pairs with multiplicities, after crossings, and what is said where some may lack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flatopt import curvature

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(40, 6))
ENDS = ("largest", "smallest", "magnitude")


def _wanted(values, k, which):
    order = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}
    return values[np.argsort(order[which])][:k]


def _quadratic(params, batch):
    return params @ batch[0] @ params / 2


def _operator(matrix):
    params = np.zeros(len(matrix), "f4")
    return curvature.hessian(_quadratic, params, matrix.astype("f4")[None])


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("outputs", [2, 3, 7, 10])
def test_copies_of_a_linear_head_are_all_found(outputs, which):
    matrix = np.kron(INPUTS.T @ INPUTS / 40, np.eye(outputs))
    matrix -= 0.1 * np.eye(len(matrix))  # an indefinite one
    operator, values = _operator(matrix), np.linalg.eigvalsh(matrix)
    wrong = 0
    for seed in range(24):
        k = (2, 5, 10)[seed % 3]
        found = curvature.eigenpairs(operator, jax.random.key(seed), k, which=which)
        assert found.is_complete
        error = np.abs(found.values - _wanted(values, k, which)).max()
        wrong += error > 3e-3 * values[-1]
    assert wrong == 0


SPECTRA = {
    "cluster": np.r_[5.0, 5.0, 5 - 1e-2, 5 - 1e-2, 4.9, np.linspace(0, 3, 115)],
    "low rank": np.r_[3.0, 3.0, 3.0, 2.0, 2.0, np.zeros(115)],
    "two ends": np.r_[4.0, 4.0, -4.0, -4.0, np.linspace(-1, 1, 116)],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_clusters_flat_bulks_and_two_ends(name):
    values = SPECTRA[name]
    rotation, _ = np.linalg.qr(RNG.normal(size=(120, 120)))
    operator = _operator((rotation * values) @ rotation.T)
    for seed in range(6):
        for which in ENDS:
            k = 4
            found = curvature.eigenpairs(operator, jax.random.key(seed), k, which=which)
            expected = _wanted(values, k, which)
            if which == "magnitude":  # the order of equal magnitudes is open
                found, expected = np.sort(np.abs(found.values)), np.abs(expected)[::-1]
            else:
                found = found.values
            np.testing.assert_allclose(found, expected, atol=1.5e-2)


def _softmax(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def _model(params, inputs):
    return inputs @ params


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "kind", ["hessian", "gauss_newton", "empirical_fisher", "gradient_covariance"]
)
def test_every_kind_whole_and_streamed(kind, streamed):
    # A softmax head at zero has (c - 1) copies; a fit of signs -1 and 1 by two equal
    # outputs gives the matrices of single gradients copies as well.
    x = INPUTS.astype("f4")
    if kind in ("hessian", "gauss_newton"):
        params, targets, loss = np.zeros((6, 4), "f4"), np.zeros(40, "i4"), _softmax
        matrix = np.kron(INPUTS.T @ INPUTS / 40, np.eye(4) / 4 - 1 / 16)
    else:
        x = np.concatenate([x[:6], x[:6]])
        signs = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), np.ones((6, 1)))
        params, targets = np.zeros((6, 2), "f4"), signs.astype("f4")
        loss = lambda f, y: jnp.sum((f - y) ** 2) / (2 * len(y))  # noqa: E731
        grads = np.einsum("ni,nc->nic", x.astype("f8"), -signs).reshape(12, -1)
        matrix = grads.T @ grads / 12
        mean = grads.mean(axis=0)
        matrix -= np.outer(mean, mean) * (kind == "gradient_covariance")
    data = (x, targets)
    if streamed:
        half = len(x) // 2
        data = [jax.tree.map(lambda a: a[:half], data), (x[half:], targets[half:])]
    if kind == "gauss_newton":
        operator = curvature.gauss_newton(_model, loss, params, data)
    else:
        whole = lambda p, b: loss(_model(p, b[0]), b[1])  # noqa: E731
        operator = getattr(curvature, kind)(whole, params, data)
    values = np.linalg.eigvalsh(matrix)
    for k, seed in ((3, 0), (7, 1)):
        found = curvature.eigenpairs(operator, jax.random.key(seed), k)
        assert found.is_complete
        expected = _wanted(values, k, "largest")
        np.testing.assert_allclose(found.values, expected, atol=3e-3 * values[-1])


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_a_start_does_not_hide_what_has_overtaken_it(which):
    sign = 1 if which == "largest" else -1
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rotation, _ = np.linalg.qr(rng.normal(size=(100, 100)))
        values = np.abs(rng.normal(size=100)).clip(0, 3)
        pairs = None
        for first, second in ((10.0, 9.0), (10.0, 12.0), (13.0, 12.0)):
            values[:2] = first, second
            operator = _operator(sign * (rotation * values) @ rotation.T)
            pairs = curvature.eigenpairs(
                operator, jax.random.key(seed), which=which, start=pairs
            )
            assert pairs.is_complete
            np.testing.assert_allclose(
                sign * pairs.values, [max(first, second)], rtol=1e-3
            )


def test_what_may_be_missing_is_said():
    operator = _operator(np.kron(np.diag([2.0, 1.0, 0.5, 0.1]), np.eye(9)))
    found = curvature.eigenpairs(operator, KEY, 6, max_matvecs=12)
    assert not found.is_complete
    assert curvature.eigenpairs(operator, KEY, 6).is_complete
    assert curvature.eigenpairs(operator, KEY, 36).is_complete  # the whole space


@pytest.mark.heart
def test_progress_counts_products_and_batches():
    operator = _operator(np.diag(np.arange(1.0, 40.0)))
    seen = []
    curvature.eigenpairs(operator, KEY, progress=lambda *report: seen.append(report))
    assert seen[0][0] == 0
    assert seen[0][2] == "eigenpairs"
    assert [report[0] for report in seen] == list(range(len(seen)))
    assert all(done <= total for done, total, _ in seen)
    stream = curvature.hessian(
        _quadratic, np.zeros(3, "f4"), [np.eye(3)[None], 2 * np.eye(3)[None]]
    )
    seen.clear()
    curvature.eigenpairs(stream, KEY, progress=lambda *report: seen.append(report))
    assert seen[-1][0] % 2 == 0
    assert seen[-1][0] > 0
