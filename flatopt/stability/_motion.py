"""How an optimizer with slots moves near a minimum: its mean and its second moment.

In an eigendirection of H with eigenvalue l the mean follows ``(A + l b e_0^T) z``. The
second moment's recursion is that of the mean, for each pair of directions, plus what the
batches' noise adds: with ``N(M) = mean_i H_i M H_i - H M H`` (Bernoulli sampling: without
the last) it is ``p N(M)`` in the directions of the gradient. So a factor rho of the second
moment is reached where ``M = p G(rho) * N(M)`` elementwise, with
``G(rho) = (e_0 x e_0)^T (rho - Abar_r x Abar_s)^{-1} (b x b)`` for directions r and s.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import progress
from flatopt.stability import _moments
from flatopt.stability._coefficients import Chain
from flatopt.stability._shared import Coefficients

FINEST = 1e-5  # rate times largest eigenvalue from which rates are scanned
COARSEST = 1e5
GRID = 2**0.25  # between rates that are scanned
MOST_SCANNED = 64  # eigenvalues that are
LOOKED_BELOW = (
    0.95,
    0.8,
    0.6,
    0.3,
    0.1,
    0.02,
)  # of a threshold, where it has to be stable
EXPECTED_PRODUCTS = 250  # of a threshold
PAIRS = 1 << 16  # of directions that are solved for at once


class Motion(NamedTuple):
    """An optimizer at a linearization.

    Attributes:
      room: the :class:`_moments.Space` of the directions that decide.
      values: their eigenvalues, float64.
      all_values: those of all directions.
      weights: the :class:`_moments.Weights` of the sampling.
      chain: the optimizer's :class:`Chain`.
    """

    room: _moments.Space
    values: np.ndarray
    all_values: np.ndarray
    weights: _moments.Weights
    chain: Chain

    def means(self, rate):
        """Matrices of the mean in each direction, shape (r, k, k)."""
        return _means(self.chain.at(rate), self.values)

    def noise(self, moment):
        """The batches' noise, p N(M), in float64."""
        dtype = self.room.values.dtype
        largest = np.abs(moment).max()
        unit = largest if largest > 0 else 1.0
        padded = self.room.pad(moment / unit).astype(dtype)
        found = _noise(
            self.room.coordinates, self.room.values, self.weights.whole, padded
        )
        found = self.room.cut(found).astype("f8") * unit
        return self.weights.each * self.room.scale**2 * (found + found.T) / 2


def motion(lin, chain, batch_size, sampling, space=_moments.sharp_space):
    """The :class:`Motion` of a chain; an ascent along the gradient is taken into ``lin``."""
    weights = _moments.sampling_weights(len(lin.coordinates), batch_size, sampling)
    lin = ascended(lin, chain, batch_size, weights)
    room = space(lin)
    values = np.asarray(lin.eigenvalues, "f8")
    return Motion(room, values[: room.rank], values, weights, chain)


@jax.jit
def _noise(coordinates, values, whole, moment):
    found = _moments.noise_part(coordinates, moment)
    # Of batches that share examples, the part of their mean is in the mean already.
    shared = jnp.where(whole == 1, 0.0, 1.0)
    return found - shared * values[:, None] * moment * values[None]


def ascended(lin, chain, batch_size, weights):
    """The linearization whose gradients are those of a step up along the gradient.

    Unnormalized SAM multiplies by 1 + rho H_B, with the batch's own H_B: known for batches
    of one example and for the whole data.
    """
    rho = float(chain.at(1.0).rho)
    if rho == 0:
        return lin
    coordinates = np.asarray(lin.coordinates, "f8")
    values = np.asarray(lin.eigenvalues, "f8")
    n, c, rank = coordinates.shape
    if weights.each == 0:
        factors = 1 + rho * values
        return lin._replace(
            coordinates=coordinates * np.sqrt(factors), eigenvalues=values * factors
        )
    if batch_size != 1 or weights.whole == 1:
        raise ValueError(
            "optimizer must be plain near a minimum but for batches of one example or all "
            f"of them, got usam_gradients and batch_size {batch_size}, which steps up along "
            "each batch's own gradient; use stability.critical_learning_rate for it."
        )
    grams = np.einsum("ncr,ndr->ncd", coordinates, coordinates)
    own, vectors = np.linalg.eigh(np.eye(c) + rho * grams)
    roots = np.einsum("nij,nj,nkj->nik", vectors, np.sqrt(own), vectors)
    rows = np.einsum("nik,nkr->nir", roots, coordinates)
    flat = rows.reshape(-1, rank)
    values, basis = np.linalg.eigh(flat.T @ flat / n)
    dtype = np.asarray(lin.eigenvalues).dtype
    return lin._replace(
        coordinates=(rows @ basis[:, ::-1]).astype(dtype),
        eigenvalues=np.maximum(values[::-1], np.finfo(dtype).tiny).astype(dtype),
    )


