"""The sharpness-aware family against its formulas in NumPy, over ten steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    TRANSFORMATIONS,
    assert_close,
    count_compilations,
    loss_fn,
    maker,
    regression,
    softmax_gradient,
    softmax_loss,
    softmax_regression,
    takes,
    types,
)

import flatopt
from flatopt import kernels

STEPS, RHO, RATE = 10, 0.3, 0.2
METHODS = {
    "sam": flatopt.sam_gradients(RHO),
    "usam": flatopt.usam_gradients(RHO),
    "asam": flatopt.asam_gradients(RHO, 0.05),
    "filterwise_asam": flatopt.filterwise_asam_gradients(RHO, 0.05),
    "random_sam": flatopt.random_sam_gradients(RHO, 0.1, key=3),
    "noisy_sam": flatopt.noisy_sam_gradients(RHO, 0.1, key=3),
    "gsam": flatopt.gsam_gradients(RHO, 0.4),
    "look_sam": flatopt.look_sam_gradients(RHO, every=3, alpha=0.7),
    "friendly_sam": flatopt.friendly_sam_gradients(RHO, 0.8, 0.9),
    "fisher_sam": flatopt.fisher_sam_gradients(RHO, 0.5),
    "momentum_sam": flatopt.momentum_sam_gradients(RHO, 0.8),
    "functional_sam": maker("functional_sam_gradients")(rho=RHO),
}
COUNTS = {"look_sam": [2, 1, 1, 2], "momentum_sam": [1, 1, 1, 1]}


def test_every_sharpness_aware_link_has_its_formula_here():
    registered = {
        name
        for name, row in TRANSFORMATIONS.items()
        if takes(name, "rho") and not row.is_optimizer
    }
    assert registered == {f"{name}_gradients" for name in METHODS}


# Two problems with gradients written out in NumPy


def _softmax():
    params, inputs, labels = softmax_regression()
    return params, {"inputs": inputs, "labels": labels}, softmax_loss, softmax_gradient


def _factorization():
    keys = jax.random.split(jax.random.key(12), 3)
    params = {
        "left": jax.random.normal(keys[0], (4, 2)) / 2,
        "right": jax.random.normal(keys[1], (5, 2)) / 2,
    }
    target = jax.random.normal(keys[2], (4, 5))

    def value_fn(params, target):
        return jnp.mean((params["left"] @ params["right"].T - target) ** 2)

    def gradient(params, target):
        error = 2 * (params["left"] @ params["right"].T - target) / target.size
        return {"left": error @ params["right"], "right": error.T @ params["left"]}

    return params, {"target": target}, value_fn, gradient


PROBLEMS = {"softmax": _softmax, "factorization": _factorization}


# The methods in NumPy, on dicts of float64 arrays


def _map(function, *trees):
    return {name: function(*(t[name] for t in trees)) for name in trees[0]}


def _dot(a, b):
    return sum((a[name] * b[name]).sum() for name in a)


def _norm(a):
    return np.sqrt(_dot(a, a))


def _step(params, direction, length):
    norm = _norm(direction)
    return _map(lambda p, d: p + length * d / norm, params, direction)


def _filter_norms(leaf):
    axes = tuple(range(leaf.ndim - 1)) if leaf.ndim > 1 else (0,)
    return np.sqrt((leaf**2).sum(axis=axes, keepdims=True))


def _noise(kernel, params, step):
    key = jax.random.fold_in(jax.random.key(3), step)  # of the step
    key = jax.random.fold_in(key, 0)  # of the only microbatch
    noise = kernel(key, _map(lambda p: jnp.asarray(p, jnp.float32), params))
    return _map(lambda u: np.asarray(u, "f8"), noise)


def _adaptive(params, g, gradient, sizes):
    scaled = _map(lambda t, x: t * x, sizes, g)
    step = _map(lambda t, x: t * x, sizes, scaled)
    return gradient(_map(lambda p, e: p + RHO * e / _norm(scaled), params, step))


def _reference(name, params, gradient, step, memory):
    if name == "momentum_sam":
        point = params if memory is None else _step(params, memory, -RHO)
        g = gradient(point)
        return g, g if memory is None else _map(lambda v, x: 0.8 * v + x, memory, g)
    if name == "functional_sam":  # of a linear model, here the parameters themselves
        return gradient(params), memory
    if name in ("random_sam", "noisy_sam"):
        kernel = kernels.filterwise() if name == "random_sam" else kernels.isotropic()
        noise = _noise(kernel, params, step)
        g = gradient(_map(lambda p, u: p + 0.1 * u, params, noise))
        return gradient(_step(params, g, RHO)), memory
    g = gradient(params)
    if name == "sam":
        return gradient(_step(params, g, RHO)), memory
    if name == "usam":
        return gradient(_map(lambda p, x: p + RHO * x, params, g)), memory
    if name == "asam":
        sizes = _map(lambda p: np.abs(p) + 0.05, params)
        return _adaptive(params, g, gradient, sizes), memory
    if name == "filterwise_asam":
        sizes = _map(
            lambda p: (_filter_norms(p) if p.ndim > 1 else np.abs(p)) + 0.05, params
        )
        return _adaptive(params, g, gradient, sizes), memory
    if name == "gsam":
        moved = gradient(_step(params, g, RHO))
        share = _dot(g, moved) / _dot(moved, moved)
        return _map(lambda m, x: m - 0.4 * (x - share * m), moved, g), memory
    if name == "look_sam":
        if step % 3 == 0:
            moved = gradient(_step(params, g, RHO))
            share = _dot(moved, g) / _dot(g, g)
            return moved, _map(lambda m, x: m - share * x, moved, g)
        ratio = 0.7 * _norm(g) / _norm(memory)
        return _map(lambda x, v: x + ratio * v, g, memory), memory
    if name == "friendly_sam":
        if memory is None:
            return gradient(_step(params, g, RHO)), g
        own = _map(lambda x, m: x - 0.8 * m, g, memory)
        memory = _map(lambda m, x: 0.9 * m + 0.1 * x, memory, g)
        return gradient(_step(params, own, RHO)), memory
    assert name == "fisher_sam"
    inverse = _map(lambda x: 1 / (1 + 0.5 * x**2), g)
    length = np.sqrt(sum((g[n] ** 2 * inverse[n]).sum() for n in g))
    moved = _map(lambda p, x, f: p + RHO * f * x / length, params, g, inverse)
    return gradient(moved), memory


# Of the factorization those that remember: test_methods_do_not_feel_the_units makes the
# first two steps of it by all others. Functional SAM's model is linear in both problems.
TEN_STEPS = [
    *((name, "softmax") for name in METHODS),
    *((name, "factorization") for name in ("gsam", "look_sam", "friendly_sam")),
    ("momentum_sam", "factorization"),
]


@pytest.mark.parametrize(("name", "problem"), TEN_STEPS)
def test_ten_steps_follow_the_formula(name, problem, x64):
    params, data, value_fn, numpy_gradient = PROBLEMS[problem]()
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    data = {k: v.astype(jnp.float64) if k != "labels" else v for k, v in data.items()}
    expected = {k: np.asarray(v) for k, v in params.items()}
    arrays = {k: np.asarray(v) for k, v in data.items()}

    tx = optax.chain(METHODS[name], optax.sgd(RATE))
    state, memory = tx.init(params), None

    @jax.jit
    def update(params, state):
        updates, state = tx.update(None, state, params, value_fn=value_fn, **data)
        return optax.apply_updates(params, updates), state

    for step in range(STEPS):
        params, state = update(params, state)
        grads, memory = _reference(
            name, expected, lambda p: numpy_gradient(p, **arrays), step, memory
        )
        expected = _map(lambda p, g: p - RATE * g, expected, grads)
    for leaf in params:
        # Filter norms of the noise are float32, in another order of rounding.
        tolerance = 1e-6 if name == "random_sam" else 1e-9
        np.testing.assert_allclose(
            params[leaf], expected[leaf], rtol=tolerance, atol=tolerance
        )


@pytest.mark.heart
def test_sam_is_optax_sam_with_normalize():
    params, batch = regression()
    ours = optax.chain(flatopt.sam_gradients(0.05), optax.sgd(0.1, momentum=0.9))
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    theirs = optax.contrib.sam(
        optax.sgd(0.1, momentum=0.9), ascent, opaque_mode=True, reset_state=False
    )
    a, b = params, params
    state_a, state_b = ours.init(a), theirs.init(b)
    for _ in range(10):
        updates, state_a = ours.update(None, state_a, a, value_fn=loss_fn, batch=batch)
        a = optax.apply_updates(a, updates)
        updates, state_b = theirs.update(
            jax.grad(loss_fn)(b, batch),
            state_b,
            b,
            grad_fn=lambda p, _: jax.grad(loss_fn)(p, batch),
        )
        b = optax.apply_updates(b, updates)
    assert_close(a, b)


# Counts of gradients, microbatches, late starts


def _counting(calls):
    def value_fn(params, batch):
        calls.append(batch["targets"].shape[0])
        return loss_fn(params, batch)

    return value_fn


@pytest.mark.parametrize("name", METHODS)
def test_gradient_counts_are_exact(name):
    params, batch = regression()
    calls, counts = [], []
    tx = METHODS[name]
    state = tx.init(params)
    for _ in range(4):
        calls.clear()
        _, state = tx.update(
            None, state, params, value_fn=_counting(calls), batch=batch
        )
        counts.append(len(calls))
    # A functional link evaluates the loss of the outputs once, beside two Jacobians.
    expected = [1, 1, 1, 1] if name == "functional_sam" else [2, 2, 2, 2]
    assert counts == COUNTS.get(name, expected)


@pytest.mark.parametrize("name", ["sam", "gsam", "friendly_sam"])
def test_microbatches_average_the_method_over_chunks(name):
    params, batch = regression()
    make = {
        "sam": lambda **kw: flatopt.sam_gradients(RHO, **kw),
        "gsam": lambda **kw: flatopt.gsam_gradients(RHO, 0.4, **kw),
        "friendly_sam": lambda **kw: flatopt.friendly_sam_gradients(RHO, **kw),
    }[name]
    split = make(num_microbatches=4, batch_argnames=("batch",))

    def update(tx, batch):
        return tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)

    updates, state = jax.jit(lambda: update(split, batch))()
    parts = [
        update(make(), jax.tree.map(lambda x, j=j: x[j::4], batch)) for j in range(4)
    ]
    mean = jax.tree.map(lambda *x: sum(x) / 4, *[p[0] for p in parts])
    assert_close(updates, mean)
    values = [p[1].clean_value for p in parts]
    np.testing.assert_allclose(state.clean_value, sum(values) / 4, rtol=1e-5)
    whole, _ = update(make(), batch)
    with pytest.raises(AssertionError):
        assert_close(updates, whole)


@pytest.mark.parametrize("jit", [False, True])
def test_start_step_delays_the_method_and_costs_one_gradient_until_then(jit):
    params, batch = regression()
    tx = flatopt.sam_gradients(RHO, start_step=2)
    plain, sam = jax.grad(loss_fn)(params, batch), flatopt.sam_gradients(RHO)
    moved, _ = sam.update(None, sam.init(params), params, value_fn=loss_fn, batch=batch)
    calls = []

    def update(state):
        return tx.update(None, state, params, value_fn=_counting(calls), batch=batch)

    update = jax.jit(update) if jit else update
    state = tx.init(params)
    for step in range(4):
        calls.clear()
        updates, state = update(state)
        assert_close(updates, plain if step < 2 else moved)
        if not jit:
            assert len(calls) == (1 if step < 2 else 2)


def test_late_starts_begin_with_the_first_step_of_the_method():
    params, batch = regression()

    def run(tx, steps):
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(
                None, state, params, value_fn=loss_fn, batch=batch
            )
        return updates, state

    for make in (
        lambda **kw: flatopt.look_sam_gradients(RHO, every=3, **kw),
        lambda **kw: flatopt.friendly_sam_gradients(RHO, **kw),
    ):
        for steps in (1, 2, 3):
            updates, state = run(make(), steps)
            late, late_state = run(make(start_step=2), steps + 2)
            assert_close(late, updates)
            assert_close(late_state.memory, state.memory)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_inject_hyperparams(name):
    params = {"w": jnp.array([[0.5, -1.0], [2.0, 0.3]])}
    extra = {"gsam": {"alpha": 0.4}, "random_sam": {"sigma": 0.1}}.get(name, {})
    extra = {"sigma": 0.1} if name == "noisy_sam" else extra
    make = maker(f"{name}_gradients")
    tx = optax.inject_hyperparams(make)(rho=RHO, **extra)
    plain = make(rho=RHO, **extra)

    def value_fn(params):
        return jnp.sum(jnp.cos(params["w"]))

    def update(tx):
        return jax.jit(lambda s: tx.update(params, s, params, value_fn=value_fn))(
            tx.init(params)
        )[0]

    assert_close(update(tx), update(plain))


def test_python_numbers_masked_out_stay():
    params = {"w": jnp.array([3.0, 4.0]), "factor": 2.0}
    mask = {"w": True, "factor": False}
    for tx in (
        flatopt.sam_gradients(0.05, mask=mask),
        flatopt.smooth_gradients(0.05, mask=mask),
        flatopt.sam_sgd(0.1, mask=mask),
    ):
        updates, _ = tx.update(
            None,
            tx.init(params),
            params,
            value_fn=lambda p: jnp.sum(p["w"] ** 2) * p["factor"],
        )
        assert optax.apply_updates(params, updates)["factor"] == 2.0


@pytest.mark.heart
def test_rho_may_be_a_schedule_and_a_hyperparameter():
    params, batch = regression()
    tx = flatopt.sam_gradients(lambda count: jnp.where(count == 0, 0.0, RHO))
    updates, state = tx.update(
        None, tx.init(params), params, value_fn=loss_fn, batch=batch
    )
    assert_close(updates, jax.grad(loss_fn)(params, batch))
    injected = optax.inject_hyperparams(flatopt.sam_gradients)(rho=0.0)
    state = injected.init(params)
    step = jax.jit(
        lambda s: injected.update(
            _zeros(params), s, params, value_fn=loss_fn, batch=batch
        )
    )
    updates, state = step(state)
    assert_close(updates, jax.grad(loss_fn)(params, batch))
    state.hyperparams["rho"] = jnp.float32(RHO)
    with count_compilations() as compiled:
        moved, _ = step(state)
    assert not compiled
    with pytest.raises(AssertionError):
        assert_close(moved, updates)


def _zeros(params):
    return optax.tree.zeros_like(params)


# Safety


@pytest.mark.parametrize("name", METHODS)
def test_zero_gradient_gives_zero_and_no_nan(name):
    params = {"w": jnp.zeros((2, 2))}
    tx = METHODS[name]
    updates, _ = tx.update(
        None, tx.init(params), params, value_fn=lambda p: 0.0 * jnp.sum(p["w"])
    )
    np.testing.assert_array_equal(updates["w"], np.zeros((2, 2)))


def test_skip_nonfinite_keeps_the_memory_of_a_bad_step():
    params, batch = regression()
    bad = {**batch, "inputs": batch["inputs"].at[0, 0].set(jnp.nan)}
    tx = flatopt.skip_nonfinite(flatopt.friendly_sam_gradients(RHO))
    state = tx.init(params)
    for data in (batch, bad):
        before = state
        updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=data)
    assert state.num_skipped == 1
    assert state.inner_state.count == 2
    assert_close(state.inner_state.memory, before.inner_state.memory, rtol=0, atol=0)
    assert_close(updates, _zeros(params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiny_gradients_do_not_underflow(dtype):
    # |g| = 5e-25: its square is below float32, SAM's step must have length rho still.
    direction = jnp.array([3e-25, 4e-25], dtype)
    points = []

    @jax.custom_vjp
    def value_fn(params):
        return jnp.sum(direction * params)

    def backward(params, cotangent):
        points.append(params)
        return (cotangent * direction,)

    value_fn.defvjp(lambda params: (value_fn(params), params), backward)
    tx = flatopt.sam_gradients(0.5)
    params = jnp.zeros(2, dtype)
    tx.update(None, tx.init(params), params, value_fn=lambda params: value_fn(params))
    np.testing.assert_allclose(points[1].astype(jnp.float32), [0.3, 0.4], rtol=1e-2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_types_never_change(name, dtype, x64):
    params, batch = regression(16, jnp.dtype(dtype))
    tx = METHODS[name]
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert types(jax.eval_shape(tx.init, shapes)) == types(state)
    update = jax.eval_shape(
        lambda s: tx.update(None, s, params, value_fn=loss_fn, batch=batch), state
    )
    assert types(update[0]) == types(params)
    assert types(update[1]) == types(state)
    optax.tree.map_params(tx, lambda x: x, state)


@pytest.mark.parametrize("name", METHODS)
def test_masked_leaves_do_not_move(name):
    params, batch = regression()
    mask = {"first": False, "second": True}
    tx = _make(name, mask=mask)
    seen = []

    def value_fn(params, batch):
        seen.append(params["first"]["kernel"])
        return loss_fn(params, batch)

    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(None, state, params, value_fn=value_fn, batch=batch)
    if name != "functional_sam":  # whose loss is given the outputs of a model
        assert all(leaf is params["first"]["kernel"] for leaf in seen)
    np.testing.assert_array_equal(updates["first"]["kernel"], np.zeros((5, 4)))
    assert jnp.all(updates["second"]["kernel"] != 0)


def test_sharded_batch_gives_the_result_of_one_device():
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    params, batch = regression()
    tx = flatopt.sam_gradients(RHO)
    step = jax.jit(
        lambda p, b: tx.update(None, tx.init(p), p, value_fn=loss_fn, batch=b)[0]
    )
    expected = step(params, batch)
    for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            place = lambda tree, spec, mesh=mesh: jax.tree.map(  # noqa: E731
                lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree
            )
            result = step(place(params, P()), place(batch, P("data")))
            assert_close(result, expected, rtol=2e-5)


NUMBERS = {
    "asam": ["eta"],
    "filterwise_asam": ["eta"],
    "random_sam": ["sigma"],
    "noisy_sam": ["sigma"],
    "momentum_sam": ["decay"],
    "gsam": ["alpha"],
    "look_sam": ["alpha"],
    "friendly_sam": ["sigma", "decay"],
    "fisher_sam": ["eta"],
}


def _make(name, **options):
    required = {"random_sam": "sigma", "noisy_sam": "sigma", "gsam": "alpha"}
    if name in required:
        options = {required[name]: 0.1, **options}
    return maker(f"{name}_gradients")(**{"rho": RHO, **options})


@pytest.mark.parametrize("name", METHODS)
def test_every_number_of_every_method_is_checked(name):
    for argument in ["rho", *NUMBERS.get(name, [])]:
        for value, error, match in (
            (-1.0, ValueError, f"{argument} must be finite and not negative, got -1"),
            (jnp.nan, ValueError, f"{argument} must be finite and not negative, got"),
            (True, TypeError, f"{argument} must be a number or a scalar array, got T"),
            ("1", TypeError, f"{argument} must be a number or a scalar array, got '1'"),
            (jnp.ones(2), ValueError, f"{argument} must be a scalar, got shape"),
        ):
            with pytest.raises(error, match=match):
                _make(name, **{argument: value})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"num_microbatches": 4},
            ValueError,
            "num_microbatches=4 needs batch_argnames, got none; name the arguments",
        ),
        (
            {"num_microbatches": 0},
            ValueError,
            "num_microbatches must be an int of at least 1, got 0",
        ),
        (
            {"batch_argnames": "batch"},
            TypeError,
            "batch_argnames must be a tuple of names, got 'batch'",
        ),
        ({"start_step": -1}, ValueError, "start_step must be an int of at least 0"),
        ({"start_step": 1.5}, ValueError, "start_step must be an int of at least 0"),
        ({"key": "0"}, TypeError, "key must be an int or a single JAX random key"),
    ],
)
def test_wrong_options_of_every_method(name, options, error, match):
    with pytest.raises(error, match=match):
        _make(name, **options)


def test_wrong_numbers_of_single_methods():
    with pytest.raises(ValueError, match="every must be an int of at least 1, got 0"):
        flatopt.look_sam_gradients(RHO, 0)
    with pytest.raises(ValueError, match="decay must be less than 1, got 1"):
        flatopt.friendly_sam_gradients(RHO, decay=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_wrong_batches_and_masks_of_every_method(name):
    params, batch = regression()
    tx = _make(name, num_microbatches=5, batch_argnames=("batch",))
    with pytest.raises(ValueError, match="a batch of 64 examples does not divide"):
        tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)
    with pytest.raises(ValueError, match="names 'batch', which was not passed"):
        tx.update(None, tx.init(params), params, value_fn=loss_fn)
    tx = _make(name, mask={"other": True})
    with pytest.raises(ValueError, match="mask must be a tree prefix of params"):
        tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "functional_sam"])
def test_missing_value_fn_names_the_method(name):
    tx = METHODS[name]
    params = jnp.ones(2)
    with pytest.raises(ValueError, match=f"{name}_gradients needs value_fn, which was"):
        tx.update(None, tx.init(params), params)


# Directions that are rounding noise

X = jax.random.normal(jax.random.key(21), (64, 20))
TARGETS = X @ jax.random.normal(jax.random.key(22), (20,))
LABELS = jax.random.randint(jax.random.key(23), (64,), 0, 4)


def _squares(params, x=X):
    return jnp.mean((x @ params - TARGETS.astype(x.dtype)) ** 2)


def _classes(params, x=X):
    logits = x @ params.reshape(20, 4)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


NOISY = {"squares": (_squares, (20,)), "classes": (_classes, (80,))}
RHOS = [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]


def _direction(value_fn, params, x, rho):
    """SAM's direction orthogonal to the gradient, in float64."""
    g = jax.grad(value_fn)(params, x)
    part = jax.grad(value_fn)(params + rho * g / jnp.linalg.norm(g), x)
    part = part - (part @ g) / (g @ g) * g
    return part / jnp.linalg.norm(part)


