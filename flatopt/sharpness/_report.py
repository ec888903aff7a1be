"""All measures at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from flatopt import curvature
from flatopt._core import random
from flatopt._core.estimates import Estimate
from flatopt.sharpness._average import (
    ELEMENTWISE,
    ISOTROPIC,
    entropy_of,
    local_entropy_gradient,
    pac_bayes,
    rises,
)
from flatopt.sharpness._curvature import (
    effective_dimension,
    fisher_rao_empirical,
    shannon_entropy,
)
from flatopt.sharpness._worst import epsilon_sharpness_of, worst_case


class Report(NamedTuple):
    """All measures of one network, from :func:`report`; ``print`` shows a table.

    Attributes:
      values: the measures by name: numbers, and Estimates with their errors.

    Example:
      >>> from flatopt import sharpness
      >>> print(sharpness.Report({"trace": 2.0}))
      measure   value  standard error
      trace     2
    """

    values: dict[str, Any]

    def __str__(self):
        width = max(8, *(len(name) for name in self.values))
        lines = [f"{'measure':{width}}  value  standard error"]
        for name, value in self.values.items():
            if isinstance(value, Estimate):
                value, error = (
                    float(value.value),
                    f"  {float(value.standard_error):.2g}",
                )
            else:
                error = ""
            lines.append(f"{name:{width}}  {value:.4g}{error}")
        return "\n".join(lines)


def report(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    data: Any,
    *,
    model_fn: Callable[..., Any] | None = None,
    inputs: Any = None,
    initial_params: Any = None,
    sigma: float = 0.01,
    rho: float = 0.05,
    weight_fn: Callable[[Any], Any] | None = None,
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
    if (model_fn is None) != (inputs is None):
        raise ValueError(
            "model_fn and inputs must be given together, got one; both are for the Shannon "
            "entropy."
        )
    options = {"data": data, "weight_fn": weight_fn}
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    risk = operator.risk
    keys = [random.fold_in(key, index) for index in range(9)]
    base = risk.value
    probe = curvature.probe(operator, keys[0])
    top = curvature.eigenpairs(operator, keys[1])
    values = {
        "loss": float(base),
        "trace": probe.trace,
        "frobenius_norm": probe.frobenius_norm,
        "max_eigenvalue": float(top.values[0]),
        "max_eigenvalue_bound": float(top.residuals[0]),
        "effective_dimension": effective_dimension(loss_fn, params, keys[2], **options),
        "fisher_rao_hessian": float(operator.quadratic_form(operator.like)),
        "fisher_rao_empirical": fisher_rao_empirical(
            loss_fn, params, data, weight_fn=weight_fn
        ),
        "low_pass": Estimate.of(rises(risk, keys[3], sigma, 100, ISOTROPIC, base)),
        "local_entropy": entropy_of(rises(risk, keys[4], 0.1, 100, ISOTROPIC, base)),
        "local_entropy_gradient": local_entropy_gradient(
            loss_fn, params, keys[5], data
        ),
        "epsilon_sharpness": epsilon_sharpness_of(risk, 0.1),
        "worst_case": worst_case(loss_fn, params, keys[6], rho=rho, **options),
        "worst_case_adaptive": worst_case(
            loss_fn, params, keys[6], rho=rho, adaptive=True, **options
        ),
        "average_case_adaptive": Estimate.of(
            rises(risk, keys[7], rho, 100, ELEMENTWISE, base)
        ),
    }
    if initial_params is not None:
        values["pac_bayes"] = pac_bayes(
            loss_fn, params, keys[8], initial_params=initial_params, **options
        ).value
    if model_fn is not None:
        values["shannon_entropy"] = shannon_entropy(model_fn, params, inputs)
    return Report(values)
