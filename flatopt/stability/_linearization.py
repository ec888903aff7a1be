"""A model linearized at its parameters, in the space that its examples' gradients span."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, checks, trees

CHUNK_VALUES = 1 << 26  # computed at once


class Linearization(NamedTuple):
    """A model linearized at its parameters, from :func:`linearize`.

    Attributes:
      coordinates: gradients of each output of each example, times the root of
        ``loss_scale``, in the eigenbasis of H, shape (n, c, r).
      eigenvalues: the r nonzero eigenvalues of H, the Gauss-Newton matrix of the loss and
        its Hessian at zero error; descending.
      residuals: outputs less targets, times the root of ``loss_scale``, shape (n, c).
      loss: the loss.
      gradient_norm: the norm of its gradient.
      num_params: the number of parameters.
      reducible_loss: what the linearized model could still take off the loss; 0 at a
        minimum.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.diag(jnp.array([2.0, 1.0])), jnp.zeros(2))
      >>> lin.eigenvalues
      Array([2. , 0.5], dtype=float32)
    """

    coordinates: jax.Array
    eigenvalues: jax.Array
    residuals: jax.Array
    loss: jax.Array
    gradient_norm: jax.Array
    num_params: int
    reducible_loss: jax.Array


def linearize(
    model_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    targets: Any,
    *,
    loss_scale: float = 1.0,
    loss_fn: Callable[..., Any] | None = None,
    chunk_size: int | None = None,
) -> Linearization:
    r"""Linearize a model with square loss at its parameters.

    Errors that are all within the rounding of the outputs count as zero.

    Cost: the Jacobian of all outputs once, or some times where it exceeds a quarter of the
    device's memory, and the eigendecomposition of an (n c, n c) matrix.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` of shape (n,) or (n, c).
      params: the parameters, at or near a minimum.
      inputs: n inputs, a tree of arrays with a leading axis.
      targets: the targets, of the outputs' shape.
      loss_scale: factor of the loss over ``sum of squared errors / (2 n)``.
      loss_fn: ``loss_fn(outputs, targets)``, your training loss: if given it is compared
        with ``loss_scale``, since the wrong convention changes learning rates unseen.
      chunk_size: number of examples whose Jacobian is computed at once; default: at most
        64, fewer for large models.

    Returns:
      A :class:`Linearization`.

    Raises:
      ValueError: for a ``loss_fn`` that is not this loss, naming the factor; for targets of
        another shape, fewer than 2 examples, a zero Jacobian, values that are not finite.

    References:
      Wu, Wang, Su, `The Alignment Property of SGD Noise
      <https://arxiv.org/abs/2207.02628>`_, NeurIPS 2022; Mulayoff, Michaeli, `Exact Mean
      Square Linear Stability Analysis for SGD <https://arxiv.org/abs/2306.07850>`_, 2023.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> float(lin.loss)
      0.0
    """
    checks.check_scale(loss_scale, "loss_scale")
    params, outputs = _outputs(model_fn, params, inputs)
    targets = jnp.asarray(targets)
    if outputs.shape != targets.shape:
        raise ValueError(
            "targets must have the shape of the outputs, (n,) or (n, c), got "
            f"{targets.shape} for outputs {outputs.shape}; reshape one of them."
        )
    n = len(outputs)
    errors = _without_rounding(outputs - targets, outputs).reshape(n, -1)
    loss = loss_scale * jnp.sum(errors**2) / (2 * n)
    if loss_fn is not None:
        _check_loss(loss_fn(outputs, targets), loss, loss_scale, errors, n)
    root = jnp.sqrt(jnp.asarray(loss_scale, errors.dtype))
    roots = jnp.broadcast_to(
        root * jnp.eye(errors.shape[1], dtype=errors.dtype),
        (n, errors.shape[1], errors.shape[1]),
    )
    return _linearize(model_fn, params, inputs, roots, root * errors, loss, chunk_size)


def linearize_gauss_newton(
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    targets: Any,
    *,
    chunk_size: int | None = None,
) -> Linearization:
    r"""Linearize a model with any loss that is convex in the outputs.

    The loss is expanded to second order in the outputs: example i has the Hessian
    :math:`H_i = J_i^\top S_i J_i` with :math:`S_i` that of its loss in its outputs. Exact at
    a minimum where each example's own gradient is zero; a cross-entropy is never quite
    there, and its :math:`S_i` vanish as it is approached.

    In the result, ``coordinates`` are the rows of :math:`S_i^{1/2} J_i` and ``residuals``
    are :math:`S_i^{-1/2} \nabla_f \ell_i`, so that their products are the examples'
    gradients, as with square loss.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` of shape (n,) or (n, c).
      loss_fn: ``loss_fn(outputs, targets)``, the mean loss over examples.
      params: the parameters, at or near a minimum.
      inputs: n inputs, a tree of arrays with a leading axis.
      targets: n targets, a tree of arrays with a leading axis.
      chunk_size: see :func:`linearize`.

    Returns:
      A :class:`Linearization`.

    Raises:
      ValueError: for a loss that is not convex in the outputs, or has a slope in directions
        without curvature; else as :func:`linearize`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flatopt import stability
      >>> def loss_fn(logits, labels):
      ...     return optax.sigmoid_binary_cross_entropy(logits, labels).mean()
      >>> lin = stability.linearize_gauss_newton(
      ...     lambda w, x: x @ w, loss_fn, jnp.zeros(2), jnp.eye(2), jnp.ones(2))
      >>> lin.eigenvalues
      Array([0.125, 0.125], dtype=float32)
    """
    params, outputs = _outputs(model_fn, params, inputs)
    n = len(outputs)
    wide = trees.widen(outputs)

    def loss_of_one(flat, target):
        output = flat.reshape(outputs.shape[1:])[None]
        target = jax.tree.map(lambda x: jnp.asarray(x)[None], target)
        return checks.check_value(loss_fn(output, target), "loss_fn")

    flat = wide.reshape(n, -1)
    slopes = jax.vmap(jax.grad(loss_of_one))(flat, targets)
    hessians = jax.vmap(jax.hessian(loss_of_one))(flat, targets)
    roots, residuals = _split(np.asarray(hessians, "f8"), np.asarray(slopes, "f8"))
    roots, residuals = (jnp.asarray(x, wide.dtype) for x in (roots, residuals))
    loss = trees.widen(jnp.asarray(loss_fn(wide, targets)))
    return _linearize(model_fn, params, inputs, roots, residuals, loss, chunk_size)


def _without_rounding(errors, outputs):
    """Zero where all errors are within the rounding of the outputs."""
    rounding = 16 * jnp.finfo(outputs.dtype).eps
    errors, size = trees.widen(errors), jnp.mean(trees.widen(outputs) ** 2)
    is_rounding = jnp.mean(errors**2) <= rounding**2 * size
    return jnp.where(is_rounding, 0.0, errors).astype(errors.dtype)


def _outputs(model_fn, params, inputs):
    params = checks.check_params(params)
    outputs = model_fn(params, inputs)
    if outputs.ndim not in (1, 2):
        raise ValueError(
            "model_fn must return outputs of shape (n,) or (n, c), got "
            f"{outputs.shape}; reshape them."
        )
    if len(outputs) < 2:
        raise ValueError(
            f"inputs must hold at least 2 examples, got {len(outputs)}; one example has no "
            "sampling noise, and gradient descent's threshold 2 / eigenvalue is exact."
        )
    return params, outputs


def _split(hessians, slopes):
    """The roots of the outputs' Hessians, and the slopes over these roots."""
    if not (np.isfinite(hessians).all() and np.isfinite(slopes).all()):
        raise ValueError(
            "the loss has derivatives in the outputs that are not finite; look at the "
            "model's outputs first."
        )
    values, vectors = np.linalg.eigh(hessians)
    largest = np.abs(values).max(axis=1, keepdims=True)
    if (values < -1e-4 * largest).any():
        raise ValueError(
            "loss_fn must be convex in the outputs, got an eigenvalue of "
            f"{values.min():.3g}; the theory needs examples of positive curvature."
        )
    keep = values > 1e-6 * largest
    scales = np.where(keep, np.sqrt(np.where(keep, values, 0)), 0)
    roots = np.einsum("nij,nj,nkj->nik", vectors, scales, vectors)
    parts = np.einsum("nij,ni->nj", vectors, slopes)
    missed = np.linalg.norm(np.where(keep, 0, parts), axis=1)
    if (missed > 1e-3 * np.linalg.norm(slopes, axis=1)).any():
        raise ValueError(
            "loss_fn has a slope in directions without curvature, of norm "
            f"{missed.max():.3g}; a second-order expansion says nothing there."
        )
    inverse = np.where(keep, 1 / np.where(keep, scales, 1), 0)
    return roots, np.einsum("nij,nj->ni", vectors, inverse * parts)


def _linearize(model_fn, params, inputs, roots, residuals, loss, chunk_size):
    size = blocks.size(params)
    n, c = residuals.shape
    if chunk_size is None:
        chunk_size = max(1, min(64, CHUNK_VALUES // (c * size)))
    checks.check_num_samples(chunk_size, "chunk_size")
    gram = _gram(model_fn, params, inputs, roots, chunk_size, size)
    if not np.isfinite(np.asarray(gram)).all():
        raise ValueError(
            "the Jacobian is not finite; look at the model's outputs and gradients first."
        )
    values, vectors = jnp.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int(jnp.sum(values > values[0] * len(values) * jnp.finfo(values.dtype).eps))
    if not rank or not values[0] > 0:
        raise ValueError(
            "the Jacobian of the model is zero at params; there is no curvature to be "
            "stable or unstable in."
        )
    values, vectors = values[:rank], vectors[:, :rank]
    shown = jnp.dot(residuals.reshape(-1), vectors, precision=blocks.PRECISION)
    return Linearization(
        coordinates=(vectors * jnp.sqrt(values)[None]).reshape(n, c, rank),
        eigenvalues=values / n,
        residuals=residuals,
        loss=loss,
        gradient_norm=jnp.linalg.norm(shown * jnp.sqrt(values)) / n,
        num_params=size,
        reducible_loss=jnp.sum(shown**2) / (2 * n),
    )


def _check_loss(given, loss, loss_scale, errors, n):
    unit = float(jnp.sum(errors**2)) / (2 * n)
    if not np.isclose(float(given), float(loss), rtol=1e-3, atol=1e-30):
        factor = float(given) / unit if unit else math.nan
        raise ValueError(
            f"loss_fn returned {float(given):g} where loss_scale={loss_scale:g} gives "
            f"{float(loss):g}; if it is a squared error, pass loss_scale={factor:g}."
        )


@functools.partial(jax.jit, static_argnums=0)
def _jacobian(model_fn, params, inputs, roots):
    """Rows of the examples' roots times Jacobians, two axes a leaf."""

    def outputs(params, example):
        example = jax.tree.map(lambda x: x[None], example)
        return trees.widen(model_fn(params, example)[0]).reshape(-1)

    rows = jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(params, inputs)

    def flatten(leaf):
        leaf = trees.widen(leaf.reshape(*roots.shape[:2], -1))
        mixed = jnp.einsum(
            "ncd,ndp->ncp", roots.astype(leaf.dtype), leaf, precision=blocks.PRECISION
        )
        return mixed.reshape(-1, leaf.shape[2])

    return [flatten(leaf) for leaf in jax.tree.leaves(rows)]


_products = jax.jit(blocks.gram)


def _most_held():
    """Number of float32 values in a quarter of the memory."""
    found = jax.local_devices()[0].memory_stats()
    if found and "bytes_limit" in found:
        return found["bytes_limit"] // 16
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16


def _gram(model_fn, params, inputs, roots, chunk_size, size):
    """Inner products of all rows, shape (n c, n c).

    Chunks are held while they fit; with the chunks held, all later ones are computed
    again.
    """
    n, c, _ = roots.shape
    chunks = [
        jax.tree.map(lambda x, s=start: x[s : s + chunk_size], (inputs, roots))
        for start in range(0, n, chunk_size)
    ]
    most = max(1, _most_held() // (chunk_size * c * size))
    parts = [[None] * len(chunks) for _ in chunks]
    for first in range(0, len(chunks), most):
        held = {}
        for j in range(first, len(chunks)):
            rows = _jacobian(model_fn, params, *chunks[j])
            if j < first + most:
                held[j] = rows
            for i, others in held.items():
                parts[i][j] = _products(others, rows)
                parts[j][i] = parts[i][j].T
    return jnp.block(parts)
