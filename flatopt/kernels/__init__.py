"""Kernels: which noise is added to the parameters.

A kernel is a function ``kernel(key, params) -> perturbation``. The perturbation
has the tree, shapes and shardings of ``params``; it is float32, symmetric, has
mean zero and unit scale: the ``scale`` of the smoothing multiplies it.

A sampler draws one array of independent values of mean 0 and variance 1; it has
the form of ``jax.random.normal``: ``sampler(key, shape, dtype)``.

The noise of a leaf depends on the key and on the leaf's path alone: another leaf
beside it, another sharding or another number of devices changes nothing.
"""

from flatopt._core.filters import FilterAxes as FilterAxes
from flatopt.kernels._changed import masked, one_layer, shared_magnitude
from flatopt.kernels._hardware import polynomial, relative_to_max, rounding
from flatopt.kernels._independent import elementwise, filterwise, isotropic
from flatopt.kernels._kernel import Kernel
from flatopt.kernels._samplers import Sampler as Sampler
from flatopt.kernels._samplers import irwin_hall, laplace, normal, signs, uniform

__all__ = [
    "Kernel",
    "elementwise",
    "filterwise",
    "irwin_hall",
    "isotropic",
    "laplace",
    "masked",
    "normal",
    "one_layer",
    "polynomial",
    "relative_to_max",
    "rounding",
    "shared_magnitude",
    "signs",
    "uniform",
]
