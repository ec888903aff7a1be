"""Schedules of the noise scale over training."""

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks

__all__ = ["cosine_growth"]


def __dir__() -> list[str]:
    return sorted(__all__)


def cosine_growth(
    init_value: float, growth: float, transition_steps: int
) -> optax.Schedule:
    r"""Grow from ``init_value`` to ``growth * init_value`` along half a cosine.

    .. math:: \gamma_t = \gamma_0 \left(\frac{\alpha - 1}{2}
        \left(1 - \cos\frac{\pi t}{T}\right) + 1\right)

    and constant after :math:`T` steps; the schedule of LPF-SGD's experiments with
    data augmentation (:math:`\gamma_0` = 5e-4, :math:`\alpha` = 15).

    Args:
      init_value: value at step 0.
      growth: ratio of the last value to the first.
      transition_steps: number of optimizer steps T, at least 1; it may be traced.

    Returns:
      A schedule ``count -> value``.

    Raises:
      ValueError: if ``transition_steps`` is less than 1.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022; as in the authors' code the
      last value is ``growth * init_value``.

    Example:
      >>> import flatopt
      >>> gamma = flatopt.schedules.cosine_growth(5e-4, 15, 100)
      >>> [round(float(gamma(t)), 5) for t in (0, 50, 100, 200)]
      [0.0005, 0.004, 0.0075, 0.0075]
    """
    for name, given in {"init_value": init_value, "growth": growth}.items():
        checks.check_scale(given, name)
    checks.check_scale(transition_steps, "transition_steps")
    if (
        not isinstance(transition_steps, jax.core.Tracer)
        and float(transition_steps) < 1
    ):
        raise ValueError(
            f"transition_steps must be at least 1, got {transition_steps}; give the number "
            "of optimizer steps of the whole training."
        )

    def schedule(count):
        count, steps = jnp.float32(count), jnp.float32(transition_steps)
        progress = jnp.minimum(count / steps, 1.0)
        return init_value * ((growth - 1) * (1 - jnp.cos(jnp.pi * progress)) / 2 + 1)

    return schedule
