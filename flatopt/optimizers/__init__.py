"""Ready recipes: chains with the papers' defaults; and whole optimizers."""

from flatopt.optimizers._adamw import lpf_adamw, nso_adamw
from flatopt.optimizers._ivon import IVONState, ivon
from flatopt.optimizers._posterior import posterior_kernel, sample_posterior
from flatopt.optimizers._sgd import asam_sgd, lpf_sgd, nso_sgd, sam_sgd

__all__ = [
    "IVONState",
    "asam_sgd",
    "ivon",
    "lpf_adamw",
    "lpf_sgd",
    "nso_adamw",
    "nso_sgd",
    "posterior_kernel",
    "sam_sgd",
    "sample_posterior",
]