@pytest.mark.heart
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("problem", NOISY)
def test_look_sam_keeps_a_true_direction_or_none(problem, dtype, x64):
    value_fn, shape = NOISY[problem]
    params = jax.random.normal(jax.random.key(24), shape, dtype)
    inputs = X.astype(dtype)
    look = jax.jit(
        lambda rho: (tx := flatopt.look_sam_gradients(rho)).update(
            None, tx.init(params), params, value_fn=value_fn, x=inputs
        )[1]
    )
    exact = jax.jit(_direction, static_argnums=0)
    exact_params, exact_inputs = params.astype("float64"), inputs.astype("float64")
    kept = []
    for rho in RHOS:
        memory = np.asarray(look(jnp.float32(rho)).memory, "f8")
        kept.append(bool(memory.any()))
        if kept[-1]:
            truth = exact(value_fn, exact_params, exact_inputs, jnp.float64(rho))
            assert memory @ np.asarray(truth) > 0.85, rho
    assert kept == sorted(kept)  # none below some rho, and one above it
    assert not kept[0]
    assert kept[RHOS.index(1e-4 if dtype == "float32" else 0.1)]


@pytest.mark.parametrize("scale", [1e-33, 1e-14, 1.0, 1e15, 1e33])
def test_look_sam_keeps_what_is_across_at_every_scale_of_the_loss(scale):
    # So short a part that one projection leaves up to 7e-3 of it along the gradient.
    rng = np.random.default_rng(0)
    params = rng.standard_normal(1000).astype("float32")
    curvatures = (1 + 1e-2 * rng.standard_normal(1000)).astype("float32")
    tx = flatopt.look_sam_gradients(0.1)
    memory = jax.jit(
        lambda p: (
            tx.update(
                None,
                tx.init(p),
                p,
                value_fn=lambda p: jnp.float32(scale) / 2 * jnp.sum(curvatures * p**2),
            )[1].memory
        )
    )(params)
    g, memory = curvatures.astype("f8") * params, np.asarray(memory, "f8")
    uphill = g / np.linalg.norm(g)
    part = curvatures * (params + 0.1 * uphill)
    part = part - (part @ uphill) * uphill
    assert 1e-5 < np.linalg.norm(part) / np.linalg.norm(g) < 1e-4
    np.testing.assert_allclose(memory @ part / np.linalg.norm(part), 1, rtol=1e-4)
    assert abs(memory @ uphill) < 1e-6


