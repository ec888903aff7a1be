"""The case matrix of curvlinops, made anew: each case against its dense truth.

Losses with their reductions, outputs with more axes, inputs in a dict, a callable object,
convolutional networks, attention, batches of unequal size, all in float64.
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
from flax import nnx
from helpers import leaves_array

from flatopt import curvature

SIZES = [4, 4]
TOLERANCE = {"rtol": 1e-8, "atol": 1e-11}


class Case(NamedTuple):
    """A model, a loss of its outputs, and how to make parameters and data.

    Attributes:
      slopes: of the sum of losses, a token each: gradients and Hessians, in NumPy.
      weights: of the examples in the mean, from the shape of outputs and the targets.
      sizes: of the batches; equal ones share a program.
      has_forms: whether quadratic forms are compared, too.
    """

    model_fn: Callable
    loss_fn: Callable
    slopes: Callable
    shapes: Any
    inputs: tuple
    targets: Callable
    weights: Callable
    weight_fn: Callable | None = None
    sizes: Any = SIZES
    has_forms: bool = False

    @property
    def is_sum(self):
        return self.weights is _together


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


class _CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(
            2, use_running_average=True, rngs=rngs, param_dtype=jnp.float64
        )
        self.head = nnx.Linear(2, 2, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        x = nnx.max_pool(nnx.gelu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
        return self.head(x.mean(axis=(1, 2)))


@functools.cache
def _cnn():
    """Structure, parameters without values, and running statistics."""
    module = nnx.eval_shape(lambda: _CNN(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    rng = np.random.default_rng(3)
    return graphdef, params, jax.tree.map(lambda x: rng.uniform(1, 2, x.shape), rest)


def _with_batch_norm(params, inputs):
    graphdef, _, rest = _cnn()
    return nnx.merge(graphdef, params, jax.tree.map(jnp.asarray, rest))(inputs)


def _attention(params, x):
    query, key, value = (x @ params[name] for name in ("query", "key", "value"))
    weights = jax.nn.softmax(query @ key.swapaxes(1, 2), axis=-1)
    return (weights @ value).mean(axis=1) @ params["head"]


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


def _half_square_sum(outputs, targets):
    return jnp.sum((outputs - targets) ** 2) / (2 * len(targets))


def _token_mean(outputs, targets):
    labels, mask = targets["labels"], targets["mask"]
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return jnp.sum(losses * mask) / jnp.sum(mask)


def _of_cross_entropy(outputs, labels):
    shares = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    one = np.eye(outputs.shape[1])
    blocks = shares[:, None] * one - shares[:, None] * shares[:, :, None]
    return shares - one[labels.ravel()], blocks


def _of_binary(outputs, shares):
    p = 1 / (1 + np.exp(-outputs))
    slopes = p - shares.reshape(p.shape)
    return slopes, (p * (1 - p))[:, None] * np.eye(p.shape[1])


def _of_square(outputs, targets):
    slopes = 2 * (outputs - targets.reshape(outputs.shape))
    return slopes, np.tile(2 * np.eye(outputs.shape[1]), (len(outputs), 1, 1))


def _of_tokens(outputs, targets):
    slopes, blocks = _of_cross_entropy(outputs, targets["labels"])
    mask = targets["mask"].ravel()
    return mask[:, None] * slopes, mask[:, None, None] * blocks


def _one(_):
    return 1.0


def _num_kept(batch):
    return batch[1]["mask"].sum()


def _together(shape, _):
    """Of a sum, the weights add up to one."""
    return np.full(shape[0], 1 / shape[0])


def _twice(shape, _):
    return np.full(shape[0], 2.0)


def _tokens(shape, _):
    return np.full(shape[0], np.prod(shape[1:-1]))


def _numbers(shape, _):
    return np.full(shape[0], np.prod(shape[1:]))


def _kept(_, targets):
    return targets["mask"].sum(axis=1)


def _labels(*shape, classes=2):
    return lambda rng: rng.integers(0, classes, (8, *shape))


def _shares(*shape):
    return lambda rng: rng.uniform(size=(8, *shape))


def _normal(*shape):
    return lambda rng: rng.normal(size=(8, *shape))


def _masked_labels(rng):
    lengths = 1 + np.arange(8) % 3
    mask = (np.arange(3) < lengths[:, None]).astype("f8")
    return {"labels": rng.integers(0, 2, (8, 3)), "mask": mask}


ONE = {"in": (3, 2), "out": (2, 1)}
TWO = {"in": (3, 2), "out": (2, 2)}
IMAGES = {"kernel": (2, 1, 3, 3), "out": (8, 3)}
HEADS = {"query": (4, 3), "key": (4, 3), "value": (4, 3), "head": (3, 2)}
ENTROPY = (_cross_entropy, _of_cross_entropy)
BINARY = (_linear, _binary, _of_binary)
SQUARE = (_square, _of_square)
SUM = (_together, _one)
CASES = {
    "cross-entropy, mean": Case(
        _linear, *ENTROPY, TWO, (3,), _labels(), _tokens, sizes=[3, 5]
    ),
    "cross-entropy, sum": Case(
        _linear, _cross_entropy_sum, ENTROPY[1], TWO, (3,), _labels(), *SUM, [3, 5]
    ),
    "cross-entropy, sequences": Case(
        _linear, *ENTROPY, TWO, (2, 3), _labels(2), _tokens
    ),
    "token mean of sequences": Case(
        _linear,
        _token_mean,
        _of_tokens,
        TWO,
        (3, 3),
        _masked_labels,
        _kept,
        _num_kept,
        [3, 5],
        has_forms=True,
    ),
    "binary, one output, mean": Case(*BINARY, ONE, (3,), _shares(1), _numbers),
    "binary, two outputs, mean": Case(*BINARY, TWO, (3,), _shares(2), _numbers),
    "binary, two outputs, sum": Case(
        _linear, _binary_sum, _of_binary, TWO, (3,), _shares(2), *SUM
    ),
    "binary, sequences": Case(*BINARY, TWO, (2, 3), _shares(2, 2), _numbers),
    "square, two outputs, mean": Case(
        _Model(0.1), *SQUARE, TWO, (3,), _normal(2), _numbers
    ),
    "square, two outputs, sum": Case(
        _linear, _square_sum, _of_square, TWO, (3,), _normal(2), *SUM
    ),
    "half sum of squares": Case(
        _linear, _half_square_sum, _of_square, TWO, (3,), _normal(2), _twice
    ),
    "square, sequences, dict": Case(
        _of_dict, *SQUARE, TWO, (2, 3), _normal(2, 2), _numbers, sizes=[3, 5]
    ),
    "convolutions": Case(
        _convolutional, *ENTROPY, IMAGES, (1, 4, 4), _labels(classes=3), _tokens
    ),
    "CNN with BatchNorm": Case(
        _with_batch_norm, *ENTROPY, None, (4, 4, 1), _labels(), _tokens, has_forms=True
    ),
    "attention": Case(
        _attention, *ENTROPY, HEADS, (5, 4), _labels(), _tokens, has_forms=True
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
    if case.shapes is None:
        params = jax.tree.map(lambda x: rng.normal(size=x.shape), _cnn()[1])
    else:
        params = {name: rng.normal(size=shape) for name, shape in case.shapes.items()}
    inputs = rng.normal(size=(8, *case.inputs))
    if case.model_fn is _of_dict:
        inputs = {"x": inputs}
    return params, (inputs, case.targets(rng))


def _batches(data, sizes=SIZES):
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda x, i=i, n=n: x[i - n : i], data)
        for i, n in zip(ends, sizes, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(model_fn, params, inputs):
    """Outputs, first and second derivatives of each by raveled parameters."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def outputs(flat):
        return model_fn(unravel(flat), inputs)

    first = jax.jacrev(outputs)
    return outputs(flat), first(flat), jax.jacfwd(first)(flat)


