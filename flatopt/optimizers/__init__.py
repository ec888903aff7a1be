"""Ready recipes: chains with the papers' defaults."""

from flatopt.optimizers._adamw import lpf_adamw, nso_adamw
from flatopt.optimizers._sgd import asam_sgd, lpf_sgd, nso_sgd, sam_sgd

__all__ = ["asam_sgd", "lpf_adamw", "lpf_sgd", "nso_adamw", "nso_sgd", "sam_sgd"]
