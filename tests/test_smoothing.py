"""Smoothing against closed forms, and its layouts against each other."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    STRATEGIES,
    assert_close,
    count_compilations,
    leaves_array,
    loss_fn,
    regression,
)

import flatopt
from flatopt import kernels, smooth, smooth_value_and_grad
from flatopt._core import jaxprs

KERNELS = {
    "isotropic": kernels.isotropic(),
    "signs": kernels.isotropic(kernels.signs),
    "filterwise": kernels.filterwise(),
    "elementwise": kernels.elementwise(),
    "shared": kernels.shared_magnitude(kernels.filterwise()),
    "masked": kernels.masked(kernels.filterwise(), {"first": True, "second": False}),
    "function": lambda key, params: jax.tree.map(
        lambda p: jax.random.normal(key, p.shape) * p, params
    ),
}


# Closed forms


@jax.jit
def _pair_of_a_quadratic(key, theta, scale, matrix, b):
    def quadratic(theta):
        return jnp.vdot(theta, matrix @ theta) / 2 + jnp.vdot(b, theta)

    return smooth_value_and_grad(quadratic, scale, antithetic=True)(key, theta)[1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_antithetic_gradient_of_a_quadratic_is_the_plain_one(scale, seed, x64):
    a, b, theta = np.random.default_rng(seed).normal(size=(3, 6, 6))
    matrix = a @ a.T
    grads = _pair_of_a_quadratic(jax.random.key(seed), theta, scale, matrix, b)
    np.testing.assert_allclose(grads, matrix @ theta + b, rtol=1e-9, atol=1e-9)


def test_gradient_of_a_quartic_gains_12_sigma_squared_theta(x64):
    theta, sigma, draws = np.array([0.5, -1.0, 2.0]), 0.3, 200_000
    # One value_fn of many copies: each copy has noise of its own.
    copies = np.tile(theta, (draws, 1))
    smoothed = smooth_value_and_grad(lambda t: jnp.sum(t**4), sigma)
    grads = np.asarray(jax.jit(smoothed)(jax.random.key(0), copies)[1])
    error = grads.std(axis=0, ddof=1) / np.sqrt(draws)
    expected = 4 * theta**3 + 12 * sigma**2 * theta
    assert np.all(np.abs(grads.mean(axis=0) - expected) < 5 * error)
    plain = 4 * theta**3
    assert np.all(np.abs(grads.mean(axis=0) - plain) > 20 * error)


def test_variance_falls_as_sigma_squared_for_one_point_and_fourth_for_two(x64):
    # f = theta' A theta / 2 + sum c_i theta_i^3 / 6, so T is diagonal with entries c.
    dimension = 5
    a = np.random.default_rng(1).normal(size=(dimension, dimension))
    hessian, cubic = a + a.T, np.arange(1.0, dimension + 1)
    theta = np.zeros(dimension)

    def f(theta):
        return theta @ hessian @ theta / 2 + jnp.sum(cubic * theta**3) / 6

    sigmas = np.array([0.003, 0.01, 0.03, 0.1])
    keys = jax.random.split(jax.random.key(2), 5_000)
    measured = {}
    for antithetic in (False, True):

        @jax.jit
        def draw(keys, sigma, antithetic=antithetic):
            gradient = smooth_value_and_grad(f, sigma, antithetic=antithetic)
            return jax.vmap(lambda k: gradient(k, theta)[1])(keys)

        draws = [np.asarray(draw(keys, sigma)) for sigma in sigmas]
        measured[antithetic] = np.var(draws, axis=1, ddof=1).sum(axis=1)
    two = sigmas**4 / 2 * np.sum(cubic**2)
    one = sigmas**2 * np.sum(hessian**2) + two
    np.testing.assert_allclose(measured[False], one, rtol=0.05)
    np.testing.assert_allclose(measured[True], two, rtol=0.10)
    slopes = {
        k: np.polyfit(np.log(sigmas), np.log(v), 1)[0] for k, v in measured.items()
    }
    assert abs(slopes[False] - 2) < 0.02
    assert abs(slopes[True] - 4) < 0.05


def test_shared_magnitudes_have_the_variance_of_independent_draws(x64):
    # f = theta' H theta / 2: the one-point variance is sigma^2 |H|_F^2 / M exactly.
    dimension, sigma, num_samples = 6, 0.1, 4
    a = np.random.default_rng(1).normal(size=(dimension, dimension))
    hessian = a + a.T
    keys = jax.random.split(jax.random.key(2), 5_000)
    measured = {}
    for name, kernel in {
        "independent": kernels.isotropic(),
        "shared": kernels.shared_magnitude(kernels.isotropic()),
    }.items():
        f = smooth_value_and_grad(
            lambda t: t @ hessian @ t / 2, sigma, kernel, num_samples=num_samples
        )
        draw = jax.jit(jax.vmap(lambda k, f=f: f(k, np.zeros(dimension))[1]))
        measured[name] = np.var(np.asarray(draw(keys)), axis=0, ddof=1).sum()
    expected = sigma**2 * np.sum(hessian**2) / num_samples
    np.testing.assert_allclose(measured["independent"], expected, rtol=0.04)
    np.testing.assert_allclose(measured["shared"], expected, rtol=0.04)


@pytest.mark.heart
def test_smoothed_value_adds_half_sigma_squared_times_the_trace(x64):
    diagonal = np.array([1.0, 2.0, -4.0])
    smoothed = smooth(
        lambda t: jnp.sum(diagonal * t**2) / 2, 0.1, kernels.isotropic(kernels.signs)
    )
    value = jax.jit(smoothed)(jax.random.key(0), np.zeros(3))
    np.testing.assert_allclose(value, 0.1**2 / 2 * diagonal.sum(), rtol=1e-6)


# Layouts


# Without jit "scan" and "unroll" are laid out in another way. All layouts of pairs agree.
@pytest.mark.parametrize(
    ("strategy", "antithetic", "jit"),
    [
        ("vmap", False, True),
        ("vmap", True, True),
        ("scan", False, True),
        ("scan", True, False),
        ("unroll", False, False),
        (3, False, True),
        ("auto", False, True),
        ("auto", True, False),
    ],
)
def test_split_batch_at_scale_zero_gives_the_full_gradient(strategy, antithetic, jit):
    params, batch = regression()
    f = smooth_value_and_grad(
        loss_fn,
        0.0,
        num_samples=4,
        antithetic=antithetic,
        batch_argnames=("batch",),
        strategy=strategy,
    )
    result = (jax.jit(f) if jit else f)(jax.random.key(0), params, batch=batch)
    assert_close(result, _plain(params, batch))


_plain = jax.jit(jax.value_and_grad(loss_fn))


# All layouts of one kernel, two of one that shares between draws; the others are in the test
# below: noise is drawn before it is laid out. "auto" is one of the other layouts, or two of
# them in branches.
@pytest.mark.parametrize(
    ("kernel", "antithetic", "num_samples", "layouts"),
    [
        ("isotropic", True, 3, ["vmap", "scan", "unroll", 2, "auto"]),
        ("shared", False, 2, ["vmap", "unroll"]),
    ],
)
def test_strategies_agree_on_the_same_key(kernel, antithetic, num_samples, layouts):
    params, batch = regression()
    batch = jax.tree.map(lambda x: np.asarray(x)[:60], batch)
    results = [
        jax.jit(
            smooth_value_and_grad(
                lambda params, batch: (loss_fn(params, batch), batch["targets"].sum()),
                0.1,
                KERNELS[kernel],
                num_samples=num_samples,
                antithetic=antithetic,
                batch_argnames=("batch",),
                has_aux=True,
                strategy=strategy,
            )
        )(jax.random.key(3), params, batch=batch)
        for strategy in layouts
    ]
    (_, aux), _ = results[0]
    assert aux.shape == ((num_samples, 2) if antithetic else (num_samples,))
    for other in results[1:]:
        assert_close(other, results[0])
    plain = _plain(params, batch)
    difference = leaves_array(results[0][1]) - leaves_array(plain[1])
    assert np.abs(difference).max() > 1e-3  # the noise acts


# Each kernel in two layouts, one of each function; each layout with and without pairs.
@pytest.mark.parametrize(
    ("kernel", "antithetic", "strategy"),
    [
        ("isotropic", False, "vmap"),
        ("isotropic", True, "unroll"),
        ("signs", True, 2),
        ("filterwise", True, "scan"),
        ("elementwise", False, 2),
        ("shared", True, "vmap"),
        ("masked", False, "unroll"),
        ("function", False, "scan"),
    ],
)
def test_gradient_of_smooth_is_smooth_value_and_grad(kernel, antithetic, strategy):
    params, batch = regression()  # its bias is zero
    num_samples = 3 if strategy == 2 else 2
    options = {"num_samples": num_samples, "antithetic": antithetic}
    smoothed = smooth(loss_fn, 0.1, KERNELS[kernel], strategy=strategy, **options)
    options["strategy"] = "scan" if strategy == "vmap" else "vmap"
    direct = smooth_value_and_grad(loss_fn, 0.1, KERNELS[kernel], **options)
    through = jax.value_and_grad(smoothed, argnums=1)
    both = jax.jit(lambda *args: (through(*args), direct(*args)))
    found, expected = both(jax.random.key(4), params, batch)
    assert_close(found, expected)
    plain = _plain(params, batch)
    difference = leaves_array(found[1]) - leaves_array(plain[1])
    assert np.abs(difference).max() > 1e-3  # the noise acts


def test_gradient_flows_to_the_scale(x64):
    def value(scale):
        smoothed = smooth(lambda t: jnp.sum(t**2), scale, antithetic=True)
        return smoothed(jax.random.key(0), np.ones(3))

    # value = |theta|^2 + scale^2 |U|^2, where |theta|^2 = 3
    found, gradient = jax.jit(jax.value_and_grad(value))(0.5)
    np.testing.assert_allclose(gradient, 2 * (found - 3) / 0.5, rtol=1e-6)


def test_chunks_are_strided():
    def value_fn(params, batch):
        return params.sum(), batch

    (_, chunks), _ = smooth_value_and_grad(
        value_fn, 0.0, num_samples=4, batch_argnames=("batch",), has_aux=True
    )(jax.random.key(0), jnp.ones(2), batch=jnp.arange(12))
    np.testing.assert_array_equal(chunks, np.arange(12).reshape(3, 4).T)


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", 2])
def test_what_is_split_and_what_goes_whole(strategy):
    seen = []

    def value_fn(params, *, batch, other):
        seen.append((batch, other))
        noise = jax.vmap(jax.random.normal)(batch["keys"]).sum()
        return params.sum() * noise + batch["inputs"].sum() * batch["weight"]

    batch = {
        "inputs": jnp.ones((8, 3)),
        "keys": jax.random.split(jax.random.key(0), 8),
        "none": None,
        "name": "digits",
        "weight": 2.0,
        "scalar": jnp.float32(1),
    }
    jax.eval_shape(
        lambda params: smooth_value_and_grad(
            value_fn, 0.1, num_samples=4, batch_argnames=("batch",), strategy=strategy
        )(jax.random.key(0), params, batch=batch, other=jnp.ones(8)),
        jnp.ones(2),
    )
    inner, other = seen[0]
    assert inner["inputs"].shape == (2, 3)
    assert inner["keys"].shape == (2,)
    assert inner["none"] is None
    assert inner["name"] == "digits"
    assert inner["weight"] == 2.0
    assert inner["scalar"].shape == ()
    assert other.shape == (8,)


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", 2])
def test_weighted_chunks_give_the_mean_over_tokens(strategy):
    params, batch = regression()
    count = np.random.default_rng(9).binomial(1, 0.6, 64).astype("f4")
    count[::4] = 0  # chunk 0 of 4 is empty: its mean is 0 / 0

    def token_mean(params, batch):
        hidden = jnp.tanh(batch["inputs"] @ params["first"]["kernel"])
        outputs = hidden @ params["second"]["kernel"]
        errors = ((outputs - batch["targets"]) ** 2).mean(axis=1)
        return (errors * batch["count"]).sum() / batch["count"].sum()

    batch["count"] = count
    f = smooth_value_and_grad(
        token_mean,
        0.0,
        num_samples=4,
        batch_argnames=("batch",),
        weight_fn=lambda chunk: chunk["count"].sum(),
        strategy=strategy,
    )
    result = jax.jit(f)(jax.random.key(0), params, batch=batch)
    assert_close(result, jax.jit(jax.value_and_grad(token_mean))(params, batch))


@pytest.mark.heart
def test_weight_fn_of_several_arguments_takes_a_dict():
    def value_fn(params, inputs, count):
        return (params * inputs).sum() / count.sum()

    f = smooth_value_and_grad(
        value_fn,
        0.0,
        num_samples=2,
        batch_argnames=("inputs", "count"),
        weight_fn=lambda chunk: chunk["count"].sum(),
    )
    inputs, count = jnp.arange(4.0), jnp.array([1.0, 5.0, 2.0, 0.0])
    value, grads = f(jax.random.key(0), jnp.float32(2), inputs=inputs, count=count)
    np.testing.assert_allclose(value, 2 * 6 / 8)
    np.testing.assert_allclose(grads, 6 / 8)


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", 2])
def test_sample_key_is_fresh_for_each_draw_and_shared_by_a_pair(strategy):
    def value_fn(params, sample_key):
        return params.sum(), jax.random.key_data(sample_key)

    (_, keys), _ = smooth_value_and_grad(
        value_fn,
        0.1,
        num_samples=3,
        antithetic=True,
        has_aux=True,
        strategy=strategy,
    )(jax.random.key(0), jnp.ones(2))
    keys = np.asarray(keys)
    np.testing.assert_array_equal(keys[:, 0], keys[:, 1])
    assert len(np.unique(keys[:, 0], axis=0)) == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_bad_sample_shows(strategy):
    params, batch = regression()
    f = jax.jit(
        smooth_value_and_grad(
            loss_fn, 0.1, num_samples=4, batch_argnames=("batch",), strategy=strategy
        )
    )
    for bad in (np.nan, np.inf):
        inputs = np.array(batch["inputs"])
        inputs[13, 2] = bad
        _, grads = f(jax.random.key(0), params, batch={**batch, "inputs": inputs})
        assert not np.isfinite(leaves_array(grads)).all()


def test_a_second_call_compiles_nothing():
    params, batch = regression()
    for name in ("filterwise", "signs", "shared"):
        f = smooth_value_and_grad(
            loss_fn, 0.1, KERNELS[name], num_samples=4, batch_argnames=("batch",)
        )
        f(jax.random.key(0), params, batch=batch)
        with count_compilations() as compiled:
            f(jax.random.key(1), params, batch=batch)
        assert not compiled, name
    smoothed = smooth(loss_fn, 0.1, num_samples=4)
    for _ in range(2):
        with count_compilations() as compiled:
            jax.grad(lambda p: smoothed(jax.random.key(0), p, batch))(params)
    assert not compiled
    jitted = jax.jit(f)
    jitted(jax.random.key(0), params, batch=batch)
    with count_compilations() as compiled:
        jitted(jax.random.key(1), params, batch=batch)
    assert not compiled


def test_auto_unrolls_only_convolutions_with_few_parameters_on_cpu():
    def dense(params):
        return jnp.sum(params**2)

    def convolve(params):
        images = jnp.ones((1, params.shape[1], 8, 8))
        return jax.lax.conv(images, params, (1, 1), "SAME").sum()

    def deep(params):
        images = jnp.ones((1, 1, 8, 8))
        for _ in range(6):  # each has three, with those of its backward pass
            kernel = params.transpose(2, 3, 0, 1)
            images = jax.lax.conv(images, kernel, (1, 1), "SAME")
        return images.sum()

    def loops(value_fn, params, num_samples=4, smoothing=smooth_value_and_grad):
        kernel = kernels.isotropic(jax.random.normal)  # ours draws in a loop of its own
        f = smoothing(value_fn, 0.1, kernel, num_samples=num_samples)
        return loops_on_cpu(f, jax.random.key(0), params)

    assert loops(dense, jnp.ones(3))
    few, many = jnp.ones((1, 1, 3, 3)), jnp.ones((512, 256, 3, 3))
    assert not loops(convolve, few)
    assert loops(convolve, few, num_samples=17)  # compile time has a limit
    assert loops(convolve, many)
    # Of many layers the compile time is not made up for in 500 steps.
    assert loops(deep, jnp.ones((3, 3, 1, 1)))
    # A loop of values may be differentiated later, where no convolution is rewritten.
    assert not loops(convolve, many, smoothing=smooth)


def loops_on_cpu(f, *args, **kwargs):
    """Whether what a trace holds for CPU has a loop."""
    jaxpr = jax.make_jaxpr(f)(*args, **kwargs).jaxpr
    return jaxprs.has_primitive(jaxpr, "scan", "cpu")


@pytest.mark.heart
@pytest.mark.parametrize("strategy", ["auto", "scan", "unroll", "vmap"])
def test_value_fn_is_traced_once(strategy):
    params, batch = regression()
    calls = []

    def counted(params, batch):
        calls.append(1)
        return loss_fn(params, batch)

    f = smooth_value_and_grad(
        counted, 0.1, num_samples=8, batch_argnames=("batch",), strategy=strategy
    )
    jax.jit(f).lower(jax.random.key(0), params, batch=batch)
    assert len(calls) == 1


@pytest.mark.parametrize("problem", ["mlp", "cnn", "resnet18"])
def test_auto_picks_what_the_benchmark_found_fastest_on_cpu(problem):
    from benchmarks.problems import make_problem

    path = pathlib.Path(__file__).parent.parent / "docs" / "results"
    report = json.loads((path / "benchmarks_cpu.json").read_text())
    rows = report["problems"][problem]["rows"]
    seconds = {
        strategy: rows[f"LPF-SGD signs, {strategy}"]["seconds"][1]
        for strategy in ("scan", "unroll", "vmap")
        if f"LPF-SGD signs, {strategy}" in rows
    }
    assert {"scan", "unroll"} <= set(seconds)
    losses = []

    def shapes():
        network = make_problem(problem, 8)
        losses.append(network.value_fn)
        return network.params, network.batch

    params, batch = jax.eval_shape(shapes)
    f = smooth_value_and_grad(
        losses[0],
        0.1,
        kernels.filterwise(jax.random.normal),
        num_samples=8,
        batch_argnames=("inputs", "labels"),
    )
    loops = loops_on_cpu(f, jax.random.key(0), params, **batch)
    picked = "scan" if loops else "unroll"
    assert picked == min(seconds, key=seconds.get)


# Memory


@pytest.mark.parametrize("strategy", ["scan", "unroll"])
def test_sequential_strategies_store_neither_noise_nor_gradients(strategy):
    size, num_samples = 1000, 8
    params = {"w": jax.ShapeDtypeStruct((size, size), "f4")}
    batch = jax.ShapeDtypeStruct((num_samples, size), "f4")

    def value_fn(params, batch):
        return jnp.mean(jnp.tanh(batch @ params["w"]) ** 2)

    f = smooth_value_and_grad(
        value_fn,
        0.1,
        num_samples=num_samples,
        batch_argnames=("batch",),
        strategy=strategy,
    )
    # XLA's concurrent scheduler on CPU would run unrolled samples all at once.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    compiled = (
        jax.jit(f, compiler_options=options)
        .lower(jax.random.key(0), params, batch=batch)
        .compile()
    )
    temporary = compiled.memory_analysis().temp_size_in_bytes / (4 * size * size)
    assert temporary < 2.2  # the perturbed parameters and a gradient


# Types of parameters


# Every dtype in a loop, whose state has one, and every layout with two of them.
@pytest.mark.parametrize(
    ("dtype", "strategy"),
    [
        ("bfloat16", "scan"),
        ("float16", "scan"),
        ("float32", "scan"),
        ("float64", "scan"),
        ("bfloat16", "vmap"),
        ("float64", "vmap"),
        ("float16", "unroll"),
        ("float64", "unroll"),
    ],
)
def test_dtypes_are_kept_and_accumulation_is_wide(dtype, strategy, x64):
    dtype = jnp.dtype(dtype)
    wide = jax.tree.map(lambda x: np.asarray(x, "f8"), regression())
    params, batch = jax.tree.map(lambda x: x.astype(dtype), wide)
    value, grads = jax.jit(
        smooth_value_and_grad(
            loss_fn, 0.01, num_samples=4, batch_argnames=("batch",), strategy=strategy
        )
    )(jax.random.key(0), params, batch=batch)
    assert value.dtype == dtype
    assert all(g.dtype == dtype for g in jax.tree.leaves(grads))
    wide = jax.tree.map(lambda x: x.astype("f8"), (params, batch))
    _, expected = _plain(*wide)
    tolerance = 0.05 + 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        leaves_array(grads), leaves_array(expected), atol=tolerance
    )


def test_many_small_gradients_are_not_lost_in_bfloat16():
    # The mean of 255 gradients of 1 and one of 0: a bfloat16 sum stops at 256.
    def value_fn(params, batch):
        return (params * batch).sum()

    batch = jnp.ones(512, jnp.bfloat16)
    _, grads = smooth_value_and_grad(
        value_fn, 0.0, num_samples=512, batch_argnames=("batch",), strategy="scan"
    )(jax.random.key(0), jnp.bfloat16(1), batch=batch)
    assert grads == 1


def test_trees_with_scalars_empty_leaves_and_none():
    params = {"a": 1.0, "b": jnp.zeros((0, 3)), "c": None, "d": [jnp.ones(2), ()]}

    def value_fn(params):
        return params["a"] ** 2 + params["b"].sum() + params["d"][0].sum()

    for kernel in (kernels.isotropic(), kernels.filterwise()):
        value, grads = smooth_value_and_grad(value_fn, 0.1, kernel, antithetic=True)(
            jax.random.key(0), params
        )
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        np.testing.assert_allclose(grads["a"], 2.0, rtol=1e-5)
        assert value > 3.0


def test_empty_params_need_no_noise():
    value, grads = smooth_value_and_grad(lambda params: jnp.float32(2), 0.1)(
        jax.random.key(0), {}
    )
    assert (value, grads) == (2, {})


def test_raw_keys_and_other_generators_work():
    params, batch = regression()
    for key in (jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        value, _ = flatopt.smooth_value_and_grad(loss_fn, 0.1, num_samples=2)(
            key, params, batch
        )
        assert jnp.isfinite(value)


def _layered(num_layers, width, batch):
    keys = jax.random.split(jax.random.key(41), 2)
    params = jax.random.normal(keys[0], (num_layers, width, width)) / width**0.5
    return params, jax.random.normal(keys[1], (batch, width))


def _scanned_loss(params, inputs):
    hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) + h, None), inputs, params)
    return jnp.mean(hidden**2)


def _unrolled_loss(params, inputs):
    for weights in params:
        inputs = jnp.tanh(inputs @ weights) + inputs
    return jnp.mean(inputs**2)


@pytest.mark.heart
def test_a_pair_of_scanned_layers_keeps_the_activations_of_one():
    params, inputs = _layered(12, 16, 1024)

    def temporaries(function, *args):
        compiled = jax.jit(function).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = temporaries(jax.value_and_grad(_scanned_loss), params, inputs)
    pair = flatopt.smooth_value_and_grad(_scanned_loss, 0.1, antithetic=True)
    assert temporaries(pair, jax.random.key(0), params, inputs) <= 1.2 * plain


@pytest.mark.parametrize(("num_samples", "has_aux"), [(1, True), (3, False), (3, True)])
def test_a_pair_in_a_loop_has_the_values_of_a_pair_side_by_side(num_samples, has_aux):
    params, inputs = _layered(3, 4, 5)
    found = []
    for loss in (_scanned_loss, _unrolled_loss):

        def loss_fn(params, inputs, loss=loss):
            value = loss(params, inputs)
            return (value, {"loss": value}) if has_aux else value

        function = flatopt.smooth_value_and_grad(
            loss_fn, 0.1, antithetic=True, num_samples=num_samples, has_aux=has_aux
        )
        found.append(jax.jit(function)(jax.random.key(3), params, inputs))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6), *found
    )
    if has_aux:
        assert found[0][0][1]["loss"].shape == (num_samples, 2)
