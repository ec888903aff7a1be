"""Kernels of independent values: they differ in the deviation of an element."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from flatopt._core import binding, filters
from flatopt._core.filters import FilterAxes
from flatopt.kernels._kernel import FILTER, PARAMETER, Kernel, leafwise
from flatopt.kernels._samplers import Sampler, normal


def isotropic(sampler: Sampler = normal) -> Kernel:
    """Independent noise of unit variance for every parameter (the kernel of NSO).

    Args:
      sampler: values of mean 0 and variance 1, in the form of
        ``jax.random.normal``. Default: standard normal.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    References:
      Zhang, Li, Ju, `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024, Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.isotropic(flatopt.kernels.signs)
      >>> noise = kernel(jax.random.key(0), {"w": jnp.zeros((2, 3))})
      >>> noise["w"].shape, bool(jnp.all(jnp.abs(noise["w"]) == 1))
      ((2, 3), True)
    """
    return leafwise(sampler, unit=PARAMETER)


def filterwise(
    sampler: Sampler = normal,
    *,
    filter_axes: FilterAxes = None,
    norms_of: Callable[[Any], Any] | None = None,
) -> Kernel:
    r"""Noise in proportion to the norm of each filter (the kernel of LPF-SGD).

    Every element of filter :math:`\theta_f` gets noise of standard deviation
    :math:`\|\theta_f\|_2`, the norm over the whole filter at the present
    parameters. A leaf with at most one axis is one filter. No leaf is skipped.

    Args:
      sampler: values of mean 0 and variance 1. Default: standard normal.
      filter_axes: the axes of a leaf that index its filters: an int; a tuple of
        ints (``()``: the whole leaf is one filter); a function
        ``(path, leaf) -> axes`` of the path as a string such as
        ``"dense/kernel"``; or a tree with an int or a tuple for each leaf, at
        the paths of ``params``. A tuple of ints is always the axes of one leaf, or
        of all: for ``params`` that are a tuple, give a list. Default: Flax's layouts.
        That is the last axis, but the first for a leaf named ``embedding``; beside a
        kernel, its bias tells whether the kernel has several output axes (attention)
        or stacked layers; in :mod:`flatopt.flax` the model tells. PyTorch layouts: 0.
      norms_of: a function of all parameters that returns arrays whose filter norms are
        used instead of those of the leaves, at the paths of the leaves that get noise
        and in their shapes. For noise on a frozen weight in proportion to what it makes
        with its adapters. Default: the parameters themselves.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Raises:
      ValueError: when drawn, if ``filter_axes`` names an axis that a leaf does
        not have, a tree lacks the path of a leaf, or ``norms_of`` returns another shape.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 5; as in the
      authors' code the scale multiplies the standard deviation.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.filterwise(flatopt.kernels.signs)
      >>> noise = kernel(jax.random.key(0), {"w": jnp.array([[3.0, 0.0], [4.0, 1.0]])})
      >>> jnp.abs(noise["w"])  # the columns have norms 5 and 1
      Array([[5., 1.],
             [5., 1.]], dtype=float32)
    """
    if norms_of is not None and not callable(norms_of):
        raise TypeError(
            f"norms_of must be a function of the parameters, got {norms_of!r}; return "
            "arrays at the paths of the leaves that get noise."
        )

    def deviation(params):
        if norms_of is None:
            return filters.filter_norm(filter_axes, binding.whole_params(params))
        return filters.norm_of_other(
            filter_axes, norms_of(binding.whole_params(params))
        )

    return leafwise(sampler, deviation, FILTER if norms_of is None else None)


def elementwise(sampler: Sampler = normal) -> Kernel:
    r"""Noise of standard deviation :math:`|\theta_i|` for element i.

    Args:
      sampler: values of mean 0 and variance 1. Default: standard normal.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.elementwise(flatopt.kernels.signs)
      >>> jnp.abs(kernel(jax.random.key(0), jnp.array([0.0, -2.0, 3.0])))
      Array([0., 2., 3.], dtype=float32)
    """
    return leafwise(sampler, lambda params: lambda path, leaf: jnp.abs(leaf))
