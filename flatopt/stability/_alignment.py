"""How the noise of SGD aligns with the curvature."""

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import curvature
from flatopt._core import blocks, risk, streams, trees, vectors
from flatopt._core.estimates import Estimate
from flatopt._core.risk import Risk
from flatopt._core.types import LossFn, ModelFn
from flatopt.curvature import _draws, _operator, _probes
from flatopt.stability import _checks, _moments
from flatopt.stability._linearization import Linearization, check_whole
from flatopt.stability._losses import (
    check_same_shape,
    scaled_model,
    square_at_zero_error,
    square_loss,
)


class Alignment(NamedTuple):
    r"""How SGD's noise aligns with the curvature, from :func:`alignment`.

    Attributes:
      mu: :math:`\mu = \operatorname{tr}(\Sigma G) / (2 L \|G\|_F^2) = \alpha \beta`.
      alpha: the cosine of :math:`\Sigma` and :math:`G`; NaN where :math:`\Sigma` is 0.
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
    _checks.check_linearization(lin)
    check_whole(lin, "alignment")
    coordinates, values, _ = _moments.unit_arrays(lin)
    coordinates, values = coordinates.astype("f8"), values.astype("f8")
    residuals = np.asarray(lin.residuals, "f8")
    twice = np.mean(np.sum(residuals**2, axis=1))
    if not twice > 0:
        raise ValueError(
            "lin must have a nonzero loss, got 0: the alignment is 0 / 0 there; linearize "
            "a little away from the minimum."
        )
    grads = np.einsum("nc,ncr->nr", residuals, coordinates)
    mean = grads.mean(axis=0)
    noise = grads.T @ grads / len(grads) - np.outer(mean, mean)
    spread = np.diagonal(noise)
    found = _ratios(
        spread @ values,
        values @ values,
        np.sum(noise**2),
        spread.sum() * values.sum() / lin.num_params,
        twice,
    )
    return Alignment(loss=lin.loss, **{name: float(x) for name, x in found.items()})


def _ratios(product, square, noise_square, isotropic, twice):
    size, spread = square**0.5, np.sqrt(noise_square)
    with np.errstate(invalid="ignore", divide="ignore"):  # noise of 0 has no direction
        cosine = product / (spread * size)
    return dict(
        mu=product / (twice * square),
        alpha=cosine,
        beta=spread / (twice * size),
        isotropic_mu=isotropic / (twice * square),
    )


def estimate_alignment(
    model_fn: ModelFn,
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
    risk.check_model(model_fn)
    params = risk.check_params(params)
    _checks.check_key(key)
    slope, error = _units(model_fn, params, data)
    loss_fn = square_loss(model_fn, unit=slope * error)
    scaled_loss = float(Risk.of(loss_fn, params, data).value)
    loss = scaled_loss / (slope * error) ** 2
    newton = curvature.gauss_newton(
        scaled_model(model_fn, slope), square_at_zero_error, params, data
    )
    covariance = curvature.gradient_covariance(loss_fn, params, data)
    _probes.check_probes(newton, num_probes, num_deflated)
    if not 0 < loss < math.inf:
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
        probes = _project_out(signs, basis)
        samples.append(_observe(newton, covariance, probes))
    size = blocks.size(newton.like)
    found = _jackknife(exact, np.concatenate(samples), 2 * scaled_loss * error**2, size)
    return Alignment(loss=loss, **found)


def _units(model_fn, params, data):
    """Powers of two by which outputs, and errors then, come near 1; 1 where they are near.

    The alignment depends on neither, and float32 squares neither 1e25 nor 1e-25.
    """
    batch = next(iter(data), None) if streams.is_stream(data) else data
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            "data must be pairs (inputs, targets), got a batch of type "
            f"{type(batch).__name__}."
        )
    batch = jax.tree.map(jnp.asarray, tuple(batch))
    slope, error = (float(x) for x in _largest(model_fn, params, *batch))
    slope = _near_one(slope)
    return slope, _near_one(slope * error) ** 0.5


def _near_one(size):
    if not 0 < size < math.inf or 2.0**-20 < size < 2.0**20:
        return 1.0
    return 4.0 ** -round(math.log2(size) / 2)


@functools.partial(jax.jit, static_argnums=0)
def _largest(model_fn, params, inputs, targets):
    """The largest slope of a mixture of the outputs, and the largest error."""
    outputs, pull = jax.vjp(lambda p: model_fn(p, inputs), params)
    if outputs.ndim not in (1, 2):
        raise ValueError(
            "model_fn must return outputs of shape (n,) or (n, c), got "
            f"{outputs.shape}; reshape them, and squeeze the last axis alone."
        )
    check_same_shape(outputs, targets)
    errors = trees.widen(outputs) - targets.astype(trees.wide(outputs.dtype))
    signs = jnp.where(jnp.arange(outputs.size) % 3 > 0, 1, -1).reshape(outputs.shape)
    slopes = jax.tree.leaves(pull(signs.astype(outputs.dtype)))
    largest = [jnp.max(jnp.abs(trees.widen(x)), initial=0.0) for x in slopes]
    return jnp.max(jnp.stack(largest)), jnp.max(jnp.abs(errors), initial=0.0)


def _jackknife(exact, samples, twice, size):
    def at(means):
        product, square, noise_square, spread, trace = (exact + means).T
        return _ratios(product, square, noise_square, spread * trace / size, twice)

    count = len(samples)
    total = samples.sum(axis=0)
    whole = at(total / count)
    without = at((total - samples) / (count - 1))
    found = {}
    for name in ("mu", "alpha", "beta", "isotropic_mu"):
        each = without[name]
        error = np.sqrt((count - 1) * np.mean((each - each.mean()) ** 2))
        found[name] = Estimate(float(whole[name]), float(error), count)
    return found


def _observe(newton, covariance, rows):
    """Five quadratic quantities of each row, shape (rows, 5), on the host."""
    found = _operator.products(newton, rows), _operator.products(covariance, rows)
    return np.asarray(_forms(rows, *found), "f8")


_project_out = jax.jit(blocks.project_out)


@jax.jit
def _forms(rows, curved, noise):
    def products(block, other):
        parts = jax.tree.map(
            lambda x, y: jnp.sum((x * y).reshape(len(x), -1), axis=1), block, other
        )
        return sum(jax.tree.leaves(parts))

    pairs = (noise, curved), (curved, curved), (noise, noise)
    pairs += (rows, noise), (rows, curved)
    return jnp.stack([products(*pair) for pair in pairs], axis=1)


@functools.lru_cache(maxsize=64)
def _of_wrapped(loss_fn):
    """The same loss of ``(batch,)``: a list alone would be taken as many batches."""
    return lambda params, wrapped: loss_fn(params, wrapped[0])


@functools.partial(jax.jit, static_argnums=0)
def _along_gradient(loss_fn, params, batch):
    """The loss, the gradient's norm, and the curvature along the gradient."""
    wrapped = _of_wrapped(loss_fn)
    value, grads = jax.value_and_grad(wrapped)(params, (batch,))
    unit, norm = vectors.normalize(blocks.widen(grads))
    operator = curvature.hessian(wrapped, params, (batch,))
    return trees.widen(value), norm, operator.quadratic_form(unit)