def test_look_sam_stores_little_more_than_its_gradients():
    size = 512
    params = {name: jnp.ones((size, size)) for name in "abc"}

    def value_fn(params, x):
        for weight in params.values():
            x = jnp.tanh(x @ weight)
        return jnp.mean(x**2)

    tx = flatopt.look_sam_gradients(RHO)
    lowered = jax.jit(tx.update, static_argnames="value_fn").lower(
        None, tx.init(params), params, value_fn=value_fn, x=jnp.ones((4, size))
    )
    stored = lowered.compile().memory_analysis().temp_size_in_bytes
    # Of the clean gradient, the point and the second gradient, some lie in the results.
    assert stored / (4 * 3 * size**2) < 2.6


@pytest.mark.parametrize(
    "value_fn", [lambda p: jnp.sum(p**2) / 2, lambda p: jnp.sum(p), lambda p: p[0] ** 4]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_look_sam_reuses_nothing_where_the_gradients_are_parallel(value_fn, dtype):
    params = jax.random.normal(jax.random.key(25), (1000,), dtype)
    tx = flatopt.look_sam_gradients(0.05, every=3)
    update = jax.jit(lambda s: tx.update(None, s, params, value_fn=value_fn))
    _, state = update(tx.init(params))
    updates, _ = update(state)
    np.testing.assert_array_equal(updates, jax.grad(value_fn)(params))


def test_look_sam_warms_up_from_nothing():
    params = jax.random.normal(jax.random.key(24), (20,))
    tx = flatopt.look_sam_gradients(optax.linear_schedule(0.0, 0.05, 10), every=3)
    state, update = tx.init(params), jax.jit(tx.update, static_argnames="value_fn")
    for step in range(5):
        updates, state = update(None, state, params, value_fn=_squares)
        if step < 3:
            np.testing.assert_allclose(updates, jax.grad(_squares)(params), rtol=1e-5)
    assert (
        jnp.linalg.norm(updates - jax.grad(_squares)(params)) > 1.0
    )  # 0.7 of its norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_friendly_sam_makes_no_step_along_rounding_noise(dtype):
    # The gradient is the same at every step, and so its own part is nothing.
    slope = jax.random.normal(jax.random.key(26), (50,), dtype)
    params = jax.random.normal(jax.random.key(27), (50,), dtype)
    points = []

    def value_fn(params, seen):
        jax.debug.callback(lambda p: points.append(np.asarray(p, "f8")), params)
        return jnp.sum(params * slope).astype(jnp.float32)

    tx = flatopt.friendly_sam_gradients(0.5)
    state = tx.init(params)
    update = jax.jit(lambda s: tx.update(None, s, params, value_fn=value_fn, seen=0))
    for _ in range(6):
        points.clear()
        _, state = update(state)
        jax.effects_barrier()
    for point in points:
        np.testing.assert_array_equal(point, np.asarray(params, "f8"))


def test_derivatives_through_a_step_are_finite_where_the_gradient_is_zero():
    for name, tx in METHODS.items():

        def length(params, tx=tx):
            updates, _ = tx.update(
                None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2)
            )
            return jnp.sum(updates**2)

        assert jnp.isfinite(jax.grad(length)(jnp.zeros(2))).all(), name


