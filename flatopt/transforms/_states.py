"""States of the links that make a gradient, and what a state can say of itself.

A state of any transformation may have two methods, which those that wrap it ask for:

``after_skip(new)``: the state after a step that was skipped, from the one that the step
would have left; without this method nothing advances.

``metrics()``: a dict of what was measured last, by name.

The states here have three fields first: count, key and loss.
"""

import contextlib
import contextvars
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_is_watched = contextvars.ContextVar("_is_watched", default=False)


@contextlib.contextmanager
def watching():
    """States made inside say of each gradient whether it was finite.

    Elsewhere that is not computed: it reads every gradient once more.
    """
    token = _is_watched.set(True)
    try:
        yield
    finally:
        _is_watched.reset(token)


def initial_flag():
    return jnp.array(True) if _is_watched.get() else ()


def flag(state, value, grads):
    """Whether value and gradient are finite, if the state is to say so."""
    if isinstance(state.is_finite, tuple):
        return ()
    return all_finite((value, grads))


def all_finite(tree):
    """Whether every floating number of a tree is finite, shape ()."""
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(getattr(leaf, "dtype", None), jnp.inexact):
            finite &= jnp.isfinite(leaf).all()
    return finite


def advanced(new):
    """The state that a step would have left, of which the next one starts afresh."""
    if isinstance(new.is_finite, tuple):
        return new
    return new._replace(is_finite=jnp.ones_like(new.is_finite))


def known(name, value):
    """A measurement under its name, where a state keeps it."""
    return {} if isinstance(value, tuple) else {name: value}


class SmoothGradientsState(NamedTuple):
    """State of :func:`smooth_gradients`: plain numeric arrays.

    After a step that :func:`skip_nonfinite` skips all but the memory advances: the next
    step draws other noise.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32; the noise of step ``count`` comes
        from this key folded with ``count``.
      smoothed_value: the last estimate of the smoothed loss, shape (), float32 or
        wider; infinite before the first update.
      memory: what :func:`arwp_gradients` keeps between steps; elsewhere ``()``.
      is_finite: inside of :func:`skip_nonfinite` whether loss and gradient of the step
        are finite, shape (), bool; elsewhere ``()``.
      last_scale: the scale of the noise of the last update, shape (), float32 or wider;
        0 before the first one and before ``start_step``.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.smooth_gradients(0.01).init(jnp.zeros(3)).count
      Array(0, dtype=int32)
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    noise_key: jax.Array
    smoothed_value: jax.Array
    memory: Any = ()
    is_finite: Any = ()
    last_scale: Any = ()

    def after_skip(self, new):
        """The state after a skipped step: all but the memory advances."""
        return advanced(new)._replace(memory=self.memory)

    def metrics(self):
        """The loss measured last, and the scale of its noise."""
        return {"loss": self.smoothed_value, **known("scale", self.last_scale)}


class AdversarialState(NamedTuple):
    """State of the sharpness-aware transformations: plain numeric arrays.

    After a step that :func:`skip_nonfinite` skips all but the memory advances.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32.
      clean_value: the loss at the parameters before the last step, shape (), float32
        or wider; of :func:`noisy_sam_gradients` and :func:`random_sam_gradients` at
        the noisy ones, of :func:`momentum_sam_gradients` at the moved ones. Infinite
        before the first update.
      memory: what the method keeps between steps, shaped like the parameters, or the
        state of a ``direction``; ``()`` for most.
      is_finite: inside of :func:`skip_nonfinite` whether loss and gradient of the step
        are finite, shape (), bool; elsewhere ``()``.
      last_rho: the radius of the last update, shape (), float32 or wider; 0 before the
        first one and before ``start_step``.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.sam_gradients(0.05).init(jnp.zeros(3)).count
      Array(0, dtype=int32)
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    noise_key: jax.Array
    clean_value: jax.Array
    memory: Any = ()
    is_finite: Any = ()
    last_rho: Any = ()

    def after_skip(self, new):
        """The state after a skipped step: all but the memory advances."""
        return advanced(new)._replace(memory=self.memory)

    def metrics(self):
        """The loss measured last, and the radius."""
        return {"loss": self.clean_value, **known("rho", self.last_rho)}


class EntropySGDState(NamedTuple):
    """State of :func:`entropy_sgd_gradients`: plain numeric arrays.

    After a step that :func:`skip_nonfinite` skips all of it advances.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32.
      clean_value: the loss at the parameters before the last step, on the first chunk,
        shape (), float32 or wider. Infinite before the first update.
      is_finite: inside of :func:`skip_nonfinite` whether loss and gradient of the step
        are finite, shape (), bool; elsewhere ``()``.
      last_gamma: the pull of the last update, shape (), float32 or wider; 0 before the
        first one.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.entropy_sgd_gradients().init(jnp.zeros(3)).count
      Array(0, dtype=int32)
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    noise_key: jax.Array
    clean_value: jax.Array
    is_finite: Any = ()
    last_gamma: Any = ()

    def after_skip(self, new):
        """The state after a skipped step: all of it advances."""
        return advanced(new)

    def metrics(self):
        """The loss measured last, and the pull."""
        return {"loss": self.clean_value, **known("gamma", self.last_gamma)}
