"""Smoothed gradients from values alone, for losses without gradients."""

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels
from flatopt._core import binding, checks, layout, random, trees, vectors
from flatopt._core.types import Key, Mask, ScalarOrSchedule, Strategy
from flatopt.transforms import _link
from flatopt.transforms._states import SmoothGradientsState


def smooth_gradients_zeroth_order(
    scale: ScalarOrSchedule,
    sampler: kernels.Sampler | None = None,
    *,
    num_samples: int | None = None,
    mask: Mask = None,
    strategy: Strategy = "auto",
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Estimate the gradient of the smoothed loss from two values a draw.

    .. math:: g = \frac1M \sum_{j=1}^M
        \frac{L(\theta + \sigma U_j) - L(\theta - \sigma U_j)}{2\sigma}\, U_j

    For standard normal :math:`U` its mean is exactly the gradient of
    :math:`E_U[L(\theta + \sigma U)]`; its variance grows with the number of parameters.
    Costs ``2 * num_samples`` forward passes and no backward pass; no activations are
    kept. The noise follows from ``key`` alone; the incoming gradients are not read.

    Args:
      scale: standard deviation :math:`\sigma` of the noise, > 0: a number, a scalar
        array or a schedule of the step count.
      sampler: values of mean 0 and variance 1; None: standard normal.
      num_samples: number of draws M a step; None: 1.
      mask: a tree prefix of bools, or a function of ``params`` that returns one. Leaves
        masked out stay as they are; their update is zero.
      strategy: layout of the samples, see :func:`smooth_value_and_grad`.
      key: an int or a JAX random key, read by ``init``.

    Returns:
      A transformation with state :class:`SmoothGradientsState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`; also if
        ``scale`` is 0.

    References:
      Zhang, Li, Thekumparampil, Oh, Muehlebach, He, `Zeroth-Order Optimization Finds
      Flat Minima <https://arxiv.org/abs/2506.05454>`_, NeurIPS 2025.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(
      ...     flatopt.smooth_gradients_zeroth_order(0.1, num_samples=64), optax.sgd(0.1))
      >>> params = jnp.array([3.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> bool(updates[0] < 0)
      True
    """
    if not callable(scale):
        _check_positive(scale)
    num_samples = 1 if num_samples is None else num_samples
    checks.check_count(num_samples)
    checks.check_strategy(strategy)
    kernel = kernels.isotropic(kernels.normal if sampler is None else sampler)

    def estimate(step):
        sigma = _link.at_step(scale, step.count, "scale")
        _check_positive(sigma)
        draw = binding.bind(kernel, step.key, step.params)

        def sample(index, chunk):
            noise_key = random.fold_in(step.key, index)
            noise = jax.lax.optimization_barrier(draw(noise_key))

            def value_at(factor):
                moved = vectors.move(step.params, vectors.scale(factor, noise))
                return trees.widen(step.value(moved, noise_key, chunk))

            plus, minus = value_at(sigma), value_at(-sigma)
            slope = (plus - minus) / (2 * jnp.asarray(sigma).astype(plus.dtype))
            return ((plus + minus) / 2, vectors.scale(slope, noise)), None

        total, _ = layout.sum_samples(
            sample, num_samples, step.chunks, strategy, rematerialize=False
        )
        return *jax.tree.map(lambda x: x / num_samples, total), ()

    return _link.link(
        "smooth_gradients_zeroth_order",
        SmoothGradientsState,
        estimate,
        mask=mask,
        key=key,
    )


def _check_positive(scale):
    checks.check_scale(scale)
    if not isinstance(scale, jax.core.Tracer) and float(scale) == 0:
        raise ValueError(
            "scale must be greater than 0, got 0; differences of values need a distance."
        )
