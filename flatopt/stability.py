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
import scipy.optimize
import scipy.sparse.linalg

from flatopt import _blocks, _checks, _passes, _trees, curvature
from flatopt.curvature import Estimate

SAMPLINGS = ("without_replacement", "with_replacement", "bernoulli")
MOST_STEPS = 100_000  # looked at for an escape
HELD_VALUES = (
    1 << 29
)  # Jacobian entries kept at once; beyond, blocks are computed again


class Linearization(NamedTuple):
    """A model linearized at its parameters, from :func:`linearize`.

    Attributes:
      coordinates: gradients of each output of each example, times the root of
        ``loss_scale``, in the eigenbasis of H, shape (n, c, r).
      eigenvalues: the r nonzero eigenvalues of H, the Gauss-Newton matrix of the loss and
        its Hessian at zero error; descending.
      residuals: outputs less targets, times the root of ``loss_scale``, shape (n, c).
      loss: the loss.
      gradient_norm: the norm of its gradient.
      num_params: the number of parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.diag(jnp.array([2.0, 1.0])), jnp.zeros(2))
      >>> lin.eigenvalues
      Array([2. , 0.5], dtype=float32)
    """

    coordinates: jax.Array
    eigenvalues: jax.Array
    residuals: jax.Array
    loss: jax.Array
    gradient_norm: jax.Array
    num_params: int


class Alignment(NamedTuple):
    r"""How SGD's noise aligns with the curvature, from :func:`alignment`.

    Attributes:
      mu: :math:`\mu = \operatorname{tr}(\Sigma G) / (2 L \|G\|_F^2) = \alpha \beta`.
      alpha: the cosine of :math:`\Sigma` and :math:`G`.
      beta: the magnitude :math:`\|\Sigma\|_F / (2 L \|G\|_F)`.
      loss: the loss L.

    Example:
      >>> from flatopt import stability
      >>> stability.Alignment(1.0, 1.0, 1.0, 0.1).mu
      1.0
    """

    mu: Any
    alpha: Any
    beta: Any
    loss: Any


def linearize(
    model_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    targets: Any,
    *,
    loss_scale: float = 1.0,
    loss_fn: Callable[..., Any] | None = None,
    chunk_size: int = 64,
) -> Linearization:
    r"""Linearize a model at its parameters, in the space of its examples.

    Cost: the Jacobian of all outputs once, or about n / (2 chunk_size) times where it
    exceeds half a billion values, and the eigendecomposition of an (n c, n c) matrix.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` of shape (n,) or (n, c).
      params: the parameters, at or near a minimum.
      inputs: n inputs, a tree of arrays with a leading axis.
      targets: the targets, of the outputs' shape.
      loss_scale: factor of the loss over ``sum of squared errors / (2 n)``.
      loss_fn: ``loss_fn(outputs, targets)``, your training loss: if given it is compared
        with ``loss_scale``, since the wrong convention changes learning rates unseen.
      chunk_size: number of examples whose Jacobian is computed at once.

    Returns:
      A :class:`Linearization`.

    Raises:
      ValueError: for a ``loss_fn`` that is not this loss, naming the factor; for targets of
        another shape, fewer than 2 examples, a zero Jacobian, values that are not finite.

    References:
      Wu, Wang, Su, `The Alignment Property of SGD Noise
      <https://arxiv.org/abs/2207.02628>`_, NeurIPS 2022; Mulayoff, Michaeli, `Exact Mean
      Square Linear Stability Analysis for SGD <https://arxiv.org/abs/2306.07850>`_, 2023.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> float(lin.loss)
      0.0
    """
    params = _checks.check_params(params)
    _checks.check_scale(loss_scale, "loss_scale")
    _checks.check_num_samples(chunk_size, "chunk_size")
    outputs, targets = model_fn(params, inputs), jnp.asarray(targets)
    if outputs.shape != targets.shape or outputs.ndim not in (1, 2):
        raise ValueError(
            "targets must have the shape of the outputs, (n,) or (n, c), got "
            f"{targets.shape} for outputs {outputs.shape}; reshape one of them."
        )
    n = len(outputs)
    if n < 2:
        raise ValueError(
            f"inputs must hold at least 2 examples, got {n}; one example has no sampling "
            "noise, and gradient descent's threshold 2 / eigenvalue is exact."
        )
    errors = _trees.widen(outputs - targets).reshape(n, -1)
    loss = loss_scale * jnp.sum(errors**2) / (2 * n)
    if loss_fn is not None:
        _check_loss(loss_fn(outputs, targets), loss, loss_scale, errors, n)
    root = jnp.sqrt(jnp.asarray(loss_scale, errors.dtype))
    gram = loss_scale * _gram(model_fn, params, inputs, n, errors.shape[1], chunk_size)
    if not np.isfinite(np.asarray(gram)).all():
        raise ValueError(
            "the Jacobian is not finite; look at the model's outputs and gradients first."
        )
    values, vectors = jnp.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int(jnp.sum(values > values[0] * len(values) * jnp.finfo(values.dtype).eps))
    if not rank or not values[0] > 0:
        raise ValueError(
            "the Jacobian of the model is zero at params; there is no curvature to be "
            "stable or unstable in."
        )
    coordinates = vectors[:, :rank] * jnp.sqrt(values[:rank])[None]
    coordinates = coordinates.reshape(n, -1, rank)
    residuals = root * errors
    gradient = jnp.einsum("nc,ncr->r", residuals, coordinates) / n
    return Linearization(
        coordinates,
        values[:rank] / n,
        residuals,
        loss,
        jnp.linalg.norm(gradient),
        sum(leaf.size for leaf in jax.tree.leaves(params)),
    )


