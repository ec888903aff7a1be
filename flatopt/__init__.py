"""Optimizers that find flat minima, and the analysis that tells how flat one is."""

from flatopt import curvature as curvature
from flatopt import kernels as kernels
from flatopt import schedules as schedules
from flatopt import sharpness as sharpness
from flatopt import stability as stability
from flatopt._counting import GradientCounter as GradientCounter
from flatopt.adversarial import AdversarialState as AdversarialState
from flatopt.adversarial import asam_gradients as asam_gradients
from flatopt.adversarial import bayesian_sam_gradients as bayesian_sam_gradients
from flatopt.adversarial import filterwise_asam_gradients as filterwise_asam_gradients
from flatopt.adversarial import fisher_sam_gradients as fisher_sam_gradients
from flatopt.adversarial import friendly_sam_gradients as friendly_sam_gradients
from flatopt.adversarial import gsam_gradients as gsam_gradients
from flatopt.adversarial import look_sam_gradients as look_sam_gradients
from flatopt.adversarial import random_sam_gradients as random_sam_gradients
from flatopt.adversarial import sam_gradients as sam_gradients
from flatopt.adversarial import usam_gradients as usam_gradients
from flatopt.entropy import entropy_sgd_gradients as entropy_sgd_gradients
from flatopt.optimizers import asam_sgd as asam_sgd
from flatopt.optimizers import lpf_adamw as lpf_adamw
from flatopt.optimizers import lpf_sgd as lpf_sgd
from flatopt.optimizers import nso_adamw as nso_adamw
from flatopt.optimizers import nso_sgd as nso_sgd
from flatopt.optimizers import sam_sgd as sam_sgd
from flatopt.smoothing import smooth as smooth
from flatopt.smoothing import smooth_value_and_grad as smooth_value_and_grad
from flatopt.tracking import TrackStabilityState as TrackStabilityState
from flatopt.tracking import track_stability as track_stability
from flatopt.transforms import AntiPGDState as AntiPGDState
from flatopt.transforms import SkipNonfiniteState as SkipNonfiniteState
from flatopt.transforms import SmoothGradientsState as SmoothGradientsState
from flatopt.transforms import anti_pgd as anti_pgd
from flatopt.transforms import skip_nonfinite as skip_nonfinite
from flatopt.transforms import smooth_gradients as smooth_gradients
from flatopt.zeroth_order import (
    smooth_gradients_zeroth_order as smooth_gradients_zeroth_order,
)

__version__ = "0.1.0"

__all__ = [
    "AdversarialState",
    "AntiPGDState",
    "anti_pgd",
    "asam_gradients",
    "asam_sgd",
    "bayesian_sam_gradients",
    "curvature",
    "entropy_sgd_gradients",
    "filterwise_asam_gradients",
    "fisher_sam_gradients",
    "friendly_sam_gradients",
    "GradientCounter",
    "gsam_gradients",
    "SkipNonfiniteState",
    "SmoothGradientsState",
    "kernels",
    "look_sam_gradients",
    "lpf_adamw",
    "lpf_sgd",
    "nso_adamw",
    "nso_sgd",
    "random_sam_gradients",
    "sam_gradients",
    "sam_sgd",
    "schedules",
    "sharpness",
    "skip_nonfinite",
    "smooth",
    "smooth_gradients",
    "smooth_gradients_zeroth_order",
    "smooth_value_and_grad",
    "stability",
    "TrackStabilityState",
    "track_stability",
    "usam_gradients",
]
