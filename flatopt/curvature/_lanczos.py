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
from flatopt.curvature._draws import draw_normal, probe_keys
from flatopt.curvature._operator import products
from flatopt.curvature._probes import check_operator, is_traced

ENDS = ("largest", "smallest", "magnitude")


class Eigenpairs(NamedTuple):
    """Eigenvalues with vectors and bounds, from :func:`eigenpairs`.

    Attributes:
      values: shape (k,), from the wanted end inwards.
      vectors: a tree like the parameters with a leading axis of k; each vector has norm 1.
      residuals: shape (k,): some eigenvalue of the matrix lies within this distance of
        the value. An allowance for the rounding of the products is added.

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
            width = max(np.ptp(self.nodes) / 100, 1e-6 * largest, 1e-12)
        distances = (np.asarray(points)[:, None] - self.nodes.ravel()) / width
        heights = np.exp(-(distances**2) / 2) / (width * np.sqrt(2 * np.pi))
        return heights @ self.weights.ravel() / len(self.weights)


@jax.jit
def _expand(basis, found):
    """Coefficients of a block of one in the basis, what is orthogonal to it, its length."""
    rest, coefficients = blocks.row(found, 0), 0.0
    for _ in range(2):
        part = blocks.gram(blocks.single(rest), basis)[0]
        rest = blocks.subtract(rest, blocks.combine(part, basis))
        coefficients = coefficients + part
    return coefficients, rest, jnp.sqrt(blocks.dot(rest, rest))


@functools.partial(jax.jit, donate_argnums=0)
def _append(basis, index, tree, length):
    """The basis with one more direction, and that direction as a block of one."""
    unit = jax.tree.map(lambda x: x / length, tree)
    return blocks.set_row(basis, index, unit), blocks.single(unit)


@jax.jit
def _residuals(vectors, found):
    """Rayleigh quotients of unit vectors, residual vectors and their norms."""
    values = jnp.diagonal(blocks.gram(vectors, found))
    rest = jax.tree.map(
        lambda h, x: h - values.reshape(-1, *[1] * (x.ndim - 1)) * x, found, vectors
    )
    return values, rest, jnp.sqrt(jnp.diagonal(blocks.gram(rest, rest)))


class _Krylov:
    """A growing orthonormal basis with the operator's projection on it."""

    def __init__(self, operator, key, capacity):
        self.operator, self.key = operator, key
        self.basis = blocks.zeros(operator.like, capacity)
        self.projection = np.zeros((capacity, capacity))
        self.size = self.used = 0
        self.draws = 0

    def restart(self, rows, projection):
        """Keep these orthonormal rows alone."""
        count = len(projection)
        self.basis = jax.tree.map(
            lambda b, r: jnp.zeros_like(b).at[:count].set(r), self.basis, rows
        )
        self.projection[:] = 0
        self.projection[:count, :count] = projection
        self.size = count

    def random(self):
        """A random direction orthogonal to the basis."""
        for _ in range(4):
            self.draws += 1
            noise = draw_normal(self.operator, probe_keys(self.key, self.draws, 1))
            _, rest, length = _expand(self.basis, noise)
            if length > 1e-2:
                break
        return rest, float(length)

    def step(self, rest, length):
        """Add a direction; return the next one, and its length."""
        index = self.size
        self.basis, unit = _append(self.basis, index, rest, length)
        found = products(self.operator, unit)
        coefficients, rest, length = _expand(self.basis, found)
        coefficients = np.asarray(coefficients, "f8")
        if not np.isfinite(coefficients).all():
            raise ValueError(
                "the curvature is not finite; look at the loss and its gradient at these "
                "parameters first."
            )
        self.size = index + 1
        self.used += 1
        self.projection[index, : self.size] = coefficients[: self.size]
        self.projection[: self.size, index] = coefficients[: self.size]
        return rest, float(length)

    def eigh(self):
        return np.linalg.eigh(self.projection[: self.size, : self.size])

    def rows(self, coefficients):
        """Combinations of the basis, from columns of coefficients."""
        padded = np.zeros((coefficients.shape[1], len(self.projection)))
        padded[:, : self.size] = coefficients.T
        dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        return blocks.combine(jnp.asarray(padded, dtype), self.basis)


