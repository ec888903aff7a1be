"""Cross-entropy over many words: dense truths, and no array beyond the logits."""

import json
import math
import pathlib
import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from helpers import assert_close, leaves_array

from flatopt import curvature
from flatopt._core import risk
from flatopt.curvature import _kinds, _operator
from flatopt.curvature._cross_entropy import lean


def _init(words, width, length, dtype=jnp.float32):
    shapes = {
        "embedding": (words, width),
        "position": (length, width),
        "mixing": (2, width, width),
        "head": (width, words),
    }
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=shape) / 2).astype(dtype)
        for name, shape in shapes.items()
    }


def _model(params, tokens):
    """A causal language model of two scanned layers, in the dtype of its parameters."""
    x = params["embedding"][tokens] + params["position"][None]

    def layer(x, weights):
        scores = jnp.einsum("bqd,bkd->bqk", x @ weights, x)
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None]
        scores = jnp.where(seen, scores, jnp.asarray(-1e9, x.dtype))
        return x + jnp.tanh(jax.nn.softmax(scores) @ x), None

    x, _ = jax.lax.scan(layer, x, params["mixing"])
    return x @ params["head"]


def _mean_loss(logits, labels):
    if logits.dtype == jnp.bfloat16:
        logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _by_log_softmax(logits, labels):
    rows = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(rows, labels[..., None], axis=-1))


def _by_one_hot(logits, labels):
    return optax.softmax_cross_entropy(
        logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    ).mean()


def _of_the_library(logits, labels):
    return jnp.mean(curvature.cross_entropy(logits, labels))


LOSSES = [_mean_loss, _by_log_softmax, _by_one_hot, _of_the_library]


def _loss(params, batch):
    return _mean_loss(_model(params, batch[0]), batch[1])


def _tokens(count, length, words):
    return tuple(np.random.default_rng(1).integers(0, words, (2, count, length)))


@jax.jit
def _log_p_and_slopes(params, inputs):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    log_p = lambda flat: jax.nn.log_softmax(_model(unravel(flat), inputs))  # noqa: E731
    return log_p(flat), jax.jacobian(log_p)(flat)


def _fisher(params, inputs):
    """The Fisher matrix by its definition: labels from the model, every word of them.

    The mean over tokens of sum_c p_c g_c g_c^T, with g_c the gradient of -log p_c.
    """
    log_p, slopes = map(np.asarray, _log_p_and_slopes(params, inputs))
    shares = np.exp(log_p)
    count = math.prod(shares.shape[:2])
    return np.einsum("bsc,bsci,bscj->ij", shares, slopes, slopes) / count


@pytest.mark.heart
@pytest.mark.parametrize("loss_fn", LOSSES)
def test_gauss_newton_of_cross_entropy_is_the_fisher_matrix(loss_fn, x64):
    params = _init(11, 3, 4, jnp.float64)
    inputs, labels = _tokens(5, 4, 11)
    expected = _fisher(params, inputs)
    data = inputs, labels
    if loss_fn is _mean_loss:  # ragged batches of a loader
        data = [(inputs[:3], labels[:3]), (inputs[3:], labels[3:])]
    operator = curvature.gauss_newton(_model, loss_fn, params, data)
    assert_close(operator.dense(), expected, rtol=1e-9, atol=1e-12)
    vector = jax.tree.map(np.cos, params)
    flat = leaves_array(vector)
    assert_close(operator.quadratic_form(vector), flat @ expected @ flat, rtol=1e-9)


def test_in_bfloat16_gauss_newton_is_near_that_of_the_same_weights():
    params = _init(11, 3, 4, jnp.bfloat16)
    data = _tokens(5, 4, 11)
    found = curvature.gauss_newton(_model, _mean_loss, params, data).dense()
    wide = jax.tree.map(lambda x: x.astype("f4"), params)
    expected = _fisher(wide, data[0])
    error = np.linalg.norm(np.asarray(found, "f4") - expected)
    assert error < 0.03 * np.linalg.norm(expected)


