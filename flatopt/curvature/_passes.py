"""Losses and gradients over all data at moved parameters."""

import functools

import jax
import jax.numpy as jnp

from flatopt._core import blocks, loops, trees
from flatopt.curvature._operator import Operator, add_weighted, sweep


def at(operator, params):
    """The same operator at other parameters."""
    return Operator(
        operator.kind, params, operator.batch, operator.stream, operator.weight_fn
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_losses(kind, move, params, batch, rows, fixed):
    def loss(row):
        # In float32 or wider: bfloat16 would round small moves away.
        moved = blocks.widen(move(row, params, fixed))
        return trees.widen(kind.loss(moved, batch))

    return loops.map_rows(loss, rows)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add_losses(kind, move, total, params, batch, rows, fixed, weight):
    parts = (
        trees.widen(kind.loss(params, batch)),
        _batch_losses(kind, move, params, batch, rows, fixed),
    )
    return add_weighted(total, weight, parts)


def losses(operator, move, rows, fixed=()):
    """The loss at ``move(row, params, fixed)`` for each row, in one pass."""
    if operator.stream is None:
        return _batch_losses(
            operator.kind, move, operator.like, operator.batch, rows, fixed
        )
    add = functools.partial(_add_losses, operator.kind, move)
    return sweep(operator, add, rows, fixed)[0]


@functools.partial(jax.jit, static_argnums=0)
def _batch_gradient(kind, params, batch):
    value, grads = jax.value_and_grad(kind.loss)(params, batch)
    return trees.widen(value), blocks.widen(grads)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_gradient(kind, total, params, batch, weight):
    value, grads = _batch_gradient(kind, params, batch)
    return add_weighted(total, weight, (value, (value, grads)))


def value_and_gradient(operator):
    """The loss and its gradient at the operator's parameters."""
    if operator.stream is None:
        return _batch_gradient(operator.kind, operator.like, operator.batch)
    return sweep(operator, functools.partial(_add_gradient, operator.kind))[0]


def along(step, params, direction):
    """A move along a direction, one step a row."""
    return jax.tree.map(
        lambda p, d: trees.widen(p) + step.astype(d.dtype) * d, params, direction
    )


def stay(row, params, fixed):
    """No move: the loss at the parameters themselves."""
    del row, fixed
    return params


def base_loss(operator):
    return losses(operator, stay, jnp.zeros(1))[0]
