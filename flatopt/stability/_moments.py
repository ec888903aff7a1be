"""SGD's second moment near a minimum, on symmetric matrices of the rows' space.

With the weights of a sampling, the moment M of the distance follows
``M - rate (H M + M H) + rate^2 (whole H M H + each mean_i H_i M H_i)``.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, progress
from flatopt.stability import _checks

BASIS = 12  # vectors of ARPACK's: with its own 20 it makes 20 products where 10 suffice
EXPECTED_PRODUCTS = 24  # of an eigenvalue: two rounds of ARPACK, where it is separated
FIXED_WIDTH = 512  # up to which padding costs less than compiling
LARGE_RANK = 256  # from which flat directions are worth leaving out
FLAT = 3e-5  # of the sharpest, that these may add: rates change by 3e-6 at most seen


class Weights(NamedTuple):
    """How the second moment of a mean over a batch splits.

    Attributes:
      whole: weight of H M H, all examples with each other.
      each: weight of the mean of H_i M H_i, each example with itself.
    """

    whole: float
    each: float


def sampling_weights(num_examples, batch_size, sampling):
    """The :class:`Weights` of batches of so many examples; None: of very many."""
    _checks.check_batch(batch_size, num_examples, sampling)
    n, size = num_examples, batch_size
    if n is None or sampling == "with_replacement":
        each = 1 / size
    elif sampling == "bernoulli":
        each = (n - size) / (n * size)
    else:
        each = (n - size) / (size * (n - 1))
    return Weights(1.0 if sampling == "bernoulli" else 1 - each, each)


class Space(NamedTuple):
    """A linearization as compiled code takes it: of a fixed width, and near 1.

    Padded by directions without curvature, so that checkpoints of other rank share code;
    eigenvalues are divided by a power of four, so that squares stay in range.

    Attributes:
      coordinates: shape (n, c, width).
      values: eigenvalues over ``scale``, shape (width,).
      scale: the power of four, a float.
      rank: number of directions with curvature.
    """

    coordinates: jax.Array
    values: jax.Array
    scale: float
    rank: int

    def pad(self, matrix):
        """A matrix of the directions with curvature, as wide as the arrays."""
        missing = self.coordinates.shape[2] - self.rank
        return np.pad(matrix, ((0, missing), (0, missing))) if missing else matrix

    def cut(self, matrix):
        """The directions with curvature of a matrix, on the host."""
        return np.asarray(matrix)[: self.rank, : self.rank]

    def rate(self, learning_rate):
        """The learning rate in the units of these eigenvalues."""
        return narrow(learning_rate * self.scale, self.values.dtype)


def space(lin):
    """The :class:`Space` of a linearization."""
    return _space(lin, *unit_arrays(lin))


def sharp_space(lin):
    """That of the directions that decide how the second moment grows.

    The flat ones of a large problem go, as far as they could neither rule by themselves
    nor add to what does: the largest eigenvalue of C^{-1} D in them is at most that of H,
    and p times the largest of an example's own Hessian.
    """
    coordinates, values, scale = unit_arrays(lin)
    if len(values) > LARGE_RANK:
        squares = np.sum(coordinates.astype("f8") ** 2, axis=1)
        rest = np.cumsum(squares[:, ::-1], axis=1)[:, ::-1].max(axis=0)
        rank = int(np.sum(rest > FLAT * values[0]))
        coordinates, values = coordinates[:, :, :rank], values[:rank]
    return _space(lin, coordinates, values, scale)


def _space(lin, coordinates, values, scale):
    n, c, rank = coordinates.shape
    missing = _width(rank, max(min(n * c, lin.num_params), rank)) - rank
    dtype = values.dtype
    return Space(
        narrow(np.pad(coordinates, ((0, 0), (0, 0), (0, missing))), dtype),
        narrow(np.pad(values, (0, missing)), dtype),
        scale,
        rank,
    )


def narrow(values, dtype):
    """Values of the host as arrays: infinite where the dtype ends, without a warning."""
    with np.errstate(over="ignore"):
        # Not jnp.asarray, which compiles for each new shape.
        return jax.device_put(np.asarray(values).astype(dtype))


def unit_arrays(lin):
    """Coordinates, eigenvalues and the power of four that eigenvalues are divided by."""
    coordinates, values = np.asarray(lin.coordinates), np.asarray(lin.eigenvalues)
    exponent = round(math.log2(values[0]) / 2)
    scaled = np.ldexp(coordinates, -exponent), np.ldexp(values, -2 * exponent)
    return *scaled, 4.0**exponent


def _width(rank, most):
    """The largest rank there can be, or less in steps of a quarter of an octave."""
    width = most
    while most > FIXED_WIDTH:
        most = int(most / 2**0.25)
        if most < rank:
            break
        width = most
    return width


def noise_part(coordinates, matrix):
    """The mean over examples of H_i M H_i."""
    n, _, rank = coordinates.shape
    rows = coordinates.reshape(-1, rank)
    products = _dot("ar,rs->as", rows, matrix).reshape(coordinates.shape)
    inner = _dot("ncr,ndr->ncd", products, coordinates)
    weighted = _dot("ncd,ndr->ncr", inner, coordinates).reshape(-1, rank)
    return _dot("ar,as->rs", rows, weighted) / n


def _dot(subscripts, *arrays):
    if any(isinstance(x, jax.Array) for x in arrays):
        return jnp.einsum(subscripts, *arrays, precision=blocks.PRECISION)
    return np.einsum(subscripts, *arrays, optimize=True)


def moment_step(coordinates, values, rate, weights, moment):
    """The second moment after one step of plain SGD."""
    drift = values[:, None] * moment + moment * values[None]
    return (
        moment
        - rate * drift
        + rate**2 * _batch_moment(coordinates, values, weights, moment)
    )


def _batch_moment(coordinates, values, weights, moment):
    """D(M): the mean over batches of H_B M H_B."""
    whole = weights.whole * values[:, None] * moment * values[None]
    return whole + weights.each * noise_part(coordinates, moment)


def slots_moment_step(coordinates, values, coefficients, weights, moment):
    """That of the distance and an optimizer's slots, shape (k, k, r, r), after one step."""
    matrix, gain = coefficients
    moved = jnp.einsum("ik,klrs->ilrs", matrix, moment, precision=blocks.PRECISION)
    # Of the new distance and slots with the gradient, whose mean over batches is H z[0].
    cross = jnp.einsum("irs,j,s->ijrs", moved[:, 0], gain, values)
    moved = jnp.einsum("jl,ilrs->ijrs", matrix, moved, precision=blocks.PRECISION)
    noise = _batch_moment(coordinates, values, weights, moment[0, 0])
    found = (
        moved
        + cross
        + _transpose(cross)
        + jnp.einsum("i,j,rs->ijrs", gain, gain, noise)
    )
    return (found + _transpose(found)) / 2  # rounding apart from symmetry may grow


