"""Data of all shapes: other orders, empty leaves, batch statistics, progress."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import curvature

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 4)).astype("f4")
Y = RNG.normal(size=24).astype("f4")
EXTRA = RNG.exponential(size=24).astype("f4")


class Shuffled:
    """The same examples in another order, and other batches, on each pass."""

    def __init__(self, extra):
        self.rng, self.extra = np.random.default_rng(0), extra

    def __iter__(self):
        order = self.rng.permutation(24)
        for rows in np.split(order, 8):
            yield X[rows], Y[rows], self.extra[rows]


def _weighted(params, batch):
    x, y, weights = batch
    return jnp.sum(weights * (x @ params - y) ** 2) / jnp.sum(weights)


def _shifted(params, batch):
    x, y, shift = batch
    return jnp.mean((x @ params - y) ** 2 + shift)


@pytest.mark.parametrize("second", [Y, Y[:, None].astype(int)])
def test_one_batch_as_a_list_is_not_taken_as_two(second):
    for data in ([X, second], [jnp.asarray(X), jnp.asarray(second)]):
        with pytest.raises(
            ValueError, match=r"data is a list, .* give one batch as a t"
        ):
            curvature.hessian(_shifted, jnp.ones(4), data)


@pytest.mark.heart
@pytest.mark.parametrize(
    ("loss_fn", "extra", "weight_fn"),
    [
        (_weighted, EXTRA, lambda batch: float(batch[2].sum()) / 3),
        (_weighted, EXTRA, lambda batch: np.asarray(batch[2], "f8").sum() * 0.1),
        (_shifted, np.repeat([3e4, -3e4], 12).astype("f4"), None),
        (_shifted, np.zeros(24, "f4"), None),
    ],
    ids=["float weights", "importance weights", "losses that cancel", "plain"],
)
def test_another_order_is_the_same_data(loss_fn, extra, weight_fn):
    operator = curvature.hessian(
        loss_fn, jnp.ones(4), Shuffled(extra), weight_fn=weight_fn
    )
    found = curvature.trace(operator, KEY, num_deflated=4)  # all directions: exact
    weights = extra if loss_fn is _weighted else np.ones(24)
    expected = 2 * (weights @ (X**2).sum(axis=1)) / weights.sum()
    np.testing.assert_allclose(found.value, expected, rtol=1e-4)


@pytest.mark.heart
def test_fitted_data_in_another_order_is_the_same_data():
    fitted = np.linalg.lstsq(X[:4], Y[:4])[0]

    class Fitted:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            order = np.roll(np.arange(4), self.passes)
            return iter([(X[order[:2]], Y[order[:2]]), (X[order[2:]], Y[order[2:]])])

    operator = curvature.hessian(
        lambda p, batch: jnp.mean((batch[0] @ p - batch[1]) ** 2),
        jnp.asarray(fitted),
        Fitted(),
    )
    found = curvature.trace(operator, KEY, num_deflated=4)
    np.testing.assert_allclose(found.value, (X[:4] ** 2).sum() / 2, rtol=1e-4)


def test_a_leaf_of_size_zero_counts_as_nothing():
    params = {"w": jnp.ones(4), "empty": jnp.zeros((0, 3))}
    matrix = 2 * X.T @ X / 24

    def loss_fn(params, batch):
        return jnp.mean((batch @ params["w"]) ** 2)

    for data in (X, [X[:10], X[10:]]):
        operator = curvature.hessian(loss_fn, params, data)
        np.testing.assert_allclose(operator.dense(), matrix, rtol=1e-4, atol=1e-5)
        found = curvature.probe(operator, KEY, num_deflated=4)
        np.testing.assert_allclose(found.trace.value, np.trace(matrix), rtol=1e-4)
        assert found.diagonal.value["empty"].shape == (0, 3)
        pairs = curvature.eigenpairs(operator, KEY)
        np.testing.assert_allclose(
            pairs.values, np.linalg.eigvalsh(matrix)[-1:], rtol=1e-3
        )
    with pytest.raises(ValueError, match="at least one number, got arrays of size 0"):
        curvature.hessian(loss_fn, {"empty": jnp.zeros((0, 3))}, X)


def _normalized(params, batch):
    x, y = batch
    hidden = x @ params
    hidden = hidden - jnp.mean(hidden)
    return jnp.mean((hidden / jnp.sqrt(jnp.mean(hidden**2) + 1e-5) - y) ** 2)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["empirical_fisher", "gradient_covariance"])
def test_batch_statistics_are_refused_where_single_gradients_are_asked(kind, streamed):
    data = [(X[:12], Y[:12]), (X[12:], Y[12:])] if streamed else (X, Y)
    make = getattr(curvature, kind)
    with pytest.raises(ValueError, match="must be the mean of its losses on single"):
        make(_normalized, jnp.ones(4), data).matvec(jnp.ones(4))
    with pytest.raises(ValueError, match="must be the mean of its losses on single"):
        curvature.trace(make(_normalized, jnp.ones(4), data), KEY)
    curvature.hessian(_normalized, jnp.ones(4), data).matvec(jnp.ones(4))


def test_progress_of_a_streamed_probe_counts_batches():
    seen = []
    operator = curvature.hessian(
        lambda p, batch: jnp.mean((batch @ p) ** 2), jnp.ones(4), [X[:10], X[10:]]
    )
    report = lambda *parts: seen.append(parts)  # noqa: E731
    curvature.probe(operator, KEY, 16, num_deflated=2, progress=report)
    # Two passes for the basis and one for its part, two of eight probes each; two batches.
    assert seen[-1] == (10, 10, "probe")
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    with pytest.raises(TypeError, match="progress must be None, a bool or a function"):
        curvature.probe(operator, KEY, progress="bar")
