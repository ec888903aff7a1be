"""Sharpness measures against closed forms on quadratics, and their invariances."""

import warnings

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from helpers import assert_close

from flatopt import curvature, sharpness

KEY = jax.random.key(0)
SIZE = 12
RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(SIZE, SIZE))
MATRIX = FACTOR @ FACTOR.T / SIZE
EIGENVALUES = np.linalg.eigvalsh(MATRIX)


def quadratic(params, batch):
    """Half the quadratic form of the mean matrix of a batch."""
    return params @ jnp.mean(batch, axis=0) @ params / 2


def _data(split):
    noise = RNG.normal(size=(6, SIZE, SIZE)) / 10
    noise = (noise + noise.swapaxes(1, 2)) - 2 * (
        (noise + noise.swapaxes(1, 2)).mean(0)
    )
    matrices = (MATRIX + noise - noise.mean(axis=0)).astype("f4")
    # Of one size, which share their programs; "ragged" below are unequal batches.
    parts = [matrices[:3], matrices[3:]] if split else matrices
    return jax.tree.map(jnp.asarray, parts)


DATA = {"batch": _data(False), "stream": _data(True)}
ZERO = jnp.zeros(SIZE)


def _holds(estimate, truth, errors=4):
    assert abs(float(estimate.value) - truth) <= (
        errors * float(estimate.standard_error) + 1e-5 * abs(truth)
    )
    assert float(estimate.standard_error) < 0.3 * abs(truth)


@pytest.mark.parametrize("data", DATA)
def test_averages_on_a_quadratic(data):
    data = DATA[data]
    found = sharpness.low_pass(
        quadratic, ZERO, KEY, sigma=0.1, num_samples=400, data=data
    )
    _holds(found, 0.005 * np.trace(MATRIX))

    point = jnp.asarray(RNG.normal(size=SIZE), jnp.float32)

    def around(params, batch):
        return quadratic(params - point, batch)

    found = sharpness.average_case_adaptive(
        around, point, KEY, rho=0.2, num_samples=400, data=data
    )
    scaled = np.diag(np.abs(point)) @ MATRIX @ np.diag(np.abs(point))
    _holds(found, 0.02 * np.trace(scaled))

    found = sharpness.local_entropy(
        quadratic, ZERO, KEY, gamma=2.0, num_samples=4000, data=data
    )
    _holds(found, 0.5 * np.log(1 + EIGENVALUES / 2).sum())


@pytest.mark.parametrize("data", DATA)
def test_pac_bayes_on_a_quadratic(data):
    initial = jnp.ones(SIZE)
    found = sharpness.pac_bayes(
        quadratic,
        ZERO,
        KEY,
        initial_params=initial,
        epsilon=0.3,
        num_samples=1000,
        data=DATA[data],
    )
    sigma = np.sqrt(2 * 0.3 / np.trace(MATRIX))
    np.testing.assert_allclose(found.sigma, sigma, rtol=0.1)
    expected = SIZE / (4 * found.sigma**2) + np.log(2 * 6 / 1e-6)
    np.testing.assert_allclose(found.value, expected, rtol=1e-5)
    zero = sharpness.pac_bayes(
        quadratic, ZERO, KEY, initial_params=ZERO, data=DATA[data]
    )
    assert zero.value < found.value  # the initialization given is the one used


@pytest.mark.heart
@pytest.mark.parametrize("data", DATA)
def test_worst_cases_on_a_quadratic(data):
    options = {"rho": 0.1, "data": DATA[data]}
    found = sharpness.worst_case(quadratic, ZERO, KEY, num_steps=60, **options)
    np.testing.assert_allclose(found, 0.005 * EIGENVALUES[-1], rtol=1e-3)

    point = jnp.asarray(RNG.normal(size=SIZE), jnp.float32)
    scaled = np.diag(np.abs(point)) @ MATRIX @ np.diag(np.abs(point))
    found = sharpness.worst_case(
        lambda params, batch: quadratic(params - point, batch),
        point,
        KEY,
        adaptive=True,
        num_steps=60,
        **options,
    )
    np.testing.assert_allclose(found, 0.005 * np.linalg.eigvalsh(scaled)[-1], rtol=1e-3)
    found = sharpness.worst_case(
        lambda params, batch: jnp.sum(jnp.arange(1.0, 13) * params**2) / 2,
        ZERO,
        KEY,
        norm="linf",
        **options,
    )
    np.testing.assert_allclose(found, 0.005 * 78, rtol=1e-5)


