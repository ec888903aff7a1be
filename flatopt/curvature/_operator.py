"""Curvature operators: products and quadratic forms over all data."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp

from flatopt import kernels
from flatopt._core import blocks, loops, streams, trees
from flatopt._core.sharding import block_shardings


@jax.tree_util.register_pytree_node_class
class Operator:
    """A symmetric matrix over a tree of parameters, known by its products.

    Made by :func:`hessian`, :func:`gauss_newton`, :func:`empirical_fisher` and
    :func:`gradient_covariance`. A pytree: parameters and a single batch are leaves, the
    functions are static, so that new parameters reuse compiled code.

    Attributes:
      like: the parameters, of the structure that vectors must have.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 3), jnp.array([1.0, 2.0]))
      >>> operator.matvec(jnp.array([1.0, 1.0]))
      Array([ 6., 12.], dtype=float32)
      >>> operator.quadratic_form(jnp.array([1.0, 1.0]))
      Array(18., dtype=float32)
      >>> operator.dense()
      Array([[ 6.,  0.],
             [ 0., 12.]], dtype=float32)
    """

    def __init__(self, kind, params, batch, stream, weight_fn):
        self.kind, self.like, self.weight_fn = kind, params, weight_fn
        self.batch, self.stream = batch, stream
        self.seen = None  # number of batches, weight and loss of the last pass

    def tree_flatten(self):
        """For JAX: leaves and static parts."""
        return (self.like, self.batch), (self.kind, self.stream, self.weight_fn)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        """For JAX: an operator from leaves and static parts."""
        kind, stream, weight_fn = static
        return cls(kind, *leaves, stream, weight_fn)

    def matvec(self, vector):
        """The product with a vector, a tree like the parameters; float32 or wider.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import curvature
          >>> curvature.hessian(lambda p: jnp.sum(p ** 2), jnp.ones(2)).matvec(jnp.ones(2))
          Array([2., 2.], dtype=float32)
        """
        vector = self._check_vector(vector)
        return blocks.row(products(self, blocks.single(vector)), 0)

    def quadratic_form(self, vector):
        """The product of a vector with the matrix and itself, without a backward pass.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import curvature
          >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 2), jnp.ones(2))
          >>> operator.quadratic_form(jnp.ones(2))
          Array(4., dtype=float32)
        """
        return quadratics(self, blocks.single(self._check_vector(vector)))[0]

    def dense(self):
        """The whole matrix, shape (d, d) in the order of ``jax.flatten_util.ravel_pytree``.

        For small problems: d at most 10,000.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import curvature
          >>> curvature.hessian(lambda p: p[0] * p[1], jnp.ones(2)).dense()
          Array([[0., 1.],
                 [1., 0.]], dtype=float32)
        """
        size = blocks.size(self.like)
        if size > 10_000:
            raise ValueError(
                f"dense needs at most 10,000 parameters, got {size:,}; use probe, "
                "eigenpairs or matvec."
            )
        flat, unravel = jax.flatten_util.ravel_pytree(self.like)
        block = jax.vmap(unravel)(jnp.eye(size, dtype=flat.dtype))
        rows = products(self, block)
        return jax.vmap(lambda row: jax.flatten_util.ravel_pytree(row)[0])(rows)

    def _check_vector(self, vector):
        shapes = jax.tree.map(jnp.shape, vector)
        if shapes != jax.tree.map(jnp.shape, self.like):
            raise ValueError(
                f"vector must have the structure and shapes of the parameters, got {shapes};"
                f" give one array for each of {jax.tree.map(jnp.shape, self.like)}."
            )
        return like_wide(vector, self.like)


def like_wide(vector, params):
    """A vector in float32, or as wide as the parameters."""
    return jax.tree.map(
        lambda v, p: jnp.asarray(v).astype(trees.wide(p.dtype)), vector, params
    )


def like_params(vector, params):
    return jax.tree.map(lambda v, p: jnp.asarray(v).astype(p.dtype), vector, params)


def add_weighted(total, weight, parts):
    parts = jax.tree.map(lambda x: weight.astype(x.dtype) * x, parts)
    return parts if total is None else jax.tree.map(jnp.add, total, parts)


@functools.partial(jax.jit, static_argnums=0)
def batch_products(kind, params, batch, block):
    value, shared, product = kind.linearize(params, batch)
    products = loops.map_rows(
        lambda v: product(like_params(v, params)), block, unroll=2
    )
    return value, blocks.widen(products), blocks.widen(shared)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_products(kind, total, params, batch, block, weight):
    parts = batch_products(kind, params, batch, block)
    return add_weighted(total, weight, parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def finish_products(kind, shardings, products, shared, block):
    products = kind.finish(products, shared, blocks.widen(block))
    if shardings is None:
        return products
    leaves, treedef = jax.tree.flatten(products)
    return treedef.unflatten(map(jax.lax.with_sharding_constraint, leaves, shardings))


def products(operator, block):
    """Products with every row of a block, one pass over the data."""
    kind, params = operator.kind, operator.like
    if operator.stream is None:
        _, found, shared = batch_products(kind, params, operator.batch, block)
    else:
        found, shared = sweep(operator, functools.partial(_add_products, kind), block)
    return finish_products(kind, block_shardings(params), found, shared, block)


def _given(row, basis, params):
    """A vector that is given."""
    del basis, params
    return row


def drawn(row, basis, params):
    """Random signs drawn from a key, less their part in the span of a basis."""
    kernel = kernels.isotropic(kernels.signs)
    return blocks.project_out(like_wide(kernel(row, params), params), basis)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_quadratics(kind, make, params, batch, rows, basis):
    def moments(row):
        vector = make(row, basis, params)
        return kind.quadratic(params, batch, like_params(vector, params))

    return blocks.widen(loops.map_rows(moments, rows, unroll=4))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add_quadratics(kind, make, total, params, batch, rows, basis, weight):
    loss, _, _ = kind.linearize(params, batch)
    parts = loss, _batch_quadratics(kind, make, params, batch, rows, basis)
    return add_weighted(total, weight, parts)


def quadratics(operator, rows, make=_given, basis=None):
    """Quadratic forms of vectors made from rows, shape (rows,), in one pass."""
    kind, params = operator.kind, operator.like
    if operator.stream is None:
        moments = _batch_quadratics(kind, make, params, operator.batch, rows, basis)
    else:
        add = functools.partial(_add_quadratics, kind, make)
        (moments,) = sweep(operator, add, rows, basis)
    return kind.finish_quadratic(moments)


def sweep(operator, add, *rows):
    """The weighted mean over all batches of what ``add`` sums up, after the loss."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((operator, rows))):
        raise TypeError(
            "data that is a re-iterable of batches is read on the host, got a call inside "
            "jax.jit; give one batch there, or call this outside."
        )
    total, count, weights = None, 0, 0.0
    name = type(operator.kind).__name__
    for batch, weight in streams.passes(operator.stream, operator.weight_fn, name):
        arguments = (operator.like, batch, *rows, jnp.float32(weight))
        if total is None:
            shapes = jax.eval_shape(functools.partial(add, None), *arguments)
            total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total = add(total, *arguments)
        count, weights = count + 1, weights + weight
    if not weights:
        raise ValueError(
            f"data must hold examples, got {count} batches of weight 0; give a loader that "
            "yields batches each time it is iterated."
        )
    loss, *means = jax.tree.map(lambda x: x / weights, total)
    found = count, weights, float(loss)
    streams.check_same(operator.seen, found)
    operator.seen = found
    return means
