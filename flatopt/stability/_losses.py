"""Losses of outputs: shapes that fit, squared errors, expansions to second order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import checks, risk, trees


def check_outputs(model_fn, params, inputs):
    """Parameters and outputs of a model, shape (n,) or (n, c), checked."""
    risk.check_model(model_fn)
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
    if not np.isfinite(np.asarray(outputs)).all():
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

    def of_one(inputs):
        return model_fn(params, jax.tree.map(lambda x: x[:1], inputs))

    found = jax.eval_shape(of_one, jax.tree.map(jnp.asarray, inputs)).shape
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
    if not np.isfinite(np.asarray(targets)).all():
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
