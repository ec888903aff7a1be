"""IVON: a Gaussian around the parameters is learned, and its mean is what is trained."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels
from flatopt._core import binding, checks, layout, random, trees, vectors
from flatopt._core.types import AxisName, Key, Mask, Strategy
from flatopt.transforms import _link, _states

Number = jax.typing.ArrayLike


class IVONState(NamedTuple):
    """State of :func:`ivon`: plain numeric arrays.

    Leaves masked out have None in ``momentum`` and ``hess``. After a step that
    :func:`skip_nonfinite` skips, count and loss advance, so that the next step draws other
    noise; momentum and curvature stay.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32.
      smoothed_value: the last estimate of the loss averaged over the posterior, shape (),
        float32 or wider; infinite before the first update.
      momentum: moving average of the gradient, float32 or wider.
      hess: the estimate of the curvature h, in the same types.
      ess: the effective sample size, shape ().
      weight_decay: the precision of the prior over ``ess``, shape ().
      is_finite: inside of :func:`skip_nonfinite` whether loss and update are finite,
        shape (), bool; elsewhere ``()``.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.ivon(0.1, ess=1000).init(jnp.zeros(3)).hess
      Array([1., 1., 1.], dtype=float32)
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    noise_key: jax.Array
    smoothed_value: jax.Array
    momentum: Any = ()
    hess: Any = ()
    ess: Any = ()
    weight_decay: Any = ()
    is_finite: Any = ()

    @property
    def memory(self):
        """What is learned, and what it was learned with."""
        return self.momentum, self.hess, self.ess, self.weight_decay

    def with_memory(self, memory):
        """The state with another memory."""
        momentum, hess, ess, weight_decay = memory
        return self._replace(
            momentum=momentum, hess=hess, ess=ess, weight_decay=weight_decay
        )

    def after_skip(self, new):
        """The state after a skipped step: all but the memory advances."""
        return _states.advanced(new).with_memory(self.memory)

    def metrics(self):
        """The loss measured last."""
        return {"loss": self.smoothed_value}


