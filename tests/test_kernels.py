"""Noise: moments, filters, keys, masks."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import regression

from flatopt import curvature, kernels, sharpness
from flatopt._core import binding, random, trees

SAMPLERS = [
    kernels.normal,
    jax.random.normal,
    kernels.signs,
    kernels.uniform,
    kernels.irwin_hall,
    kernels.laplace,
]
FOURTH_MOMENTS = {
    "normal": 3.0,
    "signs": 1.0,
    "uniform": 9 / 5,
    "irwin_hall": 3 - 6 / 5 / 4,  # a fourth of the excess of one uniform variable
    "laplace": 6.0,
}


@pytest.mark.heart
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_have_mean_zero_variance_one_and_their_own_fourth_moment(sampler):
    values = np.asarray(sampler(jax.random.key(0), (400, 500), jnp.float32), "f8")
    count = values.size
    fourth = FOURTH_MOMENTS[sampler.__name__]
    assert abs(values.mean()) < 5 / np.sqrt(count)
    assert (
        abs((values**2).mean() - 1) < 5 * np.sqrt(max(fourth - 1, 1e-9) / count) + 1e-6
    )
    eighth = (values**8).mean()
    assert abs((values**4).mean() - fourth) < 5 * np.sqrt(eighth / count) + 1e-6


@pytest.mark.parametrize("shape", [(), (1,), (0,), (31,), (33, 65), (3, 3, 4, 8)])
def test_signs_have_the_shape_and_only_two_values(shape):
    values = kernels.signs(jax.random.key(1), shape)
    assert values.shape == shape
    assert set(np.unique(values)) <= {-1.0, 1.0}


def test_signs_are_independent_between_neighbours_and_rows():
    values = np.asarray(kernels.signs(jax.random.key(2), (4000, 64)), "f8")
    correlation = values.T @ values / len(values) - np.eye(64)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(len(values))


@pytest.mark.parametrize(
    "shape", [(64, 256), (4096,), (6, 1024), (96, 130), (3, 64, 17)]
)
@pytest.mark.parametrize("jit", [False, True])
def test_signs_are_the_bits_of_few_random_words(shape, jit):
    packed = {(6, 1024): 1, (3, 64, 17): 1}.get(shape, 0)
    words_shape = list(shape)
    words_shape[packed] //= 32
    words = np.asarray(jax.random.bits(jax.random.key(0), words_shape, jnp.uint32))
    bits = np.stack([(words >> j) & 1 for j in range(32)], axis=packed + 1)
    expected = 1.0 - 2.0 * bits.reshape(shape)
    draw = jax.jit(kernels.signs, static_argnums=1) if jit else kernels.signs
    np.testing.assert_array_equal(draw(jax.random.key(0), shape), expected)


def test_small_leaves_drawn_together_get_the_noise_of_each_alone():
    params = {name: jnp.ones(n) for name, n in [("a", 3), ("b", 40), ("c", 2049)]}
    params["scalar"] = jnp.float32(1)
    for sampler in SAMPLERS:
        kernel = kernels.isotropic(sampler)
        together = kernel(jax.random.key(0), params)
        for name, leaf in params.items():
            alone = kernel(jax.random.key(0), {name: leaf})[name]
            np.testing.assert_array_equal(together[name], alone)


@pytest.mark.parametrize("shape", [(), (0, 2), (7,), (3, 5, 2)])
@pytest.mark.parametrize("jit", [False, True])
def test_normal_values_are_those_of_jax_up_to_rounding(shape, jit):
    draw = jax.jit(kernels.normal, static_argnums=1) if jit else kernels.normal
    for key in (
        jax.random.key(3),
        jax.random.PRNGKey(4),
        jax.random.key(5, impl="rbg"),
    ):
        expected = jax.random.normal(key, shape)
        np.testing.assert_allclose(draw(key, shape), expected, rtol=1e-5)
    keys = jax.random.split(jax.random.key(6), 4)
    stacked = jax.vmap(lambda k: kernels.normal(k, shape))(keys)
    np.testing.assert_array_equal(stacked[2], kernels.normal(keys[2], shape))


@pytest.mark.heart
def test_every_normal_value_is_the_exact_quantile_to_1e_5():
    """All 2^23 of them, against float64: a relative error of at most 2e-6."""
    words = jnp.arange(2**23, dtype=jnp.uint32) << 9
    places = np.asarray(random._open_interval(words), "f8")
    expected = np.sqrt(2) * scipy.special.erfinv(places)
    found = np.asarray(jax.jit(random.to_normal)(words), "f8")
    errors = np.abs(found - expected)
    assert (errors <= 2e-6 * np.abs(expected)).all()
    assert errors.max() <= 1e-5
    assert (np.diff(found) >= -1e-5).all()  # and they grow, up to errors


def test_irwin_hall_values_are_sums_of_the_bytes_of_words():
    words = np.array([0, 0xFFFFFFFF, 0x01020304, 0x80FF0010], "u4")
    sums = words.view("u1").reshape(-1, 4).astype(int).sum(axis=1)
    assert list(sums) == [0, 1020, 10, 0x80 + 0xFF + 0x10]
    deviation = np.sqrt(4 * np.var(np.arange(256)))
    expected = (sums - 510) / deviation
    found = random.to_irwin_hall(jnp.asarray(words))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(expected).max() < 3.47


def test_normal_needs_no_temporary_memory():
    compiled = jax.jit(lambda k: kernels.normal(k, (512, 512))).lower(jax.random.key(0))
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 4096


def _elementwise_std(kernel, params, draws=4000):
    keys = jax.random.split(jax.random.key(3), draws)
    noise = jax.jit(jax.vmap(kernel, (0, None)))(keys, params)
    return jax.tree.map(lambda u: np.asarray(u, "f8").std(axis=0), noise)


def _shapes():
    rng = np.random.default_rng(4)
    shapes = {"conv": (3, 3, 4, 8), "matrix": (6, 5), "bias": (7,), "scalar": ()}
    return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("filter_axes", [None, 0])
def test_filterwise_deviation_is_the_filter_norm(filter_axes):
    params = _shapes()
    kernel = kernels.filterwise(kernels.signs, filter_axes=filter_axes)
    noise = jax.jit(kernel)(jax.random.key(3), params)
    for name, leaf in params.items():
        leaf = np.asarray(leaf, "f8")
        axis = leaf.ndim - 1 if filter_axes is None else 0
        others = tuple(a for a in range(leaf.ndim) if a != axis or leaf.ndim < 2)
        norm = np.sqrt((leaf**2).sum(axis=others, keepdims=True))
        np.testing.assert_allclose(np.abs(noise[name]) / norm, 1.0, rtol=1e-5)


def test_filterwise_normalizes_embeddings_by_row():
    table = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    noise = kernels.filterwise(kernels.signs)(jax.random.key(0), {"embedding": table})
    np.testing.assert_allclose(jnp.abs(noise["embedding"]), [[1] * 3, [2] * 3, [3] * 3])


@pytest.mark.heart
@pytest.mark.parametrize(
    "filter_axes",
    [
        {"a": 0, "b": (0, 1)},
        lambda path, leaf: {"a": 0, "b": (0, 1)}[path],
    ],
)
def test_filter_axes_as_tree_and_as_function(filter_axes):
    params = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([[1.0, -2.0]])}
    kernel = kernels.filterwise(kernels.signs, filter_axes=filter_axes)
    noise = kernel(jax.random.key(0), params)
    np.testing.assert_allclose(jnp.abs(noise["a"]), [[5.0, 5.0]])
    np.testing.assert_allclose(jnp.abs(noise["b"]), [[1.0, 2.0]])


def test_empty_filter_axes_make_the_leaf_one_filter():
    kernel = kernels.filterwise(kernels.signs, filter_axes=())
    noise = kernel(jax.random.key(0), jnp.full((2, 2), 2.0))
    np.testing.assert_allclose(jnp.abs(noise), np.full((2, 2), 4.0))


def test_elementwise_std_is_the_magnitude():
    params = _shapes()
    std = _elementwise_std(kernels.elementwise(), params)
    for name, leaf in params.items():
        ratio = std[name] / np.abs(np.asarray(leaf))
        np.testing.assert_allclose(ratio, 1.0, atol=6 / np.sqrt(2 * 4000))


@pytest.mark.parametrize(
    "mask", [{"a": True, "b": False}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)]
)
def test_masked_kernel_is_zero_where_false(mask):
    params = {"a": jnp.ones((2, 2)), "b": {"c": jnp.ones(3), "d": jnp.ones(1)}}
    noise = kernels.masked(kernels.isotropic(), mask)(jax.random.key(0), params)
    assert jnp.all(noise["a"] != 0)
    assert not any(jnp.any(x != 0) for x in jax.tree.leaves(noise["b"]))


def test_noise_of_a_leaf_depends_on_its_path_alone():
    params, _ = regression()
    kernel = kernels.isotropic()
    whole = kernel(jax.random.key(5), params)
    alone = kernel(jax.random.key(5), {"second": {"bias": params["second"]["bias"]}})
    np.testing.assert_array_equal(whole["second"]["bias"], alone["second"]["bias"])
    same_shape = {"x": jnp.zeros(1000), "y": jnp.zeros(1000)}
    noise = kernel(jax.random.key(5), same_shape)
    assert abs(np.corrcoef(noise["x"], noise["y"])[0, 1]) < 0.2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_noise_is_float32_and_not_clipped_for_narrow_parameters(dtype):
    noise = kernels.isotropic()(jax.random.key(0), jnp.zeros(200_000, dtype))
    assert noise.dtype == jnp.float32
    assert jnp.abs(noise).max() > 4  # a bfloat16 draw is clipped at 2.9


KEY = jax.random.key(0)
SHARED_PATH = {"a/b": jnp.ones((2, 3)), "a": {"b": jnp.ones((2, 3))}, "c": jnp.ones(2)}
KERNELS_OF_PATHS = {
    "isotropic": kernels.isotropic(),
    "signs": kernels.isotropic(kernels.signs),
    "filterwise": kernels.filterwise(),
    "filterwise of given axes": kernels.filterwise(filter_axes=0),
    "elementwise": kernels.elementwise(),
    "relative_to_max": kernels.relative_to_max(),
    "rounding": kernels.rounding(3),
    "polynomial": kernels.polynomial((0.1, 0.2)),
    "shared_magnitude": kernels.shared_magnitude(lambda key, params: params),
    "one_layer": kernels.one_layer(kernels.isotropic()),
    "masked": kernels.masked(lambda key, params: params, "c"),
}


@pytest.mark.heart
@pytest.mark.parametrize("name", KERNELS_OF_PATHS)
@pytest.mark.parametrize("jit", [False, True])
def test_two_leaves_of_one_path_are_refused_and_not_given_one_noise(name, jit):
    draw = jax.jit(KERNELS_OF_PATHS[name]) if jit else KERNELS_OF_PATHS[name]
    message = (
        "params must have a path of its own for each leaf, got 'a/b' twice; rename"
    )
    with pytest.raises(ValueError, match=message) as error:
        draw(KEY, SHARED_PATH)
    assert "\n" not in str(error.value)


def test_one_path_by_lists_tables_of_axes_and_norms_is_refused_too():
    with pytest.raises(ValueError, match="got 'a/0' twice"):
        kernels.isotropic()(KEY, {"a": [jnp.ones(2)], "a/0": jnp.ones(2)})
    axes = {"a/b": 0, "a": {"b": 1}}
    with pytest.raises(ValueError, match="filter_axes must have a path of its own"):
        kernels.filterwise(filter_axes=axes)(KEY, {"a": {"b": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match="got 'a/b' twice"):
        sharpness.round_filters(SHARED_PATH, 3)
    operator = curvature.hessian(
        lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)), SHARED_PATH
    )
    with pytest.raises(ValueError, match="got 'a/b' twice"):
        curvature.probe(operator, KEY)
    with pytest.raises(ValueError, match="got 'a/b' twice"):
        curvature.hessian(lambda p: 0.0, SHARED_PATH, mask="a/b")


def test_a_slash_in_a_key_alone_changes_no_noise():
    """The noise of the names that other libraries give to modules stays what it was."""
    nested = kernels.isotropic()(KEY, {"a": {"b": jnp.ones(3)}})["a"]["b"]
    flat = kernels.isotropic()(KEY, {"a/b": jnp.ones(3)})["a/b"]
    words = np.frombuffer(hashlib.blake2b(b"a/b", digest_size=8).digest(), "<u4")
    key = jax.random.fold_in(jax.random.fold_in(KEY, words[0]), words[1])
    for found in (nested, flat):
        np.testing.assert_allclose(found, jax.random.normal(key, 3), rtol=1e-5)


def test_noise_is_constant_with_respect_to_params():
    kernel = kernels.filterwise()

    def total(params):
        return binding.bind(kernel, jax.random.key(0), params)(jax.random.key(1)).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones((2, 2))), np.zeros((2, 2)))


@pytest.mark.heart
def test_attribute_value_at_the_end_of_a_path_is_dropped():
    get = jax.tree_util.GetAttrKey
    key = jax.tree_util.DictKey
    assert trees.path_name((key("a"), get("value"))) == "a"
    assert trees.path_name((key("a"), key("value"))) == "a/value"
    assert trees.path_name(()) == ""


def test_fold_in_is_that_of_jax():
    for key in (
        jax.random.key(3),
        jax.random.PRNGKey(3),
        jax.random.key(3, impl="rbg"),
    ):
        for word in (0, 1, 12345, 2**31 - 1):
            ours, theirs = random.fold_in(key, word), jax.random.fold_in(key, word)
            assert ours.dtype == theirs.dtype
            ours, theirs = (jax.random.normal(k, (3,)) for k in (ours, theirs))
            np.testing.assert_array_equal(ours, theirs)


# Shared magnitudes


def test_shared_magnitude_draws_are_marginally_those_of_the_kernel():
    params = {"w": jnp.ones((40, 50))}
    kernel = kernels.shared_magnitude(kernels.isotropic())
    step_keys = jax.random.split(jax.random.key(0), 200)

    def draws(step_key):
        draw = kernel.bind(step_key, params)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, jnp.arange(3))
        return jax.vmap(draw)(keys)["w"]

    values = np.asarray(
        jax.jit(jax.vmap(draws))(step_keys), "f8"
    )  # steps, samples, ...
    size = values[:, 0].size
    for sample in range(3):
        flat = values[:, sample].ravel()
        for power, moment, eighth in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105)):
            error = 5 * np.sqrt(eighth / size)
            assert abs((flat**power).mean() - moment) < error
        # Kolmogorov-Smirnov distance to the standard normal distribution.
        ordered = np.sort(flat)
        uniform = np.asarray(jax.scipy.stats.norm.cdf(ordered), "f8")
        distance = np.abs(uniform - (np.arange(size) + 0.5) / size).max()
        assert distance < 1.95 / np.sqrt(size)  # exceeded once in a thousand


def test_shared_magnitude_samples_are_uncorrelated_and_fresh_each_step():
    params = {"w": jnp.ones((40, 50))}
    kernel = kernels.shared_magnitude(kernels.isotropic())
    first = kernel.bind(jax.random.key(0), params)
    second = kernel.bind(jax.random.key(1), params)
    a, b = (np.asarray(first(jax.random.key(k))["w"], "f8").ravel() for k in (2, 3))
    c = np.asarray(second(jax.random.key(2))["w"], "f8").ravel()
    np.testing.assert_array_equal(np.abs(a), np.abs(b))
    assert np.abs(np.abs(a) - np.abs(c)).max() > 1
    # The product of two samples has variance E[u^4] = 3.
    assert abs((a * b).mean()) < 5 * np.sqrt(3 / a.size)
    neighbours = (a[:-1] * b[1:]).mean()
    assert abs(neighbours) < 5 / np.sqrt(a.size)


def test_one_layer_draws_layers_evenly_and_keeps_their_noise():
    params = {
        "a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "b": {"kernel": jnp.ones((3, 2))},
        "c": jnp.ones(4),
    }
    inner = kernels.isotropic()
    kernel = kernels.one_layer(inner)
    keys = jax.random.split(jax.random.key(0), 900)
    draw = jax.jit(jax.vmap(lambda key: (kernel(key, params), inner(key, params))))
    noise, whole = jax.device_get(draw(keys))
    active = jax.tree.map(lambda x: (x != 0).reshape(900, -1).all(axis=1), noise)
    np.testing.assert_array_equal(active["a"]["kernel"], active["a"]["bias"])
    counts = [active["a"]["kernel"], active["b"]["kernel"], active["c"]]
    assert sum(c.astype(int) for c in counts).tolist() == [1] * 900
    for count in counts:
        assert abs(int(count.sum()) - 300) < 5 * np.sqrt(900 * 2 / 9)
    for drawn, full in zip(jax.tree.leaves(noise), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(drawn, np.where(drawn == 0, 0, full))


def test_one_layer_takes_the_users_layers():
    params = {"enc_w": jnp.ones(3), "enc_b": jnp.ones(2), "dec_w": jnp.ones(3)}
    kernel = kernels.one_layer(kernels.isotropic(), lambda path: path.split("_")[0])
    for seed in range(6):
        noise = kernel(jax.random.key(seed), params)
        moved = {name for name, leaf in noise.items() if (leaf != 0).all()}
        assert moved in ({"enc_w", "enc_b"}, {"dec_w"})


# Filters told by names and shapes


def _linen_attention(use_bias):
    from flax import linen

    model = linen.MultiHeadDotProductAttention(4, use_bias=use_bias)
    params = model.init(jax.random.key(0), jnp.ones((2, 3, 16)))["params"]
    # Biases start at zero, where every convention gives the same noise.
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: p + np.float32(0.1 * rng.normal(size=p.shape)), params
    )


@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_has_one_filter_for_each_output(use_bias):
    params = _linen_attention(use_bias)
    noise = jax.jit(kernels.filterwise(kernels.signs))(jax.random.key(1), params)
    for name in ("query", "key", "value"):
        kernel = np.asarray(params[name]["kernel"])  # (in, heads, head features)
        expected = np.broadcast_to(np.linalg.norm(kernel, axis=0), kernel.shape)
        np.testing.assert_allclose(np.abs(noise[name]["kernel"]), expected, rtol=1e-5)
        if use_bias:
            whole = np.linalg.norm(params[name]["bias"])
            np.testing.assert_allclose(np.abs(noise[name]["bias"]), whole, rtol=1e-5)
    kernel = np.asarray(params["out"]["kernel"])  # (heads, head features, out)
    expected = np.sqrt((kernel**2).sum(axis=(0, 1)))
    expected = np.broadcast_to(expected, kernel.shape)
    np.testing.assert_allclose(np.abs(noise["out"]["kernel"]), expected, rtol=1e-5)


def test_stacked_layers_have_filters_of_their_own():
    params = {
        "dense": {"kernel": (3, 4, 5), "bias": (3, 5)},
        "conv": {"kernel": (3, 2, 2, 4, 5), "bias": (3, 5)},
        "norm": {"scale": (3, 5), "bias": (3, 5)},
        "plain": {"kernel": (2, 4, 5), "bias": (5,)},
    }
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: np.float32(rng.normal(size=shape)),
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    draw = jax.jit(kernels.filterwise(kernels.signs))
    together = jax.device_get(draw(jax.random.key(0), params))
    for layer in ("dense", "conv", "norm"):
        for i in range(3):
            one = {layer: jax.tree.map(lambda x, i=i: x[i], params[layer])}
            alone = draw(jax.random.key(0), one)
            for name, leaf in alone[layer].items():
                np.testing.assert_allclose(
                    np.abs(together[layer][name][i]), np.abs(leaf), rtol=1e-5
                )
    last = np.sqrt((np.asarray(params["plain"]["kernel"]) ** 2).sum(axis=(0, 1)))
    found = np.abs(together["plain"]["kernel"])
    np.testing.assert_allclose(found, np.broadcast_to(last, found.shape), rtol=1e-5)


def test_a_layer_that_can_be_read_in_two_ways_needs_filter_axes():
    params = {"mix": {"kernel": jnp.ones((4, 4, 5)), "bias": jnp.ones((4, 5))}}
    with pytest.raises(ValueError, match="filter_axes is needed for the layer 'mix'"):
        kernels.filterwise()(jax.random.key(0), params)
    noise = kernels.filterwise(filter_axes=-1)(jax.random.key(0), params)
    assert noise["mix"]["kernel"].shape == (4, 4, 5)
    query = {"query": params["mix"]}
    found = kernels.filterwise(kernels.signs)(jax.random.key(0), query)
    np.testing.assert_allclose(np.abs(found["query"]["kernel"]), 2.0, rtol=1e-6)


FILTERWISE = kernels.filterwise(kernels.signs)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-18, 1e18, 1e25, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_of_filters_of_any_size(size, dtype):
    rows = np.array([[3.0, 0.0, 1e-3], [4.0, 0.0, 1e3], [12.0, 0.0, 2.0]])
    params = {"w": jnp.asarray(size * rows, dtype), "b": jnp.zeros(2, dtype)}
    rounded = np.asarray(params["w"], "f8") / size
    expected = np.linalg.norm(rounded, axis=0)
    for draw in (FILTERWISE, jax.jit(FILTERWISE)):
        noise = draw(jax.random.key(0), params)
        for row in np.abs(np.asarray(noise["w"], "f8")):
            np.testing.assert_allclose(row / size, expected, rtol=1e-6)
        np.testing.assert_array_equal(noise["b"], 0)


# Number formats and hardware


def _rounded(leaf, bits, axis):
    """A matrix in NumPy, rounded to signed symmetric integers, with a step a channel."""
    others = tuple(a for a in range(leaf.ndim) if a != axis)
    top = np.abs(leaf).max(axis=others, keepdims=True)
    step = 2 * top / (2**bits - 2)
    return np.round(leaf / step) * step, step


@pytest.mark.heart
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_noise_is_that_of_the_rounding_error(bits, axis):
    leaf = (
        jax.random.normal(jax.random.key(31), (300, 300)) * jnp.arange(1.0, 301.0)[None]
    )
    exact = np.asarray(leaf, "f8")
    rounded, step = _rounded(exact, bits, axis)
    noise = kernels.rounding(bits, axis)(jax.random.key(0), {"w": leaf})["w"]
    noise = np.asarray(noise, "f8") / step
    error = (rounded - exact) / step
    assert np.abs(error).max() <= 0.5 + 1e-9
    assert 0.499 < np.abs(noise).max() <= 0.5 + 1e-6
    assert abs(noise.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / noise.size)
    if bits == 8:  # a fine grid: the true errors are uniform too, but for the maxima
        np.testing.assert_allclose(error.var(), noise.var(), rtol=0.02)


@pytest.mark.parametrize("filter_axes", [None, 0, ()])
@pytest.mark.parametrize("name", ["relative_to_max", "polynomial"])
def test_hardware_noise_has_the_deviation_of_its_formula(name, filter_axes):
    params, coefficients = _shapes(), (0.5, 2.0, jnp.array(-1.0))
    kernel = {
        "relative_to_max": kernels.relative_to_max(filter_axes, kernels.signs),
        "polynomial": kernels.polynomial(coefficients, filter_axes, kernels.signs),
    }[name]
    noise = jax.jit(kernel)(jax.random.key(0), params)
    for path, leaf in params.items():
        leaf = np.asarray(leaf, "f8")
        kept = {None: leaf.ndim - 1, 0: 0, (): None}[filter_axes]
        others = tuple(a for a in range(leaf.ndim) if a != kept or leaf.ndim < 2)
        top = np.abs(leaf).max(axis=others, keepdims=True)
        share, (a, b, c) = np.abs(leaf) / top, coefficients
        factor = 1 if name == "relative_to_max" else a + b * share + c * share**2
        expected = np.broadcast_to(np.abs(factor * top), leaf.shape)
        np.testing.assert_allclose(np.abs(noise[path]), expected, rtol=1e-5)


def test_hardware_noise_of_nothing_but_zeros_is_zero():
    params = {"zeros": jnp.zeros((3, 2)), "empty": jnp.zeros((0, 2)), "bias": 0.0}
    for kernel in (
        kernels.relative_to_max(),
        kernels.rounding(4),
        kernels.polynomial((0.5, 0.1)),
    ):
        noise = jax.jit(kernel)(jax.random.key(0), params)
        assert jax.tree.map(jnp.shape, noise) == jax.tree.map(jnp.shape, params)
        assert not any(leaf.any() for leaf in jax.tree.leaves(noise))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hardware_noise_of_narrow_weights_is_float32_and_of_the_same_size(dtype):
    params = {"w": jax.random.normal(jax.random.key(5), (40, 3), dtype)}
    wide = {"w": params["w"].astype(jnp.float32)}
    for kernel in (
        kernels.relative_to_max(),
        kernels.rounding(4),
        kernels.polynomial((0.5, 0.1)),
    ):
        noise = kernel(jax.random.key(0), params)["w"]
        assert noise.dtype == jnp.float32
        np.testing.assert_array_equal(noise, kernel(jax.random.key(0), wide)["w"])


@pytest.mark.parametrize("bits", [1, 0, -3, 4.0, True, "4", None, 65])
def test_bits_that_make_no_format_are_refused(bits):
    with pytest.raises(ValueError, match="^bits must be an int from 2 to 64, got .*;"):
        kernels.rounding(bits)


@pytest.mark.parametrize(
    ("coefficients", "error", "match"),
    [
        (0.5, TypeError, "coefficients must be a tuple of numbers, got 0.5; write"),
        ((), TypeError, "coefficients must be a tuple of numbers, got"),
        (("a",), TypeError, "coefficients must be a number or a scalar array, got 'a'"),
        ((jnp.nan,), ValueError, "coefficients must be finite"),
        (
            (True,),
            TypeError,
            "coefficients must be a number or a scalar array, got True",
        ),
        ((0.1, -jnp.inf), ValueError, "coefficients must be finite"),
    ],
)
def test_wrong_coefficients_are_refused(coefficients, error, match):
    with pytest.raises(error, match=match):
        kernels.polynomial(coefficients)
