"""Averages of the loss over random perturbations."""

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt import kernels
from flatopt._core import (
    binding,
    blocks,
    checks,
    parts,
    random,
    streams,
    trees,
    vectors,
)
from flatopt._core.estimates import Estimate
from flatopt._core.risk import Risk
from flatopt._core.types import KernelFn, LossFn, WeightFn
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


FEWEST_DRAWS = 10  # of equal weight, for an error that means anything

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
    mask: Any = None,
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
    mask: Any = None,
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
    mask: Any = None,
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
        return float(jnp.mean(rises(risk, key, sigma, num_samples, ISOTROPIC, base)))

    sigma = solve(rise, epsilon, 1e-3, 1e6)
    start = parts.choose(initial_params, mask, constants).params
    difference = blocks.subtract(blocks.widen(risk.params), blocks.widen(start))
    distance = float(vectors.dot(difference, difference))
    penalty = distance / (4 * sigma**2) if math.isfinite(sigma) else 0.0
    return PACBayes(penalty + math.log(2 * num_examples / delta), sigma)


def local_entropy(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    gamma: float = 100.0,
    num_samples: int = 100,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Any = None,
    constants: Any = None,
) -> Estimate:
    r"""The negative local entropy, relative to a flat loss.

    .. math:: -\log E_U \exp\left(-(L(\theta + \gamma^{-1/2} U) - L(\theta))\right)

    with :math:`U` standard normal: :math:`-\log \int e^{-L(\theta') - \frac{\gamma}{2}
    \|\theta - \theta'\|^2} d\theta'` less its value for a constant loss. The authors' code
    uses :math:`1/\gamma` for the standard deviation and the wrong sign of the loss; this
    does not.

    Args:
      loss_fn, params, key, num_samples, data, weight_fn, mask, constants: see
        :func:`low_pass`.
      gamma: inverse variance of the noise, > 0.

    Returns:
      An :class:`~flatopt.curvature.Estimate`; its error by the delta method. Where rises
      are far above 1, a few draws carry the mean of exponentials, and their error would
      say little: it is infinite, with a warning, for fewer than 10 of equal weight.

    References:
      Chaudhari et al., `Entropy-SGD: Biasing Gradient Descent into Wide Valleys
      <https://arxiv.org/abs/1611.01838>`_, ICLR 2017, equation 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.local_entropy(
      ...     lambda p: jnp.sum(p ** 2), jnp.zeros(1), jax.random.key(0), gamma=2.0,
      ...     num_samples=4000)
      >>> abs(float(found.value) - 0.3466) < 0.03  # log(1 + 2 / 2) / 2
      True
    """
    check_positive(gamma, "gamma")
    checks.check_count(num_samples)
    risk = Risk.of(loss_fn, params, data, weight_fn, mask, constants)
    return entropy_of(rises(risk, key, gamma**-0.5, num_samples, ISOTROPIC))


def entropy_of(rises):
    """The negative local entropy from rises of the loss, error by the delta method."""
    advice = "it is nan at some perturbations, so choose a larger gamma."
    check_number(rises, "local_entropy", advice)
    # Less their smallest, and from one: rises far below the rounding of 1 stay exact.
    least = jnp.min(rises)
    least = jnp.where(jnp.isfinite(least), least, 0.0)
    value = least - jnp.log1p(jnp.mean(jnp.expm1(least - rises)))
    weights = jnp.expm1(value - rises)  # less one, so that their mean is 0
    found = Estimate.of(weights)._replace(value=value)
    carried = _effective_draws(weights + 1)
    is_few = carried < min(FEWEST_DRAWS, len(weights) / 2)
    if not isinstance(is_few, jax.core.Tracer) and is_few:
        warnings.warn(
            f"local_entropy rests on {float(carried):.2g} of its {len(weights)} draws, "
            "those of the least rise, so that its error is unknown; choose a larger gamma.",
            stacklevel=3,
        )
    error = jnp.where(is_few, jnp.inf, found.standard_error)
    return found._replace(standard_error=error)


def _effective_draws(weights):
    """How many draws of equal weight would tell as much."""
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)


def local_entropy_gradient(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    data: Any,
    *,
    gamma: float = 1e-4,
    num_steps: int = 20,
    inner_learning_rate: float = 0.1,
    noise_scale: float = 1e-4,
    decay: float = 0.75,
    weight_fn: WeightFn | None = None,
    mask: Any = None,
    constants: Any = None,
) -> float:
    r"""The norm :math:`\|\theta - \mu\|`, :math:`\mu` from Entropy-SGD's loop on all data.

    .. math:: \theta' \leftarrow \theta' - \eta \left(\nabla L(\theta') + \gamma (\theta' -
        \theta)\right) + \sqrt{\eta}\, \epsilon\, U, \qquad
        \mu \leftarrow \alpha \mu + (1 - \alpha) \theta'

    Each step follows the gradient of all data, so that the value does not depend on how the
    data are split into batches; the authors' code walks on one batch after another, and its
    mean over batches grows with the noise between them.

    Cost: ``num_steps`` gradients of all data.

    Args:
      loss_fn: ``loss_fn(params, batch)``.
      params: the parameters.
      key: a JAX random key.
      data: one batch, or a re-iterable of batches.
      gamma, num_steps, inner_learning_rate, noise_scale, decay: see
        :func:`flatopt.entropy_sgd_gradients`.
      weight_fn, mask, constants: see :func:`low_pass`.

    Returns:
      The norm.

    Raises:
      ValueError: without data, or where the walk meets a loss that is not a number.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4; the loop after
      Chaudhari et al., `Entropy-SGD <https://arxiv.org/abs/1611.01838>`_, ICLR 2017,
      Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.local_entropy_gradient(
      ...     lambda p, batch: jnp.mean((batch @ p) ** 2), jnp.zeros(2),
      ...     jax.random.key(0), jnp.eye(2))
      >>> found < 1e-3  # at a minimum only the noise moves the walk
      True
    """
    checks.check_random_key(key)
    checks.check_count(num_steps, "num_steps")
    checks.check_scale(gamma, "gamma")
    checks.check_scale(inner_learning_rate, "inner_learning_rate")
    checks.check_scale(noise_scale, "noise_scale")
    checks.check_decay(decay)
    if data is None:
        raise ValueError("data must be a batch or batches, got None; give the data.")
    risk = Risk.of(loss_fn, params, data, weight_fn, mask, constants)
    settings = jnp.asarray(
        [gamma, inner_learning_rate, noise_scale, decay], jnp.float32
    )
    center = point = mean = blocks.widen(risk.params)
    _, grads = risk.value_and_gradient()
    for index in range(num_steps):
        if index:
            _, grads = risk.at(point).value_and_gradient(check=False)
        point, mean = _walk(settings, center, point, mean, grads, key, jnp.int32(index))
    advice = "it is nan along the walk, so choose a smaller inner_learning_rate."
    _, length = vectors.normalize(blocks.subtract(center, mean))
    return float(check_number(length, "local_entropy_gradient", advice))


@jax.jit
def _walk(settings, center, point, mean, grads, key, index):
    """One inner step of Entropy-SGD, and the moving average of the points."""
    gamma, rate, noise_scale, decay = settings
    noise = binding.bind(ISOTROPIC, key, center)(random.fold_in(key, index))
    drift = vectors.add(grads, gamma, blocks.subtract(point, center))
    point = vectors.add(point, -rate, drift)
    point = vectors.add(point, jnp.sqrt(rate) * noise_scale, noise)
    return point, vectors.add(vectors.scale(decay, mean), 1 - decay, point)


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