def _transpose(moment):
    return jnp.transpose(moment, (1, 0, 3, 2))


@jax.jit
def _shifted_step(coordinates, values, rate, weights, matrix):
    # Shifted by the identity: the step may map to zero.
    moment = _mirrored(matrix)
    return _mirrored(moment + moment_step(coordinates, values, rate, weights, moment))


def _mirrored(matrix):
    """The symmetric part."""
    return (matrix + matrix.T) / 2


def _drift_scale(values):
    """C^{-1/2} elementwise, in the eigenbasis of H; zero where C is."""
    drift = (values[:, None] + values[None]) / 2
    return jnp.where(drift > 0, jax.lax.rsqrt(jnp.where(drift > 0, drift, 1.0)), 0.0)


def scaled_noise(coordinates, values, weights, moment):
    """C^{-1/2} D C^{-1/2}, with C elementwise in the eigenbasis of H."""
    scale = _drift_scale(values)
    return scale * _batch_moment(coordinates, values, weights, scale * moment)


@jax.jit
def _mirrored_noise(coordinates, values, weights, matrix):
    return _mirrored(scaled_noise(coordinates, values, weights, _mirrored(matrix)))


def exact_threshold(lin, batch_size, sampling, shown=None):
    """The largest learning rate at which the second moment stays bounded."""
    weights = sampling_weights(len(lin.coordinates), batch_size, sampling)
    room = sharp_space(lin)

    def apply(moment):
        return _mirrored_noise(room.coordinates, room.values, weights, moment)

    top = _largest_eigenvalue(apply, room, shown, "the exact threshold")
    return 2 / top / room.scale


def growth(lin, learning_rate, batch_size, sampling, shown=None):
    """The factor of the second moment a step, in the long run."""
    weights = sampling_weights(len(lin.coordinates), batch_size, sampling)
    room = sharp_space(lin)
    rate = room.rate(learning_rate)

    def apply(moment):
        return _shifted_step(room.coordinates, room.values, rate, weights, moment)

    found = _largest_eigenvalue(apply, room, shown, "the growth rate") - 1
    if room.rank == len(lin.eigenvalues):
        return found
    # Of a flat direction that was left out, to first order.
    return max(found, 1 - 2 * learning_rate * float(lin.eigenvalues[-1]))


