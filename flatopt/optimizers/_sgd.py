"""Recipes that end in SGD with momentum."""

from typing import Any

import optax

from flatopt._core.types import AxisName, KernelFn, Key, Mask, Strategy, WeightFn
from flatopt.optimizers import _masks
from flatopt.transforms._papers import lpf_gradients, nso_gradients
from flatopt.transforms._sam import sam_gradients
from flatopt.transforms._sam_adaptive import asam_gradients


def lpf_sgd(
    learning_rate: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule = 5e-4,
    num_samples: int | None = None,
    *,
    kernel: KernelFn | None = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    batch_argnames: tuple[str, ...] = ("batch",),
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    noise_mask: Any = None,
    clean_weight: optax.ScalarOrSchedule | None = None,
    start_step: int = 0,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-pass-filtering SGD: one pass over the batch, each chunk at its own noise.

    The batch is split into ``num_samples`` chunks; the gradient of each is taken at
    parameters with filter-wise Gaussian noise of standard deviation
    :math:`\gamma\|\theta_f\|`; their mean goes to SGD with momentum. A step costs one
    gradient of the batch. Weight decay acts on the unperturbed parameters. The default
    ``gamma`` is the paper's, for networks of millions of parameters; on small ones it does
    nothing: it raised the loss of one of 13,706 by millionths of itself. Ask
    :func:`flatopt.radius`.

    The noise follows from ``key`` alone: give two optimizers two keys.

    Args:
      learning_rate: a number or a schedule.
      gamma: noise in units of the filter norm: a number or a schedule, such as
        :func:`flatopt.schedules.cosine_growth`.
      num_samples: number of chunks M; None: 8, the paper's. It must divide the batch.
      kernel: the noise; None: :func:`flatopt.kernels.filterwise`.
      momentum, nesterov, accumulator_dtype: see ``optax.sgd``.
      weight_decay: coefficient of the parameters added to the gradient.
      weight_decay_mask: which leaves decay, in the form of ``mask``; None: all trained.
      batch_argnames: names of the extra arguments that hold the batch.
      mask: which leaves to train, as in :func:`smooth_gradients`; the others get
        neither noise, gradient nor weight decay.
      weight_fn, noise_mask, clean_weight, start_step, strategy, axis_name, key: see
        :func:`smooth_gradients`.

    Returns:
      An optax transformation; its ``update`` takes ``value_fn`` and the batch.

    Raises:
      TypeError, ValueError: as :func:`smooth_gradients`.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params - 1) ** 2)
      >>> tx = flatopt.lpf_sgd(0.1)
      >>> params, batch = jnp.zeros(2), jnp.ones((8, 2))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(
      ...     optax.tree.zeros_like(params), state, params, value_fn=loss_fn, batch=batch)
      >>> updates
      Array([0.2, 0.2], dtype=float32)
    """
    return _masks.recipe(
        lpf_gradients(
            gamma,
            num_samples,
            kernel,
            batch_argnames=batch_argnames,
            weight_fn=weight_fn,
            mask=mask,
            noise_mask=noise_mask,
            clean_weight=clean_weight,
            start_step=start_step,
            strategy=strategy,
            axis_name=axis_name,
            key=key,
        ),
        _masks.sgd(
            learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            accumulator_dtype=accumulator_dtype,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            mask=mask,
        ),
    )


def nso_sgd(
    learning_rate: optax.ScalarOrSchedule,
    sigma: optax.ScalarOrSchedule = 0.01,
    num_perturbations: int | None = None,
    *,
    kernel: KernelFn | None = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    mask: Mask = None,
    noise_mask: Any = None,
    clean_weight: optax.ScalarOrSchedule | None = None,
    start_step: int = 0,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Noise stability optimization: gradients at +U and -U, averaged.

    Isotropic Gaussian noise of standard deviation :math:`\sigma`; the pair cancels the
    first-order variance, so that the step descends
    :math:`L + \frac{\sigma^2}{2}\operatorname{tr}\nabla^2 L` with almost no added
    noise. A step costs ``2 * num_perturbations`` gradients of the batch. The default
    ``sigma`` is the paper's, for pre-trained networks; it does nothing where it raises the
    loss by less than 1e-4 of itself; on a network of 13,706 parameters it was 3e-4. Ask
    :func:`flatopt.radius`.

    The noise follows from ``key`` alone: give two optimizers two keys.

    Args:
      learning_rate: a number or a schedule.
      sigma: standard deviation of the noise: a number or a schedule.
      num_perturbations: number of pairs k; None: 1.
      kernel: the noise; None: :func:`flatopt.kernels.isotropic`.
      momentum, nesterov, accumulator_dtype: see ``optax.sgd``.
      weight_decay: coefficient of the parameters added to the gradient.
      weight_decay_mask: which leaves decay, in the form of ``mask``; None: all trained.
      mask: which leaves to train, as in :func:`smooth_gradients`; the others get
        neither noise, gradient nor weight decay.
      noise_mask, clean_weight, start_step, strategy, axis_name, key: see
        :func:`smooth_gradients`.

    Returns:
      An optax transformation; its ``update`` takes ``value_fn`` and its arguments.

    Raises:
      TypeError, ValueError: as :func:`smooth_gradients`.

    References:
      Zhang, Li, Ju, `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = flatopt.nso_sgd(0.1, sigma=0.01)
      >>> params = jnp.array([3.0, 4.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(
      ...     optax.tree.zeros_like(params), state, params,
      ...     value_fn=lambda params: jnp.sum(params ** 2) / 2)
      >>> [round(float(u), 4) for u in updates]
      [-0.3, -0.4]
    """
    return _masks.recipe(
        nso_gradients(
            sigma,
            num_perturbations,
            kernel,
            mask=mask,
            noise_mask=noise_mask,
            clean_weight=clean_weight,
            start_step=start_step,
            strategy=strategy,
            axis_name=axis_name,
            key=key,
        ),
        _masks.sgd(
            learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            accumulator_dtype=accumulator_dtype,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            mask=mask,
        ),
    )


