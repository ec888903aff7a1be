r"""Linear stability: which minima SGD can stay at, and at which learning rate.

The loss is ``loss_scale / (2 n) * sum of squared errors`` over n examples with c outputs
each: 1 for the papers' convention, 1/c for ``optax.l2_loss(...).mean()``, 2/c for a mean
squared error, 2 for the mean over examples of the squared norm. Near a minimum with zero
error the model is linear, and everything happens in the space that the examples' gradients
span, of dimension at most n c: no matrix over the parameters is formed.

Batches of B examples: "without_replacement", "with_replacement", or "bernoulli" (each
example taken with probability B / n, the sum divided by B).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import _blocks, _checks, _moments, _passes, curvature
from flatopt._alignment import (
    Alignment,
    alignment,
    estimate_alignment,
    half_square,
    square_loss,
)
from flatopt._linearization import Linearization, linearize, linearize_gauss_newton
from flatopt.curvature import Estimate

__all__ = [
    "Alignment",
    "Linearization",
    "Report",
    "SharpestMinimum",
    "StationaryCovariance",
    "Thresholds",
    "alignment",
    "batch_sharpness",
    "escape_time",
    "estimate_alignment",
    "expected_losses",
    "growth_rate",
    "linearize",
    "linearize_gauss_newton",
    "report",
    "sharpest_minimum",
    "simulate",
    "smallest_batch_size",
    "stationary_covariance",
    "thresholds",
]

MOST_STEPS = 100_000  # looked at for an escape


class Thresholds(NamedTuple):
    r"""Largest stable learning rates by theory, from :func:`thresholds`.

    ``mean_square`` is exact for the linearized model: necessary and sufficient for a
    bounded second moment. All others but ``frobenius_estimate`` are necessary conditions,
    never below it for the same sampling.

    Attributes:
      gradient_descent: :math:`2 / \lambda_{max}`.
      mean_square: exact (Mulayoff and Michaeli, theorem 3).
      trace_ratio: their equation 16.
      rank_one: their equation 24, the best of ascents on the sphere.
      top_direction: their equation 15.
      trace: from the trace alone, :math:`2 c / (p \operatorname{tr} H)` (after Wu and Su).
      frobenius: :math:`1 / (\|H\|_F \sqrt{p \mu})` (Wu, Wang and Su) with the smallest
        alignment over all displacements.
      frobenius_estimate: the same with the alignment measured at these parameters: a rule
        of thumb, which may be below ``mean_square``; NaN at zero loss.
      coherence: Dexter et al., for Bernoulli sampling; NaN for the others.
      loss: the loss there: the theory is about minima of zero loss.
      gradient_norm: the norm of its gradient, zero at a minimum.

    Example:
      >>> from flatopt import stability
      >>> stability.Thresholds._fields[1]
      'mean_square'
    """

    gradient_descent: float
    mean_square: float
    trace_ratio: float
    rank_one: float
    top_direction: float
    trace: float
    frobenius: float
    frobenius_estimate: float
    coherence: float
    loss: float
    gradient_norm: float

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates by theory, without those that do not apply.

        Example:
          >>> from flatopt import stability
          >>> stability.Thresholds(*[1.0] * 8, math.nan, 0.0, 0.0).rates["mean_square"]
          1.0
        """
        found = self._asdict()
        del found["loss"], found["gradient_norm"]
        return {name: rate for name, rate in found.items() if not math.isnan(rate)}


