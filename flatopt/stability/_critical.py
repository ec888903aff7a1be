"""The critical learning rate: how long the optimizer's own step could be."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt._core import blocks, trees
from flatopt._core.risk import Risk, loss_of
from flatopt._core.types import LossFn
from flatopt.stability import _checks

WIDTH = 1 / 16  # of the bracket, relative to its lower end
MOST_OCTAVES = 64.0  # that a factor is doubled
ROUNDING = 4  # eps of the loss, below which a difference says nothing
PATIENCE = 3  # halvings without a visible difference, after which there is none
CONVEX = (
    2.9  # ratio of rises at 2 t and t: 2 for a slope upward, 4 for a hidden minimum
)

START, UP, DOWN, BISECT, DONE = range(5)


class CriticalRate(NamedTuple):
    r"""The longest step that does not raise the loss, from :func:`critical_learning_rate`.

    Attributes:
      rate: the factor of the updates; 0: the loss rises at once; infinite: it never does;
        NaN: the differences are below its rounding.
      sharpness: :math:`2 / (\text{rate} \cdot \text{learning rate})`.
      bracket: the factors ``(low, high)`` between which the loss passes its start.
      num_evaluations: number of passes, those at factor 0 among them.

    Example:
      >>> from flatopt import stability
      >>> stability.CriticalRate._fields
      ('rate', 'sharpness', 'bracket', 'num_evaluations')
    """

    rate: jax.Array
    sharpness: jax.Array
    bracket: tuple[jax.Array, jax.Array]
    num_evaluations: jax.Array | int


def critical_learning_rate(
    loss_fn: LossFn,
    params: Any,
    updates: Any,
    data: Any = None,
    *,
    learning_rate: float = 1.0,
    start: float | None = None,
) -> CriticalRate:
    r"""How many times as long the optimizer's step could be before the loss rises.

    With the updates :math:`u` of any optimizer, a factor :math:`t` at which

    .. math:: L(\theta + t\, u) = L(\theta)

    after the loss has fallen. For gradient descent on a quadratic it is 2 over the
    learning rate and the curvature along the gradient, :math:`g^\top H g / g^\top g`.

    Forward passes alone: for Adam, Lion, Muon, clipped and masked updates, and for models
    without second derivatives. The factor is doubled or halved from ``start`` until the
    crossing is bracketed, then bisected to 1/16: some 7 passes from the last rate. With
    several crossings it is one next to ``start``. On a re-iterable of batches one more pass
    tells whether the data were the same all along. The curvature of another loss along the
    same updates is had by giving that loss.

    On one batch it works inside ``jax.jit``.

    Args:
      loss_fn: ``loss_fn(params)``, or ``loss_fn(params, batch)``, the mean loss.
      params: the parameters before the updates. They are moved in float32 or wider.
      updates: what ``optax.apply_updates`` would add.
      data: None, one batch, or a re-iterable of batches.
      learning_rate: that of ``updates``, to turn a factor into a sharpness.
      start: the first factor, such as the last ``rate``; 1 by default, and where it is 0,
        infinite or NaN.

    Returns:
      A :class:`CriticalRate`.

    Raises:
      ValueError: for updates of another structure, a loss that is not finite, data that
        change from pass to pass.

    References:
      `A scalable measure of loss landscape curvature
      <https://arxiv.org/abs/2601.16979>`_, 2026.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import stability
      >>> loss_fn = lambda p: 5 * jnp.sum(p ** 2)  # curvature 10
      >>> grads = jax.grad(loss_fn)(jnp.ones(3))
      >>> found = stability.critical_learning_rate(
      ...     loss_fn, jnp.ones(3), -0.1 * grads, learning_rate=0.1)
      >>> low, high = found.bracket
      >>> bool(low <= 2 <= high), abs(float(found.sharpness) - 10) < 0.5
      (True, True)
    """
    _checks.check_rate(learning_rate)
    risk = Risk.of(loss_fn, params, data)
    updates = _check_updates(risk.params, updates)
    state, largest = _first(_check_start(start), updates)
    if not trees.is_traced(largest) and not math.isfinite(largest):
        raise ValueError(
            "updates must be finite, got NaN or an infinity; look at the gradients first."
        )
    if risk.stream is None:
        state, loss = _search(loss_fn, risk.params, updates, risk.batch, state)
    else:
        state, loss = _search_stream(risk, updates, state)
    if not isinstance(loss, jax.core.Tracer) and not math.isfinite(loss):
        raise ValueError(
            f"the loss at params must be finite, got {float(loss):g}; look at it first."
        )
    return CriticalRate(
        rate=state.rate,
        sharpness=2 / (state.rate * learning_rate),
        bracket=(state.low, state.high),
        num_evaluations=state.count,
    )


def _check_start(start):
    if start is None:
        return 1.0
    if isinstance(start, bool) or not isinstance(start, _checks.NUMBERS):
        raise TypeError(f"start must be a number, got {start!r}; write 1.0.")
    if jnp.ndim(start):
        raise ValueError(f"start must be one number, got shape {jnp.shape(start)}.")
    if not isinstance(start, jax.core.Tracer) and start < 0:
        raise ValueError(f"start must be at least 0, got {start}; write 1.0.")
    return start


def _check_updates(params, updates):
    shapes = jax.tree.map(jnp.shape, updates)
    if shapes != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"updates must have the structure and shapes of params, got {shapes} for "
            f"{jax.tree.map(jnp.shape, params)}; give what optax.apply_updates adds."
        )
    updates = jax.tree.map(jnp.asarray, updates)
    for leaf in jax.tree.leaves(updates):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"updates must be floating, got {leaf.dtype}; give what "
                "optax.apply_updates adds."
            )
    return blocks.widen(updates)


class _State(NamedTuple):
    """A search that knows what to try next."""

    phase: jax.Array
    factor: jax.Array  # to try next
    most: jax.Array  # beyond which the loss counts as never rising
    low: jax.Array  # where the loss was seen not to have risen, or 0
    high: jax.Array  # where it had risen, or infinite
    rises: tuple[jax.Array, jax.Array]  # the last one, and that at twice the factor
    fell: jax.Array  # whether a fall was seen
    unseen: jax.Array  # factors without a visible difference, one after another
    rate: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuple.count


@jax.jit
def _first(start, updates):
    """The state to begin with, and the largest magnitude of the updates."""
    largest = [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(updates) if x.size]
    dtype = functools.reduce(jnp.promote_types, [x.dtype for x in largest])
    largest = jnp.max(jnp.stack([x.astype(dtype) for x in largest]))
    start = jnp.asarray(start, dtype)
    start = jnp.where(jnp.isfinite(start) & (start > 0), start, 1.0)
    # Further out the parameters themselves would overflow, which is no rise of the loss.
    furthest = jnp.finfo(dtype).max ** 0.5 / jnp.maximum(largest, 1e-9)
    most = jnp.maximum(jnp.minimum(start * 2.0**MOST_OCTAVES, furthest), 2 * start)
    nan, inf, zero = (jnp.asarray(x, dtype) for x in (jnp.nan, jnp.inf, 0.0))
    state = _State(
        phase=jnp.asarray(START, jnp.int32),
        factor=start,
        most=most,
        low=zero,
        high=inf,
        rises=(inf, inf),
        fell=jnp.asarray(False),
        unseen=jnp.asarray(0, jnp.int32),
        rate=nan,
        count=jnp.asarray(1, jnp.int32),
    )
    return state, largest


@dataclasses.dataclass(frozen=True)
class _Moved:
    """The loss at moved parameters, and its relative rounding."""

    loss_fn: Callable

    def __call__(self, params, batch, factor, updates):
        moved = jax.tree.map(
            lambda p, u: trees.widen(p) + factor.astype(u.dtype) * u, params, updates
        )
        loss = loss_of(self.loss_fn, moved, batch)
        wide = trees.widen(loss)
        return wide, (wide, jnp.asarray(jnp.finfo(loss.dtype).eps, wide.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _search(loss_fn, params, updates, batch, state):
    moved = _Moved(loss_fn)

    def loss_at(factor):
        return moved(params, batch, factor, updates)[1]

    loss, eps = loss_at(jnp.zeros_like(state.factor))

    def step(state):
        rise = loss_at(state.factor)[0] - loss
        return _advance(state, rise, ROUNDING * eps * jnp.abs(loss))

    return jax.lax.while_loop(lambda s: s.phase != DONE, step, state), loss


def _search_stream(risk, updates, state):
    moved = _Moved(risk.loss_fn)

    def loss_at(factor, check=False):
        return risk.mean(moved, factor, updates, check=check)

    start = jnp.zeros_like(state.factor)
    loss, eps = loss_at(start, check=True)
    while state.phase != DONE:
        rise = loss_at(state.factor)[0] - loss
        state = _advance_compiled(state, rise, ROUNDING * eps * jnp.abs(loss))
    loss_at(start, check=True)  # an error where the data are no longer those of before
    return state._replace(count=state.count + 1), loss


def _advance(state, rise, rounding):
    """The search after one more loss, that at ``state.factor``."""
    rise, rounding = (x.astype(state.factor.dtype) for x in (rise, rounding))
    state = state._replace(count=state.count + 1)
    branches = [_after_start, _going_up, _going_down, _bisecting, lambda s, *_: s]
    return jax.lax.switch(state.phase, branches, state, rise, rounding)


_advance_compiled = jax.jit(_advance)


def _after_start(state, rise, rounding):
    risen = _has_risen(rise, rounding)
    return jax.lax.cond(risen, _going_down, _going_up, state, rise, rounding)


def _going_up(state, rise, rounding):
    """The loss has not risen yet: double the factor."""
    fell = state.fell | (rise < -rounding)
    risen = _has_risen(rise, jnp.where(fell, 0, rounding))
    ends = 2 * state.factor > state.most
    up = state._replace(
        phase=jnp.where(ends, DONE, UP).astype(jnp.int32),
        factor=2 * state.factor,
        low=state.factor,
        fell=fell,
        rate=jnp.where(ends & fell, jnp.inf, state.rate).astype(rise.dtype),
    )
    # A rise that no fall was seen before: it is hidden by rounding.
    done = state._replace(phase=jnp.asarray(DONE, jnp.int32), high=state.factor)
    bracketed = _middle(state._replace(high=state.factor))
    return _choose(risen, _choose(state.fell, bracketed, done), up)


def _going_down(state, rise, rounding):
    """The loss has risen: halve the factor."""
    risen = _has_risen(rise, rounding)
    fallen = rise < -rounding
    unseen = jnp.where(risen, 0, state.unseen + 1)
    near, far = state.rises
    down = state._replace(
        phase=jnp.where(
            (unseen >= PATIENCE) | (state.factor / 2 == 0), DONE, DOWN
        ).astype(jnp.int32),
        factor=state.factor / 2,
        high=jnp.where(risen, state.factor, state.high),
        rises=_choose(risen, (rise, near), state.rises),
        unseen=unseen,
    )
    near, far = down.rises
    hidden = jnp.isfinite(far) & (far > CONVEX * near) & (rounding > 0)
    rate = jnp.where(hidden, jnp.nan, 0.0).astype(rise.dtype)
    down = down._replace(rate=jnp.where(down.phase == DONE, rate, state.rate))
    return _choose(fallen, _middle(state._replace(low=state.factor)), down)


def _bisecting(state, rise, rounding):
    del rounding
    risen = _has_risen(rise, 0)
    return _middle(
        state._replace(
            low=jnp.where(risen, state.low, state.factor),
            high=jnp.where(risen, state.factor, state.high),
        )
    )


def _has_risen(rise, rounding):
    return ~jnp.isfinite(rise) | (rise > rounding)


def _middle(state):
    """Try the middle of the bracket, or take it as the result."""
    middle = state.low + (state.high - state.low) / 2
    ends = state.high - state.low <= 1.001 * WIDTH * state.low
    return state._replace(
        phase=jnp.where(ends, DONE, BISECT).astype(jnp.int32),
        factor=middle,
        rate=jnp.where(ends, middle, state.rate),
    )


def _choose(which, yes, no):
    return jax.tree.map(lambda x, y: jnp.where(which, x, y), yes, no)
