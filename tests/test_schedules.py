"""Schedules against the formula of LPF-SGD's code."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import schedules


@pytest.mark.heart
@pytest.mark.parametrize("step", [0, 1, 37, 99, 100, 1000])
def test_cosine_growth_follows_the_formula_then_stays(step):
    schedule = schedules.cosine_growth(5e-4, 15, 100)
    t = min(step, 100)
    expected = 5e-4 * ((15 - 1) * 0.5 * (1 - math.cos(math.pi * t / 100)) + 1)
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


@pytest.mark.heart
def test_cosine_growth_takes_numbers_of_steps_under_vmap():
    found = jax.vmap(lambda steps: schedules.cosine_growth(1.0, 3.0, steps)(5))(
        jnp.array([5, 10, 10**6])
    )
    np.testing.assert_allclose(found, [3.0, 2.0, 1.0], rtol=1e-5)


def test_cosine_growth_rejects_no_steps():
    with pytest.raises(ValueError, match="transition_steps must be at least 1, got 0"):
        schedules.cosine_growth(1.0, 2.0, 0)
