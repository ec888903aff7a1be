"""Blocks of a matrix for some leaves, and constants, against blocks of dense matrices."""

import functools
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, count_compilations, leaves_array

from flatopt import curvature, kernels, sharpness
from flatopt._core import trees

KEY = jax.random.key(0)
PARAMS = {
    "in": {
        "bias": np.array([0.1, -0.2], "f4"),
        "kernel": np.array([[0.5, -1.0]] * 3, "f4"),
    },
    "out": {"bias": np.array([0.3], "f4"), "kernel": np.array([[1.0], [0.7]], "f4")},
}
INPUTS = np.random.default_rng(0).normal(size=(6, 3)).astype("f4")
DATA = INPUTS, np.array([[0.0], [1.0], [0.5], [-1.0], [0.2], [0.7]], "f4")
SHIFT = np.array([0.2, -0.1, 0.4], "f4")
OF_OUT = slice(8, 11)  # places of "out" in the raveled parameters


def _model(params, inputs, shift):
    hidden = (inputs - shift[None]) @ params["in"]["kernel"]
    hidden = jnp.tanh(hidden + params["in"]["bias"][None])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"][None]


def _square(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def _loss(params, batch, shift):
    return _square(_model(params, batch[0], shift), batch[1])


@functools.cache
def _derivatives():
    """Hessian, Jacobian and gradients of examples by JAX, of a flat function."""

    @jax.jit
    def derivatives(params):
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        loss = lambda p, batch: _loss(unravel(p), batch, SHIFT)  # noqa: E731
        examples = tuple(x[:, None] for x in DATA)
        outputs = lambda p: _model(unravel(p), INPUTS, SHIFT)[:, 0]  # noqa: E731
        return (
            jax.hessian(loss)(flat, DATA),
            jax.jacobian(outputs)(flat),
            jax.vmap(jax.grad(loss), (None, 0))(flat, examples),
        )

    return [np.asarray(x) for x in derivatives(PARAMS)]


def _dense(kind):
    """The whole matrix."""
    hessian, rows, each = _derivatives()
    if kind == "hessian":
        return hessian
    if kind == "gauss_newton":
        return 2 * rows.T @ rows / 6
    if kind == "gradient_covariance":
        each = each - each.mean(0, keepdims=True)
    return each.T @ each / 6


def _operator(kind, data, **options):
    model = (_model, _square) if kind == "gauss_newton" else (_loss,)
    return getattr(curvature, kind)(*model, PARAMS, data, constants=SHIFT, **options)


KINDS = ["hessian", "gauss_newton", "empirical_fisher", "gradient_covariance"]
BATCHES, HALVES = (
    [tuple(x[:size] for x in DATA), tuple(x[size:] for x in DATA)] for size in (2, 3)
)
MASKS = [{"in": False, "out": True}, lambda p: {"in": False, "out": True}, "out"]


@pytest.mark.heart
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_that_of_the_dense_matrix(kind):
    truth = _dense(kind)[OF_OUT, OF_OUT]
    assert_close(_operator(kind, DATA).dense(), _dense(kind), rtol=1e-4, atol=1e-5)
    operator = _operator(kind, DATA, mask="out")
    assert_close(operator.dense(), truth, rtol=1e-4, atol=1e-5)
    assert operator.like["in"] == {"bias": None, "kernel": None}
    streamed = _operator(kind, BATCHES, mask=MASKS[0])
    assert_close(streamed.dense(), truth, rtol=1e-4, atol=1e-5)
    probe = curvature.probe(streamed, KEY, num_deflated=3)
    assert_close(probe.trace.value, np.trace(truth), rtol=1e-3, atol=1e-5)
    norm = np.linalg.norm(truth)
    assert_close(probe.frobenius_norm.value, norm, rtol=1e-3, atol=1e-5)
    form = operator.quadratic_form(operator.like)
    flat = leaves_array(PARAMS["out"])
    assert_close(form, flat @ truth @ flat, rtol=1e-4, atol=1e-5)


def test_eigenpairs_and_density_of_a_block():
    truth = np.linalg.eigvalsh(_dense("hessian")[OF_OUT, OF_OUT])
    operator = _operator("hessian", DATA, mask="out")
    pairs = curvature.eigenpairs(operator, KEY, 3)
    assert_close(pairs.values, truth[::-1], rtol=1e-4, atol=1e-5)
    assert pairs.vectors["in"]["bias"] is None
    density = curvature.spectral_density(operator, KEY)
    assert_close(np.sort(density.nodes[0]), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_all_forms_of_a_mask_are_one(mask):
    operator = _operator("hessian", DATA, mask=mask)
    assert operator.like["in"]["bias"] is None
    assert operator.like["out"]["bias"] is not None


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("layer_1", ["layer_1/kernel"]),
        ("*/kernel", ["layer_1/kernel", "layer_10/kernel"]),
        ("layer_1*", ["layer_1/kernel", "layer_10/bias", "layer_10/kernel"]),
        ("layer_?0/bias", ["layer_10/bias"]),
    ],
)
def test_patterns_name_leaves_and_subtrees(pattern, names):
    one = np.ones((), "f4")
    params = {"layer_1": {"kernel": one}, "layer_10": {"bias": one, "kernel": one}}
    noise = kernels.masked(kernels.isotropic(), pattern)(KEY, params)
    moved = jax.tree_util.tree_leaves_with_path(noise)
    found = [jax.tree_util.keystr(p, simple=True, separator="/") for p, x in moved if x]
    assert found == names


