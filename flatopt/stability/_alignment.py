"""How the noise of SGD aligns with the curvature."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import curvature
from flatopt._core import blocks, trees
from flatopt._core.estimates import Estimate
from flatopt._core.risk import Risk
from flatopt.curvature import _draws, _operator, _probes
from flatopt.stability._linearization import Linearization


class Alignment(NamedTuple):
    r"""How SGD's noise aligns with the curvature, from :func:`alignment`.

    Attributes:
      mu: :math:`\mu = \operatorname{tr}(\Sigma G) / (2 L \|G\|_F^2) = \alpha \beta`.
      alpha: the cosine of :math:`\Sigma` and :math:`G`.
      beta: the magnitude :math:`\|\Sigma\|_F / (2 L \|G\|_F)`.
      loss: the loss L.
      isotropic_mu: :math:`\mu` of isotropic noise of the same trace,
        :math:`\operatorname{tr} \Sigma \operatorname{tr} G / (2 L d \|G\|_F^2)` for d
        parameters: why such noise does not escape.

    Example:
      >>> from flatopt import stability
      >>> stability.Alignment(1.0, 1.0, 1.0, 0.1, 0.01).mu
      1.0
    """

    mu: Any
    alpha: Any
    beta: Any
    loss: Any
    isotropic_mu: Any


def alignment(lin: Linearization) -> Alignment:
    r"""The alignment of SGD's noise with the curvature, exactly.

    With :math:`\Sigma` the covariance of the examples' gradients and :math:`G` the
    Gauss-Newton matrix. It does not depend on ``loss_scale``. For other losses than the
    square loss, 2 L is the mean squared norm of ``lin.residuals``.

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
    twice = jnp.mean(jnp.sum(lin.residuals**2, axis=1))
    if not float(twice) > 0:
        raise ValueError(
            "lin must have a nonzero loss, got 0: the alignment is 0 / 0 there; linearize "
            "a little away from the minimum."
        )
    dot = functools.partial(jnp.einsum, precision=blocks.PRECISION)
    grads = dot("nc,ncr->nr", lin.residuals, lin.coordinates)
    mean = grads.mean(axis=0)
    noise = dot("nr,ns->rs", grads, grads) / len(grads) - jnp.outer(mean, mean)
    spread, trace = jnp.diagonal(noise), jnp.sum(lin.eigenvalues)
    return _ratios(
        jnp.sum(spread * lin.eigenvalues),
        jnp.sum(lin.eigenvalues**2),
        jnp.sum(noise**2),
        jnp.sum(spread) * trace / lin.num_params,
        twice,
        lin.loss,
    )


def _ratios(product, square, noise_square, isotropic, twice, loss):
    size, spread = square**0.5, noise_square**0.5
    return Alignment(
        mu=product / (twice * square),
        alpha=product / (spread * size),
        beta=spread / (twice * size),
        loss=loss,
        isotropic_mu=isotropic / (twice * square),
    )


