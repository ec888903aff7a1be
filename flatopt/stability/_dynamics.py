"""What SGD does near a minimum: growth, escape, simulation, where it settles."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import checks
from flatopt.stability import _moments
from flatopt.stability._linearization import Linearization
from flatopt.stability._thresholds import check_rate, exact_threshold

MOST_STEPS = 100_000  # looked at for an escape


def growth_rate(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    sampling: str = "without_replacement",
) -> float:
    r"""The factor by which SGD's second moment grows a step, in the long run.

    Above 1 the expected loss grows exponentially, below it falls. Directions that no
    example sees stay as they are and are left out. Below the threshold of a large problem
    the flattest directions rule, and two digits of the result are good.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, > 0.
      batch_size: B, at most n.
      sampling: see :func:`thresholds`.

    Returns:
      The largest eigenvalue of the second moment's recursion.

    References:
      Mulayoff, Michaeli, `Exact Mean Square Linear Stability Analysis for SGD
      <https://arxiv.org/abs/2306.07850>`_, 2023, equation 10.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> round(stability.growth_rate(lin, 3.0, 1), 3)
      2.5
    """
    checks.check_scale(learning_rate, "learning_rate")
    q, p = _moments.weights(len(lin.coordinates), batch_size, sampling)
    rank = len(lin.eigenvalues)
    step = functools.partial(
        _moments.moment_step, lin.coordinates, lin.eigenvalues, learning_rate, q, p
    )
    # Shifted by the identity, which the step may map to zero.
    shifted = lambda moment: moment + step(moment)  # noqa: E731
    return _moments.largest_eigenvalue(shifted, rank, lin.eigenvalues.dtype) - 1


def expected_losses(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    num_steps: int,
    *,
    sampling: str = "without_replacement",
) -> jax.Array:
    r"""The exact expected loss along linearized SGD, from a random start of loss 1.

    The mean over runs; a typical run can shrink while the mean grows.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size.
      batch_size: B, at most n.
      num_steps: number of steps.
      sampling: see :func:`thresholds`.

    Returns:
      The expected losses, shape (num_steps + 1,).

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> [round(float(x), 3) for x in stability.expected_losses(lin, 3.0, 1, 2)]
      [1.0, 2.5, 6.25]
    """
    checks.check_scale(learning_rate, "learning_rate")
    checks.check_num_samples(num_steps, "num_steps")
    q, p = _moments.weights(len(lin.coordinates), batch_size, sampling)
    values = lin.eigenvalues
    start = 2 * jnp.eye(len(values), dtype=values.dtype) / jnp.sum(values)

    def step(moment, _):
        loss = jnp.sum(jnp.diagonal(moment) * values) / 2
        moment = _moments.moment_step(
            lin.coordinates, values, learning_rate, q, p, moment
        )
        return moment, loss

    _, losses = jax.lax.scan(step, start, None, length=num_steps + 1)
    return losses


def escape_time(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    factor: float = 10.0,
    sampling: str = "without_replacement",
) -> float:
    r"""Steps until the expected loss of linearized SGD has grown by a factor.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, > 0.
      batch_size: B, at most n.
      factor: the growth to wait for, > 1.
      sampling: see :func:`thresholds`.

    Returns:
      The number of steps, infinite where SGD stays.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> stability.escape_time(lin, 3.0, 1), stability.escape_time(lin, 1.0, 1)
      (3.0, inf)
    """
    if not factor > 1:
        raise ValueError(
            f"factor must be greater than 1, got {factor}; write factor=10.0."
        )
    if learning_rate <= exact_threshold(lin, batch_size, sampling):
        return math.inf
    rate = growth_rate(lin, learning_rate, batch_size, sampling=sampling)
    # The long-run rate sets the scale; the start may shrink first.
    num_steps = int(math.log(factor) / max(math.log(rate), 1e-6)) + 64
    while True:
        num_steps = min(num_steps, MOST_STEPS)
        losses = np.asarray(
            expected_losses(
                lin, learning_rate, batch_size, num_steps, sampling=sampling
            )
        )
        if not losses[-1] < factor or num_steps == MOST_STEPS:
            break
        num_steps *= 4
    reached = np.flatnonzero(~(losses < factor))
    return float(reached[0]) if len(reached) else math.inf


NOISES = ("sgd", "gd", "isotropic", "langevin")


def simulate(
    lin: Linearization,
    key: jax.Array,
    learning_rate: float,
    batch_size: int,
    num_steps: int,
    *,
    num_runs: int = 100,
    noise: str = "sgd",
    sampling: str = "without_replacement",
) -> jax.Array:
    r"""Losses of linearized SGD, of gradient descent, or of it with isotropic noise.

    Each run starts at a random displacement of expected loss 1. "isotropic" adds to
    gradient descent Gaussian noise of the same trace as SGD's at the same point, spread
    evenly over all parameters; "langevin" keeps the noise at the size it has at the start.

    The mean over runs is carried by rare ones: a typical run can shrink while the mean
    grows. Plot a median beside :func:`expected_losses`.

    Args:
      lin: from :func:`linearize`.
      key: a JAX random key.
      learning_rate: the step size.
      batch_size: B, at most n.
      num_steps: number of steps.
      num_runs: number of independent runs.
      noise: "sgd", "gd", "isotropic" or "langevin".
      sampling: see :func:`thresholds`.

    Returns:
      Losses, shape (num_runs, num_steps + 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> losses = stability.simulate(lin, jax.random.key(0), 0.1, 1, 5, num_runs=3)
      >>> losses.shape
      (3, 6)
    """
    checks.check_scale(learning_rate, "learning_rate")
    checks.check_num_samples(num_steps, "num_steps")
    checks.check_num_samples(num_runs, "num_runs")
    _, p = _moments.weights(len(lin.coordinates), batch_size, sampling)
    if noise not in NOISES:
        raise ValueError(
            f"noise must be one of {', '.join(map(repr, NOISES))}, got {noise!r}."
        )
    return _simulate(
        lin, key, learning_rate, p, batch_size, num_steps, num_runs, noise, sampling
    )


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _simulate(lin, key, rate, p, batch_size, num_steps, num_runs, noise, sampling):
    coordinates, values = lin.coordinates, lin.eigenvalues
    n, rank = len(coordinates), len(values)
    scale = jnp.sqrt(2 / jnp.sum(values))

    def batch_weights(key):
        """How often each example is in the batch."""
        if sampling == "with_replacement":
            chosen = jax.random.randint(key, (batch_size,), 0, n)
            return jnp.zeros(n, values.dtype).at[chosen].add(1)
        noise = jax.random.uniform(key, (n,))
        if sampling == "bernoulli":
            return (noise < batch_size / n).astype(values.dtype)
        return (jnp.argsort(jnp.argsort(noise)) < batch_size).astype(values.dtype)

    # The trace of SGD's noise, in expectation over the starts.
    each = jnp.sum(jnp.einsum("ncr,ndr->ncd", coordinates, coordinates) ** 2) / n
    start_spread = scale**2 * (each - jnp.sum(values**2))

    def step(point, key):
        loss = jnp.sum(values * point**2) / 2
        errors = jnp.einsum("ncr,r->nc", coordinates, point)
        if noise == "sgd":
            counts = batch_weights(key)[:, None] / batch_size
            grads = jnp.einsum("nc,ncr->r", counts * errors, coordinates)
            return point - rate * grads, loss
        grads = values * point
        if noise == "gd":
            return point - rate * grads, loss
        spread = start_spread
        if noise == "isotropic":
            each = jnp.einsum("nc,ncr->nr", errors, coordinates)
            spread = jnp.mean(jnp.sum(each**2, axis=1)) - jnp.sum(grads**2)
        deviation = jnp.sqrt(p * jnp.maximum(spread, 0) / lin.num_params)
        grads = grads + deviation * jax.random.normal(key, (rank,), values.dtype)
        return point - rate * grads, loss

    def run(key):
        start_key, key = jax.random.split(key)
        start = scale * jax.random.normal(start_key, (rank,), values.dtype)
        _, losses = jax.lax.scan(step, start, jax.random.split(key, num_steps + 1))
        return losses

    return jax.vmap(run)(jax.random.split(key, num_runs))


class StationaryCovariance(NamedTuple):
    r"""Where SGD settles around a minimum, from :func:`stationary_covariance`.

    Attributes:
      covariance: of the parameters' distance to the minimum, in the eigenbasis of H,
        shape (r, r).
      mean_square_distance: its trace.
      excess_loss: the expected loss above the minimum's.
      mean_square_gradient: the expected squared norm of the gradient.

    Example:
      >>> from flatopt import stability
      >>> stability.StationaryCovariance._fields[2]
      'excess_loss'
    """

    covariance: jax.Array
    mean_square_distance: jax.Array
    excess_loss: jax.Array
    mean_square_gradient: jax.Array


def stationary_covariance(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    sampling: str = "without_replacement",
) -> StationaryCovariance:
    r"""Where SGD settles around a minimum that does not fit its data exactly.

    With C and D as in :func:`thresholds` and :math:`\Sigma_g` the mean of the examples'
    gradients times themselves at the minimum of the linearized model (which is moved to),
    the distance to it comes to have the covariance

    .. math:: \eta\, p\, (2 C - \eta D)^{-1}\, \Sigma_g

    Zero where the data is fitted. Directions that no example sees are left out.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, below the exact threshold.
      batch_size: B, at most n.
      sampling: see :func:`thresholds`.

    Returns:
      A :class:`StationaryCovariance`.

    Raises:
      ValueError: for a learning rate at which SGD does not stay.

    References:
      Mulayoff, Michaeli, `Exact Mean Square Linear Stability Analysis for SGD
      <https://arxiv.org/abs/2306.07850>`_, 2023, theorem 5.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: w * x, jnp.ones(()), jnp.ones(2), jnp.array([0.0, 2.0]))
      >>> found = stability.stationary_covariance(lin, 0.5, 1)
      >>> round(float(found.excess_loss), 4)  # 0.5 * 0.5 / (2 - 0.5)
      0.1667
    """
    check_rate(learning_rate)
    limit = exact_threshold(lin, batch_size, sampling)
    if not learning_rate < limit:
        raise ValueError(
            f"learning_rate must be below the exact threshold, {limit:.4g}, got "
            f"{learning_rate:.4g}; beyond it SGD settles nowhere."
        )
    q, p = _moments.weights(len(lin.coordinates), batch_size, sampling)
    covariance = _moments.stationary(lin, learning_rate, q, p)
    values, spread = lin.eigenvalues, jnp.diagonal(covariance)
    return StationaryCovariance(
        covariance,
        mean_square_distance=jnp.sum(spread),
        excess_loss=jnp.sum(values * spread) / 2,
        mean_square_gradient=jnp.sum(values**2 * spread),
    )
