"""Kernels of what will hold the weights: number formats and analog hardware."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import binding, checks, filters, trees
from flatopt._core.filters import FilterAxes
from flatopt.kernels._kernel import Kernel, leafwise
from flatopt.kernels._samplers import Sampler, normal, uniform


def relative_to_max(
    filter_axes: FilterAxes = None, sampler: Sampler = normal
) -> Kernel:
    r"""Noise in proportion to the largest weight of each output channel.

    Every element of channel c gets noise of standard deviation :math:`\max|W_c|`: the
    additive noise of analog hardware, whose range is set by the largest weight. For noise
    in proportion to each weight itself see :func:`elementwise`.

    Args:
      filter_axes: the axes that index channels, see :func:`filterwise`; 0 for PyTorch
        layouts. A leaf with at most one axis is one channel.
      sampler: values of mean 0 and variance 1. Default: standard normal.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Raises:
      ValueError: when drawn, as :func:`filterwise`.

    References:
      Rasch, Moreda, Gokmen, Le Gallo, Carta, Goldberg, El Maghraoui, Sebastian, Narayanan,
      `A Flexible and Fast PyTorch Toolkit for Simulating Training and Inference on Analog
      Crossbar Arrays <https://arxiv.org/abs/2104.02184>`_, AICAS 2021.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.relative_to_max(sampler=flatopt.kernels.signs)
      >>> noise = kernel(jax.random.key(0), {"w": jnp.array([[3.0, 0.0], [-4.0, 1.0]])})
      >>> jnp.abs(noise["w"])  # the columns have maxima 4 and 1
      Array([[4., 1.],
             [4., 1.]], dtype=float32)
    """
    return leafwise(
        sampler,
        lambda params: filters.filter_max(filter_axes, binding.whole_params(params)),
    )


def rounding(bits: int, filter_axes: FilterAxes = None) -> Kernel:
    r"""Uniform noise of the size of the error of rounding weights to a few bits.

    A channel c rounded to signed symmetric integers of b bits has the step
    :math:`s_c = 2 \max|W_c| / (2^b - 2)`; every element gets noise that is uniform
    between :math:`-s_c/2` and :math:`s_c/2`. With a scale of 1 that is the error of
    rounding to nearest; it is no noise of unit variance.

    Args:
      bits: number of bits b of the format, at least 2.
      filter_axes: the axes that index channels with a step of their own, see
        :func:`filterwise`; ``()`` for one step a leaf, 0 for PyTorch layouts. A leaf with
        at most one axis is one channel.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Raises:
      ValueError: if ``bits`` is no int of at least 2; when drawn, as :func:`filterwise`.

    References:
      Liu, Zhang, Yang, Hu, Guo, Wang, `NoisyQuant: Noisy Bias-Enhanced Post-Training
      Activation Quantization for Vision Transformers
      <https://arxiv.org/abs/2211.16056>`_, CVPR 2023, for rounding as uniform noise.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.rounding(3)  # -3, -2, ..., 3: a step is max|W| / 3
      >>> noise = kernel(jax.random.key(0), 6 * jnp.ones((1000, 1)))
      >>> round(float(noise.max()), 2), round(float(noise.min()), 2)
      (1.0, -1.0)
    """
    if (
        isinstance(bits, bool)
        or not isinstance(bits, numbers.Integral)
        or not 2 <= bits <= 64
    ):
        raise ValueError(
            f"bits must be an int from 2 to 64, got {bits!r}; it is the number of bits of "
            "the format, with its sign."
        )
    # The step over the maximum, and the deviation of a uniform variable over its width.
    factor = 2 / (2 ** int(bits) - 2) / math.sqrt(12)

    def deviation(params):
        largest = filters.filter_max(filter_axes, binding.whole_params(params))
        return lambda path, leaf: factor * largest(path, leaf)

    return leafwise(uniform, deviation)


def polynomial(
    coefficients: tuple[float, ...],
    filter_axes: FilterAxes = None,
    sampler: Sampler = normal,
) -> Kernel:
    r"""Noise whose deviation is a polynomial of the weight's share of the largest one.

    .. math:: \left(c_0 + c_1 \frac{|w|}{w_{max}} + c_2 \frac{w^2}{w_{max}^2} + \dots
        \right) w_{max}

    with :math:`w_{max}` the largest magnitude in the channel: the noise of programming
    conductances, as measured on analog devices. ``(1,)`` is :func:`relative_to_max`,
    ``(0, 1)`` is :func:`elementwise`.

    Args:
      coefficients: :math:`c_0, c_1, \dots`, finite numbers, such as
        ``(0.0105, 0.0786, -0.0469)``.
      filter_axes: the axes that index channels, see :func:`filterwise`; 0 for PyTorch
        layouts. A leaf with at most one axis is one channel.
      sampler: values of mean 0 and variance 1. Default: standard normal.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Raises:
      TypeError, ValueError: if ``coefficients`` are no finite numbers; when drawn, as
        :func:`filterwise`.

    References:
      Joshi, Le Gallo, Haefeli, Boybat, Nandakumar, Piveteau, Dazzi, Rajendran, Sebastian,
      Eleftheriou, `Accurate Deep Neural Network Inference Using Computational Phase-Change
      Memory <https://arxiv.org/abs/1906.03138>`_, Nature Communications 2020.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.polynomial(
      ...     (0.5, 0.25), sampler=flatopt.kernels.signs)
      >>> jnp.abs(kernel(jax.random.key(0), jnp.array([[4.0], [-2.0], [0.0]])))
      Array([[3. ],
             [2.5],
             [2. ]], dtype=float32)
    """
    coefficients = _check_coefficients(coefficients)

    def deviation(params):
        largest = filters.filter_max(filter_axes, binding.whole_params(params))

        def of_leaf(path, leaf):
            top = largest(path, leaf)
            share = jnp.abs(trees.widen(leaf)) / jnp.where(top == 0, 1, top)
            factor = jnp.zeros_like(share)
            for coefficient in reversed(coefficients):
                factor = factor * share + jnp.asarray(coefficient, share.dtype)
            return factor * top

        return of_leaf

    return leafwise(sampler, deviation)


def _check_coefficients(coefficients):
    if not isinstance(coefficients, tuple | list) or not coefficients:
        raise TypeError(
            f"coefficients must be a tuple of numbers, got {coefficients!r}; write "
            "(0.1, 0.2) for 0.1 + 0.2 |w| / w_max."
        )
    for coefficient in coefficients:
        if isinstance(coefficient, jax.core.Tracer):
            continue
        is_number = isinstance(coefficient, numbers.Real | np.ndarray | jax.Array)
        # A coefficient may be negative; everything else is as for a scale.
        is_number = is_number and jnp.result_type(coefficient) != jnp.bool
        checks.check_scale(
            abs(coefficient) if is_number else coefficient, "coefficients"
        )
    return tuple(coefficients)
