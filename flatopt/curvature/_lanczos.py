"""Eigenvalues and spectra of curvature operators by the Lanczos method.

Vectors stay trees on the device; the small projected matrix is solved on the host in
float64. Every new vector is orthogonalized twice against all earlier ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, checks
from flatopt._core.estimates import Estimate
from flatopt._core.types import SpectrumEnd
from flatopt.curvature._draws import draw_normal, probe_keys
from flatopt.curvature._operator import products
from flatopt.curvature._probes import check_operator, is_traced

ENDS = ("largest", "smallest", "magnitude")

ROOM = (
    24  # vectors beyond 2k: most spectra converge within, some 2k are kept at restarts
)
EXTRA = 8  # pairs kept beyond the wanted: their convergence is not lost at a restart
PASSES = 20  # products that a run typically takes, for the progress bar
DRAWS = 4  # random directions to try before the basis counts as the whole space
DEPENDENT = 1e-2  # of a normal vector of length 1 a dimension: its rest is rounding
INVARIANT = 1e-6  # some ten roundings of float32: what is left of a product is noise
ROUNDING = 1e-6  # likewise for changes of eigenvalues
STOPPED = 1e-5  # the same in spectral_density, where 64 steps let rounding add up
FEWEST = 4  # steps of a fresh run; the first ones may see a flat bulk alone
SHARE = 3e-3  # of a missing vector in a pair nearby: smaller once in 400 draws
TANGENT = 30.0  # of the angle to a missing vector over root d: larger once in 40 draws


class Eigenpairs(NamedTuple):
    """Eigenvalues with vectors and bounds, from :func:`eigenpairs`.

    Attributes:
      values: shape (k,), from the wanted end inwards.
      vectors: a tree like the parameters with a leading axis of k; each vector has norm 1.
      residuals: shape (k,): some eigenvalue of the matrix lies within this distance of
        the value. An allowance for the rounding of the products is added.
      is_complete: whether a run from a fresh random vector found nothing that was missing;
        False: ``max_matvecs`` was spent before, and copies of repeated eigenvalues, or
        what has overtaken a start, may be missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: 5 * p[0] ** 2 + p[1] ** 2, jnp.ones(2))
      >>> curvature.eigenpairs(operator, jax.random.key(0)).vectors.shape
      (1, 2)
    """

    values: np.ndarray
    vectors: Any
    residuals: np.ndarray
    is_complete: bool = True


class SpectralDensity(NamedTuple):
    """A quadrature of the eigenvalue density, from :func:`spectral_density`.

    Attributes:
      nodes: shape (draws, steps).
      weights: shape (draws, steps); those of each draw sum to 1.

    Example:
      >>> import numpy as np
      >>> from flatopt import curvature
      >>> found = curvature.SpectralDensity(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]]))
      >>> found.density(np.array([2.0]), width=1.0).round(3)
      array([0.242])
    """

    nodes: np.ndarray
    weights: np.ndarray

    def moment(self, power: int) -> Estimate:
        """The mean of eigenvalues to a power: trace over dimension for 1.

        Example:
          >>> import numpy as np
          >>> from flatopt import curvature
          >>> nodes, weights = np.array([[1.0, 3.0]] * 2), np.full((2, 2), 0.5)
          >>> float(curvature.SpectralDensity(nodes, weights).moment(2).value)
          5.0
        """
        return Estimate.of((self.weights * self.nodes**power).sum(axis=1))

    def density(self, points, width: float | None = None) -> np.ndarray:
        """The density at points, each node blurred to a Gaussian of a width.

        The default width is a hundredth of the range of the nodes.

        Example:
          >>> import numpy as np
          >>> from flatopt import curvature
          >>> found = curvature.SpectralDensity(np.zeros((1, 1)), np.ones((1, 1)))
          >>> found.density(np.zeros(1), width=0.5).round(3)
          array([0.798])
        """
        if width is None:
            largest = np.abs(self.nodes).max()
            width = max(np.ptp(self.nodes) / 100, 1e-6 * largest) or 1.0
        distances = (np.asarray(points)[:, None] - self.nodes.ravel()) / width
        heights = np.exp(-(distances**2) / 2) / (width * np.sqrt(2 * np.pi))
        return heights @ self.weights.ravel() / len(self.weights)


@jax.jit
def _expand(basis, found):
    """A block of one in a basis: coefficients, the direction of the rest, its length.

    Coefficients and length are in units of a power of two, which comes last: squares of
    tiny and of huge products stay within float32.
    """
    unit = blocks.unit(found)
    rest, coefficients = blocks.row(blocks.divide(found, unit), 0), 0.0
    for _ in range(2):
        part = blocks.gram(blocks.single(rest), basis)[0]
        rest = blocks.subtract(rest, blocks.combine(part, basis))
        coefficients = coefficients + part
    length = jnp.sqrt(blocks.dot(rest, rest))
    rest = blocks.divide(rest, jnp.where(length == 0, 1.0, length))
    return coefficients, rest, length, unit


@functools.partial(jax.jit, donate_argnums=0)
def _append(basis, index, direction):
    """The basis with one more direction, and that direction as a block of one."""
    return blocks.set_row(basis, index, direction), blocks.single(direction)


@jax.jit
def _residuals(vectors, found):
    """Rayleigh quotients of unit vectors, residual vectors and their norms.

    All in units of the powers of two that come last, one a row.
    """
    units = blocks.row_units(found)
    found = blocks.divide_rows(found, units)
    values = jnp.diagonal(blocks.gram(vectors, found))
    rest = jax.tree.map(
        lambda h, x: h - values.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype) * x,
        found,
        vectors,
    )
    return values, rest, jnp.sqrt(jnp.diagonal(blocks.gram(rest, rest))), units


class _Krylov:
    """A growing orthonormal basis with the operator's projection on it."""

    def __init__(self, operator, key, capacity):
        self.operator, self.key = operator, key
        self.basis = blocks.zeros(operator.like, capacity)
        self.projection = np.zeros((capacity, capacity))
        self.size = self.used = 0
        self.draws = 0

    def restart(self, rows, values):
        """Keep these orthonormal Ritz vectors alone."""
        count = len(values)
        self.basis = jax.tree.map(
            lambda b, r: jnp.zeros_like(b).at[:count].set(r), self.basis, rows
        )
        self.projection[:] = 0
        self.projection[:count, :count] = np.diag(values)
        self.size = count

    def rest_of(self, block):
        """The direction of a block of one beyond the basis, and its length."""
        _, rest, length, unit = _expand(self.basis, block)
        return rest, float(length) * float(unit)

    def random(self):
        """A random direction orthogonal to the basis."""
        for _ in range(DRAWS):
            self.draws += 1
            noise = draw_normal(self.operator, probe_keys(self.key, self.draws, 1))
            rest, length = self.rest_of(noise)
            if length > DEPENDENT:
                break
        return rest, length

    def step(self, rest):
        """Add a direction; return the next one, and its length."""
        index = self.size
        self.basis, block = _append(self.basis, index, rest)
        found = products(self.operator, block)
        coefficients, rest, length, unit = _expand(self.basis, found)
        unit = float(unit)
        coefficients = unit * np.asarray(coefficients, "f8")
        if not np.isfinite(coefficients).all():
            raise ValueError(
                "the curvature is not finite; look at the loss and its gradient at these "
                "parameters first."
            )
        self.size = index + 1
        self.used += 1
        self.projection[index, : self.size] = coefficients[: self.size]
        self.projection[: self.size, index] = coefficients[: self.size]
        return rest, unit * float(length)

    def ritz(self, which, length=0.0):
        """Ritz values from the wanted end inwards, coefficients, bounds of residuals."""
        size = self.size
        values, coefficients = np.linalg.eigh(self.projection[:size, :size])
        order = _order(values, which)
        coefficients = coefficients[:, order]
        return values[order], coefficients, length * np.abs(coefficients[-1])

    def rows(self, coefficients):
        """Combinations of the basis, from columns of coefficients."""
        padded = np.zeros((coefficients.shape[1], len(self.projection)))
        padded[:, : self.size] = coefficients.T
        dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        return blocks.combine(jnp.asarray(padded, dtype), self.basis)


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
    vectors. Runs on the host, not inside ``jax.jit``.

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
    size = _check_eigen(operator, key, k, which)
    goal = _Goal(k, which, rtol, max_matvecs, size)
    krylov = _Krylov(operator, key, min(size, 2 * k + ROOM))
    expected = min(max_matvecs, PASSES + PASSES * k * (k > 1 or start is not None))
    with operator.risk.watched(progress, expected, "eigenpairs"):
        return _search(krylov, goal, start)


