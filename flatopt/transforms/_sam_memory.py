"""Sharpness-aware minimization that keeps a direction between steps."""

import jax
import jax.numpy as jnp
import optax

from flatopt._core import blocks, checks, layout, loops, trees, vectors
from flatopt._core.types import AxisName, Key, Mask
from flatopt.transforms import _ascent, _link
from flatopt.transforms._sam import Scalar


def look_sam_gradients(
    rho: Scalar,
    every: int = 5,
    alpha: float = 0.7,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM's direction, computed at every few steps and reused between.

    At every ``every``-th step SAM's gradient is used, and its part orthogonal to the
    clean gradient, :math:`g_v`, is kept. The other steps use
    :math:`g + \alpha\, \|g\| / \|g_v\|\, g_v`. Where :math:`g_v` is no longer than the
    rounding errors of the two gradients (four units of float32, or one unit of a narrower
    dtype of the parameters), or half of the ascent step is lost in the rounding of the
    parameters, there is no direction: the other steps use :math:`g`.

    Cost of a step: 1 + 1/``every`` gradients on average. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      every: number of steps between ascent steps, at least 1.
      alpha: weight of the kept direction, >= 0.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Liu, Mai, Chen, Hsieh, You, `Towards Efficient and Scalable Sharpness-Aware
      Minimization <https://arxiv.org/abs/2203.02714>`_, CVPR 2022.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.look_sam_gradients(0.05), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.303, -0.404]
    """
    checks.check_scale(alpha, "alpha")
    is_array = isinstance(every, jax.Array) and every.shape == ()
    if not (is_array and jnp.issubdtype(jnp.result_type(every), jnp.integer)):
        checks.check_count(
            every, "every", "it counts the steps from one ascent step to the next"
        )

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key
        value, clean = value_and_grad(params)

        def look():
            size = vectors.size(clean)

            def step():  # made again where it is read, and not stored
                return vectors.scale(rho, vectors.direction(clean, size))

            is_step = _has_moved(params, step, rho)
            _, moved = value_and_grad(vectors.move(params, step()))
            return moved, _across(moved, clean, size, params, is_step)

        def reuse():
            return vectors.add(clean, alpha * vectors.norm(clean), memory), memory

        grads, memory = loops.cond((count - start_step) % every == 0, look, reuse)
        return value, grads, memory

    return _ascent.adversarial(
        "look_sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
        init_memory=_link.wide_zeros,
    )


def friendly_sam_gradients(
    rho: Scalar,
    sigma: float = 1.0,
    decay: float = 0.9,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly SAM: an ascent step along the batch's own part of the gradient.

    .. math:: \epsilon = \rho\, d / \|d\|, \qquad d = g - \sigma m

    with :math:`m` the moving average of gradients before this step. Where no entry of
    :math:`d` is larger than the rounding errors of the two there is no ascent step.

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      sigma: share of the moving average to take away, >= 0.
      decay: decay of the moving average, in [0, 1).
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Li, Zhou, He, Cheng, Huang, `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.friendly_sam_gradients(0.05), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.303, -0.404]
    """
    checks.check_scale(sigma, "sigma")
    checks.check_decay(decay)

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count

        def move(clean):
            own = vectors.add(clean, -sigma, memory)
            errors = jax.tree.map(
                lambda g, m, p: (
                    vectors.rounding_unit(p.dtype)
                    * (vectors.largest(g) + vectors.scale(sigma, vectors.largest(m)))
                ),
                clean,
                memory,
                params,
            )
            is_noise = vectors.largest(own) <= vectors.largest(errors)
            step = vectors.ascent(own, jnp.where(is_noise, 0.0, rho))
            # The first gradient starts the average, as in the authors' code.
            kept = jnp.where(vectors.largest(memory) == 0, 0.0, decay)
            average = vectors.add(vectors.scale(kept, memory), 1 - kept, clean)
            return vectors.move(params, step), average

        return layout.two_passes(value_and_grad, params, move)

    return _ascent.adversarial(
        "friendly_sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
        init_memory=_link.wide_zeros,
    )


