r"""Smoothing: a loss averaged over perturbed parameters, and its gradient.

For a value_fn :math:`L` and a kernel that draws :math:`U`, the smoothed loss is
:math:`F(\theta) = E_U[L(\theta + \text{scale} \cdot U)]`. Both functions here
estimate it by Monte Carlo. How the samples are laid out in time and memory is the
strategy; it changes speed and memory, never the result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flatopt import kernels
from flatopt._core import binding, checks, layout, random, sharding, signatures, trees
from flatopt._core.types import AxisName, KernelFn, LossFn, Mask, Strategy, WeightFn


def smooth(
    value_fn: LossFn,
    scale: jax.typing.ArrayLike,
    kernel: KernelFn | None = None,
    *,
    num_samples: int = 1,
    antithetic: bool = False,
    strategy: Strategy = "auto",
) -> Callable[..., jax.Array]:
    r"""Return the Monte Carlo estimate of the smoothed ``value_fn``.

    .. math:: F(\theta) \approx \frac1M \sum_{j=1}^M L(\theta + \text{scale}\cdot U_j)

    The noise is constant with respect to ``params``: the gradient of the result is
    what :func:`smooth_value_and_grad` returns. Gradients with respect to ``scale``
    flow. For training prefer :func:`smooth_value_and_grad`, which stores nothing
    between samples; differentiating this function evaluates each sample once more.

    Args:
      value_fn: ``value_fn(params, *args, **kwargs) -> scalar``. If it names a keyword
        ``sample_key``, each draw passes it a fresh key (dropout).
      scale: standard deviation of the noise in units of the kernel, >= 0.
      kernel: ``kernel(key, params) -> perturbation``. Default:
        :func:`flatopt.kernels.isotropic`.
      num_samples: number of draws M.
      antithetic: evaluate each draw at +U and at -U.
      strategy: see :func:`smooth_value_and_grad`.

    Returns:
      A function ``f(key, params, /, *args, **kwargs) -> value``, a scalar.

    Raises:
      TypeError: if an argument has the wrong type, or ``params`` are not real floats.
      ValueError: if ``scale``, ``num_samples`` or ``strategy`` is out of range.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> loss_fn = lambda params: jnp.sum(params ** 2)
      >>> smoothed = flatopt.smooth(loss_fn, 0.1, flatopt.kernels.isotropic(
      ...     flatopt.kernels.signs), antithetic=True)
      >>> smoothed(jax.random.key(0), jnp.array([3.0, 4.0]))  # 25 + 2 * 0.1 ** 2
      Array(25.02, dtype=float32)
    """
    checks.check_function(value_fn, "value_fn", "value_fn(params)")
    signatures.check_order(value_fn, "value_fn")
    estimate = _estimator(value_fn, scale, kernel, num_samples, antithetic, strategy)

    def smoothed(key, params, /, *args, **kwargs):
        signatures.check_first(value_fn, kwargs, ())
        checks.check_random_key(key)
        dtypes = []

        def evaluate(perturbed, chunk, **sample):
            del chunk
            value = checks.check_value(value_fn(perturbed, *args, **kwargs, **sample))
            dtypes.append(value.dtype)
            return trees.widen(value), None

        value, _ = estimate(evaluate, key, params, {}, rematerialize=True)
        return (value / num_samples).astype(dtypes[0])

    return smoothed


def smooth_value_and_grad(
    value_fn: LossFn,
    scale: jax.typing.ArrayLike,
    kernel: KernelFn | None = None,
    *,
    num_samples: int = 1,
    antithetic: bool = False,
    batch_argnames: tuple[str, ...] = (),
    weight_fn: WeightFn | None = None,
    has_aux: bool = False,
    mask: Mask = None,
    noise_mask: Any = None,
    clean_weight: jax.typing.ArrayLike | None = None,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
) -> Callable[..., tuple[Any, Any]]:
    r"""Return the smoothed value and its gradient: the drop-in for value_and_grad.

    .. math:: g = \frac1M \sum_{j=1}^M \nabla L_{B_j}(\theta + \text{scale}\cdot U_j)

    With ``batch_argnames`` the batch is split into M chunks B_j, one a sample, so that
    a step costs one pass over the batch (LPF-SGD); without it every sample sees the
    whole batch. With ``antithetic`` each term is the mean of the gradients at +U_j and
    -U_j (NSO), so gradients cost ``2 * num_samples``. Values and gradients are
    accumulated in float32 (or wider) and cast back.

    Args:
      value_fn: ``value_fn(params, *args, **kwargs) -> scalar``, or ``(scalar, aux)``
        with ``has_aux``. If it names a keyword ``sample_key``, each draw passes it a
        fresh key, the same at +U and -U (dropout).
      scale: standard deviation of the noise in units of the kernel, >= 0; it may be
        traced.
      kernel: ``kernel(key, params) -> perturbation``. Default:
        :func:`flatopt.kernels.isotropic`.
      num_samples: number of draws M.
      antithetic: evaluate each draw at +U and at -U.
      batch_argnames: keyword arguments whose leading axis is split. Chunk j holds the
        examples j, j + M, j + 2M, ... Array leaves of ndim >= 1 are split, all else
        goes whole to every sample.
      weight_fn: weight of a chunk, from the chunk of the one argument in
        ``batch_argnames``, or from a dict of chunks if there are several; a scalar.
        Default: chunks count equally. A chunk of weight 0 contributes nothing; if all
        weights are 0 the result is NaN.
      has_aux: whether ``value_fn`` returns ``(value, aux)``. Leaves of ``aux`` gain
        leading axes ``(num_samples,)``, or ``(num_samples, 2)`` when antithetic; under
        ``axis_name`` they stay each device's own.
      mask: which leaves to differentiate: a tree prefix of bools, or a function of
        ``params`` that returns one, as in ``optax.masked``, or a pattern of paths such
        as ``"encoder/*/kernel"``. The gradient of the others is not computed; zeros
        stand for it.
      noise_mask: which leaves get noise, in the form of ``mask``; None: those of
        ``mask``. For noise on frozen weights with gradients for their adapters alone.
      clean_weight: weight c of the gradient at the parameters themselves, between 0 and 1;
        the smoothed one has 1 - c. It costs one gradient more; with ``batch_argnames`` it
        takes a chunk of its own, so that the batch is split into ``num_samples + 1``. Its
        aux is dropped. None: there is no clean pass.
      strategy: how samples are laid out. ``"vmap"``: all at once (fast where memory and
        matrix units are plenty). ``"scan"``: one after another in a loop.
        ``"unroll"``: one after another without a loop. An int: that many at once
        inside a loop. ``"auto"``: chosen by platform, from measurements. All agree on
        the same key.
      axis_name: inside ``jax.shard_map``, each device draws its own noise and value and
        gradients come back averaged over this axis, by one reduction of the gradient
        whatever ``num_samples``. Do not average them again.

    Returns:
      A function ``f(key, params, /, *args, **kwargs)`` that returns ``(value, grads)``,
      or ``((value, aux), grads)`` with ``has_aux``.

    Raises:
      TypeError: if an argument has the wrong type, ``params`` are not real floats, or
        ``value_fn`` does not return a scalar.
      ValueError: if an argument is out of range, a name in ``batch_argnames`` was not
        passed, a batch does not divide into ``num_samples`` chunks, or a mask is no
        prefix of ``params``.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, Algorithm 1; Zhang, Li, Ju,
      `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024, Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> loss_fn = lambda params, batch: jnp.mean((batch @ params) ** 2)
      >>> value_and_grad = flatopt.smooth_value_and_grad(
      ...     loss_fn, 0.01, flatopt.kernels.filterwise(), num_samples=4,
      ...     batch_argnames=("batch",))
      >>> value, grads = value_and_grad(
      ...     jax.random.key(0), jnp.ones(3), batch=jnp.eye(8, 3))
      >>> value.shape, grads.shape
      ((), (3,))
    """
    checks.check_function(value_fn, "value_fn", "value_fn(params)")
    signatures.check_order(value_fn, "value_fn")
    checks.check_weight_fn(weight_fn)
    names = checks.check_batch_argnames(batch_argnames, value_fn)
    if weight_fn is not None and not names:
        raise ValueError(
            f"weight_fn weighs the chunks of a batch, got {weight_fn!r} with no "
            "batch_argnames; name the arguments to split."
        )
    estimate = _estimator(value_fn, scale, kernel, num_samples, antithetic, strategy)

    if clean_weight is not None:
        checks.check_share(clean_weight, "clean_weight")
    has_clean_chunk = bool(names) and clean_weight is not None
    num_chunks = num_samples + has_clean_chunk
    count_name = "num_samples + 1" if has_clean_chunk else "num_samples"

    def value_and_grad(key, params, /, *args, **kwargs):
        signatures.check_first(value_fn, kwargs, names)
        chunks, whole = layout.split_batch(kwargs, names, num_chunks, count_name)
        free_flags, noise_flags = _flags(mask, noise_mask, params)
        checks.check_random_key(key)
        checks.check_axis_name(axis_name)
        free = checks.check_params(trees.select(params, free_flags))
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
            free = sharding.tree_varying(free, axis_name)
        whole_params = trees.merge(free, params, free_flags)

        def call(params, chunk, sample):
            return value_fn(params, *args, **whole, **chunk, **sample)

        evaluate, dtypes = _evaluation(call, free_flags, has_aux, weight_fn, names)
        totals, aux = estimate(evaluate, key, whole_params, chunks, noise_flags)
        if clean_weight is not None:
            options = signatures.sample_options(
                value_fn, random.fold_in(key, num_samples)
            )
            own = layout.chunk_at(chunks, num_samples)
            clean, _ = evaluate(whole_params, own, **options)
            axis = axis_name if weight_fn is not None else None
            totals = _mixed(clean, totals, clean_weight, axis)
        if axis_name is not None:
            totals = jax.lax.pmean(totals, axis_name)
        value, weight, grads = totals
        value = (value / weight).astype(dtypes[0])
        grads = jax.tree.map(
            lambda g, p: (g / weight.astype(g.dtype)).astype(p.dtype), grads, free
        )
        grads = trees.merge(grads, trees.zeros_like(params), free_flags)
        return ((value, aux), grads) if has_aux else (value, grads)

    return value_and_grad


def _evaluation(call, free_flags, has_aux, weight_fn, names):
    """Value, weight and gradient of one sample; and the dtypes of the values, as seen."""
    dtypes = []

    def value_of(free, perturbed, chunk, sample):
        out = call(trees.merge(free, perturbed, free_flags), chunk, sample)
        if not has_aux:
            return checks.check_value(out), None
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                "value_fn must return (value, aux) with has_aux=True, got "
                f"{checks.described(out)}; return a pair."
            )
        return checks.check_value(out[0]), out[1]

    def evaluate(perturbed, chunk, **sample):
        (value, aux), grads = jax.value_and_grad(value_of, has_aux=True)(
            trees.select(perturbed, free_flags), perturbed, chunk, sample
        )
        dtypes.append(value.dtype)
        value, grads = jax.tree.map(trees.widen, (value, grads))
        weight = jnp.ones((), value.dtype)
        if weight_fn is not None:
            only = chunk[names[0]] if len(names) == 1 else chunk
            weight = checks.check_weight(weight_fn(only)).astype(value.dtype)
            value, grads = jax.tree.map(
                lambda x: jnp.where(weight == 0, 0, weight.astype(x.dtype) * x),
                (value, grads),
            )
        return (value, weight, grads), aux

    return evaluate, dtypes


def _mixed(clean, noisy, clean_weight, axis_name):
    """The mean of two sums of values and gradients, as one sum of weight 1.

    Each sum is over its own weight on all devices. Where one has none, the other counts
    alone.
    """
    weights = clean[1], noisy[1]
    if axis_name is not None:
        weights = jax.lax.pmean(weights, axis_name)
    share = jnp.asarray(clean_weight).astype(weights[0].dtype)
    share = jnp.where(weights[1] == 0, 1, jnp.where(weights[0] == 0, 0, share))
    is_empty = (weights[0] == 0) & (weights[1] > 0)
    of_clean = share / jnp.where(is_empty, 1, weights[0])
    of_noisy = jnp.where(share == 1, 0, (1 - share) / weights[1])

    def mix(x, y):
        return of_clean.astype(x.dtype) * x + of_noisy.astype(y.dtype) * y

    value, grads = jax.tree.map(mix, (clean[0], clean[2]), (noisy[0], noisy[2]))
    return value, jnp.ones_like(clean[1]), grads


def _estimator(value_fn, scale, kernel, num_samples, antithetic, strategy):
    """Check what is static; return the sum over samples of any ``evaluate``."""
    checks.check_scale(scale)
    checks.check_count(num_samples)
    checks.check_strategy(strategy)
    kernel = kernels.isotropic() if kernel is None else kernel
    checks.check_kernel(kernel)

    def estimate(evaluate, key, params, chunks, noise_flags=None, rematerialize=False):
        noisy = checks.check_params(trees.select(params, noise_flags))
        draw = binding.bind(kernel, key, noisy, params)
        key_at = random.keys_of_draws(key, num_samples)

        def sample(index, chunk):
            noise_key = key_at(index)
            options = signatures.sample_options(value_fn, noise_key)

            def at(sign, noise):
                tree = _perturb(noisy, sign, scale, noise)
                return evaluate(
                    trees.merge(tree, params, noise_flags), chunk, **options
                )

            if not antithetic:
                return at(None, draw(noise_key))
            return layout.mean_of_pair(
                at, lambda *after: draw(_later(noise_key, *after))
            )

        return layout.sum_samples(sample, num_samples, chunks, strategy, rematerialize)

    return estimate


def _later(key, *values):
    """The same key, not to be used before the values are there."""
    if not values:
        return key
    data = random.key_data(key)
    data, _ = jax.lax.optimization_barrier((data, values))
    return random.same_kind(data, key)


def _flags(mask, noise_mask, params):
    """One flag a leaf for what is differentiated and for what gets noise; None: all."""
    free = None if mask is None else trees.mask_flags(mask, params)
    if noise_mask is None:
        return free, free
    return free, trees.mask_flags(noise_mask, params, "noise_mask")


def _perturb(params, sign, scale, noise):
    def perturb(leaf, unit):
        dtype = trees.wide(leaf.dtype)
        step = jnp.asarray(scale).astype(dtype) * unit.astype(dtype)
        if sign is not None:
            step = sign.astype(dtype) * step
        return (leaf.astype(dtype) + step).astype(leaf.dtype)

    return jax.tree.map(perturb, params, noise)
