"""A link that watches curvature and stability along training."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import kernels
from flatopt._core import (
    binding,
    blocks,
    checks,
    linear,
    loops,
    random,
    sharding,
    signatures,
    vectors,
)
from flatopt._core.types import AxisName, Key, Mask, ScalarOrSchedule
from flatopt.transforms import _link


class TrackStabilityState(NamedTuple):
    r"""State of :func:`track_stability`: plain numeric arrays.

    After a step that :func:`skip_nonfinite` skips all of it advances: it watches, and a
    measurement that is not finite is not kept.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32.
      direction: the present direction of the power iteration, like the parameters.
      max_eigenvalue: the curvature along it, shape (); NaN before the first measurement.
      trace: moving average of the trace, shape ().
      frobenius_norm: root of the moving average of the squared norm, shape ().
      eigenvalue_margin: :math:`(2 / \eta) / \lambda_{max}`; below 1 gradient descent
        leaves.
      frobenius_margin: :math:`(\sqrt{B} / \eta) / \|H\|_F`; below 1 SGD with noise
        aligned as :math:`\mu = 1` leaves.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.track_stability(0.1, 32).init(jnp.zeros(3)).count
      Array(0, dtype=int32)
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    noise_key: jax.Array
    direction: Any
    max_eigenvalue: jax.Array
    trace: jax.Array
    frobenius_norm: jax.Array
    eigenvalue_margin: jax.Array
    frobenius_margin: jax.Array

    def after_skip(self, new):
        """The state after a skipped step: all of it advances."""
        return new

    def metrics(self):
        """Curvature and margins."""
        names = ("max_eigenvalue", "trace", "frobenius_norm")
        margins = ("eigenvalue_margin", "frobenius_margin")
        return {name: getattr(self, name) for name in names + margins}


def track_stability(
    learning_rate: ScalarOrSchedule,
    batch_size: int,
    *,
    every: int = 50,
    decay: float = 0.8,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Leave updates alone; keep curvature and stability margins in the state.

    At every ``every``-th update one product of the Hessian of the present batch is made:
    in turns a step of power iteration from the last direction, and a random probe of the
    trace and the Frobenius norm. Read the values with ``optax.tree.get(state,
    "max_eigenvalue")``. The iteration finds the eigenvalue of the largest size: far from a
    minimum that may be a negative one, and so is its margin. On a batch eigenvalue and norm
    are larger than on all data, by the noise between batches; the Frobenius norm is noisy
    in high dimension: take it for its trend. A batch whose product is not finite is left
    out; a zero one sets the eigenvalue to zero until the next measurement, and the averages
    only if that is zero too.

    Cost: 2.4 to 4.4 gradients at every ``every``-th update. On CPU the branch slows the
    other updates too, by up to 20 %; where that counts, keep it out of the training step,
    with ``every=1``, and update it in a jitted function of its own every so often.

    Args:
      learning_rate: that of the optimizer, or its schedule, for the margins. A schedule
        is read at the number of updates: with accumulation, give one of microbatches.
      batch_size: B, for the margins.
      every: number of updates between measurements, at least 1.
      decay: weight of the past in the moving averages, in [0, 1).
      mask: a tree prefix of bools, a function of ``params`` that returns one, or a
        pattern of paths such as ``"encoder/*/kernel"``: the curvature is that of the
        leaves where it is True. Integers and random keys among the parameters are to be
        masked out.
      axis_name: axis of ``jax.shard_map`` that splits the batch; the curvature is then
        that of the whole batch. Without it, under ``jax.shard_map``, a loss that may
        differ between devices is an error.
      key: an int or a JAX random key, read by ``init``.

    Returns:
      A transformation with state :class:`TrackStabilityState`; its ``update`` needs
      ``params`` and ``value_fn`` with the batch, as :func:`smooth_gradients`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Wu, Wang, Su, `The Alignment Property of SGD Noise
      <https://arxiv.org/abs/2207.02628>`_, NeurIPS 2022; Cohen, Kaur, Li, Kolter,
      Talwalkar, `Gradient Descent on Neural Networks Typically Occurs at the Edge of
      Stability <https://arxiv.org/abs/2103.00065>`_, ICLR 2021.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.track_stability(0.1, 32, every=1), optax.sgd(0.1))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     _, state = tx.update(
      ...         jnp.ones(3), state, params, value_fn=lambda p: jnp.sum(p ** 2))
      >>> round(float(optax.tree.get(state, "max_eigenvalue")), 3)
      2.0
    """
    if not callable(learning_rate):
        checks.check_scale(learning_rate, "learning_rate")
    checks.check_count(batch_size, "batch_size")
    checks.check_count(every, "every")
    checks.check_decay(decay)
    _link.check_key(key)

    def init_fn(params):
        _link.check_mask(mask, params)
        return TrackStabilityState(
            jnp.zeros((), jnp.int32),
            _link.key_data(key),
            _link.wide_zeros(params),
            *[_link.unknown(params, np.nan) for _ in range(5)],
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        if linear.is_read():
            return updates, state
        _link.check_update(params, value_fn, "track_stability")
        checks.check_axis_name(axis_name)
        value_of, select, merge = _link.partition(value_fn, params, mask)
        free = checks.check_params(select(params))
        arguments = signatures.forwarded(value_fn, extra_args)
        step_key = _link.step_key(state, key)

        def measure():
            with signatures.naming_what_lacks(value_fn, arguments, extra_args):
                product = _hessian_product(
                    value_of, free, arguments, step_key, axis_name
                )
            signs = binding.bind(kernels.isotropic(kernels.signs), step_key, free)
            before = state._replace(direction=select(state.direction))
            after = _measure(
                before, signs(step_key), product, state.count // every % 2 == 0, decay
            )
            rate = _link.at_step(learning_rate, state.count, "learning_rate")
            rate = jnp.asarray(rate).astype(after.trace.dtype)
            return after._replace(
                direction=merge(after.direction, state.direction),
                eigenvalue_margin=2 / rate / after.max_eigenvalue,
                frobenius_margin=batch_size**0.5 / rate / after.frobenius_norm,
            )

        state = loops.cond(state.count % every == 0, measure, lambda: state)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(
        init_fn, _link.keeps_updates(update_fn)
    )


def _hessian_product(value_of, params, arguments, key, axis_name):
    """``product(vector)`` with the Hessian of the loss, of all devices of the axis."""
    sample_key = random.fold_in(key, 1)
    if axis_name is not None:
        sample_key = jax.random.fold_in(sample_key, jax.lax.axis_index(axis_name))
        params = sharding.tree_varying(params, axis_name)
    # Imported here: most training scripts watch no curvature, and need not wait for it.
    from flatopt.curvature import _kinds, _operator

    options = signatures.sample_options(value_of, sample_key)
    kind = _kinds.Hessian(lambda params: value_of(params, **arguments, **options))
    value, _, linear = kind.linearize(params, None)
    if axis_name is None:
        _check_devices(value)

    def product(vector):
        vector = _operator.like_params(vector, params)
        if axis_name is None:
            return blocks.widen(linear(vector))
        vector = sharding.tree_varying(vector, axis_name)
        return jax.lax.pmean(blocks.widen(linear(vector)), axis_name)

    return product


def _check_devices(value):
    """Refuse the loss of one device's batch, where types or the lack of them tell."""
    axes = sharding.manual_axes()
    varying = sharding.varying_axes(jax.typeof(value))
    if not axes or (not varying and sharding.tracks_varying(axes)):
        return
    # Without check_vma nothing says whether devices have batches of their own.
    name = (varying or axes)[0]
    raise ValueError(
        "track_stability needs an axis_name inside jax.shard_map, got none and a loss "
        f"that may differ between the devices of {name!r}; give it axis_name={name!r} "
        "for the curvature of the whole batch."
    )


