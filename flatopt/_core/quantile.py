"""The quantile of the normal distribution in float32, as a few elementwise operations.

XLA's inverse error function takes a logarithm and two polynomials, of which it selects one a
value. Here it is one short logarithm and one polynomial: on CPU 0.6 of the time for drawing
normal values, and a smaller error. Accelerators have a logarithm of their own; they take XLA's.
"""

import jax
import jax.numpy as jnp

# log(1 + f) / f between 1/sqrt(2) - 1 and sqrt(2) - 1; the error of the logarithm is 2e-7.
_LOGARITHM = (
    0.118274637,
    -0.189019755,
    0.206046760,
    -0.248813406,
    0.333032995,
    -0.500019670,
    1.00000322,
)
# The quantile over x, of r = sqrt(_SHIFT - log(1 - x^2)), about r = _CENTER. The shift makes
# it smooth at x = 0; far out it is linear in r. Best relative error: 1.3e-6.
_SHIFT, _CENTER = 3.5, 3.1
_QUANTILE = (
    0.00141300890,
    -0.00183896336,
    -0.00728629716,
    0.0145189064,
    0.00535773998,
    -0.0418331809,
    0.0581301376,
    -0.0265342034,
    -0.0764201134,
    1.73847902,
    3.26445222,
)


def normal_quantile(x):
    """Where a standard normal variable is below with probability (1 + x) / 2.

    ``x`` is float32 in (-1, 1). The relative error is at most 2e-6.
    """
    root = jnp.sqrt(jnp.float32(_SHIFT) - _log((1 - x) * (1 + x)))
    return x * _polynomial(_QUANTILE, root - jnp.float32(_CENTER))


def _log(x):
    """The natural logarithm of normal numbers: that of a power of two, and of the rest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    least = jax.lax.bitcast_convert_type(jnp.float32(0.5**0.5), jnp.int32)
    exponent = (bits - least) >> 23
    rest = jax.lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32) - 1
    log_2 = jnp.float32(0.693147181)
    return exponent.astype(jnp.float32) * log_2 + rest * _polynomial(_LOGARITHM, rest)


def _polynomial(coefficients, x):
    """By Horner's rule, from the highest power."""
    total = jnp.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + jnp.float32(coefficient)
    return total
