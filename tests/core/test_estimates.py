"""Estimates: mean, standard error, and how they print."""

import jax.numpy as jnp
import numpy as np
import pytest

from flatopt.curvature import Estimate


@pytest.mark.heart
def test_of_is_mean_and_standard_error():
    samples = np.array([[1.0, 2.0], [3.0, 8.0], [4.0, 5.0]])
    estimate = Estimate.of(samples)
    np.testing.assert_allclose(estimate.value, samples.mean(axis=0), rtol=1e-6)
    error = samples.std(axis=0, ddof=1) / 3**0.5
    np.testing.assert_allclose(estimate.standard_error, error, rtol=1e-6)
    assert estimate.num_probes == 3


def test_one_sample_has_an_infinite_error():
    estimate = Estimate.of(jnp.array([2.0]))
    assert float(estimate.value) == 2
    assert np.isinf(estimate.standard_error)
    with pytest.raises(ValueError, match="at least one value, got none"):
        Estimate.of(jnp.zeros(0))


@pytest.mark.heart
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (2.0345, 0.1149, "2.03 ± 0.11"),
        (1234.5, 25.0, "1234 ± 25"),
        (1234.5, 250.0, "1234 ± 250"),
        (3e-9, 2e-10, "3e-09 ± 2e-10"),
        (0.25, 0.0, "0.25 ± 0"),
        (1.0, np.inf, "1 ± inf"),
    ],
)
def test_text_shows_two_digits_of_the_error(value, error, text):
    assert f"{Estimate(value, error, 8)}" == text


def test_a_format_applies_to_both_parts_and_to_numbers_alone():
    assert f"{Estimate(jnp.float32(2.0), jnp.float32(0.1), 8):.1f}" == "2.0 ± 0.1"
    tree = Estimate({"a": jnp.ones(2)}, {"a": jnp.ones(2)}, 8)
    assert str(tree).startswith("Estimate(value={'a'")
    with pytest.raises(TypeError, match="one number"):
        f"{tree:.1f}"
