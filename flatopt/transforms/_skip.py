"""Skip steps that are not finite."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt.transforms import _link, _states


class SkipNonfiniteState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Inside of another one, its number of skipped steps and what advances in it advance.

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

    def after_skip(self, new):
        """The state after a skipped step: the number, and what advances inside."""
        return SkipNonfiniteState(
            after_skip(self.inner_state, new.inner_state), new.num_skipped
        )

    def metrics(self):
        """The number of steps skipped so far."""
        return {"num_skipped": self.num_skipped}


def skip_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Skip a step that is not finite: zero updates, state as it was.

    A step is skipped if the loss or the gradient of a link of flatopt, the updates or the
    new state hold an infinity or a NaN where there was none. So an optimizer that bounds
    its updates is guarded too: after ``optax.clip`` an infinite gradient looks like any.

    Of the state, links that make gradients advance their count and last loss, so that the
    next step draws other noise; :func:`track_stability` advances whole; all else stays,
    the state of the optimizer and of :func:`anti_pgd` among it. Each state says so.

    ``optax.apply_if_finite`` looks at the gradients that come in, which flatopt does not
    read: around flatopt it guards nothing.

    Args:
      inner: the transformation to guard, such as ``flatopt.lpf_sgd(0.1)``. Its state is
        that of ``init`` of this transformation: links in it keep one flag more.

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
    if not isinstance(inner, optax.MultiSteps):
        _link.check_transformation(inner, "skip_nonfinite")
    else:  # as a transformation it drops value_fn
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        with _states.watching():
            inner_state = inner.init(params)
        return SkipNonfiniteState(inner_state, jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        updates, new_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        finite = _are_gradients_finite(new_state) & _states.all_finite(updates)
        skipped_state = after_skip(state.inner_state, new_state)
        # All that advances at any rate is left out: a watching link may hold a NaN.
        finite &= _stayed_finite(skipped_state, new_state)
        inner_state = _where(finite, new_state, skipped_state)
        updates = _where(finite, updates, jax.tree.map(jnp.zeros_like, updates))
        num_skipped = state.num_skipped + jnp.where(finite, 0, 1)
        return updates, SkipNonfiniteState(inner_state, num_skipped)

    name = getattr(inner.update, "makes_gradient", None)
    if name is not None:
        update_fn = _link.makes_gradient(update_fn, name)
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def after_skip(old, new):
    """The state that a skipped step leaves: each part says what advances."""
    return jax.tree.map(
        lambda o, n: o.after_skip(n) if _speaks(o) else o, old, new, is_leaf=_speaks
    )


def _speaks(state):
    return hasattr(state, "after_skip")


def _are_gradients_finite(state):
    parts = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "is_finite"))
    flags = [x.is_finite for x in parts if hasattr(x, "is_finite")]
    return functools.reduce(jnp.logical_and, flags, jnp.array(True))


def _stayed_finite(old, new):
    """Whether no floating number of a state has ceased to be finite."""
    finite = jnp.array(True)
    for o, n in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.issubdtype(getattr(n, "dtype", None), jnp.inexact):
            finite &= (jnp.isfinite(n) | ~jnp.isfinite(o)).all()
    return finite


def _where(condition, tree, other):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)
