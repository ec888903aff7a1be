"""Which axes of a parameter index filters, and the norms of filters."""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, loops, trees

FilterAxes = int | tuple[int, ...] | Callable[[str, jax.Array], Any] | Any


_MODEL_AXES = contextvars.ContextVar("filter axes of a model", default=None)

LARGE = 1 << 16  # values: a second pass over more takes longer than a branch


@contextlib.contextmanager
def model_axes(axes):
    """Inside, the default axes are these, a tree as for ``filter_axes``."""
    token = _MODEL_AXES.set(axes)
    try:
        yield
    finally:
        _MODEL_AXES.reset(token)


def default_filter_axes(path: str, leaf: jax.Array, shapes=None):
    """The axes that index filters in Flax layouts, read from names and shapes.

    The last axis, or the first of an ``embedding``. The bias beside a kernel has the shape
    of the kernel's outputs: so several output axes (attention) and layers stacked along
    leading axes are known. ``shapes`` are those of all leaves by their paths.

    Example:
      >>> import jax.numpy as jnp
      >>> default_filter_axes("dense/kernel", jnp.ones((3, 4)))
      (1,)
      >>> default_filter_axes("embed/embedding", jnp.ones((3, 4)))
      (0,)
      >>> shapes = {"query/kernel": (6, 2, 3), "query/bias": (2, 3)}
      >>> default_filter_axes("query/kernel", jnp.ones((6, 2, 3)), shapes)
      (1, 2)
    """
    table = _by_path(_MODEL_AXES.get())
    if path in table:
        return table[path]
    shapes = shapes or {}
    layer, slash, name = path.rpartition("/")
    if leaf.ndim <= 1:
        return ()
    if name == "embedding":
        return (0,)
    if name in ("bias", "scale"):
        kernel = shapes.get(f"{layer}{slash}kernel")
        if kernel is not None and name == "bias":
            return tuple(range(_leading_axes(layer, kernel, leaf.shape)))
        return tuple(range(leaf.ndim - 1))
    if name == "kernel" and leaf.ndim > 2:
        bias = shapes.get(f"{layer}{slash}bias")
        if bias is not None:
            leading = _leading_axes(layer, leaf.shape, bias)
            outputs = len(bias) - leading
            return (*range(leading), *range(leaf.ndim - outputs, leaf.ndim))
        outputs = _attention_outputs(layer, leaf.ndim, shapes)
        if outputs:
            stacked = range(leaf.ndim - 3)
            return (*stacked, *range(leaf.ndim - outputs, leaf.ndim))
    return (leaf.ndim - 1,)


def _leading_axes(layer, kernel, bias):
    """How many leading axes of a kernel and its bias are stacked layers."""
    fits = [
        leading
        for leading in range(len(bias))
        if kernel[:leading] == bias[:leading]
        and kernel[len(kernel) - len(bias) + leading :] == bias[leading:]
    ]
    if len(fits) > 1 and layer.rpartition("/")[2] in _PROJECTIONS:
        return fits[0]
    if len(fits) > 1:
        raise ValueError(
            f"filter_axes is needed for the layer {layer!r}, got a kernel of shape {kernel} "
            f"with a bias of shape {bias}, which may be stacked layers or several output "
            "axes; give filter_axes."
        )
    return fits[0] if fits else 0


_PROJECTIONS = ("query", "key", "value")


def _attention_outputs(layer, ndim, shapes):
    """The output axes of a kernel of attention without biases, 0 where it is none."""
    block, slash, name = layer.rpartition("/")
    out = shapes.get(f"{block}{slash}out/kernel", ())
    query = shapes.get(f"{block}{slash}query/kernel", ())
    if not (len(out) == len(query) == ndim) or out[-3:-1] != query[-2:]:
        return 0
    return {"out": 1, **dict.fromkeys(_PROJECTIONS, 2)}.get(name, 0)


def filter_norm(filter_axes, params=None):
    """A function ``(path, leaf) -> norms`` of each filter, broadcastable to the leaf.

    ``params`` is the tree of the leaves, from which the default axes are read.
    """
    return _per_filter(_norm, filter_axes, params)


