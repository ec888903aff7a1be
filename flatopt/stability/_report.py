"""Stability at one point, with a table."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import curvature
from flatopt._core import checks, tables
from flatopt._core.types import LossFn, ModelFn, Optimizer, Sampling
from flatopt.stability import _checks, _coefficients, _convex, _losses, _tables
from flatopt.stability._alignment import Alignment, alignment
from flatopt.stability._dynamics import growth_rate
from flatopt.stability._linearization import linearize, linearize_gauss_newton, root_of
from flatopt.stability._thresholds import Thresholds, smallest_batch_size, thresholds


class Report(NamedTuple):
    r"""Stability at one point, from :func:`report`; ``print`` shows a table.

    Attributes:
      learning_rate: the step size asked about.
      batch_size: B.
      loss: the loss, in the convention of ``loss_scale``.
      reducible_loss: what the linearized model could still take off it.
      constant_loss: the loss of the best constant output in the same convention, for
        comparison.
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
      loss_scale: factor of the squared error, or None for another loss.
      optimizer: its name.
      is_preconditioned: whether curvature is that in the coordinates of the optimizer's
        preconditioner: of :math:`P^{1/2} H P^{1/2}`.
      seconds: what it took, with compilation; None: not known.

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
    loss_scale: float | None = 1.0
    optimizer: str = "SGD"
    is_preconditioned: bool = False
    seconds: float | None = None

    @property
    def is_minimum(self) -> bool:
        """Whether the theory applies.

        The linearized model can take off at most a hundredth of the loss of a constant
        output, and the Hessian's largest eigenvalue is within a tenth of that of H.
        """
        apart = abs(self.hessian_eigenvalue - self.max_eigenvalue)
        is_close = self.reducible_loss < 0.01 * self.constant_loss
        is_close = is_close or self.gradient_norm == 0  # losses may underflow to 0
        return is_close and apart <= 0.1 * self.max_eigenvalue

    @property
    def verdict(self) -> str:
        """What follows for training, in words."""
        limit = self.thresholds.mean_square
        if self.learning_rate > self.thresholds.gradient_descent:
            found = "unstable even for the whole data in one batch"
        elif self.learning_rate > limit:
            found = (
                f"{self.optimizer} leaves: the learning rate exceeds the exact limit "
                f"{limit:.4g}; a batch of {self.smallest_batch_size} would stay"
            )
        else:
            margin = limit / self.learning_rate
            found = (
                f"{self.optimizer} stays: the learning rate could be {margin:.3g} times as "
                "large"
            )
        if not self.is_minimum:
            found += " (by the linearized model, which is not at a minimum here)"
        return found

    @property
    def caveat(self) -> str | None:
        """What the theory does not say here, or None where it is exact."""
        found = []
        if self.loss_scale is None:
            found.append(
                "the loss is no squared error: rates are those of its expansion to second "
                "order in the outputs, at these parameters; the curvature of a "
                "cross-entropy falls as the data is fitted, so that a rate that leaves "
                "here may stay further on"
            )
        elif not self.is_minimum:
            found.append(
                "the theory holds at minima, where the reducible loss and the eigenvalue of "
                "the Hessian are in the range called usual"
            )
        if self.is_preconditioned:
            found.append(
                "the preconditioner is held as it is: the rates hold while the second "
                "moments of the gradients stay"
            )
        return "; ".join(found) or None

    def to_dict(self) -> dict[str, Any]:
        """Numbers and words as a plain dict, for JSON.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import stability
          >>> found = stability.report(
          ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2), 1.0, 1,
          ...     loss_scale=1.0)
          >>> found.to_dict()["thresholds"]["gradient_descent"]
          4.0
        """
        found = self._asdict() | {"thresholds": self.thresholds._asdict()}
        if self.alignment is not None:
            parts = self.alignment._asdict()
            found["alignment"] = {name: float(x) for name, x in parts.items()}
        words = {"is_minimum": self.is_minimum, "verdict": self.verdict}
        return found | words | {"caveat": self.caveat}

    def __str__(self):
        lines = [line for text in self._heads() for line in tables.wrapped(text)]
        lines += ["", tables.table(_tables.MEASURED, _tables.measured_rows(self))]
        lines += ["", tables.table(_tables.RATES, _tables.rate_rows(self))]
        return "\n".join([*lines, "", *tables.wrapped(self._note())])

    def _repr_html_(self):
        parts = [tables.paragraph(text) for text in self._heads()]
        parts.append(tables.html_table(_tables.MEASURED, _tables.measured_rows(self)))
        parts.append(tables.html_table(_tables.RATES, _tables.rate_rows(self)))
        return "\n".join([*parts, tables.paragraph(self._note())])

    def _heads(self):
        """What comes before the tables."""
        found = [
            f"{self.optimizer}, learning rate {self.learning_rate:.4g}, batch size "
            f"{self.batch_size}: {self.verdict}"
        ]
        if self.caveat is not None:
            found.append(f"mind: {self.caveat}")
        return found

    def _note(self):
        found = (
            "p: unit of a parameter. margin: by how much the learning rate could be "
            "multiplied; below 1 it is too large for this condition."
        )
        if any("necessary" in row[-1] for row in _tables.rate_rows(self)):
            found += " necessary: at a larger rate SGD leaves."
        if self.seconds is None:
            return found
        return f"{found} It took {tables.duration(self.seconds)} with compilation."


