"""What measures share: positive arguments, the scale at which a rise is reached."""

import math

from flatopt._core import checks


def check_positive(value, name):
    checks.check_scale(value, name)
    if not value > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}.")


def solve(rise, target, start, largest):
    """The scale at which a rise reaches a target: bracket, then bisect to 1e-4.

    What is not a number counts as risen.
    """
    low, high = 0.0, start
    while rise(high) < target:
        low, high = high, 5 * high
        if high > largest:
            return math.inf
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if rise(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
