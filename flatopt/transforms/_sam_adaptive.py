"""Sharpness-aware minimization in other units than those of the parameters."""

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels
from flatopt._core import checks, filters, layout, trees
from flatopt._core.types import AxisName, Key, Mask
from flatopt._core.vectors import move, scaled_ascent
from flatopt.transforms import _ascent
from flatopt.transforms._ascent import adversarial
from flatopt.transforms._sam import Scalar


def adaptive(name, rho, eta, size_of, options):
    """SAM in units of ``size_of(path, leaf, whole) + eta``, with all parameters last."""
    checks.check_scale(eta, "eta")

    def gradients(value_and_grad, params, rho, key, memory, count, whole):
        del key, count
        sizes = jax.tree_util.tree_map_with_path(
            lambda path, p: size_of(trees.path_name(path), trees.widen(p), whole) + eta,
            params,
        )

        def along(grads):
            units = jax.tree.map(lambda s, g: s.astype(g.dtype), sizes, grads)
            return move(params, scaled_ascent(grads, units, rho)), memory

        return layout.two_passes(value_and_grad, params, along)

    return adversarial(name, rho, gradients, options, is_given_whole=True)


def asam_gradients(
    rho: Scalar,
    eta: float = 0.01,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: an ascent step measured in units of each parameter.

    .. math:: \epsilon = \rho\, T^2 g / \|T g\|, \qquad T_i = |\theta_i| + \eta

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

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
    return adaptive(
        "asam_gradients",
        rho,
        eta,
        lambda path, leaf, whole: jnp.abs(leaf),
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
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM filter by filter: :math:`T_f = \|\theta_f\|_2 + \eta`.

    Leaves with at most one axis (biases, scales) belong to no filter: there the units
    are :math:`|\theta_i| + \eta` as in :func:`asam_gradients`.

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

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

    def size_of(path, leaf, whole):
        norm = filters.filter_norm(filter_axes, whole)
        return norm(path, leaf) if leaf.ndim > 1 else jnp.abs(leaf)

    return adaptive(
        "filterwise_asam_gradients",
        rho,
        eta,
        size_of,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def fisher_sam_gradients(
    rho: Scalar,
    eta: float = 1.0,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher SAM: an ascent step in the metric of the diagonal empirical Fisher.

    .. math:: \epsilon = \rho\, F^{-1} g / \sqrt{g^\top F^{-1} g},
        \qquad F = 1 + \eta\, g^2

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

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
    checks.check_scale(eta, "eta")

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count

        def along(grads):
            roots = jax.tree.map(lambda g: _root_of_metric(g, eta), grads)
            return move(params, scaled_ascent(grads, roots, rho)), memory

        return layout.two_passes(value_and_grad, params, along)

    return _ascent.adversarial(
        "fisher_sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def _root_of_metric(grad, eta):
    """1 / sqrt(1 + eta g^2), by squares of numbers of at most one."""
    size = jnp.abs(grad) * jnp.sqrt(jnp.asarray(eta, grad.dtype))
    large = jnp.maximum(size, 1)
    return jax.lax.rsqrt(large**-2 + jnp.square(size / large)) / large
