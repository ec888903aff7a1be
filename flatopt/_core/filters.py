"""Which axes of a parameter index filters, and the norms of filters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import trees

FilterAxes = int | tuple[int, ...] | Callable[[str, jax.Array], Any] | Any


def default_filter_axes(path: str, leaf: jax.Array) -> int:
    """The axis that indexes filters in Flax layouts: last, or first for embeddings.

    Example:
      >>> import jax.numpy as jnp
      >>> default_filter_axes("dense/kernel", jnp.ones((3, 4)))
      -1
      >>> default_filter_axes("embed/embedding", jnp.ones((3, 4)))
      0
    """
    del leaf
    return 0 if path.split("/")[-1] == "embedding" else -1


def filter_norm(filter_axes):
    """A function ``(path, leaf) -> norms`` of each filter, broadcastable to the leaf."""
    axes_of = filter_axes_function(filter_axes)

    def norm(path, leaf):
        axes = check_axes(axes_of(path, leaf), path, leaf)
        others = tuple(a for a in range(leaf.ndim) if a not in axes)
        square = jnp.square(trees.widen(leaf))
        return jnp.sqrt(jnp.sum(square, axis=others, keepdims=True))

    return norm


def _is_axes(value):
    return isinstance(value, int | np.integer) or (
        isinstance(value, tuple) and all(isinstance(a, int | np.integer) for a in value)
    )


def filter_axes_function(filter_axes):
    if filter_axes is None:
        return default_filter_axes
    if _is_axes(filter_axes):
        return lambda path, leaf: filter_axes
    if trees.is_function(filter_axes):
        return filter_axes
    by_path = {
        trees.path_name(path): axes
        for path, axes in jax.tree_util.tree_leaves_with_path(
            filter_axes, is_leaf=_is_axes
        )
    }

    def from_tree(path, leaf):
        if path not in by_path:
            raise ValueError(
                f"filter_axes has no entry for the leaf {path!r} of shape {leaf.shape}; "
                f"it names {sorted(by_path)}, so give a tree with the paths of params."
            )
        return by_path[path]

    return from_tree


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