def ivon(
    learning_rate: optax.ScalarOrSchedule,
    ess: Number,
    *,
    hess_init: Number = 1.0,
    beta1: Number = 0.9,
    beta2: Number = 0.99999,
    weight_decay: Number = 1e-4,
    num_samples: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    clip_radius: Number = math.inf,
    rescale_lr: bool = True,
    mask: Mask = None,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""IVON: variational learning of a Gaussian posterior, at the cost of Adam.

    The posterior is :math:`N(m, 1 / (\lambda (h + \delta)))`, with m the parameters and h a
    curvature for each of them, learned from where the gradients point at the noise. With
    draws :math:`e_j`, gradients :math:`g_j = \nabla L(m + e_j)` and their mean g,

    .. math::
        f &= \lambda\, \overline{e_j \odot g_j} \odot (h + \delta) \\
        v &\leftarrow \beta_1 v + (1 - \beta_1)\, g \\
        h &\leftarrow \beta_2 h + (1 - \beta_2) f
            + \tfrac12 (1 - \beta_2)^2 (h - f)^2 / (h + \delta) \\
        m &\leftarrow m - \alpha (h_0 + \delta)\, \operatorname{clip}
            \frac{v / (1 - \beta_1^t) + \delta m}{h + \delta}

    This is a whole optimizer, not a link. The noise is what the curvature is learned from:
    so there is no ``noise_mask``, ``clean_weight`` or ``start_step``. Evaluate at the
    parameters, the mean; for uncertainty average predictions over
    :func:`sample_posterior`. The first steps want a warm-up of the learning rate, and a
    schedule that decays to zero suits it.

    Cost of a step: ``num_samples`` gradients of the batch, or 1 with ``batch_argnames``.
    State: two parameter sizes, in float32 or wider.

    Args:
      learning_rate: a number or a schedule; about that of SGD with momentum.
      ess: effective sample size :math:`\lambda`, > 0: the number of training examples;
        less for a wider posterior. ``value_fn`` is the mean loss.
      hess_init: :math:`h_0 > 0`, the curvature to begin with: the smaller, the larger the
        first noise.
      beta1: decay of the momentum, in [0, 1).
      beta2: decay of the curvature, in [0, 1).
      weight_decay: :math:`\delta \ge 0`, the precision of the prior over ``ess``.
      num_samples: number of draws a step; None: 1.
      batch_argnames: names of the extra arguments whose leading axis is split, one chunk a
        draw: more draws at one gradient of the batch.
      clip_radius: bound of each entry of the step before the learning rate, > 0.
      rescale_lr: whether the learning rate is multiplied by :math:`h_0 + \delta`, so that
        the first steps are those of SGD.
      mask: a tree prefix of bools, a function of ``params`` that returns one, or a
        pattern of paths such as ``"encoder/*/kernel"``. Leaves masked out get neither
        noise nor updates, and have no state.
      strategy: layout of the draws, see :func:`smooth_value_and_grad`.
      axis_name: axis of ``jax.shard_map`` to average over; each device draws its own
        noise.
      key: an int or a JAX random key, read by ``init``.

    Returns:
      A transformation with state :class:`IVONState`; its ``update`` takes ``value_fn``, as
      :func:`smooth_gradients`. Under ``optax.inject_hyperparams`` name ``beta2`` in
      ``static_args``: in float32 the distance of 0.99999 from 1 is 0.1 % off.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Shen, Daheim, Cong, Nickl, Marconi, Bazan, Yokota, Gurevych, Cremers, Khan,
      Möllenhoff, `Variational Learning is Effective for Large Deep Networks
      <https://arxiv.org/abs/2402.17641>`_, ICML 2024, Algorithm 1, as in the authors' code.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flatopt
      >>> tx = flatopt.ivon(0.1, ess=1e6)
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 1) for u in updates]
      [-0.3, -0.4]
      >>> flatopt.sample_posterior(jax.random.key(0), params, state).shape
      (2,)
    """
    options = _Options(
        learning_rate,
        ess,
        hess_init,
        beta1,
        beta2,
        weight_decay,
        clip_radius,
        rescale_lr,
    )
    _check(options)
    num_samples = 1 if num_samples is None else num_samples
    checks.check_count(num_samples)
    checks.check_strategy(strategy)

    def init_memory(params):
        zeros = _link.wide_zeros(params)
        hess = jax.tree.map(lambda z: z + jnp.asarray(hess_init).astype(z.dtype), zeros)
        return zeros, hess, *_scalars(options, params)

    def finish(step, result):
        return _finish(step, result, options)

    tx = _link.link(
        "ivon",
        IVONState,
        lambda step: _estimate(step, num_samples, strategy),
        mask=mask,
        key=key,
        num_chunks=num_samples,
        batch_argnames=batch_argnames,
        axis_name=axis_name,
        init_memory=init_memory,
        is_memory_of_free=True,
        finish=finish,
    )
    tx.update.is_optimizer = True
    return tx


class _Options(NamedTuple):
    learning_rate: Any
    ess: Any
    hess_init: Any
    beta1: Any
    beta2: Any
    weight_decay: Any
    clip_radius: Any
    rescale_lr: bool


def _check(options):
    if not callable(options.learning_rate):
        checks.check_scale(options.learning_rate, "learning_rate")
    for name in ("ess", "hess_init"):
        checks.check_positive(getattr(options, name), name)
    for name in ("beta1", "beta2"):
        checks.check_decay(getattr(options, name), name)
    checks.check_scale(options.weight_decay, "weight_decay")
    if not _is_infinite(options.clip_radius):
        checks.check_positive(options.clip_radius, "clip_radius")
    if not isinstance(options.rescale_lr, bool):
        raise TypeError(
            f"rescale_lr must be a bool, got {options.rescale_lr!r}; it says whether the "
            "learning rate is in units of the first curvature."
        )


def _is_infinite(radius):
    is_number = isinstance(radius, numbers.Real | jax.Array) and jnp.ndim(radius) == 0
    return is_number and not isinstance(radius, jax.core.Tracer) and radius == math.inf


def _scalars(options, params):
    dtype = _link.value_dtype(params)
    return [jnp.asarray(x).astype(dtype) for x in (options.ess, options.weight_decay)]


def _deviations(hess, ess, weight_decay):
    """Standard deviations of the posterior."""
    return jax.tree.map(
        lambda h: jax.lax.rsqrt(
            ess.astype(h.dtype) * (h + weight_decay.astype(h.dtype))
        ),
        hess,
    )


def _estimate(step, num_samples, strategy):
    """Loss and gradient averaged over draws, and the mean of noise times gradient."""
    _, *posterior = step.memory
    deviations = _deviations(*posterior)
    draw = binding.bind(kernels.isotropic(), step.key, step.params)

    def sample(index, chunk):
        key = random.fold_in(step.key, index)
        noise = jax.tree.map(lambda z, d: z.astype(d.dtype) * d, draw(key), deviations)
        # It moves the parameters and meets their gradient: drawn once for both.
        noise = jax.lax.optimization_barrier(noise)
        value, grads = jax.value_and_grad(lambda p: step.value(p, key, chunk))(
            vectors.move(step.params, noise)
        )
        value, grads = jax.tree.map(trees.widen, (value, grads))
        return (value, (grads, jax.tree.map(jnp.multiply, noise, grads))), None

    total, _ = layout.sum_samples(
        sample, num_samples, step.chunks, strategy, rematerialize=False
    )
    return *jax.tree.map(lambda x: x / num_samples, total), ()


def _finish(step, result, options):
    """Loss, update and new memory, from what all devices measured together."""
    value, (grads, products), _ = result
    momentum, hess, _, _ = step.memory
    ess, weight_decay = _scalars(options, step.params)
    rate = _link.at_step(options.learning_rate, step.count, "learning_rate")
    rate = jnp.asarray(rate).astype(ess.dtype)
    if options.rescale_lr:
        rate *= jnp.asarray(options.hess_init).astype(ess.dtype) + weight_decay
    # As distances from 1: a decay near it has few digits in float32.
    new, new_hess = (1 - beta for beta in (options.beta1, options.beta2))
    decayed = jnp.asarray(options.beta1).astype(ess.dtype)
    correction = 1 - decayed ** (step.count + 1).astype(ess.dtype)

    def curvature(h, product):
        damped = h + weight_decay.astype(h.dtype)
        change = ess.astype(h.dtype) * product * damped - h
        part = jnp.asarray(new_hess).astype(h.dtype) * change
        return h + part + jnp.square(part) / (2 * damped)

    def update(p, v, h):
        decay = weight_decay.astype(h.dtype)
        mean = v / correction.astype(v.dtype) + decay * p.astype(v.dtype)
        ratio = mean / (h + decay)
        if not _is_infinite(options.clip_radius):
            radius = jnp.asarray(options.clip_radius).astype(v.dtype)
            ratio = jnp.clip(ratio, -radius, radius)
        return -rate.astype(v.dtype) * ratio

    momentum = vectors.add(momentum, new, jax.tree.map(jnp.subtract, grads, momentum))
    hess = jax.tree.map(curvature, hess, products)
    updates = jax.tree.map(update, step.params, momentum, hess)
    return value, updates, (momentum, hess, ess, weight_decay)
