"""The critical learning rate against closed forms, and where it says that there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations

from flatopt import stability

MOST = 8  # passes from a good start


def _quadratic(seed=0, dtype=jnp.float32, n=24):
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(rng.normal(size=(n, 3)), dtype)
    targets = jnp.asarray(rng.normal(size=n), dtype)
    return jnp.asarray(rng.normal(size=3), dtype), (inputs, targets)


def _square(params, batch):
    return jnp.mean((batch[0] @ params - batch[1]) ** 2) / 2


def _slope(params, batch):
    """The gradient of the quadratic, by NumPy."""
    x, y, w = (np.asarray(a, "f8") for a in (*batch, params))
    return jnp.asarray(x.T @ (x @ w - y) / len(y), params.dtype)


def _crossing(params, updates, batch):
    """Where the quadratic along the updates is as large as at the start, by NumPy."""
    x, y, w, u = (np.asarray(a, "f8") for a in (*batch, params, updates))
    slope, curve = u @ x.T @ (x @ w - y) / len(y), u @ x.T @ x @ u / len(y)
    return -2 * slope / curve


def _assert_brackets(found, expected):
    low, high = map(float, found.bracket)
    assert low <= expected * (1 + 1e-4)
    assert expected * (1 - 1e-4) <= high
    assert high - low <= 1.01 * low / 16
    assert low <= float(found.rate) <= high


_FIRST, _LAST = slice(10), slice(10, None)


@pytest.mark.heart
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_quadratic_gradient_descent_has_a_closed_form(seed, streamed):
    params, batch = _quadratic(seed)
    g, x = np.asarray(_slope(params, batch), "f8"), np.asarray(batch[0], "f8")
    expected = 2 * g @ g / np.mean((x @ g) ** 2)
    data = batch
    if streamed:
        parts = [[np.asarray(a)[rows] for a in batch] for rows in (_FIRST, _LAST)]
        data = [parts[0], tuple(parts[1])]
    rate = 0.7 * expected
    updates = jnp.asarray(-rate * g, jnp.float32)
    found = stability.critical_learning_rate(
        _square, params, updates, data, learning_rate=rate
    )
    _assert_brackets(found, 1 / 0.7)
    np.testing.assert_allclose(found.sharpness, 2 / expected, rtol=1 / 30)
    assert int(found.num_evaluations) <= MOST + streamed
    again = stability.critical_learning_rate(
        _square, params, updates, data, start=found.rate
    )
    _assert_brackets(again, 1 / 0.7)
    assert int(again.num_evaluations) <= MOST + streamed
    for start in (1e-3, 300.0):
        far = stability.critical_learning_rate(
            _square, params, updates, data, start=start
        )
        _assert_brackets(far, 1 / 0.7)


@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw(0.3), optax.lion(0.2), optax.contrib.muon(0.3), optax.sgd(0.1, 0.9)],
)
def test_any_optimizers_update_is_taken(optimizer, standard_promotion):
    params, batch = _quadratic()
    loss_fn = lambda p, b: _square(p["w"][:, 0], b)  # noqa: E731
    tree = {"w": params[:, None]}
    grads = {"w": _slope(params, batch)[:, None]}
    first = jax.jit(lambda g, tree: optimizer.update(g, optimizer.init(tree), tree)[0])
    updates = first(grads, tree)
    found = stability.critical_learning_rate(loss_fn, tree, updates, batch)
    _assert_brackets(found, _crossing(params, updates["w"][:, 0], batch))


def test_it_works_inside_jit_without_compiling_again():
    params, batch = _quadratic()

    @jax.jit
    def measure(params, batch, start):
        grads = jax.grad(_square)(params, batch)
        return stability.critical_learning_rate(
            _square, params, -grads, batch, start=start
        )

    updates = -_slope(params, batch)
    inside = measure(params, batch, 1.0)
    outside = stability.critical_learning_rate(_square, params, updates, batch)
    _assert_brackets(inside, _crossing(params, updates, batch))
    np.testing.assert_allclose(inside.rate, outside.rate)
    for start in (0.0, np.inf, np.nan):
        np.testing.assert_allclose(measure(params, batch, start).rate, outside.rate)
    moved = params + 1
    with count_compilations() as compiled:
        stability.critical_learning_rate(_square, moved, updates, batch)
        measure(moved, batch, 0.5)
    assert not compiled


def test_bfloat16_parameters_move_in_float32():
    params, batch = _quadratic(dtype=jnp.bfloat16)
    # Too small to move bfloat16.
    updates = jnp.asarray(np.asarray(_slope(params, batch)) * -(2.0**-10), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, "f4")), batch)
        found = stability.critical_learning_rate(
            _square, params, updates, wide, start=2.0**10
        )
    _assert_brackets(found, _crossing(params, updates, batch))


def test_sharded_parameters():
    params, batch = _quadratic()
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    updates = -_slope(params, batch)
    found = stability.critical_learning_rate(
        _square, params, updates, jax.device_put(batch, split)
    )
    _assert_brackets(found, _crossing(params, updates, batch))


def test_models_without_second_derivatives():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (jax.pure_callback(_no, x, x, g),))
    found = stability.critical_learning_rate(
        lambda p: jnp.sum(square(p)), jnp.ones(2), -jnp.ones(2)
    )
    _assert_brackets(found, 2.0)


def _no(x, g):
    return np.asarray(2 * x * g)


CURVES = {
    # Falls, rises, falls, rises.
    "waves": lambda t: t * (t - 1.0) * (t - 4.0) * (t - 6.0),
    "line up": lambda t: t,
    "parabola up": lambda t: t + t**2,
    "tip": jnp.abs,
    "never finite": lambda t: jnp.where(t == 0, 1.0, jnp.nan),
    "line down": lambda t: -t,
    "decay": lambda t: jnp.exp(-t),
    "softplus down": lambda t: jnp.logaddexp(0.0, -t),
    "nan beyond": lambda t: jnp.where(t > 3.3, jnp.nan, -t),
    "infinite beyond": lambda t: jnp.where(t > 3.3, jnp.inf, -t),
    "tiny gain": lambda t: 1e-6 * t * (t - 2),
    "flat": lambda t: 0 * t,
}


def _curve(t, batch):
    """One of the curves plus an offset: data choose it, so that one program serves all."""
    return (
        jax.lax.switch(batch["curve"][0], list(CURVES.values()), t) + batch["offset"][0]
    )


def _along(name, start=None, offset=0.0):
    """The search over t of a curve, from its loss at 0."""
    data = {
        "curve": np.array([[*CURVES].index(name)], "i4"),
        "offset": np.array([offset], "f4"),
    }
    return stability.critical_learning_rate(
        _curve, jnp.zeros(()), jnp.ones(()), data, start=start
    )


@pytest.mark.heart
def test_of_several_crossings_it_finds_one_next_to_the_start():
    signs = np.sign([CURVES["waves"](t) for t in (0.5, 2.0, 5.0, 8.0)])
    assert list(signs) == [-1, 1, -1, 1]
    _assert_brackets(_along("waves", 0.7), 1.0)
    _assert_brackets(_along("waves", 2.0), 1.0)
    _assert_brackets(_along("waves", 5.0), 6.0)
    _assert_brackets(_along("waves", 9.0), 6.0)


def test_an_ascent_at_once_is_rate_zero():
    for name in ("line up", "parabola up", "tip"):
        for offset in (0.0, 1.0, 100.0):
            found = _along(name, offset=offset)
            assert found.rate == 0
            assert found.sharpness == np.inf
    assert _along("never finite").rate == 0


def test_a_loss_that_never_rises_is_rate_infinity():
    for name in ("line down", "decay", "softplus down"):
        found = _along(name)
        assert found.rate == np.inf
        assert found.sharpness == 0


@pytest.mark.parametrize("name", ["nan beyond", "infinite beyond"])
def test_values_that_are_not_finite_count_as_rising(name):
    for start in (1.0, 50.0):
        _assert_brackets(_along(name, start), 3.3)


def test_gains_below_the_rounding_of_the_loss_are_nan():
    for start in (1e-2, 1.0, 30.0):
        found = _along("tiny gain", start, offset=100.0)
        assert np.isnan(found.rate)
        assert np.isnan(found.sharpness)
    assert np.isnan(_along("flat", offset=1.0).rate)
    # The same gain where the loss is small.
    _assert_brackets(_along("tiny gain"), 2.0)


def test_wrong_arguments_are_one_sentence():
    params, batch = _quadratic()
    call = stability.critical_learning_rate
    with pytest.raises(ValueError, match="updates must have the structure and shapes"):
        call(_square, params, {"w": params}, batch)
    with pytest.raises(ValueError, match="updates must be finite"):
        call(_square, params, jnp.nan * params, batch)
    with pytest.raises(ValueError, match="the loss at params must be finite, got nan"):
        call(lambda p: jnp.sum(p) * jnp.nan, params, params)
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        call(_square, params, params, batch, learning_rate=0)
    with pytest.raises(
        TypeError, match="learning_rate must be a number, got a function"
    ):
        call(_square, params, params, batch, learning_rate=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        call(_square, params, params, batch, start=-1.0)


class _Passes:
    """Batches of five rows; ``rows(number)`` gives the rows of each pass."""

    def __init__(self, rows):
        self.rows, self.number = rows, 0

    def __iter__(self):
        _, (inputs, targets) = _quadratic()
        rows = self.rows(self.number)
        self.number += 1
        for part in rows.reshape(-1, 5):
            yield inputs[part], targets[part]


@pytest.mark.heart
@pytest.mark.parametrize(
    "rows",
    [
        lambda number: np.arange(20 if number < 3 else 10),
        lambda number: np.arange(0 if number > 1 else 20),
        lambda number: np.random.default_rng(number).permutation(24)[:20],
    ],
    ids=["ends early", "is exhausted", "other examples"],
)
def test_data_that_change_between_passes_are_one_sentence(rows):
    params, batch = _quadratic()
    updates = -0.1 * _slope(params, batch)
    with pytest.raises(ValueError, match=r"^data must (be the same on|hold examples)"):
        stability.critical_learning_rate(_square, params, updates, _Passes(rows))


def test_another_order_is_the_same_data():
    params, (inputs, targets) = _quadratic()
    batch = inputs[:20], targets[:20]
    updates = -0.1 * _slope(params, batch)
    data = _Passes(lambda number: np.random.default_rng(number).permutation(20))
    found = stability.critical_learning_rate(_square, params, updates, data)
    _assert_brackets(found, _crossing(params, updates, batch))