def sam_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization with SGD: two gradients a step.

    The default ``rho`` is the paper's, for networks of millions of parameters. It does little
    on small ones, and nothing where it raises the loss by less than 1e-4 of itself: ask
    :func:`flatopt.radius` with ``method="sam"``.

    Args:
      learning_rate: a number or a schedule.
      rho: length of the ascent step: a number or a schedule.
      momentum, nesterov, accumulator_dtype: see ``optax.sgd``.
      weight_decay: coefficient of the parameters added to the gradient.
      weight_decay_mask: which leaves decay, in the form of ``mask``; None: all trained.
      num_microbatches, batch_argnames, mask, axis_name, key: see :func:`sam_gradients`.

    Returns:
      An optax transformation; its ``update`` takes ``value_fn`` and its arguments.

    Raises:
      TypeError, ValueError: as :func:`sam_gradients`.

    References:
      Foret, Kleiner, Mobahi, Neyshabur, `Sharpness-Aware Minimization for Efficiently
      Improving Generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.sam_sgd(0.1)
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.303, -0.404]
    """
    return _masks.recipe(
        sam_gradients(
            rho,
            num_microbatches=num_microbatches,
            batch_argnames=batch_argnames,
            mask=mask,
            axis_name=axis_name,
            key=key,
        ),
        _masks.sgd(
            learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            accumulator_dtype=accumulator_dtype,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            mask=mask,
        ),
    )


def asam_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.5,
    eta: float = 0.01,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive sharpness-aware minimization with SGD: two gradients a step.

    Args:
      learning_rate: a number or a schedule.
      rho: length of the ascent step in units of the parameters: a number or a schedule.
      eta: what is added to the magnitude of each parameter.
      momentum, nesterov, accumulator_dtype: see ``optax.sgd``.
      weight_decay: coefficient of the parameters added to the gradient.
      weight_decay_mask: which leaves decay, in the form of ``mask``; None: all trained.
      num_microbatches, batch_argnames, mask, axis_name, key: see :func:`sam_gradients`.

    Returns:
      An optax transformation; its ``update`` takes ``value_fn`` and its arguments.

    Raises:
      TypeError, ValueError: as :func:`asam_gradients`.

    References:
      Kwon, Kim, Park, Choi, `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.asam_sgd(0.1)
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.374, -0.575]
    """
    return _masks.recipe(
        asam_gradients(
            rho,
            eta,
            num_microbatches=num_microbatches,
            batch_argnames=batch_argnames,
            mask=mask,
            axis_name=axis_name,
            key=key,
        ),
        _masks.sgd(
            learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            accumulator_dtype=accumulator_dtype,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            mask=mask,
        ),
    )