class Attention(NamedTuple):
    """Fields of an attention layer, one of them called as an attribute of Flax's."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def _sum_of_squares(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("pattern", "trace"),
    [("attention/*", 12.0), ("attention", 12.0), ("attention/value", 4.0)],
)
def test_a_field_may_be_called_value(pattern, trace):
    params = {"attention": Attention(*np.ones((3, 2), "f4")), "head": np.ones(2, "f4")}
    operator = curvature.hessian(_sum_of_squares, params, mask=pattern)
    np.testing.assert_allclose(np.trace(operator.dense()), trace, rtol=1e-6)


def test_networks_that_differ_in_constants_and_leaves_left_out_compile_once():
    def measure(scale):
        params = jax.tree.map(lambda x: scale * x, PARAMS)
        options = {"mask": "out", "constants": scale * SHIFT}
        operator = curvature.hessian(_loss, params, DATA, **options)
        found = curvature.trace(operator, KEY, 4, num_deflated=2).value
        rise = sharpness.low_pass(
            _loss, params, KEY, num_samples=4, data=DATA, **options
        )
        return found, rise.value

    first = measure(1.0)
    with count_compilations() as compiled:
        second = measure(0.5)
    assert not compiled
    assert first[0] != second[0]
    assert first[1] != second[1]


def _of_out(params, batch):
    return _loss({"in": PARAMS["in"], "out": params["out"]}, batch, SHIFT)


START = jax.tree.map(np.zeros_like, PARAMS)
MEASURES = {
    "low_pass": (KEY,),
    "average_case_adaptive": (KEY,),
    "local_entropy": (KEY,),
    "local_entropy_gradient": (KEY, DATA),
    "worst_case": (KEY,),
    "m_sharpness": (KEY, BATCHES),
    "epsilon_sharpness": (),
    "fisher_rao_hessian": (),
    "fisher_rao_empirical": (DATA,),
    "effective_dimension": (KEY,),
    "pac_bayes": (KEY,),
    "perturbed_accuracy": (KEY, kernels.isotropic(), [0.1]),
}


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_measures_of_a_part_are_those_of_a_function_of_that_part(name):
    """A leaf's noise depends on its path alone, so that even draws are the same."""

    def part(tree):
        return {"out": tree["out"]}

    arguments = MEASURES[name]
    has_data = any(isinstance(x, tuple) or x is BATCHES for x in arguments)
    options = {} if has_data else {"data": DATA}
    if name in ("worst_case", "m_sharpness"):
        options["rho"] = 0.1
    start, own = {}, {}
    if name == "pac_bayes":
        start, own = {"initial_params": START}, {"initial_params": part(START)}
    measure = getattr(sharpness, name)
    found = measure(
        _loss, PARAMS, *arguments, **options, **start, mask="out", constants=SHIFT
    )
    alone = measure(
        _of_out,
        part(PARAMS),
        *arguments,
        **options,
        **own,
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_filters_of_a_part_are_read_from_the_whole_layer():
    """An attention kernel's output axes show in its bias, though the bias stays."""
    params = {"query": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}}
    weights = 1.0 + jnp.arange(24.0).reshape(4, 2, 3)

    def loss_fn(params):
        return jnp.sum((weights * (params["query"]["kernel"] - 1.0)) ** 2)

    kernel = kernels.filterwise()
    found = sharpness.low_pass(
        loss_fn, params, KEY, kernel=kernel, num_samples=3, mask="query/kernel"
    )
    whole = sharpness.low_pass(loss_fn, params, KEY, kernel=kernel, num_samples=3)
    assert_close(found.value, whole.value, rtol=1e-5)


def test_normalized_networks_of_a_shape_compile_once():
    def loss_fn(params, batch, restore):
        return _loss(restore(params), batch, SHIFT)

    def measure(scale):
        params = jax.tree.map(lambda x: scale * x, PARAMS)
        normalized, restore = sharpness.normalize_filters(params)
        operator = curvature.hessian(loss_fn, normalized, DATA, constants=restore)
        return operator.quadratic_form(normalized)

    measure(1.0)
    with count_compilations() as compiled:
        measure(0.5)
    assert not compiled


def test_integer_leaves_may_be_left_out():
    params = {"steps": jnp.arange(2), "w": jnp.array([1.0, 2.0])}
    operator = curvature.hessian(lambda p: jnp.sum(p["w"] ** 3), params, mask="w")
    assert_close(operator.dense(), np.diag([6.0, 12.0]))


def test_a_tree_without_leaves_lacks_none():
    assert trees.mask_flags("*/kernel", {}) == []
    with pytest.raises(ValueError, match="params must hold at least one number"):
        curvature.hessian(lambda params: 0.0, {}, mask="*/kernel")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": "inner"}, "pattern 'inner' where the paths are 'in/bias'"),
        ({"mask": {"in": True}}, "no entry for 'out/bias'"),
        ({"mask": False}, "mask must be True for at least one leaf"),
        ({"mask": {"in": 1, "out": 0}}, "mask must be made of Python bools"),
        ({"constants": "text"}, "constants must be arrays, got 'text'"),
        ({"constants": None}, r"loss_fn must take 2 arguments"),
    ],
)
def test_wrong_parts(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        curvature.hessian(_loss, PARAMS, DATA, **{"constants": SHIFT, **options})
    if options.get("constants") != "text":
        with pytest.raises((TypeError, ValueError), match=words):
            sharpness.low_pass(
                _loss, PARAMS, KEY, data=DATA, **{"constants": SHIFT, **options}
            )


def test_a_vector_of_all_leaves_is_refused():
    with pytest.raises(ValueError, match="vector must have the structure"):
        _operator("hessian", DATA, mask="out").matvec(PARAMS)
