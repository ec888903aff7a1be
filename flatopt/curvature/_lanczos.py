"""Extreme eigenvalues of curvature operators by the Lanczos method."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, checks, host
from flatopt._core.types import SpectrumEnd
from flatopt.curvature._krylov import (
    DEPENDENT,
    Krylov,
    check_eigen,
    check_host,
    order_from,
)
from flatopt.curvature._operator import product_errors
from flatopt.curvature._probes import check_share

ROOM = 24  # vectors beyond 2k: most spectra converge within, some 2k stay at restarts
EXTRA = 8  # pairs kept beyond the wanted: their convergence is not lost at a restart
PASSES = 20  # products that a run typically takes, for the progress bar
FEWEST = 4  # steps of a fresh run; the first ones may see a flat bulk alone
SHARE = 3e-3  # of a missing vector in a pair nearby: smaller once in 400 draws
TANGENT = 30.0  # of the angle to a missing vector over root d: larger once in 40 draws


class Eigenpairs(NamedTuple):
    """Eigenvalues with vectors and bounds.

    From :func:`eigenpairs` or :func:`block_lanczos`.

    Attributes:
      values: shape (k,), from the wanted end inwards.
      vectors: a tree like the parameters with a leading axis of k; each vector has norm 1.
      residuals: shape (k,): some eigenvalue of the matrix lies within this distance of
        the value. An allowance for the error of the products is added.
      is_complete: whether a run from a fresh random vector found nothing that was missing;
        False: ``max_matvecs`` was spent before, and copies of repeated eigenvalues, or
        what has overtaken a start, may be missing. Of :func:`block_lanczos`: whether the
        blocks hold the whole space.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: 5 * p[0] ** 2 + p[1] ** 2, jnp.ones(2))
      >>> curvature.eigenpairs(operator, jax.random.key(0)).vectors.shape
      (1, 2)
    """

    values: np.ndarray | jax.Array
    vectors: Any
    residuals: np.ndarray | jax.Array
    is_complete: bool = True


@host.compiled
def residuals_of(vectors, found):
    """Rayleigh quotients of unit vectors, residual vectors and their norms.

    All in units of the powers of two that come last, one a row.
    """
    units = blocks.row_units(found)
    found = blocks.divide_rows(found, units)
    values = blocks.gram(vectors, found).diagonal()
    rest = jax.tree.map(
        lambda h, x: h - values.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype) * x,
        found,
        vectors,
    )
    squares = blocks.gram(rest, rest).diagonal()
    return values, rest, host.namespace(squares).sqrt(squares), units


def rounding_of(params, dtype):
    """The error of a product by rounding to allow for, over the norm of the matrix."""
    narrow = max(float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(params))
    return max(20 * float(jnp.finfo(dtype).eps), narrow)


class _Goal(NamedTuple):
    """What is looked for, and for how long."""

    count: int  # type: ignore[assignment]  # tuple.count
    which: str
    rtol: float
    max_matvecs: int
    dimension: int


def eigenpairs(
    operator,
    key: jax.Array,
    k: int = 1,
    *,
    which: SpectrumEnd = "largest",
    start: Eigenpairs | None = None,
    rtol: float = 1e-3,
    max_matvecs: int = 400,
    progress: Any = None,
) -> Eigenpairs:
    r"""Extreme eigenvalues with vectors and rigorous bounds, by thick-restart Lanczos.

    The residual :math:`r = \|H x - \theta x\|` of a unit vector bounds the distance of
    :math:`\theta` to the nearest eigenvalue; it is computed by a product of its own for
    each pair returned. Iteration ends when all residuals are at most ``rtol`` times the
    largest magnitude of an eigenvalue seen, or after ``max_matvecs`` products; the
    residuals tell which.

    One Lanczos run sees one copy of a repeated eigenvalue, and a good start hides what it
    lacks. So for k > 1, and from a start, runs from fresh random vectors orthogonal to the
    pairs found go on until one adds nothing; ``is_complete`` tells.

    Cost: some 10 to 20 products of 2 to 3 gradients each for the largest eigenvalue; for
    k > 1 as many again for each run, one more than there are copies. Memory: 2k + 25
    vectors. Runs on the host; inside ``jax.jit`` and ``jax.vmap`` use
    :func:`block_lanczos`.

    Args:
      operator: the matrix.
      key: a JAX random key, for the start vectors.
      k: number of eigenpairs, at most the number of parameters.
      which: "largest", "smallest" (of the signed values) or "magnitude".
      start: eigenpairs found earlier, such as at the last checkpoint.
      rtol: residuals to reach, in units of the largest magnitude; values closer than
        this count as the same.
      max_matvecs: most products to spend.
      progress: True for a bar of products, or a function ``progress(done, total,
        description)``; None: a bar where streamed data takes long; False: none.

    Returns:
      :class:`Eigenpairs`.

    Raises:
      ValueError: for k larger than the number of parameters, an unknown ``which``, a
        curvature that is not finite.

    References:
      Wu, Simon, `Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems
      <https://doi.org/10.1137/S0895479898334605>`_, SIAM J. Matrix Anal. 2000.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: 5 * p[0] ** 2 + p[1] ** 2, jnp.ones(2))
      >>> found = curvature.eigenpairs(operator, jax.random.key(0))
      >>> round(float(found.values[0]), 3)
      10.0
    """
    size = check_eigen(operator, key, k, which)
    check_host(operator, key, "use curvature.block_lanczos there, or call this outside")
    check_share(rtol, "write rtol=1e-3, in units of the largest magnitude")
    checks.check_count(max_matvecs, "max_matvecs", "it counts the products to spend")
    if start is not None and not isinstance(start, Eigenpairs):
        raise TypeError(
            f"start must be Eigenpairs, got {checks.described(start)}; give what "
            "eigenpairs returned before."
        )
    goal = _Goal(k, which, rtol, max_matvecs, size)
    krylov = Krylov(operator, key, min(size, 2 * k + ROOM))
    expected = min(max_matvecs, PASSES + PASSES * k * (k > 1 or start is not None))
    with operator.risk.watched(progress, expected, "eigenpairs"):
        return _search(krylov, goal, start)


def _search(krylov, goal, start):
    rest, length = (
        krylov.random() if start is None else _warm_start(krylov, start, goal.which)
    )
    known = fresh = kept = None
    checks_copies = goal.count > 1 or start is not None
    while True:
        is_met, rest, length = _fill(krylov, rest, length, goal, fresh)
        values, coefficients, _ = krylov.ritz(goal.which)
        scale = np.abs(values).max()
        wanted = values[: goal.count]
        is_whole = krylov.size == goal.dimension
        is_spent = krylov.used >= goal.max_matvecs
        tolerance = max(goal.rtol, krylov.noise) * scale
        same = known is not None and np.abs(wanted - known).max() <= tolerance
        if fresh is not None and not (is_met or is_whole or is_spent):
            keep = _kept(krylov, goal)
            krylov.restart(krylov.rows(coefficients[:, :keep]), values[:keep])
            continue
        if checks_copies and is_met and not (same or is_whole or is_spent):
            kept = krylov.rows(coefficients[:, : goal.count])
            krylov.restart(kept, wanted)
            known, fresh = wanted, krylov.used
            rest, length = krylov.random()
            continue
        is_complete = not checks_copies or is_whole or (same and is_met)
        # A run that changed nothing leaves the pairs of before it the better ones.
        vectors = kept if same and kept is not None else None
        if vectors is None:
            vectors = krylov.rows(coefficients[:, : goal.count])
        pairs, worst = _verify(krylov, vectors, goal, scale, is_complete)
        fresh = kept = None
        if pairs is not None:
            return pairs
        keep = _kept(krylov, goal)
        krylov.restart(krylov.rows(coefficients[:, :keep]), values[:keep])
        rest, length = krylov.rest_of(worst)


def _kept(krylov, goal):
    return min(goal.count + EXTRA, len(krylov.projection) - 2, krylov.size)


def _verify(krylov, vectors, goal, scale, is_complete):
    """The pairs with bounds from products of their own, or the worst residual vector."""
    found = krylov.products(vectors)
    values, rest, residuals, units = residuals_of(vectors, found)
    errors = np.asarray(product_errors(krylov.operator, vectors, found), "f8")
    krylov.used += goal.count
    dtype = values.dtype
    units = np.asarray(units, "f8")
    values, residuals = (units * np.asarray(x, "f8") for x in (values, residuals))
    is_met = (residuals - errors).max() <= goal.rtol * scale
    is_done = is_met or krylov.size == goal.dimension
    if not (is_done or krylov.used >= goal.max_matvecs):
        return None, blocks.single(blocks.row(rest, int(residuals.argmax())))
    rounding = rounding_of(krylov.operator.like, dtype) * scale
    bounds = residuals + errors + rounding
    vectors = host.send(vectors, krylov.operator.like)
    return Eigenpairs(values.astype(dtype), vectors, bounds, bool(is_complete)), None


_orthonormalize = host.compiled(blocks.orthonormalize)


@host.compiled
def _projected(rows, found):
    """Products in units, the unit, the matrix within the rows, their squared norms."""
    unit = blocks.unit(found)
    found = blocks.divide(found, unit)
    squares = blocks.gram(rows, rows).diagonal()
    return found, unit, blocks.gram(rows, found), squares


def _warm_start(krylov, start, which):
    rows = _orthonormalize(krylov.bring(blocks.widen(start.vectors)))
    found, unit, projection, norms = _projected(rows, krylov.products(rows))
    projection = float(unit) * np.asarray(projection, "f8")
    krylov.used += len(projection)
    norms = np.asarray(norms)
    keep = np.flatnonzero(norms > 0.5)  # dependent vectors came back as zeros
    if not len(keep):
        return krylov.random()
    projection = projection[np.ix_(keep, keep)]
    values, coefficients = np.linalg.eigh((projection + projection.T) / 2)
    order = order_from(values, which)[: max(len(krylov.projection) - 1, 1)]
    turn = np.zeros((len(order), len(norms)))
    turn[:, keep] = coefficients[:, order].T
    rows, found = (blocks.combine(turn.astype(norms.dtype), b) for b in (rows, found))
    krylov.restart(rows, values[order])
    total = jax.tree.map(lambda x: x.sum(axis=0, keepdims=True), found)
    rest, length = krylov.rest_of(total)
    return rest, length * float(unit)


def _fill(krylov, rest, length, goal, fresh):
    """Grow the basis until it is full or the goal looks met: ``(is met, rest, length)``."""
    scale = np.abs(krylov.projection).max()
    while krylov.size < len(krylov.projection):
        if length <= krylov.noise * scale or length == 0.0:
            rest, length = krylov.random()  # an invariant subspace: look elsewhere
            if length <= DEPENDENT:
                break
        rest, length = krylov.step(rest)
        values, _, bounds = krylov.ritz(goal.which, length)
        scale = np.abs(values).max()
        if krylov.size < min(goal.count + 2, goal.dimension):
            continue
        if bounds[: goal.count].max() <= goal.rtol * scale / 2 and (
            fresh is None
            or _is_exhausted(krylov, values, bounds, goal, krylov.used - fresh)
        ):
            return True, rest, length
        if krylov.used >= goal.max_matvecs:
            break
    return False, rest, length


def _is_exhausted(krylov, values, bounds, goal, steps):
    """Whether a run from a fresh vector would have shown a pair that is missing.

    Either the best pair beyond the wanted ones has converged, so well that its residual
    does not come from a missing vector of which it holds a small share: one lies at least
    as far out as the wanted, or by some rtol where these are near. Or the run is as long
    as Kaniel's bound asks for: from an angle of tangent t to a missing vector, m steps
    leave an error of at most t over the Chebyshev polynomial
    T_{m - 1}(1 + 2 gap / spread), in units of the root of the gap.
    """
    count = goal.count
    if steps < FEWEST or len(values) <= count:
        return False
    last, following = values[count - 1], values[count]
    if goal.which == "magnitude":
        last, following, far = abs(last), abs(following), -abs(last)
    elif goal.which == "smallest":
        last, following, far = -last, -following, -values.max()
    else:
        far = values.min()
    # Whichever of these the run itself has found: it may be among the wanted already.
    scale, bound = np.abs(values).max(), bounds[: count + 1].max()
    distance = max(last - following, 3 * goal.rtol * scale)
    if bound <= max(min(SHARE * distance, goal.rtol * scale / 2), krylov.noise * scale):
        return True
    gap, spread = last - following - bound, last - far
    if gap <= 0:
        return False
    tangent = TANGENT * goal.dimension**0.5 * (spread / gap) ** 0.5
    return steps >= 1 + np.arccosh(tangent) / np.arccosh(1 + 2 * gap / spread)
