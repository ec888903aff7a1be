"""The gradient of a smoothed loss as the first link of a chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels, smoothing
from flatopt._core import binding, checks, loops, sharding
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
    clean_weight: ScalarOrSchedule | None = None,
    start_step: int = 0,
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
      mask: a tree prefix of bools, a function of ``params`` that returns one, or a pattern
        of paths such as ``"encoder/*/kernel"``. Leaves masked out get no noise and are not
        differentiated; their update is zero.
      noise_mask: which leaves get noise, in the form of ``mask``; None: those of
        ``mask``. For noise on frozen weights with gradients for their adapters alone.
      clean_weight: weight c of the clean gradient, between 0 and 1: a number or a schedule;
        the smoothed one has 1 - c. It costs one gradient more; with ``batch_argnames`` it
        takes a chunk of its own, so that the batch is split into ``num_samples + 1`` and
        the cost stays 1. None: there is no clean pass.
      start_step: number of steps of plain gradients, at one gradient each, before the
        noise begins.
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
        clean_weight=clean_weight,
        start_step=start_step,
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
    noise_mask=None,
    clean_weight,
    start_step,
    strategy,
    axis_name,
    key,
    init_memory=None,
    remember=None,
):
    """The link of a smoothed loss under a public name, which its errors show.

    A method that remembers gives ``init_memory(params)`` and ``remember(memory, grads)``;
    its ``kernel`` is a function of the memory that returns one.
    """
    if not callable(scale):
        checks.check_scale(scale, scale_name)
    if remember is None:
        checks.check_kernel(kernel)
    checks.check_count(num_samples)
    checks.check_strategy(strategy)
    checks.check_weight_fn(weight_fn)
    checks.check_start_step(start_step)
    if clean_weight is not None and not callable(clean_weight):
        checks.check_share(clean_weight, "clean_weight")
    options = {
        "batch_argnames": checks.check_names(batch_argnames),
        "weight_fn": weight_fn,
        "mask": mask,
        "strategy": strategy,
        "axis_name": axis_name,
    }

    def estimate(step):
        checks.check_axis_name(axis_name)
        sharding.note_average(axis_name)
        # It masks, splits the batch and averages over devices: frozen leaves may get noise,
        # and weights of chunks come before the mean.
        value_fn, params = step.whole

        def noisy():
            value_and_grad = smoothing.smooth_value_and_grad(
                value_fn,
                _link.at_step(scale, step.count, scale_name),
                kernel if remember is None else kernel(step.memory),
                num_samples=num_samples,
                antithetic=antithetic,
                noise_mask=noise_mask,
                clean_weight=_at_step(clean_weight, step.count),
                **options,
            )
            return value_and_grad(step.key, params, **step.arguments)

        def plain():
            # In the same chunks, of which the layout bounds the memory.
            num_chunks = num_samples + (clean_weight is not None)
            value_and_grad = smoothing.smooth_value_and_grad(
                value_fn,
                0.0,
                _SILENCE,
                num_samples=num_chunks if batch_argnames else 1,
                **options,
            )
            return value_and_grad(step.key, params, **step.arguments)

        if isinstance(start_step, int) and start_step == 0:
            value, grads = noisy()
        else:
            value, grads = loops.cond(step.count >= start_step, noisy, plain)
        select, _ = _link.selection(params, mask)
        grads = select(grads)
        if remember is None:
            return value, grads, ()
        with binding.beside(params):
            return value, grads, remember(step.memory, grads)

    # A clean chunk of its own weighs more than the others: no plain mean over the batch.
    weighs_apart = clean_weight is not None and options["batch_argnames"]
    rho_near_minimum = None if weighs_apart else 0
    return _link.link(
        name,
        SmoothGradientsState,
        estimate,
        mask=mask,
        key=key,
        init_memory=init_memory,
        is_memory_of_free=True,
        rho_near_minimum=rho_near_minimum,
        size_at=_link.from_step(scale, start_step, scale_name),
    )


def _at_step(clean_weight, count):
    if clean_weight is None:
        return None
    share = _link.at_step(clean_weight, count, "clean_weight")
    checks.check_share(share, "clean_weight")
    return share


def _no_noise(key, params):
    del key
    return lambda key: jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), params
    )


_SILENCE = kernels.Kernel(_no_noise)
