r"""Measures of sharpness: how much the loss grows around a minimum.

Each takes ``loss_fn(params)``, or ``loss_fn(params, batch)`` with ``data=`` one batch or a
re-iterable of batches, whose examples weigh the same or as ``weight_fn(batch)`` says. For
all of them larger means sharper. Measures in units of the parameters change when layers are
rescaled without changing the function; :func:`normalize_filters` removes that freedom.
:func:`perturbed_accuracy` and :func:`round_filters` tell what a network keeps when its
weights change after training.
"""

from flatopt.sharpness._average import (
    PACBayes,
    average_case_adaptive,
    low_pass,
    pac_bayes,
)
from flatopt.sharpness._changes import perturbed_accuracy, round_filters
from flatopt.sharpness._curvature import (
    effective_dimension,
    fisher_rao_empirical,
    fisher_rao_gauss_newton,
    fisher_rao_hessian,
    shannon_entropy,
)
from flatopt.sharpness._entropy import local_entropy, local_entropy_gradient
from flatopt.sharpness._filters import NormalizedFilters, normalize_filters
from flatopt.sharpness._report import Report, report
from flatopt.sharpness._worst import epsilon_sharpness, m_sharpness, worst_case

__all__ = [
    "NormalizedFilters",
    "PACBayes",
    "Report",
    "average_case_adaptive",
    "effective_dimension",
    "epsilon_sharpness",
    "fisher_rao_empirical",
    "fisher_rao_gauss_newton",
    "fisher_rao_hessian",
    "local_entropy",
    "local_entropy_gradient",
    "low_pass",
    "m_sharpness",
    "normalize_filters",
    "pac_bayes",
    "perturbed_accuracy",
    "report",
    "round_filters",
    "shannon_entropy",
    "worst_case",
]
