"""Larger steps along flat directions, as a link after the optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, loops, sharding, signatures, trees, vectors
from flatopt._core.types import AxisName, Key, Mask, ScalarOrSchedule
from flatopt.transforms import _link, _states


class IREState(NamedTuple):
    """State of :func:`ire`: plain arrays.

    After a step that :func:`skip_nonfinite` skips nothing advances.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32.
      is_flat: which coordinates take larger steps, bools like the parameters; None for
        leaves masked out.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.ire(1.0, 0.2).init(jnp.zeros(3)).is_flat
      Array([False, False, False], dtype=bool)
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    noise_key: jax.Array
    is_flat: Any


def ire(
    kappa: ScalarOrSchedule,
    sharp_share: jax.typing.ArrayLike,
    *,
    every: int = 10,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Implicit regularization enhancement: larger steps along flat coordinates.

    .. math:: u_i \leftarrow (1 + \kappa\, [\,i \text{ is flat}\,])\, u_i

    with :math:`u` the update that comes in: put this link after the optimizer. Flat are
    all coordinates but the share ``sharp_share`` with the largest :math:`|g_i|`, the
    diagonal of the empirical Fisher matrix in place of the curvature. The gradient g is
    that of the batch at the parameters, taken at every ``every``-th update, beginning with
    the first; one that is not finite is left out. Coordinates that tie with the last flat
    one are flat too.

    Cost: one gradient at every ``every``-th update.

    Args:
      kappa: how much larger the steps are: a number, a scalar array or a schedule, >= 0.
      sharp_share: share of sharp coordinates, between 0 and 1, over all leaves together.
      every: number of updates between measurements, at least 1.
      mask: a tree prefix of bools, a function of ``params`` that returns one, or a
        pattern of paths such as ``"encoder/*/kernel"``. The updates of leaves masked out
        stay as they are.
      axis_name: axis of ``jax.shard_map`` that splits the batch.
      key: an int or a JAX random key, read by ``init``; it matters only if ``value_fn``
        names ``sample_key``.

    Returns:
      A transformation with state :class:`IREState`; its ``update`` needs ``params`` and
      ``value_fn`` with the batch, as :func:`smooth_gradients`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Wang, He, Wang, Wang, Huang, Xiong, Li, E, Wu, `Improving Generalization and
      Convergence by Enhancing Implicit Regularization
      <https://arxiv.org/abs/2405.20763>`_, NeurIPS 2024; by :math:`|g|` as in the
      authors' code.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(optax.sgd(0.1), flatopt.ire(2.0, 0.5))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     params, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> [round(float(u), 3) for u in updates]
      [-0.9, -0.4]
    """
    if not callable(kappa):
        checks.check_scale(kappa, "kappa")
    checks.check_share(sharp_share, "sharp_share")
    checks.check_count(every, "every")
    _link.check_key(key)

    def init_fn(params):
        _link.check_mask(mask, params)
        free = params
        if jax.tree.leaves(params):
            free = _link.selection(params, mask)[0](params)
        flags = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.bool), free)
        return IREState(jnp.zeros((), jnp.int32), _link.key_data(key), flags)

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        _link.check_update(params, value_fn, "ire")
        checks.check_axis_name(axis_name)
        value_of, select, merge = _link.partition(value_fn, params, mask)
        free = checks.check_params(select(params))
        arguments = signatures.forwarded(value_fn, extra_args)
        step_key = _link.step_key(state, key)

        def measure():
            with signatures.naming_what_lacks(value_fn, arguments, extra_args):
                grads = _gradient(value_of, free, arguments, step_key, axis_name)
            found = _are_flat(grads, sharp_share)
            is_finite = _states.all_finite(grads)
            return jax.tree.map(
                lambda new, old: jnp.where(is_finite, new, old), found, state.is_flat
            )

        flags = loops.cond(state.count % every == 0, measure, lambda: state.is_flat)
        factor = 1 + jnp.asarray(_link.at_step(kappa, state.count, "kappa"))

        def enlarge(update, flag):
            wide = trees.widen(update)
            return jnp.where(flag, factor.astype(wide.dtype) * wide, wide).astype(
                update.dtype
            )

        enlarged = merge(jax.tree.map(enlarge, select(updates), flags), updates)
        count = optax.safe_increment(state.count)
        return enlarged, IREState(count, state.noise_key, flags)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _gradient(value_of, params, arguments, key, axis_name):
    """The gradient of the batch of all devices of the axis, float32 or wider."""
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        params = sharding.tree_varying(params, axis_name)
    options = signatures.sample_options(value_of, key)
    grads = jax.grad(
        lambda params: checks.check_value(value_of(params, **arguments, **options))
    )(params)
    grads = jax.tree.map(trees.widen, grads)
    return grads if axis_name is None else jax.lax.pmean(grads, axis_name)


def _are_flat(grads, sharp_share):
    """Which coordinates are not among the share of the largest magnitudes.

    The smallest threshold that keeps enough of them is found bit by bit: floats of one
    sign are in the order of their bits. Nothing is sorted or moved between devices.
    """
    largest = vectors.largest(grads)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)

    def bits(leaf):
        share = jnp.abs(leaf) / unit.astype(leaf.dtype)
        return jax.lax.bitcast_convert_type(share.astype(jnp.float32), jnp.int32)

    tree = jax.tree.map(bits, grads)
    leaves = jax.tree.leaves(tree)
    size = sum(leaf.size for leaf in leaves)
    wanted = jnp.round((1 - jnp.asarray(sharp_share, jnp.float32)) * size)

    def count(threshold):
        parts = [jnp.sum(leaf <= threshold, dtype=jnp.int32) for leaf in leaves]
        return sum((part.astype(jnp.float32) for part in parts), jnp.float32(0))

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        is_enough = count(middle) >= wanted
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    infinity = jnp.int32(0x7F800000)
    _, threshold = loops.repeat(halve, (jnp.int32(-1), infinity), 31)
    return jax.tree.map(lambda leaf: (leaf <= threshold) & (wanted > 0), tree)
