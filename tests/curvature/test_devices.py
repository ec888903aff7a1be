"""Sharded parameters: what one device finds, with vectors that lie as the parameters do."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatopt import curvature
from flatopt._core import random
from flatopt._core.sharding import placement_of
from flatopt.curvature import _draws, _krylov, _operator

KEY = jax.random.key(0)
WORDS, WIDTH, LENGTH, BATCH = 64, 16, 4, 16
SHAPES = {
    "embedding": (WORDS, WIDTH),
    "up": (2, WIDTH, 2 * WIDTH),
    "down": (2, 2 * WIDTH, WIDTH),
    "norm": (WIDTH,),
    "head": (WIDTH, WORDS),
}
# FSDP: split over all devices, gathered where used. Tensor: layers are computed in parts.
LAYOUTS = {
    "fsdp": {
        "embedding": P(("data", "model")),
        "up": P(None, ("data", "model")),
        "down": P(None, ("data", "model")),
        "norm": P(),
        "head": P(("data", "model")),
    },
    "tensor": {
        "embedding": P(None, "model"),
        "up": P(None, None, "model"),
        "down": P(None, "model", None),
        "norm": P(),
        "head": P(None, "model"),
    },
}
EXAMPLES = {"fsdp": P(("data", "model")), "tensor": P("data")}


# XLA on CPU runs collectives of one program at once, and these may wait for each other
# forever: one run of three did on busy cores, none of fifteen with this flag.
ONE_AFTER_ANOTHER = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"


def _run_in_a_child(test):
    flags = f"{os.environ['XLA_FLAGS']} {ONE_AFTER_ANOTHER}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", test]
    root = pathlib.Path(__file__).parent.parent.parent
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _model(layout, params, tokens):
    """A language model of two scanned layers; activations stay with their examples."""

    def local(x):
        if layout is None:
            return x
        sharding = NamedSharding(_mesh(), EXAMPLES[layout])
        return jax.lax.with_sharding_constraint(x, sharding)

    def layer(x, weights):
        up, down = weights
        return local(x + jnp.tanh(x @ up) @ down), None

    x = local(params["embedding"][tokens])
    x = local(x + jnp.cumsum(x, axis=1) / LENGTH)
    x, _ = jax.lax.scan(layer, x, (params["up"], params["down"]))
    return (x * params["norm"][None, None]) @ params["head"]


def _output_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _loss(layout, params, batch):
    return _output_loss(_model(layout, params, batch[0]), batch[1])


MODELS = {name: functools.partial(_model, name) for name in (None, *LAYOUTS)}
LOSSES = {name: functools.partial(_loss, name) for name in (None, *LAYOUTS)}


def _params(layout):
    rng = np.random.default_rng(0)
    params = {
        name: (rng.normal(size=shape) / 4).astype("f4")
        for name, shape in SHAPES.items()
    }
    if layout is None:
        return params
    mesh = _mesh()
    return {
        name: jax.device_put(x, NamedSharding(mesh, LAYOUTS[layout][name]))
        for name, x in params.items()
    }


def _batch(layout):
    rng = np.random.default_rng(1)
    found = tuple(rng.integers(0, WORDS, (2, BATCH, LENGTH)).astype("i4"))
    return found if layout is None else _placed(found, layout)


def _operator_of(layout, kind, streamed=False):
    params, data = _params(layout), _batch(None if streamed else layout)
    if streamed:
        parts = [tuple(x[i : i + 8] for x in data) for i in (0, 8)]
        data = parts if layout is None else [_placed(p, layout) for p in parts]
    if kind == "gauss_newton":
        return curvature.gauss_newton(MODELS[layout], _output_loss, params, data)
    return getattr(curvature, kind)(LOSSES[layout], params, data)


def _placed(batch, layout):
    return jax.device_put(batch, NamedSharding(_mesh(), EXAMPLES[layout]))


def _assert_lies_as(tree, params):
    """With an axis of rows before, or without."""
    for name, x in tree.items():
        like = params[name]
        spec = P(*[None] * (x.ndim - like.ndim), *like.sharding.spec)
        kept = NamedSharding(like.sharding.mesh, spec)
        assert x.sharding.is_equivalent_to(kept, x.ndim), (name, x.sharding.spec)


# As many probes as directions: they share a program.
MEASURES = {
    "trace": functools.partial(curvature.trace, num_probes=2, num_deflated=2),
    "probe": functools.partial(curvature.probe, num_probes=2, num_deflated=2),
    "density": functools.partial(curvature.spectral_density, num_draws=1, num_steps=4),
}


@pytest.mark.parametrize(
    ("layout", "kind", "streamed", "name"),
    [
        ("fsdp", "hessian", False, "probe"),
        ("tensor", "gauss_newton", True, "probe"),
        ("fsdp", "gradient_covariance", True, "trace"),
        ("tensor", "hessian", False, "density"),
    ],
)
def test_sharded_parameters_give_the_result_of_one_device(layout, kind, streamed, name):
    alone = MEASURES[name](_operator_of(None, kind, streamed), KEY)
    found = MEASURES[name](_operator_of(layout, kind, streamed), KEY)
    assert_close(found, alone, rtol=2e-3, atol=1e-5)
    if name == "probe":
        for estimate in (found.diagonal, found.row_norms):
            _assert_lies_as(estimate.value, _params(layout))
            _assert_lies_as(estimate.standard_error, _params(layout))


@pytest.mark.parametrize(
    ("layout", "kind", "streamed"),
    [("fsdp", "hessian", False), ("tensor", "gauss_newton", True)],
)
def test_eigenpairs_of_sharded_parameters_are_those_of_one_device(
    layout, kind, streamed, request
):
    if ONE_AFTER_ANOTHER not in os.environ["XLA_FLAGS"]:
        _run_in_a_child(request.node.nodeid)
        return

    def measure(layout):
        operator = _operator_of(layout, kind, streamed)
        return curvature.eigenpairs(operator, KEY, 2, progress=False)

    alone, found = measure(None), measure(layout)
    _assert_lies_as(found.vectors, _params(layout))
    apart = np.abs(np.asarray(found.values) - alone.values)
    assert (apart <= found.residuals + alone.residuals).all()
    overlaps = sum(
        np.sum(np.asarray(x) * np.asarray(y), axis=tuple(range(1, x.ndim)))
        for x, y in zip(found.vectors.values(), alone.vectors.values(), strict=True)
    )
    np.testing.assert_allclose(np.abs(overlaps), 1, atol=1e-2)


@pytest.mark.heart
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_vectors_are_the_same_numbers_and_drawn_in_place(layout, monkeypatch):
    # As on accelerators: on CPU small leaves are drawn together.
    monkeypatch.setattr(random, "can_sample_leaves", lambda keys: False)
    operator, alone = _operator_of(layout, "hessian"), _operator_of(None, "hessian")
    keys = _draws.probe_keys(KEY, 0, 3)
    draws = (
        (_draws.draw_signs, _draws._draw_rows),
        (
            _draws.draw_normal,
            _draws._draw_normal_rows,
        ),
    )
    for draw, compiled in draws:
        block, expected = draw(operator, keys), draw(alone, keys)
        _assert_lies_as(block, operator.like)
        for name, x in block.items():
            np.testing.assert_array_equal(x, expected[name])
        place = placement_of(operator.like), operator.like
        assert not collectives(compiled.lower(*place, keys))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_basis_of_lanczos_lies_as_the_parameters(layout):
    operator = _operator_of(layout, "hessian")
    krylov = _krylov.Krylov(operator, KEY, 5)
    _assert_lies_as(krylov.basis, operator.like)
    rest, _ = krylov.random()
    for _ in range(3):
        rest, _ = krylov.step(rest)
        _assert_lies_as(krylov.basis, operator.like)
    rows = krylov.rows(np.eye(3))
    _assert_lies_as(rows, operator.like)
    krylov.restart(rows, np.arange(3.0))
    _assert_lies_as(krylov.basis, operator.like)
    # What moves when a vector is made orthogonal: the products with the basis.
    moved = collectives(
        jax.jit(_krylov._expand).lower(krylov.basis, _row_of(krylov.basis))
    )
    assert {kind for kind, _ in moved} == {"all-reduce"}
    assert max(size for _, size in moved) <= 5 * len(SHAPES)


def _row_of(block):
    return jax.tree.map(lambda x: x[:1], block)


def _gathered(lowered):
    """Numbers that are gathered or exchanged, loops once."""
    kinds = ("all-gather", "all-to-all", "collective-permute")
    return sum(size for kind, size in collectives(lowered) if kind in kinds)


# A vector is gathered as the parameters are; the loops of a Hessian over layers, forward
# and back again, gather the parameters once more.
ROUNDS = {"gauss_newton": 2, "hessian": 2.5}


@pytest.mark.heart
@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_gathers_its_vector_as_the_gradient_its_parameters(layout, kind):
    operator = _operator_of(layout, kind)
    params, batch = operator.like, operator.batch
    shardings = jax.tree.map(lambda x: x.sharding, params)
    gradient = jax.jit(jax.grad(LOSSES[layout]), out_shardings=shardings)
    plain = _gathered(gradient.lower(params, batch))
    function = _operator.Products(operator.kind, placement_of(params))
    block = _draws.draw_signs(operator, _draws.probe_keys(KEY, 0, 1))
    lowered = jax.jit(function).lower(params, batch, block)
    assert _gathered(lowered) <= ROUNDS[kind] * plain
    # No more than one leaf, or the activations of the examples of one device, at a time.
    leaf = max(x.size for x in params.values())
    assert all(
        size <= leaf for kind, size in collectives(lowered) if kind == "all-gather"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inside_jit_vectors_lie_as_the_parameters(layout):
    operator = _operator_of(layout, "gauss_newton")
    # The products with directions are as many programs in one: for one of the layouts.
    measure = functools.partial(
        curvature.probe, num_probes=2, num_deflated=int(layout == "fsdp")
    )
    found = jax.jit(measure)(operator, KEY)
    # What is whole on every device the compiler may split, too.
    split = [name for name, spec in LAYOUTS[layout].items() if spec != P()]
    for estimate in (found.diagonal, found.row_norms):
        value = {name: estimate.value[name] for name in split}
        _assert_lies_as(value, operator.like)
    alone = measure(_operator_of(None, "gauss_newton"), KEY)
    assert_close(found.trace, alone.trace, rtol=1e-3)
    assert_close(found.diagonal, alone.diagonal, rtol=2e-3, atol=1e-5)
