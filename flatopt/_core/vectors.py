"""Algebra of parameter trees as vectors: norms, steps, projections."""

import jax
import jax.numpy as jnp

from flatopt._core import blocks, host, trees


def normalize(tree):
    """The tree over its norm, and the norm; zero at zero, and so are its derivatives.

    Scaled by the largest entry first, so that squares of tiny ones do not underflow; the
    results do not depend on that scale, and so are differentiated without it.
    """
    scaled, unit, length = _scaled(tree)
    return jax.tree.map(lambda x: x / unit.astype(x.dtype), scaled), length


def norm(tree):
    """The norm alone, of numbers of any size; nothing of the tree's size is stored."""
    return _scaled(tree)[2]


def _scaled(tree):
    """The tree over its largest entry, the norm of that (1 for 0), and the tree's own."""
    largest = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    dtype = jnp.float64 if jnp.float64 in [x.dtype for x in largest] else jnp.float32
    top = jnp.max(jnp.stack([x.astype(dtype) for x in largest])) if largest else 0.0
    # Numbers below the least normal one may be flushed to zero in a division.
    top = jax.lax.stop_gradient(jnp.where(top < jnp.finfo(dtype).tiny, 0.0, top))
    divisor = jnp.where(top == 0, jnp.finfo(dtype).max, top)
    scaled = jax.tree.map(lambda x: (x.astype(dtype) / divisor).astype(x.dtype), tree)
    square = dot(scaled, scaled)
    unit = jnp.sqrt(jnp.where(square == 0, 1.0, square))
    length = jnp.where(square == 0, 0.0, unit)
    return scaled, unit, length * top


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
