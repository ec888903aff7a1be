"""The gradient of a smoothed loss as the first link of a chain."""

from typing import Any

import optax

from flatopt import kernels, smoothing
from flatopt._core import checks, sharding
from flatopt._core.types import (
    AxisName,
    KernelFn,
    Key,
    Mask,
    ScalarOrSchedule,
    Strategy,
    WeightFn,
)
from flatopt.transforms import _link
from flatopt.transforms._states import SmoothGradientsState


def smooth_gradients(
    scale: ScalarOrSchedule,
    kernel: KernelFn | None = None,
    *,
    num_samples: int | None = None,
    antithetic: bool = False,
    batch_argnames: tuple[str, ...] = (),
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    noise_mask: Any = None,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the gradient by that of the loss averaged over perturbed parameters.

    The noise follows from ``key`` alone: two optimizers made with the same ``key`` draw
    the same noise. The incoming gradients are not read: pass zeros
    (``optax.tree.zeros_like(params)``, free under jit), or None where no other link
    reads them. Put this link first: after an optimizer it would ascend, and
    :func:`chain` refuses that. Clipping, momentum, accumulation come after it.

    The gradient is the Monte Carlo estimate of
    :math:`\nabla_\theta E_U[L(\theta + \text{scale}\cdot U)]`, as described at
    :func:`smooth_value_and_grad`. Cost in gradients of the batch: 1 with
    ``batch_argnames``, else ``num_samples``; twice that if antithetic.

    ``update`` takes ``value_fn(params, **kwargs) -> scalar`` as an extra argument, and
    forwards to it those keyword arguments that its signature names (all of them if it
    takes ``**kwargs``).

    Args:
      scale: standard deviation of the noise in units of the kernel: a number, a scalar
        array, or a schedule of the step count.
      kernel: ``kernel(key, params) -> perturbation``. Default:
        :func:`flatopt.kernels.isotropic`.
      num_samples: number of draws a step; None: 1.
      antithetic: evaluate each draw at +U and at -U.
      batch_argnames: names of the extra arguments whose leading axis is split, one
        chunk a draw.
      weight_fn: weight of a chunk; default: chunks count equally.
      mask: a tree prefix of bools, or a function of ``params`` that returns one. Leaves
        masked out get no noise and are not differentiated; their update is zero.
      noise_mask: which leaves get noise, in the form of ``mask``; None: those of
        ``mask``. For noise on frozen weights with gradients for their adapters alone.
      strategy: layout of the samples, see :func:`smooth_value_and_grad`.
      axis_name: axis of ``jax.shard_map`` to average over.
      key: an int or a JAX random key, read by ``init``.

    Returns:
      A transformation with state :class:`SmoothGradientsState`. Under
      ``optax.inject_hyperparams`` name ``kernel`` and ``weight_fn`` in ``static_args``.

    Raises:
      TypeError, ValueError: at the call or while tracing ``update``, in one sentence,
        for each wrong argument: a missing ``value_fn`` or ``params``, a batch that does
        not divide, a mask of another structure, and so on.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, Algorithm 1; Zhang, Li, Ju,
      `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params - 1) ** 2)
      >>> tx = optax.chain(
      ...     flatopt.smooth_gradients(0.01, antithetic=True), optax.sgd(0.1))
      >>> params, batch = jnp.zeros(2), jnp.eye(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(
      ...     optax.tree.zeros_like(params), state, params, value_fn=loss_fn, batch=batch)
      >>> updates
      Array([0.1, 0.1], dtype=float32)
    """
    return smoothed(
        "smooth_gradients",
        "scale",
        scale,
        kernels.isotropic() if kernel is None else kernel,
        num_samples=1 if num_samples is None else num_samples,
        antithetic=antithetic,
        batch_argnames=batch_argnames,
        weight_fn=weight_fn,
        mask=mask,
        noise_mask=noise_mask,
        strategy=strategy,
        axis_name=axis_name,
        key=key,
    )


def smoothed(
    name,
    scale_name,
    scale,
    kernel,
    *,
    num_samples,
    antithetic=False,
    batch_argnames=(),
    weight_fn=None,
    mask,
    noise_mask,
    strategy,
    axis_name,
    key,
):
    """The link of a smoothed loss under a public name, which its errors show."""
    if not callable(scale):
        checks.check_scale(scale, scale_name)
    checks.check_kernel(kernel)
    checks.check_count(num_samples)
    checks.check_strategy(strategy)
    checks.check_weight_fn(weight_fn)
    batch_argnames = checks.check_names(batch_argnames)

    def estimate(step):
        checks.check_axis_name(axis_name)
        sharding.note_average(axis_name)
        # It masks, splits the batch and averages over devices: frozen leaves may get noise,
        # and weights of chunks come before the mean.
        value_fn, params = step.whole
        value_and_grad = smoothing.smooth_value_and_grad(
            value_fn,
            _link.at_step(scale, step.count, scale_name),
            kernel,
            num_samples=num_samples,
            antithetic=antithetic,
            batch_argnames=batch_argnames,
            weight_fn=weight_fn,
            mask=mask,
            noise_mask=noise_mask,
            strategy=strategy,
            axis_name=axis_name,
        )
        value, grads = value_and_grad(step.key, params, **step.arguments)
        select, _ = _link.selection(params, mask)
        return value, select(grads), ()

    return _link.link(
        name,
        SmoothGradientsState,
        estimate,
        mask=mask,
        key=key,
        rho_near_minimum=0,
    )
