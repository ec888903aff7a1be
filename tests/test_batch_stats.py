"""Running statistics of BatchNorm from data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

import flatopt.flax  # noqa: E402


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.BatchNorm(3, rngs=rngs)
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(self.dense(self.first(x))))


X = 2.0 * jax.random.normal(jax.random.key(0), (12, 3)) + jnp.arange(3.0)[None]


def _network():
    model = Network(nnx.Rngs(0))
    model.eval()
    return model


@pytest.mark.heart
@pytest.mark.parametrize("sizes", [[12], [6, 6], [2, 3, 7]])
def test_statistics_are_those_of_all_examples_whatever_the_batches(sizes):
    model = _network()
    ends = np.cumsum(sizes)
    batches = [X[e - n : e] for e, n in zip(ends, sizes, strict=True)]
    before = {p: v for p, v in nnx.to_flat_state(nnx.state(model)) if "mean" not in p}
    flatopt.flax.update_batch_stats(model, iter(batches))
    x = np.asarray(X, "f8")
    np.testing.assert_allclose(model.first.mean[...], x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(model.first.var[...], x.var(axis=0), rtol=1e-4)
    # The second sees each batch normalized by its own statistics.
    kernel, bias = (
        np.asarray(v[...], "f8") for v in (model.dense.kernel, model.dense.bias)
    )
    hidden = []
    for batch in batches:
        b = np.asarray(batch, "f8")
        hidden.append((b - b.mean(axis=0)) / np.sqrt(b.var(axis=0) + 1e-5))
    hidden = np.concatenate(hidden) @ kernel + bias
    np.testing.assert_allclose(
        model.second.mean[...], hidden.mean(axis=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(model.second.var[...], hidden.var(axis=0), rtol=1e-4)
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if path in before and "var" not in path:
            assert (
                value.get_value() is before[path].get_value()
                or (value.get_value() == before[path].get_value()).all()
            )
    assert model.first.use_running_average
    assert model.first.momentum == 0.99
    assert model.dropout.deterministic


def test_statistics_that_were_not_finite_are_replaced():
    model = _network()
    model.first.mean[...] = jnp.full(3, jnp.nan)
    flatopt.flax.update_batch_stats(model, [X])
    assert jnp.isfinite(model.first.mean[...]).all()
    assert jnp.isfinite(model.second.var[...]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batches_of_trees_and_narrow_inputs(dtype, standard_promotion):
    model = _network()
    batches = [{"x": X.astype(dtype), "y": jnp.ones(12)}]
    flatopt.flax.update_batch_stats(
        model, batches, apply_fn=lambda model, batch: model(batch["x"])
    )
    assert model.first.mean[...].dtype == jnp.float32
    rtol = 1e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(
        model.first.mean[...], X.mean(axis=0), rtol=rtol, atol=rtol
    )


def test_one_compilation_for_each_shape():
    model, traces = _network(), []

    def apply_fn(model, batch):
        traces.append(batch.shape)
        return model(batch)

    flatopt.flax.update_batch_stats(model, [X[:4], X[:4], X[:2]], apply_fn=apply_fn)
    assert traces == [(4, 3), (2, 3)]


@pytest.mark.parametrize(
    ("model", "batches", "error", "match"),
    [
        (_network, [], ValueError, "batches must hold at least one batch, got none"),
        (_network, 3, TypeError, "batches must be an iterable of batches, got int"),
        (
            _network,
            [1.0],
            ValueError,
            "must have one leading axis of examples, got the",
        ),
        (
            lambda: nnx.Linear(3, 1, rngs=nnx.Rngs(0)),
            [X],
            ValueError,
            "model must hold",
        ),
        (lambda: {"a": 1}, [X], TypeError, "model must be an nnx.Module, got dict"),
    ],
)
def test_wrong_arguments(model, batches, error, match):
    with pytest.raises(error, match=match):
        flatopt.flax.update_batch_stats(model(), batches)


def test_a_layer_that_is_passed_by_is_named():
    model = _network()
    before = model.first.mean[...]
    for apply_fn in (
        lambda model, x: model.dense(x),
        lambda model, x: model.first(x, use_running_average=True),
    ):
        with pytest.raises(
            ValueError, match="apply_fn must pass through every nnx.Bat"
        ):
            flatopt.flax.update_batch_stats(model, [X], apply_fn=apply_fn)
    np.testing.assert_array_equal(model.first.mean[...], before)


# A share of the clean gradient


def test_the_clean_gradient_of_a_model_is_mixed_in():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def loss_fn(model, batch):
        return jnp.mean(jnp.tanh(model(batch)) ** 2)

    def grads(share):
        f = flatopt.flax.value_and_grad(loss_fn, 0.3, clean_weight=share)
        return f(jax.random.key(0), model, X)[1]

    clean = nnx.grad(loss_fn)(model, X)
    noisy = grads(None)
    expected = jax.tree.map(lambda c, n: 0.25 * c + 0.75 * n, clean, noisy)
    for one, two in zip(
        jax.tree.leaves(grads(0.25)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    assert not np.allclose(noisy["kernel"], clean["kernel"], rtol=1e-2)