def _check_loss(given, loss, loss_scale, errors, n):
    unit = float(jnp.sum(errors**2)) / (2 * n)
    if not np.isclose(float(given), float(loss), rtol=1e-3, atol=1e-30):
        factor = float(given) / unit if unit else math.nan
        raise ValueError(
            f"loss_fn returned {float(given):g} where loss_scale={loss_scale:g} gives "
            f"{float(loss):g}; if it is a squared error, pass loss_scale={factor:g}."
        )


def _gram(model_fn, params, inputs, n, num_outputs, chunk_size):
    """Inner products of the gradients of all outputs, shape (n c, n c)."""

    @jax.jit
    def jacobian(params, chunk):
        def outputs(params, example):
            example = jax.tree.map(lambda x: x[None], example)
            return _trees.widen(model_fn(params, example)[0]).reshape(-1)

        rows = jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(params, chunk)
        return jax.tree.map(
            lambda p, x: _trees.widen(x.reshape(-1, max(p.size, 1))), params, rows
        )

    @jax.jit
    def products(rows, others):
        leaves = jax.tree.leaves(
            jax.tree.map(
                lambda x, y: jnp.dot(x, y.T, precision=jax.lax.Precision.HIGHEST),
                rows,
                others,
            )
        )
        return sum(leaves)

    starts = range(0, n, chunk_size)
    chunks = [
        jax.tree.map(lambda x, s=s: x[s : s + chunk_size], inputs) for s in starts
    ]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    held = n * num_outputs * size <= HELD_VALUES
    kept = [jacobian(params, chunk) for chunk in chunks] if held else None
    blocks = [[None] * len(chunks) for _ in chunks]
    for i, chunk in enumerate(chunks):
        rows = kept[i] if held else jacobian(params, chunk)
        for j in range(i, len(chunks)):
            others = kept[j] if held else jacobian(params, chunks[j])
            blocks[i][j] = products(rows, others)
            blocks[j][i] = blocks[i][j].T
    return jnp.block(blocks)


