"""Norms of a population's matrix from batches that are samples of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, checks, streams
from flatopt._core.estimates import Estimate
from flatopt._core.sharding import placement_of
from flatopt.curvature._draws import draw_signs, probe_keys
from flatopt.curvature._moments import root_of
from flatopt.curvature._operator import Operator, Products, finish_products
from flatopt.curvature._probes import GROUP, check_finite, check_probes


def population_frobenius_norm(
    operator: Operator, key: jax.Array, num_probes: int = 32
) -> Estimate:
    r"""The Frobenius norm of the mean matrix of which batches are independent samples.

    :math:`E\|H_B v\|^2` on sampled batches exceeds :math:`\|H v\|^2` by the variance
    between batches. Products of different batches do not:

    .. math:: \|H\|_F^2 = E\, \frac{\|\sum_b w_b H_b v\|^2 - \sum_b w_b^2 \|H_b v\|^2}
        {(\sum_b w_b)^2 - \sum_b w_b^2}

    For data that is a sample of what is meant, such as some batches of a large data set;
    on all data use :func:`probe`. The standard error is that of the probes for these
    batches; other batches would give another value.

    Args:
      operator: a matrix on a re-iterable of at least two batches.
      key: a JAX random key.
      num_probes: number of random vectors, at least 2.

    Returns:
      An :class:`Estimate`; its value is 0 where the estimated square is negative.

    Raises:
      ValueError: for a single batch.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> def loss_fn(params, batch):
      ...     return jnp.mean(batch * params ** 2)
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0])]
      >>> operator = curvature.hessian(loss_fn, jnp.ones(1), batches)
      >>> curvature.population_frobenius_norm(operator, jax.random.key(0)).value
      Array(4., dtype=float32)
    """
    check_probes(operator, num_probes)
    checks.check_random_key(key)
    if operator.stream is None:
        raise ValueError(
            "operator must be on a re-iterable of at least two batches, got a single "
            "batch; split it, as in [batch[:50], batch[50:]]."
        )
    groups = []
    for start in range(0, num_probes, GROUP):
        signs = draw_signs(
            operator, probe_keys(key, start, min(GROUP, num_probes - start))
        )
        groups.append(_cross_products(operator, signs))
    samples = np.concatenate(groups)
    check_finite(operator, np.sum(samples))
    unit = float(blocks.power_of_two(np.sqrt(np.abs(samples))))
    square = Estimate.of(samples / unit**2)  # float64 squares, float32 in units
    value, error = (jnp.asarray(unit * x) for x in root_of(*square[:2]))
    return Estimate(value, error, num_probes)


def _cross_products(operator, signs):
    """The sample of the squared norm from each row of signs, float64 on the host."""
    total, squares, losses, weights = None, 0.0, 0.0, []
    for batch, weight in operator.risk.batches("probes"):
        arguments = (operator.like, batch, signs, jnp.float32(weight))
        placement = placement_of(operator.like)
        loss, part, square = _weighted_products(operator.kind, placement, *arguments)
        total = part if total is None else _add_trees(total, part)
        losses += weight * checks.float_of(loss, "population_frobenius_norm")
        squares, weights = squares + _host(square), [*weights, weight]
    if len(weights) < 2:
        raise ValueError(
            f"operator must be on at least two batches, got {len(weights)}; products "
            "of different batches are what is averaged."
        )
    streams.check_finite(losses / sum(weights))
    rest = float(sum(weights)) ** 2 - sum(w**2 for w in weights)
    return (_host(_square_norms(total)) - squares) / rest


def _host(scaled):
    values, units = (np.asarray(x, "f8") for x in scaled)
    return values * units**2


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weighted_products(kind, placement, params, batch, block, weight):
    loss, (found, shared) = Products(kind, placement)(params, batch, block)
    found = finish_products(kind, placement, params, found, shared, block)
    found = jax.tree.map(lambda x: weight.astype(x.dtype) * x, found)
    return loss, found, _square_norms(found)


@jax.jit
def _square_norms(block):
    """The squared norm of each row in units of a power of two, and these units."""
    units = blocks.row_units(block)
    scaled = blocks.divide_rows(block, units)
    parts = [
        jnp.sum(x.reshape(len(x), -1) ** 2, axis=1) for x in jax.tree.leaves(scaled)
    ]
    return sum(parts), units


@jax.jit
def _add_trees(tree, other):
    return jax.tree.map(jnp.add, tree, other)
