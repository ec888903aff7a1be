"""Algebra of blocks: trees whose leaves carry a leading axis of vectors.

Leaves keep their shapes and shardings: nothing is raveled into one long vector. They are
arrays of JAX, or of NumPy (see ``host``).
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import host, sharding, trees

PRECISION = jax.lax.Precision.HIGHEST


def power_of_two(values, axis=None, keepdims=False):
    """The power of two at or below the largest magnitude; 1 where all is zero.

    A product with it is exact. Not a number and infinity stay.
    """
    xp = host.namespace(values)
    top = xp.max(xp.abs(values), axis=axis, keepdims=keepdims, initial=0.0)
    limits = xp.finfo(values.dtype)
    word = {16: xp.uint16, 32: xp.uint32, 64: xp.uint64}[limits.bits]
    # The bits of the exponent: all but those of the mantissa and the sign.
    exponent = (1 << limits.bits - 1) - (1 << limits.nmant)
    power = (top.view(word) & word(exponent)).view(top.dtype)
    # Within the normal numbers, on both sides of one.
    least = 2.0 ** (limits.minexp + 1)
    power = xp.clip(power, least, 1 / least)
    return xp.where((top == 0) | ~xp.isfinite(top), xp.ones_like(top), power)


def unit(tree):
    """The power of two at or below the largest magnitude in a tree, in its widest dtype."""
    leaves = jax.tree.leaves(tree)
    xp = host.namespace(leaves[0])
    tops = [xp.max(xp.abs(trees.widen(x)), initial=0.0) for x in leaves]
    dtype = jnp.float64 if jnp.float64 in [x.dtype for x in tops] else jnp.float32
    return power_of_two(xp.stack([x.astype(dtype) for x in tops]))


def divide(tree, scalar):
    return jax.tree.map(lambda x: x / scalar.astype(x.dtype), tree)


def row_units(block):
    """The power of two at or below the largest magnitude of each row, shape (rows,)."""
    leaves = jax.tree.leaves(block)
    if host.namespace(leaves[0]) is np:
        return np.stack([unit(row(block, index)) for index in range(len(leaves[0]))])
    return jax.vmap(unit)(block)


def divide_rows(block, numbers):
    """Each row over its own number."""
    return jax.tree.map(
        lambda x: x / numbers.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)), block
    )


def size(tree):
    """Number of values in a tree."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def widen(tree):
    return jax.tree.map(lambda x: trees.widen(jnp.asarray(x)), tree)


def single(tree):
    """A tree as a block of one vector."""
    return jax.tree.map(lambda x: x[None], tree)


def row(block, index):
    return jax.tree.map(lambda x: x[index], block)


def set_row(block, index, tree):
    def replaced(x, y):
        if host.namespace(x) is np:
            return np.concatenate([x[:index], y[None].astype(x.dtype), x[index + 1 :]])
        return x.at[index].set(y.astype(x.dtype))

    return jax.tree.map(replaced, block, tree)


def zeros(params, count, xp=jnp):
    """A block of zeros; concrete parameters say on which devices each row lies."""
    if xp is np:
        return jax.tree.map(
            lambda p: np.zeros((count, *p.shape), trees.wide(p.dtype)), params
        )
    leaves, treedef = jax.tree.flatten(params)
    placement = sharding.placement_of(params)
    devices = [None] * len(leaves)
    if isinstance(placement, tuple):  # no device ever holds a whole one
        devices = [sharding.with_rows(s, 1) for s in placement]
    found = [
        jnp.zeros((count, *p.shape), trees.wide(p.dtype), device=device)
        for p, device in zip(leaves, devices, strict=True)
    ]
    block = treedef.unflatten(found)
    if placement == sharding.ALIKE:
        return sharding.lay_out(block, params, placement)
    return block


def subtract(block, other):
    return jax.tree.map(operator.sub, block, other)


def gram(block, other):
    """All inner products: shape (rows of block, rows of other)."""

    def leaf_gram(x, y):
        axes = tuple(range(1, x.ndim))
        if host.namespace(x) is np:
            return np.tensordot(x, y, axes=(axes, axes))
        return jnp.tensordot(x, y, axes=(axes, axes), precision=PRECISION)

    return sum(jax.tree.leaves(jax.tree.map(leaf_gram, block, other)))


def combine(coefficients, block):
    """Linear combinations of rows; coefficients of shape (new rows, rows) or (rows,)."""

    def combined(x):
        weights = coefficients.astype(x.dtype)
        if host.namespace(x) is np:
            return np.tensordot(weights, x, 1)
        return jnp.tensordot(weights, x, 1, precision=PRECISION)

    return jax.tree.map(combined, block)


def project_out(block, basis):
    """The rows of a block less their parts in the span of an orthonormal basis."""
    return subtract(block, combine(gram(block, basis), basis))


def orthonormalize(block):
    """An orthonormal block of the same span, with zeros for what depends on the rest.

    By the eigenvectors of the Gram matrix, twice: the first time leaves an error that
    grows with the condition number, the second time removes it.
    """
    block = divide(block, unit(block))
    for _ in range(2):
        products = gram(block, block)
        xp = host.namespace(products)
        values, vectors = xp.linalg.eigh(products)
        smallest = values[-1] * len(values) * 100 * jnp.finfo(values.dtype).eps
        keep = (values > smallest) & (values > 0)
        scales = xp.where(keep, 1 / xp.sqrt(xp.where(keep, values, 1.0)), 0.0)
        block = combine(scales[:, None] * vectors.T, block)
    return block