def test_m_sharpness_is_the_mean_over_batches():
    found = sharpness.m_sharpness(
        quadratic, ZERO, KEY, DATA["stream"], rho=0.1, num_steps=60
    )
    tops = [np.linalg.eigvalsh(b.mean(axis=0))[-1] for b in DATA["stream"]]
    np.testing.assert_allclose(found.value, 0.005 * np.mean(tops), rtol=1e-3)
    assert found.num_probes == 2


@pytest.mark.parametrize("data", DATA)
def test_epsilon_sharpness_along_a_known_gradient(data):
    start = jnp.asarray(RNG.normal(size=SIZE), jnp.float32)
    g = MATRIX @ np.asarray(start, "f8")
    unit = g / np.linalg.norm(g)
    # |g| t + t^2 u'Au / 2 = 0.1
    a, b = unit @ MATRIX @ unit / 2, np.linalg.norm(g)
    distance = (-b + np.sqrt(b**2 + 0.4 * a)) / (2 * a)
    found = sharpness.epsilon_sharpness(quadratic, start, data=DATA[data])
    np.testing.assert_allclose(found, 1 / distance, rtol=1e-3)
    with pytest.raises(ValueError, match="params must have a gradient to follow"):
        sharpness.epsilon_sharpness(quadratic, ZERO, data=DATA[data])


@pytest.mark.parametrize("data", DATA)
def test_measures_of_the_curvature_on_a_quadratic(data):
    data = DATA[data]
    point = jnp.asarray(RNG.normal(size=SIZE), jnp.float32)
    form = sharpness.fisher_rao_hessian(quadratic, point, data=data)
    np.testing.assert_allclose(form, point @ MATRIX @ point, rtol=1e-4)
    found = sharpness.effective_dimension(
        quadratic, ZERO, KEY, alpha=0.5, num_draws=40, data=data
    )
    _holds(found, (EIGENVALUES / (EIGENVALUES + 0.5)).sum())


def test_fisher_rao_norms_are_named_apart_and_differ():
    x = jnp.asarray(RNG.normal(size=(20, 3)), jnp.float32)
    y = jnp.asarray(RNG.normal(size=20), jnp.float32)
    w = jnp.asarray(RNG.normal(size=3), jnp.float32)
    model = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    loss = lambda f, y: jnp.mean((f - y) ** 2) / 2  # noqa: E731
    whole = lambda w, batch: loss(model(w, batch[0]), batch[1])  # noqa: E731
    x_, y_, w_ = map(np.asarray, (x, y, w))
    f = np.tanh(x_ @ w_)
    slopes = (1 - f**2) * (x_ @ w_)
    newton = sharpness.fisher_rao_gauss_newton(model, loss, w, (x, y))
    np.testing.assert_allclose(newton, np.mean(slopes**2), rtol=1e-5)
    empirical = sharpness.fisher_rao_empirical(whole, w, (x, y))
    np.testing.assert_allclose(empirical, np.mean(((f - y_) * slopes) ** 2), rtol=1e-5)
    hessian = sharpness.fisher_rao_hessian(whole, w, data=(x, y))
    extra = (f - y_) * -2 * f * (1 - f**2) * (x_ @ w_) ** 2
    np.testing.assert_allclose(hessian, np.mean(slopes**2 + extra), rtol=1e-4)


def _tilted(params):
    return jnp.sum(params**2)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 20.0, 200.0, 2e4])
