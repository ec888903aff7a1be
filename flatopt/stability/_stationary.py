"""Where an optimizer settles around a minimum that does not fit its data."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core.types import Optimizer, Sampling
from flatopt.stability import _checks, _coefficients, _moments, _motion
from flatopt.stability._linearization import Linearization, check_whole


class StationaryCovariance(NamedTuple):
    r"""Where SGD settles around a minimum, from :func:`stationary_covariance`.

    Attributes:
      covariance: of the parameters' distance to the minimum, in the eigenbasis of H,
        shape (r, r).
      mean_square_distance: its trace.
      excess_loss: the expected loss above the minimum's.
      mean_square_gradient: the expected squared norm of the gradient.

    Example:
      >>> from flatopt import stability
      >>> stability.StationaryCovariance._fields[2]
      'excess_loss'
    """

    covariance: jax.Array
    mean_square_distance: jax.Array
    excess_loss: jax.Array
    mean_square_gradient: jax.Array


def stationary_covariance(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
) -> StationaryCovariance:
    r"""Where SGD settles around a minimum that does not fit its data exactly.

    With C and D as in :func:`thresholds` and :math:`\Sigma_g` the mean of the examples'
    gradients times themselves at the minimum of the linearized model (which is moved to),
    the distance to it comes to have the covariance

    .. math:: \eta\, p\, (2 C - \eta D)^{-1}\, \Sigma_g

    Zero where the data is fitted. Directions that no example sees are left out.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, below the exact threshold.
      batch_size: B, at most n.
      sampling, optimizer, opt_state: see :func:`thresholds`.

    Returns:
      A :class:`StationaryCovariance`.

    Raises:
      ValueError: for a learning rate at which SGD does not stay.

    References:
      Mulayoff, Michaeli, `Exact Mean Square Linear Stability Analysis for SGD
      <https://arxiv.org/abs/2306.07850>`_, 2023, theorem 5.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: w * x, jnp.ones(()), jnp.ones(2), jnp.array([0.0, 2.0]))
      >>> found = stability.stationary_covariance(lin, 0.5, 1)
      >>> round(float(found.excess_loss), 4)  # 0.5 * 0.5 / (2 - 0.5)
      0.1667
    """
    _checks.check_linearization(lin)
    _checks.check_rate(learning_rate)
    check_whole(lin, "stationary_covariance")
    if _coefficients.is_plain(lin, optimizer, opt_state):
        _check_below(learning_rate, _moments.exact_threshold(lin, batch_size, sampling))
        covariance = _moments.stationary(lin, learning_rate, batch_size, sampling)
    else:
        chain = _coefficients.chain(lin, optimizer, opt_state)
        found = _motion.motion(lin, chain, batch_size, sampling, _moments.space)
        if not _motion.stays(found, learning_rate):
            _check_below(learning_rate, _motion.threshold(found))
        covariance = _motion.stationary(found, lin.residuals, learning_rate)
    values, spread = np.asarray(lin.eigenvalues, "f8"), np.diagonal(covariance)
    found = covariance, spread.sum(), values @ spread / 2, values**2 @ spread
    dtype = jnp.asarray(lin.eigenvalues).dtype
    return StationaryCovariance(*(_moments.narrow(x, dtype) for x in found))


def _check_below(learning_rate, limit):
    if not learning_rate < limit:
        raise ValueError(
            f"learning_rate must be below the exact threshold, {limit:.4g}, got "
            f"{learning_rate:.4g}; beyond it SGD settles nowhere."
        )