def _means(coefficients, values):
    matrix = np.broadcast_to(
        coefficients.matrix, (len(values), *coefficients.matrix.shape)
    )
    matrix = matrix.copy()
    matrix[:, :, 0] += values[:, None] * coefficients.gain
    return matrix


def _radius(matrices):
    """The largest factor by which a mean grows a step."""
    return float(np.abs(np.linalg.eigvals(matrices)).max())


def mean_threshold(found: Motion):
    """The smallest rate beyond which some direction's mean grows."""
    values = found.all_values
    few = values[np.unique(np.linspace(0, len(values) - 1, MOST_SCANNED).astype(int))]

    def grows(rate, values):
        return _radius(_means(found.chain.at(rate), values)) > 1 + 1e-10

    return _crossing(
        lambda rate: grows(rate, few),
        lambda rate: grows(rate, values),
        1 / values[0],
        1e-12,
    )


def largest_stable_eigenvalue(coefficients: Coefficients):
    """The curvature up to which the mean of an optimizer does not grow."""

    def grows(value):
        return _radius(_means(coefficients, np.array([value]))) > 1 + 1e-10

    return _crossing(grows, grows, 1.0, 1e-9)


def _crossing(grows, grows_exactly, unit, width):
    """The first number beyond which something grows: found on a grid, then bisected."""
    low = FINEST * unit
    if grows(low):
        return 0.0
    while not grows(low * GRID):
        low *= GRID
        if low > COARSEST * unit:
            return math.inf
    high = low * GRID
    while high - low > width * high:
        middle = (low + high) / 2
        low, high = (low, middle) if grows_exactly(middle) else (middle, high)
    return low


def _response(matrices, gain, factor):
    """G of each pair of directions, shape (r, r)."""
    count, size, _ = matrices.shape
    first, second = np.triu_indices(count)
    found = np.empty(len(first))
    both = np.kron(gain, gain)
    identity = factor * np.eye(size**2)
    for start in range(0, len(first), PAIRS):
        part = slice(start, start + PAIRS)
        products = np.einsum(
            "nij,nkl->nikjl", matrices[first[part]], matrices[second[part]]
        ).reshape(-1, size**2, size**2)
        right = np.broadcast_to(both, (len(products), size**2))[..., None]
        found[part] = np.linalg.solve(identity - products, right)[:, 0, 0]
    whole = np.empty((count, count))
    whole[first, second] = whole[second, first] = found
    return whole


class _Top(NamedTuple):
    """The largest eigenvalue of M -> G * p N(M), and its eigenvector, a matrix."""

    value: float
    moment: np.ndarray


def _top(found, rate, factor, start, accuracy, steps):
    coefficients = found.chain.at(rate)
    response = _response(found.means(rate), coefficients.gain, factor)
    rank = len(response)

    def product(vector):
        steps.update()
        moment = np.asarray(vector, "f8").reshape(rank, rank)
        return (response * found.noise((moment + moment.T) / 2)).ravel()

    if rank <= 3:
        columns = np.stack([product(row) for row in np.eye(rank**2)], axis=1)
        values, vectors = np.linalg.eig(columns)
        best = int(np.argmax(values.real))
        return _Top(float(values[best].real), vectors[:, best].real.reshape(rank, rank))
    if start is None:
        start = response  # positive semidefinite, as the eigenvector
    import scipy.sparse.linalg  # slow to import

    operator = _operator(rank, product)
    for tolerance, restarts in ((accuracy, 30), (max(accuracy, 1e-4), 30), (1e-2, 300)):
        try:
            values, vectors = scipy.sparse.linalg.eigs(
                operator,
                k=1,
                which="LR",
                ncv=min(10, rank**2 - 1),
                v0=start.ravel(),
                tol=tolerance,
                maxiter=restarts,
            )
        except scipy.sparse.linalg.ArpackNoConvergence:
            continue
        moment = vectors[:, 0].real.reshape(rank, rank)
        return _Top(float(values[0].real), (moment + moment.T) / 2)
    raise RuntimeError(
        "the largest eigenvalue of the second moment's recursion did not converge to 1 % "
        f"in its {rank} by {rank} matrices; look at whether the linearization is finite."
    )


def _operator(rank, product):
    """A linear map of matrices as SciPy takes it."""
    import scipy.sparse.linalg  # slow to import

    return scipy.sparse.linalg.LinearOperator((rank**2,) * 2, product, dtype="f8")


def _accuracy(found):
    return 1e-9 if found.room.values.dtype == jnp.float64 else 1e-6


