"""The case matrix of curvlinops, made anew: each case against its dense truth.

Losses with their reductions, outputs with more axes, inputs in a dict, a callable object, a
convolutional network, batches of unequal size, all in float64.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flatopt import curvature

KEY = jax.random.key(0)
SIZES = [3, 4]
TOLERANCE = {"rtol": 1e-8, "atol": 1e-11}


class Case(NamedTuple):
    """A model, a loss of its outputs, and how to make parameters and data."""

    model_fn: Callable
    loss_fn: Callable
    shapes: Any
    inputs: tuple
    targets: Callable
    is_sum: bool = False


def _linear(params, inputs):
    return jnp.tanh(inputs @ params["in"]) @ params["out"]


def _of_dict(params, inputs):
    return _linear(params, inputs["x"])


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model that is an object to call."""

    slope: float

    def __call__(self, params, inputs):
        return _linear(params, inputs) + self.slope * jnp.sum(params["out"] ** 2)


def _convolutional(params, inputs):
    x = jax.lax.conv(inputs, params["kernel"], (1, 1), "SAME")
    x = jax.lax.reduce_window(
        jax.nn.sigmoid(x), -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"
    )
    return x.reshape(len(x), -1) @ params["out"]


def _cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def _cross_entropy_sum(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).sum()


def _binary(outputs, shares):
    return optax.sigmoid_binary_cross_entropy(outputs, shares).mean()


def _binary_sum(outputs, shares):
    return optax.sigmoid_binary_cross_entropy(outputs, shares).sum()


def _square(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def _square_sum(outputs, targets):
    return jnp.sum((outputs - targets) ** 2)


def _labels(*shape, classes=2):
    return lambda rng: rng.integers(0, classes, (7, *shape))


def _shares(*shape):
    return lambda rng: rng.uniform(size=(7, *shape))


def _normal(*shape):
    return lambda rng: rng.normal(size=(7, *shape))


ONE = {"in": (3, 2), "out": (2, 1)}
TWO = {"in": (3, 2), "out": (2, 2)}
IMAGES = {"kernel": (2, 1, 3, 3), "out": (8, 10)}
CASES = {
    "cross-entropy, mean": Case(_linear, _cross_entropy, TWO, (3,), _labels()),
    "cross-entropy, sum": Case(
        _linear, _cross_entropy_sum, TWO, (3,), _labels(), is_sum=True
    ),
    "cross-entropy, sequences": Case(_linear, _cross_entropy, TWO, (2, 3), _labels(2)),
    "binary, one output, mean": Case(_linear, _binary, ONE, (3,), _shares(1)),
    "binary, two outputs, mean": Case(_linear, _binary, TWO, (3,), _shares(2)),
    "binary, two outputs, sum": Case(
        _linear, _binary_sum, TWO, (3,), _shares(2), is_sum=True
    ),
    "binary, sequences": Case(_linear, _binary, TWO, (2, 3), _shares(2, 2)),
    "square, two outputs, mean": Case(_Model(0.1), _square, TWO, (3,), _normal(2)),
    "square, two outputs, sum": Case(
        _linear, _square_sum, TWO, (3,), _normal(2), is_sum=True
    ),
    "square, sequences, dict": Case(_of_dict, _square, TWO, (2, 3), _normal(2, 2)),
    "convolutions": Case(
        _convolutional, _cross_entropy, IMAGES, (1, 4, 4), _labels(classes=10)
    ),
}
OF_EXAMPLES = ["empirical_fisher", "gradient_covariance"]
KINDS = ["hessian", "gauss_newton", *OF_EXAMPLES]
DIFFERENCES = "finite_difference_hessian"  # as the Hessian; on one loss, to save time


def _whole_loss(case):
    return _composed(case.model_fn, case.loss_fn)


@functools.cache
def _composed(model_fn, loss_fn):
    """One function for all tests: compiled code is kept by it."""
    return lambda params, batch: loss_fn(model_fn(params, batch[0]), batch[1])


def _problem(case):
    """Parameters and data in float64."""
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=shape) for name, shape in case.shapes.items()}
    inputs = rng.normal(size=(7, *case.inputs))
    if case.model_fn is _of_dict:
        inputs = {"x": inputs}
    return jax.tree.map(jnp.asarray, (params, (inputs, case.targets(rng))))


def _batches(data, sizes=SIZES):
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda x, i=i, n=n: x[i - n : i], data)
        for i, n in zip(ends, sizes, strict=True)
    ]


