"""The spectral density of curvature operators, by Lanczos quadrature."""

from typing import NamedTuple

import jax
import numpy as np

from flatopt._core import checks
from flatopt._core.estimates import Estimate
from flatopt.curvature._krylov import Krylov, check_eigen, check_host

STOPPED = 1e-5  # a rest that is noise: more than for few steps, 64 let rounding add up


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
    size = check_eigen(operator, key, 1, "largest")
    check_host(operator, key, "call it outside")
    checks.check_count(num_draws, "num_draws")
    checks.check_count(num_steps, "num_steps")
    capacity = min(num_steps, size)
    nodes, weights = np.zeros((2, num_draws, capacity))
    for draw in range(num_draws):
        krylov = Krylov(operator, jax.random.fold_in(key, draw), capacity)
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