def thresholds(
    lin: Linearization, batch_size: int, *, sampling: str = "without_replacement"
) -> Thresholds:
    r"""The largest stable learning rate of SGD at a minimum, by each theory.

    With :math:`H_i` the examples' Hessians at zero error, the second moment of the distance
    to the minimum follows

    .. math:: M \mapsto M - \eta (H M + M H) + \eta^2 D(M), \qquad
        D(M) = q\, H M H + \frac{p}{n} \sum_i H_i M H_i

    with :math:`q = 1 - p` and :math:`p = (n - B) / (B (n - 1))` without replacement,
    :math:`p = 1 / B` with; for Bernoulli sampling :math:`q = 1, p = (n - B) / (n B)`. It
    stays bounded if and only if :math:`\eta \le 2 / \lambda_{max}(C^{-1} D)`,
    :math:`C(M) = (H M + M H) / 2`.

    The theory is about minima, and the Hessians are exact at zero error: look at the loss
    and gradient norm in the result before you trust its rates. At a minimum with errors
    the same threshold is that of the noise that grows with the distance; the rest keeps
    SGD at a distance, see :func:`stationary_covariance`.

    Cost: some tens of products of n c r^2 operations.

    Args:
      lin: from :func:`linearize`.
      batch_size: B, at most n.
      sampling: "without_replacement", "with_replacement" or "bernoulli".

    Returns:
      :class:`Thresholds`.

    Raises:
      ValueError: for a batch larger than the data, an unknown sampling.

    References:
      Mulayoff, Michaeli, `Exact Mean Square Linear Stability Analysis for SGD
      <https://arxiv.org/abs/2306.07850>`_, 2023; Wu, Wang, Su, `The Alignment Property of
      SGD Noise <https://arxiv.org/abs/2207.02628>`_, NeurIPS 2022; Wu, Su, `The Implicit
      Regularization of Dynamical Stability <https://arxiv.org/abs/2305.17490>`_, ICML 2023;
      Dexter et al., `A Precise Characterization of SGD Stability Using Loss Surface
      Geometry <https://arxiv.org/abs/2401.12332>`_, ICLR 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> found = stability.thresholds(lin, 1)
      >>> round(found.gradient_descent, 3), round(found.mean_square, 3)
      (4.0, 2.0)
    """
    q, p = _moments.weights(len(lin.coordinates), batch_size, sampling)
    values = np.asarray(lin.eigenvalues, "f8")
    coordinates = np.asarray(lin.coordinates, "f8")
    n, c, _ = coordinates.shape
    # H_i H_j for i = j: the squared Frobenius norms of the examples' Hessians.
    grams = np.einsum("ncr,ndr->ncd", coordinates, coordinates)
    mean_square_norm = np.mean(np.sum(grams**2, axis=(1, 2)))
    trace, norm = values.sum(), np.sqrt((values**2).sum())
    first = np.eye(len(values))[0]
    top, _ = _moments.rank_one_ratio(first, values, coordinates, q, p)
    smallest = _moments.smallest_alignment(values, coordinates, sampling)
    estimate = math.nan
    if float(lin.loss) > 0:
        mu = float(alignment(lin).mu)
        estimate = 1 / (norm * math.sqrt(p * mu)) if p > 0 and mu > 0 else math.inf
    found = dict(
        gradient_descent=2 / values[0],
        mean_square=_limit(lin, batch_size, sampling),
        trace_ratio=2 * trace / (q * norm**2 + p * mean_square_norm),
        rank_one=2 / _moments.largest_rank_one(values, coordinates, q, p),
        top_direction=2 / top,
        trace=2 * c / (p * trace) if p else math.inf,
        frobenius=1 / (norm * math.sqrt(p * smallest))
        if p * smallest > 0
        else math.inf,
        frobenius_estimate=estimate,
        coherence=_moments.coherence(values, grams, coordinates, batch_size)
        if sampling == "bernoulli"
        else math.nan,
        loss=lin.loss,
        gradient_norm=lin.gradient_norm,
    )
    return Thresholds(**{name: float(value) for name, value in found.items()})


