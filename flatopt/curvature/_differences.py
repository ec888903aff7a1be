"""Products with the Hessian from differences of gradients, without second derivatives."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from flatopt._core import blocks, jaxprs, loops, risk, trees, vectors
from flatopt.curvature import _steps
from flatopt.curvature._kinds import Kind

NARROW = 1e-4  # the epsilon of dtypes of fewer digits than float32 is larger
SHARE = 0.25  # of eps^(1/3): what suits three small networks in float32 and bfloat16


@dataclasses.dataclass(frozen=True)
class FiniteDifferenceHessian(Kind):
    """The Hessian of the mean loss, by central differences of its gradient."""

    is_differenced: ClassVar[bool] = True
    loss_fn: Callable

    @property
    def batch_loss(self):
        return self.loss_fn

    def linearize(self, params, batch):
        return (
            self.loss(params, batch),
            (),
            _multiplication(*self._gradient(params, batch)),
        )

    def quadratic(self, params, batch, vector):
        _, _, product = self.linearize(params, batch)
        return (vectors.dot(vector, product(vector)),)

    def errors(self, params, batch, block, found):
        r"""Products whose distance tells the error of those found, and the least error.

        Each of the two gradients is off by half an epsilon of its entries, and no longer
        than :math:`\|g\| + h \|H v\|`. The difference over :math:`2 h` is off by

        .. math:: \epsilon\, (\|g\| / (2 h) + \|H v\| / 2)

        An entry of :math:`\theta \pm h v` is off by half an epsilon of the parameter, but
        never by more than it was to move: :math:`v` is off by at most
        :math:`\min(\epsilon |\theta_i| / (2 h), |v_i|)`. How much longer :math:`H` makes
        that is not known: as much, it is said, as the part of :math:`v` in the same leaf.

        A fit of differences at several steps knows what is left of its errors.
        """
        gradient, point, eps = self._gradient(params, batch)
        rounding = _rounding(gradient, point, eps)

        def least(pair):
            row, product = pair
            unit = blocks.unit(row)
            vector = blocks.divide(row, unit)
            step = _step(point, vector, eps)
            steps, weights, error = [step], [jnp.ones_like(step)], rounding / step
            if eps > NARROW:
                steps, (_, weights, error) = _fitted(
                    gradient, point, vector, step, rounding
                )
            shares = jax.tree.map(
                lambda p, v: _lost(p, v, steps, weights), point, vector
            )
            moved = vectors.norm(jax.tree.map(jnp.multiply, shares, product))
            told = unit * error + eps * vectors.norm(product) / 2 + moved
            return jnp.where(vectors.largest(vector) == 0, 0.0, told)

        block = blocks.widen(block)
        told = loops.map_rows(least, (block, found))
        if eps > NARROW:
            return found, told
        wider = _multiplication(gradient, point, eps, widening=2.0)
        return loops.map_rows(wider, block), told

    def _gradient(self, params, batch):
        """The gradient, where to take it, and the epsilon of its narrowest dtype."""
        # Rounding comes back over the step: products of matrices are to be exact here.
        with jax.default_matmul_precision("highest"):
            point, wide_batch = _widened(self.loss_fn, params, batch)
            gradient, jaxpr = jaxprs.trace(
                jax.grad(lambda p: risk.loss_of(self.loss_fn, p, wide_batch)), point
            )
        dtypes = jaxprs.float_dtypes(jaxpr)
        return gradient, point, max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def _multiplication(gradient, point, eps, widening=1.0):
    """The product as a function of the vector."""
    rounding = _rounding(gradient, point, eps) if eps > NARROW else None

    def multiply(vector):
        unit = blocks.unit(vector)
        vector = blocks.divide(vector, unit)
        step = widening * _step(point, vector, eps)
        if rounding is None:
            product = _difference(gradient, point, vector, step)
        else:
            _, (product, _, _) = _fitted(gradient, point, vector, step, rounding)
        return vectors.scale(unit, product)

    return multiply


def _rounding(gradient, point, eps):
    """What rounding may do to a difference at step 1, a norm."""
    return vectors.norm(blocks.widen(gradient(point))) * (eps / 2)


def _difference(gradient, point, vector, step):
    def side(sign):
        moved = vectors.move(point, vectors.scale(sign * step, vector))
        return blocks.widen(gradient(moved))

    # One after the other: both gradients take the memory of one.
    sides = loops.map_rows(side, jnp.array([1.0, -1.0], step.dtype))
    difference = blocks.subtract(blocks.row(sides, 0), blocks.row(sides, 1))
    return vectors.scale(1 / (2 * step), difference)


def _fitted(gradient, point, vector, step, rounding):
    """The steps of several differences, and what :func:`_steps.fit` makes of these."""
    steps = step * jnp.asarray(_steps.STEPS, step.dtype)
    rows = loops.map_rows(lambda h: _difference(gradient, point, vector, h), steps)
    return steps, _steps.fit(rows, rounding / step)


def _widened(loss_fn, params, batch):
    """Parameters and data in float32 or wider, where the loss takes them."""
    wide = jax.tree.map(_widen, (params, batch))
    try:
        jax.eval_shape(lambda p, b: risk.loss_of(loss_fn, p, b), *wide)
    except (TypeError, ValueError):  # the loss holds arrays of a narrow dtype itself
        return params, batch
    return wide


def _widen(leaf):
    is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return trees.widen(leaf) if is_floating else leaf


def _step(params, vector, eps):
    r"""The step at which errors of rounding and of the difference are about equal.

    The entries that make up the vector, by their weighted mean
    :math:`\|v\|^2 / \|v\|_1`, move by a share of the size of a parameter: the harmonic
    mean of the leaves' root mean squares, weighted by what of the vector is in each. So
    a leaf of large numbers sets no step for the others.
    """
    leaves = jax.tree.leaves(blocks.widen(params))
    dtype = jnp.result_type(jnp.float32, *leaves)
    moved = [jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(vector)]
    moved = jnp.stack([x.astype(dtype) for x in moved])
    sizes = jnp.stack([_root_mean_square(x).astype(dtype) for x in leaves])
    counts = jnp.asarray([x.size for x in leaves], dtype)
    size = _harmonic_mean(sizes, moved)
    size = jnp.where(size == 0, _harmonic_mean(sizes, counts), size)
    size = jnp.where(size == 0, 1.0, size)
    square, total = vectors.dot(vector, vector), jnp.sum(moved)
    move = jnp.where(total == 0, 1.0, square / jnp.where(total == 0, 1.0, total))
    least = 1e5 * jnp.finfo(dtype).tiny  # what is less may be flushed to zero
    return jnp.maximum(SHARE * eps ** (1 / 3) * size / move, least)


def _lost(param, vector, steps, weights):
    """The share of a leaf's moves, by their length, that rounding of the parameter may take."""
    half = jnp.abs(trees.widen(param)) * float(jnp.finfo(param.dtype).eps / 2)
    length = vectors.norm(vector)
    length = jnp.where(length == 0, 1.0, length)

    def share(step):
        lost = jnp.minimum(half / step.astype(vector.dtype), jnp.abs(vector))
        return (vectors.norm(lost) / length).astype(lost.dtype)

    shares = [share(step) for step in steps]
    return sum(
        jnp.abs(weight).astype(x.dtype) * x
        for weight, x in zip(weights, shares, strict=True)
    )


def _root_mean_square(x):
    largest = jnp.max(jnp.abs(x), initial=0.0)
    unit = jnp.where(largest == 0, 1.0, largest)
    return largest * jnp.sqrt(jnp.sum((x / unit) ** 2) / max(x.size, 1))


def _harmonic_mean(sizes, weights):
    """Of the sizes that are not zero; 0 where none has a weight."""
    weights = jnp.where(sizes > 0, weights, 0.0)
    inverses = jnp.sum(weights / jnp.where(sizes > 0, sizes, 1.0))
    return jnp.where(inverses > 0, jnp.sum(weights) / inverses, 0.0)
