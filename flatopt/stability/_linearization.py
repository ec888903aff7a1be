"""A model linearized at its parameters, in the space that its examples' gradients span."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, checks, trees
from flatopt._core.types import LossFn, ModelFn
from flatopt.stability import _checks, _convex, _losses, _moments, _spectrum

CHUNK_VALUES = 1 << 26  # computed at once


class Linearization(NamedTuple):
    """A model linearized at its parameters, from :func:`linearize`.

    Attributes:
      coordinates: gradients of each output of each example, times the root of
        ``loss_scale``, in the eigenbasis of H, shape (n, c, r).
      eigenvalues: the r eigenvalues of H that stand out of the Jacobian's rounding,
        descending; H is the Gauss-Newton matrix of the loss and its Hessian at zero error.
      residuals: outputs less targets, times the root of ``loss_scale``, shape (n, c).
      loss: the loss.
      gradient_norm: the norm of its gradient.
      num_params: the number of parameters.
      reducible_loss: what the linearized model could still take off the loss, in flat
        directions too; 0 at a minimum.
      params: the parameters; None: an optimizer's coefficients are read on a flat vector.
      largest_example: the largest eigenvalue of an example's own Hessian where only some
        directions were asked for; None: all of them are there.
      preconditioner: a tree like them, or None; with it ``coordinates``, ``eigenvalues``
        and ``gradient_norm`` are those of the parameters over its root.

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
    params: Any = None
    preconditioner: Any = None
    largest_example: float | None = None


