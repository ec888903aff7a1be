"""What measures share: checks of arguments, the scale at which a rise is reached."""

import math

import jax
import jax.numpy as jnp

from flatopt._core import checks


def check_positive(value, name):
    checks.check_scale(value, name)
    if not value > 0:
        raise ValueError(
            f"{name} must be greater than 0, got {value}; give a positive number."
        )


def check_number(value, name, advice):
    """Reject a measure that is not a number; traced values pass unseen."""
    if not isinstance(value, jax.core.Tracer) and bool(jnp.isnan(value).any()):
        raise ValueError(f"{name} met a loss that is not a number; {advice}")
    return value


def solve(rise, target, start, largest):
    """The scale at which a rise reaches a target, to 1e-4 of itself: some ten rises.

    A bracket grows by fives; what is not a number counts as risen.
    """
    import scipy.optimize  # slow to import, and seldom needed

    known = {0.0: -target}

    def excess(scale):
        if scale not in known:
            # Far beyond the target a value says no more than that.
            found = rise(scale)
            known[scale] = 9 * target if math.isnan(found) else found - target
            known[scale] = max(min(known[scale], 9 * target), -9 * target)
        return known[scale]

    low, high = 0.0, start
    while excess(high) < 0:
        low, high = high, 5 * high
        if high > largest:
            return math.inf
    if excess(high) == 0:
        return high
    return float(
        scipy.optimize.toms748(excess, low, high, xtol=1e-12 * high, rtol=1e-4)
    )