def _truths(case, params, data):
    """All matrices at once from dense derivatives of raveled parameters."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    whole = _whole_loss(case)

    @jax.jit
    def all_of(flat, data):
        def outputs(flat):
            return case.model_fn(unravel(flat), data[0])

        def of_outputs(raveled):
            return case.loss_fn(raveled.reshape(found.shape), data[1])

        found = outputs(flat)
        jacobian = jax.jacrev(outputs)(flat).reshape(found.size, -1)
        inner = jax.hessian(of_outputs)(found.ravel())
        examples = jax.tree.map(lambda x: x[:, None], data)
        each = jax.vmap(jax.grad(lambda p, e: whole(unravel(p), e)), (None, 0))(
            flat, examples
        )
        centered = each - each.mean(axis=0)
        return {
            "hessian": jax.hessian(lambda p: whole(unravel(p), data))(flat),
            "gauss_newton": jacobian.T @ inner @ jacobian,
            "empirical_fisher": each.T @ each / 7,
            "gradient_covariance": centered.T @ centered / 7,
        }

    found = {name: np.asarray(x) for name, x in all_of(flat, data).items()}
    return found | {DIFFERENCES: found["hessian"]}


def _one(batch):
    return 1.0


def _operator(kind, case, params, data, **options):
    if kind == "gauss_newton":
        functions = case.model_fn, case.loss_fn
    else:
        functions = (_whole_loss(case),)
    return getattr(curvature, kind)(*functions, params, data, **options)


@pytest.mark.heart
@pytest.mark.parametrize("name", CASES)
def test_every_case_has_its_dense_truth(name, x64, standard_promotion):
    case = CASES[name]
    params, data = _problem(case)
    truths = _cached_truths(name)
    for kind in (*KINDS, *[DIFFERENCES] * (name == "cross-entropy, sum")):
        if case.is_sum and kind in OF_EXAMPLES:
            operator = _operator(kind, case, params, data)
            with pytest.raises(
                ValueError, match="loss_fn must be the mean of its loss"
            ):
                operator.matvec(params)
            continue
        tolerance = TOLERANCE
        if kind == DIFFERENCES:
            size = np.abs(truths[kind]).max()
            tolerance = {"rtol": 0, "atol": 1e-8 * size}
        if case.is_sum:  # a mean over batches of sums, each of the same weight
            options, factor = {"weight_fn": _one}, len(SIZES)
        else:
            options, factor = {}, 1
        streamed = _operator(kind, case, params, _batches(data), **options)
        found = factor * np.asarray(streamed.dense())
        np.testing.assert_allclose(found, truths[kind], err_msg=kind, **tolerance)


@functools.cache
def _cached_truths(name):
    return _truths(CASES[name], *_problem(CASES[name]))


@pytest.fixture
def softmax(x64, standard_promotion):
    """Parameters, data and matrices of one case, for forms of operators."""
    case = CASES["cross-entropy, mean"]
    return case, *_problem(case), _cached_truths("cross-entropy, mean")


@pytest.mark.parametrize("kind", [*KINDS, DIFFERENCES])
def test_vectors_blocks_adjoints_and_powers(kind, softmax):
    case, params, data, truths = softmax
    operator, truth = _operator(kind, case, params, data), truths[kind]
    tolerance = {"rtol": 1e-6, "atol": 1e-8}
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(len(truth), 3))
    form = operator.to_scipy()
    np.testing.assert_allclose(form @ matrix, truth @ matrix, **tolerance)
    np.testing.assert_allclose(form.H @ matrix, truth.T @ matrix, **tolerance)
    np.testing.assert_allclose(
        form.rmatvec(matrix[:, 0]), truth @ matrix[:, 0], **tolerance
    )
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    twice = operator.matvec(operator.matvec(params))
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(twice)[0], truth @ (truth @ flat), **tolerance
    )
    np.testing.assert_allclose(
        operator.quadratic_form(unravel(jnp.asarray(matrix[:, 1]))),
        matrix[:, 1] @ truth @ matrix[:, 1],
        **tolerance,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_leaves_leave_the_block_of_the_others(kind, softmax):
    case, params, data, truths = softmax
    found = _operator(kind, case, params, _batches(data), mask="out").dense()
    place = slice(params["in"].size, None)
    np.testing.assert_allclose(found, truths[kind][place, place], rtol=1e-6, atol=1e-8)


class _Loader:
    """Batches that a function makes anew on each pass."""

    def __init__(self, make):
        self.make, self.rng = make, np.random.default_rng(0)

    def __iter__(self):
        return iter(self.make(self.rng))


def _dropout(params, batch):
    inputs, targets, keep = batch
    return _square(_linear(params, inputs * keep), targets)


def _with_dropout(data, rng):
    return *data, rng.integers(0, 2, (7, 3)) * 2.0


def _shuffled(data, rng):
    order = rng.permutation(7)
    return jax.tree.map(lambda x: x[order], data)


def _batch_norm(params, batch):
    inputs, targets = batch
    mean, width = inputs.mean(0, keepdims=True), inputs.std(0, keepdims=True)
    return _square(_linear(params, (inputs - mean) / width), targets)


SQUARES = CASES["square, two outputs, sum"]
NOT_DETERMINISTIC = {
    "dropout": (_dropout, _with_dropout, 7),
    "BatchNorm, shuffled": (_batch_norm, _shuffled, 7),
    "shuffled, the last dropped": (
        _whole_loss(SQUARES._replace(loss_fn=_square)),
        _shuffled,
        6,
    ),
}


@pytest.mark.parametrize("name", NOT_DETERMINISTIC)
def test_what_changes_between_passes_is_refused(name, x64, standard_promotion):
    loss_fn, change, size = NOT_DETERMINISTIC[name]
    params, data = _problem(SQUARES)

    def make(rng):
        changed = jax.tree.map(lambda x: x[:size], change(data, rng))
        return _batches(changed, [3, size - 3])

    operator = curvature.hessian(loss_fn, params, _Loader(make))
    operator.matvec(params)
    with pytest.raises(ValueError, match="data must be the same on every pass"):
        operator.matvec(params)
