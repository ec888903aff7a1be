"""Optax's wrappers and optimizers with our links, row by row as in the docs' table.

The problem is softmax regression, whose gradient NumPy can write out, at noise that is
known: every link here draws it with ``_shared``.
"""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    TRANSFORMATIONS,
    arguments_of,
    assert_close,
    count_compilations,
    loss_fn,
    maker,
    optimizer,
    public_transformations,
    regression,
    softmax_gradient,
    softmax_loss,
    softmax_regression,
    transformation,
    types,
)

import flatopt

KEY, SIGMA, RATE = 5, 0.5, 0.3


def _shared(key, params):
    """A kernel that gives every leaf normal numbers from the same key."""
    return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), params)


def _smooth(scale=SIGMA):
    return flatopt.smooth_gradients(scale, _shared, key=KEY)


def _numpy(tree):
    return {name: np.asarray(leaf, "f8") for name, leaf in tree.items()}


@functools.cache
def _data():
    return softmax_regression()


@functools.cache
def _noise(step):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), step), 0)
    return _numpy(_shared(key, _data()[0]))


def _gradient(params, step, sigma=SIGMA, rows=slice(None)):
    """The gradient at the noise of a step, in NumPy."""
    inputs, labels = (np.asarray(x)[rows] for x in _data()[1:])
    noisy = {n: np.asarray(p) + sigma * _noise(step)[n] for n, p in params.items()}
    return softmax_gradient(noisy, inputs, labels)


def _descend(params, grads, rate=RATE):
    return {name: leaf - rate * grads[name] for name, leaf in params.items()}


def _start():
    return _numpy(_data()[0])


def _jitted(tx, **extra_args):
    """The step of a training loop; without gradients it passes zeros."""
    _, all_inputs, all_labels = _data()

    @jax.jit
    def step(params, state, grads=None, inputs=all_inputs, labels=all_labels):
        updates, state = tx.update(
            optax.tree.zeros_like(params) if grads is None else grads,
            state,
            params,
            value_fn=softmax_loss,
            inputs=inputs,
            labels=labels,
            **extra_args,
        )
        return optax.apply_updates(params, updates), state

    return step


def _train(tx, steps, **extra_args):
    params = _data()[0]
    state, step = tx.init(params), _jitted(tx, **extra_args)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def _sgd_by_hand(steps):
    params = _start()
    for step in range(steps):
        params = _descend(params, _gradient(params, step))
    return params


def _check(params, expected, tolerance=2e-5):
    assert set(params) == set(expected)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=tolerance, atol=tolerance)


# What follows us


def _gradient_accumulation(optimizer):
    return optax.MultiSteps(optimizer, 2).gradient_transformation()