def _truths(case, params, data):
    """All matrices at once, by the chain rule in NumPy from dense derivatives."""
    model_fn, (inputs, targets) = case.model_fn, data
    if model_fn is _of_dict:
        model_fn, inputs = _linear, inputs["x"]
    found = map(np.asarray, _derivatives(model_fn, params, inputs))
    outputs, first, second = found
    shape, size = outputs.shape, first.shape[-1]
    slopes, blocks = case.slopes(outputs.reshape(-1, shape[-1]), targets)
    first = first.reshape(-1, shape[-1], size)
    second = second.reshape(*first.shape, size)
    weights = case.weights(shape, targets)
    newton = np.einsum("nai,nab,nbj->ij", first, blocks, first)
    hessian = newton + np.einsum("na,naij->ij", slopes, second)
    each = np.einsum("na,nai->ni", slopes, first).reshape(8, -1, size).sum(axis=1)
    shares, each = weights / weights.sum(), each / weights[:, None]
    fisher = (each.T * shares) @ each
    mean = shares @ each
    found = {
        "hessian": hessian / weights.sum(),
        "gauss_newton": newton / weights.sum(),
        "empirical_fisher": fisher,
        "gradient_covariance": fisher - np.outer(mean, mean),
    }
    return found | {DIFFERENCES: found["hessian"]}


