r"""Linear stability: which minima SGD can stay at, and at which learning rate.

The loss is ``loss_scale / (2 n) * sum of squared errors`` over n examples with c outputs
each: 1 for the papers' convention, 1/c for ``optax.l2_loss(...).mean()``, 2/c for a mean
squared error, 2 for the mean over examples of the squared norm. Near a minimum with zero
error the model is linear, and everything happens in the space that the examples' gradients
span, of dimension at most n c: no matrix over the parameters is formed.

Batches of B examples: "without_replacement", "with_replacement", or "bernoulli" (each
example taken with probability B / n, the sum divided by B).
"""

from flatopt.stability._alignment import (
    Alignment,
    alignment,
    batch_sharpness,
    estimate_alignment,
)
from flatopt.stability._coefficients import preconditioner
from flatopt.stability._critical import CriticalRate, critical_learning_rate
from flatopt.stability._dynamics import (
    escape_time,
    expected_losses,
    growth_rate,
    simulate,
)
from flatopt.stability._linearization import (
    Linearization,
    linearize,
    linearize_gauss_newton,
)
from flatopt.stability._monitor import Monitor, monitor
from flatopt.stability._report import Report, report
from flatopt.stability._stationary import StationaryCovariance, stationary_covariance
from flatopt.stability._thresholds import (
    SharpestMinimum,
    Thresholds,
    sharpest_minimum,
    smallest_batch_size,
    thresholds,
)

__all__ = [
    "Alignment",
    "CriticalRate",
    "Linearization",
    "Monitor",
    "Report",
    "SharpestMinimum",
    "StationaryCovariance",
    "Thresholds",
    "alignment",
    "batch_sharpness",
    "critical_learning_rate",
    "escape_time",
    "estimate_alignment",
    "expected_losses",
    "growth_rate",
    "linearize",
    "linearize_gauss_newton",
    "monitor",
    "preconditioner",
    "report",
    "sharpest_minimum",
    "simulate",
    "smallest_batch_size",
    "stationary_covariance",
    "thresholds",
]