def test_local_entropy_from_a_few_draws_says_so(gamma):
    """100 directions: rises of 100 / gamma, which spread by a seventh of that."""
    truth, found = 50 * np.log1p(2 / gamma), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(20):
            key = jax.random.key(seed)
            found.append(
                sharpness.local_entropy(_tilted, jnp.zeros(100), key, gamma=gamma)
            )
    errors = np.array([e.standard_error for e in found])
    distances = np.array([abs(e.value - truth) for e in found])
    assert (distances <= 3.5 * errors).all()
    assert np.isinf(errors).all() == (gamma < 10)
    assert sum("rests on" in str(w.message) for w in caught) == np.isinf(errors).sum()
    if gamma > 10:
        assert (errors < 0.2 + truth).all()


def test_shannon_entropy_and_the_entropy_gradient():
    logits = jnp.asarray(RNG.normal(size=(10, 4)), jnp.float32)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    model = lambda params, x: params * x  # noqa: E731
    one = jnp.float32(1)
    for inputs in (logits, [logits[:7], logits[7:]]):
        found = sharpness.shannon_entropy(model, one, inputs)
        np.testing.assert_allclose(found, (p * np.log(p)).sum(axis=1).mean(), rtol=1e-5)

    # On a quadratic without noise the walk contracts by I - rate (A + gamma).
    start = jnp.asarray(RNG.normal(size=SIZE), jnp.float32)
    gamma, rate, decay, steps = 0.5, 0.1, 0.75, 20
    point, mean = np.asarray(start, "f8"), np.asarray(start, "f8")
    for _ in range(steps):
        point = point - rate * (MATRIX @ point + gamma * (point - start))
        mean = decay * mean + (1 - decay) * point
    found = sharpness.local_entropy_gradient(
        quadratic, start, KEY, DATA["batch"], gamma=gamma, noise_scale=0.0
    )
    np.testing.assert_allclose(found, np.linalg.norm(start - mean), rtol=1e-4)


# Normalized filters


class Network(linen.Module):
    """Convolution, normalization, attention-like and dense layers."""

    @linen.compact
    def __call__(self, x):
        """Logits."""
        x = linen.relu(linen.LayerNorm()(linen.Conv(4, (3, 3))(x)))
        x = linen.DenseGeneral((2, 3))(x.mean(axis=(1, 2)))
        return linen.Dense(3)(x.reshape(len(x), -1))


def test_normalized_filters_have_size_one_and_keep_the_function():
    network = Network()
    x = jnp.asarray(RNG.normal(size=(5, 6, 6, 2)), jnp.float32)
    params = jax.jit(network.init)(KEY, x)["params"]
    params = jax.tree.map(
        lambda p: jnp.asarray(np.asarray(p) + np.float32(0.1)), params
    )
    axes = {
        "Conv_0": {"kernel": -1, "bias": -1},
        "LayerNorm_0": {"scale": -1, "bias": -1},
        "DenseGeneral_0": {"kernel": (-2, -1), "bias": (-2, -1)},
        "Dense_0": {"kernel": -1, "bias": -1},
    }
    normalized, restore = sharpness.normalize_filters(params, axes)
    assert_close(jax.jit(restore)(normalized), params)
    normalized = jax.tree.map(np.asarray, normalized)
    kernel, bias = normalized["Conv_0"]["kernel"], normalized["Conv_0"]["bias"]
    sizes = np.sqrt(np.sum(kernel**2, axis=(0, 1, 2))) + np.abs(bias)
    np.testing.assert_allclose(sizes, np.ones(4), rtol=1e-5)
    norm = normalized["LayerNorm_0"]
    np.testing.assert_allclose(abs(norm["scale"]) + abs(norm["bias"]), np.ones(4))
    general = normalized["DenseGeneral_0"]
    sizes = np.sqrt(np.sum(general["kernel"] ** 2, axis=0)) + abs(general["bias"])
    np.testing.assert_allclose(sizes, np.ones((2, 3)), rtol=1e-5)