# Parameters and gradients far from one


def _in_units(name, size):
    """A method whose lengths are in units of a size."""
    rho = RHO if "asam" in name else RHO * size
    options = {
        "asam": {"eta": 0.05 * size},
        "filterwise_asam": {"eta": 0.05 * size},
        "random_sam": {"sigma": 0.1, "key": 3},
        "noisy_sam": {"sigma": 0.1 * size, "key": 3},
        "gsam": {"alpha": 0.4},
        "look_sam": {"every": 3, "alpha": 0.7},
        "friendly_sam": {"sigma": 0.8, "decay": 0.9},
        "fisher_sam": {"eta": 0.5},
    }.get(name, {})
    return getattr(flatopt, f"{name}_gradients")(rho, **options)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "functional_sam"])
def test_methods_do_not_feel_the_units(name):
    params, data, value_fn, numpy_gradient = _factorization()
    start = jax.tree.map(lambda p: np.asarray(p, "f8"), params)
    target = np.asarray(data["target"], "f8")

    @jax.jit
    def two_steps(size, steep):
        def scaled_fn(scaled):
            point = jax.tree.map(lambda x: x / size, scaled)
            return steep * (size * value_fn(point, **data))

        scaled = jax.tree.map(lambda x: x * size, params)
        tx = _in_units(name, size)
        state, found = tx.init(scaled), []
        for _ in range(2):
            updates, state = tx.update(None, state, scaled, value_fn=scaled_fn)
            found.append(jax.tree.map(lambda g: g / steep, updates))
        return found

    sizes = [(1e-25, 1.0), (1e25, 1.0), (1.0, 1e-12), (1.0, 1e12)]
    if name == "usam":  # whose step is in units of the gradient
        sizes = sizes[:2]
    for size, steep in sizes:
        found, memory = two_steps(jnp.float32(size), jnp.float32(steep)), None
        for step, grads in enumerate(found):
            expected, memory = _reference(
                name,
                start,
                lambda p, steep=steep: _map(
                    lambda g: steep * g, numpy_gradient(p, target)
                ),
                step,
                memory,
            )
            for leaf in start:
                np.testing.assert_allclose(
                    grads[leaf], expected[leaf] / steep, rtol=2e-4, atol=2e-5
                )


# Momentum-SAM and noise of any kernel


def test_the_momentum_of_momentum_sam_is_that_of_the_optimizer():
    params, batch = regression()
    tx = optax.chain(flatopt.momentum_sam_gradients(RHO, 0.8), optax.sgd(0.1, 0.8))
    state = tx.init(params)
    update = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=loss_fn, batch=batch))
    for _ in range(3):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
    assert_close(state[0].memory, state[1][0].trace)


def test_noisy_sam_takes_any_kernel_and_random_sam_is_the_filterwise_one():
    params, batch = regression()

    def update(tx):
        return tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)

    random = flatopt.random_sam_gradients(RHO, 0.1, key=3)
    noisy = flatopt.noisy_sam_gradients(RHO, 0.1, kernels.filterwise(), key=3)
    assert_close(update(noisy)[0], update(random)[0], rtol=0, atol=0)
    other = flatopt.noisy_sam_gradients(RHO, 0.1, key=3)
    with pytest.raises(AssertionError):
        assert_close(update(other)[0], update(random)[0])
    with pytest.raises(TypeError, match="kernel must be a function"):
        flatopt.noisy_sam_gradients(RHO, 0.1, kernels.filterwise)
