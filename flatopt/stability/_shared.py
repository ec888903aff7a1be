"""What all coordinates of an optimizer share, once a preconditioner is divided out."""

from typing import NamedTuple

import numpy as np

from flatopt._core import linear

TINY = 1e-12  # relative, that counts as zero
ADVICE = "use stability.critical_learning_rate, which takes any update."


class Coefficients(NamedTuple):
    """One step near a minimum: ``z' = matrix @ z + gain * gradient``.

    Attributes:
      matrix: shape (k, k), of the distance to the minimum and the slots.
      gain: shape (k,).
      rho: the gradient is that of the loss times 1 + rho H; 0 but for an ascent step.
    """

    matrix: np.ndarray
    gain: np.ndarray
    rho: np.ndarray


def divided(matrix, gain, factors):
    """Coefficients in the coordinates where the preconditioner is 1.

    Of the parameters these are theta over the root of the factor; those of a slot are the
    ones in which all coordinates take up the gradient alike.
    """
    scales = [factors**-0.5]
    for k in range(1, len(gain)):
        if np.any(gain[k]):
            scales.append(factors**0.5 / _nonzero(gain[k]))
        elif np.any(matrix[k, 0]):
            scales.append(factors**-0.5 / _nonzero(matrix[k, 0]))
        else:
            scales.append(np.ones_like(factors))
    scales = np.stack(scales)
    return scales[:, None] * matrix / scales[None], scales * gain * factors**-0.5


def _nonzero(values):
    return np.where(values == 0, 1.0, values)


def common(matrix, gain, tolerance):
    """The coefficients if they are the same at all coordinates, else None."""
    whole = np.concatenate([matrix, gain[:, None]], axis=1)
    found = np.median(whole, axis=-1)
    sizes = np.abs(found)
    floor = TINY * sizes.max(axis=1, keepdims=True)
    apart = np.abs(whole - found[..., None]).max(axis=-1, initial=0.0)
    if not (apart <= tolerance * sizes + floor).all():
        return None
    return found[:, :-1], found[:, -1]


def refuse_apart(is_scale):
    if is_scale:
        raise ValueError(
            "optimizer scales gradients differently at each coordinate; give linearize "
            "preconditioner=stability.preconditioner(optimizer, opt_state, params)."
        )
    raise linear.NotLinearError(
        "optimizer must treat all parameters alike but for a preconditioner, got one that "
        "decays or averages some of them otherwise (masked or coupled weight decay, "
        f"partitions); {ADVICE}"
    )


def minimal(matrix, gain, rho):
    """The coefficients without slots that nothing moves or reads, each moved by 1."""
    reads = np.abs(matrix) > TINY * np.abs(matrix).max(axis=1, keepdims=True)
    moves = (np.abs(gain) > 0) | (np.arange(len(gain)) == 0)
    seen = np.arange(len(gain)) == 0
    for _ in gain:
        moves = moves | (reads @ moves)
        seen = seen | (seen @ reads)
    kept = np.flatnonzero(moves & seen)
    matrix, gain = matrix[np.ix_(kept, kept)], gain[kept]
    scales = np.where(gain == 0, 1.0, 1 / _nonzero(gain))
    scales[0] = 1.0
    matrix = scales[:, None] * matrix / scales[None]
    matrix[0, 0] += 1
    return Coefficients(matrix, scales * gain, np.asarray(rho))
