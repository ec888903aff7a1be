"""Recipes that end in AdamW."""

from typing import Any

import optax

from flatopt._core.types import AxisName, KernelFn, Key, Mask, Strategy, WeightFn
from flatopt.optimizers import _masks
from flatopt.transforms._papers import lpf_gradients, nso_gradients


def lpf_adamw(
    learning_rate: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule = 5e-4,
    num_samples: int | None = None,
    *,
    kernel: KernelFn | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    nesterov: bool = False,
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
    r"""Low-pass filtering with AdamW: :func:`lpf_sgd` with another optimizer after it.

    The default ``gamma`` does nothing on small networks: ask :func:`flatopt.radius`.

    Args:
      learning_rate: a number or a schedule.
      gamma: noise in units of the filter norm: a number or a schedule.
      num_samples: number of chunks M; None: 8, the paper's. It must divide the batch.
      kernel: the noise; None: :func:`flatopt.kernels.filterwise`.
      b1, b2, eps, eps_root, mu_dtype, nesterov: see ``optax.adamw``.
      weight_decay: decoupled weight decay, times the learning rate.
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
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022 (machine translation).

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.lpf_adamw(0.1)
      >>> params, batch = jnp.array([3.0, -4.0]), jnp.ones((8, 2))
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, batch=batch,
      ...     value_fn=lambda p, batch: jnp.sum((batch * p[None]) ** 2))
      >>> [round(float(u), 3) for u in updates]
      [-0.1, 0.1]
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
        _masks.adamw(
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            mask=mask,
            b1=b1,
            b2=b2,
            eps=eps,
            eps_root=eps_root,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
        ),
    )


def nso_adamw(
    learning_rate: optax.ScalarOrSchedule,
    sigma: optax.ScalarOrSchedule = 0.01,
    num_perturbations: int | None = None,
    *,
    kernel: KernelFn | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    nesterov: bool = False,
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
    r"""Noise stability optimization with AdamW: for fine-tuning.

    The default ``sigma`` does nothing where it raises the loss by less than 1e-4 of itself:
    ask :func:`flatopt.radius`.

    Args:
      learning_rate: a number or a schedule.
      sigma: standard deviation of the noise: a number or a schedule.
      num_perturbations: number of pairs k; None: 1.
      kernel: the noise; None: :func:`flatopt.kernels.isotropic`.
      b1, b2, eps, eps_root, mu_dtype, nesterov: see ``optax.adamw``.
      weight_decay: decoupled weight decay, times the learning rate.
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
      <https://arxiv.org/abs/2306.08553>`_, 2024, section 4.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.nso_adamw(0.1)
      >>> params = jnp.array([3.0, -4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2))
      >>> [round(float(u), 3) for u in updates]
      [-0.1, 0.1]
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
        _masks.adamw(
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            mask=mask,
            b1=b1,
            b2=b2,
            eps=eps,
            eps_root=eps_root,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
        ),
    )