def test_measures_on_the_normalized_network_do_not_see_rescaled_layers():
    params, loss_fn, x = _layers(False, False)
    rescaled = _rescaled(params, 3.0, False)
    found = []
    for point in (params, rescaled):
        normalized, restore = sharpness.normalize_filters(point)
        found.append(
            sharpness.low_pass(
                lambda q, batch, restore=restore: loss_fn(restore(q), batch),
                normalized,
                KEY,
                data=x,
            ).value
        )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
    raw = [
        sharpness.low_pass(loss_fn, point, KEY, data=x).value
        for point in (params, rescaled)
    ]
    assert abs(raw[0] - raw[1]) > 0.1 * abs(raw[0])
    adaptive = [
        sharpness.average_case_adaptive(loss_fn, point, KEY, data=x).value
        for point in (params, rescaled)
    ]
    np.testing.assert_allclose(adaptive[0], adaptive[1], rtol=1e-3)


def _layers(first_bias, later_bias, normalize=False):
    rng = np.random.default_rng(3)
    first, later, *biases = (
        rng.normal(size=shape).astype("f4") for shape in ((4, 5), (5, 2), 5, 2)
    )
    params = {"a": {"kernel": first}, "b": {"kernel": later}}
    if first_bias:
        params["a"]["bias"] = biases[0]
    if later_bias:
        params["b"]["bias"] = biases[1]
    inputs = rng.normal(size=(16, 4)).astype("f4")

    def layer(params, x):
        bias = params.get("bias")
        return x @ params["kernel"] + (0.0 if bias is None else bias[None])

    def loss_fn(params, batch):
        hidden = layer(params["a"], batch)
        if normalize:
            hidden = hidden / jnp.sqrt(jnp.mean(hidden**2, axis=1, keepdims=True))
        return jnp.mean(layer(params["b"], jax.nn.relu(hidden)) ** 2)

    return params, loss_fn, jnp.asarray(inputs)


def _rescaled(params, factor, normalize):
    """The same function: a layer times a factor, the next over it unless normalized."""
    factor = np.float32(factor)
    later = params["b"] | {
        "kernel": params["b"]["kernel"] / (np.float32(1) if normalize else factor)
    }
    moved = {"a": jax.tree.map(lambda x: factor * x, params["a"]), "b": later}
    return jax.tree.map(jnp.asarray, moved)


@pytest.mark.parametrize(
    ("first_bias", "later_bias", "normalize", "is_invariant"),
    [
        (False, False, False, True),
        (True, False, False, True),
        (True, True, False, False),  # as the docstring says
        (False, True, True, True),
        (True, True, True, True),
    ],
)
def test_for_which_networks_filter_units_remove_the_scale(
    first_bias, later_bias, normalize, is_invariant
):
    params, loss_fn, x = _layers(first_bias, later_bias, normalize)

    @jax.jit
    def normalized_trace(point):
        normalized, restore = sharpness.normalize_filters(point)
        flat, unravel = jax.flatten_util.ravel_pytree(normalized)
        return jnp.trace(jax.hessian(lambda v: loss_fn(restore(unravel(v)), x))(flat))

    loss = jax.jit(loss_fn)
    traces, adaptive = [], []
    for factor in (1.0, 10.0, 0.1):
        point = _rescaled(params, factor, normalize)
        np.testing.assert_allclose(loss(point, x), loss(params, x), rtol=1e-4)
        traces.append(float(normalized_trace(point)))
        adaptive.append(
            sharpness.average_case_adaptive(loss_fn, point, KEY, data=x).value
        )
    np.testing.assert_allclose(adaptive, adaptive[0], rtol=1e-3)
    change = max(traces) / min(traces) - 1
    assert (change < 1e-3) == is_invariant


