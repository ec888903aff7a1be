"""Optax transformations that put the gradient of a smoothed loss into a chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _links, _random, _trees, kernels, smoothing
from flatopt._ascent import AdversarialState


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


class AntiPGDState(NamedTuple):
    """State of :func:`anti_pgd`: plain numeric arrays; the noise itself is not stored.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.anti_pgd(0.01).init(jnp.zeros(3)).count
      Array(0, dtype=int32)
    """

    count: jax.Array
    noise_key: jax.Array


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
    _links.check_key(key)

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        del updates
        _links.check_update(params, value_fn, "smooth_gradients")
        value_of, select, merge = _links.partition(value_fn, params, mask)
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
            _links.step_key(state, key),
            select(params),
            **_checks.forwarded(value_fn, extra_args),
        )
        updates = merge(grads, _links.zeros_like(params))
        return updates, advance(state, value)

    return optax.GradientTransformationExtraArgs(init_of(key), update_fn)


def anti_pgd(
    scale: jax.typing.ArrayLike | optax.Schedule,
    sampler: kernels.Sampler | None = None,
    *,
    mask: Any = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Anti-correlated noise: each step adds fresh noise and takes the last one away.

    .. math:: \theta_{t+1} = \theta_t + u_t + \xi_{t+1} - \xi_t, \qquad
        \xi_t = \text{scale}(t)\, U_t, \quad \xi_0 = 0

    with :math:`u_t` the update that comes in: put this link last in a chain, after the
    learning rate. The parameters without their noise, :math:`\theta_t - \xi_t`, follow
    gradients at noisy parameters: with SGD they are those of ``smooth_gradients(scale)``.
    The loss is to be looked at without the noise: a schedule that ends at 0 leaves none.

    Nothing is stored: the last noise is drawn again from its key.

    Args:
      scale: standard deviation of the noise: a number, a scalar array, or a schedule of
        the step count, >= 0.
      sampler: values of mean 0 and variance 1; None: standard normal.
      mask: a tree prefix of bools, or a function of ``params`` that returns one. Leaves
        masked out get no noise.
      key: an int or a JAX random key, read by ``init``.

    Returns:
      A transformation with state :class:`AntiPGDState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Orvieto, Kersting, Proske, Bach, Lucchi, `Anticorrelated Noise Injection for
      Improved Generalization <https://arxiv.org/abs/2202.02831>`_, ICML 2022.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(
      ...     optax.sgd(0.1), flatopt.anti_pgd(lambda count: jnp.where(count < 2, 0.1, 0)))
      >>> params = jnp.array([3.0, 4.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(2), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(float(p), 4) for p in params]  # two steps of -0.1; the noise is gone
      [2.8, 3.8]
    """
    if not callable(scale):
        _checks.check_scale(scale)
    _links.check_key(key)
    kernel = kernels.isotropic(kernels.normal if sampler is None else sampler)
    kernel = kernel if mask is None else kernels.masked(kernel, mask)

    def init_fn(params):
        del params
        return AntiPGDState(jnp.zeros((), jnp.int32), _links.key_data(key))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "anti_pgd needs params, got None; call tx.update(updates, state, params)."
            )
        stored = _links.stored_key(state, key)
        draw = _trees.bind(kernel, stored, params)

        def noise(count):
            factor = scale(count) if callable(scale) else scale
            _checks.check_scale(factor)
            factor = jnp.where(count == 0, 0.0, factor)
            return factor, draw(_random.fold_in(stored, count))

        count = optax.safe_increment(state.count)
        (old_scale, old), (new_scale, new) = noise(state.count), noise(count)

        def add(update, old, new):
            step = new_scale.astype(new.dtype) * new - old_scale.astype(old.dtype) * old
            return (_trees.widen(update) + step).astype(update.dtype)

        return jax.tree.map(add, updates, old, new), AntiPGDState(
            count, state.noise_key
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

        def choose(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        def keep(new, old):
            if isinstance(new, AdversarialState):
                return new._replace(memory=choose(new.memory, old.memory))
            return new if isinstance(new, SmoothGradientsState) else choose(new, old)

        inner_state = jax.tree.map(
            keep,
            new_state,
            state.inner_state,
            is_leaf=lambda x: isinstance(x, SmoothGradientsState | AdversarialState),
        )
        updates = jax.tree.map(
            lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates
        )
        num_skipped = state.num_skipped + jnp.where(finite, 0, 1)
        return updates, SkipNonfiniteState(inner_state, num_skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def init_of(key):
    """The ``init`` of a transformation with :class:`SmoothGradientsState`."""

    def init_fn(params):
        return SmoothGradientsState(
            count=jnp.zeros((), jnp.int32),
            noise_key=_links.key_data(key),
            smoothed_value=jnp.full((), jnp.inf, _links.value_dtype(params)),
        )

    return init_fn


def advance(state, value):
    """The state after a step that measured ``value``."""
    return SmoothGradientsState(
        count=optax.safe_increment(state.count),
        noise_key=state.noise_key,
        smoothed_value=value.astype(state.smoothed_value.dtype),
    )