def momentum_sam_gradients(
    rho: Scalar,
    decay: float = 0.9,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: one gradient, at parameters moved along the momentum.

    .. math:: g = \nabla L(\theta - \rho\, v / \|v\|), \qquad v \leftarrow \beta v + g

    with :math:`v` the momentum of the steps before, as ``optax.sgd(learning_rate,
    momentum=decay)`` after this link keeps it. The first step is plain.

    Cost of a step: one gradient. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

    Args:
      rho: length of the step: a number, a scalar array or a schedule, >= 0.
      decay: decay of the momentum, in [0, 1); that of the optimizer.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`. The momentum starts with the method.

    Returns:
      A transformation with state :class:`AdversarialState`; its ``clean_value`` is the
      loss at the moved parameters.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Becker, Altrock, Risse, `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.momentum_sam_gradients(0.05), optax.sgd(0.1, 0.9))
      >>> params = jnp.array([3.0, 4.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(
      ...         None, state, params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.567, -0.756]
    """
    checks.check_decay(decay)

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count
        back = vectors.scale(-1.0, vectors.ascent(memory, rho))
        value, grads = value_and_grad(vectors.move(params, back))
        return value, grads, vectors.add(grads, decay, memory)

    return _ascent.adversarial(
        "momentum_sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
        init_memory=_link.wide_zeros,
    )


def _across(moved, clean, size, params, is_step):
    """The part of a gradient across the clean one, of this size, over its own length.

    Zero where it is no longer than the rounding errors to expect, and without a step.
    """
    own = vectors.size(moved)
    square = jnp.where(size.square == 0, 1.0, size.square)
    first = vectors.product(moved, own.unit, clean, size.unit) / square
    moved = vectors.divide(moved, own.unit)
    uphill = vectors.divide(clean, size.unit)
    rest = vectors.add(moved, -first, uphill)
    # What the first time leaves along the gradient is rounding.
    left = vectors.product(rest, jnp.ones_like(own.unit), clean, size.unit)
    second = left / square
    square = vectors.dot(rest, rest) - second * left
    units = jax.tree.map(lambda p: vectors.rounding_unit(p.dtype), params)
    if len(set(jax.tree.leaves(units))) == 1:
        error = own.square * jax.tree.leaves(units)[0] ** 2
    else:
        errors = jax.tree.map(lambda g, unit: unit * g, moved, units)
        error = vectors.dot(errors, errors)
    is_signal = is_step & (square > error)
    factor = jnp.where(is_signal, 1 / jnp.sqrt(jnp.where(is_signal, square, 1.0)), 0.0)
    return vectors.scale(factor, vectors.add(rest, -second, uphill))


def _has_moved(params, step, rho):
    """Whether the parameters take at least half of a step, as rounded as they are."""
    limits = [jnp.finfo(p.dtype) for p in jax.tree.leaves(params)]
    length = vectors.norm(params)
    half = jnp.asarray(rho).astype(length.dtype) / 2
    # Rounding a sum to the nearest loses less of it than eps, or less than the least number.
    most = max(float(x.eps) for x in limits) * (length + 2 * half)
    most = most + max(float(x.tiny) for x in limits) * blocks.size(params)
    is_sure = most < half

    def is_seen():
        lost = jax.tree.map(
            lambda p, q, s: (
                trees.widen(q) - trees.widen(p) - s.astype(trees.wide(p.dtype))
            ),
            params,
            vectors.move(params, step()),
            step(),
        )
        # In units of half a step squares that overflow are too long, and those that
        # underflow are short.
        unit = jnp.where(half == 0, 1, half)
        lost = jax.tree.map(lambda x: x / unit.astype(x.dtype), lost)
        return (vectors.dot(lost, lost) < 1) & (half > 0)

    return loops.usually(is_sure, lambda: is_sure, is_seen)