@pytest.mark.heart
def test_report_computes_every_measure_and_prints_a_table():
    point = jnp.asarray(RNG.normal(size=SIZE), jnp.float32)
    found = sharpness.report(
        quadratic,
        point,
        KEY,
        DATA["batch"],
        model_fn=lambda params, x: x[:, 0, :3],
        inputs=DATA["batch"],
        initial_params=ZERO,
    )
    assert len(found.values) == 17
    table = str(found)
    for name, value in found.values.items():
        assert name in table
        assert np.isfinite(getattr(value, "value", value))
    _holds(found.values["trace"], np.trace(MATRIX))
    assert {*found.seconds} == {*found.values} - {
        "frobenius_norm",
        "max_eigenvalue_bound",
    }
    assert min(found.seconds.values()) > 0
    assert found.to_dict()["seconds"] == sum(found.seconds.values())


@pytest.mark.parametrize(
    ("measure", "match"),
    [
        (
            lambda: sharpness.low_pass(quadratic, ZERO, KEY, sigma=0.0),
            "sigma must be greater than 0, got 0.0",
        ),
        (
            lambda: sharpness.worst_case(quadratic, ZERO, KEY, rho=-1.0),
            "rho must be finite and not negative, got -1.0",
        ),
        (
            lambda: sharpness.worst_case(quadratic, ZERO, KEY, rho=1.0, norm="l1"),
            "norm must be 'l2' or 'linf', got 'l1'",
        ),
        (
            lambda: sharpness.pac_bayes(
                quadratic, ZERO, KEY, initial_params=jnp.ones(3), data=DATA["batch"]
            ),
            "initial_params must have the structure and shapes of params",
        ),
        (
            lambda: sharpness.pac_bayes(
                lambda p: jnp.sum(p**2), ZERO, KEY, initial_params=ZERO
            ),
            "num_examples must be given where there is no data",
        ),
        (
            lambda: sharpness.m_sharpness(quadratic, ZERO, KEY, [], rho=0.1),
            "batches must hold batches, got none",
        ),
        (
            lambda: sharpness.local_entropy_gradient(quadratic, ZERO, KEY, None),
            "data must be a batch or batches, got None",
        ),
    ],
)
def test_wrong_arguments(measure, match):
    with pytest.raises(ValueError, match=match):
        measure()


def test_a_loss_that_never_rises():
    found = sharpness.pac_bayes(
        lambda p: 0.0 * jnp.sum(p), ZERO, KEY, initial_params=ZERO, num_examples=5
    )
    assert found.sigma == np.inf
    assert found.value == pytest.approx(np.log(10 / 1e-6))


def test_batches_may_be_lists_as_data_loaders_give_them():
    x = RNG.normal(size=(6, SIZE)).astype("f4")
    y = RNG.normal(size=6).astype("f4")

    def loss_fn(params, batch):
        inputs, targets = batch
        return jnp.mean((inputs @ params - targets) ** 2)

    lists = [[jnp.asarray(a[part]) for a in (x, y)] for part in (slice(3), slice(3, 6))]
    tuples = [tuple(batch) for batch in lists]
    for measure in (
        lambda data: sharpness.m_sharpness(loss_fn, ZERO, KEY, data, rho=0.1).value,
        lambda data: sharpness.low_pass(loss_fn, ZERO, KEY, data=data).value,
        lambda data: sharpness.local_entropy_gradient(loss_fn, ZERO, KEY, data),
    ):
        np.testing.assert_allclose(measure(lists), measure(tuples), rtol=1e-6)


def test_small_moves_of_bfloat16_parameters_are_not_rounded_away():
    params = jnp.ones(4000, jnp.bfloat16)

    def loss_fn(params):
        return 10 * jnp.sum((params.astype(jnp.float32) - 1) ** 2)

    found = sharpness.worst_case(loss_fn, params, KEY, rho=0.05)
    np.testing.assert_allclose(found, 0.025, rtol=1e-3)
    found = sharpness.low_pass(loss_fn, params, KEY, sigma=1e-3)
    np.testing.assert_allclose(found.value, 0.04, rtol=0.02)


