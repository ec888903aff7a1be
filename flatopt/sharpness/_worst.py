"""Worst cases of the loss in a ball or along the gradient."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import binding, checks, streams, trees, vectors
from flatopt._core.estimates import Estimate
from flatopt._core.risk import Risk, along
from flatopt._core.types import BallNorm, LossFn, Mask, WeightFn
from flatopt.sharpness._average import ISOTROPIC
from flatopt.sharpness._solve import check_positive, solve


def epsilon_sharpness(
    loss_fn: LossFn,
    params: Any,
    *,
    epsilon: float = 0.1,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> float:
    r"""One over the distance along the gradient at which the loss has risen by epsilon.

    Args:
      loss_fn, params, data, weight_fn, mask, constants: see :func:`low_pass`.
      epsilon: rise of the loss, > 0.

    Returns:
      The inverse distance; 0 where no distance up to 1e6 raises the loss by epsilon.

    Raises:
      ValueError: where the gradient is zero: the direction is then undefined.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4, after Keskar et al.,
      `On Large-Batch Training for Deep Learning <https://arxiv.org/abs/1609.04836>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> round(sharpness.epsilon_sharpness(lambda p: p[0], jnp.zeros(2), epsilon=0.5), 3)
      2.0
    """
    check_positive(epsilon, "epsilon")
    risk = Risk.of(loss_fn, params, data, weight_fn, mask, constants)
    found = epsilon_sharpness_of(risk, epsilon)
    if math.isnan(found):
        raise ValueError(
            "params must have a gradient to follow, got one of norm 0 or not a number; at an "
            "exact minimum use worst_case or curvature.eigenpairs."
        )
    return found


def epsilon_sharpness_of(risk, epsilon):
    """As :func:`epsilon_sharpness`; not a number where there is no gradient to follow."""
    value, grads = risk.value_and_gradient()
    direction, length = vectors.normalize(grads)
    if not checks.float_of(length, "epsilon_sharpness") > 0:
        return math.nan

    def rise(distance):
        steps = jnp.full(1, distance, jnp.float32)
        moved = risk.losses(along, steps, direction)
        return float(moved[0] - value)

    distance = solve(rise, epsilon, 1e-3, 1e6)
    return 1 / distance if math.isfinite(distance) else 0.0


NORMS = ("l2", "linf")


def worst_case(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    rho: float,
    norm: BallNorm = "l2",
    adaptive: bool = False,
    num_steps: int = 20,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> float:
    r"""The largest rise of the loss found in a ball.

    .. math:: \max_{\|T^{-1} \epsilon\| \le \rho} L(\theta + \epsilon) - L(\theta), \qquad
        T = 1 \text{ or } |\theta|

    Ascent from a random point of the ball, each step to the point of the ball farthest
    along the gradient; the best point counts, the parameters themselves included. A lower
    bound of the maximum; for a convex quadratic it converges to it.

    Args:
      loss_fn, params, key, data, weight_fn, mask, constants: see :func:`low_pass`.
      rho: radius of the ball, > 0.
      norm: "l2" or "linf".
      adaptive: measure the ball in units of each parameter's magnitude: unchanged when
        layers are rescaled.
      num_steps: number of ascent steps, a gradient of all data each, and one more.

    Returns:
      The rise, at least 0.

    Raises:
      ValueError: where the loss in the ball is not a number.

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_;
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_ (adaptive); Andriushchenko et
      al., `A Modern Look <https://arxiv.org/abs/2302.07011>`_.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.worst_case(
      ...     lambda p: 3 * p[0] ** 2 + p[1] ** 2, jnp.zeros(2), jax.random.key(0), rho=0.1)
      >>> round(found, 4)
      0.03
    """
    check_positive(rho, "rho")
    checks.check_count(num_steps, "num_steps")
    checks.check_random_key(key)
    if norm not in NORMS:
        raise ValueError(
            f"norm must be 'l2' or 'linf', got {norm!r}; 'l2' is that of SAM."
        )
    risk = Risk.of(loss_fn, params, data, weight_fn, mask, constants)
    params = risk.params
    units = jax.tree.map(
        lambda p: (
            jnp.abs(trees.widen(p)) if adaptive else jnp.ones_like(trees.widen(p))
        ),
        params,
    )
    direction = _random_direction(key, params)
    base, best = checks.float_of(risk.value, "worst_case"), 0.0
    for _ in range(num_steps + 1):
        moved = _farthest(params, units, direction, jnp.float32(rho), norm == "l2")
        value, grads = risk.at(moved).value_and_gradient(check=False)
        if math.isnan(float(value) - base):
            raise ValueError(
                f"the loss is not a number within rho={rho} of the parameters; choose a "
                "smaller radius."
            )
        best = max(best, float(value) - base)
        direction = _times(units, grads)
    return best


@jax.jit
def _random_direction(key, params):
    return binding.bind(ISOTROPIC, key, params)(key)


@jax.jit
def _times(units, grads):
    direction, _ = vectors.normalize(grads)
    return jax.tree.map(jnp.multiply, units, direction)


@functools.partial(jax.jit, static_argnums=4)
def _farthest(params, units, direction, rho, is_l2):
    if is_l2:
        step, _ = vectors.normalize(direction)
    else:
        step = jax.tree.map(jnp.sign, direction)
    return jax.tree.map(
        lambda p, t, s: trees.widen(p) + rho.astype(t.dtype) * t * s.astype(t.dtype),
        params,
        units,
        step,
    )


def m_sharpness(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    batches: Any,
    *,
    rho: float,
    norm: BallNorm = "l2",
    adaptive: bool = False,
    num_steps: int = 20,
    mask: Mask = None,
    constants: Any = None,
) -> Estimate:
    r"""The mean over batches of the worst case of each batch: SAM's m-sharpness.

    Args:
      loss_fn: ``loss_fn(params, batch)``.
      params: the parameters.
      key: a JAX random key.
      batches: a re-iterable of batches of m examples.
      rho, norm, adaptive, num_steps, mask, constants: see :func:`worst_case`.

    Returns:
      An :class:`~flatopt.curvature.Estimate` over batches.

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.m_sharpness(
      ...     lambda p, batch: jnp.mean(batch) * jnp.sum(p ** 2), jnp.zeros(2),
      ...     jax.random.key(0), [jnp.ones(3), 3 * jnp.ones(3)], rho=0.1)
      >>> round(float(found.value), 4)
      0.02
    """
    if isinstance(batches, dict | str) or not hasattr(batches, "__iter__"):
        raise TypeError(
            "batches must be a list or another iterable of batches, got "
            f"{type(batches).__name__}; write [batch] for one."
        )
    found = [
        worst_case(
            loss_fn,
            params,
            key,
            rho=rho,
            norm=norm,
            adaptive=adaptive,
            num_steps=num_steps,
            data=[batch] if streams.is_stream(batch) else batch,
            mask=mask,
            constants=constants,
        )
        for batch in batches
    ]
    if not found:
        raise ValueError("batches must hold batches, got none; give a list of batches.")
    return Estimate.of(jnp.asarray(found))
