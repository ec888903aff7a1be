"""Transformations of gradients: the links that an optax chain is made of."""

from flatopt.transforms._accumulate import accumulate
from flatopt.transforms._anti_pgd import AntiPGDState, anti_pgd
from flatopt.transforms._arwp import arwp_gradients
from flatopt.transforms._chain import chain
from flatopt.transforms._counter import GradientCounter
from flatopt.transforms._entropy import entropy_sgd_gradients
from flatopt.transforms._ire import IREState, ire
from flatopt.transforms._papers import lpf_gradients, nso_gradients
from flatopt.transforms._read import loss, metrics
from flatopt.transforms._sam import gsam_gradients, sam_gradients, usam_gradients
from flatopt.transforms._sam_adaptive import (
    asam_gradients,
    filterwise_asam_gradients,
    fisher_sam_gradients,
)
from flatopt.transforms._sam_functional import functional_sam_gradients
from flatopt.transforms._sam_memory import (
    friendly_sam_gradients,
    look_sam_gradients,
    momentum_sam_gradients,
)
from flatopt.transforms._sam_noisy import noisy_sam_gradients, random_sam_gradients
from flatopt.transforms._skip import SkipNonfiniteState, skip_nonfinite
from flatopt.transforms._smooth import smooth_gradients
from flatopt.transforms._states import (
    AdversarialState,
    EntropySGDState,
    SmoothGradientsState,
)
from flatopt.transforms._track import TrackStabilityState, track_stability
from flatopt.transforms._zeroth_order import smooth_gradients_zeroth_order

__all__ = [
    "AdversarialState",
    "AntiPGDState",
    "EntropySGDState",
    "GradientCounter",
    "IREState",
    "SkipNonfiniteState",
    "SmoothGradientsState",
    "TrackStabilityState",
    "accumulate",
    "anti_pgd",
    "arwp_gradients",
    "asam_gradients",
    "chain",
    "entropy_sgd_gradients",
    "filterwise_asam_gradients",
    "fisher_sam_gradients",
    "friendly_sam_gradients",
    "functional_sam_gradients",
    "gsam_gradients",
    "ire",
    "look_sam_gradients",
    "loss",
    "metrics",
    "momentum_sam_gradients",
    "noisy_sam_gradients",
    "lpf_gradients",
    "nso_gradients",
    "random_sam_gradients",
    "sam_gradients",
    "skip_nonfinite",
    "smooth_gradients",
    "smooth_gradients_zeroth_order",
    "track_stability",
    "usam_gradients",
]