@pytest.mark.heart
def test_losses_that_are_not_numbers_count_as_risen_or_are_errors():
    def loss_fn(params):
        return -jnp.sum(jnp.log(params))

    point = jnp.full(3, 1e-2)
    found = sharpness.pac_bayes(
        loss_fn, point, KEY, initial_params=point, num_examples=5, epsilon=30.0
    )
    assert 0 < found.sigma < 0.1
    assert sharpness.epsilon_sharpness(loss_fn, point, epsilon=30.0) > 1
    with pytest.raises(ValueError, match="the loss is not a number within rho=0.5"):
        sharpness.worst_case(loss_fn, point, KEY, rho=0.5)
    found = sharpness.worst_case(lambda p: -jnp.sum(p**2), ZERO, KEY, rho=0.1)
    assert found == 0.0


# The same data in other batches, losses that are not numbers, keys, the table


def _fit(params, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ params - targets) ** 2)


def _splits():
    x = RNG.normal(size=(24, SIZE)).astype("f4")
    y = RNG.normal(size=24).astype("f4")

    def cut(*ends):
        rows = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
        return [(jnp.asarray(x[part]), jnp.asarray(y[part])) for part in rows]

    # Few sizes of batches: each is a program of each measure.
    return {
        "one batch": cut(0, 24)[0],
        "a list of one": cut(0, 24),
        "ragged": cut(0, 11, 12, 24),
        "lists": [list(batch) for batch in cut(0, 12, 24)],
    }


def test_measures_do_not_depend_on_how_the_data_are_split():
    point = jnp.asarray(RNG.normal(size=SIZE), jnp.float32)
    measures = {
        "local entropy gradient": lambda data: sharpness.local_entropy_gradient(
            _fit, point, KEY, data
        ),
        "low pass": lambda data: (
            sharpness.low_pass(_fit, point, KEY, sigma=0.1, data=data).value
        ),
        "worst case": lambda data: sharpness.worst_case(
            _fit, point, KEY, rho=0.1, data=data
        ),
        "epsilon": lambda data: sharpness.epsilon_sharpness(_fit, point, data=data),
        "Fisher-Rao": lambda data: sharpness.fisher_rao_hessian(_fit, point, data=data),
        "Shannon": lambda data: sharpness.shannon_entropy(
            lambda params, batch: batch[0] * params[None], point, data
        ),
    }
    for name, measure in measures.items():
        found = {split: float(measure(data)) for split, data in _splits().items()}
        for split, value in found.items():
            np.testing.assert_allclose(
                value, found["one batch"], rtol=2e-4, err_msg=f"{name}, {split}"
            )


def _nan(params, batch):
    return jnp.log(-jnp.sum(params**2)) + 0 * jnp.mean(batch)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loss_that_is_not_a_number_is_one_sentence(streamed):
    data = jnp.ones((4, SIZE))
    data, point = [data] if streamed else data, jnp.ones(SIZE)
    options = {"data": data}
    operator = curvature.hessian(_nan, point, data)
    measures = [
        lambda: curvature.trace(operator, KEY),
        lambda: curvature.probe(operator, KEY),
        lambda: curvature.eigenpairs(operator, KEY),
        lambda: curvature.spectral_density(operator, KEY),
        lambda: operator.matvec(point),
        lambda: operator.quadratic_form(point),
        lambda: sharpness.low_pass(_nan, point, KEY, **options),
        lambda: sharpness.average_case_adaptive(_nan, point, KEY, **options),
        lambda: sharpness.local_entropy(_nan, point, KEY, **options),
        lambda: sharpness.local_entropy_gradient(_nan, point, KEY, data),
        lambda: sharpness.pac_bayes(
            _nan, point, KEY, initial_params=point, num_examples=4, **options
        ),
        lambda: sharpness.epsilon_sharpness(_nan, point, **options),
        lambda: sharpness.worst_case(_nan, point, KEY, rho=0.1, **options),
        lambda: sharpness.fisher_rao_hessian(_nan, point, **options),
        lambda: sharpness.effective_dimension(_nan, point, KEY, **options),
        lambda: sharpness.report(_nan, point, KEY, data),
    ]
    if not streamed:
        measures.append(lambda: curvature.xtrace(operator, KEY, 8))
    for measure in measures:
        with pytest.raises(ValueError, match="the loss over all data is nan"):
            measure()