def filter_max(filter_axes, params=None):
    """As :func:`filter_norm`, with the largest magnitude of each filter."""

    def largest(leaf, axes):
        return jnp.max(jnp.abs(leaf), axis=axes, keepdims=True, initial=0.0)

    return _per_filter(largest, filter_axes, params)


def _per_filter(reduce, filter_axes, params):
    axes_of = filter_axes_function(filter_axes, params)

    def of_filters(path, leaf):
        axes = check_axes(axes_of(path, leaf), path, leaf)
        others = tuple(a for a in range(leaf.ndim) if a not in axes)
        return reduce(trees.widen(leaf), others)

    return of_filters


# Jitted for eager calls, inlined in traces.
@functools.partial(jax.jit, static_argnames="axes", inline=True)
def _norm(values, axes):
    """The Euclidean norm over some axes, by squares of numbers near one.

    A large array is read once if its squares are in range: powers of two change no digit.
    """

    def scaled():
        fixed = jax.lax.stop_gradient(values)  # the norm does not depend on the unit
        unit = blocks.power_of_two(fixed, axes, keepdims=True)
        squares = jnp.square(values / unit)
        return unit * jnp.sqrt(jnp.sum(squares, axis=axes, keepdims=True))

    if values.size <= LARGE:
        return scaled()
    direct = jnp.sum(jnp.square(values), axis=axes, keepdims=True)
    limits = jnp.finfo(values.dtype)
    least = values.size * float(limits.tiny) / float(limits.eps) ** 2
    in_range = jnp.all((direct > least) & (direct < jnp.inf))
    return loops.usually(in_range, lambda: jnp.sqrt(direct), scaled)


def norm_of_other(filter_axes, others):
    """As :func:`filter_norm`, with the norms of other arrays at the paths of the leaves."""
    norm = filter_norm(filter_axes, others)
    by_path = {
        path: jnp.asarray(leaf)
        for path, leaf in trees.named_leaves(others, "the tree of norms_of")
    }

    def norm_at(path, leaf):
        other = by_path.get(path)
        if other is None or other.shape != leaf.shape:
            got = "none" if other is None else f"shape {other.shape}"
            raise ValueError(
                f"norms_of must return an array of shape {leaf.shape} at {path!r}, got "
                f"{got}; give one for each leaf that gets noise, or name these leaves in "
                "noise_mask."
            )
        return norm(path, other)

    return norm_at


def _is_axes(value):
    return isinstance(value, int | np.integer) or (
        isinstance(value, tuple) and all(isinstance(a, int | np.integer) for a in value)
    )


def filter_axes_function(filter_axes, params=None):
    if filter_axes is None:
        shapes = {
            path: getattr(leaf, "shape", ())
            for path, leaf in trees.named_leaves(params)
        }
        return lambda path, leaf: default_filter_axes(path, leaf, shapes)
    if _is_axes(filter_axes):
        return lambda path, leaf: filter_axes
    if trees.is_function(filter_axes):
        return filter_axes
    by_path = _by_path(filter_axes)

    def from_tree(path, leaf):
        if path not in by_path:
            raise ValueError(
                f"filter_axes has no entry for the leaf {path!r} of shape {leaf.shape}; "
                f"it names {sorted(by_path)}, so give a tree with the paths of params."
            )
        return by_path[path]

    return from_tree


def _by_path(axes):
    """A tree of axes as a dict from the paths of leaves."""
    return dict(trees.named_leaves(axes, "filter_axes", is_leaf=_is_axes))


def check_axes(axes, path, leaf):
    if not _is_axes(axes) or isinstance(axes, bool):
        raise ValueError(
            f"filter_axes must give an int or a tuple of ints, got {axes!r} for the leaf "
            f"{path!r}."
        )
    if leaf.ndim <= 1:
        return ()
    axes = axes if isinstance(axes, tuple) else (axes,)
    if any(not -leaf.ndim <= a < leaf.ndim for a in axes):
        raise ValueError(
            f"filter_axes names axis {axes} for the leaf {path!r} of shape {leaf.shape}; "
            f"give axes between {-leaf.ndim} and {leaf.ndim - 1}."
        )
    return tuple(a % leaf.ndim for a in axes)