def _search(krylov, goal, start):
    rest, length = (
        krylov.random() if start is None else _warm_start(krylov, start, goal.which)
    )
    known = fresh = None
    checks_copies = goal.count > 1 or start is not None
    while True:
        is_met, rest, length = _fill(krylov, rest, length, goal, fresh)
        values, coefficients, _ = krylov.ritz(goal.which)
        scale = np.abs(values).max()
        wanted = values[: goal.count]
        is_whole = krylov.size == goal.dimension
        is_spent = krylov.used >= goal.max_matvecs
        same = known is not None and _same(wanted, known, goal, scale)
        if fresh is not None and not (is_met or is_whole or is_spent):
            keep = _kept(krylov, goal)
            krylov.restart(krylov.rows(coefficients[:, :keep]), values[:keep])
            continue
        if checks_copies and not (same or is_whole or is_spent):
            vectors = krylov.rows(coefficients[:, : goal.count])
            krylov.restart(vectors, wanted)
            known, fresh = wanted, krylov.used
            rest, length = krylov.random()
            continue
        is_complete = not checks_copies or is_whole or (same and is_met)
        pairs, worst = _verify(krylov, coefficients, goal, scale, is_complete)
        fresh = None
        if pairs is not None:
            return pairs
        keep = _kept(krylov, goal)
        krylov.restart(krylov.rows(coefficients[:, :keep]), values[:keep])
        rest, length = krylov.rest_of(worst)