def alignment(lin: Linearization) -> Alignment:
    r"""The alignment of SGD's noise with the curvature, exactly.

    With :math:`\Sigma` the covariance of the examples' gradients and :math:`G` the
    Gauss-Newton matrix. It does not depend on ``loss_scale``.

    Args:
      lin: from :func:`linearize`, at parameters with a nonzero loss.

    Returns:
      An :class:`Alignment`.

    Raises:
      ValueError: at zero loss, where it is 0 / 0: move the parameters a little.

    References:
      Wu, Wang, Su, `The Alignment Property of SGD Noise
      <https://arxiv.org/abs/2207.02628>`_, NeurIPS 2022, equations 3 to 5.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.zeros(2))
      >>> round(float(stability.alignment(lin).mu), 3)
      0.5
    """
    if not float(lin.loss) > 0:
        raise ValueError(
            "lin must have a nonzero loss, got 0: the alignment is 0 / 0 there; linearize "
            "a little away from the minimum."
        )
    grads = jnp.einsum("nc,ncr->nr", lin.residuals, lin.coordinates)
    mean = grads.mean(axis=0)
    noise = grads.T @ grads / len(grads) - jnp.outer(mean, mean)
    product = jnp.sum(jnp.diagonal(noise) * lin.eigenvalues)
    size = jnp.linalg.norm(lin.eigenvalues)
    spread = jnp.linalg.norm(noise)
    return Alignment(
        mu=product / (2 * lin.loss * size**2),
        alpha=product / (spread * size),
        beta=spread / (2 * lin.loss * size),
        loss=lin.loss,
    )


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

    The theory is about minima with zero error: look at ``lin.loss`` and
    ``lin.gradient_norm`` before you trust it.

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
    q, p = _weights(lin, batch_size, sampling)
    values = np.asarray(lin.eigenvalues, "f8")
    coordinates = np.asarray(lin.coordinates, "f8")
    n, c, _ = coordinates.shape
    # H_i H_j for i = j: the squared Frobenius norms of the examples' Hessians.
    grams = np.einsum("ncr,ndr->ncd", coordinates, coordinates)
    mean_square_norm = np.mean(np.sum(grams**2, axis=(1, 2)))
    trace, norm = values.sum(), np.sqrt((values**2).sum())
    top = _rank_one_ratio(np.eye(len(values))[0], values, coordinates, q, p)
    smallest = _smallest_alignment(values, coordinates, sampling)
    estimate = math.nan
    if float(lin.loss) > 0:
        mu = float(alignment(lin).mu)
        estimate = 1 / (norm * math.sqrt(p * mu)) if p > 0 and mu > 0 else math.inf
    found = dict(
        gradient_descent=2 / values[0],
        mean_square=2 / _top_of_mean_square(lin, q, p),
        trace_ratio=2 * trace / (q * norm**2 + p * mean_square_norm),
        rank_one=2 / _largest_rank_one(values, coordinates, q, p),
        top_direction=2 / top,
        trace=2 * c / (p * trace) if p else math.inf,
        frobenius=1 / (norm * math.sqrt(p * smallest))
        if p * smallest > 0
        else math.inf,
        frobenius_estimate=estimate,
        coherence=_coherence(values, grams, coordinates, batch_size)
        if sampling == "bernoulli"
        else math.nan,
    )
    return Thresholds(**{name: float(value) for name, value in found.items()})


