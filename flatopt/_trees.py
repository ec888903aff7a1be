"""Parameter trees: names and keys of leaves, masks, kernels bound to parameters."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import _random


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


def path_hashes(params):
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), "<u4").reshape(len(names), 2)


def leaf_keys(key, hashes):
    """One typed key a leaf: the key with the two words of its hash folded in."""
    if not len(hashes):
        return []
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    fold = _random.fold_in
    return jax.vmap(lambda word: fold(fold(key, word[0]), word[1]))(hashes)


def explicit_sharding(aval):
    """The sharding of a type where it is part of it (Explicit mesh), else None."""
    explicit = jax.sharding.AxisType.Explicit in aval.sharding.mesh.axis_types
    return aval.sharding if explicit else None


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
            f"mask must be a tree prefix of params, got {jax.tree.structure(given)} for "
            f"params {jax.tree.structure(params)}; give one bool for each leaf or subtree."
        ) from error
    for flag in flags:
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"mask must be made of Python bools, got {flag!r}; write True where the "
                "leaf takes part and False where it does not."
            )
    return [bool(flag) for flag in flags]


def bind(kernel, key, params):
    """Return ``draw(key) -> perturbation`` of any kernel at these parameters.

    The noise is constant with respect to ``params``, and checked to have their
    structure and shapes.
    """
    params = jax.lax.stop_gradient(params)
    if hasattr(kernel, "bind"):
        inner = kernel.bind(key, params)
    else:

        def inner(key):
            return kernel(key, params)

    def draw(key):
        noise = inner(key)
        if jax.tree.structure(noise) != jax.tree.structure(params):
            raise ValueError(
                "kernel must return a perturbation of the tree structure of params, "
                f"got {jax.tree.structure(noise)}; return one array for each leaf of "
                f"{jax.tree.structure(params)}."
            )
        for (path, leaf), value in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(noise),
            strict=True,
        ):
            if jnp.shape(value) != jnp.shape(leaf):
                raise ValueError(
                    f"kernel returned shape {jnp.shape(value)} for the leaf "
                    f"{path_name(path)!r} of shape {jnp.shape(leaf)}; return noise of "
                    "the leaf's own shape."
                )
        return jax.lax.stop_gradient(noise)

    return draw


def wide(dtype):
    """The dtype to accumulate in: float32, or wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def widen(x):
    return x.astype(wide(x.dtype))