def eigenpairs(
    operator,
    key: jax.Array,
    k: int = 1,
    *,
    which: str = "largest",
    start: Eigenpairs | None = None,
    rtol: float = 1e-3,
    max_matvecs: int = 400,
) -> Eigenpairs:
    r"""Extreme eigenvalues with vectors and rigorous bounds, by thick-restart Lanczos.

    The residual :math:`r = \|H x - \theta x\|` of a unit vector bounds the distance of
    :math:`\theta` to the nearest eigenvalue; it is computed by a product of its own for
    each pair returned. Iteration ends when all residuals are at most ``rtol`` times the
    largest magnitude of an eigenvalue seen, or after ``max_matvecs`` products; the
    residuals tell which.

    Cost: some 10 to 40 products of 2 to 3 gradients each, fewer from a good start. Memory:
    2k + 25 vectors. Runs on the host, not inside ``jax.jit``.

    Args:
      operator: the matrix.
      key: a JAX random key, for the start vector.
      k: number of eigenpairs, at most the number of parameters.
      which: "largest", "smallest" (of the signed values) or "magnitude".
      start: eigenpairs found earlier, such as at the last checkpoint.
      rtol: residuals to reach, in units of the largest magnitude.
      max_matvecs: most products to spend.

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
    size = _check_eigen(operator, k, which)
    count = min(k, size)
    capacity = min(size, 2 * k + 24)
    krylov = _Krylov(operator, key, capacity)
    if start is None:
        rest, length = krylov.random()
    else:
        rest, length = _warm_start(krylov, start, which)
    while True:
        scale, rest, length = _fill(
            krylov, rest, length, count, which, rtol, max_matvecs
        )
        values, coefficients = krylov.eigh()
        order = _order(values, which)
        vectors = krylov.rows(coefficients[:, order[:count]])
        found, residual_rows, residuals = _residuals(
            vectors, products(operator, vectors)
        )
        krylov.used += count
        residuals = np.asarray(residuals, "f8")
        done = residuals.max() <= rtol * scale or krylov.size == size
        if done or krylov.used >= max_matvecs:
            narrow = max(jnp.finfo(p.dtype).eps for p in jax.tree.leaves(operator.like))
            rounding = max(20 * jnp.finfo(found.dtype).eps, narrow) * scale
            return Eigenpairs(np.asarray(found), vectors, residuals + rounding)
        keep = order[: min(count + 8, capacity - 2)]
        krylov.restart(krylov.rows(coefficients[:, keep]), np.diag(values[keep]))
        worst = blocks.row(residual_rows, int(residuals.argmax()))
        _, rest, length = _expand(krylov.basis, blocks.single(worst))
        length = float(length)


def _check_eigen(operator, k, which):
    check_operator(operator)
    if is_traced(operator):
        raise TypeError(
            "operator must hold concrete arrays, got a call inside jax.jit; the Lanczos "
            "method decides on the host, so call it outside."
        )
    checks.check_num_samples(k, "k")
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
    projection = np.asarray(blocks.gram(rows, found), "f8")
    krylov.used += len(projection)
    norms = np.asarray(jnp.diagonal(blocks.gram(rows, rows)))
    keep = np.flatnonzero(norms > 0.5)  # dependent vectors came back as zeros
    projection = projection[np.ix_(keep, keep)]
    values, coefficients = np.linalg.eigh((projection + projection.T) / 2)
    order = _order(values, which)[: max(len(krylov.projection) - 1, 1)]
    turn = np.zeros((len(order), len(norms)))
    turn[:, keep] = coefficients[:, order].T
    rows, found = (
        blocks.combine(jnp.asarray(turn, norms.dtype), b) for b in (rows, found)
    )
    krylov.restart(rows, np.diag(values[order]))
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), found)
    _, rest, length = _expand(krylov.basis, blocks.single(total))
    return rest, float(length)


def _fill(krylov, rest, length, count, which, rtol, max_matvecs):
    """Grow the basis until it is full or the wanted pairs look converged."""
    scale = np.abs(krylov.projection).max()
    while krylov.size < len(krylov.projection):
        if length <= 1e-6 * scale or length == 0.0:
            rest, length = krylov.random()  # an invariant subspace: look elsewhere
            if length <= 1e-2:
                break
        rest, length = krylov.step(rest, length)
        values, coefficients = krylov.eigh()
        scale = np.abs(values).max()
        if krylov.size >= count:
            wanted = _order(values, which)[:count]
            bounds = length * np.abs(coefficients[-1, wanted])
            if bounds.max() <= rtol * scale / 2 and krylov.size >= count + 2:
                break
        if krylov.used >= max_matvecs and krylov.size >= count:
            break
    return scale, rest, length


def spectral_density(
    operator, key: jax.Array, *, num_draws: int = 4, num_steps: int = 64
) -> SpectralDensity:
    r"""The density of eigenvalues, by stochastic Lanczos quadrature.

    Each draw of random signs gives a Gauss quadrature: nodes and weights whose moments up
    to order ``2 num_steps - 1`` are those of the spectrum as that vector sees it.

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
    size = _check_eigen(operator, 1, "largest")
    checks.check_num_samples(num_draws, "num_draws")
    checks.check_num_samples(num_steps, "num_steps")
    capacity = min(num_steps, size)
    nodes, weights = np.zeros((2, num_draws, capacity))
    for draw in range(num_draws):
        krylov = _Krylov(operator, jax.random.fold_in(key, draw), capacity)
        rest, length = krylov.random()
        while krylov.size < capacity:
            rest, length = krylov.step(rest, length)
            if length <= 1e-5 * np.abs(krylov.projection).max():
                break
        values, coefficients = krylov.eigh()
        nodes[draw, : krylov.size] = values
        nodes[draw, krylov.size :] = values[-1]
        weights[draw, : krylov.size] = coefficients[0] ** 2
    return SpectralDensity(nodes, weights)
