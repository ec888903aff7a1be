"""All measures at once."""

import functools
from typing import Any, NamedTuple

import jax

from flatopt import curvature
from flatopt._core import checks, random, tables
from flatopt._core import progress as bars
from flatopt._core.estimates import Estimate
from flatopt._core.risk import check_model
from flatopt._core.types import LossFn, Mask, ModelFn, WeightFn
from flatopt.curvature._report import TYPICAL as OF_CURVATURE
from flatopt.sharpness._average import (
    ELEMENTWISE,
    ISOTROPIC,
    check_initial,
    mean_rise,
    pac_bayes,
    rises,
)
from flatopt.sharpness._curvature import (
    dimension_of,
    fisher_rao_empirical,
    form_of,
    shannon_entropy,
)
from flatopt.sharpness._entropy import entropy_of, walked
from flatopt.sharpness._solve import check_positive
from flatopt.sharpness._worst import epsilon_sharpness_of, worst_case

GRADIENTS = 1000  # of all data in a report, 640 of them for the effective dimension
COMPILED = 30  # times what compiling a gradient takes, on a small network

# Unit, and what a measure says; p is the unit of a parameter.
EXPLAINED = {
    "loss": ("loss", "mean loss of the data"),
    "trace": ("loss/p^2", "sum of the Hessian's eigenvalues"),
    "frobenius_norm": ("loss/p^2", "root of the sum of their squares"),
    "max_eigenvalue": (
        "loss/p^2",
        "curvature of the sharpest direction; gradient descent leaves at learning rates "
        "above 2 over it",
    ),
    "max_eigenvalue_bound": ("loss/p^2", "an eigenvalue lies within this distance"),
    "effective_dimension": ("count", "directions that curve more than 1"),
    "fisher_rao_hessian": ("loss", "parameters times Hessian times parameters"),
    "fisher_rao_empirical": ("loss^2", "mean square slope along the parameters"),
    "low_pass": (
        "loss",
        "mean rise under noise of scale sigma; near sigma^2 / 2 times the trace while "
        "that is small",
    ),
    "local_entropy": (
        "1",
        "negative log mean of exp(-rise), noise of scale 0.1; less than the mean rise",
    ),
    "local_entropy_gradient": ("p", "distance that Entropy-SGD's walk is drawn away"),
    "epsilon_sharpness": ("1/p", "1 / distance along the gradient to a rise of 0.1"),
    "worst_case": ("loss", "largest rise found within distance rho"),
    "worst_case_adaptive": ("loss", "the same in units of each parameter"),
    "average_case_adaptive": (
        "loss",
        "mean rise under noise of rho times each parameter",
    ),
    "pac_bayes": (
        "1",
        "squared distance from the start in units of tolerated noise",
    ),
    "shannon_entropy": (
        "nats",
        "minus the mean entropy of the predictions; 0 where all are certain",
    ),
}

# The network of examples/digits.py by SGD and by LPF-SGD, the smaller value first:
# python -m benchmarks.typical.
TYPICAL = {
    **{name: OF_CURVATURE[name] for name in ("loss", "trace", "frobenius_norm")},
    "max_eigenvalue": OF_CURVATURE["eigenvalues"],
    "max_eigenvalue_bound": (0.0016, 0.012),
    "effective_dimension": (52.0, 76.0),
    "fisher_rao_hessian": (19.0, 20.0),
    "fisher_rao_empirical": (18.0, 19.0),
    "low_pass": (0.0055, 0.013),
    "local_entropy": (0.58, 1.2),
    "local_entropy_gradient": (0.21, 0.22),
    "epsilon_sharpness": (8.1, 17.0),
    "worst_case": (0.032, 0.084),
    "worst_case_adaptive": (0.0045, 0.01),
    "average_case_adaptive": (0.0034, 0.0079),
    "pac_bayes": (6000.0, 16000.0),
    "shannon_entropy": (-1.2, -1.1),
}

