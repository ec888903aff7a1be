"""Parameter trees: names of leaves, masks, the dtypes to compute in."""

import jax
import jax.numpy as jnp
import numpy as np


def path_name(path):
    """Name a leaf: its keys joined by ``/``, without a trailing attribute ``.value``.

    Flax NNX spells the same parameter with and without it.

    Example:
      >>> import jax
      >>> tree = {"dense": {"kernel": 0.0}}
      >>> path, leaf = jax.tree_util.tree_leaves_with_path(tree)[0]
      >>> path_name(path)
      'dense/kernel'
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_function(x):
    """Whether x is a function and not a tree that can be called, as Equinox modules."""
    return callable(x) and jax.tree_util.all_leaves([x])


def mask_flags(mask, params):
    """One bool for each leaf of ``params`` from a mask as in ``optax.masked``."""
    given = mask(params) if is_function(mask) else mask
    try:
        flags = jax.tree.leaves(
            jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), given, params)
        )
    except ValueError as error:
        raise ValueError(
            f"mask must be a tree prefix of params, got {_difference(given, params)}; give "
            "one bool for each leaf or subtree."
        ) from error
    for flag in flags:
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"mask must be made of Python bools, got {flag!r}; write True where the "
                "leaf takes part and False where it does not."
            )
    return [bool(flag) for flag in flags]


def _difference(mask, params):
    """In words, the paths in which a mask is no prefix of the parameters."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    entries = [path for path, _ in jax.tree_util.tree_leaves_with_path(mask)]

    def covers(entry, path):
        return path[: len(entry)] == entry

    lacking = [p for p in paths if not any(covers(e, p) for e in entries)]
    unknown = [e for e in entries if not any(covers(e, p) for p in paths)]
    words = []
    if lacking:
        words.append(f"no entry for {_list_paths(lacking)}")
    if unknown:
        words.append(f"entries that params lack: {_list_paths(unknown)}")
    if not words:
        words.append(
            f"a {type(mask).__name__} for a {type(params).__name__} of the same paths, or "
            "other containers inside"
        )
    return " and ".join(words)


def _list_paths(paths, most=4):
    names = [repr(path_name(path)) for path in paths[:most]]
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(names) + rest


def wide(dtype):
    """The dtype to accumulate in: float32, or wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def widen(x):
    return x.astype(wide(x.dtype))
