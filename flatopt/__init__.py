"""Optimizers that find flat minima, and the analysis that tells how flat one is."""

import importlib
from typing import TYPE_CHECKING

from flatopt import kernels, schedules
from flatopt.optimizers import (
    asam_sgd,
    lpf_adamw,
    lpf_sgd,
    nso_adamw,
    nso_sgd,
    sam_sgd,
)
from flatopt.smoothing import smooth, smooth_value_and_grad
from flatopt.transforms import (
    AdversarialState,
    AntiPGDState,
    EntropySGDState,
    GradientCounter,
    SkipNonfiniteState,
    SmoothGradientsState,
    TrackStabilityState,
    accumulate,
    anti_pgd,
    asam_gradients,
    bayesian_sam_gradients,
    chain,
    entropy_sgd_gradients,
    filterwise_asam_gradients,
    fisher_sam_gradients,
    friendly_sam_gradients,
    gsam_gradients,
    look_sam_gradients,
    loss,
    lpf_gradients,
    metrics,
    nso_gradients,
    random_sam_gradients,
    sam_gradients,
    skip_nonfinite,
    smooth_gradients,
    smooth_gradients_zeroth_order,
    track_stability,
    usam_gradients,
)

__version__ = "0.1.0"

__all__ = [
    "AdversarialState",
    "AntiPGDState",
    "EntropySGDState",
    "GradientCounter",
    "SkipNonfiniteState",
    "SmoothGradientsState",
    "TrackStabilityState",
    "accumulate",
    "anti_pgd",
    "asam_gradients",
    "asam_sgd",
    "bayesian_sam_gradients",
    "chain",
    "curvature",
    "entropy_sgd_gradients",
    "filterwise_asam_gradients",
    "fisher_sam_gradients",
    "friendly_sam_gradients",
    "gsam_gradients",
    "kernels",
    "look_sam_gradients",
    "loss",
    "lpf_adamw",
    "lpf_gradients",
    "lpf_sgd",
    "metrics",
    "nso_adamw",
    "nso_gradients",
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
    "track_stability",
    "usam_gradients",
]

# Imported when they are asked for: analysis that a training script does not need, and two
# modules that need an extra.
_LAZY = ("curvature", "flax", "plots", "sharpness", "stability")

if TYPE_CHECKING:
    from flatopt import curvature as curvature
    from flatopt import flax as flax
    from flatopt import plots as plots
    from flatopt import sharpness as sharpness
    from flatopt import stability as stability
else:

    def __getattr__(name):
        if name in _LAZY:
            return importlib.import_module(f"flatopt.{name}")
        raise AttributeError(f"module 'flatopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY, "__version__"})