NOTE = (
    "error: standard error. p: unit of a parameter. typical: a convolutional network of "
    "13,706 parameters on digits, SGD and LPF-SGD; larger networks differ, so compare "
    "networks of one shape on the same data."
)


class Report(NamedTuple):
    """All measures of one network, from :func:`report`; ``print`` shows a table.

    Attributes:
      values: the measures by name: numbers, and Estimates with their errors.
      seconds: what each took, with compilation; None: not known.

    Example:
      >>> from flatopt import sharpness
      >>> found = sharpness.Report({"pac_bayes": 7000.0}, {"pac_bayes": 0.5})
      >>> for line in str(found).splitlines()[:3]:
      ...     print(line)
      measure    value  error  unit  typical        seconds
      pac_bayes   7000         1     6000 to 16000  0.5
          squared distance from the start in units of tolerated noise
    """

    values: dict[str, Any]
    seconds: dict[str, float] | None = None

    def to_dict(self) -> dict[str, float]:
        """Plain numbers by name; errors as ``NAME_standard_error``, time as ``seconds``.

        Example:
          >>> from flatopt import sharpness
          >>> sharpness.Report({"loss": 0.5}).to_dict()
          {'loss': 0.5}
        """
        found = {}
        for name, value in self.values.items():
            if isinstance(value, Estimate):
                found[name] = float(value.value)
                found[f"{name}_standard_error"] = float(value.standard_error)
            else:
                found[name] = float(value)
        if self.seconds is not None:
            found["seconds"] = float(sum(self.seconds.values()))
        return found

    def __str__(self):
        lines = [tables.table(tables.OF_MEASURES, self._rows())]
        if self.values:
            lines += ["", *tables.wrapped(self._note())]
        return "\n".join(lines)

    def _repr_html_(self):
        note = tables.paragraph(self._note()) if self.values else ""
        return tables.html_table(tables.OF_MEASURES, self._rows()) + note

    def _rows(self):
        rows = []
        for name, value in self.values.items():
            error = ""
            if isinstance(value, Estimate):
                value, error = value.value, f"{float(value.standard_error):.2g}"
            unit, meaning = EXPLAINED.get(name, ("", ""))
            typical, took = TYPICAL.get(name, ()), (self.seconds or {}).get(name)
            row = name, float(value), error, unit, typical, took, meaning
            rows.append(tables.row_of_measure(*row))
        return rows

    def _note(self):
        return tables.note_of_time(NOTE, self.seconds)


def report(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    data: Any,
    *,
    model_fn: ModelFn | None = None,
    inputs: Any = None,
    initial_params: Any = None,
    sigma: float = 0.01,
    rho: float = 0.05,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
    progress: Any = None,
) -> Report:
    """All measures at one point, sharing what they can.

    One probe gives the trace and the Frobenius norm. Cost: some 1,500 losses, gradients and
    products of all data. At a zero gradient the epsilon sharpness is not a number.

    Args:
      loss_fn, params, key, data, weight_fn, mask, constants: see :func:`low_pass`.
      model_fn: for the Shannon entropy: ``model_fn(params, inputs) -> logits``; it takes
        ``constants`` last where there are some.
      inputs: for the Shannon entropy.
      initial_params: for the PAC-Bayes measure.
      sigma: scale of the low-pass measure.
      rho: radius of the worst and average cases.
      progress: True for a bar of measures, or a function ``progress(done, total,
        description)``; None: a bar where it takes long; False: none. Before it starts, a
        line says about how long it will take, where that is more than three seconds.

    Returns:
      A :class:`Report`: ``print`` it, show it in a notebook, or log its ``to_dict()``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.report(
      ...     lambda p, batch: jnp.mean((batch @ p) ** 2), jnp.ones(2), jax.random.key(0),
      ...     jnp.eye(2))
      >>> round(float(found.values["trace"].value), 3)
      2.0
    """
    bars.check_progress(progress)
    checks.check_random_key(key)
    check_positive(sigma, "sigma")
    check_positive(rho, "rho")
    _check_optional(params, model_fn, inputs, initial_params, constants)
    options = {"weight_fn": weight_fn, "mask": mask, "constants": constants}
    operator = curvature.hessian(loss_fn, params, data, **options)
    base = operator.risk.value
    checks.check_concrete(base, "report")
    each, compiling = operator.risk.time_gradient()
    expected = GRADIENTS * each + COMPILED * compiling
    bars.announce(progress, expected, "sharpness.report", bars.SHORT)
    keys = [random.fold_in(key, index) for index in range(9)]
    given = loss_fn, params, data, options
    measures = {
        "loss": lambda: float(base),
        **_of_curvature(operator, keys, given),
        **_of_rises(operator.risk, base, keys, given, sigma, rho),
    }
    if initial_params is not None:
        start = {"initial_params": initial_params, "data": data}
        found = functools.partial(
            pac_bayes, loss_fn, params, keys[8], **start, **options
        )
        measures["pac_bayes"] = lambda: found().value
    if model_fn is not None:
        measures["shannon_entropy"] = lambda: shannon_entropy(
            model_fn, params, inputs, constants=constants
        )
    return Report(*_measured(measures, progress))


