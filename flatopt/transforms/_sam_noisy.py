"""Sharpness-aware minimization whose ascent step follows a gradient at noisy parameters."""

import optax

from flatopt import kernels
from flatopt._core import binding, checks, layout
from flatopt._core.types import AxisName, KernelFn, Key, Mask
from flatopt._core.vectors import ascent, move, scale
from flatopt.transforms import _ascent
from flatopt.transforms._ascent import adversarial
from flatopt.transforms._sam import Scalar


def _noisy(name, rho, sigma, kernel, options):
    """SAM whose ascent step follows the gradient at noisy parameters."""
    checks.check_scale(sigma, "sigma")
    checks.check_kernel(kernel)

    def gradients(value_and_grad, params, rho, key, memory, count, whole):
        del count
        noise = binding.bind(kernel, key, params, whole)(key)
        first = move(params, scale(sigma, noise))
        return layout.two_passes(
            value_and_grad,
            first,
            lambda grads: (move(params, ascent(grads, rho)), memory),
        )

    return adversarial(name, rho, gradients, options, is_given_whole=True)


def random_sam_gradients(
    rho: Scalar,
    sigma: float,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Random SAM, NSO's variant: an ascent step along a gradient at noisy parameters.

    This is :func:`noisy_sam_gradients` with filter-wise noise: the gradient g is taken at
    :math:`\theta + \sigma U`; the step :math:`\rho\, g / \|g\|` starts from the clean
    :math:`\theta`.

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

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
    return _noisy(
        "random_sam_gradients",
        rho,
        sigma,
        kernels.filterwise(),
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )


def noisy_sam_gradients(
    rho: Scalar,
    sigma: float,
    kernel: KernelFn | None = None,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM whose ascent step follows a gradient at noisy parameters.

    The gradient g is taken at :math:`\theta + \sigma U`; the step
    :math:`\rho\, g / \|g\|` starts from the clean :math:`\theta`. NSO's authors compare
    with two of these: isotropic noise before ``optax.adam``, which they call Bayesian SAM
    (it is not bSAM, which learns its noise), and :func:`random_sam_gradients`.

    The noise turns the ascent step and is not in the gradient returned: so there is no
    ``noise_mask`` (pass ``kernels.masked(kernel, mask)`` for noise on fewer leaves) and no
    ``clean_weight``.

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

    Args:
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      sigma: scale of the noise in units of the kernel, >= 0.
      kernel: ``kernel(key, params) -> perturbation``. Default:
        :func:`flatopt.kernels.isotropic`.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`; its ``clean_value`` is the
      loss at the noisy parameters. Under ``optax.inject_hyperparams`` name ``kernel`` in
      ``static_args``.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Zhang, Li, Ju, `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024 (the variants in the authors' code).

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.noisy_sam_gradients(0.05, 0.0), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.303, -0.404]
    """
    return _noisy(
        "noisy_sam_gradients",
        rho,
        sigma,
        kernels.isotropic() if kernel is None else kernel,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
    )
