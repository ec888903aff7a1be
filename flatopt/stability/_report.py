"""Stability at one point, with a table."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt import curvature
from flatopt.stability._alignment import Alignment, alignment, half_square, square_loss
from flatopt.stability._dynamics import growth_rate
from flatopt.stability._linearization import linearize
from flatopt.stability._thresholds import Thresholds, smallest_batch_size, thresholds


class Report(NamedTuple):
    """Stability at one point, from :func:`report`; ``print`` shows a table.

    Attributes:
      learning_rate: the step size asked about.
      batch_size: B.
      loss: the loss.
      reducible_loss: what the linearized model could still take off it.
      constant_loss: the loss of the best constant output, for comparison.
      gradient_norm: the norm of its gradient.
      max_eigenvalue: the largest eigenvalue of H, the Gauss-Newton matrix.
      hessian_eigenvalue: that of the Hessian itself; far from the other one, the
        linearized model is not what SGD sees.
      trace: the trace of H.
      frobenius_norm: its Frobenius norm.
      alignment: :class:`Alignment`, or None at zero loss.
      thresholds: :class:`Thresholds`.
      growth_rate: factor of the second moment a step.
      smallest_batch_size: see :func:`smallest_batch_size`.

    Example:
      >>> from flatopt import stability
      >>> stability.Report._fields[0]
      'learning_rate'
    """

    learning_rate: float
    batch_size: int
    loss: float
    reducible_loss: float
    constant_loss: float
    gradient_norm: float
    max_eigenvalue: float
    hessian_eigenvalue: float
    trace: float
    frobenius_norm: float
    alignment: Alignment | None
    thresholds: Thresholds
    growth_rate: float
    smallest_batch_size: int | None

    @property
    def is_minimum(self) -> bool:
        """Whether the theory applies.

        The linearized model can take off at most a hundredth of the loss of a constant
        output, and the Hessian's largest eigenvalue is within a tenth of that of H.
        """
        apart = abs(self.hessian_eigenvalue - self.max_eigenvalue)
        is_close = self.reducible_loss <= 0.01 * self.constant_loss
        return is_close and apart <= 0.1 * self.max_eigenvalue

    @property
    def verdict(self) -> str:
        """What follows for training, in words."""
        limit = self.thresholds.mean_square
        if self.learning_rate > self.thresholds.gradient_descent:
            found = "unstable even for the whole data in one batch"
        elif self.learning_rate > limit:
            found = (
                f"SGD leaves: the learning rate exceeds the exact limit {limit:.4g}; a batch "
                f"of {self.smallest_batch_size} would stay"
            )
        else:
            margin = limit / self.learning_rate
            found = f"SGD stays: the learning rate could be {margin:.3g} times as large"
        if not self.is_minimum:
            found += " (says the linearized model, but this is no minimum of its kind)"
        return found

    def __str__(self):
        ratio = self.thresholds.mean_square / self.learning_rate
        lines = [
            f"learning rate {self.learning_rate:.4g}, batch size {self.batch_size}: "
            f"{self.verdict}",
            f"loss {self.loss:.3g} ({self.constant_loss:.3g} for a constant output), of which "
            f"the linearized model could take off {self.reducible_loss:.3g}; gradient norm "
            f"{self.gradient_norm:.3g}",
            f"largest eigenvalue of H {self.max_eigenvalue:.4g}, of the Hessian itself "
            f"{self.hessian_eigenvalue:.4g}: "
            + (
                "the theory applies" if self.is_minimum else "the theory does not apply"
            ),
            f"trace of H {self.trace:.4g}, Frobenius norm {self.frobenius_norm:.4g}; could be "
            f"{ratio:.3g} times as sharp at this setting",
            f"growth of the second moment a step: {self.growth_rate:.4g}",
        ]
        if self.alignment is not None:
            found = self.alignment
            lines.append(
                f"alignment mu {found.mu:.3g} = alpha {found.alpha:.3g} * beta "
                f"{found.beta:.3g}; isotropic noise would have {found.isotropic_mu:.3g}"
            )
        lines.append(f"{'largest stable rate by':22} {'rate':>10}  at this rate")
        for name, rate in self.thresholds.rates.items():
            holds = "holds" if self.learning_rate <= rate else "violated"
            margin = f"by a factor of {max(rate, 1e-37) / self.learning_rate:.3g}"
            lines.append(f"{name:22} {rate:10.4g}  {holds} {margin}")
        return "\n".join(lines)


def report(
    model_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    targets: Any,
    learning_rate: float,
    batch_size: int,
    *,
    loss_scale: float = 1.0,
    loss_fn: Callable[..., Any] | None = None,
    sampling: str = "without_replacement",
) -> Report:
    """Everything about stability at one point, with a readable table.

    Args:
      model_fn, params, inputs, targets, loss_scale, loss_fn: see :func:`linearize`.
      learning_rate: the step size to judge.
      batch_size: B.
      sampling: see :func:`thresholds`.

    Returns:
      A :class:`Report`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> found = stability.report(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2), 1.0, 1)
      >>> found.verdict
      'SGD stays: the learning rate could be 2 times as large'
    """
    lin = linearize(
        model_fn, params, inputs, targets, loss_scale=loss_scale, loss_fn=loss_fn
    )
    hessian = curvature.hessian(
        square_loss(model_fn, loss_scale), params, (inputs, targets)
    )
    top = curvature.eigenpairs(hessian, jax.random.key(0), 1)
    return Report(
        learning_rate=float(learning_rate),
        batch_size=batch_size,
        loss=float(lin.loss),
        reducible_loss=float(lin.reducible_loss),
        constant_loss=loss_scale
        * float(half_square(targets, jnp.mean(targets, axis=0, keepdims=True))),
        gradient_norm=float(lin.gradient_norm),
        max_eigenvalue=float(lin.eigenvalues[0]),
        hessian_eigenvalue=float(top.values[0]),
        trace=float(jnp.sum(lin.eigenvalues)),
        frobenius_norm=float(jnp.linalg.norm(lin.eigenvalues)),
        alignment=alignment(lin) if float(lin.loss) > 0 else None,
        thresholds=thresholds(lin, batch_size, sampling=sampling),
        growth_rate=growth_rate(lin, learning_rate, batch_size, sampling=sampling),
        smallest_batch_size=smallest_batch_size(lin, learning_rate, sampling=sampling),
    )