def threshold(found: Motion, shown=None):
    """The largest rate up to which the second moment stays bounded, from 0 on."""
    import scipy.optimize  # slow to import

    limit = mean_threshold(found)
    if found.weights.each == 0 or not 0 < limit < math.inf:
        return limit
    accuracy, moment = _accuracy(found), None
    with progress.bar(shown, EXPECTED_PRODUCTS, "the exact threshold") as steps:

        def ratio(rate, accuracy=accuracy):
            nonlocal moment
            top = _top(found, rate, 1.0, moment, accuracy, steps)
            moment = top.moment
            return top.value

        def miss(
            rate,
        ):  # near to linear; -rate at the mean's limit, a pole of the ratio
            return rate * (1 / ratio(rate) - 1)

        def solve(low, high):
            while (value := miss(low)) < 0:
                low, high = low / 4, low
            cache = {low: value, limit: -limit}
            return scipy.optimize.brentq(
                lambda rate: cache[rate] if rate in cache else miss(rate),
                low,
                high,
                rtol=max(1e-10, accuracy / 4),
                xtol=1e-300,
            )

        rate = solve(limit / 64, limit)
        # Stable again beyond is not what is asked: the first crossing is.
        for part in LOOKED_BELOW:
            if ratio(part * rate, 1e-3) > 1 + 1e-3:
                rate = solve(part * rate / 64, part * rate)
                break
    return rate


def growth(found: Motion, rate, shown=None):
    """The factor of the second moment a step, in the long run."""
    import scipy.optimize  # slow to import

    coefficients = found.chain.at(rate)
    least = _radius(_means(coefficients, found.all_values)) ** 2
    if found.weights.each == 0:
        return least
    accuracy, moment = _accuracy(found), None
    with progress.bar(shown, EXPECTED_PRODUCTS // 2, "the growth rate") as steps:

        def miss(factor):
            nonlocal moment
            top = _top(found, rate, factor, moment, accuracy, steps)
            moment = top.moment
            return 1 / top.value - 1 if top.value > 0 else math.inf

        low, step = least * (1 + 1e-7), max(0.05 * least, 1e-3)
        if miss(low) >= 0:
            return least
        high = low + step
        while miss(high) < 0:
            low, step = high, 4 * step
            high = low + step
        return float(
            scipy.optimize.brentq(miss, low, high, rtol=max(1e-10, accuracy / 4))
        )


def stays(found: Motion, rate):
    """Whether the second moment stays bounded at a rate."""
    if _radius(_means(found.chain.at(rate), found.all_values)) > 1 + 1e-10:
        return False
    if found.weights.each == 0:
        return True
    return most_noise(found, rate) >= found.weights.each


def most_noise(found: Motion, rate):
    """The weight p of noise up to which the second moment stays bounded at a rate."""
    with progress.bar(False, None, "") as steps:
        top = _top(found, rate, 1.0, None, _accuracy(found), steps)
    return found.weights.each / top.value if top.value > 0 else math.inf


def stationary(found: Motion, residuals, rate):
    """The covariance of the distance that the noise of the errors at the minimum leaves."""
    import scipy.sparse.linalg  # slow to import

    residuals = np.asarray(residuals)
    largest = float(np.abs(residuals).max())
    errors = _moments.narrow(residuals / (largest or 1.0), found.room.values.dtype)
    room = found.room
    noise = _moments.minimum_noise(room.coordinates, room.values, errors)
    noise = room.cut(noise).astype("f8") * (largest**2 * room.scale)
    response = _response(found.means(rate), found.chain.at(rate).gain, 1.0)
    rank = len(response)
    goal = (response * (found.weights.each * noise)).ravel()
    if not goal.any():
        return np.zeros((rank, rank))

    def product(vector):
        moment = np.asarray(vector, "f8").reshape(rank, rank)
        return (moment - response * found.noise((moment + moment.T) / 2)).ravel()

    operator = _operator(rank, product)
    unit = np.linalg.norm(goal)
    solution, _ = scipy.sparse.linalg.gmres(
        operator, goal / unit, rtol=_accuracy(found), restart=30, maxiter=20
    )
    rest = np.linalg.norm(operator @ solution - goal / unit)
    if not rest < 1e-2:
        raise ValueError(
            f"learning_rate {rate:.6g} is too close to the exact threshold to "
            "solve for where SGD settles; take a smaller one, or enable jax_enable_x64."
        )
    moment = unit * solution.reshape(rank, rank)
    return (moment + moment.T) / 2


def scaled(coefficients: Coefficients, scale, dtype):
    """Matrix and gain for eigenvalues over a scale, slots of the size of the distance."""
    matrix, gain = coefficients.matrix.copy(), coefficients.gain.copy()
    matrix[0, 1:] *= scale
    matrix[1:, 0] /= scale
    gain[0] *= scale
    return jnp.asarray(matrix, dtype), jnp.asarray(gain, dtype)
