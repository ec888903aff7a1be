"""Curvature operators: products and quadratic forms over all data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from flatopt import kernels
from flatopt._core import blocks, jaxprs, loops, trees
from flatopt._core.sharding import lay_out, placement_of
from flatopt._core.types import Params, ParamsT
from flatopt.curvature._flat import first, raveled, single, unit_vectors, unraveled

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@jax.tree_util.register_pytree_node_class
class Operator:
    """A symmetric matrix over a tree of parameters, known by its products.

    Made by :func:`hessian`, :func:`finite_difference_hessian`, :func:`gauss_newton`,
    :func:`empirical_fisher` and :func:`gradient_covariance`. A pytree: parameters and a
    single batch are leaves, the functions are static, so that new parameters reuse
    compiled code.

    Attributes:
      like: the parameters, of the structure that vectors must have; with a mask those it
        names, None in place of the others.

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

    def __init__(self, kind, risk):
        self.kind, self.risk = kind, risk
        self.is_checked = False  # whether the kind has looked at a batch
        self.reference = ()  # the mean gradient of the first of many batches, if needed

    @property
    def like(self) -> Params:
        """The parameters."""
        return self.risk.params

    @property
    def batch(self):
        """The data, where they are one batch."""
        return self.risk.batch

    @property
    def stream(self):
        """The data, where they are many batches."""
        return self.risk.stream

    def tree_flatten(self):
        """For JAX: leaves and static parts."""
        return (self.risk,), self.kind

    @classmethod
    def tree_unflatten(cls, kind, leaves):
        """For JAX: an operator from leaves and static parts."""
        return cls(kind, *leaves)

    def matvec(self, vector: ParamsT) -> ParamsT:
        """The product with a vector, a tree like the parameters; float32 or wider.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import curvature
          >>> curvature.hessian(lambda p: jnp.sum(p ** 2), jnp.ones(2)).matvec(jnp.ones(2))
          Array([2., 2.], dtype=float32)
        """
        block = single(self._check_vector(vector))
        return first(products(self, block))

    def product_error(self, vector: ParamsT) -> jax.Array:
        r"""The estimated length of the error of :meth:`matvec`, shape ().

        For :func:`finite_difference_hessian` in float32 twice how far the product moves when
        its step :math:`h` is doubled; in fewer digits 4 standard deviations of what is
        fitted. Never less than what rounding may cause: that of the two gradients,
        :math:`\epsilon\, (\|g\| / (2 h) + \|H v\| / 2)`, and that of the two points,
        :math:`\epsilon |\theta_i| / (2 h)` of each entry of :math:`v`, stretched as
        :math:`v` is. 0 for the other operators, whose products have errors of rounding alone.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import curvature
          >>> operator = curvature.finite_difference_hessian(
          ...     lambda p: jnp.sum(jnp.exp(p)), jnp.ones(2))
          >>> vector = jnp.array([1.0, 1.0])
          >>> bool(operator.product_error(vector) < 1e-3)
          True
        """
        block = single(self._check_vector(vector))
        return product_errors(self, block, products(self, block))[0]

    def quadratic_form(self, vector: Params) -> jax.Array:
        """The product of a vector with the matrix and itself.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import curvature
          >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 2), jnp.ones(2))
          >>> operator.quadratic_form(jnp.ones(2))
          Array(4., dtype=float32)
        """
        return quadratics(self, single(self._check_vector(vector)))[0]

    def dense(self) -> jax.Array:
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
        return raveled(products(self, unit_vectors(self.like)))

    def flat(self) -> tuple[Callable[[jax.Array], jax.Array], jax.ShapeDtypeStruct]:
        """The matrix as a function of flat vectors, as other libraries of JAX take it.

        Returns:
          ``(product, like)``: a function of a vector of shape (d,), in the order of
          ``jax.flatten_util.ravel_pytree``, and the shape and dtype of such vectors. For
          lineax: ``lineax.FunctionLinearOperator(*operator.flat(), tags)``; matfree and
          laplax take ``product``.

        Example:
          >>> import jax.numpy as jnp
          >>> from flatopt import curvature
          >>> operator = curvature.hessian(lambda p: jnp.sum(p["w"] ** 2), {"w": jnp.ones(2)})
          >>> product, like = operator.flat()
          >>> product(jnp.ones(like.shape))
          Array([2., 2.], dtype=float32)
        """
        wide = like_wide(self.like, self.like)
        start, unravel = jax.flatten_util.ravel_pytree(wide)

        def product(vector):
            return jax.flatten_util.ravel_pytree(self.matvec(unravel(vector)))[0]

        return product, jax.ShapeDtypeStruct(start.shape, start.dtype)

    def to_scipy(self) -> "LinearOperator":
        """A ``scipy.sparse.linalg.LinearOperator``, for its solvers and eigensolvers.

        Example:
          >>> import jax.numpy as jnp, scipy.sparse.linalg
          >>> from flatopt import curvature
          >>> operator = curvature.hessian(
          ...     lambda p: jnp.sum(jnp.arange(5.0) * p ** 2), jnp.ones(5))
          >>> values = scipy.sparse.linalg.eigsh(
          ...     operator.to_scipy(), k=1, return_eigenvectors=False)
          >>> round(float(values[0]), 3)
          8.0
        """
        return _scipy_operator(self)

    def _check_vector(self, vector):
        shapes = jax.tree.map(jnp.shape, vector)
        if shapes != jax.tree.map(jnp.shape, self.like):
            raise ValueError(
                f"vector must have the structure and shapes of the parameters, got {shapes};"
                f" give one array for each of {jax.tree.map(jnp.shape, self.like)}."
            )
        return like_wide(vector, self.like)


