"""Parameter trees: names of leaves, masks, the dtypes to compute in."""

import fnmatch
import inspect

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


def named_leaves(tree, name="params", is_leaf=None):
    """Pairs of the path of a leaf, see :func:`path_name`, and the leaf.

    Two leaves of one path would share what is kept by it: their noise, norms, a result.

    Example:
      >>> named_leaves({"dense": {"kernel": 0.0}})
      [('dense/kernel', 0.0)]
    """
    named = [
        (path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    ]
    seen = set()
    for path, _ in named:
        if path in seen:
            raise ValueError(
                f"{name} must have a path of its own for each leaf, got {path!r} twice; "
                "rename one of the keys, such as one that holds a slash."
            )
        seen.add(path)
    return named


def is_traced(tree):
    """Whether a leaf belongs to a trace."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def is_function(x):
    """Whether x is a function and not a tree that can be called, as Equinox modules."""
    return callable(x) and jax.tree_util.all_leaves([x])


def mask_flags(mask, params, name="mask"):
    """One bool for each leaf of ``params``.

    The mask is one as in ``optax.masked``, a tree prefix of bools or a function that
    returns one, or a pattern of paths. One that leaves out every leaf is an error.
    """
    flags = flags_of(mask, params, name)
    if flags and not any(flags):  # wrappers of optax also show trees without leaves
        paths = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(
            f"{name} must be True for at least one leaf of params, got one that is False "
            f"everywhere, where the paths are {_some(paths)}; write True where a leaf "
            "takes part."
        )
    return flags


def flags_of(mask, params, name):
    """As :func:`mask_flags`, for a mask that may leave out every leaf."""
    if isinstance(mask, str):
        return _pattern_flags(mask, params, name)
    given = mask
    if is_function(mask):
        _check_takes_params(mask, name)
        given = mask(params)
    try:
        flags = jax.tree.leaves(
            jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), given, params)
        )
    except ValueError as error:
        raise ValueError(
            f"{name} must be a tree prefix of params, got {_difference(given, params)}; give "
            "one bool for each leaf or subtree."
        ) from error
    for flag in flags:
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"{name} must be made of Python bools, got {flag!r}; write True where the "
                "leaf takes part and False where it does not."
            )
    return [bool(flag) for flag in flags]


def _pattern_flags(pattern, params, name):
    """True for leaves whose path, or the path of a subtree around, has the pattern."""
    paths = [path for path, _ in named_leaves(params)]
    spelt = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]

    def fits(path):
        keys = path.split("/")
        around = ("/".join(keys[:count]) for count in range(1, len(keys) + 1))
        return any(fnmatch.fnmatchcase(subtree, pattern) for subtree in around)

    # A field of a NamedTuple may be named "value", too.
    flags = [
        fits(path) or fits(other) for path, other in zip(paths, spelt, strict=True)
    ]
    if paths and not any(flags):
        raise ValueError(
            f"{name} must name leaves of params, got the pattern {pattern!r} where the "
            f"paths are {_some(paths)}; write a path or a part of its beginning, with "
            "* for anything."
        )
    return flags


def _some(paths, most=6):
    return ", ".join(map(repr, paths[:most])) + ", ..." * (len(paths) > most)


def _check_takes_params(mask, name):
    try:
        inspect.signature(mask).bind(None)
    except TypeError as error:
        raise TypeError(
            f"{name} must be a function of params or a tree of bools, got a function of "
            f"other arguments, {inspect.signature(mask)}; write lambda params: ..."
        ) from error
    except ValueError:  # it has no signature
        pass


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


def select(tree, flags):
    """The tree with None in place of leaves whose flag is False, so that paths stay."""
    if flags is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, flags, strict=True)
    return treedef.unflatten([x if flag else None for x, flag in pairs])


def merge(selected, others, flags):
    """The inverse of :func:`select`: places of None are filled from a whole tree."""
    if flags is None:
        return selected
    leaves, treedef = jax.tree.flatten(others)
    triples = zip(treedef.flatten_up_to(selected), leaves, flags, strict=True)
    return treedef.unflatten([x if flag else y for x, y, flag in triples])


def zeros_like(tree):
    """Zeros for numbers and arrays; what is neither stays."""
    return jax.tree.map(
        lambda x: (
            jnp.zeros_like(x)
            if hasattr(x, "dtype") or isinstance(x, int | float)
            else x
        ),
        tree,
    )


def wide(dtype):
    """The dtype to accumulate in: float32, or wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def widen(x):
    return x.astype(wide(x.dtype))
