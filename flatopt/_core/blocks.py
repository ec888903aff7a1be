"""Algebra of blocks: trees whose leaves carry a leading axis of vectors.

Leaves keep their shapes and shardings: nothing is raveled into one long vector.
"""

import jax
import jax.numpy as jnp

from flatopt._core import trees

PRECISION = jax.lax.Precision.HIGHEST


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
    return jax.tree.map(lambda x, y: x.at[index].set(y.astype(x.dtype)), block, tree)


def zeros(params, count):
    return jax.tree.map(
        lambda p: jnp.zeros((count, *p.shape), trees.wide(p.dtype)), params
    )


def subtract(block, other):
    return jax.tree.map(jnp.subtract, block, other)


def dot(tree, other):
    """Inner product of two trees, in float32 or wider."""
    parts = jax.tree.map(
        lambda x, y: jnp.sum(trees.widen(x) * trees.widen(y)), tree, other
    )
    return sum(jax.tree.leaves(parts))


def gram(block, other):
    """All inner products: shape (rows of block, rows of other)."""

    def leaf_gram(x, y):
        axes = tuple(range(1, x.ndim))
        return jnp.tensordot(x, y, axes=(axes, axes), precision=PRECISION)

    return sum(jax.tree.leaves(jax.tree.map(leaf_gram, block, other)))


def combine(coefficients, block):
    """Linear combinations of rows; coefficients of shape (new rows, rows) or (rows,)."""
    return jax.tree.map(
        lambda x: jnp.tensordot(
            coefficients.astype(x.dtype), x, 1, precision=PRECISION
        ),
        block,
    )


def project_out(block, basis):
    """The rows of a block less their parts in the span of an orthonormal basis."""
    return subtract(block, combine(gram(block, basis), basis))


def orthonormalize(block):
    """An orthonormal block of the same span, with zeros for what depends on the rest.

    By the eigenvectors of the Gram matrix, twice: the first time leaves an error that
    grows with the condition number, the second time removes it.
    """
    for _ in range(2):
        products = gram(block, block)
        values, vectors = jnp.linalg.eigh(products)
        smallest = values[-1] * len(values) * 100 * jnp.finfo(values.dtype).eps
        keep = (values > smallest) & (values > 0)
        scales = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, values, 1.0)), 0.0)
        block = combine(scales[:, None] * vectors.T, block)
    return block
