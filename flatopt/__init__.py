"""Optimizers that find flat minima, and the analysis that tells how flat one is."""

from flatopt import kernels as kernels
from flatopt import schedules as schedules
from flatopt.optimizers import lpf_sgd as lpf_sgd
from flatopt.optimizers import nso_sgd as nso_sgd
from flatopt.smoothing import smooth as smooth
from flatopt.smoothing import smooth_value_and_grad as smooth_value_and_grad
from flatopt.transforms import SkipNonfiniteState as SkipNonfiniteState
from flatopt.transforms import SmoothGradientsState as SmoothGradientsState
from flatopt.transforms import skip_nonfinite as skip_nonfinite
from flatopt.transforms import smooth_gradients as smooth_gradients

__version__ = "0.1.0"

__all__ = [
    "SkipNonfiniteState",
    "SmoothGradientsState",
    "kernels",
    "lpf_sgd",
    "nso_sgd",
    "schedules",
    "skip_nonfinite",
    "smooth",
    "smooth_gradients",
    "smooth_value_and_grad",
]