def _operator(kind, case, params, data, **options):
    if kind == "gauss_newton":
        functions = case.model_fn, case.loss_fn
    else:
        functions = (_whole_loss(case),)
    return getattr(curvature, kind)(*functions, params, data, **options)


def _kinds_of(name):
    """The two kinds of single gradients share their code: one of them where not both."""
    if name == "cross-entropy, mean":
        return KINDS
    if name == "cross-entropy, sum":
        return *KINDS, DIFFERENCES
    return *KINDS[:2], OF_EXAMPLES[list(CASES).index(name) % 2]


@pytest.mark.heart
@pytest.mark.parametrize("name", CASES)
def test_every_case_has_its_dense_truth(name, x64, standard_promotion):
    case = CASES[name]
    params, data = _problem(case)
    truths = _cached_truths(name)
    for kind in _kinds_of(name):
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
        # The mean over batches of sums counts each batch once.
        factor = len(case.sizes) if case.is_sum else 1
        batches = _batches(data, case.sizes)
        streamed = _operator(kind, case, params, batches, weight_fn=case.weight_fn)
        found = factor * np.asarray(streamed.dense())
        np.testing.assert_allclose(found, truths[kind], err_msg=kind, **tolerance)
        if case.has_forms:
            flat, form = leaves_array(params), streamed.quadratic_form(params)
            np.testing.assert_allclose(form, flat @ truths[kind] @ flat, **tolerance)


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
    flat = leaves_array(params)
    twice = operator.matvec(operator.matvec(params))
    np.testing.assert_allclose(leaves_array(twice), truth @ (truth @ flat), **tolerance)
    np.testing.assert_allclose(
        operator.quadratic_form(params), flat @ truth @ flat, **tolerance
    )


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
    return *data, rng.integers(0, 2, (8, 3)) * 2.0


def _shuffled(data, rng):
    order = rng.permutation(8)
    return jax.tree.map(lambda x: x[order], data)


def _batch_norm(params, batch):
    inputs, targets = batch
    mean, width = inputs.mean(0, keepdims=True), inputs.std(0, keepdims=True)
    return _square(_linear(params, (inputs - mean) / width), targets)


SQUARES = CASES["square, two outputs, sum"]
NOT_DETERMINISTIC = {
    "dropout": (_dropout, _with_dropout, 8),
    "BatchNorm, shuffled": (_batch_norm, _shuffled, 8),
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
        return _batches(changed, [size // 2] * 2)

    operator = curvature.hessian(loss_fn, params, _Loader(make))
    operator.matvec(params)
    with pytest.raises(ValueError, match="data must be the same on every pass"):
        operator.matvec(params)