def _limit(lin, batch_size, sampling):
    """The exact threshold."""
    q, p = _moments.weights(len(lin.coordinates), batch_size, sampling)
    return 2 / _moments.top_of_mean_square(lin, q, p)


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
    _checks.check_scale(learning_rate, "learning_rate")
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
    _checks.check_scale(learning_rate, "learning_rate")
    _checks.check_num_samples(num_steps, "num_steps")
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
    if learning_rate <= _limit(lin, batch_size, sampling):
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
    _checks.check_scale(learning_rate, "learning_rate")
    _checks.check_num_samples(num_steps, "num_steps")
    _checks.check_num_samples(num_runs, "num_runs")
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


def smallest_batch_size(
    lin: Linearization,
    learning_rate: float,
    *,
    sampling: str = "without_replacement",
) -> int | None:
    r"""The smallest batch size at which SGD with this learning rate can stay.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, > 0.
      sampling: see :func:`thresholds`.

    Returns:
      The batch size, or None where no batch up to the whole data suffices.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> stability.smallest_batch_size(lin, 3.0)
      2
    """
    n = len(lin.coordinates)

    def stays(batch_size):
        return learning_rate <= _limit(lin, batch_size, sampling)

    if not stays(n):
        return None
    low, high = 0, n  # stability can only grow with the batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stays(middle) else (middle, high)
    return high


class SharpestMinimum(NamedTuple):
    """Bounds on the curvature of minima that SGD can stay at.

    Attributes:
      max_eigenvalue: of the largest eigenvalue.
      trace: of the trace.
      frobenius_norm: of the Frobenius norm.

    Example:
      >>> from flatopt import stability
      >>> stability.sharpest_minimum(0.1, 8).max_eigenvalue
      20.0
    """

    max_eigenvalue: float
    trace: float
    frobenius_norm: float


def sharpest_minimum(
    learning_rate: float,
    batch_size: int,
    num_examples: int | None = None,
    *,
    num_outputs: int = 1,
    mu: float = 1.0,
    sampling: str = "without_replacement",
) -> SharpestMinimum:
    r"""The sharpest minimum at which SGD with these settings could stay.

    With p as in :func:`thresholds`, :math:`1/B` for much data, SGD leaves a minimum beyond
    any of

    .. math:: \lambda_{max} = \frac{2}{\eta}, \quad
        \operatorname{tr} H = \frac{2 c}{p \eta}, \quad
        \|H\|_F = \frac{1}{\eta \sqrt{p \mu}}

    the last where its noise is aligned by at least :math:`\mu`. For a minimum at hand,
    :func:`thresholds` says more.

    Args:
      learning_rate: the step size, > 0.
      batch_size: B.
      num_examples: n; default: very many.
      num_outputs: c, the number of outputs of the model.
      mu: a lower bound of the alignment, > 0.
      sampling: see :func:`thresholds`.

    Returns:
      A :class:`SharpestMinimum`.

    References:
      Wu, Wang, Su, `The Alignment Property of SGD Noise
      <https://arxiv.org/abs/2207.02628>`_, NeurIPS 2022; Wu, Su, `The Implicit
      Regularization of Dynamical Stability <https://arxiv.org/abs/2305.17490>`_, ICML 2023.

    Example:
      >>> from flatopt import stability
      >>> stability.sharpest_minimum(0.1, 4)
      SharpestMinimum(max_eigenvalue=20.0, trace=80.0, frobenius_norm=20.0)
    """
    _check_rate(learning_rate)
    _checks.check_num_samples(num_outputs, "num_outputs")
    if not mu > 0:
        raise ValueError(
            f"mu must be positive, got {mu}; 1 is that of noise in proportion to H."
        )
    _, p = _moments.weights(num_examples, batch_size, sampling)
    return SharpestMinimum(
        max_eigenvalue=2 / learning_rate,
        trace=2 * num_outputs / (p * learning_rate) if p else math.inf,
        frobenius_norm=1 / (learning_rate * math.sqrt(p * mu)) if p else math.inf,
    )