def test_cross_entropy_has_the_derivatives_of_its_formula(x64):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(2, 3, 5)), rng.integers(0, 5, (2, 3))
    weights = np.array([[1.0, 2.0, 0.0], [0.5, 1.0, 3.0]])

    def loss_fn(logits):
        return jnp.sum(weights * curvature.cross_entropy(logits, labels))

    z = logits.reshape(6, 5)
    shares = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    w, rows = weights.ravel(), labels.ravel()
    value = -np.sum(w * np.log(shares[np.arange(6), rows]))
    gradient = w[:, None] * (shares - np.eye(5)[rows])
    blocks = [v * (np.diag(p) - np.outer(p, p)) for v, p in zip(w, shares, strict=True)]
    hessian = scipy.linalg.block_diag(*blocks)
    found, slopes = jax.jit(jax.value_and_grad(loss_fn))(logits)
    assert_close(found, value, rtol=1e-12)
    assert_close(np.reshape(slopes, (6, 5)), gradient, atol=1e-13)
    for dense in (jax.hessian(loss_fn), jax.jacrev(jax.grad(loss_fn))):
        found = np.reshape(jax.jit(dense)(logits), (30, 30))
        assert_close(found, hessian, atol=1e-13)


def test_cross_entropy_of_words_that_are_ruled_out_stays_finite():
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [200.0, -200.0, 0.0]])
    tangent = jnp.array([[1.0, 2.0, -1.0], [3.0, 1.0, 0.0]])
    loss_fn = lambda z: curvature.cross_entropy(z, jnp.array([0, 0])).sum()  # noqa: E731
    product = jax.jvp(jax.grad(loss_fn), (logits,), (tangent,))[1]
    p = 1 / (1 + np.e)
    expected = 2 * p * (1 - p) * np.array([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    assert_close(product, expected)


def test_cross_entropy_in_bfloat16_sums_in_float32():
    logits = jnp.zeros((1, 4096), jnp.bfloat16)
    assert_close(curvature.cross_entropy(logits, jnp.zeros(1, int))[0], np.log(4096))


TEMPERATURES = jnp.linspace(1.0, 2.0, 11)
OTHERS = {
    "weights": lambda z, y: jnp.mean(jnp.where(y > 0, _integer(z, y), 0.0)),
    "sum": lambda z, y: jnp.sum(_integer(z, y)),
    "smoothed": lambda z, y: (
        0.9 * _mean_loss(z, y) - 0.1 * jax.nn.log_softmax(z).mean()
    ),
    "scaled": lambda z, y: _mean_loss(2 * z, y),
    "constants": lambda z, y: _mean_loss(z / TEMPERATURES[None, None], y),
    "one hot": _by_one_hot,
}
_integer = optax.softmax_cross_entropy_with_integer_labels


def test_only_optax_own_mean_is_taken_for_it():
    logits, labels = jnp.zeros((2, 11, 11)), jnp.zeros((2, 11), jnp.int32)
    same = [
        lambda z, y: _integer(z, y).mean(),
        lambda z, y: jnp.mean(_integer(logits=z, labels=y)),
        lambda z, y: _integer(z.astype(jnp.float32), y).mean(),
    ]
    for loss_fn in same:
        assert lean(loss_fn, logits, labels) is not loss_fn
    half = logits.astype(jnp.bfloat16)
    assert lean(same[2], half, labels) is not same[2]
    for name, loss_fn in OTHERS.items():
        assert lean(loss_fn, logits, labels) is loss_fn, name
    by_name = lambda z, y: _integer(z, y["labels"]).mean()  # noqa: E731
    assert lean(by_name, logits, {"labels": labels}) is by_name


# Shapes alone: nothing of this size is made.
WORDS, WIDTH, TOKENS, ROWS = 50_000, 4, (2, 8), 3
KINDS = {
    "gauss_newton": _kinds.GaussNewton(_model, _mean_loss),
    "hessian": _kinds.Hessian(_loss),
    "empirical_fisher": _kinds.EmpiricalFisher(_loss),
    "gradient_covariance": _kinds.GradientCovariance(_loss),
}
FUNCTIONS = {
    "products": _operator.Products,
    "quadratic forms": lambda kind: _operator.Quadratics(kind, _operator._given),
}


def _shapes(name):
    params = jax.eval_shape(lambda: _init(WORDS, WIDTH, TOKENS[1]))
    block = jax.eval_shape(
        lambda p: jax.tree.map(lambda x: jnp.zeros((ROWS, *x.shape)), p), params
    )
    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    rest = (None,) if name == "quadratic forms" else ()
    return params, (tokens, tokens), block, *rest


def _sizes(text):
    """The sizes of arrays with an axis of all words, but for parameters and vectors."""
    found = set()
    for match in re.findall(r"\w\d+\[([\d,]+)\]", text):
        shape = tuple(map(int, match.split(",")))
        rows = math.prod(shape[:-2])
        if WORDS in shape and not (set(shape[-2:]) == {WORDS, WIDTH} and rows <= ROWS):
            found.add(math.prod(shape))
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_array_is_larger_than_the_logits(kind, function):
    logits = math.prod(TOKENS) * WORDS
    traced = jax.jit(FUNCTIONS[function](KINDS[kind])).trace(*_shapes(function))
    assert max(_sizes(str(traced.jaxpr))) == logits


def test_no_array_of_a_streamed_product_is_larger_than_the_logits():
    function = _operator.Products(KINDS["gauss_newton"])
    params, batch, block = _shapes("products")
    loss, asked = jax.eval_shape(function, params, batch, block)
    weight = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (loss, loss, asked), weight, params, batch, block
    lowered = risk.add_weighted.lower(function, *arguments)
    sizes = _sizes(lowered.compile().as_text())
    assert max(sizes) == math.prod(TOKENS) * WORDS


def test_the_matrix_of_all_words_would_be_seen():
    dense = jax.hessian(lambda logits: _mean_loss(logits[None], jnp.zeros(1, int)))
    jaxpr = jax.make_jaxpr(dense)(jax.ShapeDtypeStruct((WORDS,), jnp.float32))
    assert max(_sizes(str(jaxpr))) == WORDS**2


def test_outputs_stand_apart_from_the_forward_pass_but_for_cpu():
    """The barrier saves a TPU memory as large as the logits; a CPU it costs parameters."""
    traced = jax.jit(_operator.Products(KINDS["gauss_newton"])).trace(
        *_shapes("products")
    )
    for platform, is_apart in {"cpu": False, "tpu": True, "cuda": True}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in text) == is_apart, platform


RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results" / "language.json"


def test_a_product_of_a_transformer_takes_little_beyond_a_gradient():
    """As compiled by ``make bench-language``: 12 layers, 50,000 words, 8 x 512 tokens."""
    report = json.loads(RESULTS.read_text())
    for target, chips in (("cpu", 1), ("v5e, 1 chip", 1), ("v5e, 4 chips", 4)):
        allowed = 1.5 * 4 * report["num_logits"] / chips
        part = report["targets"][target]
        rows = {
            name: row["temporary_bytes"]
            for name, row in part["rows"].items()
            if "error" not in row
        }
        names = [name for name in rows if "Gauss" in name or "Fisher" in name]
        assert "Gauss-Newton product" in names
        for name in names:
            assert rows[name] <= rows["gradient"] + allowed, (target, name)


def test_wrong_logits_and_labels():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, int)
    with pytest.raises(TypeError, match="logits must be a floating array, got"):
        curvature.cross_entropy(labels, labels)
    with pytest.raises(TypeError, match="labels must be an array of integers, got"):
        curvature.cross_entropy(logits, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"got \(3,\) for \(2, 3\); give one label a"):
        curvature.cross_entropy(logits, jnp.zeros(3, int))
