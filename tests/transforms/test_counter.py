"""Gradients are counted as they run, whatever takes them."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import (
    STRATEGIES,
    TRANSFORMATIONS,
    assert_close,
    loss_fn,
    regression,
    transformation,
)

import flatopt

SIZE = 64
STEPS = 3
COSTS = {  # gradients of the whole batch in three steps
    **{
        name: ({}, row.gradients)
        for name, row in TRANSFORMATIONS.items()
        if row.gradients is not None
    },
    "two pairs": ({"num_perturbations": 2}, 12),
    "late SAM": ({"start_step": 2}, 4),
    "LookSAM at every second step": ({"every": 2}, 5),
}
NAMES = {
    "two pairs": "nso_sgd",
    "late SAM": "sam_gradients",
    "LookSAM at every second step": "look_sam_gradients",
}


def _squares(params, batch):
    """A loss of few operations: what is counted does not depend on them."""
    return jnp.mean((batch @ params["w"] - 1) ** 2)


@pytest.mark.parametrize("case", COSTS)
def test_the_cost_of_each_method(case, standard_promotion):
    more, cost = COSTS[case]
    tx = transformation(NAMES.get(case, case), **more)
    params, batch = {"w": jnp.array([0.5, -1.0, 2.0])}, jnp.ones((SIZE, 3))
    counted = flatopt.GradientCounter(_squares)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params, value_fn=counted, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert counted.count == cost * SIZE


@pytest.mark.heart
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_are_counted_in_every_layout(strategy):
    params, batch = {"w": jnp.array([0.5, -1.0, 2.0])}, jnp.ones((SIZE, 3))
    counted = flatopt.GradientCounter(_squares)
    f = flatopt.smooth_value_and_grad(
        counted, 0.1, num_samples=4, antithetic=True, strategy=strategy
    )
    value, grads = jax.jit(f)(jax.random.key(0), params, batch)
    plain = flatopt.smooth_value_and_grad(
        _squares, 0.1, num_samples=4, antithetic=True, strategy=strategy
    )
    expected, same = jax.jit(plain)(jax.random.key(0), params, batch)
    assert counted.count == 8 * SIZE
    assert_close((value, grads), (expected, same), rtol=1e-6)  # to the last bits


@pytest.mark.heart
def test_gradients_in_the_users_own_loop_are_counted_and_values_are_not():
    params, batch = regression(SIZE)
    counted = flatopt.GradientCounter(loss_fn)
    counted(params, batch)
    assert counted.count == 0
    jax.grad(counted)(params, batch)
    assert counted.count == SIZE

    def body(total, scale):
        grads = jax.grad(counted)(jax.tree.map(lambda p: p * scale, params), batch)
        return total + optax.tree.norm(grads), None

    jax.jit(functools.partial(jax.lax.scan, body))(jnp.zeros(()), jnp.ones(5))
    assert counted.count == 6 * SIZE


def test_what_the_batch_is_can_be_named():
    def value_fn(params, inputs, table, **rest):
        return params * inputs.sum() * table.sum()

    arguments = {"inputs": jnp.ones(4), "table": jnp.ones(9)}
    counted = flatopt.GradientCounter(value_fn)
    with pytest.raises(ValueError, match="arrays of the batch must agree"):
        counted(1.0, **arguments)
    counted = flatopt.GradientCounter(value_fn, ("inputs",))
    jax.grad(counted)(1.0, **arguments)
    assert counted.count == 4
    alone = flatopt.GradientCounter(lambda params: params**2)
    jax.grad(alone)(1.0)
    assert alone.count == 1