def _measure(state, signs, product, is_power_turn, decay):
    """The state after one product: a step of power iteration, or a random probe.

    What is not finite is not kept. A product of zero (an empty batch) sets the eigenvalue
    to zero and leaves the averages and the direction; the next measurement goes on from
    there. A second one in a row is the truth of a flat loss, and takes all.
    """
    dtype = state.trace.dtype
    old = state.max_eigenvalue
    has_direction = functools.reduce(
        jnp.logical_or,
        [jnp.any(d != 0) for d in jax.tree.leaves(state.direction)],
        jnp.array(False),
    )
    is_zero_before = old == 0
    is_power = has_direction & (is_power_turn | is_zero_before)
    vector = jax.tree.map(
        lambda s, d: jnp.where(is_power, d, s.astype(d.dtype)), signs, state.direction
    )
    found = product(vector)
    form = vectors.dot(vector, found).astype(dtype)
    length = vectors.dot(vector, vector).astype(dtype)
    direction, size = vectors.normalize(found)
    size = size.astype(dtype)

    is_usable = jnp.isfinite(form) & jnp.isfinite(size)
    is_zero = size == 0
    is_flat = is_zero & is_zero_before
    is_known = jnp.isfinite(state.frobenius_norm) & (state.frobenius_norm > 0)
    takes_top = is_usable & (is_power | ~has_direction | is_zero)
    takes_average = is_usable & (~is_power | is_flat) & (~is_zero | is_flat | ~is_known)

    old_trace = jnp.where(is_known, state.trace, 0.0)  # of a NaN nothing is computed
    old_norm = jnp.where(is_known, state.frobenius_norm, 0.0)

    def average(old, new):
        kept = decay * old + (1 - decay) * new
        return jnp.where(is_known, kept, new)

    def turn(new, old):
        takes_new = is_usable & ~is_zero & (is_power | ~has_direction)
        return jnp.where(takes_new, new, jnp.where(is_flat, jnp.zeros_like(old), old))

    # Over the larger of the two, so that squares neither underflow nor overflow.
    largest = jnp.maximum(old_norm, size)
    unit = jnp.where(largest > 0, largest, 1.0)
    squares = average((old_norm / unit) ** 2, (size / unit) ** 2)
    norm = largest * jnp.sqrt(squares)
    return state._replace(
        direction=jax.tree.map(turn, direction, state.direction),
        max_eigenvalue=jnp.where(takes_top, form / jnp.maximum(length, 1e-30), old),
        trace=jnp.where(takes_average, average(old_trace, form), state.trace),
        frobenius_norm=jnp.where(takes_average, norm, state.frobenius_norm),
    )
