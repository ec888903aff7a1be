"""The direction of an ascent step, shaped by a transformation of optax."""

import jax
import jax.numpy as jnp
import optax

from flatopt._core import trees
from flatopt.transforms import _link


def check_direction(direction):
    """Refuse what is no transformation of optax, or points downhill.

    Which way it points is tried out on one small gradient: a whole optimizer in its place
    would descend, in silence.
    """
    if direction is None:
        return
    if not isinstance(direction, optax.GradientTransformation):
        got = getattr(direction, "__name__", None) or type(direction).__name__
        raise TypeError(
            f"direction must be an optax transformation, got {got}; write "
            "optax.scale_by_adam() or optax.ema(0.9)."
        )
    with (
        jax.ensure_compile_time_eval(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        if _slope(direction) < 0:
            raise ValueError(
                "direction must point uphill, got a transformation whose updates point "
                "downhill; leave the learning rate out, as in optax.scale_by_adam() in "
                "place of optax.adam(0.1)."
            )


def _slope(direction):
    """How far a transformation points along a gradient; 0 where it takes no such."""
    grads = {"w": jnp.array([[1.0, 0.25], [0.5, 1.0]])}
    try:
        updates, _ = direction.update(grads, direction.init(grads), grads)
    except Exception:  # of other parameters than these; the user's own will tell
        return 0.0
    return float(jnp.sum(updates["w"] * grads["w"]))


def init_memory(direction):
    """A function of the free parameters: the state of a direction; None without one."""
    if direction is None:
        return None
    return lambda params: direction.init(_link.widened(params))


def along(direction, grads, memory, params):
    """The direction of the step, and the new state."""
    if direction is None:
        return grads, memory
    params = jax.tree.map(trees.widen, params)
    return direction.update(grads, memory, params)
