"""Links while a chain is read as a linear map: they hand on the gradient that comes in.

Near a minimum the loss is quadratic. What averages over noise has the gradient there that
it would have without; an ascent step along the gradient multiplies it by 1 + rho H.
"""

import contextlib
import contextvars

_reading = contextvars.ContextVar("reading", default=None)


class NotLinearError(ValueError):
    """Of an optimizer that is not linear near a minimum."""


@contextlib.contextmanager
def reading():
    """While it lasts links hand on gradients; the list that it gives takes their rho."""
    ascents = []
    token = _reading.set(ascents)
    try:
        yield ascents
    finally:
        _reading.reset(token)


def is_read():
    return _reading.get() is not None


def hand_on(name, rho):
    """Note the ascent of a link, or refuse one whose gradient is not linear (None)."""
    if rho is None:
        raise NotLinearError(
            f"optimizer must be linear near a minimum, got {name}, whose gradient is not; "
            "use stability.critical_learning_rate for it."
        )
    if not (isinstance(rho, int | float) and rho == 0):
        _reading.get().append((name, rho))
