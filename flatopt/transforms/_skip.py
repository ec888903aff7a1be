"""Skip steps that are not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt.transforms._ascent import AdversarialState
from flatopt.transforms._smooth import SmoothGradientsState


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
