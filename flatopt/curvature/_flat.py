"""Blocks of vectors from and to flat ones, by one program each.

Eagerly every leaf would compile programs of its own.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp

from flatopt._core import blocks

single = jax.jit(blocks.single)


@jax.jit
def first(block):
    """The first vector of a block."""
    return blocks.row(block, 0)


@jax.jit
def raveled(block):
    """A block as a matrix, in the order of ``jax.flatten_util.ravel_pytree``."""
    return jax.vmap(lambda row: jax.flatten_util.ravel_pytree(row)[0])(block)


@jax.jit
def unraveled(params, matrix):
    """Rows of a matrix as a block of vectors like the parameters."""
    return jax.vmap(jax.flatten_util.ravel_pytree(params)[1])(matrix)


@jax.jit
def unit_vectors(params):
    """The unit vectors as a block, in the order of ``jax.flatten_util.ravel_pytree``."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))