FOLLOWERS = {
    "sgd": optax.sgd(RATE, momentum=0.9),
    "adamw": optax.adamw(RATE, weight_decay=0.1),
    "lion": optax.lion(RATE),
    "muon": optax.contrib.muon(RATE),
    "momo": optax.contrib.momo(RATE),
    "sophia": optax.contrib.sophia(RATE),
    "ema": optax.ema(0.9),
    "clip": optax.clip(0.05),
    "clip_by_global_norm": optax.clip_by_global_norm(0.05),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
    "masked": optax.masked(optax.adam(RATE), {"kernel": True, "bias": False}),
    "partition": optax.partition(
        {"slow": optax.sgd(0.01), "fast": optax.adam(RATE)},
        {"kernel": "slow", "bias": "fast"},
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(RATE),
    "apply_if_finite": optax.apply_if_finite(optax.adam(RATE), 5),
    "MultiSteps": _gradient_accumulation(optax.adam(RATE)),
    "flatten": optax.flatten(optax.adam(RATE)),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(RATE), RATE),
    "mechanize": optax.contrib.mechanize(optax.sgd(RATE), s_init=0.5),
    "reduce_on_plateau": optax.contrib.reduce_on_plateau(patience=1),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_what_follows_us_is_given_the_smoothed_gradient(name, standard_promotion):
    params, inputs, labels = _data()
    extra_args = {
        "value": jnp.float32(0.5),
        "obj_fn": lambda p: softmax_loss(p, inputs, labels),
    }
    follower = optax.with_extra_args_support(FOLLOWERS[name])
    tx = optax.chain(_smooth(), follower)

    @jax.jit
    def both(params, state, expected, own_state, grads):
        updates, state = tx.update(
            optax.tree.zeros_like(params),
            state,
            params,
            value_fn=softmax_loss,
            inputs=inputs,
            labels=labels,
            **extra_args,
        )
        by_hand, own_state = follower.update(grads, own_state, expected, **extra_args)
        params = optax.apply_updates(params, updates)
        return params, state, optax.apply_updates(expected, by_hand), own_state

    carry = (params, tx.init(params), params, follower.init(params))
    for step in range(3):
        grads = jax.tree.map(jnp.float32, _gradient(carry[2], step))
        carry = both(*carry, grads)
    _check(carry[0], carry[2], 1e-4)


@pytest.mark.heart
def test_a_clip_in_front_of_us_clips_nothing():
    tx = optax.chain(optax.clip_by_global_norm(1e-6), _smooth(), optax.sgd(RATE))
    params, _ = _train(tx, 3)
    _check(params, _sgd_by_hand(3))


def test_links_of_a_named_chain_are_read_by_name():
    tx = optax.named_chain(("noise", _smooth()), ("sgd", optax.sgd(RATE)))
    params, state = _train(tx, 3)
    _check(params, _sgd_by_hand(3))
    noisy = {n: p + SIGMA * _noise(2)[n] for n, p in _sgd_by_hand(2).items()}
    value = softmax_loss(jax.tree.map(jnp.float32, noisy), *_data()[1:])
    np.testing.assert_allclose(state["noise"].smoothed_value, value, rtol=1e-5)


# Hyper-parameters that change on the fly

INJECTED = {
    "two links": (
        lambda: optax.chain(
            optax.inject_hyperparams(flatopt.smooth_gradients, static_args="kernel")(
                SIGMA, _shared, key=KEY
            ),
            optax.inject_hyperparams(optax.sgd)(RATE),
        ),
        lambda state: (state[0].hyperparams, state[1].hyperparams),
    ),
    "one recipe": (
        lambda: optax.inject_hyperparams(
            lambda scale, learning_rate: optax.chain(
                _smooth(scale), optax.sgd(learning_rate)
            )
        )(scale=SIGMA, learning_rate=RATE),
        lambda state: (state.hyperparams, state.hyperparams),
    ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_scale_and_learning_rate_change_on_the_fly_without_compiling(name):
    make, hyperparams_of = INJECTED[name]
    tx = make()
    params = _data()[0]
    step = _jitted(tx)
    params, state = step(params, tx.init(params))
    of_scale, of_rate = hyperparams_of(state)
    of_scale["scale"] = jnp.float32(0.1)
    of_rate["learning_rate"] = jnp.float32(0.7)
    with count_compilations() as compiled:
        params, state = step(params, state)
    assert not compiled
    expected = _sgd_by_hand(1)
    expected = _descend(expected, _gradient(expected, 1, sigma=0.1), 0.7)
    _check(params, expected)


def test_a_kernel_taken_for_a_schedule_is_told_of_static_args():
    tx = optax.inject_hyperparams(flatopt.smooth_gradients)(
        scale=0.1, kernel=flatopt.kernels.filterwise()
    )
    with pytest.raises(TypeError, match=r"static_args=\('kernel',\)"):
        tx.init(jnp.ones(2))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smooth_gradients", "num_samples"),
        ("entropy_sgd_gradients", "num_steps"),
        ("sam_gradients", "num_microbatches"),
        ("nso_sgd", "num_perturbations"),
        ("track_stability", "batch_size"),
    ],
)
def test_a_count_taken_for_a_hyperparameter_is_told_of_static_args(name, count):
    make = optax.inject_hyperparams(getattr(flatopt, name))
    tx = make(**arguments_of(name, **{count: 2}))
    match = rf"{count} must be a Python int, got an array.*static_args=\('{count}',\)"
    with pytest.raises(TypeError, match=match):
        tx.init(jnp.ones(2))


# Gradient accumulation

MICRO_BATCHES = [slice(0, 8), slice(8, 16), slice(16, 24)]


def _accumulate(tx):
    params, inputs, labels = _data()
    step, state, points = _jitted(tx), tx.init(params), []
    for rows in MICRO_BATCHES:
        params, state = step(params, state, None, inputs[rows], labels[rows])
        points.append(params)
    return points


def test_multisteps_after_us_takes_the_mean_gradient(standard_promotion):
    accumulated = optax.MultiSteps(optax.sgd(RATE), 3).gradient_transformation()
    first, second, last = _accumulate(optax.chain(_smooth(), accumulated))
    start = _start()
    _check(first, start, 0)
    _check(second, start, 0)
    grads = [
        _gradient(start, step, rows=rows) for step, rows in enumerate(MICRO_BATCHES)
    ]
    mean = {name: sum(g[name] for g in grads) / 3 for name in start}
    _check(last, _descend(start, mean))


def test_multisteps_around_us_is_an_error(standard_promotion):
    tx = optax.MultiSteps(optax.chain(_smooth(), optax.sgd(RATE)), 3)
    with pytest.raises(ValueError, match="inside of optax.MultiSteps.*flatopt.accumul"):
        _accumulate(tx)


# Wrappers around us that work


def _schedule_free_by_hand(steps, decay=0.9):
    y = x = z = _start()
    for step in range(steps):
        z = _descend(z, _gradient(y, step))
        x = {n: x[n] + (z[n] - x[n]) / (step + 1) for n in x}
        y = {n: decay * x[n] + (1 - decay) * z[n] for n in x}
    return y, x


@pytest.mark.heart
def test_schedule_free_around_us_follows_its_recurrences(standard_promotion):
    inner = optax.chain(_smooth(), optax.sgd(RATE))
    tx = optax.contrib.schedule_free(inner, RATE, b1=0.9)
    params, state = _train(tx, 4)
    y, x = _schedule_free_by_hand(4)
    _check(params, y, 5e-5)
    _check(optax.contrib.schedule_free_eval_params(state, params), x, 5e-5)


def test_conditionally_transform_around_us_starts_us_late():
    late = optax.conditionally_transform(_smooth(), lambda step: step >= 2)
    tx = optax.chain(late, optax.sgd(RATE))
    params = _data()[0]
    step, state, expected = _jitted(tx), tx.init(params), _start()
    for count in range(4):
        plain = _gradient(expected, 0, sigma=0)
        params, state = step(params, state, jax.tree.map(jnp.float32, plain))
        grads = plain if count < 2 else _gradient(expected, count - 2)
        expected = _descend(expected, grads)
    _check(params, expected)


def test_masked_around_anti_pgd_is_its_own_mask():
    mask = {"kernel": True, "bias": False}
    tx = optax.masked(flatopt.anti_pgd(0.1, key=KEY), mask)
    params = _data()[0]
    zeros = optax.tree.zeros_like(params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    key = jax.random.fold_in(jax.random.key(KEY), 1)
    noise = flatopt.kernels.isotropic()(key, params)
    np.testing.assert_allclose(updates["kernel"], 0.1 * noise["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], zeros["bias"])


# Wrappers around us that do something else


def test_mechanize_around_us_never_learns_its_scale(standard_promotion):
    inner = optax.chain(_smooth(), optax.sgd(RATE))
    tx = optax.contrib.mechanize(inner, s_init=0.01)
    params, _ = _train(tx, 4)
    expected = _start()
    for step in range(4):
        grads = _gradient(expected, step)
        expected = _descend(expected, grads, 0.01 * RATE)
    _check(params, expected, 1e-6)


def test_flatten_around_us_hands_the_loss_a_vector():
    params = _data()[0]
    tx = optax.flatten(flatopt.smooth_gradients(0.0))
    updates, _ = tx.update(
        optax.tree.zeros_like(params),
        tx.init(params),
        params,
        value_fn=lambda vector: jnp.sum(vector * jnp.arange(21.0)),
    )
    np.testing.assert_array_equal(updates["bias"], [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(updates["kernel"].ravel(), np.arange(3.0, 21.0))


# Wrappers around us that fail


def _update(tx, params, **extra_args):
    grads = optax.tree.zeros_like(params)
    return tx.update(grads, tx.init(params), params, **extra_args)


DROPPING = {
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "MultiSteps": _gradient_accumulation,
}


@pytest.mark.parametrize("name", DROPPING)
def test_a_wrapper_that_drops_value_fn_is_told_of_smooth_value_and_grad(name):
    params = optax.LookaheadParams.init_synced(jnp.ones(2))
    params = params if name == "lookahead" else jnp.ones(2)
    tx = optax.chain(DROPPING[name](_smooth()))
    with pytest.raises(ValueError, match="needs value_fn.*smooth_value_and_grad"):
        _update(tx, params, value_fn=lambda p: p.sum())


@pytest.mark.parametrize(
    "wrap",
    [
        DROPPING["lookahead"],
        DROPPING["split_real_and_imaginary"],
        lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)),
    ],
)
def test_a_wrapper_that_takes_no_value_fn_says_so_outside_a_chain(wrap):
    with pytest.raises(TypeError, match="unexpected keyword argument 'value_fn'"):
        _update(wrap(_smooth()), jnp.ones(2), value_fn=lambda p: p.sum())


@pytest.mark.heart
def test_lookahead_takes_the_gradient_of_smooth_value_and_grad(standard_promotion):
    start, inputs, labels = _data()
    tx = optax.lookahead(optax.sgd(RATE), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(start)
    state = tx.init(params)
    value_and_grad = flatopt.smooth_value_and_grad(softmax_loss, SIGMA, _shared)

    @jax.jit
    def step(params, state, key):
        _, grads = value_and_grad(key, params.fast, inputs, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    fast = slow = _start()
    for count in range(4):
        key = jax.random.fold_in(jax.random.key(KEY), count)
        params, state = step(params, state, key)
        fast = _descend(fast, _gradient(fast, count))
        if count % 2:
            fast = slow = {n: (slow[n] + fast[n]) / 2 for n in slow}
    _check(params.fast, fast)
    _check(params.slow, slow)


def test_private_aggregation_after_us_asks_for_the_gradients_of_examples():
    private = optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0)
    tx = optax.chain(_smooth(), private)
    with pytest.raises(ValueError, match="to have a batch dimension in the 0th axis"):
        _update(
            tx,
            {"a": jnp.ones(2), "b": jnp.ones(3)},
            value_fn=lambda p: p["a"].sum() * p["b"].sum(),
        )


# L-BFGS

CURVATURES, CENTER = jnp.array([1.0, 3.0, 10.0, 30.0]), jnp.array([1.0, -2.0, 3.0, 0.5])


def _quadratic(params):
    return jnp.sum(CURVATURES * (params - CENTER) ** 2) / 2


def _minimize(tx, value_fn, steps=30):
    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros(4)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return run((start, tx.init(start)))[0]


def test_lbfgs_converges_on_a_smoothed_loss_with_a_fixed_key(standard_promotion):
    key, draws = jax.random.key(2), 4
    smoothed = flatopt.smooth(_quadratic, 0.1, _shared, num_samples=draws)
    params = _minimize(optax.lbfgs(), lambda params: smoothed(key, params))
    noise = [_shared(jax.random.fold_in(key, j), CENTER) for j in range(draws)]
    minimum = CENTER - 0.1 * sum(noise) / draws
    np.testing.assert_allclose(params, minimum, atol=1e-5)
    assert jnp.linalg.norm(minimum - CENTER) > 0.05


def test_lbfgs_after_us_does_not_settle(standard_promotion):
    tx = optax.chain(flatopt.smooth_gradients(0.1), optax.lbfgs())
    assert jnp.linalg.norm(_minimize(tx, _quadratic) - CENTER) > 0.05


# Optax's contract, for every public transformation

COUNTS = {
    "num_samples",
    "num_microbatches",
    "num_perturbations",
    "num_steps",
    "batch_size",
    "every",
}
STEPS = {"smooth_gradients_zeroth_order": 1500}
NEED_VALUE_FN = [name for name, row in TRANSFORMATIONS.items() if row.needs_value_fn]


def _parameters(name):
    return inspect.signature(getattr(flatopt, name)).parameters


def test_every_public_transformation_has_its_row():
    assert public_transformations() == set(TRANSFORMATIONS)


def test_every_public_function_says_what_it_returns():
    for name in flatopt.__all__:
        if inspect.isfunction(getattr(flatopt, name)):
            signature = inspect.signature(getattr(flatopt, name))
            assert signature.return_annotation is not inspect.Signature.empty, name


def _targets():
    """Optax's test problems as one: parameters at the minimum.

    Its mixed parabola holds its plain one, of a vector, and that of a matrix.
    """
    return {
        "rosenbrock": np.array([1.0, 1.0], "f4"),
        "mixed": (
            np.array([1.0, -1.0, 1.0], "f4"),
            np.array([[3.0, -2.0], [1.0, 4.0]], "f4"),
        ),
    }


def _objective(params, batch):
    targets, (x, y) = _targets(), jnp.split(params["rosenbrock"], 2)
    rosenbrock = jnp.sum((1 - x) ** 2 + 100 * (y - x**2) ** 2)
    squares = jax.tree.map(
        lambda p, q: jnp.sum((p - q) ** 2), params["mixed"], targets["mixed"]
    )
    return (rosenbrock + sum(squares)) * jnp.mean(batch)


# Recipes that test_optimizers.py shows to be a link, which converges here, and its optimizer.
REPEATED = {"asam_sgd", "lpf_adamw", "lpf_sgd", "nso_adamw"}


@pytest.mark.parametrize("name", [n for n in TRANSFORMATIONS if n not in REPEATED])
def test_it_converges_compiles_once_and_ignores_unknown_arguments(
    name, standard_promotion
):
    tx = optimizer(name, "tiny")
    row = TRANSFORMATIONS[name]
    takes_gradient = row.is_last or row.gradients is None or not row.needs_value_fn
    params = jax.tree.map(np.zeros_like, _targets())
    params["mixed"][0][:] = [-1.0, 10.0, 1.0]

    def step(_, both):
        params, state = both
        batch = jnp.ones(8)
        updates = optax.tree.zeros_like(params)
        if takes_gradient:
            updates = jax.grad(_objective)(params, batch)
        updates, state = tx.update(
            updates,
            state,
            params,
            value_fn=_objective,
            batch=batch,
            unexpected_argument=1,
        )
        return optax.apply_updates(params, updates), state

    @jax.jit
    def ten_steps(params, state):
        return jax.lax.fori_loop(0, 10, step, (params, state))

    params, state = ten_steps(params, tx.init(params))
    with count_compilations() as compiled:
        for _ in range(STEPS.get(name, 1000) // 10):
            params, state = ten_steps(params, state)
    assert not compiled
    assert_close(params, _targets(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtypes", [("float16", "float64"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_types_are_kept_through_cond_and_multisteps(
    name, dtypes, standard_promotion, x64
):
    tx, (narrow, dtype) = optimizer(name, "tiny"), map(jnp.dtype, dtypes)
    accumulated = tx
    if not TRANSFORMATIONS[name].is_optimizer:
        link = transformation(name, "tiny")
        accumulated = flatopt.accumulate(link, optax.sgd(RATE), 4)
    params = {
        "kernel": jax.ShapeDtypeStruct((3, 2), narrow),
        "bias": jax.ShapeDtypeStruct((2,), dtype),
    }

    def trace(params, batch):
        options = {"value_fn": _quartic, "batch": batch}
        state, later = tx.init(params), accumulated.init(params)
        once = jax.lax.cond(
            batch[0] > 0,
            lambda: tx.update(params, state, params, **options),
            lambda: (params, state),
        )
        if dtype != jnp.bfloat16:  # the dtype that MultiSteps would widen
            return (params, state), once
        return (params, state, params, later), (
            *once,
            *accumulated.update(params, later, params, **options),
        )

    batch = jax.ShapeDtypeStruct((8,), dtype)
    expected, found = jax.eval_shape(trace, params, batch)
    assert types(found) == types(expected)
    assert types(found[0]) == types(params)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_state_is_made_from_shapes_and_mapped_like_parameters(name):
    params, _ = regression()
    tx = optimizer(name, "tiny")
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert types(tx.init(shapes)) == types(state)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for leaf, other in zip(
        jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True
    ):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_shardings_are_kept_on_an_explicit_mesh(name, standard_promotion):
    tx = optimizer(name, "tiny")
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("x",), axis_types=explicit)
    seen = []

    def note(tree):
        seen.append(jax.tree.map(lambda leaf: repr(jax.typeof(leaf)), tree))

    def value_fn(params, batch):
        return jnp.sum(params.astype(jnp.float32) ** 2) * jnp.mean(batch)

    def trace(params, state):
        updates, new_state = tx.update(
            params, state, params, value_fn=value_fn, batch=jnp.ones(8)
        )
        note((params, tx.init(params)))
        note((updates, new_state))

    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
        params = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=sharding)
        state = tx.init(params)
        note((params, state))
        jax.eval_shape(trace, params, state)
    expected, traced, updated = seen
    assert "float16[2,8@x,4]" in expected[0]
    assert traced == expected
    assert updated == expected


def _scheduled():
    """Each argument of each transformation that is annotated to be a schedule."""
    return [
        (name, argument)
        for name in TRANSFORMATIONS
        for argument, parameter in _parameters(name).items()
        # Of the parameters themselves as a model, functional SAM does not depend on rho.
        if TRANSFORMATIONS[name].make is None
        # With noise as small as here a share of the clean gradient changes nothing.
        if argument != "clean_weight"
        if optax.Schedule in typing.get_args(parameter.annotation)
    ]


def test_arguments_that_may_be_schedules_are_found():
    arguments = {argument for _, argument in _scheduled()}
    assert arguments == {
        "gamma",
        "kappa",
        "learning_rate",
        "rho",
        "scale",
        "sigma",
    }


@pytest.mark.parametrize(("name", "argument"), _scheduled())
def test_a_schedule_and_an_injected_number_are_the_number_of_each_step(
    name, argument, standard_promotion
):
    params, batch = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.1, 0.3])
    low, high = jnp.float32(0.05), jnp.float32(0.2)

    def update(tx, state):
        return tx.update(params, state, params, value_fn=_quartic, batch=batch)

    def make(number):
        return transformation(name, "tiny", "quick", **{argument: number})

    first, second = make(low), make(high)
    _, state = update(first, first.init(params))
    unchanged, expected = update(first, state), update(second, state)
    with pytest.raises(AssertionError):
        assert_close(unchanged, expected, rtol=1e-3)

    scheduled = make(lambda count: jnp.where(count == 0, low, high))
    _, state = update(scheduled, scheduled.init(params))
    found = _without_counts(update(scheduled, state))
    assert_close(found, _without_counts(expected), rtol=1e-4)

    injected = optax.inject_hyperparams(
        maker(name), static_args=COUNTS & set(_parameters(name))
    )(**arguments_of(name, "tiny", "quick", **{argument: low}))
    _, state = update(injected, injected.init(params))
    state.hyperparams[argument] = high
    updates, state = update(injected, state)
    assert_close((updates, state.inner_state), expected, rtol=1e-4)


def _quartic(params, batch):
    return jnp.mean(batch) * sum(jnp.sum(p**4) for p in jax.tree.leaves(params))


def _without_counts(result):
    """Updates and state, less the counts of the schedule of a learning rate."""
    updates, state = result
    return updates, [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32]


# MaskedNodes


@pytest.mark.parametrize("name", NEED_VALUE_FN)
def test_a_partition_around_us_is_told_what_to_write_instead(name):
    params, batch = regression(16)
    labels = {"first": "ours", "second": "theirs"}
    tx = optax.partition(
        {"ours": transformation(name), "theirs": optax.sgd(0.1)}, labels
    )
    with pytest.raises(ValueError, match="params hold MaskedNodes.*outside.* mask="):
        _update(tx, params, value_fn=loss_fn, batch=batch)
