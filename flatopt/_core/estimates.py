"""Monte Carlo estimates: a value with its standard error."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Estimate(NamedTuple):
    """A Monte Carlo estimate: a number, or a tree of arrays.

    Attributes:
      value: the estimate.
      standard_error: its standard error, of the same structure.
      num_probes: number of independent draws behind both.

    Example:
      >>> from flatopt import curvature
      >>> low, high = curvature.Estimate(10.0, 1.0, 32).interval()
      >>> round(float(low), 2), round(float(high), 2)
      (7.96, 12.04)
    """

    value: Any
    standard_error: Any
    num_probes: int

    def interval(self, confidence: float = 0.95):
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
        import scipy.stats  # slow to import, and seldom needed

        factor = scipy.stats.t.ppf((1 + confidence) / 2, max(self.num_probes - 1, 1))
        low = jax.tree.map(
            lambda v, e: jnp.asarray(v - factor * e), self.value, self.standard_error
        )
        high = jax.tree.map(
            lambda v, e: jnp.asarray(v + factor * e), self.value, self.standard_error
        )
        return low, high
