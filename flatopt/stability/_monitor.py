"""Curvature and margins along training, measured beside the training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks, linear, loops, signatures, vectors
from flatopt.curvature import _kinds
from flatopt.stability import _coefficients, _motion, _slots
from flatopt.stability._critical import critical_learning_rate

FIRST_STEPS = 10  # of power iteration, from a random direction
TINY = 2.0**-66  # of a gradient that a linear optimizer is read with


class Monitor:
    """What :func:`monitor` returns: call it after each step.

    Attributes:
      latest: the last results by name, as floats.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flatopt import stability
      >>> stability.monitor(lambda p: jnp.sum(p ** 2), optax.sgd(0.1)).latest
      {}
    """

    def __init__(self, value_fn, tx, every):
        self.latest: dict[str, float] = {}
        self._every = every
        self._calls = 0
        self._direction = None
        self._limit = None
        self._active: tuple[int, ...] | None = None
        self._optimizer = lambda rate: tx
        self._curvature = jax.jit(
            functools.partial(_curvature, value_fn, tx), static_argnums=(0, 1)
        )
        self._critical = jax.jit(functools.partial(_critical_rate, value_fn, tx))

    def __call__(
        self, params: Any, opt_state: Any, **arguments: Any
    ) -> dict[str, float] | None:
        """The results after a step that is measured, else None."""
        turn, rest = divmod(self._calls, self._every)
        self._calls += 1
        if rest:
            return None
        if turn % 2 == 0 or not turn:
            self._read_curvature(params, opt_state, arguments)
        if turn % 2 == 1 or not turn:
            start = self.latest.get("critical_rate", 1.0)
            found = self._critical(params, opt_state, jnp.float32(start), arguments)
            self.latest |= {name: float(value) for name, value in found.items()}
        return dict(self.latest)

    def _read_curvature(self, params, opt_state, arguments):
        if self._limit is None:
            self._limit, self._active = _limit(self._optimizer, params, opt_state)
        first = self._direction is None
        if first:
            self._direction = _start(params)
        value, self._direction = self._curvature(
            FIRST_STEPS if first else 1,
            self._active,
            params,
            opt_state,
            self._direction,
            arguments,
        )
        self.latest["max_eigenvalue"] = float(value)
        # The iteration finds the eigenvalue of the largest size: one below zero hides those
        # above.
        is_known = self._active is not None and not float(value) < 0
        margin = self._limit / float(value) if float(value) else np.inf
        self.latest["eigenvalue_margin"] = margin if is_known else np.nan


def monitor(
    value_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    every: int = 100,
) -> Monitor:
    r"""Watch curvature and stability from beside the training loop.

    Call the result after each step with the parameters, the optimizer's state and the
    batch: every ``every`` calls it measures, in turns

    - ``max_eigenvalue``: the largest eigenvalue of the Hessian of the batch's loss in the
      optimizer's own units, :math:`P^{1/2} H P^{1/2}`, where :math:`P` is what the chain
      multiplies a fresh gradient by: learning rate, schedule, preconditioner. One step of
      power iteration from the last direction.
    - ``eigenvalue_margin``: the largest such eigenvalue at which this optimizer stays on
      all data, over it. Below 1 it leaves, as at :math:`2(1 + \beta) / \eta` for momentum
      and :math:`38 / \eta` for Adam. NaN for an optimizer that is not linear near a
      minimum, such as Lion; the eigenvalue is then that of :math:`H`. NaN where the
      eigenvalue of the largest size is negative: that one is found, far from a minimum.
    - ``critical_rate``: how many times as long the optimizer's next step could be before
      the batch's loss rises, see :func:`critical_learning_rate`; and ``loss``.

    Nothing is added to the training step. A measurement costs some 4 gradients.

    Args:
      value_fn: ``value_fn(params, ...) -> loss``, as for the links.
      tx: the optimizer, a whole chain.
      every: number of calls between measurements.

    Returns:
      A :class:`Monitor`; called with ``(params, opt_state, **arguments of value_fn)`` it
      returns a dict of floats after a measurement, else None.

    References:
      Cohen, Ghorbani, Krishnan, Agarwal, Medapati, Badura, Suo, Cardoze, Nado, Dahl, Gilmer,
      `Adaptive Gradient Methods at the Edge of Stability
      <https://arxiv.org/abs/2207.14484>`_, 2022.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flatopt import stability
      >>> loss_fn = lambda p: 5 * jnp.sum(p ** 2)  # curvature 10
      >>> tx = optax.sgd(0.1, momentum=0.9)
      >>> params = jnp.ones(3)
      >>> found = stability.monitor(loss_fn, tx)(params, tx.init(params))
      >>> round(found["max_eigenvalue"], 3), round(found["eigenvalue_margin"], 3)
      (1.0, 3.8)
    """
    if not callable(value_fn):
        raise TypeError(
            f"value_fn must be a function of params, got {value_fn!r}; pass the loss "
            "function itself, not its value."
        )
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            "tx must be an optax.GradientTransformation, got "
            f"{getattr(tx, '__name__', None) or type(tx).__name__}; give the optimizer "
            "that made opt_state."
        )
    signatures.check_order(value_fn, "value_fn")
    checks.check_count(every, "every")
    return Monitor(value_fn, tx, every)


def _start(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=jnp.shape(p)), jnp.float32), params
    )


def _limit(optimizer, params, opt_state):
    """The largest stable eigenvalue where a fresh gradient moves by -1; active slots.

    Read on leaves of at most two entries an axis, which have the same coefficients.
    """
    small = jax.tree.map(lambda p: np.zeros(np.minimum(jnp.shape(p), 2)), params)
    try:
        with _slots.on_host():
            zeros = jax.tree.map(jnp.asarray, small)
            tx = optimizer(1.0)
            fresh = tx.init(zeros)
        leaves = [
            given if jnp.shape(given) == jnp.shape(own) else own
            for given, own in zip(
                jax.tree.leaves(opt_state), jax.tree.leaves(fresh), strict=True
            )
        ]
        state = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
        found, active = _coefficients.normalized(optimizer, small, state)
    except linear.NotLinearError:
        return np.nan, None
    except ValueError:  # a schedule that starts from a rate of 0: later
        return None, None
    return _motion.largest_stable_eigenvalue(found), active


def _curvature(
    value_fn, tx, num_steps, active, params, opt_state, direction, arguments
):
    options = signatures.sample_options(value_fn, jax.random.key(0))
    kind = _kinds.Hessian(lambda p: value_fn(p, **arguments, **options))
    _, _, product = kind.linearize(params, None)
    roots = _roots(tx, active, params, opt_state)

    def step(_, carry):
        _, vector = carry
        vector, _ = vectors.normalize(vector)
        moved = jax.tree.map(
            lambda r, v, p: (r * v).astype(p.dtype), roots, vector, params
        )
        found = jax.tree.map(lambda r, h: r * h.astype(r.dtype), roots, product(moved))
        return vectors.dot(vector, found), found

    start = jnp.float32(0), direction
    # Without a loop where there is one step: convolutions in loops are slow on CPU.
    return step(0, start) if num_steps == 1 else loops.repeat(step, start, num_steps)


def _roots(tx, active, params, opt_state):
    """The root of what a chain multiplies a fresh gradient by, in float32."""
    if active is None:
        return jax.tree.map(lambda p: jnp.ones(jnp.shape(p), jnp.float32), params)
    state = _slots.without(tx, opt_state, params, active)
    grads = jax.tree.map(lambda p: jnp.full_like(p, TINY), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with linear.reading():
        updates, _ = optax.with_extra_args_support(tx).update(
            grads, state, zeros, value=jnp.ones(())
        )
    return jax.tree.map(
        lambda u: jnp.sqrt(jnp.maximum(-u.astype(jnp.float32) / TINY, 0)), updates
    )


def _critical_rate(value_fn, tx, params, opt_state, start, arguments):
    options = signatures.sample_options(value_fn, jax.random.key(0))

    def loss_fn(params):
        return value_fn(params, **arguments, **options)

    value, grads = jax.value_and_grad(loss_fn)(params)
    updates, _ = optax.with_extra_args_support(tx).update(
        grads, opt_state, params, value=value, value_fn=value_fn, **arguments
    )
    found = critical_learning_rate(loss_fn, params, updates, start=start)
    return {"loss": value, "critical_rate": found.rate}
