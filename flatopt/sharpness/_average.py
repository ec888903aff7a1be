"""Averages of the loss over random perturbations."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt import kernels
from flatopt._core import (
    binding,
    blocks,
    checks,
    parts,
    streams,
    trees,
    vectors,
)
from flatopt._core.estimates import Estimate
from flatopt._core.risk import Risk
from flatopt._core.types import KernelFn, LossFn, Mask, WeightFn
from flatopt.curvature._draws import probe_keys
from flatopt.sharpness._solve import check_number, check_positive, solve


class PACBayes(NamedTuple):
    """Result of :func:`pac_bayes`.

    Attributes:
      value: the measure.
      sigma: the standard deviation of the noise that raises the loss by the target.

    Example:
      >>> from flatopt import sharpness
      >>> sharpness.PACBayes(value=30.0, sigma=0.1).sigma
      0.1
    """

    value: float
    sigma: float


@functools.lru_cache(maxsize=64)
def noise_move(kernel):
    def move(key, params, fixed):
        scale, whole = fixed
        noise = binding.bind(kernel, key, params, whole)(key)
        return jax.tree.map(
            lambda p, u: trees.widen(p) + scale.astype(u.dtype) * u, params, noise
        )

    return move


ISOTROPIC, ELEMENTWISE = kernels.isotropic(), kernels.elementwise()


def rises(risk, key, scale, num_samples, kernel, base=None):
    """Loss at random perturbations less the loss, shape (num_samples,)."""
    base = risk.value if base is None else base
    checks.check_random_key(key)
    keys = probe_keys(key, 0, num_samples)
    fixed = jnp.float32(scale), risk.whole
    return risk.losses(noise_move(kernel), keys, fixed) - base


def mean_rise(risk, key, scale, num_samples, kernel, name, base=None):
    """The mean of :func:`rises`, which must be a number."""
    found = rises(risk, key, scale, num_samples, kernel, base)
    advice = (
        f"it is nan at some perturbations of scale {scale}, so choose a smaller one."
    )
    return Estimate.of(check_number(found, name, advice))


def low_pass(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    sigma: float = 0.01,
    num_samples: int = 100,
    kernel: KernelFn | None = None,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Estimate:
    r"""The mean loss under random perturbation, less the loss.

    .. math:: E_U[L(\theta + \sigma U)] - L(\theta) \approx
        \tfrac{\sigma^2}{2} \operatorname{tr} H

    The paper measures it with isotropic noise on the filter-normalized network
    (:func:`normalize_filters`), without taking the loss away.

    Args:
      loss_fn: the mean loss.
      params: the parameters.
      key: a JAX random key.
      sigma: scale of the noise, > 0.
      num_samples: number of perturbations.
      kernel: the noise; default: :func:`flatopt.kernels.isotropic`. Make it once: code is
        compiled for each kernel, as for each loss.
      data: one batch, or a re-iterable of batches.
      weight_fn: weight of a batch; default: its number of examples.
      mask: the leaves that are moved; the others are constant. In the forms of
        :func:`flatopt.curvature.hessian`.
      constants: arrays that ``loss_fn`` takes last and that are not moved, such as running
        statistics; networks that differ in them share compiled code.

    Returns:
      An :class:`~flatopt.curvature.Estimate`.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import kernels, sharpness
      >>> found = sharpness.low_pass(
      ...     lambda p: jnp.sum(p ** 2), jnp.zeros(3), jax.random.key(0), sigma=0.1,
      ...     kernel=kernels.isotropic(kernels.signs))
      >>> round(float(found.value), 4)
      0.03
    """
    check_positive(sigma, "sigma")
    checks.check_count(num_samples)
    risk = Risk.of(loss_fn, params, data, weight_fn, mask, constants)
    kernel = ISOTROPIC if kernel is None else kernel
    return mean_rise(risk, key, sigma, num_samples, kernel, "low_pass")


def average_case_adaptive(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    rho: float = 0.1,
    num_samples: int = 100,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Estimate:
    r"""The mean loss at :math:`\theta + \rho |\theta| \odot U`, less the loss.

    Unchanged when layers are rescaled.

    Args:
      loss_fn, params, key, num_samples, data, weight_fn, mask, constants: see
        :func:`low_pass`.
      rho: scale of the noise in units of each parameter, > 0.

    Returns:
      An :class:`~flatopt.curvature.Estimate`.

    References:
      Andriushchenko, Croce, Müller, Hein, Flammarion, `A Modern Look at the Relationship
      between Sharpness and Generalization <https://arxiv.org/abs/2302.07011>`_, ICML 2023.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.average_case_adaptive(
      ...     lambda p: jnp.sum(p), jnp.ones(3), jax.random.key(0), num_samples=1000)
      >>> abs(float(found.value)) < 4 * float(found.standard_error)
      True
    """
    check_positive(rho, "rho")
    checks.check_count(num_samples)
    risk = Risk.of(loss_fn, params, data, weight_fn, mask, constants)
    name = "average_case_adaptive"
    return mean_rise(risk, key, rho, num_samples, ELEMENTWISE, name)


def pac_bayes(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    initial_params: Any,
    num_examples: int | None = None,
    epsilon: float = 0.1,
    num_samples: int = 10,
    delta: float = 1e-6,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> PACBayes:
    r"""Distance to the initialization, in units of the noise that the loss tolerates.

    .. math:: \frac{\|\theta - \theta_0\|^2}{4 \sigma^2} + \log \frac{2n}{\delta}, \qquad
        E_U[L(\theta + \sigma U)] - L(\theta) = \epsilon

    The scale is found by root finding on the same draws at each scale, so that the rise is a
    smooth function of it. The authors' code replaces the initialization that it is given by
    zeros; this does not.

    Args:
      loss_fn, params, key, data, weight_fn, mask, constants: see :func:`low_pass`. The
        distance is that of the leaves of the mask.
      initial_params: the parameters at initialization.
      num_examples: n; default: counted from ``data``.
      epsilon: rise of the loss, > 0.
      num_samples: number of perturbations.
      delta: probability that the bound fails.

    Returns:
      :class:`PACBayes`; sigma is infinite and the value the logarithm alone where no
      scale up to 1e6 raises the loss by epsilon.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4, after Jiang,
      Neyshabur, Mobahi, Krishnan, Bengio, `Fantastic Generalization Measures
      <https://arxiv.org/abs/1912.02178>`_, ICLR 2020.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.pac_bayes(
      ...     lambda p: jnp.sum(p ** 2), jnp.zeros(500), jax.random.key(0),
      ...     initial_params=jnp.ones(500), num_examples=100)
      >>> round(found.sigma, 3)  # sqrt(0.1 / 500)
      0.014
    """
    check_positive(epsilon, "epsilon")
    check_positive(delta, "delta")
    checks.check_count(num_samples)
    risk = Risk.of(loss_fn, params, data, weight_fn, mask, constants)
    checks.check_random_key(key)
    if num_examples is None:
        num_examples = _count_examples(risk)
    checks.check_count(num_examples, "num_examples", "it counts the examples in all")
    check_initial(initial_params, params)
    base = risk.value

    def rise(sigma):
        found = rises(risk, key, sigma, num_samples, ISOTROPIC, base)
        return checks.float_of(jnp.mean(found), "pac_bayes")

    sigma = solve(rise, epsilon, 1e-3, 1e6)
    start = parts.choose(initial_params, mask, constants).params
    difference = blocks.subtract(blocks.widen(risk.params), blocks.widen(start))
    distance = float(vectors.dot(difference, difference))
    penalty = distance / (4 * sigma**2) if math.isfinite(sigma) else 0.0
    return PACBayes(penalty + math.log(2 * num_examples / delta), sigma)


def check_initial(initial_params, params):
    """Reject parameters of another structure than those at hand."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (initial_params, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "initial_params must have the structure and shapes of params, got "
            f"{shapes[0]}; give the parameters that training started from."
        )


def _count_examples(risk):
    if risk.batch is not None:
        return streams.batch_size(risk.batch)
    if risk.stream is None:
        raise ValueError(
            "num_examples must be given where there is no data, got None; give their number."
        )
    return sum(
        streams.batch_size(jax.tree.map(jnp.asarray, batch))
        for batch in risk.stream.batches
    )
