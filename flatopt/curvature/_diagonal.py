"""The diagonal of curvature operators."""

from typing import Any

import jax

from flatopt._core import blocks, checks
from flatopt._core.estimates import Estimate
from flatopt.curvature._flat import unit_vectors
from flatopt.curvature._operator import Operator, like_wide
from flatopt.curvature._probes import (
    GROUP,
    check_finite,
    check_operator,
    leading_basis,
    moments_within,
    observe,
    probe_keys,
    summarize,
)

FEWEST = 4  # products: one for a direction, one for its part, two probes for an error


def diagonal(
    operator: Operator,
    key: jax.Array,
    num_matvecs: int = 48,
    *,
    progress: Any = None,
) -> Estimate:
    r"""The diagonal with error bars, the products spent in thirds.

    .. math:: \operatorname{diag}(Q Q^\top H) + \frac1m \sum_j
        v_j \odot H (v_j - Q Q^\top v_j)

    The first third makes :math:`Q`, an orthonormal basis of a random sketch of the range;
    the second gives what lies within it exactly; random signs :math:`v_j` estimate the
    rest. A matrix of at most a third as many rows is exact. Leave-one-out XDiag is nearer
    at as many products, much so where the spectrum decays fast, but its intervals hold the
    truth too seldom.

    Cost in gradients of the data: 2 a product. Memory: two thirds of ``num_matvecs``
    vectors. Streamed data is passed over twice, and once more for each eight signs.

    Args:
      operator: the matrix.
      key: a JAX random key.
      num_matvecs: number of products, at least 4.
      progress: see :func:`probe`.

    Returns:
      An :class:`Estimate` whose value and standard error are trees like the parameters.

    Raises:
      ValueError: for a curvature that is not finite, fewer than 4 products.

    References:
      Bekas, Kokiopoulou, Saad, An Estimator for the Diagonal of a Matrix, 2007; thirds
      after Meyer, Musco, Musco, Woodruff, `Hutch++ <https://arxiv.org/abs/2010.09649>`_,
      SOSA 2021; XDiag: Epperly, Tropp, Webber, `XTrace
      <https://arxiv.org/abs/2301.07825>`_, SIAM J. Matrix Anal. 2024.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 4), jnp.array([1.0, 2.0]))
      >>> curvature.diagonal(operator, jax.random.key(0)).value.round(2)
      Array([12., 48.], dtype=float32)
    """
    check_operator(operator)
    checks.check_random_key(key)
    checks.check_count(num_matvecs, "num_matvecs")
    if num_matvecs < FEWEST:
        raise ValueError(
            f"num_matvecs must be at least {FEWEST} for a standard error, got "
            f"{num_matvecs}."
        )
    third = num_matvecs // 3
    count = num_matvecs - 2 * third
    is_sketched = third < blocks.size(operator.like)
    basis_key, probe_key = jax.random.split(key)
    with operator.risk.watched(
        progress, 1 + is_sketched + -(-count // GROUP), "diagonal"
    ):
        if is_sketched:
            basis = leading_basis(operator, basis_key, third, num_steps=1)
        else:  # random directions may all but depend on each other, these do not
            basis = unit_vectors(like_wide(operator.like, operator.like))
        moments = moments_within(operator, basis_key, basis)
        keys = probe_keys(probe_key, 0, count)
        moments = observe(operator, keys, basis, moments)
    found = summarize(operator.like, moments, count, 1.0)
    check_finite(operator, found.trace.value)
    return found.diagonal
