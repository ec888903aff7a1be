r"""Curvature with error bars: operators, traces, norms, eigenvalues, spectra.

An operator stands for a symmetric matrix over the parameters that is never formed: the
Hessian of a mean loss, its Gauss-Newton part, the empirical Fisher matrix or the
covariance of the gradient noise. ``data`` is one batch (a tuple, a dict or an array), or
a re-iterable of batches of any sizes (a list, a data loader); every example weighs the
same, or as ``weight_fn(batch)`` says. On one batch everything but ``rtol=``,
:func:`eigenpairs` and :func:`spectral_density` works inside ``jax.jit``; a re-iterable is
a loop on the host.
"""

from flatopt._core.estimates import Estimate
from flatopt.curvature._block_lanczos import block_lanczos
from flatopt.curvature._cross_entropy import cross_entropy
from flatopt.curvature._density import SpectralDensity, spectral_density
from flatopt.curvature._diagonal import diagonal
from flatopt.curvature._lanczos import Eigenpairs, eigenpairs
from flatopt.curvature._operator import Operator
from flatopt.curvature._operators import (
    empirical_fisher,
    finite_difference_hessian,
    gauss_newton,
    gradient_covariance,
    hessian,
)
from flatopt.curvature._population import population_frobenius_norm
from flatopt.curvature._probes import Probe, probe, trace
from flatopt.curvature._report import Report, report
from flatopt.curvature._xtrace import xtrace

__all__ = [
    "Eigenpairs",
    "Estimate",
    "Operator",
    "Probe",
    "Report",
    "SpectralDensity",
    "block_lanczos",
    "cross_entropy",
    "diagonal",
    "eigenpairs",
    "empirical_fisher",
    "finite_difference_hessian",
    "gauss_newton",
    "gradient_covariance",
    "hessian",
    "population_frobenius_norm",
    "probe",
    "report",
    "spectral_density",
    "trace",
    "xtrace",
]