def _largest_eigenvalue(apply, room, shown, description):
    """Of a linear map of symmetric matrices, symmetric itself; starts from the identity.

    ``apply`` takes any matrix and maps its symmetric part. The map is positive: its top
    eigenvector is a positive semidefinite matrix, which the identity is never orthogonal to.
    """
    rank, dtype = room.rank, room.values.dtype
    with progress.bar(shown, EXPECTED_PRODUCTS, description) as steps:

        def product(vector):
            # Rounded before it is padded, and mirrored on the device: the host is slow.
            matrix = np.asarray(vector, dtype).reshape(rank, rank)
            found = apply(room.pad(matrix))
            steps.update()
            return room.cut(found).astype("f8").ravel()

        if rank <= 3:
            columns = np.stack([product(row) for row in np.eye(rank**2)])
            return float(np.linalg.eigvalsh((columns + columns.T) / 2)[-1])
        return _arpack(product, rank, 1e-9 if dtype == jnp.float64 else 1e-6)


def _arpack(product, rank, accuracy):
    import scipy.sparse.linalg  # slow to import

    operator = scipy.sparse.linalg.LinearOperator((rank**2,) * 2, product, dtype="f8")
    # Below the threshold many eigenvalues crowd near 1: there it is known less well.
    for tolerance, restarts in ((accuracy, 20), (1e-4, 20), (1e-2, None)):
        try:
            values = scipy.sparse.linalg.eigsh(
                operator,
                k=1,
                which="LA",
                v0=np.eye(rank).ravel(),
                ncv=BASIS,
                tol=tolerance,
                maxiter=restarts,
                return_eigenvectors=False,
            )
        except scipy.sparse.linalg.ArpackNoConvergence:
            continue
        return float(values[0])
    raise RuntimeError(
        "the largest eigenvalue of the second moment's recursion did not converge to 1 % "
        f"in its {rank} by {rank} matrices; look at whether the linearization is finite."
    )


def stationary(lin, learning_rate, batch_size, sampling):
    """Theorem 5: rate each (2 C - rate D)^{-1} of the noise at the linear model's minimum.

    Returns the covariance of the directions with curvature, in float64.
    """
    weights = sampling_weights(len(lin.coordinates), batch_size, sampling)
    room = space(lin)
    residuals = np.asarray(lin.residuals)
    largest = np.abs(residuals).max()
    unit = 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
    found, rest = _stationary(
        room.coordinates,
        room.values,
        narrow(residuals / unit, room.values.dtype),
        room.rate(learning_rate),
        weights,
    )
    if not float(rest) < 1e-2:
        raise ValueError(
            f"learning_rate {learning_rate:.6g} is too close to the exact threshold to "
            "solve for where SGD settles; take a smaller one, or enable jax_enable_x64."
        )
    return room.cut(found).astype("f8") * (unit**2 / room.scale)


@jax.jit
def minimum_noise(coordinates, values, residuals):
    """The mean of the examples' gradients times themselves at the model's minimum."""
    n, c, width = coordinates.shape
    lengths = jnp.where(values > 0, jax.lax.rsqrt(n * values), 0.0)
    basis = coordinates.reshape(-1, width) * lengths[None]
    errors = residuals.reshape(-1)
    errors = errors - _dot("ar,r->a", basis, _dot("a,ar->r", errors, basis))
    grads = _dot("nc,ncr->nr", errors.reshape(n, c), coordinates)
    return _dot("nr,ns->rs", grads, grads) / n


@jax.jit
def _stationary(coordinates, values, residuals, rate, weights):
    """The covariance, and what conjugate gradients left of the right-hand side."""
    noise = minimum_noise(coordinates, values, residuals)

    def apply(moment):
        return 2 * moment - rate * scaled_noise(coordinates, values, weights, moment)

    scale = _drift_scale(values)
    accuracy = 1e-12 if values.dtype == jnp.float64 else 1e-6
    goal = rate * weights.each * scale * noise
    found, _ = jax.scipy.sparse.linalg.cg(apply, goal, tol=accuracy)
    size = jnp.linalg.norm(goal)
    left = jnp.linalg.norm(apply(found) - goal) / jnp.where(size > 0, size, 1.0)
    return scale * found, left