def _check_rate(learning_rate):
    _checks.check_scale(learning_rate, "learning_rate")
    if not learning_rate > 0:
        raise ValueError(
            f"learning_rate must be positive, got {learning_rate}; nothing moves."
        )


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
    _check_rate(learning_rate)
    limit = _limit(lin, batch_size, sampling)
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


def batch_sharpness(loss_fn: Callable[..., Any], params: Any, batches: Any) -> Estimate:
    r"""The curvature that SGD's own steps meet, which hovers at 2 / learning_rate.

    .. math:: E_B \left[ \frac{g_B^\top H_B\, g_B}{\|g_B\|^2} \right]

    with gradient and Hessian of the same batch.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss.
      params: the parameters.
      batches: an iterable of batches of the training batch size.

    Returns:
      An :class:`~flatopt.curvature.Estimate` over batches.

    Raises:
      ValueError: without batches.

    References:
      Andreyev, Beneventano, `Edge of Stochastic Stability
      <https://arxiv.org/abs/2412.20553>`_, 2024, definition 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> stability.batch_sharpness(
      ...     lambda p, batch: jnp.mean(batch) * jnp.sum(p ** 2), jnp.ones(2),
      ...     [jnp.ones(4), 3 * jnp.ones(4)]).value
      Array(4., dtype=float32)
    """

    @jax.jit
    def ratio(operator):
        _, grads = _passes.value_and_gradient(operator)
        return operator.quadratic_form(grads) / _blocks.dot(grads, grads)

    found = [ratio(curvature.hessian(loss_fn, params, batch)) for batch in batches]
    if not found:
        raise ValueError("batches must hold batches, got none; give a list of batches.")
    found = jnp.stack(found)
    count = len(found)
    error = jnp.std(found, ddof=1) / count**0.5 if count > 1 else jnp.inf
    return Estimate(jnp.mean(found), error, count)


class Report(NamedTuple):
    """Stability at one point, from :func:`report`; ``print`` shows a table.

    Attributes:
      learning_rate: the step size asked about.
      batch_size: B.
      loss: the loss.
      reducible_loss: what the linearized model could still take off it.
      constant_loss: the loss of the best constant output, for comparison.
      gradient_norm: the norm of its gradient.
      max_eigenvalue: the largest eigenvalue of H, the Gauss-Newton matrix.
      hessian_eigenvalue: that of the Hessian itself; far from the other one, the
        linearized model is not what SGD sees.
      trace: the trace of H.
      frobenius_norm: its Frobenius norm.
      alignment: :class:`Alignment`, or None at zero loss.
      thresholds: :class:`Thresholds`.
      growth_rate: factor of the second moment a step.
      smallest_batch_size: see :func:`smallest_batch_size`.

    Example:
      >>> from flatopt import stability
      >>> stability.Report._fields[0]
      'learning_rate'
    """

    learning_rate: float
    batch_size: int
    loss: float
    reducible_loss: float
    constant_loss: float
    gradient_norm: float
    max_eigenvalue: float
    hessian_eigenvalue: float
    trace: float
    frobenius_norm: float
    alignment: Alignment | None
    thresholds: Thresholds
    growth_rate: float
    smallest_batch_size: int | None

    @property
    def is_minimum(self) -> bool:
        """Whether the theory applies.

        The linearized model can take off at most a hundredth of the loss of a constant
        output, and the Hessian's largest eigenvalue is within a tenth of that of H.
        """
        apart = abs(self.hessian_eigenvalue - self.max_eigenvalue)
        is_close = self.reducible_loss <= 0.01 * self.constant_loss
        return is_close and apart <= 0.1 * self.max_eigenvalue

    @property
    def verdict(self) -> str:
        """What follows for training, in words."""
        limit = self.thresholds.mean_square
        if self.learning_rate > self.thresholds.gradient_descent:
            found = "unstable even for the whole data in one batch"
        elif self.learning_rate > limit:
            found = (
                f"SGD leaves: the learning rate exceeds the exact limit {limit:.4g}; a batch "
                f"of {self.smallest_batch_size} would stay"
            )
        else:
            margin = limit / self.learning_rate
            found = f"SGD stays: the learning rate could be {margin:.3g} times as large"
        if not self.is_minimum:
            found += " (says the linearized model, but this is no minimum of its kind)"
        return found

    def __str__(self):
        ratio = self.thresholds.mean_square / self.learning_rate
        lines = [
            f"learning rate {self.learning_rate:.4g}, batch size {self.batch_size}: "
            f"{self.verdict}",
            f"loss {self.loss:.3g} ({self.constant_loss:.3g} for a constant output), of which "
            f"the linearized model could take off {self.reducible_loss:.3g}; gradient norm "
            f"{self.gradient_norm:.3g}",
            f"largest eigenvalue of H {self.max_eigenvalue:.4g}, of the Hessian itself "
            f"{self.hessian_eigenvalue:.4g}: "
            + (
                "the theory applies" if self.is_minimum else "the theory does not apply"
            ),
            f"trace of H {self.trace:.4g}, Frobenius norm {self.frobenius_norm:.4g}; could be "
            f"{ratio:.3g} times as sharp at this setting",
            f"growth of the second moment a step: {self.growth_rate:.4g}",
        ]
        if self.alignment is not None:
            found = self.alignment
            lines.append(
                f"alignment mu {found.mu:.3g} = alpha {found.alpha:.3g} * beta "
                f"{found.beta:.3g}; isotropic noise would have {found.isotropic_mu:.3g}"
            )
        lines.append(f"{'largest stable rate by':22} {'rate':>10}  at this rate")
        for name, rate in self.thresholds.rates.items():
            holds = "holds" if self.learning_rate <= rate else "violated"
            margin = f"by a factor of {max(rate, 1e-37) / self.learning_rate:.3g}"
            lines.append(f"{name:22} {rate:10.4g}  {holds} {margin}")
        return "\n".join(lines)


