r"""Sharpness-aware minimization and its relatives as optax transformations.

Each takes the gradient at parameters moved by an ascent step :math:`\epsilon`, and
returns it for whatever follows in the chain. They differ in the ascent step or in what
they make of the two gradients. All take ``value_fn`` as :func:`smooth_gradients` does.
"""

import optax

from flatopt._core import checks, layout, vectors
from flatopt._core.types import AxisName, Key, Mask, ScalarOrSchedule
from flatopt.transforms import _ascent, _direction

Scalar = ScalarOrSchedule


def sam_gradients(
    rho: Scalar,
    direction: optax.GradientTransformation | None = None,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization: the gradient at :math:`\theta + \rho\, g/\|g\|`.

    The norm is over all leaves together. At a zero gradient the step is zero.

    A ``direction`` shapes the gradient before it is normalized:
    ``optax.scale_by_adam()`` (preconditioned SAM), ``optax.ema(0.4)`` (VaSSO),
    ``optax.scale_by_sign()``, ``optax.contrib.scale_by_muon(...)`` of matrices. Its state
    is kept in ``memory``, in float32 or wider; with microbatches each goes on from the
    last step's state, and their states are averaged.

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      direction: an optax transformation that points uphill as the gradient does, such as
        ``optax.scale_by_adam()``; not ``optax.adam``, which points downhill. None: the
        gradient itself.
      num_microbatches: m-sharpness: split the batch into this many chunks, each with
        an ascent step of its own, and average; None: 1.
      batch_argnames: names of the extra arguments whose leading axis is split.
      start_step: number of steps of plain gradients before the method begins.
      mask: a tree prefix of bools, a function of ``params`` that returns one, or a
        pattern of paths such as ``"encoder/*/kernel"``. Leaves masked out are neither
        moved nor differentiated; their update is zero.
      axis_name: axis of ``jax.shard_map`` to average over; each device then makes an
        ascent step of its own.
      key: an int or a JAX random key, read by ``init``; it matters only if ``value_fn``
        names ``sample_key`` or the method draws noise.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Foret, Kleiner, Mobahi, Neyshabur, `Sharpness-Aware Minimization for Efficiently
      Improving Generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021,
      Algorithm 1. Directions: Li, Giannakis, `Enhancing Sharpness-Aware Optimization
      Through Variance Suppression <https://arxiv.org/abs/2309.15639>`_, NeurIPS 2023
      (VaSSO).

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.sam_gradients(0.05), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.303, -0.404]
    """

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count

        def move(grads):
            uphill, kept = _direction.along(direction, grads, memory, params)
            return vectors.move(params, vectors.ascent(uphill, rho)), kept

        return layout.two_passes(value_and_grad, params, move)

    _direction.check_direction(direction)
    return _ascent.adversarial(
        "sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
        _direction.init_memory(direction),
        is_memory_of_free=True,
    )


def usam_gradients(
    rho: Scalar,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Unnormalized SAM: the gradient at :math:`\theta + \rho\, g`.

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

    Args:
      rho: factor of the gradient in the ascent step, >= 0.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Andriushchenko, Flammarion, `Towards Understanding Sharpness-Aware Minimization
      <https://arxiv.org/abs/2206.06232>`_, ICML 2022.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.usam_gradients(0.05), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.315, -0.42]
    """

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count

        def move(grads):
            return vectors.move(params, vectors.scale(rho, grads)), memory

        return layout.two_passes(value_and_grad, params, move)

    return _ascent.adversarial(
        "usam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
        is_linear=True,
    )


def gsam_gradients(
    rho: Scalar,
    alpha: float,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Surrogate-gap SAM: SAM's gradient, less the clean one's part orthogonal to it.

    .. math:: g_p - \alpha\, (g - (g \cdot \hat g_p)\, \hat g_p)

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      alpha: weight of the orthogonal part, >= 0.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, `Surrogate Gap
      Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.gsam_gradients(0.05, 0.4), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.303, -0.404]
    """
    checks.check_scale(alpha, "alpha")

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count

        def move(clean):
            return vectors.move(params, vectors.ascent(clean, rho)), clean

        value, moved, clean = layout.two_passes(value_and_grad, params, move)
        grads = vectors.add(moved, -alpha, vectors.orthogonal(clean, moved))
        return value, grads, memory

    return _ascent.adversarial(
        "gsam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )
