"""Curvature against closed forms, dense matrices and measured coverage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import assert_close, count_compilations
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatopt import curvature

KEY = jax.random.key(0)


def quadratic(matrix):
    """The operator of a given symmetric matrix."""
    params = np.zeros(len(matrix), matrix.dtype)
    return curvature.hessian(_form, params, np.asarray(matrix)[None])


def _form(params, batch):
    return params @ batch[0] @ params / 2


def spectrum(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues in random directions."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return (q * eigenvalues) @ q.T


# Networks; other losses, reductions and networks are in test_case_matrix.py.


def _forward(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def _cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def _square(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


KINDS = ["hessian", "gauss_newton", "empirical_fisher", "gradient_covariance"]


def _split(data, sizes):
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda x, a=end - size, b=end: x[a:b], data)
        for size, end in zip(sizes, ends, strict=True)
    ]


def _make(kind, model_fn, params, data):
    if kind == "gauss_newton":
        return curvature.gauss_newton(model_fn, _cross_entropy, params, data)
    return getattr(curvature, kind)(_whole(model_fn), params, data)


@functools.cache
def _whole(model_fn):
    """The loss of a model, one function for all tests: compiled code is kept by it."""
    return lambda params, batch: _cross_entropy(model_fn(params, batch[0]), batch[1])


# Closed forms


@pytest.mark.heart
def test_linear_logistic_and_softmax_regression(x64):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 5))
    y = rng.normal(size=(20, 3))
    labels = rng.integers(0, 3, size=20)
    w = rng.normal(size=(5, 3))

    def square(params, batch):
        return jnp.mean((batch[0] @ params - batch[1]) ** 2)

    found = curvature.hessian(square, jnp.asarray(w), (x, y)).dense()
    np.testing.assert_allclose(found, np.kron(2 / 60 * x.T @ x, np.eye(3)), atol=1e-13)

    def logistic(params, batch):
        return optax.sigmoid_binary_cross_entropy(batch[0] @ params, batch[1]).mean()

    p = 1 / (1 + np.exp(-x @ w[:, 0]))
    target = (labels == 0).astype("f8")
    found = curvature.hessian(logistic, jnp.asarray(w[:, 0]), (x, target)).dense()
    np.testing.assert_allclose(found, x.T @ np.diag(p * (1 - p)) @ x / 20, atol=1e-13)

    p = np.exp(x @ w)
    p /= p.sum(axis=1, keepdims=True)
    blocks = [np.diag(q) - np.outer(q, q) for q in p]
    expected = np.mean(
        [np.kron(np.outer(a, a), b) for a, b in zip(x, blocks, strict=True)], axis=0
    )

    def softmax(params, batch):
        return _cross_entropy(batch[0] @ params, batch[1])

    found = curvature.hessian(softmax, jnp.asarray(w), (x, labels)).dense()
    np.testing.assert_allclose(found, expected, atol=1e-13)
    newton = curvature.gauss_newton(
        lambda params, inputs: inputs @ params,
        _cross_entropy,
        jnp.asarray(w),
        (x, labels),
    )
    np.testing.assert_allclose(newton.dense(), expected, atol=1e-13)


def test_matrix_factorization_at_an_exact_fit(x64):
    rng = np.random.default_rng(2)
    u, v = rng.normal(size=(2, 2, 2))
    target = u @ v.T

    def loss_fn(params):
        return jnp.sum((params["u"] @ params["v"].T - target) ** 2) / 2

    operator = curvature.hessian(loss_fn, {"u": jnp.asarray(u), "v": jnp.asarray(v)})
    su, sv = (np.linalg.svd(m)[1] ** 2 for m in (u, v))
    expected = np.sort((su[:, None] + sv[None]).ravel())
    values = np.linalg.eigvalsh(operator.dense())
    np.testing.assert_allclose(values, [0, 0, 0, 0, *expected], atol=1e-12)
    found = curvature.probe(operator, KEY, num_deflated=8)  # all of the space: exact
    np.testing.assert_allclose(found.trace.value, expected.sum(), rtol=1e-10)
    np.testing.assert_allclose(
        found.frobenius_norm.value, np.sqrt((expected**2).sum()), rtol=1e-10
    )
    pairs = curvature.eigenpairs(operator, KEY, 3, rtol=1e-10)
    np.testing.assert_allclose(pairs.values, expected[::-1][:3], rtol=1e-10)


def test_scalar_deep_network(x64):
    w, y = np.array([0.5, 2.0, 1.5]), 1.5
    operator = curvature.hessian(lambda w: (jnp.prod(w) - y) ** 2 / 2, jnp.asarray(w))
    expected = y**2 * np.sum(1 / w**2)
    values = np.linalg.eigvalsh(operator.dense())
    np.testing.assert_allclose(values, [0, 0, expected], atol=1e-12)
    found = curvature.probe(operator, KEY, 3)
    for estimate in (found.trace, found.frobenius_norm):
        np.testing.assert_allclose(estimate.value, expected, rtol=1e-8)
    pairs = curvature.eigenpairs(operator, KEY)
    np.testing.assert_allclose(pairs.values, [expected], rtol=1e-8)


def test_rescaling_layers_scales_blocks(x64):
    # Dinh: f(a W1, W2 / a) is the same function; blocks scale by a^-2 and a^2.
    rng = np.random.default_rng(3)
    params = {"w1": rng.normal(size=(2, 2)), "w2": rng.normal(size=(2, 2))}
    data = rng.normal(size=(8, 2)), rng.normal(size=(8, 2))

    def loss_fn(params, batch):
        return _square(jax.nn.relu(batch[0] @ params["w1"]) @ params["w2"], batch[1])

    def block_traces(scale):
        moved = {"w1": scale * params["w1"], "w2": params["w2"] / scale}
        operator = curvature.hessian(loss_fn, moved, data)
        return curvature.probe(operator, KEY, num_deflated=8).layer_traces.value

    one, two = block_traces(1.0), block_traces(2.0)
    np.testing.assert_allclose(two["w1"], one["w1"] / 4, rtol=1e-4)
    np.testing.assert_allclose(two["w2"], one["w2"] * 4, rtol=1e-4)


# Coverage of the intervals


SPECTRA = {
    "exponential": 10 * 0.8 ** np.arange(80),
    "polynomial": 10 / (1 + np.arange(80)) ** 1.5,
    "step": np.r_[5 * np.ones(20), 0.01 * np.ones(60)],
    "indefinite": np.r_[20, 10, 5, np.random.default_rng(0).normal(size=77)],
}


def _coverage(estimate, truth):
    quantile = scipy.stats.t.ppf(0.975, estimate.num_probes - 1)
    value, error = (np.asarray(x, "f8") for x in estimate[:2])
    return (np.abs(value - truth) <= quantile * error + 1e-6 * np.abs(truth)).mean()


@functools.cache
def _of_all_seeds(measure):
    """A measure at many seeds, compiled once for all matrices of one size."""
    over_seeds = jax.vmap(measure, (None, 0))
    return jax.jit(lambda operator, seeds: jax.tree.leaves(over_seeds(operator, seeds)))


@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    matrix = spectrum(SPECTRA[name])
    operator = quadratic(jnp.asarray(matrix, jnp.float32))
    seeds = jax.random.split(jax.random.key(1), 300)
    num_probes = 32
    found = _of_all_seeds(curvature.probe)(operator, seeds)
    trace, diagonal, norm = (
        curvature.Estimate(found[i], found[i + 1], num_probes) for i in (0, 3, 6)
    )
    assert 0.92 <= _coverage(trace, np.trace(matrix)) <= 0.98
    assert 0.92 <= _coverage(norm, np.linalg.norm(matrix)) <= 0.98
    assert 0.92 <= _coverage(diagonal, np.diag(matrix)) <= 0.98
    alone = _of_all_seeds(curvature.trace)(operator, seeds)
    alone = curvature.Estimate(*alone[:2], num_probes)
    assert 0.92 <= _coverage(alone, np.trace(matrix)) <= 0.98


@pytest.mark.parametrize(("num_probes", "rtol"), [(2, 0.1), (4, 0.1), (8, 0.05)])
def test_intervals_that_decide_when_to_stop_hold_too(num_probes, rtol):
    matrix = spectrum(SPECTRA["step"])
    operator = quadratic(matrix.astype("f4"))
    hits, probes = [], set()
    for seed in range(100):
        key = jax.random.key(seed)
        found = curvature.trace(operator, key, num_probes, num_deflated=2, rtol=rtol)
        low, high = found.interval()
        assert float(high - low) / 2 <= rtol * abs(float(found.value))
        hits.append(float(low) <= np.trace(matrix) <= float(high))
        probes.add(found.num_probes)
    assert np.mean(hits) >= 0.88  # 95 % less three standard errors
    assert len(probes) > 1


def test_layer_traces_and_row_norms_are_those_of_the_matrix():
    matrix = spectrum(SPECTRA["exponential"])

    def loss_fn(params, batch):
        flat = jnp.concatenate([params["a"].ravel(), params["b"]])
        return flat @ batch[0] @ flat / 2

    params = {"a": jnp.zeros((6, 5)), "b": jnp.zeros(50)}
    operator = curvature.hessian(
        loss_fn, params, jnp.asarray(matrix, jnp.float32)[None]
    )
    found = curvature.probe(operator, KEY, 512)
    low, high = found.layer_traces.interval(0.999)
    diagonal = np.diag(matrix)
    for name, part in (("a", diagonal[:30]), ("b", diagonal[30:])):
        assert low[name] <= part.sum() <= high[name]
    rows = np.linalg.norm(matrix, axis=1)
    error = np.concatenate(
        [np.ravel(found.row_norms.value["a"]), found.row_norms.value["b"]]
    )
    np.testing.assert_allclose(error, rows, rtol=0.2)


def test_standard_errors_shrink_as_they_should():
    operator = quadratic(jnp.asarray(spectrum(SPECTRA["step"]), jnp.float32))
    few = curvature.trace(operator, KEY, 32).standard_error
    many = curvature.trace(operator, KEY, 2048).standard_error
    assert 0.6 < few / many / 8 < 1.6


# Eigenpairs and densities


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_lie_within_their_bounds_and_the_largest_is_found(name):
    matrix = spectrum(SPECTRA[name])
    operator = quadratic(jnp.asarray(matrix, jnp.float32))
    values = np.linalg.eigvalsh(np.asarray(operator.batch[0], "f8"))
    found_largest = 0
    for seed in range(100):
        pairs = curvature.eigenpairs(operator, jax.random.key(seed))
        distance = np.abs(values - pairs.values[0]).min()
        assert distance <= pairs.residuals[0]
        assert pairs.residuals[0] <= 2e-3 * np.abs(values).max()
        found_largest += abs(pairs.values[0] - values[-1]) <= 2e-3 * abs(values[-1])
    assert found_largest >= 99


@pytest.mark.heart
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_several_eigenpairs_from_either_end(which, x64):
    values = np.r_[np.linspace(-8, 3, 60), 30, 20, -9.5]
    matrix = spectrum(values)
    pairs = curvature.eigenpairs(
        quadratic(jnp.asarray(matrix)), KEY, 5, which=which, rtol=1e-9
    )
    order = {
        "largest": np.sort(values)[::-1],
        "smallest": np.sort(values),
        "magnitude": values[np.argsort(-np.abs(values))],
    }[which][:5]
    np.testing.assert_allclose(pairs.values, order, rtol=1e-8)
    np.testing.assert_allclose(
        matrix @ pairs.vectors.T, pairs.vectors.T * pairs.values[None], atol=1e-6
    )
    np.testing.assert_allclose(pairs.vectors @ pairs.vectors.T, np.eye(5), atol=1e-8)


def test_a_warm_start_spends_fewer_products():
    matrix = spectrum(1 / (1.0 + np.arange(300)))
    counts = []

    class Counting:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            counts.append(1)
            return iter(self.batches)

    def loss_fn(params, batch):
        return params @ batch[0] @ params / 2

    def solve(matrix, **options):
        counts.clear()
        data = Counting([jnp.asarray(matrix, jnp.float32)[None]])
        operator = curvature.hessian(loss_fn, jnp.zeros(300), data)
        pairs = curvature.eigenpairs(operator, KEY, 3, rtol=1e-4, **options)
        return pairs, len(counts)

    cold, cold_count = solve(matrix)
    change = 1e-3 * spectrum(np.random.default_rng(4).normal(size=300), 1)
    warm, warm_count = solve(matrix + change, start=cold)
    assert warm_count < cold_count
    np.testing.assert_allclose(
        warm.values, np.linalg.eigvalsh(matrix + change)[::-1][:3], rtol=1e-3
    )


def test_starts_of_any_size_and_few_products():
    operator = quadratic(jnp.asarray(spectrum(SPECTRA["step"]), jnp.float32))
    many = curvature.eigenpairs(operator, KEY, 30)
    one = curvature.eigenpairs(operator, KEY, 1, start=many)
    np.testing.assert_allclose(one.values, many.values[:1], rtol=1e-3)
    few = curvature.eigenpairs(operator, KEY, 5, max_matvecs=1)
    assert few.values.shape == few.residuals.shape == (5,)


def test_small_and_degenerate_matrices():
    for values in ([3.0], [2.0] * 4, [0.0] * 4, [1.0, 1.0, 5.0, 0.0]):
        operator = quadratic(jnp.asarray(spectrum(np.array(values)), jnp.float32))
        pairs = curvature.eigenpairs(operator, KEY, len(values))
        np.testing.assert_allclose(pairs.values, np.sort(values)[::-1], atol=1e-4)
    with pytest.raises(ValueError, match="k must be at most the number of parameters"):
        curvature.eigenpairs(operator, KEY, 5)


@pytest.mark.parametrize("name", SPECTRA)
def test_spectral_density_has_the_moments_of_the_spectrum(name, x64):
    values = SPECTRA[name]
    operator = quadratic(jnp.asarray(spectrum(values)))
    density = curvature.spectral_density(operator, KEY, num_draws=24, num_steps=30)
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-8)
    assert (density.weights >= 0).all()
    for power in (1, 2, 3):
        moment = density.moment(power)
        low, high = moment.interval(0.999)
        assert low <= np.mean(values**power) <= high
    points = np.linspace(values.min() - 3, values.max() + 3, 4001)
    heights = density.density(points, width=0.3)
    assert abs(np.sum(heights) * (points[1] - points[0]) - 1) < 1e-6


# Invariance, laziness, compilation


def _network():
    """Parameters and data in NumPy, and the loss."""
    rng = np.random.default_rng(8)
    params = {
        "in": (rng.normal(size=(5, 8)) / 5**0.5).astype("f4"),
        "out": (rng.normal(size=(8, 3)) / 8**0.5).astype("f4"),
    }
    data = rng.normal(size=(24, 5)).astype("f4"), rng.integers(0, 3, 24).astype("i4")
    return params, data, _whole(_forward)


@pytest.mark.parametrize("kind", ["hessian", "gradient_covariance"])
def test_splitting_and_ordering_the_data_changes_nothing(kind):
    params, data, _ = _network()
    whole = curvature.probe(_make(kind, _forward, params, data), KEY)
    for batches in (_split(data, [16, 8])[::-1], _split(data, [8] * 3)):
        found = curvature.probe(_make(kind, _forward, params, batches), KEY)
        for one, other in zip(found, whole, strict=True):
            assert_close(one.value, other.value, rtol=2e-4, atol=1e-5)
            assert one.num_probes == other.num_probes
    trace = curvature.trace(_make(kind, _forward, params, batches), KEY)
    np.testing.assert_allclose(trace.value, whole.trace.value, rtol=1e-3)


def test_new_parameters_and_second_sweeps_compile_nothing():
    params, data, loss_fn = _network()
    moved = jax.tree.map(lambda p: p + 0.5, params)
    batches = _split(data, [8] * 3)

    def sweep(params, data):
        operator = curvature.hessian(loss_fn, params, data)
        curvature.probe(operator, KEY, 16)
        curvature.trace(operator, KEY, 16)
        curvature.eigenpairs(operator, KEY, 2, max_matvecs=60)
        operator.matvec(params)

    for source in (data, batches):
        sweep(params, source)
        with count_compilations() as compiled:
            sweep(moved, source)
        assert not compiled


def test_operators_go_through_jit_scan_and_vmap():
    params, data, loss_fn = _network()
    operator = curvature.hessian(loss_fn, params, data)
    measure = functools.partial(curvature.probe, num_probes=16, num_deflated=1)
    eager, jitted = measure(operator, KEY), jax.jit(measure)(operator, KEY)
    assert_close(jitted.trace.value, eager.trace.value, rtol=1e-4)
    assert_close(jitted.diagonal.value, eager.diagonal.value, rtol=1e-3, atol=1e-5)

    def body(carry, scale):
        moved = jax.tree.map(lambda p: scale * p, params)
        return carry, trace(curvature.hessian(loss_fn, moved, data), KEY).value

    trace = functools.partial(curvature.trace, num_probes=2, num_deflated=1)
    _, traces = jax.lax.scan(body, 0, np.array([1.0, 0.5], "f4"))
    np.testing.assert_allclose(traces[0], trace(operator, KEY).value, rtol=1e-4)


def test_a_second_product_traces_and_compiles_nothing():
    """The first one looks at the loss, the second does not."""
    params, data, loss_fn = _network()
    calls = []

    def counted(params, batch):
        calls.append(1)
        return loss_fn(params, batch)

    for source in (data, _split(data, [8] * 3)):
        operator = curvature.hessian(counted, params, source)
        operator.matvec(params)
        calls.clear()
        with count_compilations() as compiled:
            operator.matvec(params)
        assert not compiled
        assert not calls


def test_memory_does_not_grow_with_the_number_of_probes():
    params, data, loss_fn = _network()

    def temporary(num_probes):
        probe = functools.partial(
            curvature.probe, key=KEY, num_probes=num_probes, num_deflated=0
        )
        lowered = jax.jit(probe).lower(curvature.hessian(loss_fn, params, data))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(512) < temporary(16) + 512 * 64  # the keys alone


def test_forward_mode_refused_by_a_custom_vjp_falls_back_to_reverse_mode():
    params, data, _ = _network()

    @jax.custom_vjp
    def activation(x):
        return jnp.tanh(x)

    activation.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))

    def model_fn(params, inputs, activation=activation):
        return activation(inputs @ params["in"]) @ params["out"]

    def products(model_fn):
        """As one program, the point and the vector being the same."""

        def measure(params):
            operators = [_make(kind, model_fn, params, data) for kind in KINDS]
            return [(o.matvec(params), o.quadratic_form(params)) for o in operators]

        return jax.jit(measure)(params)

    plain = functools.partial(model_fn, activation=jnp.tanh)
    with pytest.raises(TypeError):
        jax.jvp(lambda p: model_fn(p, data[0]), (params,), (params,))
    assert_close(products(model_fn), products(plain), rtol=1e-4)


def test_neither_mode_says_why():
    @jax.custom_vjp
    def opaque(x):
        return jnp.sum(x**2, axis=-1)

    def backward(x, g):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.pure_callback(lambda x, g: 2 * x * g[:, None], shape, x, g),)

    opaque.defvjp(lambda x: (opaque(x), x), backward)
    operator = curvature.gauss_newton(
        lambda p, x: opaque(x * p[None]),
        lambda f, y: jnp.mean((f - y) ** 2),
        jnp.ones(3),
        (jnp.ones((2, 3)), jnp.ones(2)),
    )
    with pytest.raises(
        TypeError, match=r"neither in forward mode \(a custom_vjp.* nor in reverse mode"
    ):
        operator.matvec(jnp.ones(3))


def test_errors_of_the_loss_itself_come_as_they_are():
    def loss_fn(params):
        raise NotImplementedError("still to write")

    with pytest.raises(NotImplementedError, match="still to write"):
        curvature.hessian(loss_fn, jnp.ones(3)).matvec(jnp.ones(3))


# Norms of a population, XTrace


def test_population_norm_is_unbiased_where_the_sample_norm_is_not():
    rng = np.random.default_rng(0)
    truth = np.diag(np.linspace(1, 2, 12))
    norms, samples = [], []

    def loss_fn(params, batch):
        return jnp.mean(jnp.einsum("i,nij,j->n", params, batch, params)) / 2

    for seed in range(40):
        noise = rng.normal(size=(4, 2, 12, 12))
        matrices = truth + (noise + noise.swapaxes(-1, -2)) / 2
        batches = [jnp.asarray(m, jnp.float32) for m in matrices]
        operator = curvature.hessian(loss_fn, jnp.zeros(12), batches)
        key = jax.random.key(seed)
        found = curvature.population_frobenius_norm(operator, key, 32)
        norms.append(float(found.value) ** 2)
        sample = curvature.probe(operator, key, 16).frobenius_norm
        samples.append(float(sample.value) ** 2)
    square = (truth**2).sum()
    error = np.std(norms, ddof=1) / 40**0.5
    assert abs(np.mean(norms) - square) < 4 * error
    assert np.mean(samples) - square > 4 * np.std(samples, ddof=1) / 40**0.5


@pytest.mark.parametrize(
    "values", [0.7 ** np.arange(200), np.r_[np.ones(10), np.zeros(190)]]
)
def test_xtrace_on_the_spectra_of_its_paper(values):
    operator = quadratic(jnp.asarray(spectrum(values), jnp.float32))
    found = curvature.xtrace(operator, KEY, 50)
    np.testing.assert_allclose(found.value, values.sum(), rtol=2e-3)


# Errors


def _batches():
    return [jnp.ones((2, 3)), jnp.ones((1, 3))]


def _loss(params, batch):
    return jnp.mean((batch @ params) ** 2)


@pytest.mark.heart
def test_wrong_parameters_and_losses():
    with pytest.raises(TypeError, match="params must be floating point, got int32"):
        curvature.hessian(_loss, jnp.ones(3, jnp.int32), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="params must hold at least one number"):
        curvature.hessian(lambda p: jnp.zeros(()), {})
    with pytest.raises(TypeError, match=r"loss_fn must take 1 .* or give data\."):
        curvature.hessian(_loss, jnp.ones(3))
    operator = curvature.hessian(lambda p, b: b @ p, jnp.ones(3), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"loss_fn must return a real scalar, got sha"):
        operator.matvec(jnp.ones(3))
    operator = curvature.hessian(_loss, jnp.ones(3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="vector must have the structure and shapes"):
        operator.matvec(jnp.ones(4))
    big = curvature.hessian(lambda p: p.sum(), jnp.ones(20_000))
    with pytest.raises(ValueError, match="dense needs at most 10,000 parameters"):
        big.dense()


def test_wrong_data():
    params = jnp.ones(3)
    with pytest.raises(
        TypeError, match="got the iterator .* which ends after one pass"
    ):
        curvature.hessian(_loss, params, iter(_batches()))
    with pytest.raises(ValueError, match="data must hold examples, got 0 batches"):
        curvature.hessian(_loss, params, []).matvec(params)
    with pytest.raises(ValueError, match="arrays with one leading axis of examples"):
        curvature.hessian(_loss, params, (jnp.ones((2, 3)), jnp.ones(3)))
    with pytest.raises(ValueError, match="data must be pairs"):
        curvature.gauss_newton(_loss, _loss, params, _batches()).matvec(params)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="params must not be sharded on an Explicit"):
        curvature.hessian(
            lambda p: p.sum(), jax.device_put(jnp.ones(8), NamedSharding(mesh, P("d")))
        )
    with pytest.raises(ValueError, match="data must be a batch or batches, got None"):
        curvature.empirical_fisher(_loss, params, None)
    with pytest.raises(ValueError, match=r"data must be a pair \(inputs, targets\)"):
        curvature.gauss_newton(_loss, _loss, params, jnp.ones((3, 3)))
    operator = curvature.hessian(
        _loss, params, _batches(), weight_fn=lambda batch: -1.0
    )
    with pytest.raises(ValueError, match="weight_fn must return a finite number"):
        operator.matvec(params)
    with pytest.raises(TypeError, match="data must hold arrays, got"):
        curvature.hessian(_loss, params, ["text"]).matvec(params)
    operator = curvature.hessian(_loss, params, _batches())
    with pytest.raises(TypeError, match="read on the host, got a call inside"):
        jax.jit(operator.matvec)(params)


def test_data_that_changes_between_passes():
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([self.passes * jnp.ones((2, 3))])

    operator = curvature.hessian(_loss, jnp.ones(3), Changing())
    with pytest.raises(ValueError, match="data must be the same on every pass, got 1"):
        curvature.probe(operator, KEY)


def test_new_parameters_on_the_same_stream():
    operator = curvature.hessian(_loss, jnp.ones(3), _batches())
    operator.matvec(jnp.ones(3))
    moved = jax.tree.map(lambda x: x + 1, operator)
    expected = curvature.hessian(_loss, 2 * jnp.ones(3), _batches()).matvec(jnp.ones(3))
    np.testing.assert_allclose(moved.matvec(jnp.ones(3)), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["hessian", "empirical_fisher", "gradient_covariance"])
def test_what_has_no_weight_does_not_count(kind):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    mask = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])

    def loss_fn(params, batch):
        x, mask = batch
        return jnp.sum(mask * jnp.cos(x @ params)) / jnp.sum(mask)

    weight_fn = lambda batch: batch[1].sum()  # noqa: E731
    make = getattr(curvature, kind)
    batches = [(x[:2], mask[:2]), (x[2:3], mask[2:3]), (x[2:], mask[2:])]
    found = make(loss_fn, jnp.ones(3), batches, weight_fn=weight_fn).dense()
    kept = jnp.array([0, 1, 3, 4])
    expected = make(loss_fn, jnp.ones(3), (x[kept], mask[kept])).dense()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_shuffled_data_is_the_same_data():
    params, data, loss_fn = _network()
    rng = np.random.default_rng(0)

    class Shuffled:
        def __iter__(self):
            order = rng.permutation(24)
            shuffled = jax.tree.map(lambda x: x[order], data)
            return iter(_split(shuffled, [8, 16]))

    found = curvature.probe(curvature.hessian(loss_fn, params, Shuffled()), KEY)
    whole = curvature.probe(curvature.hessian(loss_fn, params, data), KEY)
    np.testing.assert_allclose(found.trace.value, whole.trace.value, rtol=1e-4)


def test_curvature_that_is_not_finite():
    operator = curvature.hessian(lambda p: jnp.nan * jnp.sum(p**2), jnp.ones(3))
    for measure in (curvature.probe, curvature.trace, curvature.eigenpairs):
        with pytest.raises(ValueError, match="the curvature is not finite"):
            measure(operator, KEY)


def test_wrong_numbers():
    operator = quadratic(jnp.eye(4))
    with pytest.raises(ValueError, match="num_probes must be at least 2"):
        curvature.probe(operator, KEY, 1)
    with pytest.raises(ValueError, match="rtol must lie between 0 and 1, got 5"):
        curvature.trace(operator, KEY, rtol=5)
    with pytest.raises(TypeError, match="rtol decides while running"):
        jax.jit(lambda o: curvature.trace(o, KEY, rtol=0.1))(operator)
    with pytest.raises(ValueError, match="which must be one of 'largest'"):
        curvature.eigenpairs(operator, KEY, which="top")
    with pytest.raises(TypeError, match="got a call inside jax.jit"):
        jax.jit(lambda o: curvature.eigenpairs(o, KEY).values)(operator)
    with pytest.raises(TypeError, match="operator must be a curvature operator"):
        curvature.probe(jnp.eye(3), KEY)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        curvature.trace(operator, KEY).interval(95)
    with pytest.raises(ValueError, match="operator must be on a re-iterable"):
        curvature.population_frobenius_norm(operator, KEY)
    with pytest.raises(ValueError, match="operator must be on one batch for xtrace"):
        curvature.xtrace(curvature.hessian(_loss, jnp.ones(3), _batches()), KEY)