def report(
    model_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    targets: Any,
    learning_rate: float,
    batch_size: int,
    *,
    loss_scale: float = 1.0,
    loss_fn: Callable[..., Any] | None = None,
    sampling: str = "without_replacement",
) -> Report:
    """Everything about stability at one point, with a readable table.

    Args:
      model_fn, params, inputs, targets, loss_scale, loss_fn: see :func:`linearize`.
      learning_rate: the step size to judge.
      batch_size: B.
      sampling: see :func:`thresholds`.

    Returns:
      A :class:`Report`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> found = stability.report(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2), 1.0, 1)
      >>> found.verdict
      'SGD stays: the learning rate could be 2 times as large'
    """
    lin = linearize(
        model_fn, params, inputs, targets, loss_scale=loss_scale, loss_fn=loss_fn
    )
    hessian = curvature.hessian(
        square_loss(model_fn, loss_scale), params, (inputs, targets)
    )
    top = curvature.eigenpairs(hessian, jax.random.key(0), 1)
    return Report(
        learning_rate=float(learning_rate),
        batch_size=batch_size,
        loss=float(lin.loss),
        reducible_loss=float(lin.reducible_loss),
        constant_loss=loss_scale
        * float(half_square(targets, jnp.mean(targets, axis=0, keepdims=True))),
        gradient_norm=float(lin.gradient_norm),
        max_eigenvalue=float(lin.eigenvalues[0]),
        hessian_eigenvalue=float(top.values[0]),
        trace=float(jnp.sum(lin.eigenvalues)),
        frobenius_norm=float(jnp.linalg.norm(lin.eigenvalues)),
        alignment=alignment(lin) if float(lin.loss) > 0 else None,
        thresholds=thresholds(lin, batch_size, sampling=sampling),
        growth_rate=growth_rate(lin, learning_rate, batch_size, sampling=sampling),
        smallest_batch_size=smallest_batch_size(lin, learning_rate, sampling=sampling),
    )
