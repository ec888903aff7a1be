"""A link that watches curvature and stability along training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels
from flatopt._core import binding, blocks, checks, loops, random, signatures, vectors
from flatopt.curvature import _kinds, _operator
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

    count: jax.Array
    noise_key: jax.Array
    direction: Any
    max_eigenvalue: jax.Array
    trace: jax.Array
    frobenius_norm: jax.Array
    eigenvalue_margin: jax.Array
    frobenius_margin: jax.Array


def track_stability(
    learning_rate: jax.typing.ArrayLike | optax.Schedule,
    batch_size: int,
    *,
    every: int = 50,
    decay: float = 0.8,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Leave updates alone; keep curvature and stability margins in the state.

    At every ``every``-th update one product of the Hessian of the present batch is made:
    in turns a step of power iteration from the last direction, and a random probe of the
    trace and the Frobenius norm. Read the values with ``optax.tree.get(state,
    "max_eigenvalue")``. On a batch both are larger than on all data, by the noise between
    batches; the Frobenius norm is noisy in high dimension: take it for its trend.

    Cost: 2.4 to 4.4 gradients at every ``every``-th update. On CPU the branch slows the
    other updates too, by up to 20 %; where that counts, keep it out of the training step,
    with ``every=1``, and update it in a jitted function of its own every so often.

    Args:
      learning_rate: that of the optimizer, or its schedule, for the margins.
      batch_size: B, for the margins.
      every: number of updates between measurements, at least 1.
      decay: weight of the past in the moving averages, in [0, 1).
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
    checks.check_num_samples(batch_size, "batch_size")
    checks.check_num_samples(every, "every")
    checks.check_decay(decay)
    _link.check_key(key)

    def init_fn(params):
        unknown = jnp.full((), jnp.nan, _link.value_dtype(params))
        return TrackStabilityState(
            count=jnp.zeros((), jnp.int32),
            noise_key=_link.key_data(key),
            direction=_link.wide_zeros(params),
            max_eigenvalue=unknown,
            trace=jnp.copy(unknown),
            frobenius_norm=jnp.copy(unknown),
            eigenvalue_margin=jnp.copy(unknown),
            frobenius_margin=jnp.copy(unknown),
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        _link.check_update(params, value_fn, "track_stability", advice="")
        arguments = signatures.forwarded(value_fn, extra_args)
        step_key = _link.step_key(state, key)
        dtype = state.trace.dtype

        def measure():
            free = checks.check_params(params)
            turn = state.count // every
            options = signatures.sample_options(value_fn, random.fold_in(step_key, 1))
            draw = binding.bind(kernels.isotropic(kernels.signs), step_key, free)
            signs = _operator.like_wide(draw(step_key), free)
            is_power = turn % 2 == 0
            is_first = turn == 0
            vector = jax.tree.map(
                lambda s, d: jnp.where(is_power & ~is_first, d, s),
                signs,
                state.direction,
            )
            kind = _kinds.Hessian(
                lambda params: value_fn(params, **arguments, **options)
            )
            _, _, product = kind.linearize(free, None)
            found = blocks.widen(product(_operator.like_params(vector, free)))
            form = blocks.dot(vector, found).astype(dtype)
            square = blocks.dot(found, found).astype(dtype)
            direction, _ = vectors.normalize(found)
            length = blocks.dot(vector, vector).astype(dtype)

            def average(old, new):
                kept = jnp.where(jnp.isnan(old), new, decay * old + (1 - decay) * new)
                return jnp.where(is_power & ~is_first, old, kept)

            top = jnp.where(is_power, form / length, state.max_eigenvalue)
            norm = jnp.sqrt(average(state.frobenius_norm**2, square))
            rate = (
                learning_rate(state.count) if callable(learning_rate) else learning_rate
            )
            rate = jnp.asarray(rate).astype(dtype)
            return state._replace(
                direction=jax.tree.map(
                    lambda new, old: jnp.where(is_power, new, old),
                    direction,
                    state.direction,
                ),
                max_eigenvalue=top,
                trace=average(state.trace, form),
                frobenius_norm=norm,
                eigenvalue_margin=2 / rate / top,
                frobenius_margin=batch_size**0.5 / rate / norm,
            )

        state = loops.cond(state.count % every == 0, measure, lambda: state)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
