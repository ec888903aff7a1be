"""What a network keeps under noise and rounding, against closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from flatopt import kernels, sharpness

KEY = jax.random.key(0)
NORMAL, SIGNS = kernels.isotropic(), kernels.isotropic(kernels.signs)
MARGINS = jnp.array([0.5, 1.0, 2.0])


def share_positive(params):
    """The accuracy of examples whose margins are the parameters."""
    return jnp.mean(params > 0)


def square(params, batch):
    return jnp.mean(batch) * jnp.sum(params**2)


def test_accuracy_falls_as_the_normal_distribution_says():
    scales = np.array([0.0, 0.5, 2.0])
    found = sharpness.perturbed_accuracy(
        share_positive, MARGINS, KEY, NORMAL, scales, num_samples=2000
    )
    assert found.value.shape == found.standard_error.shape == (3,)
    assert (float(found.value[0]), float(found.standard_error[0])) == (1.0, 0.0)
    for index in (1, 2):
        kept = scipy.stats.norm.cdf(np.asarray(MARGINS) / scales[index])
        error = np.sqrt(np.sum(kept * (1 - kept)) / 2000) / 3
        np.testing.assert_allclose(found.standard_error[index], error, rtol=0.1)
        assert abs(found.value[index] - kept.mean()) < 4 * error


@pytest.mark.heart
@pytest.mark.parametrize("split", [False, True], ids=["batch", "stream"])
def test_a_square_grows_by_its_trace_on_batch_and_stream(split):
    batch = jnp.array([1.0, 2.0, 6.0])
    found = sharpness.perturbed_accuracy(
        square,
        jnp.zeros(4),
        KEY,
        SIGNS,
        [0.0, 1.0, 3.0],
        num_samples=4,
        data=[batch[:1], batch[1:]] if split else batch,
    )
    np.testing.assert_allclose(found.value, 3 * 4 * np.array([0.0, 1, 9]), rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-5)


def test_scales_see_the_same_draws_and_a_number_is_a_scale():
    def linear(params):
        return jnp.sum(params)

    arguments = linear, jnp.zeros(3, jnp.bfloat16), KEY, NORMAL
    curve = sharpness.perturbed_accuracy(*arguments, [0.5, 1.0], num_samples=8)
    np.testing.assert_allclose(2 * curve.value[0], curve.value[1], rtol=1e-6)
    one = sharpness.perturbed_accuracy(*arguments, 1.0, num_samples=8)
    assert one.value.shape == ()
    np.testing.assert_allclose(one.value, curve.value[1], rtol=1e-6)
    traced = jax.jit(
        jax.vmap(
            lambda p: sharpness.perturbed_accuracy(
                linear, p, KEY, NORMAL, [0.5, 1.0], num_samples=8
            )
        )
    )(jnp.stack([jnp.zeros(3), jnp.ones(3)]))
    expected = np.asarray(curve.value) + np.array([[0.0], [3.0]])
    np.testing.assert_allclose(traced.value, expected, rtol=1e-5)


def test_what_is_no_scale_kernel_or_metric_is_one_sentence():
    def run(metric_fn=share_positive, kernel=NORMAL, scales=(0.1,), key=KEY):
        sharpness.perturbed_accuracy(metric_fn, MARGINS, key, kernel, scales)

    for scales in ([-0.1], [np.nan, 1.0], np.inf):
        with pytest.raises(ValueError, match="scales must be finite and >= 0, got"):
            run(scales=scales)
    for scales in ([], [[0.1]]):
        with pytest.raises(ValueError, match="one number or a sequence, got shape"):
            run(scales=scales)
    with pytest.raises(TypeError, match="scales must be numbers, got 'large'"):
        run(scales="large")
    with pytest.raises(TypeError, match="key must be one JAX random key, got"):
        run(key=0)
    with pytest.raises(TypeError, match="kernel"):
        run(kernel=kernels.isotropic)
    with pytest.raises(TypeError, match="metric_fn must return a real scalar, got"):
        run(lambda params: params > 0)
    with pytest.raises(TypeError, match="metric_fn must take 1 argument, got"):
        run(lambda params, batch: 0.5)
    with pytest.raises(ValueError, match="not a number, from scale 100 on"):
        run(lambda p: jnp.mean(jnp.log(p + 99)), scales=[0.1, 100.0, 1e4])


def rounded_in_numpy(kernel, bits, axis):
    """One output channel after the other."""
    channels = np.moveaxis(np.asarray(kernel, "f8"), axis, 0).copy()
    for channel in channels:
        step = np.abs(channel).max() / (2 ** (bits - 1) - 1)
        channel[...] = np.rint(channel / step) * step if step else channel
    return np.moveaxis(channels, 0, axis)


@pytest.mark.heart
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_is_that_of_each_channel(bits):
    rng = np.random.default_rng(0)
    params = {
        "conv": {
            "kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32),
            "bias": jnp.full(4, 0.123),
        },
        "embed": {"embedding": jnp.asarray(rng.normal(size=(5, 6)), jnp.bfloat16)},
        "dead": {"kernel": jnp.zeros((3, 2))},
        # Attention: its biases have two axes.
        "query": {
            "kernel": jnp.asarray(rng.normal(size=(6, 2, 3)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        },
    }
    found = sharpness.round_filters(params, bits)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(
        lambda x: x.dtype, params
    )
    expected = rounded_in_numpy(params["conv"]["kernel"], bits, -1)
    np.testing.assert_allclose(found["conv"]["kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(found["conv"]["bias"], params["conv"]["bias"])
    np.testing.assert_array_equal(found["dead"]["kernel"], 0)
    query = np.asarray(params["query"]["kernel"]).reshape(6, 6)
    np.testing.assert_allclose(
        found["query"]["kernel"].reshape(6, 6),
        rounded_in_numpy(query, bits, -1),
        atol=1e-6,
    )
    np.testing.assert_array_equal(found["query"]["bias"], params["query"]["bias"])
    embedding = params["embed"]["embedding"]
    expected = rounded_in_numpy(embedding, bits, 0)
    np.testing.assert_allclose(
        np.asarray(found["embed"]["embedding"], "f8"), expected, rtol=2**-8
    )
    values = np.unique(np.round(np.asarray(found["conv"]["kernel"])[..., 0], 5))
    assert len(values) <= 2**bits - 1
    rows = sharpness.round_filters(params, bits, filter_axes=0)["conv"]["kernel"]
    expected = rounded_in_numpy(params["conv"]["kernel"], bits, 0)
    np.testing.assert_allclose(rows, expected, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 0, 2.5, True, None])
def test_bits_that_are_none_are_one_sentence(bits):
    with pytest.raises(ValueError, match="bits must be an int of at least 2, got"):
        sharpness.round_filters({"kernel": jnp.ones((2, 2))}, bits)
