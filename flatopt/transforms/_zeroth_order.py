"""Smoothed gradients from values alone, for losses without gradients."""

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels
from flatopt._core import binding, checks, layout, loops, random, trees, vectors
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
    kept. Memory beyond the forward pass: one parameter size, for the moved parameters and
    after them for the update, if the parameters are donated (``jax.jit(step,
    donate_argnums=0)``); noise is drawn again, leaf by leaf, instead of kept. With
    ``strategy="vmap"`` it is two parameter sizes a draw. The noise follows from ``key``
    alone; the incoming gradients are not read.

    What gets noise is what the noise differentiates, and there is no plain gradient: so
    there is no ``noise_mask``, ``clean_weight`` or ``start_step``.

    Args:
      scale: standard deviation :math:`\sigma` of the noise, > 0: a number, a scalar
        array or a schedule of the step count.
      sampler: values of mean 0 and variance 1; None: standard normal.
      num_samples: number of draws M a step; None: 1.
      mask: a tree prefix of bools, a function of ``params`` that returns one, or a
        pattern of paths such as ``"encoder/*/kernel"``. Leaves masked out stay as they
        are; their update is zero.
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
    layout_of_ends = strategy if isinstance(strategy, str) else 2 * strategy
    kernel = kernels.isotropic(kernels.normal if sampler is None else sampler)

    def estimate(step):
        sigma = _link.at_step(scale, step.count, "scale")
        _check_positive(sigma)
        draw = binding.bind(kernel, step.key, step.params)

        def end(index, chunk):
            """The value at one end of a draw: +U, then -U."""
            noise_key = random.fold_in(step.key, index // 2)
            factor = jnp.asarray(sigma) * (1 - 2 * (index % 2)).astype(jnp.float32)
            moved = vectors.move(step.params, vectors.scale(factor, draw(noise_key)))
            value = trees.widen(step.value(moved, noise_key, chunk))
            return value, value

        # Each end draws its noise again, leaf by leaf where it is added: of the samples of
        # a loop one is there at a time, the moved parameters and no noise.
        total, values = layout.sum_samples(
            end, 2 * num_samples, step.chunks, layout_of_ends, rematerialize=False
        )
        values = values.reshape(num_samples, 2)
        slopes = (values[:, 0] - values[:, 1]) / (2 * jnp.asarray(sigma)).astype(
            values.dtype
        )

        slopes = slopes / num_samples

        def term(index):
            noise = draw(random.fold_in(step.key, index))
            return vectors.scale(slopes[index], noise)

        def add(index, grads):
            return jax.tree.map(jnp.add, grads, term(index + 1))

        # From the first term, not from zeros, which would be there before the slopes are.
        grads = loops.repeat(add, term(jnp.int32(0)), num_samples - 1)
        return total / (2 * num_samples), grads, ()

    return _link.link(
        "smooth_gradients_zeroth_order",
        SmoothGradientsState,
        estimate,
        mask=mask,
        key=key,
        size_at=_link.from_step(scale, 0, "scale"),
    )


def _check_positive(scale):
    checks.check_scale(scale)
    if not isinstance(scale, jax.core.Tracer) and float(scale) == 0:
        raise ValueError(
            "scale must be greater than 0, got 0; differences of values need a distance."
        )
