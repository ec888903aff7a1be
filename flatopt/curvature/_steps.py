r"""One product out of differences at several steps, for gradients of few digits.

A difference at step :math:`h` is off by :math:`c\, h^2 + \ldots` and by rounding, which
is :math:`\sigma / h`. In float32 some step has little of both; in bfloat16 which one does
depends on the direction. So differences at several steps are fitted by
:math:`H v + c\, h^2`, each weighted by :math:`h^2`, and the largest steps are left out, by
the rule of Lepskii (1991): a fit is taken as long as it differs from those of fewer steps
by no more than rounding explains.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks

STEPS = np.array([0.125, 0.25, 0.5, 1.0, 2.0, 4.0])
ALLOWED = 1.5  # standard deviations by which fits may differ
TOLD = 4.0  # standard deviations that are told


def _fits():
    r"""For the first 2, 3, ... steps: what fitting them makes of the differences.

    Returns weights, standard deviations where :math:`\sigma` is 1, and the matrices whose
    quadratic forms estimate its square from what the fit leaves.
    """
    count = len(STEPS)
    weights, deviations, left = np.zeros((count - 1, count)), [], []
    for index in range(count - 1):
        steps = STEPS[: index + 2]
        terms = np.stack([steps, steps**3], axis=1)  # times the root of each weight
        inverse = np.linalg.pinv(terms)
        weights[index, : len(steps)] = inverse[0] * steps
        deviations.append(np.linalg.norm(inverse[0]))
        rest = (np.eye(len(steps)) - terms @ inverse) * steps
        left.append(np.zeros((count, count)))
        left[-1][: len(steps), : len(steps)] = rest.T @ rest / max(index, 1)
    return weights, np.array(deviations), np.array(left)


WEIGHTS, DEVIATIONS, LEFT = _fits()


def fit(rows, rounding):
    """The product out of differences at ``STEPS``, the rows of a block.

    ``rounding`` is what rounding may do to a difference at step 1, a norm. Returns the
    product, the weights of the rows, and what rounding may have done to it.
    """
    rests = jax.tree.map(lambda x: x - x[:1], rows)
    unit = blocks.unit(rests)
    unit = jnp.where(jnp.isfinite(unit), unit, 1.0)
    rests = blocks.divide(rests, unit)
    weights, error = _choose(blocks.gram(rests, rests), rounding / unit)

    def combined(x):  # what is left out may not be finite
        of_rows = weights.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.sum(jnp.where(of_rows == 0, 0.0, of_rows * x), axis=0)

    return jax.tree.map(combined, rows), weights, unit * error


def _choose(gram, rounding):
    """The weights of the fit that is taken, and its error, from inner products."""
    fits, deviations, left = (
        jnp.asarray(x, gram.dtype) for x in (WEIGHTS, DEVIATIONS, LEFT)
    )
    is_finite = jnp.isfinite(jnp.diagonal(gram))
    gram = jnp.where(is_finite[:, None] & is_finite[None], gram, 0.0)
    # How far the next two are from the first tells of rounding, where it is more than known.
    seen = jnp.diagonal(gram)[1:3] / (STEPS[0] ** -2 + STEPS[1:3] ** -2)
    variance = jnp.maximum(jnp.max(seen), rounding.astype(gram.dtype) ** 2)
    between = fits[:, None] - fits[None]
    moved = jnp.tensordot(between, gram, 1, precision=blocks.PRECISION)
    distances = jnp.sum(moved * between, axis=-1)
    explained = (deviations[None] ** 2 - deviations[:, None] ** 2) * variance
    is_before = np.tri(len(fits), k=-1, dtype=bool)
    agree = jnp.all((distances <= ALLOWED**2 * explained) | ~is_before, axis=1)
    agree &= jnp.cumprod(is_finite)[1:] > 0
    chosen = jnp.maximum(jnp.sum(jnp.cumprod(agree)) - 1, 0)
    variance = jnp.maximum(variance, jnp.sum(left[chosen] * gram))
    return fits[chosen], TOLD * deviations[chosen] * jnp.sqrt(variance)