def linearize(
    model_fn: ModelFn,
    params: Any,
    inputs: Any,
    targets: Any,
    *,
    loss_scale: float = 1.0,
    loss_fn: LossFn | None = None,
    preconditioner: Any = None,
    num_directions: int | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int, int | None, str], Any] | bool | None = None,
) -> Linearization:
    r"""Linearize a model with square loss at its parameters.

    Errors that are all within the rounding of the outputs count as zero.

    Cost: the Jacobian of all outputs once, or some times where it exceeds a quarter of the
    device's memory, and the eigendecomposition of an (n c, n c) matrix in float64.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` of shape (n,) or (n, c).
      params: the parameters, at or near a minimum.
      inputs: n inputs, a tree of arrays with a leading axis.
      targets: the targets, of the outputs' shape; nothing is broadcast.
      loss_scale: factor of the loss over ``sum of squared errors / (2 n)``.
      loss_fn: ``loss_fn(outputs, targets)``, your training loss: if given it is compared
        with ``loss_scale`` at small errors of its own, since the wrong convention changes
        learning rates unseen.
      preconditioner: a tree like ``params``, from :func:`preconditioner`: the linearization
        is then in the coordinates in which the optimizer that has it treats all alike.
      num_directions: None: all directions. Of larger problems so many of the sharpest, by
        products with the Jacobian alone; then :func:`thresholds` gives bounds, and what
        needs all directions says so.
      chunk_size: number of examples whose Jacobian is computed at once; default: at most
        64, fewer for large models.
      progress: None: a bar where it takes long, if tqdm is there; True: a bar at once;
        False: none; or ``progress(done, total, description)``.

    Returns:
      A :class:`Linearization`.

    Raises:
      ValueError: for a ``loss_fn`` that is not this loss, naming the factor; for targets of
        another shape, fewer than 2 examples, more outputs than fit in memory, a zero
        Jacobian, values that are not finite.

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
    _checks.check_rate(loss_scale, "loss_scale")
    params, outputs = _losses.check_outputs(model_fn, params, inputs)
    _check_directions(num_directions)
    targets = _losses.check_targets(outputs, targets)
    if loss_fn is not None:
        checks.check_function(loss_fn, "loss_fn", "loss_fn(outputs, targets)", count=2)
        _losses.check_square_scale(loss_fn, loss_scale, outputs, targets)
    n = len(outputs)
    outputs, targets = np.asarray(outputs), np.asarray(targets)
    with np.errstate(over="ignore"):  # infinite where the dtype ends
        errors = _without_rounding(outputs, targets).reshape(n, -1)
        loss = loss_scale * np.sum(errors**2) / (2 * n)
        root = np.sqrt(np.asarray(loss_scale, errors.dtype))
        residuals = root * errors
    one = root * np.eye(errors.shape[1], dtype=errors.dtype)
    roots = np.broadcast_to(one, (n, *one.shape))
    size = num_directions, chunk_size, progress
    return _linearize(
        model_fn, params, preconditioner, inputs, roots, residuals, loss, *size
    )


def linearize_gauss_newton(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Any,
    inputs: Any,
    targets: Any,
    *,
    preconditioner: Any = None,
    num_directions: int | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int, int | None, str], Any] | bool | None = None,
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
      preconditioner, num_directions, chunk_size, progress: see :func:`linearize`.

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
    params, outputs = _losses.check_outputs(model_fn, params, inputs)
    _check_directions(num_directions)
    *parts, loss = _convex.expand(loss_fn, outputs, targets)
    roots, residuals = (np.asarray(x, trees.wide(outputs.dtype)) for x in parts)
    size = num_directions, chunk_size, progress
    return _linearize(
        model_fn, params, preconditioner, inputs, roots, residuals, loss, *size
    )


def _without_rounding(outputs, targets):
    """The errors; zero where all are within the rounding of the outputs."""
    rounding = 16 * float(jnp.finfo(outputs.dtype).eps)
    outputs = trees.widen(outputs)
    unit = np.max(np.abs(outputs)) or 1.0  # so that squares stay in range
    errors = outputs - targets
    size = np.mean((outputs / unit) ** 2)
    is_rounding = np.mean((errors / unit) ** 2) <= rounding**2 * size
    return np.zeros_like(errors) if is_rounding else errors


def _check_directions(num_directions):
    if num_directions is not None:
        _checks.check_count(num_directions, "num_directions", "directions kept")


def _linearize(
    model_fn,
    params,
    preconditioner,
    inputs,
    roots,
    residuals,
    loss,
    num_directions,
    chunk_size,
    shown,
):
    size = blocks.size(params)
    n, c = residuals.shape
    if chunk_size is None:
        chunk_size = max(1, min(64, CHUNK_VALUES // (c * size)))
    _checks.check_count(chunk_size, "chunk_size", "examples whose Jacobian is held")
    errors = np.asarray(residuals, "f8").reshape(-1)
    rows = _spectrum.Rows(
        model_fn,
        params,
        root_of(preconditioner, params),
        inputs,
        roots,
        errors,
        chunk_size,
        shown,
    )
    found = _spectrum.spectrum(rows, num_directions)
    values, dtype = found.values, residuals.dtype
    _check_range(values[0] / n, dtype)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
    rank = _rank(values, size, eps)
    reducible = float(loss)  # at most
    largest = found.largest_example
    if largest is None:
        # A coarse dtype hides directions, but not what the loss could still lose in them.
        most = _rank(values, size, min(eps, float(jnp.finfo(jnp.float32).eps)))
        reducible = np.sum((errors @ found.vectors[:, :most]) ** 2) / (2 * n)
    coordinates = found.vectors[:, :rank] * np.sqrt(values[:rank])
    return Linearization(
        coordinates=_moments.narrow(coordinates.reshape(n, c, rank), dtype),
        eigenvalues=_moments.narrow(values[:rank] / n, dtype),
        residuals=_moments.narrow(residuals, dtype),
        loss=_moments.narrow(loss, dtype),
        gradient_norm=_moments.narrow(found.slope / n, dtype),
        num_params=size,
        reducible_loss=_moments.narrow(reducible, dtype),
        params=params,
        preconditioner=preconditioner,
        largest_example=largest,
    )


def root_of(preconditioner, params):
    """The root of a preconditioner, checked, or None."""
    if preconditioner is None:
        return None
    structure = jax.tree.structure(params)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    leaves = jax.tree.leaves(preconditioner)
    if jax.tree.structure(preconditioner) != structure or shapes != [
        jnp.shape(leaf) for leaf in leaves
    ]:
        raise ValueError(
            "preconditioner must be a tree of arrays of the shapes of params, got "
            f"{jax.tree.map(jnp.shape, preconditioner)} for "
            f"{jax.tree.map(jnp.shape, params)}; give stability.preconditioner(optimizer, "
            "opt_state, params)."
        )
    if not all(bool(jnp.all(jnp.isfinite(x) & (jnp.asarray(x) >= 0))) for x in leaves):
        raise ValueError(
            "preconditioner must be finite and not negative, got another value; give what "
            "stability.preconditioner returns after a step at least."
        )
    return jax.tree.map(lambda x: jnp.sqrt(jnp.asarray(x)), preconditioner)


def _check_range(largest, dtype):
    """Reject a curvature that is zero, or that the dtype cannot hold."""
    if not largest > 0:
        raise ValueError(
            "the Jacobian of the model is zero at params; there is no curvature to be "
            "stable or unstable in."
        )
    limits = jnp.finfo(dtype)
    if not float(limits.tiny) <= largest <= float(limits.max):
        raise ValueError(
            f"the largest eigenvalue of H, {largest:.3g}, is beyond {jnp.dtype(dtype)}; "
            "scale the loss or the outputs, or enable jax_enable_x64."
        )


def check_whole(lin, name):
    """Refuse a linearization of some directions where all are needed."""
    if lin.largest_example is not None:
        raise ValueError(
            f"{name} needs a linearization of all directions, got the "
            f"{len(lin.eigenvalues)} sharpest; leave num_directions out of linearize, or "
            "ask thresholds, which gives bounds."
        )


def _rank(values, num_params, eps):
    """The number of eigenvalues that stand out of rounding.

    That of their own computation in float64, and that of a Jacobian whose entries are off
    by a few eps at random: a matrix of such errors has singular values that are smaller
    than its norm by the root of its smaller side.
    """
    own = 4 * len(values) * np.finfo("f8").eps * values[0]
    rows = 64 * eps**2 * max(values.sum(), values[0]) / min(len(values), num_params)
    found = int(np.sum(values > max(own, rows)))
    return max(1, min(found, num_params))
