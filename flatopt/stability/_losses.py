"""Losses of outputs: shapes that fit, squared errors, expansions to second order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import checks, risk, trees


def check_outputs(model_fn, params, inputs):
    """Parameters and outputs of a model, shape (n,) or (n, c), checked."""
    checks.check_function(model_fn, "model_fn", "model_fn(params, inputs)", count=2)
    params = risk.check_params(params)
    outputs = model_fn(params, inputs)
    if not isinstance(outputs, jax.Array | np.ndarray):
        raise TypeError(
            "model_fn must return one array of shape (n,) or (n, c), got "
            f"{type(outputs).__name__}; return the outputs alone."
        )
    outputs = jnp.asarray(outputs)
    if outputs.ndim not in (1, 2) or not outputs.size:
        raise ValueError(
            "model_fn must return outputs of shape (n,) or (n, c), got "
            f"{outputs.shape}; reshape them, and squeeze the last axis alone."
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(
            f"model_fn must return floating outputs, got {outputs.dtype}; return the "
            "values that the loss takes."
        )
    _check_examples(model_fn, params, inputs, outputs)
    if not bool(jnp.isfinite(outputs).all()):
        raise ValueError(
            "model_fn returned outputs that are not finite; look at the parameters and the "
            "inputs first."
        )
    return params, outputs


def _check_examples(model_fn, params, inputs, outputs):
    n = len(outputs)
    for leaf in jax.tree.leaves(inputs):
        if jnp.ndim(leaf) < 1 or len(leaf) != n:
            raise ValueError(
                f"inputs must hold arrays with a leading axis of {n} examples, one for each "
                f"of the outputs {outputs.shape}, got shape {jnp.shape(leaf)}."
            )
    if n < 2:
        raise ValueError(
            f"inputs must hold at least 2 examples, got {n}; one example has no "
            "sampling noise, and gradient descent's threshold 2 / eigenvalue is exact."
        )
    one = jax.tree.map(lambda x: jnp.asarray(x)[:1], inputs)
    found = jnp.shape(jax.eval_shape(model_fn, params, one))
    if found != (1, *outputs.shape[1:]):
        raise ValueError(
            f"model_fn must keep the axis of examples, got shape {found} for one example "
            f"and {outputs.shape} for {n}; squeeze the last axis alone, squeeze(-1)."
        )


def as_arrays(targets):
    """Targets with lists taken as arrays."""
    if not isinstance(targets, list):
        return targets
    try:
        return np.asarray(targets)
    except ValueError as error:
        raise ValueError(
            f"targets must be rows of one length, got a list whose rows differ; {error}"
        ) from error


def check_targets(outputs, targets):
    """Targets of a squared error, as wide as the outputs and of their shape."""
    targets = as_arrays(targets)
    if not checks.is_numeric(targets):
        raise TypeError(
            f"targets must be one array of the shape of the outputs, {outputs.shape}, got "
            f"{jax.tree.map(jnp.shape, targets)}."
        )
    targets = jnp.asarray(targets)
    if jnp.issubdtype(targets.dtype, jnp.complexfloating):
        raise TypeError(
            f"targets must be real, got {targets.dtype}; give both parts as outputs."
        )
    check_same_shape(outputs, targets)
    targets = targets.astype(trees.wide(outputs.dtype))
    if not bool(jnp.isfinite(targets).all()):
        raise ValueError(
            "targets must be finite, got NaN or an infinity; leave these examples out."
        )
    return targets


def check_same_shape(outputs, targets):
    """Reject shapes that NumPy would broadcast."""
    if jnp.shape(outputs) == jnp.shape(targets):
        return
    advice = "reshape one of them."
    if jnp.issubdtype(jnp.result_type(targets), jnp.integer) and jnp.ndim(targets) == 1:
        advice = (
            "for labels give jax.nn.one_hot(labels, num_classes), or the classifier's own "
            "loss to linearize_gauss_newton."
        )
    raise ValueError(
        "targets must have the shape of the outputs, (n,) or (n, c), got "
        f"{jnp.shape(targets)} for outputs {jnp.shape(outputs)}; {advice}"
    )


def is_mistaken_for_outputs(outputs, targets):
    """Whether floating targets differ from the outputs by axes of length 1 alone."""
    if not checks.is_numeric(targets) or jnp.shape(targets) == outputs.shape:
        return False
    return math.prod(jnp.shape(targets)) == outputs.size


def is_broadcast_square(loss_fn, outputs, targets):
    """Whether a loss is a squared error between floating arrays that it broadcasts."""
    if not checks.is_numeric(targets) or jnp.ndim(targets) != outputs.ndim:
        return False
    is_float = jnp.issubdtype(jnp.result_type(targets), jnp.floating)
    same = len(targets) == len(outputs) and 1 in (targets.shape[-1], outputs.shape[-1])
    if not is_float or not same or targets.shape == outputs.shape:
        return False
    # At equal columns: outputs as targets of their own shape.
    column = jnp.asarray(targets, trees.wide(outputs.dtype))[:, :1]
    fixed = jnp.broadcast_to(column, targets.shape)
    return (
        square_scale(
            lambda moved, _: loss_fn(moved, fixed),
            jnp.broadcast_to(column, outputs.shape),
            jnp.broadcast_to(column, outputs.shape),
        )
        is not None
    )


def half_square(outputs, targets):
    """Half the squared error, mean over examples."""
    check_same_shape(outputs, targets)
    errors = trees.widen(outputs) - jnp.asarray(targets, trees.wide(outputs.dtype))
    return jnp.sum(errors**2) / (2 * len(errors))


def square_at_zero_error(outputs, targets):
    """:func:`half_square`, whose Hessian is the same at any error, where none overflows."""
    check_same_shape(outputs, targets)
    return half_square(outputs, jax.lax.stop_gradient(outputs))


@functools.lru_cache(maxsize=64)
def scaled_model(model_fn, unit):
    """The model with outputs in another unit."""
    if unit == 1:
        return model_fn
    return lambda params, inputs: _times(unit, model_fn(params, inputs))


def _times(unit, values):
    # The compiler would multiply two such constants by each other, out of range.
    return jax.lax.optimization_barrier(jnp.asarray(unit, values.dtype) * values)


@functools.lru_cache(maxsize=64)
def square_loss(model_fn, loss_scale=1.0, unit=1.0):
    """``loss_fn(params, batch)``, the same function for the same model.

    Errors are measured in units, so that their squares stay in range.
    """

    def loss_fn(params, batch):
        outputs, targets = model_fn(params, batch[0]), batch[1]
        check_same_shape(outputs, targets)
        errors = trees.widen(outputs) - jnp.asarray(targets, trees.wide(outputs.dtype))
        return loss_scale * half_square(_times(unit, errors), jnp.zeros_like(errors))

    return loss_fn


@functools.lru_cache(maxsize=64)
def whole_loss(model_fn, loss_fn):
    """``loss(params, batch)`` of a loss of outputs and targets."""
    return lambda params, batch: loss_fn(model_fn(params, batch[0]), batch[1])


def has_square_targets(outputs, targets):
    """Whether targets could be those of a squared error: floating, of the same shape."""
    if not checks.is_numeric(targets):
        return False
    is_float = jnp.issubdtype(jnp.result_type(targets), jnp.floating)
    return is_float and jnp.shape(targets) == outputs.shape


def square_scale(loss_fn, outputs, targets):
    """The ``loss_scale`` of a loss that is a squared error, or None where it is none.

    Read off errors of a size that rounding does not reach, so that it is known at a
    fitted minimum too: small ones of all examples, twice as large ones, uneven ones of all
    and of the first example alone, which weights show in, and the outputs' own.
    """
    wide = trees.wide(outputs.dtype)
    targets = jnp.asarray(targets, wide)
    shape = outputs.shape
    size = max(float(jnp.sqrt(jnp.mean(targets**2))) / 32, 2.0**-30)
    signs = np.where(np.arange(math.prod(shape)) % 3, 1.0, -1.0).reshape(shape)
    uneven = np.random.default_rng(0).uniform(0.5, 2.0, shape)
    first = np.zeros(shape)
    first[0] = uneven[0]
    patterns = signs, 2 * signs, uneven * signs, first
    tried = [targets + jnp.asarray(size * x, wide) for x in patterns]
    outputs = outputs.astype(wide)
    errors = float(jnp.sqrt(jnp.mean((outputs - targets) ** 2)))
    rounding = float(jnp.finfo(wide).eps * jnp.sqrt(jnp.mean(outputs**2)))
    if errors > 1e3 * rounding and errors > 2.0**-60:
        tried.append(outputs)
    found = []
    for moved in tried:
        value = float(checks.check_value(loss_fn(moved, targets), "loss_fn"))
        unit = np.sum(np.asarray(moved - targets, "f8") ** 2) / (2 * len(targets))
        found.append(value / unit)
    if not (np.isfinite(found).all() and found[0] > 0):
        return None
    if not np.allclose(found, found[0], rtol=1e-3, atol=0):
        return None
    return _usual(found[0], math.prod(shape[1:]))


def _usual(factor, num_outputs):
    """The usual convention that a factor is within rounding, or the factor itself."""
    for usual in (1.0, 2.0, 1 / num_outputs, 2 / num_outputs):
        if math.isclose(factor, usual, rel_tol=1e-4):
            return usual
    return factor


def check_square_scale(loss_fn, loss_scale, outputs, targets):
    """Reject a loss that is not the squared error of this scale."""
    factor = square_scale(loss_fn, outputs, targets)
    if factor is not None and math.isclose(factor, loss_scale, rel_tol=1e-3):
        return
    moved = targets + max(float(jnp.sqrt(jnp.mean(targets**2))), 1.0)
    unit = float(half_square(moved, targets))
    advice = (
        "it is no squared error of equal weights: use linearize_gauss_newton."
        if factor is None
        else f"if it is a squared error, pass loss_scale={factor:g}."
    )
    raise ValueError(
        f"loss_fn returned {float(loss_fn(moved, targets)):g} for outputs off by "
        f"{math.sqrt(2 * unit / moved.size * len(moved)):g} where loss_scale="
        f"{loss_scale:g} gives {loss_scale * unit:g}; {advice}"
    )


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
    targets = as_arrays(targets)
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
        return jnp.asarray(leaf, dtype if is_float else None)

    shape = outputs.shape[1:]
    targets = jax.tree.map(widen, targets)
    outputs = widen(outputs)
    flat = outputs.reshape(len(outputs), -1)
    found = _derivatives(loss_fn, shape, flat, targets)
    scale = _derivatives(loss_fn, shape, jnp.zeros_like(flat), targets)
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
    targets = jax.tree.map(jnp.asarray, as_arrays(targets))
    for leaf in jax.tree.leaves(targets):
        if leaf.ndim < 1 or len(leaf) != n:
            raise ValueError(
                f"targets must have a leading axis of {n} examples as the outputs "
                f"{outputs.shape}, got shape {leaf.shape}."
            )
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        if is_float and not bool(jnp.isfinite(leaf).all()):
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
    flat = wide.reshape(n, -1)
    each = _values(loss_fn, outputs.shape[1:], flat, targets)
    at_zero = _values(loss_fn, outputs.shape[1:], jnp.zeros_like(flat), targets)
    mean, size = float(jnp.mean(each)), float(jnp.mean(jnp.abs(each)))
    unit = float(jnp.max(jnp.where(jnp.isfinite(at_zero), jnp.abs(at_zero), 0.0)))
    if not (math.isfinite(mean) and math.isfinite(float(loss))):
        raise ValueError(
            f"loss_fn returned {float(loss):g}; look at the model's outputs first."
        )
    rounding = 64 * float(jnp.finfo(wide.dtype).eps) * unit
    if abs(float(loss) - mean) > 1e-3 * size + rounding:
        shapes = jax.tree.map(jnp.shape, targets)
        raise ValueError(
            "loss_fn must be the mean over examples, got "
            f"{float(loss):g} for all at once and {mean:g} as the mean of single ones, for "
            f"outputs {outputs.shape} and targets {shapes}; give both the same shape "
            "where it subtracts them, and divide by the number of examples."
        )
    return loss


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
