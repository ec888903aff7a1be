"""Cross-entropy whose curvature in the logits takes no array beside them."""

import re

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, trees


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""The cross-entropy of integer labels, one loss a label; float32 or wider.

    Values and gradients are those of
    ``optax.softmax_cross_entropy_with_integer_labels`` of logits in float32. Labels below
    0 count from the end, as there: give ignored tokens a weight of 0. The second
    derivative in the logits of a row,

    .. math:: \nabla^2 \ell\; u = p \odot u - p\, (p^\top u)

    is written so that XLA needs no array beside the logits and their tangent: use it, by
    itself or with weights of tokens, in the loss of :func:`gauss_newton` where there are
    many words. :func:`gauss_newton` does so by itself for a loss that is nothing but
    ``.mean()`` of optax's function, on logits as they are or cast to float32.

    Args:
      logits: shape (..., words).
      labels: integers of shape (...).

    Returns:
      One loss a label, shape (...).

    Raises:
      TypeError, ValueError: for logits that are not floating, labels that are no integers
        or have another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import curvature
      >>> curvature.cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4)
      Array([1.3863, 1.3863], dtype=float32)
    """
    if not (checks.is_numeric(logits) and jnp.issubdtype(logits.dtype, jnp.floating)):
        raise TypeError(
            f"logits must be a floating array, got {checks.described(logits)}; give "
            "one number for each word."
        )
    if not (checks.is_numeric(labels) and jnp.issubdtype(labels.dtype, jnp.integer)):
        raise TypeError(
            f"labels must be an array of integers, got {checks.described(labels)}; for "
            "shares of words use optax.softmax_cross_entropy."
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            "labels must have the shape of logits without its last axis, got "
            f"{labels.shape} for {logits.shape}; give one label a row."
        )
    logits = trees.widen(jnp.asarray(logits))
    chosen = jnp.take_along_axis(logits, jnp.asarray(labels)[..., None], axis=-1)
    return _log_normalizer(logits) - chosen[..., 0]


@jax.custom_jvp
def _log_normalizer(logits):
    return jax.nn.logsumexp(logits, axis=-1)


@_log_normalizer.defjvp
def _log_normalizer_jvp(primals, tangents):
    """By the softmax, whose own derivative has the form above."""
    (logits,), (tangent,) = primals, tangents
    slope = jnp.sum(jax.nn.softmax(logits, axis=-1) * tangent, axis=-1)
    return _log_normalizer(logits), slope


def lean(loss_fn, outputs, targets):
    """The loss for second derivatives: the one above where ``loss_fn`` is optax's mean.

    Told by its very operations, so that nothing is guessed.
    """
    if not all(checks.is_numeric(x) for x in (outputs, targets)):
        return loss_fn
    if outputs.ndim < 2 or targets.shape != outputs.shape[:-1]:
        return loss_fn
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        return loss_fn
    given = _operations(loss_fn, outputs, targets)
    if given and any(given == _operations(f, outputs, targets) for f in SPELLED):
        return lambda logits, labels: cross_entropy(logits, labels).mean()
    return loss_fn


def _mean(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _mean_in_float32(logits, labels):
    return _mean(logits.astype(jnp.float32), labels)


SPELLED = (_mean, _mean_in_float32)


def _operations(function, *arrays):
    """The operations of a function as text; None where it holds arrays of its own."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    traced = jax.make_jaxpr(function)(*shapes)
    return None if traced.consts else re.sub(r"0x[0-9a-f]+", "", str(traced))
