"""Optax transformations that put the gradient of a smoothed loss into a chain."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import _checks, _trees, smoothing


class SmoothGradientsState(NamedTuple):
    """State of :func:`smooth_gradients`: plain numeric arrays.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32; the noise of step ``count`` comes
        from this key folded with ``count``.
      smoothed_value: the last estimate of the smoothed loss, shape (), float32 or
        wider; infinite before the first update.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.smooth_gradients(0.01).init(jnp.zeros(3)).count
      Array(0, dtype=int32)
    """

    count: jax.Array
    noise_key: jax.Array
    smoothed_value: jax.Array


class SkipNonfiniteState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Attributes:
      inner_state: the state of the wrapped transformation.
      num_skipped: number of steps skipped so far, shape (), int32.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.skip_nonfinite(flatopt.nso_sgd(0.1))
      >>> tx.init(jnp.zeros(3)).num_skipped
      Array(0, dtype=int32)
    """

    inner_state: Any
    num_skipped: jax.Array


def smooth_gradients(
    scale: jax.typing.ArrayLike | optax.Schedule,
    kernel: Callable[..., Any] | None = None,
    *,
    num_samples: int | None = None,
    antithetic: bool = False,
    batch_argnames: tuple[str, ...] = (),
    weight_fn: Callable[[Any], jax.Array] | None = None,
    mask: Any = None,
    strategy: smoothing.Strategy = "auto",
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the gradient by that of the loss averaged over perturbed parameters.

    The noise follows from ``key`` alone: two optimizers made with the same ``key`` draw
    the same noise. The incoming gradients are not read: pass zeros
    (``optax.tree.zeros_like(params)``, free under jit), or None where no other link
    reads them. Put this link first; clipping, momentum, accumulation come after it.

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
      mask: a tree prefix of bools, or a function of ``params`` that returns one. Leaves
        masked out get no noise and are not differentiated; their update is zero.
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
    if not callable(scale):
        _checks.check_scale(scale)
    num_samples = 1 if num_samples is None else num_samples
    _checks.check_num_samples(num_samples)
    _checks.check_strategy(strategy)
    batch_argnames = _checks.check_names(batch_argnames)
    _check_key(key)

    def init_fn(params):
        return SmoothGradientsState(
            count=jnp.zeros((), jnp.int32),
            # A copy: the state may be donated, the caller's key must live on.
            noise_key=jnp.array(jax.random.key_data(_as_key(key)), copy=True),
            smoothed_value=jnp.full((), jnp.inf, _value_dtype(params)),
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        del updates
        _check_update(params, value_fn, "smooth_gradients")
        value_of, free, fill = _partition(value_fn, params, mask)
        value, grads = smoothing.smooth_value_and_grad(
            value_of,
            scale(state.count) if callable(scale) else scale,
            kernel,
            num_samples=num_samples,
            antithetic=antithetic,
            batch_argnames=batch_argnames,
            weight_fn=weight_fn,
            strategy=strategy,
            axis_name=axis_name,
        )(
            jax.random.fold_in(_stored_key(state.noise_key, key), state.count),
            free,
            **_checks.forwarded(value_fn, extra_args),
        )
        return fill(grads), SmoothGradientsState(
            count=optax.safe_increment(state.count),
            noise_key=state.noise_key,
            smoothed_value=value.astype(state.smoothed_value.dtype),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def skip_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Skip a step whose updates are not finite: zero updates, state as it was.

    Only the step count and last value of flatopt's own links still advance, so that the
    next step draws other noise. ``optax.apply_if_finite`` looks at the gradients that
    come in, which flatopt does not read: around flatopt it guards nothing. This one
    looks at the updates that come out.

    Args:
      inner: the transformation to guard, such as ``flatopt.lpf_sgd(0.1)``.

    Returns:
      A transformation with state :class:`SkipNonfiniteState`.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.skip_nonfinite(flatopt.nso_sgd(0.1))
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.nan * p.sum())
      >>> updates, state.num_skipped
      (Array([0., 0.], dtype=float32), Array(1, dtype=int32))
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return SkipNonfiniteState(inner.init(params), jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        updates, new_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        finite = jnp.array(True)
        for leaf in jax.tree.leaves(updates):
            finite &= jnp.isfinite(leaf).all()

        def keep(new, old):
            if isinstance(new, SmoothGradientsState):
                return new
            return jnp.where(finite, new, old)

        inner_state = jax.tree.map(
            keep,
            new_state,
            state.inner_state,
            is_leaf=lambda node: isinstance(node, SmoothGradientsState),
        )
        updates = jax.tree.map(
            lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates
        )
        num_skipped = state.num_skipped + jnp.where(finite, 0, 1)
        return updates, SkipNonfiniteState(inner_state, num_skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_typed(key):
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _check_key(key):
    whole = isinstance(key, int | np.integer) and not isinstance(key, bool)
    arrays = isinstance(key, jax.Array | np.ndarray) and (
        (_is_typed(key) and key.shape == ())
        or (jnp.issubdtype(key.dtype, jnp.integer) and key.shape in ((), (2,)))
    )
    if not (whole or arrays):
        raise TypeError(
            f"key must be an int or a single JAX random key, got {key!r}; write key=0 or "
            "key=jax.random.key(0)."
        )


def _as_key(key):
    if _is_typed(key):
        return key
    return jax.random.wrap_key_data(key) if np.ndim(key) else jax.random.key(key)


def _stored_key(data, key):
    """The key whose raw data the state holds, of the same generator as ``key``."""
    impl = jax.random.key_impl(key) if _is_typed(key) else None
    return jax.random.wrap_key_data(data, impl=impl)


def _value_dtype(params):
    dtypes = [getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(params)]
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def _check_update(params, value_fn, name):
    if params is None:
        raise ValueError(
            f"{name} needs params, got None; call "
            "tx.update(grads, state, params, value_fn=loss_fn)."
        )
    if value_fn is None:
        raise ValueError(
            f"{name} needs value_fn, which was not passed; call "
            "tx.update(grads, state, params, value_fn=loss_fn, batch=batch) with "
            "loss_fn(params, batch), and note that Flax Linen's TrainState drops it."
        )
    if not callable(value_fn):
        raise TypeError(
            f"value_fn must be a function of params, got {value_fn!r}; pass the loss "
            "function itself, not its value."
        )
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            f"params hold MaskedNodes, which value_fn cannot take: optax.masked or "
            f"optax.partition is around {name}; put {name} outside of them and pass it "
            "mask= instead."
        )


def _partition(value_fn, params, mask):
    """The parameters to differentiate, by a mask.

    Returns ``value_fn`` of the free parameters alone, the free parameters (None
    in place of the others, so that paths stay), and a function that fills their
    gradients up with zeros.
    """
    if mask is None:
        return value_fn, params, lambda grads: grads
    flags = _trees.mask_flags(mask, params)
    leaves, treedef = jax.tree.flatten(params)
    free = treedef.unflatten(
        [leaf if flag else None for leaf, flag in zip(leaves, flags, strict=True)]
    )

    def fill_with(others):
        def fill(tree):
            given = treedef.flatten_up_to(tree)
            return treedef.unflatten(
                [
                    ours if flag else other
                    for ours, other, flag in zip(given, others, flags, strict=True)
                ]
            )

        return fill

    merge = fill_with(leaves)

    @functools.wraps(value_fn)
    def value_of(free, **kwargs):
        return value_fn(merge(free), **kwargs)

    return (
        value_of,
        free,
        fill_with([jnp.zeros_like(x) if hasattr(x, "dtype") else x for x in leaves]),
    )