def _scipy_operator(operator):
    import scipy.sparse.linalg  # slow to import

    wide = like_wide(operator.like, operator.like)
    flat, _ = jax.flatten_util.ravel_pytree(wide)

    def matmat(matrix):
        block = unraveled(wide, jnp.asarray(matrix.T, flat.dtype))
        return np.asarray(raveled(products(operator, block))).T

    def matvec(vector):
        return matmat(np.reshape(vector, (-1, 1)))[:, 0]

    return scipy.sparse.linalg.LinearOperator(
        2 * flat.shape,
        matvec=matvec,
        rmatvec=matvec,
        matmat=matmat,
        rmatmat=matmat,
        dtype=flat.dtype,
    )


def like_wide(vector, params):
    """A vector in float32, or as wide as the parameters."""
    return jax.tree.map(
        lambda v, p: jnp.asarray(v).astype(trees.wide(p.dtype)), vector, params
    )


def like_params(vector, params):
    return jax.tree.map(lambda v, p: jnp.asarray(v).astype(p.dtype), vector, params)


def cast_for(kind, vector, params):
    """A vector in the dtypes in which a kind takes it."""
    return (like_wide if kind.is_differenced else like_params)(vector, params)


@dataclasses.dataclass(frozen=True)
class Products:
    """Products with the matrix of one batch, and what finishing them needs."""

    kind: Any
    placement: Any = None  # of the parameters, see sharding.placement_of

    @property
    def has_free_loss(self):
        """Whether products have computed the loss anyway."""
        return not self.kind.is_differenced

    def __call__(self, params, batch, block, reference=()):
        """``(loss, (products, shared))``."""
        loss, shared, product = self.kind.linearize(params, batch, *reference)

        def placed(vector):
            found = product(cast_for(self.kind, vector, params))
            return lay_out(found, params, self.placement)

        unroll = 1 if self.kind.is_differenced else 2
        found = loops.map_rows(placed, block, unroll)
        if jax.tree.leaves(shared):
            shared = lay_out(blocks.widen(shared), params, self.placement)
        return loss, (blocks.widen(found), shared)


def finish_products(kind, placement, params, products, shared, block):
    """The products of all data; those that share nothing are finished."""
    if not jax.tree.leaves(shared):
        return products
    return _finish(kind, placement, params, products, shared, block)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finish(kind, placement, params, products, shared, block):
    products = kind.finish(products, shared, blocks.widen(block))
    return lay_out(products, params, placement)


