"""Eigenpairs at a fixed cost, inside jit and vmap, against dense eigenvalues."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatopt import curvature
from flatopt.curvature._block_lanczos import _BlockLanczos

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
ENDS = ("largest", "smallest", "magnitude")


def _wanted(values, k, which):
    order = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}
    return np.take_along_axis(values, np.argsort(order[which], axis=-1), -1)[..., :k]


def _quadratic(params, batch):
    return params @ batch[0] @ params / 2


def _operator(matrix):
    params = np.zeros(len(matrix), "f4")
    return curvature.hessian(_quadratic, params, (matrix,))


def _rotated(values):
    turns = np.linalg.qr(RNG.normal(size=(*values.shape, values.shape[-1])))[0]
    return np.einsum("...ij,...j,...kj->...ik", turns, values, turns)


# Copies of repeated eigenvalues


@functools.cache
def _seven_copies():
    """100 matrices whose largest eigenvalue comes seven times."""
    bulk = RNG.uniform(-3, 3, size=(100, 60))
    matrices = _rotated(np.concatenate([np.full((100, 7), 10.0), bulk], axis=1))
    return matrices.astype("f4"), jax.random.split(KEY, 100)


def _with_copies_missing(found):
    return int((np.abs(np.asarray(found)[:, :7] - 10) > 1e-2).any(axis=1).sum())


@pytest.mark.parametrize("k", [7, 9])
def test_blocks_of_as_many_vectors_as_copies_miss_none(k):
    def values(matrix, key):
        return curvature.block_lanczos(_operator(matrix), key, k, num_steps=56 // k)

    found = jax.jit(jax.vmap(values))(*_seven_copies())
    assert _with_copies_missing(found.values) == 0
    assert np.asarray(found.residuals)[:, :7].max() < 0.1
    vectors = np.asarray(found.vectors)
    gram = np.einsum("nai,nbi->nab", vectors, vectors)
    np.testing.assert_allclose(gram - np.eye(k), 0, atol=1e-5)


def test_smaller_blocks_would_miss_copies_in_all():
    def values(matrix, key):
        operator = _operator(matrix)
        method = _BlockLanczos(operator.kind, 7, 2, 48, "largest", None)
        return operator.risk.mean(method, key)[0]

    found = jax.jit(jax.vmap(values))(*_seven_copies())
    assert _with_copies_missing(found) == 100


HEAD = RNG.normal(size=(3, 3))
DEGENERATE = [
    np.zeros((12, 12)),
    np.eye(12),
    -np.eye(12),
    np.outer(np.arange(12.0), np.arange(12.0)),
    np.diag(np.r_[2.0, 2.0, -2.0, -2.0, 1.0, np.zeros(7)]),
    np.diag(np.r_[3.0, 3.0, 3.0, 2.0, np.zeros(8)]),
    np.kron(HEAD + HEAD.T, np.eye(4)),
]


def test_loss_of_rank_adds_no_copy_and_hides_none():
    matrices = np.repeat(DEGENERATE, 20, axis=0)
    values = np.linalg.eigvalsh(matrices)

    @jax.jit
    @jax.vmap
    def measure(matrix, key):
        operator = _operator(matrix)
        long = curvature.block_lanczos(operator, key, 4, which="magnitude")
        return long, curvature.block_lanczos(operator, key, 4, num_steps=2)

    keys = jax.random.split(KEY, len(matrices))
    found = measure(matrices.astype("f4"), keys)
    for end, pairs in zip(("magnitude", "largest"), found, strict=True):
        distance = np.abs(np.asarray(pairs.values)[..., None] - values[:, None])
        assert (distance.min(axis=-1) <= pairs.residuals).all()
        expected, got = _wanted(values, 4, end), np.asarray(pairs.values)
        if end == "largest":  # two steps are enough for two clusters
            expected, got = expected[:80], got[:80]
        if end == "magnitude":  # the order of equal magnitudes is open
            expected, got = np.abs(expected), np.abs(got)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_matrix_of_one_row():
    found = curvature.block_lanczos(_operator(np.array([[-2.0]], "f4")), KEY)
    assert_close(found.values, np.array([-2.0]))
    assert found.is_complete


# Networks


def _network(params, inputs, shift=0.0):
    return jnp.tanh((inputs - shift) @ params["in"]) @ params["out"]


def _mean_square(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def _loss(params, batch, shift=None):
    return _mean_square(
        _network(params, batch[0], 0.0 if shift is None else shift), batch[1]
    )


@functools.cache
def _networks():
    """Parameters of 64 networks, and data, in NumPy."""
    rng = np.random.default_rng(1)
    params = {
        "in": rng.normal(size=(64, 3, 4)),
        "out": rng.normal(size=(64, 4, 2)),
    }
    data = rng.normal(size=(12, 3)), rng.normal(size=(12, 2))
    return jax.tree.map(lambda x: x.astype("f4"), (params, data))


def _dense(params, data, shift):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.hessian(lambda p: _loss(unravel(p), data, shift))(flat)


_all_dense = jax.jit(jax.vmap(_dense, (0, None, 0)))


@pytest.mark.heart
@pytest.mark.parametrize("wide", [False, True])
def test_many_networks_in_one_program(wide):
    with jax.enable_x64(wide):
        dtype = "f8" if wide else "f4"
        params, data = jax.tree.map(lambda x: x.astype(dtype), _networks())
        which = ENDS[:1] if wide else ENDS[1:]

        @jax.jit
        @jax.vmap
        def measure(params, key):
            operator = curvature.hessian(_loss, params, data)
            ends = [curvature.block_lanczos(operator, key, 3, which=w) for w in which]
            if not wide:
                ends.append(curvature.block_lanczos(operator, key, 3, num_steps=4))
            return ends

        *ends, last = measure(params, jax.random.split(KEY, 64))
        matrices = _all_dense(params, data, np.zeros((64, 1, 3), dtype))
    values = np.linalg.eigvalsh(np.asarray(matrices, "f8"))
    tolerance = 1e-10 if wide else 2e-5 * np.abs(values).max()
    for end, found in zip(which, [*ends, last], strict=False):
        assert found.values.dtype == dtype
        assert np.all(found.is_complete)
        np.testing.assert_allclose(
            found.values, _wanted(values, 3, end), rtol=0, atol=tolerance
        )
    if wide:
        return
    # Few steps: every value near some eigenvalue, and none beyond its own (interlacing).
    distance = np.abs(np.asarray(last.values)[..., None] - values[:, None]).min(-1)
    assert (distance <= np.asarray(last.residuals)).all()
    assert (np.asarray(last.values) <= _wanted(values, 3, "largest") + tolerance).all()
    assert not np.any(last.is_complete)


def test_a_part_of_the_parameters_and_constants_under_vmap():
    params, data = _networks()
    shifts = RNG.normal(size=(64, 1, 3)).astype("f4")

    def measure(params, shift):
        operator = curvature.hessian(_loss, params, data, mask="in", constants=shift)
        return curvature.block_lanczos(operator, KEY, 2)

    found = jax.jit(jax.vmap(measure))(params, shifts)
    assert found.vectors["out"] is None
    matrices = _all_dense(params, data, shifts)[:, :12, :12]
    values = np.linalg.eigvalsh(np.asarray(matrices, "f8"))
    np.testing.assert_allclose(
        found.values, _wanted(values, 2, "largest"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "kind", ["gauss_newton", "empirical_fisher", "gradient_covariance"]
)
def test_every_kind_inside_jit(kind):
    params, data = _networks()
    params = jax.tree.map(lambda x: x[0], params)

    def make(params):
        if kind == "gauss_newton":
            return curvature.gauss_newton(_network, _mean_square, params, data)
        return getattr(curvature, kind)(_loss, params, data)

    found = jax.jit(lambda p: curvature.block_lanczos(make(p), KEY, 3))(params)
    values = np.linalg.eigvalsh(np.asarray(make(params).dense(), "f8"))
    np.testing.assert_allclose(found.values, values[::-1][:3], rtol=1e-4, atol=1e-5)


def test_sharded_batches_and_parameters():
    weights = RNG.normal(size=(16, 5))

    def loss_fn(params, batch):
        return jnp.mean(jnp.cos(batch @ params["w"]) @ params["v"])

    params = {"w": (weights.T[:, :8] / 4).astype("f4"), "v": np.ones(8, "f4")}
    batch = weights.astype("f4")
    expected = np.linalg.eigvalsh(curvature.hessian(loss_fn, params, batch).dense())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        specs = {"w": P(None, "data"), "v": P("data")}
        params = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, specs
        )
        operator = curvature.hessian(loss_fn, params, batch)
        whole = curvature.block_lanczos(operator, KEY, 3, which="magnitude")
        traced = jax.jit(lambda o: curvature.block_lanczos(o, KEY, 3))
        found = traced(operator)
        assert not whole.vectors["w"].sharding.is_fully_replicated
        differences = curvature.finite_difference_hessian(loss_fn, params, batch)
        product, exact = differences.matvec(params), operator.matvec(params)
        assert product["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
    assert_close(product, exact, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        whole.values, _wanted(expected, 3, "magnitude"), rtol=1e-4
    )
    np.testing.assert_allclose(found.values, expected[::-1][:3], rtol=1e-3, atol=1e-5)


def test_every_scale_within_float32():
    values = np.linspace(-1, 2, 40)
    matrix = _rotated(values)
    keys = jax.random.split(KEY, 5)
    scales = np.array([1e-25, 1e-18, 1.0, 1e18, 1e25])
    stacked = (scales[:, None, None] * matrix).astype("f4")
    found = jax.jit(jax.vmap(lambda m, k: curvature.block_lanczos(_operator(m), k, 2)))(
        stacked, keys
    )
    np.testing.assert_allclose(
        np.asarray(found.values, "f8") / scales[:, None],
        np.broadcast_to(values[::-1][:2], (5, 2)),
        rtol=1e-4,
    )
    bounds = np.asarray(found.residuals, "f8") / scales[:, None]
    assert (bounds > 0).all()
    assert (bounds < 1e-2).all()


def test_pairs_are_a_start_for_the_host_version():
    operator = _operator(_rotated(np.arange(30.0)).astype("f4"))
    start = curvature.block_lanczos(operator, KEY, 2, num_steps=3)
    found = curvature.eigenpairs(operator, KEY, 2, start=start)
    np.testing.assert_allclose(found.values, [29, 28], rtol=1e-3)


def test_what_the_variants_refuse():
    operator = _operator(np.eye(4, dtype="f4"))
    over_keys = functools.partial(jax.vmap, in_axes=(None, 0))
    for wrap, key in ((jax.jit, KEY), (over_keys, jax.random.split(KEY, 2))):
        with pytest.raises(TypeError, match=r"use curvature\.block_lanczos there, or"):
            wrap(lambda o, key: curvature.eigenpairs(o, key).values)(operator, key)
        with pytest.raises(TypeError, match="so call it outside"):
            wrap(lambda o, key: curvature.spectral_density(o, key).nodes)(operator, key)
    stream = curvature.hessian(_quadratic, np.zeros(2, "f4"), [np.eye(2)[None]])
    with pytest.raises(
        ValueError, match=r"operator must be on one batch for block_lan"
    ):
        curvature.block_lanczos(stream, KEY)
    with pytest.raises(ValueError, match="k must be at most the number of parameters"):
        curvature.block_lanczos(operator, KEY, 5)
    bad = _operator(np.full((3, 3), np.nan, "f4"))
    with pytest.raises(ValueError, match="the curvature is not finite"):
        curvature.block_lanczos(bad, KEY)
    assert np.isnan(
        jax.jit(lambda o: curvature.block_lanczos(o, KEY).values)(bad)
    ).all()


def test_a_loss_that_is_no_mean_over_examples_is_refused():
    def loss_fn(params, batch):
        return jnp.mean(((batch - batch.mean(0, keepdims=True)) @ params) ** 2)

    operator = curvature.empirical_fisher(loss_fn, jnp.ones(2), jnp.eye(3, 2))
    for measure in (
        curvature.block_lanczos,
        functools.partial(curvature.probe, num_deflated=0),
    ):
        operator.is_checked = False
        with pytest.raises(ValueError, match="loss_fn must be the mean of its losses"):
            measure(operator, KEY)
