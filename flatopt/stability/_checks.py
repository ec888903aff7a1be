"""Checks of the arguments that the stability functions share."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import checks

SAMPLINGS = ("without_replacement", "with_replacement", "bernoulli")
NUMBERS = numbers.Real | np.ndarray | jax.Array


def check_rate(rate, name="learning_rate"):
    """Reject what is not a finite number > 0; traced values pass unseen."""
    if callable(rate):
        raise TypeError(
            f"{name} must be a number, got a function; evaluate a schedule at the step you "
            "ask about, as in schedule(1000)."
        )
    if (
        isinstance(rate, bool | np.bool_)
        or not isinstance(rate, NUMBERS)
        or not (
            jnp.issubdtype(jnp.result_type(rate), jnp.floating)
            or jnp.issubdtype(jnp.result_type(rate), jnp.integer)
        )
    ):
        raise TypeError(f"{name} must be a real number, got {rate!r}; write 0.1.")
    if jnp.ndim(rate) != 0:
        raise ValueError(
            f"{name} must be one number, got shape {jnp.shape(rate)}; call once for each."
        )
    if isinstance(rate, jax.core.Tracer):
        return
    if not math.isfinite(rate):
        raise ValueError(f"{name} must be finite, got {rate}; write a number.")
    if not rate > 0:
        raise ValueError(
            f"{name} must be positive, got {rate}; write a number above 0."
        )


def check_linearization(lin):
    """Reject what is not the result of linearize."""
    if not hasattr(lin, "coordinates"):
        raise TypeError(
            f"lin must be a Linearization, got {checks.described(lin)}; give what "
            "stability.linearize returns."
        )


def check_count(count, name, meaning):
    """Reject what is not an int >= 1."""
    if (
        isinstance(count, bool | np.bool_)
        or not isinstance(count, numbers.Integral)
        or count < 1
    ):
        raise ValueError(
            f"{name} must be an int of at least 1, got {count!r}; it is the number of "
            f"{meaning}."
        )


def check_batch(batch_size, num_examples, sampling):
    """Reject batches that cannot be drawn from so many examples; None: very many."""
    check_count(batch_size, "batch_size", "examples in a batch")
    if sampling not in SAMPLINGS:
        raise ValueError(
            f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {sampling!r}."
        )
    if num_examples is not None and batch_size > num_examples:
        raise ValueError(
            "batch_size must be at most the number of examples, "
            f"{num_examples}, got {batch_size}."
        )


def check_key(key):
    """Reject what is no JAX random key, such as an int or several keys."""
    checks.check_random_key(key)