def report(
    model_fn: ModelFn,
    params: Any,
    inputs: Any,
    targets: Any,
    learning_rate: float,
    batch_size: int,
    *,
    loss_scale: float | None = None,
    loss_fn: LossFn | None = None,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
    progress: Callable[[int, int | None, str], Any] | bool | None = None,
) -> Report:
    """Everything about stability at one point, with a readable table.

    Give ``loss_fn``, the training loss, or ``loss_scale``: a wrong convention changes
    learning rates unseen. The scale of a squared error is read off ``loss_fn``. Another
    loss, with labels of any kind, goes through :func:`linearize_gauss_newton`, and the
    report says what the theory does not say then.

    Args:
      model_fn, params, inputs, targets: see :func:`linearize`.
      learning_rate: the step size to judge; of a schedule, its value at the step.
      batch_size: B.
      loss_scale: factor of the loss over ``sum of squared errors / (2 n)``: 1/c for
        ``optax.l2_loss(...).mean()``, 2/c for a mean squared error over c outputs.
      loss_fn: ``loss_fn(outputs, targets)``, the mean loss over examples.
      sampling, optimizer: see :func:`thresholds`.
      opt_state: the optimizer's state: for an adaptive one, whose preconditioner is read
        from it, and for a schedule's step.
      progress: see :func:`linearize`.

    Returns:
      A :class:`Report`: ``print`` it, show it in a notebook, or log its ``to_dict()``.

    Raises:
      ValueError: without both ``loss_fn`` and ``loss_scale``, where they disagree; else as
        :func:`linearize` and :func:`thresholds`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> found = stability.report(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2), 1.0, 1,
      ...     loss_scale=1.0)
      >>> found.verdict
      'SGD stays: the learning rate could be 2 times as large'
    """
    start = time.monotonic()
    _checks.check_rate(learning_rate)
    _checks.check_batch(batch_size, None, sampling)
    params, outputs = _losses.check_outputs(model_fn, params, inputs)
    _checks.check_batch(batch_size, len(outputs), sampling)
    targets = _losses.as_arrays(targets)
    scale = _scale(outputs, targets, loss_scale, loss_fn)
    factors = _coefficients.preconditioner_if_any(optimizer, opt_state, params)
    shown = dict(preconditioner=factors, progress=progress)
    if scale is None:
        assert loss_fn is not None  # _scale has seen to it
        lin = linearize_gauss_newton(
            model_fn, loss_fn, params, inputs, targets, **shown
        )
        whole = _losses.whole_loss(model_fn, loss_fn)
        constant = _convex.best_constant_loss(loss_fn, outputs, targets)
    else:
        lin = linearize(model_fn, params, inputs, targets, loss_scale=scale, **shown)
        targets = _losses.check_targets(outputs, targets)
        whole = _losses.square_loss(model_fn, scale)
        wide = np.asarray(targets, "f8")
        constant = scale * np.sum((wide - wide.mean(axis=0)) ** 2) / (2 * len(wide))
    whole, point = _in_coordinates(whole, params, factors)
    hessian = curvature.hessian(whole, point, (inputs, targets))
    top = curvature.eigenpairs(hessian, jax.random.key(0), 1)
    asked = dict(sampling=sampling, optimizer=optimizer, opt_state=opt_state)
    values = np.asarray(lin.eigenvalues, "f8")
    return Report(
        learning_rate=float(learning_rate),
        batch_size=int(batch_size),
        loss=float(lin.loss),
        reducible_loss=float(lin.reducible_loss),
        constant_loss=float(constant),
        gradient_norm=float(lin.gradient_norm),
        max_eigenvalue=float(values[0]),
        hessian_eigenvalue=float(top.values[0]),
        trace=float(np.sum(values)),
        frobenius_norm=float(np.linalg.norm(values)),
        alignment=alignment(lin) if np.any(np.asarray(lin.residuals)) else None,
        thresholds=thresholds(lin, batch_size, progress=progress, **asked),
        growth_rate=growth_rate(
            lin, learning_rate, batch_size, progress=progress, **asked
        ),
        smallest_batch_size=smallest_batch_size(lin, learning_rate, **asked),
        loss_scale=scale,
        optimizer=_coefficients.describe(optimizer),
        is_preconditioned=factors is not None,
        seconds=time.monotonic() - start,
    )


def _in_coordinates(loss_fn, params, factors):
    """A loss of the parameters over the root of a preconditioner, and where they are."""
    if factors is None:
        return loss_fn, params
    roots = root_of(factors, params)

    def moved(point, batch):
        there = jax.tree.map(
            lambda p, r, z: p + (r * z).astype(p.dtype), params, roots, point
        )
        return loss_fn(there, batch)

    return moved, jax.tree.map(jnp.zeros_like, roots)


def _scale(outputs, targets, loss_scale, loss_fn):
    """The factor of a squared error, or None for another loss."""
    if loss_fn is None:
        if loss_scale is None:
            raise ValueError(
                "report needs loss_fn or loss_scale, got neither, and a wrong convention "
                "changes its rates unseen; give loss_fn(outputs, targets), or loss_scale=1 "
                "for half the squared error summed over outputs, 2 / c for a mean squared "
                "error over c outputs."
            )
        return loss_scale
    checks.check_function(loss_fn, "loss_fn", "loss_fn(outputs, targets)", count=2)
    found = None
    if _losses.is_mistaken_for_outputs(outputs, targets):
        _losses.check_same_shape(outputs, targets)
    if _losses.is_broadcast_square(loss_fn, outputs, targets):
        _losses.check_same_shape(outputs, targets)
    if _losses.has_square_targets(outputs, targets):
        found = _losses.square_scale(loss_fn, outputs, targets)
    if loss_scale is not None and found is None:
        raise ValueError(
            f"loss_scale is for squared errors, got {loss_scale:g} with a loss_fn that is "
            "none of equal weights; leave loss_scale out."
        )
    if loss_scale is not None:
        _checks.check_rate(loss_scale, "loss_scale")
        _losses.check_square_scale(loss_fn, loss_scale, outputs, targets)
    return found
