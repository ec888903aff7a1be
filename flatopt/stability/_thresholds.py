"""Largest stable learning rates, and what follows from them."""

import bisect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flatopt._core.types import Optimizer, Sampling
from flatopt.stability import _bounds, _checks, _coefficients, _moments, _motion
from flatopt.stability._alignment import alignment
from flatopt.stability._linearization import Linearization, check_whole


class Thresholds(NamedTuple):
    r"""Largest stable learning rates by theory, from :func:`thresholds`.

    ``mean_square`` is exact for the linearized model: necessary and sufficient for a
    bounded second moment. ``sufficient`` is never above it; all others but
    ``frobenius_estimate`` are necessary conditions, never below it for the same sampling.
    Of a linearization of some directions ``mean_square`` is an upper bound.

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
      sufficient: :math:`2 / (q \lambda_{max} + p \max_i \lambda_{max}(H_i))`: below it SGD
        stays for sure.
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
    sufficient: float = math.nan

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
    lin: Linearization,
    batch_size: int,
    *,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
    progress: Callable[[int, int | None, str], Any] | bool | None = None,
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
      optimizer: a function of the learning rate that returns the optax transformation, such
        as ``lambda rate: optax.sgd(rate, momentum=0.9)``; None: plain SGD. It must be
        linear near a minimum, as are momentum, moving averages and weight decay, and
        adaptive methods after ``linearize(..., preconditioner=)``. flatopt's averages over
        noise count as what follows them. Only the first two rates are known then.
      opt_state: its state, for a schedule's step; None: after very many steps.
      progress: see :func:`linearize`; the total is a guess.

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
    _checks.check_linearization(lin)
    weights = _moments.sampling_weights(len(lin.coordinates), batch_size, sampling)
    if _coefficients.is_plain(lin, optimizer, opt_state):
        rates = dict.fromkeys(_UNKNOWN, math.nan)
        rates["gradient_descent"] = 2 / float(np.asarray(lin.eigenvalues)[0])
        if lin.largest_example is None:
            rates = _necessary(lin, weights, batch_size, sampling)
        rates["sufficient"] = _sufficient(lin, weights)
        limit = _moments.exact_threshold(lin, batch_size, sampling, progress)
    else:
        chain = _coefficients.chain(lin, optimizer, opt_state)
        found = _motion.motion(lin, chain, batch_size, sampling)
        rates = dict.fromkeys(_UNKNOWN, math.nan)
        rates["gradient_descent"] = _motion.mean_threshold(found)
        limit = _motion.threshold(found, progress)
    return Thresholds(
        mean_square=float(limit),
        loss=float(lin.loss),
        gradient_norm=float(lin.gradient_norm),
        **{name: float(rate) for name, rate in rates.items()},
    )


_UNKNOWN = tuple(  # of an optimizer other than plain SGD
    name
    for name in Thresholds._fields
    if name not in ("gradient_descent", "mean_square", "loss", "gradient_norm")
)


def _necessary(lin, weights, batch_size, sampling):
    """The rates of all theories but the exact one."""
    coordinates, values, scale = _moments.unit_arrays(lin)
    coordinates, values = coordinates.astype("f8"), values.astype("f8")
    each = weights.each
    # H_i H_j for i = j: the squared Frobenius norms of the examples' Hessians.
    grams = np.einsum("ncr,ndr->ncd", coordinates, coordinates)
    mean_square_norm = np.mean(np.sum(grams**2, axis=(1, 2)))
    trace, square = values.sum(), (values**2).sum()
    first = np.eye(len(values))[0]
    top, _ = _bounds.rank_one_ratio(first, values, coordinates, weights)
    smallest = _bounds.smallest_alignment(values, coordinates, sampling)
    measured = alignment(lin).mu if np.any(np.asarray(lin.residuals)) else math.nan
    found = dict(
        gradient_descent=2 / values[0],
        trace_ratio=2 * trace / (weights.whole * square + each * mean_square_norm),
        rank_one=2 / _bounds.largest_rank_one(values, coordinates, weights),
        top_direction=2 / top,
        trace=2 * coordinates.shape[1] / (each * trace) if each else math.inf,
        frobenius=_aligned(square, each, smallest),
        frobenius_estimate=_aligned(square, each, measured),
        coherence=math.nan,
    )
    if sampling == "bernoulli":
        found["coherence"] = _bounds.coherence(values, grams, coordinates, batch_size)
    return {name: rate / scale for name, rate in found.items()}


def _sufficient(lin, weights):
    """Below it tr(M D(M)) < (2 / rate) tr(M C(M)), as tr(M H_i M H_i) <= l_i tr(M H_i M)."""
    coordinates, values, scale = _moments.unit_arrays(lin)
    coordinates = coordinates.astype("f8")
    largest = lin.largest_example
    if largest is None:
        grams = np.einsum("ncr,ndr->ncd", coordinates, coordinates)
        largest = scale * np.linalg.eigvalsh(grams)[:, -1].max()
    return 2 / (weights.whole * scale * values[0] + weights.each * largest)


def _aligned(square, each, mu):
    """The rate of a Frobenius norm and an alignment."""
    if math.isnan(mu):
        return math.nan
    return 1 / math.sqrt(square * each * mu) if each * mu > 0 else math.inf


def smallest_batch_size(
    lin: Linearization,
    learning_rate: float,
    *,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
) -> int | None:
    r"""The smallest batch size at which SGD with this learning rate can stay.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, > 0.
      sampling, optimizer, opt_state: see :func:`thresholds`.

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
    _checks.check_linearization(lin)
    _checks.check_rate(learning_rate)
    check_whole(lin, "smallest_batch_size")
    n = len(lin.coordinates)

    if _coefficients.is_plain(lin, optimizer, opt_state):

        def stays(batch_size):
            return learning_rate <= _moments.exact_threshold(lin, batch_size, sampling)

    else:
        stays = _with_optimizer(lin, learning_rate, sampling, optimizer, opt_state)

    # Stability can only grow with the batch.
    found = 1 + bisect.bisect_left(range(1, n + 1), True, key=stays)
    return found if found <= n else None


def _with_optimizer(lin, learning_rate, sampling, optimizer, opt_state):
    """``stays(batch_size)`` of an optimizer: noise enters by its weight alone."""
    n = len(lin.coordinates)
    chain = _coefficients.chain(lin, optimizer, opt_state)
    if float(chain.at(1.0).rho) != 0:
        raise ValueError(
            "optimizer must not step up along the gradient, got usam_gradients, whose "
            "stability is known for batches of 1 and of all examples alone; ask thresholds."
        )
    whole = _motion.motion(lin, chain, n, "without_replacement")
    if not _motion.stays(whole, learning_rate):
        return lambda batch_size: False
    most = _motion.most_noise(_motion.motion(lin, chain, 1, sampling), learning_rate)

    def stays(batch_size):
        return _moments.sampling_weights(n, batch_size, sampling).each <= most

    return stays


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
    sampling: Sampling = "without_replacement",
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
    _checks.check_rate(learning_rate)
    _checks.check_count(num_outputs, "num_outputs", "outputs of an example")
    _checks.check_rate(mu, "mu")
    if num_examples is not None:
        _checks.check_count(num_examples, "num_examples", "examples in all")
    _, each = _moments.sampling_weights(num_examples, batch_size, sampling)
    return SharpestMinimum(
        max_eigenvalue=2 / learning_rate,
        trace=2 * num_outputs / (each * learning_rate) if each else math.inf,
        frobenius_norm=1 / (learning_rate * math.sqrt(each * mu)) if each else math.inf,
    )
