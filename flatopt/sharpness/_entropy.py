"""The local entropy of a loss, and the walk of Entropy-SGD."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import binding, blocks, checks, random, vectors
from flatopt._core.estimates import Estimate
from flatopt._core.risk import Risk
from flatopt._core.types import LossFn, Mask, WeightFn
from flatopt.sharpness._average import ISOTROPIC, rises
from flatopt.sharpness._solve import check_number, check_positive

FEWEST_DRAWS = 10  # of equal weight, for an error that means anything


def local_entropy(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    gamma: float = 100.0,
    num_samples: int = 100,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
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
    value, weights, carried = _soft_least(rises)
    found = Estimate.of(weights)._replace(value=value)
    is_few = carried < min(FEWEST_DRAWS, len(weights) / 2)
    if not isinstance(is_few, jax.core.Tracer) and is_few:
        warnings.warn(
            f"local_entropy rests on {float(carried):.2g} of its {len(weights)} draws, "
            "those of the least rise, so that its error is unknown; choose a larger gamma.",
            stacklevel=3,
        )
    error = jnp.where(is_few, jnp.inf, found.standard_error)
    return found._replace(standard_error=error)


@jax.jit
def _soft_least(rises):
    """The value, weights of the draws less 1, and how many of equal weight would do."""
    # Less their smallest, and from one: rises far below the rounding of 1 stay exact.
    least = jnp.min(rises)
    least = jnp.where(jnp.isfinite(least), least, 0.0)
    value = least - jnp.log1p(jnp.mean(jnp.expm1(least - rises)))
    weights = jnp.expm1(value - rises)  # less one, so that their mean is 0
    carried = jnp.sum(weights + 1) ** 2 / jnp.sum((weights + 1) ** 2)
    return value, weights, carried


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
    mask: Mask = None,
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
    return walked(
        risk, key, (gamma, inner_learning_rate, noise_scale, decay), num_steps
    )


SETTINGS = 1e-4, 0.1, 1e-4, 0.75  # gamma, learning rate, noise, decay: the defaults


def walked(risk, key, settings=SETTINGS, num_steps=20):
    """As :func:`local_entropy_gradient`, of a risk at hand."""
    settings = jnp.asarray(settings, jnp.float32)
    center = point = mean = blocks.widen(risk.params)
    _, grads = risk.value_and_gradient()
    for index in range(num_steps):
        if index:
            _, grads = risk.at(point).value_and_gradient(check=False)
        point, mean = _walk(settings, center, point, mean, grads, key, jnp.int32(index))
    advice = "it is nan along the walk, so choose a smaller inner_learning_rate."
    length = _distance(center, mean)
    name = "local_entropy_gradient"
    return checks.float_of(check_number(length, name, advice), name)


@jax.jit
def _distance(point, other):
    return vectors.norm(blocks.subtract(point, other))


@jax.jit
def _walk(settings, center, point, mean, grads, key, index):
    """One inner step of Entropy-SGD, and the moving average of the points."""
    gamma, rate, noise_scale, decay = settings
    noise = binding.bind(ISOTROPIC, key, center)(random.fold_in(key, index))
    drift = vectors.add(grads, gamma, blocks.subtract(point, center))
    point = vectors.add(point, -rate, drift)
    point = vectors.add(point, jnp.sqrt(rate) * noise_scale, noise)
    return point, vectors.add(vectors.scale(decay, mean), 1 - decay, point)
