"""Algebra of small problems on the host, in NumPy: it compiles nothing.

The functions of ``blocks`` and those marked :func:`compiled` take arrays of NumPy and of
JAX alike. What was measured of a small network costs more to compile than to compute; on
the host only the products with its matrix are compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import trees

SMALL = 1 << 18  # numbers in a vector: beyond, compiling is not most of the time


def suits(tree):
    """Whether vectors like these concrete arrays are small, and on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves) <= SMALL and all(
        not isinstance(x, jax.core.Tracer) and _is_one(x.sharding) for x in leaves
    )


def _is_one(placed):
    return isinstance(placed, jax.sharding.SingleDeviceSharding)


def fetch(tree):
    """The arrays in NumPy; as they are where a trace has only begun with them.

    A loss may hold arrays that ``jax.vmap`` traces: its products are, nothing else is.
    """
    if trees.is_traced(tree):
        return tree
    return jax.tree.map(lambda x: np.asarray(x) if _is_here(x) else x, tree)


def _is_here(x):
    """Whether this process holds all of an array."""
    return getattr(x, "is_fully_addressable", True) or x.is_fully_replicated


def together(*given):
    """The same trees, all in JAX where one is traced, so that none in NumPy meets it."""
    if trees.is_traced(given):
        return jax.tree.map(jnp.asarray, given)
    return given


def send(tree, params):
    """The arrays in JAX, those of NumPy on the device of the parameters.

    They are put there, where asarray would compile.
    """
    if not any(namespace(x) is np for x in jax.tree.leaves(tree)):
        return tree
    # What is not committed to a device may be used with arrays of any other, or of many.
    placed = [x.sharding for x in jax.tree.leaves(params) if x.committed]
    device = next((x for x in placed if _is_one(x)), None)
    return jax.tree.map(lambda x: jax.device_put(x, device), tree)


def namespace(values):
    """``numpy`` for what is of NumPy, ``jax.numpy`` for all else."""
    return np if isinstance(values, np.ndarray | np.generic) else jnp


def compiled(function, **options):
    """``jax.jit`` of a function, which is called as it is for arrays of NumPy."""
    jitted, donates = jax.jit(function, **options), "donate_argnums" in options

    @functools.wraps(function)
    def call(*args):
        leaves = jax.tree.leaves(args)
        if not any(namespace(x) is np for x in leaves):
            # What is traced has no memory to give away.
            is_plain = donates and trees.is_traced(leaves)
            return (function if is_plain else jitted)(*args)
        with np.errstate(all="ignore"):  # as in JAX: what is not finite shows
            return function(*args)

    return call