def estimate_alignment(
    model_fn: Callable[..., Any],
    params: Any,
    data: Any,
    key: jax.Array,
    num_probes: int = 32,
    *,
    num_deflated: int = 8,
) -> Alignment:
    r"""The alignment with square loss from random probes, for data of any size.

    The same random vectors :math:`v` go through both matrices:
    :math:`(\Sigma v)^\top (G v)`, :math:`\|G v\|^2` and :math:`\|\Sigma v\|^2` sample
    :math:`\operatorname{tr}(\Sigma G)`, :math:`\|G\|_F^2` and :math:`\|\Sigma\|_F^2`; the
    span of a few leading directions of G is computed exactly. Errors are jackknifed over
    the probes.

    Cost in gradients of the data: some 4 a probe and 8 a deflated direction. Memory: 8
    vectors more than :func:`flatopt.curvature.probe`, whatever the number of examples.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` of shape (n,) or (n, c).
      params: the parameters, at a nonzero loss.
      data: one batch ``(inputs, targets)``, or a re-iterable of them.
      key: a JAX random key.
      num_probes: number of random vectors, at least 2.
      num_deflated: number of leading directions; 0: none.

    Returns:
      An :class:`Alignment` whose fields but ``loss`` are
      :class:`~flatopt.curvature.Estimate`; ``loss`` is that of ``loss_scale=1``.

    Raises:
      ValueError: at zero loss, for fewer than 2 probes.

    References:
      As :func:`alignment`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import stability
      >>> found = stability.estimate_alignment(
      ...     lambda w, x: x @ w, jnp.ones(2), (jnp.eye(2), jnp.zeros(2)), jax.random.key(0))
      >>> round(float(found.mu.value), 3)
      0.5
    """
    newton = curvature.gauss_newton(model_fn, half_square, params, data)
    loss_fn = square_loss(model_fn)
    covariance = curvature.gradient_covariance(loss_fn, params, data)
    _probes.check_probes(newton, num_probes, num_deflated)
    loss = float(Risk.of(loss_fn, params, data).value)
    if not loss > 0:
        raise ValueError(
            f"the loss must be positive, got {loss:g}; the alignment is 0 / 0 at zero loss, "
            "move the parameters a little."
        )
    basis_key, probe_key = jax.random.split(key)
    basis = _probes.leading_basis(newton, basis_key, num_deflated)
    exact = np.zeros(5)
    if num_deflated:
        exact = _observe(newton, covariance, basis).sum(axis=0)
    samples = []
    for start in range(0, num_probes, _probes.GROUP):
        count = min(_probes.GROUP, num_probes - start)
        keys = _draws.probe_keys(probe_key, start, count)
        signs = _draws.draw_signs(newton, keys)
        vectors = blocks.project_out(signs, basis)
        samples.append(_observe(newton, covariance, vectors))
    size = blocks.size(newton.like)
    return _jackknife(exact, np.concatenate(samples), loss, size)


def _jackknife(exact, samples, loss, size):
    def at(means):
        product, square, noise_square, spread, trace = (exact + means).T
        return _ratios(
            product, square, noise_square, spread * trace / size, 2 * loss, loss
        )

    count = len(samples)
    total = samples.sum(axis=0)
    whole = at(total / count)
    without = at((total - samples) / (count - 1))
    found = {}
    for name in ("mu", "alpha", "beta", "isotropic_mu"):
        each = getattr(without, name)
        error = np.sqrt((count - 1) * np.mean((each - each.mean()) ** 2))
        found[name] = Estimate(float(getattr(whole, name)), float(error), count)
    return Alignment(loss=loss, **found)


def _observe(newton, covariance, vectors):
    """Five quadratic quantities of each row, shape (rows, 5), on the host."""
    found = _operator.products(newton, vectors), _operator.products(covariance, vectors)
    return np.asarray(_forms(vectors, *found), "f8")


@jax.jit
def _forms(vectors, curved, noise):
    def rows(block, other):
        parts = jax.tree.map(
            lambda x, y: jnp.sum((x * y).reshape(len(x), -1), axis=1), block, other
        )
        return sum(jax.tree.leaves(parts))

    pairs = (noise, curved), (curved, curved), (noise, noise)
    pairs += (vectors, noise), (vectors, curved)
    return jnp.stack([rows(*pair) for pair in pairs], axis=1)


def half_square(outputs, targets):
    """Half the squared error, mean over examples."""
    errors = trees.widen(outputs - targets)
    return jnp.sum(errors**2) / (2 * len(errors))


@functools.lru_cache(maxsize=64)
def square_loss(model_fn, loss_scale=1.0):
    """``loss_fn(params, batch)``, the same function for the same model."""

    def loss_fn(params, batch):
        return loss_scale * half_square(model_fn(params, batch[0]), batch[1])

    return loss_fn


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
        grads = operator.risk.gradient
        return operator.quadratic_form(grads) / blocks.dot(grads, grads)

    found = [ratio(curvature.hessian(loss_fn, params, batch)) for batch in batches]
    if not found:
        raise ValueError("batches must hold batches, got none; give a list of batches.")
    found = jnp.stack(found)
    count = len(found)
    error = jnp.std(found, ddof=1) / count**0.5 if count > 1 else jnp.inf
    return Estimate(jnp.mean(found), error, count)