def check_once(operator, rows):
    if operator.is_checked or trees.is_traced((operator, rows)):
        return
    operator.is_checked = True
    kind, batch = operator.kind, operator.batch
    if batch is not None:
        batch = operator.risk.given(batch)
    if operator.stream is not None and kind.looks_at_data:
        batch, _ = next(operator.risk.batches("first batch"), (None, 0.0))
    if batch is None:
        return
    kind.check(operator.like, batch)
    if operator.stream is not None and kind.is_centered:
        operator.reference = (_mean_gradient(kind, operator.like, batch),)


@functools.partial(jax.jit, static_argnums=0)
def _mean_gradient(kind, params, batch):
    return kind.mean_gradient(params, batch)


def products(operator, block):
    """Products with every row of a block, one pass over the data."""
    check_once(operator, block)
    kind, params = operator.kind, operator.like
    placement = placement_of(params)
    function = Products(kind, placement)
    found, shared = operator.risk.mean(function, block, operator.reference)
    return finish_products(kind, placement, params, found, shared, block)


def product_errors(operator, block, found):
    """Estimated norms of the errors of products found, shape (rows,); 0 for rounding."""
    if not operator.kind.is_differenced:
        return jnp.zeros(len(jax.tree.leaves(block)[0]))
    function = Errors(operator.kind, placement_of(operator.like))
    return errors_beyond(found, *operator.risk.mean(function, block, found))


@dataclasses.dataclass(frozen=True)
class Errors:
    """What tells the errors of products with one batch, where not of rounding alone."""

    kind: Any
    placement: Any = None  # of the parameters, see sharding.placement_of

    def __call__(self, params, batch, block, found):
        """``(loss, (products at other steps, least errors))``."""
        others, least = self.kind.errors(params, batch, block, found)
        loss = self.kind.loss(params, batch)
        return loss, (lay_out(others, params, self.placement), least)


def errors_beyond(found, others, least):
    """Errors of products, told by those of a coarser kind.

    Where the error is of the difference the other product has four times it; where it is
    rounding, half of it and another one: twice the distance is beyond both. By chance the
    two may round alike: what rounding may do is the least.
    """
    return jnp.maximum(2 * distances(found, others), least)


@jax.jit
def distances(block, other):
    """The Euclidean distance of each row to that of the other block, shape (rows,)."""
    rest = blocks.subtract(block, other)
    units = blocks.row_units(rest)
    rest = blocks.divide_rows(rest, units)
    return units * jnp.sqrt(jnp.diagonal(blocks.gram(rest, rest)))


def _given(row, basis, params):
    """A vector that is given."""
    del basis, params
    return row


def drawn(row, basis, params):
    """Random signs drawn from a key, less their part in the span of a basis."""
    kernel = kernels.isotropic(kernels.signs)
    signs = blocks.single(like_wide(kernel(row, params), params))
    return blocks.row(blocks.project_out(signs, basis), 0)


@dataclasses.dataclass(frozen=True)
class Quadratics:
    """Quadratic forms on one batch of vectors that ``make`` makes from rows."""

    kind: Any
    make: Callable
    placement: Any = None  # of the parameters, see sharding.placement_of

    def __call__(self, params, batch, rows, basis, reference=()):
        """``(loss, moments)``."""
        loss = self.kind.loss(params, batch)

        def moments(row):
            vector = self.make(row, basis, params)
            vector = cast_for(self.kind, vector, params)
            vector = lay_out(vector, params, self.placement)
            return self.kind.quadratic(params, batch, vector, *reference)

        unroll = 1 if self.kind.is_differenced else 4
        if unroll > 1 and len(jax.tree.leaves(rows)[0]) > 1:
            moments = jaxprs.once(moments, blocks.row(rows, 0))
        return loss, blocks.widen(loops.map_rows(moments, rows, unroll))


def quadratics(operator, rows, make=_given, basis=None):
    """Quadratic forms of vectors made from rows, shape (rows,), in one pass."""
    check_once(operator, rows)
    kind = operator.kind
    arguments = rows, basis, operator.reference
    function = Quadratics(kind, make, placement_of(operator.like))
    return kind.finish_quadratic(operator.risk.mean(function, *arguments))