def test_a_loss_that_is_not_a_number_nearby_names_the_measure():
    point = jnp.full(3, 0.1)
    loss_fn = lambda p: -jnp.sum(jnp.log(p))  # noqa: E731
    with pytest.raises(ValueError, match="low_pass met a loss that is not a number"):
        sharpness.low_pass(loss_fn, point, KEY, sigma=1.0)
    with pytest.raises(ValueError, match="local_entropy met a loss that is not a"):
        sharpness.local_entropy(loss_fn, point, KEY, gamma=1.0)


@pytest.mark.parametrize("key", [0, None, jnp.zeros(()), jax.random.split(KEY, 2)])
def test_what_is_no_key_is_one_sentence(key):
    operator = curvature.hessian(quadratic, ZERO, DATA["batch"])
    streamed = curvature.hessian(quadratic, ZERO, DATA["stream"])
    args = quadratic, ZERO, key
    for measure in (
        lambda: curvature.trace(operator, key),
        lambda: curvature.probe(operator, key),
        lambda: curvature.eigenpairs(operator, key),
        lambda: curvature.spectral_density(operator, key),
        lambda: curvature.xtrace(operator, key, 8),
        lambda: curvature.population_frobenius_norm(streamed, key),
        lambda: sharpness.low_pass(*args, data=DATA["batch"]),
        lambda: sharpness.average_case_adaptive(*args, data=DATA["batch"]),
        lambda: sharpness.local_entropy(*args, data=DATA["batch"]),
        lambda: sharpness.local_entropy_gradient(*args, DATA["batch"]),
        lambda: sharpness.pac_bayes(*args, initial_params=ZERO, data=DATA["batch"]),
        lambda: sharpness.worst_case(*args, rho=0.1, data=DATA["batch"]),
        lambda: sharpness.m_sharpness(*args, DATA["stream"], rho=0.1),
        lambda: sharpness.effective_dimension(*args, data=DATA["batch"]),
        lambda: sharpness.report(*args, DATA["batch"]),
    ):
        with pytest.raises(TypeError, match="key must be one JAX random key, got"):
            measure()


def test_the_table_is_aligned_and_an_empty_one_prints():
    assert str(sharpness.Report({})).startswith("measure  value  error  unit")
    assert "<table>" in sharpness.Report({})._repr_html_()
    found = sharpness.Report(
        {"trace": curvature.Estimate(2.0, 0.25, 8), "worst_case": 1e-6}
    )
    header, first, _, second, *_ = str(found).splitlines()
    start = header.index("unit")
    assert first[start - 1] == second[start - 1] == " "
    assert " " not in (first[start], second[start])
    assert found.to_dict() == {
        "trace": 2.0,
        "trace_standard_error": 0.25,
        "worst_case": 1e-6,
    }


def test_the_rise_is_found_in_few_passes():
    from flatopt.sharpness._solve import solve

    for power, target, scale in ((1, 0.1, 3.0), (2, 0.1, 1e-2), (4, 0.1, 20.0)):
        calls = []

        def rise(x, power=power, scale=scale, calls=calls):
            calls.append(x)
            return (x / scale) ** power

        found = solve(rise, target, 1e-3, 1e6)
        np.testing.assert_allclose(found, scale * target ** (1 / power), rtol=2e-4)
        assert len(calls) <= 18
    # A cliff of what is not a number.
    found = solve(lambda x: np.nan if x > 0.3 else 0.0, 0.1, 1e-3, 1e6)
    np.testing.assert_allclose(found, 0.3, rtol=2e-4)
    assert solve(lambda x: 0.0, 0.1, 1e-3, 1e6) == np.inf
