"""Extreme eigenvalues at a fixed number of products, inside jit and vmap."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import blocks, checks, loops, random, vectors
from flatopt._core.sharding import lay_out, placement_of
from flatopt._core.types import SpectrumEnd
from flatopt.curvature._draws import normal_like
from flatopt.curvature._krylov import check_eigen, noise_of
from flatopt.curvature._lanczos import Eigenpairs, residuals_of, rounding_of
from flatopt.curvature._operator import (
    Errors,
    Operator,
    cast_for,
    check_once,
    errors_beyond,
)
from flatopt.curvature._probes import check_finite

PASSES = 2  # of orthogonalization; what is added anew went through one before


def block_lanczos(
    operator: Operator,
    key: jax.Array,
    k: int = 1,
    *,
    num_steps: int = 24,
    which: SpectrumEnd = "largest",
) -> Eigenpairs:
    r"""Extreme eigenpairs at a fixed cost, inside ``jax.jit`` and ``jax.vmap``.

    Block Lanczos with full reorthogonalization from ``k`` random vectors: the best pairs
    of the matrix projected on the span of :math:`Q, H Q, \dots, H^{m - 1} Q` with
    :math:`m` = ``num_steps``. A block of ``k`` sees ``k`` copies of a repeated eigenvalue,
    where one vector sees one. A direction that adds nothing to the span, as all do once
    the span is invariant, gives way to a random one.

    For many small networks as one program; for one network :func:`eigenpairs` goes on
    until its bounds are met, restarts, and looks for copies that are missing.

    Cost: ``k * num_steps`` products, at most one for each parameter, and ``k`` for the
    residuals; 2 gradients each. Memory: ``k * num_steps`` vectors.

    Args:
      operator: the matrix, on one batch or without data.
      key: a JAX random key, for the start vectors.
      k: number of eigenpairs and of vectors in a block, at most the number of parameters.
      num_steps: number of blocks.
      which: "largest", "smallest" (of the signed values) or "magnitude".

    Returns:
      :class:`Eigenpairs`. Look at the residuals: nothing else tells whether
      ``num_steps`` was enough, and they bound the distance to *some* eigenvalue, so that
      one may be missing. ``is_complete`` is True where the blocks hold the whole space.

    Raises:
      ValueError: for streamed data, more pairs than parameters, an unknown ``which``, and
        outside of ``jax.jit`` for a curvature that is not finite.

    References:
      Golub, Underwood, The Block Lanczos Method for Computing Eigenvalues, 1977; one
      vector at a time as in Ruhe, `Implementation Aspects of Band Lanczos Algorithms
      <https://doi.org/10.1090/S0025-5718-1979-0521282-9>`_, Math. Comp. 1979.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> def largest(scale):
      ...     operator = curvature.hessian(lambda p: scale * jnp.sum(p**2), jnp.ones(4))
      ...     return curvature.block_lanczos(operator, jax.random.key(0), 2).values
      >>> jax.jit(jax.vmap(largest))(jnp.array([1.0, 2.0, 3.0])).round()
      Array([[2., 2.],
             [4., 4.],
             [6., 6.]], dtype=float32)
    """
    size = check_eigen(operator, key, k, which)
    checks.check_count(num_steps, "num_steps")
    if operator.stream is not None:
        raise ValueError(
            "operator must be on one batch for block_lanczos, got a re-iterable of "
            "batches; use curvature.eigenpairs."
        )
    check_once(operator, key)
    columns = min(k * num_steps, size)
    placement = placement_of(operator.like)
    method = _BlockLanczos(operator.kind, k, k, columns, which, placement)
    values, vectors, residuals = operator.risk.mean(method, key)
    check_finite(operator, values[0])
    return Eigenpairs(values, vectors, residuals, is_complete=columns == size)


@dataclasses.dataclass(frozen=True)
class _BlockLanczos:
    """Eigenpairs of the matrix of one batch."""

    kind: Any
    count: int  # of pairs
    block: int  # of start vectors
    columns: int
    which: str
    placement: Any  # of the parameters, see sharding.placement_of

    def __call__(self, params, batch, key):
        """``(loss, (values, vectors, residuals))``."""
        loss, multiply = _multiplication(self.kind, params, batch)
        normal = normal_like(params)
        draw = lambda index: normal(random.fold_in(key, index))  # noqa: E731
        basis = self._start(params, draw)
        basis, projection, unit = self._grow(basis, multiply, draw)
        ritz, coefficients = jnp.linalg.eigh(projection)
        order = _order(ritz, self.which)[: self.count]
        rows = blocks.combine(coefficients[:, order].T, basis)
        found = loops.map_rows(multiply, rows)
        values, _, residuals, units = residuals_of(rows, found)
        allowed = rounding_of(params, ritz.dtype) * unit * jnp.max(jnp.abs(ritz))
        if self.kind.is_differenced:
            _, told = Errors(self.kind)(params, batch, rows, found)
            allowed = allowed + errors_beyond(found, *told)
        return loss, (units * values, rows, units * residuals + allowed)

    def _start(self, params, draw):
        """An orthonormal block of random vectors, in a basis with room for all."""
        basis = lay_out(blocks.zeros(params, self.columns), params, self.placement)

        def add(index, basis):
            return blocks.set_row(basis, index, _direction(draw(index), basis))

        return loops.repeat(add, basis, self.block)

    def _grow(self, basis, multiply, draw):
        """The basis, and the matrix projected on it in units of a power of two.

        Products come in units of their own, so that squares stay within float32.
        """
        size, noise = self.columns, noise_of(basis)
        zero = _length(blocks.row(basis, 0))

        def step(index, state):
            basis, projection, units, scale = state
            found = multiply(blocks.row(basis, index))
            unit = blocks.unit(found)
            found = blocks.divide(found, unit)
            inside = blocks.gram(blocks.single(found), basis)[0]
            rest = blocks.subtract(found, blocks.combine(inside, basis))
            length = _length(found)
            scale = jnp.maximum(scale, unit * length)
            place = index + self.block
            adds = unit * _length(rest) > noise * scale
            rest = jax.tree.map(lambda x, y: jnp.where(adds, x, y), rest, draw(place))
            rest = _direction(rest, basis)
            basis = jax.tree.map(  # beyond the last place nothing is kept
                lambda b, x: b.at[place].set(x, mode="drop"), basis, rest
            )
            projection = projection.at[:, index].set(inside)
            units = units.at[index].set(jnp.where(length == 0, 0.0, unit))
            return basis, projection, units, scale

        zeros = jnp.zeros((size, size), zero.dtype)
        start = basis, zeros, jnp.zeros(size, zero.dtype), zero - zero
        basis, projection, units, _ = loops.repeat(step, start, size)
        unit = jnp.max(units)  # zeros set no scale
        unit = jnp.where(unit == 0, 1.0, unit)
        # A column is known down to its own row: later ones were not yet there.
        upper = jnp.triu(projection * (units / unit)[None])
        return basis, upper + jnp.triu(upper, 1).T, unit


def _multiplication(kind, params, batch):
    """The loss of a batch, and a function that multiplies a vector with its matrix."""
    loss, shared, product = kind.linearize(params, batch)
    shared = blocks.widen(shared)

    def multiply(vector):
        found = blocks.widen(product(cast_for(kind, vector, params)))
        found = kind.finish(blocks.single(found), shared, blocks.single(vector))
        return blocks.row(found, 0)

    return loss, multiply


def _length(tree):
    return jnp.sqrt(vectors.dot(tree, tree))


def _direction(tree, basis):
    """The direction of what lies beyond an orthonormal basis."""
    for _ in range(PASSES):
        tree = blocks.row(blocks.project_out(blocks.single(tree), basis), 0)
        tree = vectors.normalize(tree)[0]
    return tree


def _order(values, which):
    """Places from the wanted end inwards."""
    if which == "largest":
        return jnp.argsort(-values)
    return jnp.argsort(values if which == "smallest" else -jnp.abs(values))
