"""SGD's second moment near a minimum, on symmetric matrices of the rows' space.

With q, p the weights of a sampling, the moment M of the distance follows
``M - rate (H M + M H) + rate^2 (q H M H + p mean_i H_i M H_i)``.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, checks

SAMPLINGS = ("without_replacement", "with_replacement", "bernoulli")


def weights(n, batch_size, sampling):
    """The weights q and p for batches of n examples; n None: of very many."""
    checks.check_num_samples(batch_size, "batch_size")
    check_sampling(sampling)
    if n is not None and batch_size > n:
        raise ValueError(
            f"batch_size must be at most the number of examples, {n}, got {batch_size}."
        )
    if n is None or sampling == "with_replacement":
        p = 1 / batch_size
    elif sampling == "bernoulli":
        p = (n - batch_size) / (n * batch_size)
    else:
        p = (n - batch_size) / (batch_size * (n - 1))
    return (1.0 if sampling == "bernoulli" else 1 - p), p


def check_sampling(sampling):
    if sampling not in SAMPLINGS:
        raise ValueError(
            f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {sampling!r}."
        )


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


@jax.jit
def moment_step(coordinates, values, rate, q, p, moment):
    drift = values[:, None] * moment + moment * values[None]
    noise = q * values[:, None] * moment * values[None]
    noise = noise + p * noise_part(coordinates, moment)
    return moment - rate * drift + rate**2 * noise


@jax.jit
def scaled_noise(coordinates, values, q, p, moment):
    """C^{-1/2} D C^{-1/2}, with C elementwise in the eigenbasis of H."""
    scale = jax.lax.rsqrt((values[:, None] + values[None]) / 2)
    moment = scale * moment
    found = q * values[:, None] * moment * values[None]
    return scale * (found + p * noise_part(coordinates, moment))


def top_of_mean_square(lin, q, p):
    apply = functools.partial(scaled_noise, lin.coordinates, lin.eigenvalues, q, p)
    return largest_eigenvalue(apply, len(lin.eigenvalues), lin.eigenvalues.dtype)


def largest_eigenvalue(apply, rank, dtype):
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
    import scipy.sparse.linalg  # slow to import

    operator = scipy.sparse.linalg.LinearOperator((rank**2,) * 2, product, dtype="f8")
    accuracy = 1e-9 if dtype == jnp.float64 else 1e-6
    # Below the threshold many eigenvalues crowd near 1: there it is known less well.
    for tolerance, restarts in ((accuracy, 10), (1e-4, 10), (1e-2, None)):
        try:
            values = scipy.sparse.linalg.eigsh(
                operator,
                k=1,
                which="LA",
                v0=np.eye(rank).ravel(),
                tol=tolerance,
                maxiter=restarts,
                return_eigenvectors=False,
            )
            break
        except scipy.sparse.linalg.ArpackNoConvergence:
            continue
    return float(values[0])


@jax.jit
def stationary(lin, rate, q, p):
    """Theorem 5: rate p (2 C - rate D)^{-1} of the noise at the linear model's minimum."""
    coordinates, values = lin.coordinates, lin.eigenvalues
    n, c, rank = coordinates.shape
    basis = coordinates.reshape(-1, rank) / jnp.sqrt(n * values)[None]
    errors = lin.residuals.reshape(-1)
    errors = errors - _dot("ar,r->a", basis, _dot("a,ar->r", errors, basis))
    grads = _dot("nc,ncr->nr", errors.reshape(n, c), coordinates)
    noise = _dot("nr,ns->rs", grads, grads) / n

    def apply(moment):
        return 2 * moment - rate * scaled_noise(coordinates, values, q, p, moment)

    scale = jax.lax.rsqrt((values[:, None] + values[None]) / 2)
    accuracy = 1e-12 if values.dtype == jnp.float64 else 1e-6
    found, _ = jax.scipy.sparse.linalg.cg(apply, rate * p * scale * noise, tol=accuracy)
    return scale * found


def rank_one_ratio(vector, values, coordinates, q, p):
    """The ratio of equation 24 in a direction, and its gradient."""
    length = np.linalg.norm(vector)
    unit = vector / length
    mean = np.sum(values * unit**2)
    shown = coordinates @ unit
    each = np.sum(shown**2, axis=1)
    spread = np.mean(each**2)
    noise = np.einsum("n,nc,ncr->r", 4 * each / len(each), shown, coordinates)
    slope = 2 * values * unit * (q - p * spread / mean**2) + p * noise / mean
    slope = (slope - unit * (slope @ unit)) / length
    return (q * mean**2 + p * spread) / mean, slope


def largest_rank_one(values, coordinates, q, p):
    """The largest ratio of equation 24 over directions, from several starts."""
    import scipy.optimize  # slow to import

    def negative(vector):
        ratio, slope = rank_one_ratio(vector, values, coordinates, q, p)
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


def smallest_alignment(values, coordinates, sampling):
    """The smallest alignment of the linearized model over displacements."""
    moved = noise_part(coordinates, np.diag(values))
    if sampling != "bernoulli":
        moved = moved - np.diag(values**3)
    scaled = moved / np.sqrt(np.outer(values, values))
    return max(float(np.linalg.eigvalsh(scaled)[0]) / np.sum(values**2), 0.0)


def coherence(values, grams, coordinates, batch_size):
    n = len(grams)
    if batch_size == n:
        return 2 / values[0]
    rows = coordinates.reshape(-1, coordinates.shape[2])
    inner = (rows @ rows.T).reshape(n, coordinates.shape[1], n, -1)
    similarity = np.sqrt(np.sum(inner**2, axis=(1, 3)))
    largest = max(np.linalg.eigvalsh(gram)[-1] for gram in grams)
    sigma = np.linalg.eigvalsh(similarity)[-1] / largest
    return min(2 / values[0], sigma / (values[0] * math.sqrt(n / batch_size - 1)))
