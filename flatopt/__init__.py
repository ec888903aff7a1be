"""Optimizers that find flat minima, and the analysis that tells how flat one is."""

import importlib as _importlib
import typing as _typing

__version__ = "0.1.0"

__all__ = [
    "AdversarialState",
    "AntiPGDState",
    "EntropySGDState",
    "GradientCounter",
    "IREState",
    "IVONState",
    "Radius",
    "SkipNonfiniteState",
    "SmoothGradientsState",
    "TrackStabilityState",
    "accumulate",
    "anti_pgd",
    "arwp_gradients",
    "asam_gradients",
    "asam_sgd",
    "chain",
    "curvature",
    "entropy_sgd_gradients",
    "filterwise_asam_gradients",
    "fisher_sam_gradients",
    "friendly_sam_gradients",
    "functional_sam_gradients",
    "gsam_gradients",
    "ire",
    "ivon",
    "kernels",
    "look_sam_gradients",
    "loss",
    "lpf_adamw",
    "lpf_gradients",
    "lpf_sgd",
    "metrics",
    "monitor",
    "momentum_sam_gradients",
    "noisy_sam_gradients",
    "nso_adamw",
    "nso_gradients",
    "nso_sgd",
    "posterior_kernel",
    "radius",
    "random_sam_gradients",
    "sam_gradients",
    "sam_sgd",
    "sample_posterior",
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

# All is imported when it is asked for: a script pays for what it uses.
_MODULES = (
    "curvature",
    "flax",
    "kernels",
    "plots",
    "schedules",
    "sharpness",
    "stability",
)
_HOMES = ("transforms", "optimizers", "smoothing", "stability", "sharpness._radius")

if _typing.TYPE_CHECKING:
    from flatopt import curvature as curvature
    from flatopt import flax as flax
    from flatopt import kernels as kernels
    from flatopt import plots as plots
    from flatopt import schedules as schedules
    from flatopt import sharpness as sharpness
    from flatopt import stability as stability
    from flatopt.optimizers import (
        IVONState,
        asam_sgd,
        ivon,
        lpf_adamw,
        lpf_sgd,
        nso_adamw,
        nso_sgd,
        posterior_kernel,
        sam_sgd,
        sample_posterior,
    )
    from flatopt.sharpness._radius import Radius, radius
    from flatopt.smoothing import (
        smooth,
        smooth_value_and_grad,
    )
    from flatopt.stability import monitor
    from flatopt.transforms import (
        AdversarialState,
        AntiPGDState,
        EntropySGDState,
        GradientCounter,
        IREState,
        SkipNonfiniteState,
        SmoothGradientsState,
        TrackStabilityState,
        accumulate,
        anti_pgd,
        arwp_gradients,
        asam_gradients,
        chain,
        entropy_sgd_gradients,
        filterwise_asam_gradients,
        fisher_sam_gradients,
        friendly_sam_gradients,
        functional_sam_gradients,
        gsam_gradients,
        ire,
        look_sam_gradients,
        loss,
        lpf_gradients,
        metrics,
        momentum_sam_gradients,
        noisy_sam_gradients,
        nso_gradients,
        random_sam_gradients,
        sam_gradients,
        skip_nonfinite,
        smooth_gradients,
        smooth_gradients_zeroth_order,
        track_stability,
        usam_gradients,
    )
else:

    def __getattr__(name):
        if name in _MODULES:
            return _importlib.import_module(f"flatopt.{name}")
        if name in __all__:
            for home in _HOMES:
                module = _importlib.import_module(f"flatopt.{home}")
                if hasattr(module, name):
                    return globals().setdefault(name, getattr(module, name))
        raise AttributeError(f"module 'flatopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})