def _kept(krylov, goal):
    return min(goal.count + EXTRA, len(krylov.projection) - 2, krylov.size)


def _same(values, known, goal, scale):
    """Whether a fresh run has left the wanted eigenvalues as they were."""
    return np.abs(values - known).max() <= max(goal.rtol, ROUNDING) * scale


def _verify(krylov, coefficients, goal, scale, is_complete):
    """The pairs with bounds from products of their own, or the worst residual vector."""
    vectors = krylov.rows(coefficients[:, : goal.count])
    values, rest, residuals, units = _residuals(
        vectors, products(krylov.operator, vectors)
    )
    krylov.used += goal.count
    dtype = values.dtype
    units = np.asarray(units, "f8")
    values, residuals = (units * np.asarray(x, "f8") for x in (values, residuals))
    is_done = residuals.max() <= goal.rtol * scale or krylov.size == goal.dimension
    if not (is_done or krylov.used >= goal.max_matvecs):
        return None, blocks.single(blocks.row(rest, int(residuals.argmax())))
    like = jax.tree.leaves(krylov.operator.like)
    narrow = max(float(jnp.finfo(p.dtype).eps) for p in like)
    rounding = max(20 * float(jnp.finfo(dtype).eps), narrow) * scale
    pairs = Eigenpairs(
        values.astype(dtype), vectors, residuals + rounding, bool(is_complete)
    )
    return pairs, None


def _check_eigen(operator, key, k, which):
    check_operator(operator)
    checks.check_random_key(key)
    if is_traced(operator):
        raise TypeError(
            "operator must hold concrete arrays, got a call inside jax.jit; the Lanczos "
            "method decides on the host, so call it outside."
        )
    checks.check_count(k, "k")
    size = blocks.size(operator.like)
    if k > size:
        raise ValueError(
            f"k must be at most the number of parameters, {size}, got {k}; ask for fewer."
        )
    if which not in ENDS:
        raise ValueError(
            f"which must be one of {', '.join(map(repr, ENDS))}, got {which!r}."
        )
    return size


def _order(values, which):
    if which == "largest":
        return np.argsort(-values)
    return np.argsort(values if which == "smallest" else -np.abs(values))


