r"""Sharpness-aware minimization and its relatives as optax transformations.

Each takes the gradient at parameters moved by an ascent step :math:`\epsilon`, and
returns it for whatever follows in the chain. They differ in the ascent step or in what
they make of the two gradients. All take ``value_fn`` as :func:`smooth_gradients` does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt import _ascent, _checks, _filters, _layout, kernels
from flatopt._ascent import AdversarialState as AdversarialState

Scalar = jax.typing.ArrayLike | optax.Schedule


def sam_gradients(
    rho: Scalar,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization: the gradient at :math:`\theta + \rho\, g/\|g\|`.

    The norm is over all leaves together. At a zero gradient the step is zero.

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      num_microbatches: m-sharpness: split the batch into this many chunks, each with
        an ascent step of its own, and average; None: 1.
      batch_argnames: names of the extra arguments whose leading axis is split.
      start_step: number of steps of plain gradients before the method begins.
      mask: a tree prefix of bools, or a function of ``params`` that returns one. Leaves
        masked out are neither moved nor differentiated; their update is zero.
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
      Algorithm 1.

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
        value, grads = value_and_grad(params)
        _, grads = value_and_grad(_ascent.move(params, _ascent.ascent(grads, rho)))
        return value, grads, memory

    return _ascent.adversarial(
        "sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def usam_gradients(
    rho: Scalar,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Unnormalized SAM: the gradient at :math:`\theta + \rho\, g`.

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

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
        value, grads = value_and_grad(params)
        _, grads = value_and_grad(_ascent.move(params, _ascent.scale(rho, grads)))
        return value, grads, memory

    return _ascent.adversarial(
        "usam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def asam_gradients(
    rho: Scalar,
    eta: float = 0.01,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: an ascent step measured in units of each parameter.

    .. math:: \epsilon = \rho\, T^2 g / \|T g\|, \qquad T_i = |\theta_i| + \eta

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      eta: what is added to the magnitude, >= 0.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Kwon, Kim, Park, Choi, `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.asam_gradients(0.5), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.374, -0.575]
    """
    return _ascent.adaptive(
        "asam_gradients",
        rho,
        eta,
        lambda path, leaf: jnp.abs(leaf),
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def filterwise_asam_gradients(
    rho: Scalar,
    eta: float = 0.01,
    filter_axes: kernels.FilterAxes = None,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM filter by filter: :math:`T_f = \|\theta_f\|_2 + \eta`.

    Leaves with at most one axis (biases, scales) belong to no filter: there the units
    are :math:`|\theta_i| + \eta` as in :func:`asam_gradients`.

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      eta: what is added to the norm, >= 0.
      filter_axes: see :func:`flatopt.kernels.filterwise`.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Kwon, Kim, Park, Choi, `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.filterwise_asam_gradients(0.5), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.374, -0.575]
    """
    norm = _filters.filter_norm(filter_axes)

    def size_of(path, leaf):
        return norm(path, leaf) if leaf.ndim > 1 else jnp.abs(leaf)

    return _ascent.adaptive(
        "filterwise_asam_gradients",
        rho,
        eta,
        size_of,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def random_sam_gradients(
    rho: Scalar,
    sigma: float,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Random SAM, NSO's variant: an ascent step along a gradient at noisy parameters.

    The gradient g is taken at :math:`\theta + \sigma U`; the step
    :math:`\rho\, g / \|g\|` starts from the clean :math:`\theta`.

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      sigma: scale of the noise in units of the filter norm, >= 0.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Zhang, Li, Ju, `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024 (the baseline in the authors' code,
      which starts from the clean parameters), after Liu, Mai, Chen, Hsieh, You, `Random
      Sharpness-Aware Minimization <https://openreview.net/forum?id=htUvh7xPoa>`_,
      NeurIPS 2022.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.random_sam_gradients(0.05, 0.0), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.303, -0.404]
    """
    return _ascent.noisy(
        "random_sam_gradients",
        rho,
        sigma,
        kernels.filterwise(),
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def bayesian_sam_gradients(
    rho: Scalar,
    sigma: float,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Bayesian SAM as NSO's authors compare with it; follow it with ``optax.adam``.

    As :func:`random_sam_gradients`, with isotropic noise :math:`N(0, \sigma^2)`.

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      sigma: standard deviation of the noise, >= 0.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Zhang, Li, Ju, `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024 (the variant in the authors' code, with
      a fixed sigma), after Möllenhoff, Khan, `SAM as an Optimal Relaxation of Bayes
      <https://arxiv.org/abs/2210.01620>`_, ICLR 2023.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.bayesian_sam_gradients(0.05, 0.0), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.303, -0.404]
    """
    return _ascent.noisy(
        "bayesian_sam_gradients",
        rho,
        sigma,
        kernels.isotropic(),
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def gsam_gradients(
    rho: Scalar,
    alpha: float,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Surrogate-gap SAM: SAM's gradient, less the clean one's part orthogonal to it.

    .. math:: g_p - \alpha\, (g - (g \cdot \hat g_p)\, \hat g_p)

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

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
    _checks.check_scale(alpha, "alpha")

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count
        value, clean = value_and_grad(params)
        _, moved = value_and_grad(_ascent.move(params, _ascent.ascent(clean, rho)))
        return (
            value,
            _ascent.add(moved, -alpha, _ascent.orthogonal(clean, moved)),
            memory,
        )

    return _ascent.adversarial(
        "gsam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def look_sam_gradients(
    rho: Scalar,
    every: int = 5,
    alpha: float = 0.7,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM's direction, computed at every few steps and reused between.

    At every ``every``-th step SAM's gradient is used, and its part orthogonal to the
    clean gradient, :math:`g_v`, is kept. The other steps use
    :math:`g + \alpha\, \|g\| / \|g_v\|\, g_v`.

    Cost of a step: 1 + 1/``every`` gradients on average. Put this link first in a chain;
    the incoming gradients are not read.

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
    _checks.check_scale(alpha, "alpha")
    if not isinstance(every, jax.Array):
        _checks.check_num_samples(every, "every")

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key
        value, clean = value_and_grad(params)

        def look():
            _, moved = value_and_grad(_ascent.move(params, _ascent.ascent(clean, rho)))
            return moved, _ascent.normalize(_ascent.orthogonal(moved, clean))[0]

        def reuse():
            _, norm = _ascent.normalize(clean)
            return _ascent.add(clean, alpha * norm, memory), memory

        grads, memory = _layout.cond((count - start_step) % every == 0, look, reuse)
        return value, grads, memory

    return _ascent.adversarial(
        "look_sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
        init_memory=_ascent.wide_zeros,
    )


def friendly_sam_gradients(
    rho: Scalar,
    sigma: float = 1.0,
    decay: float = 0.9,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly SAM: an ascent step along the batch's own part of the gradient.

    .. math:: \epsilon = \rho\, d / \|d\|, \qquad d = g - \sigma m

    with :math:`m` the moving average of gradients before this step.

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

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
    _checks.check_scale(sigma, "sigma")
    _checks.check_decay(decay)

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count
        value, clean = value_and_grad(params)
        _, grads = value_and_grad(
            _ascent.move(
                params, _ascent.ascent(_ascent.add(clean, -sigma, memory), rho)
            )
        )
        # The first gradient starts the average, as in the authors' code.
        _, length = _ascent.normalize(memory)
        kept = jnp.where(length == 0, 0.0, decay)
        memory = _ascent.add(_ascent.scale(kept, memory), 1 - kept, clean)
        return value, grads, memory

    return _ascent.adversarial(
        "friendly_sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
        init_memory=_ascent.wide_zeros,
    )


def fisher_sam_gradients(
    rho: Scalar,
    eta: float = 1.0,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher SAM: an ascent step in the metric of the diagonal empirical Fisher.

    .. math:: \epsilon = \rho\, F^{-1} g / \sqrt{g^\top F^{-1} g},
        \qquad F = 1 + \eta\, g^2

    Cost of a step: two gradients. Put this link first in a chain; the incoming gradients are
    not read.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      eta: weight of the squared gradient in the metric, >= 0; 0 is SAM.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Kim, Li, Hu, Hospedales, `Fisher SAM: Information Geometry and Sharpness Aware
      Minimisation <https://arxiv.org/abs/2206.04920>`_, ICML 2022. The damping
      1 + eta g^2 of the metric is ours.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.fisher_sam_gradients(0.05), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.301, -0.401]
    """
    _checks.check_scale(eta, "eta")

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count
        value, grads = value_and_grad(params)
        roots = jax.tree.map(lambda g: jax.lax.rsqrt(1 + eta * jnp.square(g)), grads)
        step = _ascent.scaled_ascent(grads, roots, rho)
        _, grads = value_and_grad(_ascent.move(params, step))
        return value, grads, memory

    return _ascent.adversarial(
        "fisher_sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )
