"""Ready recipes: chains with the papers' defaults."""

from typing import Any

import jax
import optax

from flatopt import kernels
from flatopt._core import checks, trees
from flatopt.transforms._sam import sam_gradients
from flatopt.transforms._sam_adaptive import asam_gradients
from flatopt.transforms._smooth import smooth_gradients


def lpf_sgd(
    learning_rate: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule = 5e-4,
    num_samples: int | None = None,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    batch_argnames: tuple[str, ...] = ("batch",),
    mask: Any = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-pass-filtering SGD: one pass over the batch, each chunk at its own noise.

    The batch is split into ``num_samples`` chunks; the gradient of each is taken at
    parameters with filter-wise Gaussian noise of standard deviation
    :math:`\gamma\|\theta_f\|`; their mean goes to SGD with momentum. A step costs one
    gradient of the batch. Weight decay acts on the unperturbed parameters.

    The noise follows from ``key`` alone: give two optimizers two keys.

    Args:
      learning_rate: a number or a schedule.
      gamma: noise in units of the filter norm: a number or a schedule, such as
        :func:`flatopt.schedules.cosine_growth`.
      num_samples: number of chunks M; None: 8, the paper's. It must divide the batch.
      momentum: coefficient of the momentum buffer.
      nesterov: whether to use Nesterov momentum.
      weight_decay: coefficient of the parameters added to the gradient.
      batch_argnames: names of the extra arguments that hold the batch.
      mask: which leaves to train, as in :func:`smooth_gradients`; the others get
        neither noise, gradient nor weight decay.
      key: an int or a JAX random key.

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
    return optax.chain(
        _lpf(gamma, num_samples, batch_argnames, mask, key),
        _sgd(learning_rate, momentum, nesterov, weight_decay, mask),
    )


def nso_sgd(
    learning_rate: optax.ScalarOrSchedule,
    sigma: optax.ScalarOrSchedule = 0.01,
    num_perturbations: int | None = None,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Noise stability optimization: gradients at +U and -U, averaged.

    Isotropic Gaussian noise of standard deviation :math:`\sigma`; the pair cancels the
    first-order variance, so that the step descends
    :math:`L + \frac{\sigma^2}{2}\operatorname{tr}\nabla^2 L` with almost no added
    noise. A step costs ``2 * num_perturbations`` gradients of the batch.

    The noise follows from ``key`` alone: give two optimizers two keys.

    Args:
      learning_rate: a number or a schedule.
      sigma: standard deviation of the noise: a number or a schedule.
      num_perturbations: number of pairs k; None: 1.
      momentum: coefficient of the momentum buffer.
      nesterov: whether to use Nesterov momentum.
      weight_decay: coefficient of the parameters added to the gradient.
      mask: which leaves to train, as in :func:`smooth_gradients`; the others get
        neither noise, gradient nor weight decay.
      key: an int or a JAX random key.

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
    return optax.chain(
        _nso(sigma, num_perturbations, mask, key),
        _sgd(learning_rate, momentum, nesterov, weight_decay, mask),
    )


def sam_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization with SGD: two gradients a step.

    Args:
      learning_rate: a number or a schedule.
      rho: length of the ascent step: a number or a schedule.
      momentum: coefficient of the momentum buffer.
      nesterov: whether to use Nesterov momentum.
      weight_decay: coefficient of the parameters added to the gradient.
      mask: which leaves to train, as in :func:`smooth_gradients`.
      key: an int or a JAX random key.

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
    return optax.chain(
        sam_gradients(rho, mask=mask, key=key),
        _sgd(learning_rate, momentum, nesterov, weight_decay, mask),
    )


def asam_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.5,
    eta: float = 0.01,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive sharpness-aware minimization with SGD: two gradients a step.

    Args:
      learning_rate: a number or a schedule.
      rho: length of the ascent step in units of the parameters: a number or a schedule.
      eta: what is added to the magnitude of each parameter.
      momentum: coefficient of the momentum buffer.
      nesterov: whether to use Nesterov momentum.
      weight_decay: coefficient of the parameters added to the gradient.
      mask: which leaves to train, as in :func:`smooth_gradients`.
      key: an int or a JAX random key.

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
    return optax.chain(
        asam_gradients(rho, eta, mask=mask, key=key),
        _sgd(learning_rate, momentum, nesterov, weight_decay, mask),
    )


def lpf_adamw(
    learning_rate: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule = 5e-4,
    num_samples: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    batch_argnames: tuple[str, ...] = ("batch",),
    mask: Any = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-pass filtering with AdamW: :func:`lpf_sgd` with another optimizer after it.

    Args:
      learning_rate: a number or a schedule.
      gamma: noise in units of the filter norm: a number or a schedule.
      num_samples: number of chunks M; None: 8, the paper's. It must divide the batch.
      b1: decay of the first moment.
      b2: decay of the second moment.
      weight_decay: decoupled weight decay, times the learning rate.
      batch_argnames: names of the extra arguments that hold the batch.
      mask: which leaves to train, as in :func:`smooth_gradients`.
      key: an int or a JAX random key.

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
    return optax.chain(
        _lpf(gamma, num_samples, batch_argnames, mask, key),
        _adamw(learning_rate, b1, b2, weight_decay, mask),
    )


def nso_adamw(
    learning_rate: optax.ScalarOrSchedule,
    sigma: optax.ScalarOrSchedule = 0.01,
    num_perturbations: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    mask: Any = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Noise stability optimization with AdamW: for fine-tuning.

    Args:
      learning_rate: a number or a schedule.
      sigma: standard deviation of the noise: a number or a schedule.
      num_perturbations: number of pairs k; None: 1.
      b1: decay of the first moment.
      b2: decay of the second moment.
      weight_decay: decoupled weight decay, times the learning rate.
      mask: which leaves to train, as in :func:`smooth_gradients`.
      key: an int or a JAX random key.

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
    return optax.chain(
        _nso(sigma, num_perturbations, mask, key),
        _adamw(learning_rate, b1, b2, weight_decay, mask),
    )


def _lpf(gamma, num_samples, batch_argnames, mask, key):
    return smooth_gradients(
        gamma,
        kernels.filterwise(),
        num_samples=8 if num_samples is None else num_samples,
        batch_argnames=batch_argnames,
        mask=mask,
        key=key,
    )


def _nso(sigma, num_perturbations, mask, key):
    num_perturbations = 1 if num_perturbations is None else num_perturbations
    checks.check_count(num_perturbations, "num_perturbations")
    return smooth_gradients(
        sigma,
        num_samples=num_perturbations,
        antithetic=True,
        mask=mask,
        key=key,
    )


def _sgd(learning_rate, momentum, nesterov, weight_decay, mask):
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
    return _masked(tx, mask)


def _adamw(learning_rate, b1, b2, weight_decay, mask):
    tx = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return _masked(tx, mask)


def _masked(tx, mask):
    if mask is None:
        return tx
    # optax would call a tree that can be called.
    return optax.masked(tx, mask if trees.is_function(mask) else lambda _: mask)