def _check_optional(params, model_fn, inputs, initial_params, constants):
    if (model_fn is None) != (inputs is None):
        raise ValueError(
            "model_fn and inputs must be given together, got one; both are for the Shannon "
            "entropy."
        )
    if initial_params is not None:
        check_initial(initial_params, params)
    if model_fn is not None:
        check_model(model_fn, constants)


def _of_curvature(operator, keys, given):
    """Measures of the Hessian, whose operator they share, and of the empirical Fisher."""
    loss_fn, params, data, options = given
    return {
        "probe": lambda: curvature.probe(operator, keys[0]),
        "max_eigenvalue": lambda: curvature.eigenpairs(operator, keys[1]),
        "effective_dimension": lambda: dimension_of(operator, keys[2]),
        "fisher_rao_hessian": lambda: form_of(operator),
        "fisher_rao_empirical": lambda: fisher_rao_empirical(
            loss_fn, params, data, **options
        ),
    }


def _of_rises(risk, base, keys, given, sigma, rho):
    """Measures of how much the loss rises around the point."""
    loss_fn, params, data, options = given
    rise = functools.partial(mean_rise, risk, num_samples=100, base=base)
    worst = functools.partial(
        worst_case, loss_fn, params, keys[6], rho=rho, data=data, **options
    )
    return {
        "low_pass": lambda: rise(keys[3], sigma, kernel=ISOTROPIC, name="low_pass"),
        "local_entropy": lambda: entropy_of(
            rises(risk, keys[4], 0.1, 100, ISOTROPIC, base)
        ),
        "local_entropy_gradient": lambda: walked(risk, keys[5]),
        "epsilon_sharpness": lambda: epsilon_sharpness_of(risk, 0.1),
        "worst_case": worst,
        "worst_case_adaptive": functools.partial(worst, adaptive=True),
        "average_case_adaptive": lambda: rise(
            keys[7], rho, kernel=ELEMENTWISE, name="average_case_adaptive"
        ),
    }


def _measured(measures, progress):
    """The values by name, and the seconds that each took."""
    found, seconds = bars.timed(measures, progress, "sharpness.report")
    values = {}
    for name, value in found.items():
        if name == "probe":
            values["trace"] = value.trace
            values["frobenius_norm"] = value.frobenius_norm
        elif name == "max_eigenvalue":
            values[name] = float(value.values[0])
            values["max_eigenvalue_bound"] = float(value.residuals[0])
        else:
            values[name] = value
    # The trace names the time of the whole probe.
    named = {"trace" if name == "probe" else name: s for name, s in seconds.items()}
    return values, named
