"""All measures at once."""

import functools
import time
from typing import Any, NamedTuple

import jax

from flatopt import curvature
from flatopt._core import checks, random, tables
from flatopt._core import progress as bars
from flatopt._core.estimates import Estimate
from flatopt._core.types import LossFn, ModelFn, WeightFn
from flatopt.sharpness._average import (
    ELEMENTWISE,
    ISOTROPIC,
    check_initial,
    entropy_of,
    local_entropy_gradient,
    mean_rise,
    pac_bayes,
    rises,
)
from flatopt.sharpness._curvature import (
    effective_dimension,
    fisher_rao_empirical,
    fisher_rao_hessian,
    shannon_entropy,
)
from flatopt.sharpness._solve import check_positive
from flatopt.sharpness._worst import epsilon_sharpness_of, worst_case

GRADIENTS = 1000  # of all data in a report, 640 of them for the effective dimension

MEANINGS = {
    "loss": "mean loss of the data",
    "trace": "sum of the Hessian's eigenvalues",
    "frobenius_norm": "root of the sum of their squares",
    "max_eigenvalue": "curvature of the sharpest direction",
    "max_eigenvalue_bound": "an eigenvalue lies within this distance",
    "effective_dimension": "directions that curve more than 1",
    "fisher_rao_hessian": "parameters times Hessian times parameters",
    "fisher_rao_empirical": "mean square slope along the parameters",
    "low_pass": "mean rise under noise of scale sigma",
    "local_entropy": "negative log mean of exp(-rise), noise of scale 0.1",
    "local_entropy_gradient": "distance that Entropy-SGD's walk is drawn away",
    "epsilon_sharpness": "1 / distance along the gradient to a rise of 0.1",
    "worst_case": "largest rise found within distance rho",
    "worst_case_adaptive": "the same in units of each parameter",
    "average_case_adaptive": "mean rise under noise of rho times each parameter",
    "pac_bayes": "squared distance from the start in units of tolerated noise",
    "shannon_entropy": "minus the mean entropy of the predictions, nats",
}


class Report(NamedTuple):
    """All measures of one network, from :func:`report`; ``print`` shows a table.

    Attributes:
      values: the measures by name: numbers, and Estimates with their errors.

    Example:
      >>> from flatopt import sharpness
      >>> print(sharpness.Report({"trace": 2.0}))
      measure  value  standard error  meaning
      trace        2                  sum of the Hessian's eigenvalues
    """

    values: dict[str, Any]

    def to_dict(self) -> dict[str, float]:
        """Plain numbers by name; errors as ``NAME_standard_error``.

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
        return found

    def __str__(self):
        rows = []
        for name, value in self.values.items():
            error = ""
            if isinstance(value, Estimate):
                value, error = value.value, f"{float(value.standard_error):.2g}"
            row = name, tables.number(value), error, MEANINGS.get(name, "")
            rows.append(row)
        return tables.table(("measure", "value", "standard error", "meaning"), rows)


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
    progress: Any = None,
) -> Report:
    """All measures at one point, sharing what they can.

    One probe gives the trace and the Frobenius norm. Cost: some 1,500 losses, gradients and
    products of all data. At a zero gradient the epsilon sharpness is not a number.

    Args:
      loss_fn, params, key, data, weight_fn: see :func:`low_pass`.
      model_fn: for the Shannon entropy: ``model_fn(params, inputs) -> logits``.
      inputs: for the Shannon entropy.
      initial_params: for the PAC-Bayes measure.
      sigma: scale of the low-pass measure.
      rho: radius of the worst and average cases.
      progress: True for a bar of measures, or a function ``progress(done, total,
        description)``; None: a bar where it takes long; False: none. Before it starts, a
        line says so where all will take more than a minute.

    Returns:
      A :class:`Report`.

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
    if (model_fn is None) != (inputs is None):
        raise ValueError(
            "model_fn and inputs must be given together, got one; both are for the Shannon "
            "entropy."
        )
    checks.check_random_key(key)
    check_positive(sigma, "sigma")
    check_positive(rho, "rho")
    if initial_params is not None:
        check_initial(initial_params, params)
    if model_fn is not None:
        checks.check_function(model_fn, "model_fn", "model_fn(params, inputs)", count=2)
    options = {"data": data, "weight_fn": weight_fn}
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    risk = operator.risk
    keys = [random.fold_in(key, index) for index in range(9)]
    base = risk.value
    seconds = _time_of_gradient(risk)
    bars.announce(progress, GRADIENTS * seconds, "sharpness.report")
    rise = functools.partial(mean_rise, risk, num_samples=100, base=base)
    measures = {
        "loss": lambda: float(base),
        "probe": lambda: curvature.probe(operator, keys[0]),
        "max_eigenvalue": lambda: curvature.eigenpairs(operator, keys[1]),
        "effective_dimension": lambda: effective_dimension(
            loss_fn, params, keys[2], **options
        ),
        "fisher_rao_hessian": lambda: fisher_rao_hessian(loss_fn, params, **options),
        "fisher_rao_empirical": lambda: fisher_rao_empirical(
            loss_fn, params, data, weight_fn=weight_fn
        ),
        "low_pass": lambda: rise(keys[3], sigma, kernel=ISOTROPIC, name="low_pass"),
        "local_entropy": lambda: entropy_of(
            rises(risk, keys[4], 0.1, 100, ISOTROPIC, base)
        ),
        "local_entropy_gradient": lambda: local_entropy_gradient(
            loss_fn, params, keys[5], data, weight_fn=weight_fn
        ),
        "epsilon_sharpness": lambda: epsilon_sharpness_of(risk, 0.1),
        "worst_case": lambda: worst_case(loss_fn, params, keys[6], rho=rho, **options),
        "worst_case_adaptive": lambda: worst_case(
            loss_fn, params, keys[6], rho=rho, adaptive=True, **options
        ),
        "average_case_adaptive": lambda: rise(
            keys[7], rho, kernel=ELEMENTWISE, name="average_case_adaptive"
        ),
    }
    if initial_params is not None:
        measures["pac_bayes"] = lambda: (
            pac_bayes(
                loss_fn, params, keys[8], initial_params=initial_params, **options
            ).value
        )
    if model_fn is not None:
        measures["shannon_entropy"] = lambda: shannon_entropy(model_fn, params, inputs)
    return Report(_measured(measures, progress))


def _measured(measures, progress):
    values = {}
    name = "sharpness.report"  # whose measures take very different times
    with bars.bar(progress, len(measures), name, announced=True) as bar:
        for name, measure in measures.items():
            found = measure()
            if name == "probe":
                values["trace"] = found.trace
                values["frobenius_norm"] = found.frobenius_norm
            elif name == "max_eigenvalue":
                values["max_eigenvalue"] = float(found.values[0])
                values["max_eigenvalue_bound"] = float(found.residuals[0])
            else:
                values[name] = found
            bar.update()
    return values


def _time_of_gradient(risk):
    """Seconds of a gradient of all data: of the second, where the first compiles."""
    for _ in range(2):
        start = time.monotonic()
        jax.block_until_ready(risk.value_and_gradient())
    return time.monotonic() - start
