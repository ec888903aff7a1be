"""Monte Carlo estimates: a value with its standard error."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, host


class Estimate(NamedTuple):
    """A Monte Carlo estimate: a number, or a tree of arrays.

    In text a number shows its error: ``f"{estimate}"`` is ``"2.03 ± 0.11"``, and a format
    such as ``.1f`` applies to both parts.

    Attributes:
      value: the estimate.
      standard_error: its standard error, of the same structure; infinite for one draw.
      num_probes: number of independent draws behind both.

    Example:
      >>> from flatopt import curvature
      >>> estimate = curvature.Estimate(10.0, 1.0, 32)
      >>> low, high = estimate.interval()
      >>> round(float(low), 2), round(float(high), 2)
      (7.96, 12.04)
      >>> f"{estimate:.1f}"
      '10.0 ± 1.0'
    """

    value: Any
    standard_error: Any
    num_probes: int

    @classmethod
    def of(cls, samples: jax.typing.ArrayLike) -> "Estimate":
        """The mean of independent samples along the first axis, with its standard error.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import curvature
          >>> print(curvature.Estimate.of(jnp.array([1.0, 2.0, 3.0])))
          2.00 ± 0.58
        """
        xp = np if isinstance(samples, np.ndarray) else jnp
        samples = xp.asarray(samples)
        count = xp.shape(samples)[0]
        if not count:
            raise ValueError("samples must hold at least one value, got none.")
        mean, error = _mean_and_error(samples)
        return cls(mean, error, count)

    def interval(self, confidence: float = 0.95) -> tuple[Any, Any]:
        """Student's t interval ``(low, high)`` that holds the truth so often.

        Example:
          >>> from flatopt import curvature
          >>> curvature.Estimate(1.0, 0.0, 8).interval(0.99)
          (Array(1., dtype=float32), Array(1., dtype=float32))
        """
        if not 0 < confidence < 1:
            raise ValueError(
                f"confidence must lie between 0 and 1, got {confidence}; write 0.95."
            )
        import scipy.special  # slow to import, and seldom needed

        freedom = max(self.num_probes - 1, 1)
        factor = scipy.special.stdtrit(freedom, (1 + confidence) / 2)
        low = jax.tree.map(
            lambda v, e: jnp.asarray(v - factor * e), self.value, self.standard_error
        )
        high = jax.tree.map(
            lambda v, e: jnp.asarray(v + factor * e), self.value, self.standard_error
        )
        return low, high

    def __format__(self, spec: str) -> str:
        if not jax.tree_util.all_leaves([self.value]) or jnp.ndim(self.value):
            if spec:
                raise TypeError(
                    f"a format such as {spec!r} is for an Estimate of one number, got "
                    f"{jax.tree.map(jnp.shape, self.value)}; take one number of it first."
                )
            return repr(self)
        value, error = float(self.value), float(self.standard_error)
        spec = spec or _digits_of(error)
        return f"{value:{spec}} ± {error:{spec}}"

    def __str__(self) -> str:
        return format(self)


@host.compiled
def _mean_and_error(samples):
    xp, count = host.namespace(samples), len(samples)
    mean = xp.mean(samples, axis=0)
    if count == 1:
        return mean, xp.full_like(mean, xp.inf)
    # In units of a power of two, so that squares neither vanish nor overflow.
    unit = blocks.power_of_two(samples)
    return mean, unit * xp.std(samples / unit, axis=0, ddof=1) / count**0.5


def _digits_of(error: float) -> str:
    """A format that shows two digits of an error, and the value to the same place."""
    if not (math.isfinite(error) and error > 0):
        return ".4g"
    place = 1 - math.floor(math.log10(error))
    return f".{place}f" if 0 <= place <= 6 else ".4g"