def growth_rate(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    sampling: str = "without_replacement",
) -> float:
    r"""The factor by which SGD's second moment grows a step, in the long run.

    Above 1 the expected loss grows exponentially, below it falls. Directions that no
    example sees stay as they are and are left out.

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
    q, p = _weights(lin, batch_size, sampling)
    rank = len(lin.eigenvalues)
    step = functools.partial(
        _moment_step, lin.coordinates, lin.eigenvalues, learning_rate, q, p
    )
    # Shifted by the identity, which the step may map to zero.
    shifted = lambda moment: moment + step(moment)  # noqa: E731
    return _largest_eigenvalue(shifted, rank, lin.eigenvalues.dtype) - 1


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
    q, p = _weights(lin, batch_size, sampling)
    values = lin.eigenvalues
    start = 2 * jnp.eye(len(values), dtype=values.dtype) / jnp.sum(values)

    def step(moment, _):
        loss = jnp.sum(jnp.diagonal(moment) * values) / 2
        moment = _moment_step(lin.coordinates, values, learning_rate, q, p, moment)
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
    rate = growth_rate(lin, learning_rate, batch_size, sampling=sampling)
    if rate <= 1 + 1e-6:
        return math.inf
    # The long-run rate sets the scale; the start may shrink first.
    num_steps = int(math.log(factor) / math.log(rate)) + 64
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


NOISES = ("sgd", "gd", "isotropic")


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
    evenly over all parameters.

    Args:
      lin: from :func:`linearize`.
      key: a JAX random key.
      learning_rate: the step size.
      batch_size: B, at most n.
      num_steps: number of steps.
      num_runs: number of independent runs.
      noise: "sgd", "gd" or "isotropic".
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
    _, p = _weights(lin, batch_size, sampling)
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

    def step(point, key):
        loss = jnp.sum(values * point**2) / 2
        if noise == "sgd":
            errors = jnp.einsum("ncr,r->nc", coordinates, point)
            weights = batch_weights(key)[:, None] / batch_size
            grads = jnp.einsum("nc,ncr->r", weights * errors, coordinates)
        else:
            grads = values * point
        if noise == "isotropic":
            errors = jnp.einsum("ncr,r->nc", coordinates, point)
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
        rate = growth_rate(lin, learning_rate, batch_size, sampling=sampling)
        return rate <= 1 + 1e-6

    if not stays(n):
        return None
    low, high = 0, n  # stability can only grow with the batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stays(middle) else (middle, high)
    return high


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
      gradient_norm: the norm of its gradient.
      max_eigenvalue: the largest eigenvalue of H.
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
    gradient_norm: float
    max_eigenvalue: float
    trace: float
    frobenius_norm: float
    alignment: Alignment | None
    thresholds: Thresholds
    growth_rate: float
    smallest_batch_size: int | None

    @property
    def verdict(self) -> str:
        """What follows for training, in words."""
        limit = self.thresholds.mean_square
        if self.learning_rate > self.thresholds.gradient_descent:
            return "unstable even for the whole data in one batch"
        if self.learning_rate > limit:
            return (
                f"SGD leaves: the learning rate exceeds the exact limit {limit:.4g}; a batch "
                f"of {self.smallest_batch_size} would stay"
            )
        margin = limit / self.learning_rate
        return f"SGD stays: the learning rate could be {margin:.3g} times as large"

    def __str__(self):
        lines = [
            f"learning rate {self.learning_rate:.4g}, batch size {self.batch_size}: "
            f"{self.verdict}",
            f"loss {self.loss:.3g}, gradient norm {self.gradient_norm:.3g} (the theory is "
            "about minima of zero loss)",
            f"H: largest eigenvalue {self.max_eigenvalue:.4g}, trace {self.trace:.4g}, "
            f"Frobenius norm {self.frobenius_norm:.4g}",
            f"growth of the second moment a step: {self.growth_rate:.4g}",
        ]
        if self.alignment is not None:
            mu, alpha, beta, _ = (float(x) for x in self.alignment)
            lines.append(f"alignment mu {mu:.3g} = alpha {alpha:.3g} * beta {beta:.3g}")
        lines.append(f"{'largest stable rate by':22} {'rate':>10}  at this rate")
        for name, value in self.thresholds._asdict().items():
            if not math.isnan(value):
                holds = "holds" if self.learning_rate <= value else "violated"
                lines.append(f"{name:22} {value:10.4g}  {holds}")
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
    return Report(
        learning_rate=float(learning_rate),
        batch_size=batch_size,
        loss=float(lin.loss),
        gradient_norm=float(lin.gradient_norm),
        max_eigenvalue=float(lin.eigenvalues[0]),
        trace=float(jnp.sum(lin.eigenvalues)),
        frobenius_norm=float(jnp.linalg.norm(lin.eigenvalues)),
        alignment=alignment(lin) if float(lin.loss) > 0 else None,
        thresholds=thresholds(lin, batch_size, sampling=sampling),
        growth_rate=growth_rate(lin, learning_rate, batch_size, sampling=sampling),
        smallest_batch_size=smallest_batch_size(lin, learning_rate, sampling=sampling),
    )


# The second moment's recursion on symmetric matrices of the rows' space


def _weights(lin, batch_size, sampling):
    n = len(lin.coordinates)
    _checks.check_num_samples(batch_size, "batch_size")
    if batch_size > n:
        raise ValueError(
            f"batch_size must be at most the number of examples, {n}, got {batch_size}."
        )
    if sampling not in SAMPLINGS:
        raise ValueError(
            f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {sampling!r}."
        )
    if sampling == "bernoulli":
        return 1.0, (n - batch_size) / (n * batch_size)
    if sampling == "with_replacement":
        return 1 - 1 / batch_size, 1 / batch_size
    p = (n - batch_size) / (batch_size * (n - 1))
    return 1 - p, p


def _noise_part(coordinates, matrix, xp=jnp):
    """The mean over examples of H_i M H_i."""
    n, _, rank = coordinates.shape
    rows = coordinates.reshape(-1, rank)
    inner = xp.einsum(
        "ncr,ndr->ncd", (rows @ matrix).reshape(coordinates.shape), coordinates
    )
    weighted = xp.einsum("ncd,ndr->ncr", inner, coordinates).reshape(-1, rank)
    return rows.T @ weighted / n


@jax.jit
def _moment_step(coordinates, values, rate, q, p, moment):
    drift = values[:, None] * moment + moment * values[None]
    noise = q * values[:, None] * moment * values[None]
    noise = noise + p * _noise_part(coordinates, moment)
    return moment - rate * drift + rate**2 * noise


@jax.jit
def _scaled_noise(coordinates, values, q, p, moment):
    """C^{-1/2} D C^{-1/2}, with C elementwise in the eigenbasis of H."""
    scale = jax.lax.rsqrt((values[:, None] + values[None]) / 2)
    moment = scale * moment
    found = q * values[:, None] * moment * values[None]
    return scale * (found + p * _noise_part(coordinates, moment))


def _top_of_mean_square(lin, q, p):
    apply = functools.partial(_scaled_noise, lin.coordinates, lin.eigenvalues, q, p)
    return _largest_eigenvalue(apply, len(lin.eigenvalues), lin.eigenvalues.dtype)


def _largest_eigenvalue(apply, rank, dtype):
    """Of a linear map of symmetric matrices, symmetric itself; starts from the identity.

    The map is positive: its top eigenvector is a positive semidefinite matrix, which the
    identity is never orthogonal to.
    """

    def product(vector):
        matrix = jnp.asarray(vector.reshape(rank, rank), dtype)
        found = np.asarray(apply((matrix + matrix.T) / 2), "f8")
        return (found + found.T).ravel() / 2

    if rank <= 3:
        columns = np.stack([product(row) for row in np.eye(rank**2)])
        return float(np.linalg.eigvalsh((columns + columns.T) / 2)[-1])
    operator = scipy.sparse.linalg.LinearOperator((rank**2,) * 2, product, dtype="f8")
    accuracy = 1e-9 if dtype == jnp.float64 else 1e-6
    values = scipy.sparse.linalg.eigsh(
        operator,
        k=1,
        which="LA",
        v0=np.eye(rank).ravel(),
        tol=accuracy,
        return_eigenvectors=False,
    )
    return float(values[0])


def _rank_one_ratio(vector, values, coordinates, q, p):
    vector = vector / np.linalg.norm(vector)
    mean = np.sum(values * vector**2)
    each = np.sum((coordinates @ vector) ** 2, axis=1)
    return (q * mean**2 + p * np.mean(each**2)) / mean


def _largest_rank_one(values, coordinates, q, p):
    """The largest ratio of equation 24 over directions, from several starts."""

    def negative(vector):
        length = np.linalg.norm(vector)
        unit = vector / length
        mean = np.sum(values * unit**2)
        shown = coordinates @ unit
        each = np.sum(shown**2, axis=1)
        ratio = (q * mean**2 + p * np.mean(each**2)) / mean
        slope = q * 2 * values * unit  # of q * mean
        noise = np.einsum("n,nc,ncr->r", 4 * each / len(each), shown, coordinates)
        slope = slope + p * noise / mean
        slope = slope - p * np.mean(each**2) / mean**2 * 2 * values * unit
        slope = (slope - unit * (slope @ unit)) / length
        return -ratio, -slope

    rank = len(values)
    norms = np.sum(coordinates**2, axis=(1, 2))
    starts = [np.eye(rank)[0]]
    for example in np.argsort(-norms)[:4]:
        starts.append(np.linalg.svd(coordinates[example], full_matrices=False)[2][0])
    best = 0.0
    for start in starts:
        found = scipy.optimize.minimize(negative, start, jac=True, method="L-BFGS-B")
        best = max(best, -found.fun)
    return best


def _smallest_alignment(values, coordinates, sampling):
    """The smallest alignment of the linearized model over displacements."""
    moved = _noise_part(coordinates, np.diag(values), np)
    if sampling != "bernoulli":
        moved = moved - np.diag(values**3)
    scaled = moved / np.sqrt(np.outer(values, values))
    return max(float(np.linalg.eigvalsh(scaled)[0]) / np.sum(values**2), 0.0)


def _coherence(values, grams, coordinates, batch_size):
    n = len(grams)
    if batch_size == n:
        return 2 / values[0]
    rows = coordinates.reshape(-1, coordinates.shape[2])
    inner = (rows @ rows.T).reshape(n, coordinates.shape[1], n, -1)
    similarity = np.sqrt(np.sum(inner**2, axis=(1, 3)))
    largest = max(np.linalg.eigvalsh(gram)[-1] for gram in grams)
    sigma = np.linalg.eigvalsh(similarity)[-1] / largest
    return min(2 / values[0], sigma / (values[0] * math.sqrt(n / batch_size - 1)))
