"""Losses that are convex in the outputs: their expansion to second order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import checks, trees
from flatopt.stability import _losses


def best_constant_loss(loss_fn, outputs, targets):
    """The smallest loss of outputs that are the same for all examples."""
    import scipy.optimize  # slow to import

    wide = trees.wide(outputs.dtype)
    targets = jax.tree.map(jnp.asarray, targets)

    def both(point):
        point = jnp.asarray(point, wide)
        value, grad = _constant_slope(loss_fn, outputs.shape, point, targets)
        return float(value), np.asarray(grad, "f8")

    start = np.zeros(math.prod(outputs.shape[1:]))
    found = scipy.optimize.minimize(both, start, jac=True, method="L-BFGS-B")
    return float(found.fun)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _constant_slope(loss_fn, shape, constant, targets):
    def loss(constant):
        outputs = jnp.broadcast_to(constant.reshape(1, *shape[1:]), shape)
        return trees.widen(loss_fn(outputs, targets))

    return jax.value_and_grad(loss)(constant)


def expand(loss_fn, outputs, targets):
    """Roots of the outputs' Hessians, slopes over these roots, and the loss.

    In float64, where rounding of a probability near 1 does not hide its curvature; where
    the loss refuses it, in the outputs' own width.
    """
    checks.check_function(loss_fn, "loss_fn", "loss_fn(outputs, targets)", count=2)
    targets = _losses.as_arrays(targets)
    checked = _check_mean(loss_fn, outputs, targets)
    try:
        with jax.enable_x64(True):
            found = _derivatives_of(loss_fn, outputs, targets, jnp.float64)
    except Exception:  # a loss that casts by itself; an error of its own comes again
        found = _derivatives_of(loss_fn, outputs, targets, trees.wide(outputs.dtype))
    return *_split(*found), checked


def _derivatives_of(loss_fn, outputs, targets, dtype):
    """Slopes and Hessians in the outputs, and at zero outputs, on the host."""

    def widen(leaf):
        leaf = np.asarray(leaf)
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_float else leaf

    shape = outputs.shape[1:]
    targets = jax.tree.map(widen, targets)
    outputs = widen(outputs)
    flat = outputs.reshape(len(outputs), -1)
    found = _derivatives(loss_fn, shape, flat, targets)
    scale = _derivatives(loss_fn, shape, np.zeros_like(flat), targets)
    narrowest = jax.eval_shape(loss_fn, outputs, targets).dtype  # of a loss that casts
    eps = max(float(jnp.finfo(x).eps) for x in (flat.dtype, narrowest))
    return *(np.asarray(x, "f8") for x in (*found, *scale)), eps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _derivatives(loss_fn, shape, flat, targets):
    loss_of_one = functools.partial(_loss_of_one, loss_fn, shape)
    slopes = jax.vmap(jax.grad(loss_of_one))(flat, targets)
    return slopes, jax.vmap(jax.hessian(loss_of_one))(flat, targets)


def _loss_of_one(loss_fn, shape, flat, target):
    target = jax.tree.map(lambda x: x[None], target)
    return checks.check_value(loss_fn(flat.reshape(shape)[None], target), "loss_fn")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(loss_fn, shape, flat, targets):
    return jax.vmap(functools.partial(_loss_of_one, loss_fn, shape))(flat, targets)


def _check_mean(loss_fn, outputs, targets):
    """The loss, which must be the mean of what each example has by itself."""
    n = len(outputs)
    targets = jax.tree.map(jnp.asarray, _losses.as_arrays(targets))
    for leaf in jax.tree.leaves(targets):
        if leaf.ndim < 1 or len(leaf) != n:
            raise ValueError(
                f"targets must have a leading axis of {n} examples as the outputs "
                f"{outputs.shape}, got shape {leaf.shape}."
            )
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        if is_float and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(
                "targets must be finite, got NaN or an infinity; leave these examples out."
            )
    wide = trees.widen(outputs)
    try:
        loss = loss_fn(wide, targets)
    except (TypeError, ValueError) as error:
        shapes = jax.tree.map(jnp.shape, targets)
        raise ValueError(
            f"loss_fn must take outputs of shape {outputs.shape} with targets {shapes}, "
            f"got an error from it: {error}"
        ) from error
    loss = trees.widen(checks.check_value(loss, "loss_fn"))
    flat = np.asarray(wide).reshape(n, -1)
    each = _values(loss_fn, outputs.shape[1:], flat, targets)
    at_zero = _values(loss_fn, outputs.shape[1:], np.zeros_like(flat), targets)
    mean, size = _mean_and_size(each)
    at_zero = np.abs(np.asarray(at_zero))
    unit = float(np.max(at_zero, where=np.isfinite(at_zero), initial=0.0))
    if not (math.isfinite(mean) and math.isfinite(float(loss))):
        raise ValueError(
            f"loss_fn returned {float(loss):g}; look at the model's outputs first."
        )
    rounding = 64 * float(jnp.finfo(wide.dtype).eps) * unit
    whole = float(loss)
    if abs(whole - mean) <= 1e-3 * size + rounding:
        # At a fit a sum is zero as a mean is: look beside it too.
        with np.errstate(over="ignore"):
            moved = flat + np.maximum(np.abs(flat).max(), 1)
        whole = float(loss_fn(jax.device_put(moved.reshape(outputs.shape)), targets))
        mean, size = _mean_and_size(_values(loss_fn, outputs.shape[1:], moved, targets))
    if abs(whole - mean) > 1e-3 * size + rounding:
        shapes = jax.tree.map(jnp.shape, targets)
        raise ValueError(
            "loss_fn must be the mean over examples, got "
            f"{whole:g} for all at once and {mean:g} as the mean of single ones, for "
            f"outputs {outputs.shape} and targets {shapes}; give both the same shape "
            "where it subtracts them, and divide by the number of examples."
        )
    return loss


def _mean_and_size(values):
    values = np.asarray(values, "f8")
    return float(np.mean(values)), float(np.mean(np.abs(values)))


def _split(slopes, hessians, slopes_at_zero, hessians_at_zero, eps):
    """The roots of the outputs' Hessians, and the slopes over these roots.

    What is below the rounding of the terms that a derivative is made of counts as zero:
    their size is that of the derivatives at zero outputs.
    """
    if not (np.isfinite(hessians).all() and np.isfinite(slopes).all()):
        raise ValueError(
            "the loss has derivatives in the outputs that are not finite; look at the "
            "model's outputs first."
        )
    values, vectors = np.linalg.eigh(hessians)
    largest = np.abs(values).max(axis=1, keepdims=True)
    rounding = 64 * eps * np.maximum(largest, _sizes(hessians_at_zero)[:, None])
    if (values < -1e-4 * largest - rounding).any():
        raise ValueError(
            "loss_fn must be convex in the outputs, got an eigenvalue of "
            f"{values.min():.3g}; the theory needs examples of positive curvature."
        )
    keep = values > rounding
    scales = np.where(keep, np.sqrt(np.where(keep, values, 0)), 0)
    roots = np.einsum("nij,nj,nkj->nik", vectors, scales, vectors)
    parts = np.einsum("nij,ni->nj", vectors, slopes)
    missed = np.linalg.norm(np.where(keep, 0, parts), axis=1)
    lengths = np.linalg.norm(slopes, axis=1)
    noise = 64 * eps * np.maximum(lengths, _sizes(slopes_at_zero))
    if (missed > 1e-3 * lengths + noise).any():
        raise ValueError(
            "loss_fn has a slope in directions without curvature, of norm "
            f"{missed.max():.3g}; a second-order expansion says nothing there."
        )
    inverse = np.where(keep, 1 / np.where(keep, scales, 1), 0)
    return roots, np.einsum("nij,nj->ni", vectors, inverse * parts)


def _sizes(arrays):
    """The norm of each, zero where it is not finite."""
    flat = np.where(np.isfinite(arrays), arrays, 0.0).reshape(len(arrays), -1)
    return np.linalg.norm(flat, axis=1)
