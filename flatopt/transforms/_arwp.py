"""Random weight perturbation with a deviation that adapts to the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels
from flatopt._core import binding, checks, filters, trees
from flatopt._core.types import (
    AxisName,
    Key,
    Mask,
    ScalarOrSchedule,
    Strategy,
    WeightFn,
)
from flatopt.transforms import _link
from flatopt.transforms._smooth import smoothed


def arwp_gradients(
    sigma: ScalarOrSchedule,
    eta: jax.typing.ArrayLike = 0.1,
    decay: jax.typing.ArrayLike = 0.99,
    *,
    filter_axes: kernels.FilterAxes = None,
    num_samples: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    noise_mask: Any = None,
    clean_weight: ScalarOrSchedule | None = 0.5,
    start_step: int = 0,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive random weight perturbation: less noise where gradients are large.

    .. math:: c\, g(\theta) + (1 - c)\, g(\theta + \epsilon), \qquad
        \epsilon_f \sim N\left(0, \frac{\sigma^2 \|\theta_f\|^2}{1 + \eta F_f}\right),
        \qquad F \leftarrow \beta F + g^2

    with c the ``clean_weight`` and :math:`F_f` the sum of F over the filter; g, in F, is
    the gradient that this link returns. With ``eta`` 0 this is RWP,
    ``smooth_gradients(sigma, kernels.filterwise(), clean_weight=0.5)``. The authors let
    ``sigma`` grow along a half cosine, such as
    ``flatopt.schedules.cosine_growth(1e-5, 1000, num_steps)``. The defaults of ``eta`` and
    ``decay`` are ours. F gathers from the first step on, also before ``start_step``; leaves
    that get noise but are not differentiated have no F, and RWP's noise.

    Cost of a step: two gradients, or one with ``batch_argnames``. State: one number a
    filter. Put this link first in a chain.

    Args:
      sigma: noise in units of the filter norm: a number, a scalar array or a schedule.
      eta: weight of the squared gradients, >= 0.
      decay: decay of F, in [0, 1).
      filter_axes: see :func:`flatopt.kernels.filterwise`.
      clean_weight: weight c of the clean gradient, between 0 and 1: a number or a
        schedule; None: no clean pass.
      num_samples, batch_argnames, weight_fn, mask, noise_mask: see
        :func:`smooth_gradients`.
      start_step, strategy, axis_name, key: see :func:`smooth_gradients`.

    Returns:
      A transformation with state :class:`SmoothGradientsState`, F its ``memory``.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Li, Tao, Wu, Lei, Yao, Huang, `Revisiting Random Weight Perturbation for Efficiently
      Improving Generalization <https://arxiv.org/abs/2404.00357>`_, TMLR 2024.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.arwp_gradients(0.0), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates], state[0].memory
      ([-0.3, -0.4], Array([25.], dtype=float32))
    """
    checks.check_scale(eta, "eta")
    checks.check_decay(decay)

    def squares(tree):
        """Sums of squares, one a filter, with the axes of the leaf."""
        norm = filters.filter_norm(filter_axes, binding.whole_params(tree))

        def square(path, leaf):
            return jnp.square(norm(trees.path_name(path), trees.widen(leaf)))

        return jax.tree_util.tree_map_with_path(square, tree)

    def init_memory(params):
        return squares(_link.wide_zeros(params)) if jax.tree.leaves(params) else params

    def remember(memory, grads):
        return jax.tree.map(
            lambda m, s: jnp.asarray(decay).astype(m.dtype) * m + s,
            memory,
            squares(grads),
        )

    return smoothed(
        "arwp_gradients",
        "sigma",
        sigma,
        lambda memory: _adaptive(
            kernels.filterwise(filter_axes=filter_axes), eta, memory
        ),
        num_samples=1 if num_samples is None else num_samples,
        batch_argnames=batch_argnames,
        weight_fn=weight_fn,
        mask=mask,
        noise_mask=noise_mask,
        clean_weight=clean_weight,
        start_step=start_step,
        strategy=strategy,
        axis_name=axis_name,
        key=key,
        init_memory=init_memory,
        remember=remember,
    )


def _adaptive(kernel, eta, memory):
    """The kernel over sqrt(1 + eta F), with F the memory; as it is where there is no F."""
    shrinkage = {
        trees.path_name(path): jax.lax.rsqrt(1 + jnp.asarray(eta).astype(m.dtype) * m)
        for path, m in jax.tree_util.tree_leaves_with_path(memory)
    }

    def shrink(path, noise):
        factor = shrinkage.get(trees.path_name(path))
        return noise if factor is None else noise.astype(factor.dtype) * factor

    def bind(key, params):
        draw = binding.bind(kernel, key, params)
        return lambda key: jax.tree_util.tree_map_with_path(shrink, draw(key))

    return kernels.Kernel(bind)
