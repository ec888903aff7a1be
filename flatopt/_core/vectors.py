"""Algebra of parameter trees as vectors: norms, steps, projections."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flatopt._core import blocks, host, loops, trees


class Size(NamedTuple):
    """How long a tree is, in numbers that neither underflow nor overflow.

    Attributes:
      unit: a power of two; 1 for most trees on CPU.
      square: the sum of squares of the tree over its unit.
    """

    unit: jax.Array
    square: jax.Array


def size(tree):
    """The :class:`Size` of a tree, from one pass over it on CPU unless it is extreme."""
    square = dot(tree, tree)
    limits = [jnp.finfo(trees.wide(x.dtype)) for x in jax.tree.leaves(tree)]
    limits = min(limits, key=lambda x: x.bits, default=jnp.finfo(jnp.float32))
    # What underflows is then nothing beside errors of rounding, even in the squares of a
    # part that is no longer than these.
    least = float(limits.tiny) * blocks.size(tree) / float(limits.eps) ** 3

    def scaled():
        top = jax.lax.stop_gradient(largest(tree))
        # Numbers below the least normal one may be flushed to zero in a product.
        is_none = top < jnp.finfo(top.dtype).tiny
        unit = jnp.where(is_none, 1.0, blocks.power_of_two(top))
        parts = divide(tree, unit)
        return unit, dot(parts, parts)

    return Size(
        *loops.usually(
            (square > least) & (square < jnp.inf),
            lambda: (jnp.ones_like(square), square),
            scaled,
        )
    )


def length(size):
    """The norm of a tree from its size; zero at zero, and so are its derivatives."""
    is_zero = size.square == 0
    root = jnp.sqrt(jnp.where(is_zero, 1.0, size.square))
    return jnp.where(is_zero, 0.0, root) * size.unit


def direction(tree, size):
    """A tree of a size over its norm; zero at zero, and so are its derivatives."""
    is_zero = size.square == 0
    root = jnp.sqrt(jnp.where(is_zero, 1.0, size.square))
    return _times(divide(tree, size.unit), jnp.where(is_zero, 0.0, 1 / root))


def divide(tree, unit):
    """A tree over a power of two, as a product, which XLA does again rather than store."""
    return _times(tree, 1 / unit)


def _times(tree, factor):
    """The tree times a number that may lie outside of the range of its dtypes."""
    return jax.tree.map(
        lambda x: (x.astype(factor.dtype) * factor).astype(x.dtype), tree
    )


def product(tree, unit, other, other_unit):
    """Inner product of two trees over their units; nothing of their size is stored."""
    return loops.usually(
        (unit == 1) & (other_unit == 1),
        lambda: dot(tree, other),
        lambda: dot(divide(tree, unit), divide(other, other_unit)),
    )


def normalize(tree):
    """The tree over its norm, and the norm; zero at zero, and so are its derivatives."""
    own = size(tree)
    return direction(tree, own), length(own)


def norm(tree):
    """The norm alone, of numbers of any size; nothing of the tree's size is stored."""
    return length(size(tree))


def rounding_unit(dtype):
    """Relative error to expect of a gradient in a dtype.

    Gradients are rounded to the dtype of the parameters, and sums inside of them to
    float32 or wider, where errors of up to two units were seen: four are allowed.
    """
    own, wide = jnp.finfo(dtype).eps, jnp.finfo(trees.wide(dtype)).eps
    return max(float(own), 4 * float(wide))


def largest(tree):
    """The largest magnitude in a tree, float32 or wider; zero for none."""
    parts = [
        trees.widen(jnp.max(jnp.abs(x), initial=0.0)) for x in jax.tree.leaves(tree)
    ]
    dtype = jnp.float64 if jnp.float64 in [x.dtype for x in parts] else jnp.float32
    return jnp.max(jnp.stack([jnp.zeros((), dtype), *[x.astype(dtype) for x in parts]]))


def dot(tree, other):
    """Inner product of two trees, in float32 or wider."""
    products = jax.tree.map(
        lambda x, y: host.namespace(x).sum(trees.widen(x) * trees.widen(y)), tree, other
    )
    parts = jax.tree.leaves(products)
    dtype = jnp.float64 if jnp.float64 in [x.dtype for x in parts] else jnp.float32
    xp = host.namespace(parts[0]) if parts else jnp
    return sum((x.astype(dtype) for x in parts), xp.zeros((), dtype))


def scale(factor, tree):
    return jax.tree.map(lambda x: jnp.asarray(factor).astype(x.dtype) * x, tree)


def add(tree, factor, other):
    return jax.tree.map(jnp.add, tree, scale(factor, other))


def ascent(grads, rho):
    """The step of length rho along the gradient."""
    return scale(rho, normalize(grads)[0])


def scaled_ascent(grads, sizes, rho):
    """The step rho T^2 g / |T g| in units of the sizes T.

    Linear in T: sizes near one keep the products from vanishing and from overflowing.
    """
    unit = jax.lax.stop_gradient(blocks.power_of_two(largest(sizes)))
    sizes = blocks.divide(sizes, unit)
    direction, _ = normalize(jax.tree.map(jnp.multiply, sizes, grads))
    step = scale(rho, jax.tree.map(jnp.multiply, sizes, direction))
    return jax.tree.map(lambda x: x * unit.astype(x.dtype), step)


def orthogonal(tree, other):
    """The part of a tree that is orthogonal to another."""
    direction, _ = normalize(other)
    return add(tree, -dot(tree, direction), direction)


def move(params, step):
    return jax.tree.map(
        lambda p, e: (trees.widen(p) + e.astype(trees.wide(p.dtype))).astype(p.dtype),
        params,
        step,
    )
