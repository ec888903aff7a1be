"""LPF-SGD and NSO as links: smooth_gradients with the papers' settings."""

from typing import Any

import optax

from flatopt import kernels
from flatopt._core import checks
from flatopt._core.types import (
    AxisName,
    KernelFn,
    Key,
    Mask,
    ScalarOrSchedule,
    Strategy,
    WeightFn,
)
from flatopt.transforms._smooth import smoothed


def lpf_gradients(
    gamma: ScalarOrSchedule = 5e-4,
    num_samples: int | None = None,
    kernel: KernelFn | None = None,
    *,
    batch_argnames: tuple[str, ...] = ("batch",),
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    noise_mask: Any = None,
    clean_weight: ScalarOrSchedule | None = None,
    start_step: int = 0,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-pass filtering: one pass over the batch, each chunk at its own noise.

    The batch is split into ``num_samples`` chunks; the gradient of each is taken at
    parameters with filter-wise Gaussian noise of standard deviation
    :math:`\gamma\|\theta_f\|`; their mean goes on to what follows in the chain. Put this
    link first; clipping, accumulation and the optimizer come after it. A step costs one
    gradient of the batch. The noise follows from ``key`` alone.

    This is :func:`smooth_gradients` with the paper's settings.

    Args:
      gamma: noise in units of the filter norm: a number or a schedule, such as
        :func:`flatopt.schedules.cosine_growth`.
      num_samples: number of chunks M; None: 8, the paper's. It must divide the batch.
      kernel: ``kernel(key, params) -> perturbation``. Default:
        :func:`flatopt.kernels.filterwise`.
      batch_argnames: names of the extra arguments that hold the batch.
      weight_fn, mask, noise_mask, clean_weight, start_step, strategy, axis_name, key: see
        :func:`smooth_gradients`.

    Returns:
      A transformation with state :class:`SmoothGradientsState`.

    Raises:
      TypeError, ValueError: as :func:`smooth_gradients`.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(
      ...     flatopt.lpf_gradients(), optax.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> params, batch = jnp.zeros(2), jnp.ones((8, 2))
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, batch=batch,
      ...     value_fn=lambda params, batch: jnp.mean((batch @ params - 1) ** 2))
      >>> [round(float(u), 4) for u in updates]
      [0.0707, 0.0707]
    """
    return smoothed(
        "lpf_gradients",
        "gamma",
        gamma,
        kernels.filterwise() if kernel is None else kernel,
        num_samples=8 if num_samples is None else num_samples,
        batch_argnames=batch_argnames,
        weight_fn=weight_fn,
        mask=mask,
        noise_mask=noise_mask,
        clean_weight=clean_weight,
        start_step=start_step,
        strategy=strategy,
        axis_name=axis_name,
        key=key,
    )


def nso_gradients(
    sigma: ScalarOrSchedule = 0.01,
    num_perturbations: int | None = None,
    kernel: KernelFn | None = None,
    *,
    mask: Mask = None,
    noise_mask: Any = None,
    clean_weight: ScalarOrSchedule | None = None,
    start_step: int = 0,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Noise stability optimization: gradients at +U and -U, averaged.

    Isotropic Gaussian noise of standard deviation :math:`\sigma`; the pair cancels the
    first-order variance, so that the step descends
    :math:`L + \frac{\sigma^2}{2}\operatorname{tr}\nabla^2 L` with almost no added
    noise. Put this link first; clipping, accumulation and the optimizer come after it. A
    step costs ``2 * num_perturbations`` gradients of the batch. The noise follows from
    ``key`` alone.

    This is :func:`smooth_gradients` with the paper's settings.

    Args:
      sigma: standard deviation of the noise: a number or a schedule.
      num_perturbations: number of pairs k; None: 1.
      kernel: ``kernel(key, params) -> perturbation``. Default:
        :func:`flatopt.kernels.isotropic`.
      mask, noise_mask, clean_weight, start_step, strategy, axis_name, key: see
        :func:`smooth_gradients`.

    Returns:
      A transformation with state :class:`SmoothGradientsState`.

    Raises:
      TypeError, ValueError: as :func:`smooth_gradients`.

    References:
      Zhang, Li, Ju, `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.nso_gradients(0.01), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params,
      ...     value_fn=lambda params: jnp.sum(params ** 2) / 2)
      >>> [round(float(u), 4) for u in updates]
      [-0.3, -0.4]
    """
    num_perturbations = 1 if num_perturbations is None else num_perturbations
    checks.check_count(num_perturbations, "num_perturbations")
    return smoothed(
        "nso_gradients",
        "sigma",
        sigma,
        kernels.isotropic() if kernel is None else kernel,
        num_samples=num_perturbations,
        antithetic=True,
        mask=mask,
        noise_mask=noise_mask,
        clean_weight=clean_weight,
        start_step=start_step,
        strategy=strategy,
        axis_name=axis_name,
        key=key,
    )
