"""The tracker against dense Hessians; it changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    TRANSFORMATIONS,
    count_compilations,
    loss_fn,
    regression,
    transformation,
    types,
)

import flatopt

RNG = np.random.default_rng(0)
Q, _ = np.linalg.qr(RNG.normal(size=(30, 30)))
VALUES = np.r_[10.0, 4.0, np.linspace(0, 1, 28)]
MATRIX = jnp.asarray((Q * VALUES) @ Q.T, jnp.float32)


def quadratic(params):
    return params @ MATRIX @ params / 2


def _run(tx, params, num_steps, value_fn=quadratic, **extra):
    @jax.jit
    def update(state):
        grads = jax.tree.map(jnp.ones_like, params)
        return tx.update(grads, state, params, value_fn=value_fn, **extra)

    state = tx.init(params)
    for _ in range(num_steps):
        updates, state = update(state)
    return updates, state


@pytest.mark.heart
def test_values_converge_to_those_of_the_hessian_and_margins_follow():
    tx = flatopt.track_stability(0.1, 16, every=1, decay=0.98)
    updates, state = _run(tx, jnp.ones(30), 400)
    np.testing.assert_array_equal(updates, np.ones(30))
    np.testing.assert_allclose(state.max_eigenvalue, 10, rtol=1e-3)
    np.testing.assert_allclose(state.trace, VALUES.sum(), rtol=0.2)
    norm = np.linalg.norm(VALUES)
    np.testing.assert_allclose(state.frobenius_norm, norm, rtol=0.2)
    np.testing.assert_allclose(state.eigenvalue_margin, 20 / 10, rtol=1e-3)
    margin = 4 / 0.1 / state.frobenius_norm
    np.testing.assert_allclose(state.frobenius_margin, margin, rtol=1e-5)


@functools.cache
def _of_squares(batch_size, decay=0.8):
    """A tracker of ``factor`` times the sum of squares of three ones, and its step."""
    tx = flatopt.track_stability(0.1, batch_size, every=1, decay=decay)
    params = jnp.ones(3)

    def value_fn(params, factor):
        return factor * jnp.sum(params**2)

    @jax.jit
    def step(state, factor):
        return tx.update(params, state, params, value_fn=value_fn, factor=factor)[1]

    return tx.init(params), step


def test_it_measures_at_every_few_steps_alone_and_compiles_once():
    calls = []

    def value_fn(params):
        calls.append(1)
        return quadratic(params)

    tx = flatopt.track_stability(optax.constant_schedule(0.1), 16, every=4)
    params = jnp.ones(30)
    state = tx.init(params)
    changes = []
    for _ in range(9):
        before = state
        calls.clear()
        _, state = tx.update(jnp.ones(30), state, params, value_fn=value_fn)
        changes.append(bool(jnp.any(state.direction != before.direction)))
        assert bool(calls) == (int(before.count) % 4 == 0)
    assert changes == [True, *[False] * 7, True]  # the fifth was a probe
    step = jax.jit(lambda s: tx.update(params, s, params, value_fn=quadratic)[1])
    step(state)
    with count_compilations() as compiled:
        step(state)
    assert not compiled


def test_training_is_the_same_with_it():
    params, batch = regression()
    for base in (optax.sgd(0.1, momentum=0.9), flatopt.lpf_sgd(0.1, num_samples=2)):
        found = []
        for tx in (base, optax.chain(flatopt.track_stability(0.1, 64, every=2), base)):
            point, state = params, tx.init(params)
            for _ in range(4):
                updates, state = tx.update(
                    jax.grad(loss_fn)(point, batch),
                    state,
                    point,
                    value_fn=loss_fn,
                    batch=batch,
                )
                point = optax.apply_updates(point, updates)
            found.append(point)
        for one, other in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        assert optax.tree.get(state, "max_eigenvalue") > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_types_never_change(dtype, x64):
    params, batch = regression(16, jnp.dtype(dtype))
    tx = flatopt.track_stability(0.1, 16)
    state = tx.init(params)
    new = jax.eval_shape(
        lambda s: tx.update(params, s, params, value_fn=loss_fn, batch=batch)[1], state
    )
    assert types(new) == types(state)


@pytest.mark.parametrize("when", range(4))
@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_a_batch_without_curvature_leaves_no_trace(bad, when):
    # All eigenvalues are 2: every measurement of a good batch is exact.
    state, step = _of_squares(8)
    for index in range(6):
        state = step(state, np.float32(bad if index == when else 1.0))
        if index > when:  # already at the next measurement
            np.testing.assert_allclose(state.max_eigenvalue, 2, rtol=1e-6)
            np.testing.assert_allclose(state.eigenvalue_margin, 10, rtol=1e-6)
    np.testing.assert_allclose(state.trace, 6, rtol=1e-6)
    np.testing.assert_allclose(state.frobenius_norm, 12**0.5, rtol=1e-6)


@pytest.mark.heart
@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10, 1e25])
def test_curvatures_of_every_size_are_measured(size):
    state, step = _of_squares(4)
    for _ in range(4):
        state = step(state, np.float32(size / 2))
    np.testing.assert_allclose(state.max_eigenvalue, size, rtol=1e-5)
    np.testing.assert_allclose(state.trace, 3 * size, rtol=1e-5)
    np.testing.assert_allclose(state.frobenius_norm, 3**0.5 * size, rtol=1e-5)
    margin = 2 / 0.1 / 3**0.5 / size
    np.testing.assert_allclose(state.frobenius_margin, margin, rtol=1e-5)


def test_a_loss_that_becomes_flat_is_seen_to_be_flat():
    state, step = _of_squares(8, decay=0.5)
    for factor in [1.0] * 4 + [0.0] * 40:
        state = step(state, np.float32(factor))
    assert state.max_eigenvalue == 0
    assert state.trace < 1e-4
    assert state.eigenvalue_margin == jnp.inf
    for _ in range(3):
        state = step(state, np.float32(1))
    np.testing.assert_allclose(state.max_eigenvalue, 2, rtol=1e-6)


def test_masked_leaves_are_no_part_of_the_curvature():
    params = {"w": jnp.ones(3), "n": jnp.arange(2), "k": jax.random.key(0), "v": 1.0}
    mask = {"w": True, "n": False, "k": False, "v": False}

    def value_fn(params):
        return jnp.sum(jnp.array([1.0, 2.0, 5.0]) * params["w"] ** 2) * params["v"]

    tx = flatopt.track_stability(0.1, 8, every=1, mask=mask)
    state = tx.init(params)
    updates, _ = tx.update(params, state, params, value_fn=value_fn)
    assert updates is params
    step = jax.jit(lambda state: tx.update(params, state, params, value_fn=value_fn)[1])
    for _ in range(40):
        state = step(state)
    np.testing.assert_allclose(state.max_eigenvalue, 10, rtol=1e-3)
    np.testing.assert_allclose(state.trace, 16, rtol=1e-5)  # signs on a diagonal
    with pytest.raises(TypeError, match="floating point, got int32 at 'n'; .* mask="):
        flatopt.track_stability(0.1, 8).update(
            None,
            state._replace(count=state.count * 0),
            params | {"k": 1.0},
            value_fn=value_fn,
        )


def test_no_parameters_have_no_curvature():
    tx = flatopt.track_stability(0.1, 8)
    updates, state = tx.update(
        {}, tx.init({}), {}, value_fn=lambda p: jnp.ones(()) * len(p)
    )
    assert updates == {}
    assert state.trace == 0


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_it_starts_and_steps_under_the_checks_of_jax(name, standard_promotion):
    tx, params = transformation(name), jnp.ones(3)
    flags = "jax_debug_nans", "jax_debug_infs"
    for flag in flags:
        jax.config.update(flag, True)
    try:
        tx.init(params)
        state = jax.jit(tx.init)(params)
        for _ in range(2):
            _, state = tx.update(
                params,
                state,
                params,
                value_fn=lambda p, batch: jnp.mean(batch) * jnp.sum(p**2),
                batch=jnp.ones(8),
            )
    finally:
        for flag in flags:
            jax.config.update(flag, False)


# Devices


def _mapped(check_vma, batch_axis="data", **options):
    """The state after 30 steps on four devices, and a dense Hessian of all the batch."""
    inputs = jax.random.normal(jax.random.key(1), (16, 3))
    params = jnp.ones(3)
    tx = flatopt.track_stability(0.1, 16, every=1, **options)

    def value_fn(params, batch):
        return jnp.mean(jnp.cos(batch @ params - 1))

    def steps(params, batch):
        def body(state, _):
            return tx.update(params, state, params, value_fn=value_fn, batch=batch)[
                1
            ], None

        return jax.lax.scan(body, tx.init(params), length=30)[0]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = jax.jit(
        jax.shard_map(
            steps,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(batch_axis)),
            out_specs=jax.P(),
            check_vma=check_vma,
        )
    )(params, inputs)
    return state, jax.hessian(value_fn)(params, inputs)


@pytest.mark.heart
@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_measure_the_curvature_of_the_whole_batch(check_vma):
    state, hessian = _mapped(check_vma, axis_name="data", decay=0.0)
    values = np.linalg.eigvalsh(hessian)
    largest = values[np.abs(values).argmax()]
    np.testing.assert_allclose(state.max_eigenvalue, largest, rtol=1e-3)
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1)
    forms = ((np.asarray(hessian) @ signs) * signs).sum(
        axis=0
    )  # all that a probe can be
    assert np.abs(forms - state.trace).min() < 1e-5


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_without_an_axis_name_are_refused(check_vma):
    match = "needs an axis_name inside jax.shard_map.* give it axis_name='data'"
    with pytest.raises(ValueError, match=match):
        _mapped(check_vma)


def test_devices_with_the_same_batch_need_no_axis_name():
    state, hessian = _mapped(True, batch_axis=None)
    largest = np.abs(np.linalg.eigvalsh(hessian)).max()
    np.testing.assert_allclose(np.abs(state.max_eigenvalue), largest, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((-0.1, 8), ValueError, "learning_rate must be finite and not negative"),
        ((0.1, 0), ValueError, "batch_size must be an int of at least 1, got 0"),
        ((0.1, 8, 0), ValueError, "every must be an int of at least 1, got 0"),
        ((0.1, 8, 5, 1.0), ValueError, "decay must be less than 1, got 1.0"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    names = ("learning_rate", "batch_size", "every", "decay")
    with pytest.raises(error, match=match):
        flatopt.track_stability(**dict(zip(names, arguments, strict=False)))
    tx = flatopt.track_stability(0.1, 8)
    with pytest.raises(ValueError, match="track_stability needs value_fn, which was"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