def batch_sharpness(loss_fn: LossFn, params: Any, batches: Any) -> Estimate:
    r"""The curvature that SGD's own steps meet, which hovers at 2 / learning_rate.

    .. math:: E_B \left[ \frac{g_B^\top H_B\, g_B}{\|g_B\|^2} \right]

    with gradient and Hessian of the same batch. Batches count by their number of examples.
    Those without a gradient, fitted exactly, are left out; where none is left the estimate
    is NaN, with a warning.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss.
      params: the parameters.
      batches: an iterable of batches of the training batch size; each a tree of arrays,
        lists among them.

    Returns:
      An :class:`~flatopt.curvature.Estimate` over batches; ``num_probes`` counts those
      that have a gradient.

    Raises:
      ValueError: without batches, for losses or gradients that are not finite.

    References:
      Andreyev, Beneventano, `Edge of Stochastic Stability
      <https://arxiv.org/abs/2412.20553>`_, 2024, definition 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> found = stability.batch_sharpness(
      ...     lambda p, batch: jnp.mean(batch) * jnp.sum(p ** 2), jnp.ones(2),
      ...     [jnp.ones(4), 3 * jnp.ones(4)])
      >>> print(f"{found:.1f}")
      4.0 ± 2.0
    """
    if isinstance(batches, dict | str) or not hasattr(batches, "__iter__"):
        raise TypeError(
            "batches must be a list or another iterable of batches, got "
            f"{type(batches).__name__}; write [batch] for one."
        )
    risk.check_loss(loss_fn, batches)
    params = risk.check_params(params)
    ratios, sizes, count = [], [], 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        batch = jax.tree.map(jnp.asarray, batch)
        size = streams.batch_size(batch)
        found = jax.device_get(_along_gradient(loss_fn, params, batch))
        loss, norm, ratio = found
        if not np.isfinite(found).all():
            raise ValueError(
                f"the loss of batch {count} is {loss:g}, the norm of its gradient "
                f"{norm:g} and the curvature along it {ratio:g}; look at the "
                "loss at these parameters first."
            )
        if norm > 0:
            ratios.append(np.asarray(ratio))
            sizes.append(size)
    if not count:
        raise ValueError("batches must hold batches, got none; give a list of batches.")
    if not ratios:
        warnings.warn(
            f"batches have no gradients, got {count} whose gradient is zero, so the result "
            "is nan; where all are fitted use curvature.eigenpairs.",
            stacklevel=2,
        )
        nan = jnp.full_like(ratio, jnp.nan)
        return Estimate(nan, nan, 0)
    return _weighted(np.stack(ratios), np.asarray(sizes))


def _weighted(samples, sizes):
    """The mean weighted by sizes, with its standard error."""
    count, shares = len(samples), sizes / sizes.sum()
    mean = shares @ samples.astype("f8")
    error = math.inf
    if count > 1:
        squares = shares**2 @ (samples - mean) ** 2
        error = math.sqrt(squares * count / (count - 1))
    return Estimate(*(jnp.asarray(x, samples.dtype) for x in (mean, error)), count)
