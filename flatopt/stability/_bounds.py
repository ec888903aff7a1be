"""What the thresholds of single theories are made of, in float64 on the host."""

import math

import numpy as np

from flatopt.stability import _moments


def rank_one_ratio(vector, values, coordinates, weights):
    """The ratio of equation 24 in a direction, and its gradient."""
    length = np.linalg.norm(vector)
    unit = vector / length
    mean = np.sum(values * unit**2)
    shown = coordinates @ unit
    squares = np.sum(shown**2, axis=1)
    spread = np.mean(squares**2)
    factors = 4 * squares / len(squares)
    noise = np.einsum("n,nc,ncr->r", factors, shown, coordinates)
    whole, each = weights
    slope = 2 * values * unit * (whole - each * spread / mean**2) + each * noise / mean
    slope = (slope - unit * (slope @ unit)) / length
    return (whole * mean**2 + each * spread) / mean, slope


def largest_rank_one(values, coordinates, weights):
    """The largest ratio of equation 24 over directions, from several starts."""
    import scipy.optimize  # slow to import

    def negative(vector):
        ratio, slope = rank_one_ratio(vector, values, coordinates, weights)
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
    moved = _moments.noise_part(coordinates, np.diag(values))
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