def _warm_start(krylov, start, which):
    rows = blocks.orthonormalize(blocks.widen(start.vectors))
    found = products(krylov.operator, rows)
    unit = blocks.unit(found)
    found = blocks.divide(found, unit)
    projection = float(unit) * np.asarray(blocks.gram(rows, found), "f8")
    krylov.used += len(projection)
    norms = np.asarray(jnp.diagonal(blocks.gram(rows, rows)))
    keep = np.flatnonzero(norms > 0.5)  # dependent vectors came back as zeros
    if not len(keep):
        return krylov.random()
    projection = projection[np.ix_(keep, keep)]
    values, coefficients = np.linalg.eigh((projection + projection.T) / 2)
    order = _order(values, which)[: max(len(krylov.projection) - 1, 1)]
    turn = np.zeros((len(order), len(norms)))
    turn[:, keep] = coefficients[:, order].T
    rows, found = (
        blocks.combine(jnp.asarray(turn, norms.dtype), b) for b in (rows, found)
    )
    krylov.restart(rows, values[order])
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0, keepdims=True), found)
    rest, length = krylov.rest_of(total)
    return rest, length * float(unit)


def _fill(krylov, rest, length, goal, fresh):
    """Grow the basis until it is full or the goal looks met: ``(is met, rest, length)``."""
    scale = np.abs(krylov.projection).max()
    while krylov.size < len(krylov.projection):
        if length <= INVARIANT * scale or length == 0.0:
            rest, length = krylov.random()  # an invariant subspace: look elsewhere
            if length <= DEPENDENT:
                break
        rest, length = krylov.step(rest)
        values, _, bounds = krylov.ritz(goal.which, length)
        scale = np.abs(values).max()
        if krylov.size < min(goal.count + 2, goal.dimension):
            continue
        if bounds[: goal.count].max() <= goal.rtol * scale / 2 and (
            fresh is None or _is_exhausted(values, bounds, goal, krylov.used - fresh)
        ):
            return True, rest, length
        if krylov.used >= goal.max_matvecs:
            break
    return False, rest, length


def _is_exhausted(values, bounds, goal, steps):
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
    if bound <= max(min(SHARE * distance, goal.rtol * scale / 2), ROUNDING * scale):
        return True
    gap, spread = last - following - bound, last - far
    if gap <= 0:
        return False
    tangent = TANGENT * goal.dimension**0.5 * (spread / gap) ** 0.5
    return steps >= 1 + np.arccosh(tangent) / np.arccosh(1 + 2 * gap / spread)


def spectral_density(
    operator, key: jax.Array, *, num_draws: int = 4, num_steps: int = 64
) -> SpectralDensity:
    r"""The density of eigenvalues, by stochastic Lanczos quadrature.

    Each draw of a standard normal vector gives a Gauss quadrature: nodes and weights whose
    moments up to order ``2 num_steps - 1`` are those of the spectrum as that vector sees
    it.

    Cost: ``num_draws * num_steps`` products, each a pass over streamed data. Memory:
    ``num_steps`` vectors. Runs on the host, not inside ``jax.jit``.

    Args:
      operator: the matrix.
      key: a JAX random key.
      num_draws: number of start vectors.
      num_steps: Lanczos steps for each, at most the number of parameters.

    Returns:
      :class:`SpectralDensity`.

    Raises:
      ValueError: for a curvature that is not finite.

    References:
      Ubaru, Chen, Saad, `Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature
      <https://doi.org/10.1137/16M1104974>`_, SIAM J. Matrix Anal. 2017; Ghorbani,
      Krishnan, Xiao, `An Investigation into Neural Net Optimization via Hessian Eigenvalue
      Density <https://arxiv.org/abs/1901.10159>`_, ICML 2019.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 2), jnp.ones(5))
      >>> found = curvature.spectral_density(operator, jax.random.key(0))
      >>> round(float(found.moment(1).value), 3)
      2.0
    """
    size = _check_eigen(operator, key, 1, "largest")
    checks.check_count(num_draws, "num_draws")
    checks.check_count(num_steps, "num_steps")
    capacity = min(num_steps, size)
    nodes, weights = np.zeros((2, num_draws, capacity))
    for draw in range(num_draws):
        krylov = _Krylov(operator, jax.random.fold_in(key, draw), capacity)
        rest, _ = krylov.random()
        while krylov.size < capacity:
            rest, length = krylov.step(rest)
            if length <= STOPPED * np.abs(krylov.projection).max():
                break
        values, coefficients, _ = krylov.ritz("smallest")
        nodes[draw, : krylov.size] = values
        nodes[draw, krylov.size :] = values[-1]
        weights[draw, : krylov.size] = coefficients[0] ** 2
    return SpectralDensity(nodes, weights)
