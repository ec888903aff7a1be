"""Ready recipes: chains with the papers' defaults."""

from typing import Any

import jax
import optax

from flatopt import kernels
from flatopt.transforms import smooth_gradients


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
        smooth_gradients(
            gamma,
            kernels.filterwise(),
            num_samples=8 if num_samples is None else num_samples,
            batch_argnames=batch_argnames,
            mask=mask,
            key=key,
        ),
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
        smooth_gradients(
            sigma,
            num_samples=1 if num_perturbations is None else num_perturbations,
            antithetic=True,
            mask=mask,
            key=key,
        ),
        _sgd(learning_rate, momentum, nesterov, weight_decay, mask),
    )


def _sgd(learning_rate, momentum, nesterov, weight_decay, mask):
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
    return tx if mask is None else optax.masked(tx, mask)
