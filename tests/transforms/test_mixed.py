"""A share of the clean gradient, a late start, and ARWP, against NumPy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    arguments_of,
    assert_close,
    loss_fn,
    regression,
    softmax_gradient,
    softmax_loss,
    softmax_regression,
    types,
)

import flatopt
from flatopt import kernels

SHARE, SCALE, RATE = 0.3, 0.2, 0.2
KEY = jax.random.key(5)
LINKS = {
    "smooth": lambda **kw: flatopt.smooth_gradients(SCALE, key=5, **kw),
    "lpf": lambda **kw: flatopt.lpf_gradients(SCALE, 2, key=5, **kw),
    "nso": lambda **kw: flatopt.nso_gradients(SCALE, key=5, **kw),
    "arwp": lambda **kw: flatopt.arwp_gradients(SCALE, key=5, **kw),
}


def _problem(num_examples=24):
    """One leaf: few operations in each of many passes. No parabola, as pairs cancel there."""
    rng = np.random.default_rng(7)
    arrays = [
        rng.normal(size=shape).astype("f4")
        for shape in ((5, 2), (num_examples, 5), (num_examples, 2))
    ]
    weights, inputs, targets = jax.device_put(arrays)
    return {"w": weights}, {"inputs": inputs, "targets": targets}


def _tanh_loss(params, batch):
    outputs = jnp.tanh(batch["inputs"] @ params["w"])
    return jnp.mean((outputs - batch["targets"]) ** 2)


def _moved(params, sign, index=0):
    noise = kernels.isotropic()(jax.random.fold_in(KEY, index), params)
    return jax.tree.map(lambda p, u: p + sign * SCALE * u, params, noise)


def _mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def _mix(clean, noisy):
    return jax.tree.map(lambda c, n: SHARE * c + (1 - SHARE) * n, clean, noisy)


# The clean pass of smooth_value_and_grad


@pytest.mark.heart
@pytest.mark.parametrize(
    ("antithetic", "jit"), [(False, True), (True, True), (True, False)]
)
def test_the_clean_pass_is_mixed_with_the_noisy_ones(antithetic, jit):
    params, batch = _problem()
    f = flatopt.smooth_value_and_grad(
        _tanh_loss, SCALE, num_samples=2, antithetic=antithetic, clean_weight=SHARE
    )
    found = (jax.jit(f) if jit else f)(KEY, params, batch)
    both = jax.jit(jax.value_and_grad(_tanh_loss))
    signs = (1, -1) if antithetic else (1,)
    noisy = _mean([both(_moved(params, s, j), batch) for j in (0, 1) for s in signs])
    assert_close(found, _mix(both(params, batch), noisy), rtol=1e-4)


def _chunk(batch, index, count):
    return jax.tree.map(lambda x: x[index::count], batch)


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", 2, "auto"])
def test_the_clean_pass_takes_a_chunk_of_its_own(strategy):
    params, batch = _problem()
    f = flatopt.smooth_value_and_grad(
        _tanh_loss,
        SCALE,
        num_samples=3,
        batch_argnames=("batch",),
        clean_weight=SHARE,
        strategy=strategy,
    )
    found = jax.jit(f)(KEY, params, batch=batch)
    both = jax.jit(jax.value_and_grad(_tanh_loss))
    noisy = _mean([both(_moved(params, 1, j), _chunk(batch, j, 4)) for j in range(3)])
    assert_close(found, _mix(both(params, _chunk(batch, 3, 4)), noisy), rtol=1e-4)
    with pytest.raises(ValueError, match=r"divide into num_samples \+ 1=4 chunks"):
        f(KEY, params, batch=_problem(21)[1])


def _weighted(params, batch):
    errors = (batch["x"] @ params - 1) ** 2
    return jnp.sum(batch["mask"] * errors) / jnp.sum(batch["mask"])


def _weighted_case(mask):
    params = jnp.array([0.5, -1.0])
    batch = {"x": jax.random.normal(jax.random.key(2), (12, 2)), "mask": mask}
    f = flatopt.smooth_value_and_grad(
        _weighted,
        SCALE,
        num_samples=2,
        batch_argnames=("batch",),
        weight_fn=lambda chunk: chunk["mask"].sum(),
        clean_weight=SHARE,
    )
    return jax.jit(f)(KEY, params, batch=batch), params, batch


def _part(params, batch, index):
    """Value, gradient and weight of one of three chunks."""
    chunk = _chunk(batch, index, 3)
    point = params if index == 2 else _moved(params, 1, index)
    value, grads = jax.value_and_grad(_weighted)(point, chunk)
    return float(value), np.asarray(grads), float(chunk["mask"].sum())


@pytest.mark.parametrize("empty", [None, 0, 2])
def test_chunks_of_any_weight_are_mixed_by_the_share(empty):
    mask = jnp.ones(12).at[:4].set(0.0)
    if empty is not None:
        mask = mask.at[empty::3].set(0.0)
    (value, grads), params, batch = _weighted_case(mask)
    parts = [_part(params, batch, j) for j in range(3)]
    noisy = [part for part in parts[:2] if part[2] > 0]
    total = sum(w for _, _, w in noisy)
    shares = [(1 - SHARE) * w / total for _, _, w in noisy] + [SHARE]
    used = [*noisy, parts[2]]
    if empty == 2:  # no example is clean: the noisy ones count alone
        shares, used = [w / total for _, _, w in noisy], noisy
    expected = sum(s * v for s, (v, _, _) in zip(shares, used, strict=True))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    expected = sum(s * g for s, (_, g, _) in zip(shares, used, strict=True))
    np.testing.assert_allclose(grads, expected, rtol=1e-4)


def test_a_batch_of_no_weight_is_nan_and_one_of_clean_examples_is_clean():
    (value, grads), *_ = _weighted_case(jnp.zeros(12))
    assert jnp.isnan(value)
    assert jnp.isnan(grads).all()
    mask = jnp.zeros(12).at[2::3].set(1.0)
    (value, grads), params, batch = _weighted_case(mask)
    expected = _part(params, batch, 2)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grads, expected[1], rtol=1e-5)


def test_aux_is_that_of_the_noisy_passes_and_the_share_may_be_traced():
    params, batch = regression(24)

    def value_fn(params, batch):
        return loss_fn(params, batch), params["second"]["bias"]

    @jax.jit
    def f(share):
        return flatopt.smooth_value_and_grad(
            value_fn, SCALE, num_samples=2, has_aux=True, clean_weight=share
        )(KEY, params, batch)

    (value, aux), _ = f(jnp.float32(1.0))
    assert aux.shape == (2, 2)
    assert (aux != 0).all()
    np.testing.assert_allclose(value, loss_fn(params, batch), rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_mix_what_all_of_them_weigh(check_vma):
    params = jnp.array([0.5, -1.0])
    mask = jnp.ones(48).at[:5].set(0.0).at[8].set(0.0)
    batch = {"x": jax.random.normal(jax.random.key(2), (48, 2)), "mask": mask}
    f = flatopt.smooth_value_and_grad(
        _weighted,
        0.0,
        num_samples=2,
        batch_argnames=("batch",),
        weight_fn=lambda chunk: chunk["mask"].sum(),
        clean_weight=SHARE,
        axis_name="data",
    )
    spec = jax.sharding.PartitionSpec
    mapped = jax.shard_map(
        lambda batch: f(KEY, params, batch=batch),
        mesh=jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=spec("data"),
        out_specs=spec(),
        check_vma=check_vma,
    )
    value, grads = jax.jit(mapped)(batch)
    x, kept = np.asarray(batch["x"], "f8"), np.asarray(mask, "f8")
    is_clean = np.arange(48) % 12 % 3 == 2
    errors = x @ np.asarray(params, "f8") - 1
    weights = SHARE * kept * is_clean / (kept * is_clean).sum()
    weights += (1 - SHARE) * kept * ~is_clean / (kept * ~is_clean).sum()
    np.testing.assert_allclose(value, (weights * errors**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(grads, 2 * (weights * errors) @ x, rtol=1e-4)


# Links


@pytest.mark.parametrize("name", LINKS)
def test_the_share_of_a_link_may_be_a_schedule_or_injected(name):
    params, batch = _problem()
    make = LINKS[name]

    def update(tx, **changes):
        state = tx.init(params)
        if changes:
            state.hyperparams.update(changes)
        return tx.update(params, state, params, value_fn=_tanh_loss, batch=batch)[0]

    one, zero = update(make(clean_weight=1.0)), update(make(clean_weight=0.0))
    with pytest.raises(AssertionError):
        assert_close(one, zero, rtol=1e-2)
    half = update(make(clean_weight=0.5))
    assert_close(half, _mean([one, zero]), rtol=1e-4)
    assert_close(update(make(clean_weight=lambda count: jnp.float32(0.5))), half)
    if name == "smooth":
        injected = optax.inject_hyperparams(flatopt.smooth_gradients)(
            SCALE, clean_weight=0.0, key=5
        )
        share = jnp.float32(0.5)
        assert_close(update(injected, clean_weight=share), half)
        assert_close(one, jax.grad(_tanh_loss)(params, batch))


COSTS = {  # gradients of the batch in five steps of which two are plain
    "smooth": 2 + 3 * 2,
    "nso": 2 + 3 * 3,
    "lpf": 5,
    "arwp": 2 + 3 * 2,
}


@pytest.mark.heart
@pytest.mark.parametrize("name", LINKS)
def test_a_late_start_costs_one_gradient_until_then(name):
    params, batch = _problem()
    counted = flatopt.GradientCounter(_tanh_loss)
    tx = LINKS[name](start_step=2, clean_weight=SHARE)
    state = tx.init(params)
    late = LINKS[name](clean_weight=SHARE)
    other = late.init(params)
    update = jax.jit(
        lambda s: tx.update(None, s, params, value_fn=counted, batch=batch)
    )
    always = jax.jit(
        lambda s: late.update(None, s, params, value_fn=_tanh_loss, batch=batch)
    )
    value, plain = jax.jit(jax.value_and_grad(_tanh_loss))(params, batch)
    for step in range(5):
        updates, state = update(state)
        if step < 2:
            assert_close(updates, plain)
            assert_close(state.smoothed_value, value)
        expected, other = always(other)
        if step >= 2 and name != "arwp":  # whose F was gathered at other gradients
            assert_close(updates, expected)
    assert counted.count == 24 * COSTS[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", LINKS)
def test_types_never_change(name, dtype, x64):
    params, batch = regression(24, jnp.dtype(dtype))
    tx = LINKS[name](start_step=2, clean_weight=SHARE)
    state = tx.init(params)
    found = jax.eval_shape(
        lambda s: tx.update(None, s, params, value_fn=loss_fn, batch=batch), state
    )
    assert types(found) == (types(params), types(state))


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"clean_weight": 1.5},
            ValueError,
            "clean_weight must be between 0 and 1, got",
        ),
        ({"clean_weight": -0.1}, ValueError, "clean_weight must be finite and not neg"),
        ({"clean_weight": "x"}, TypeError, "clean_weight must be a number"),
        ({"start_step": -1}, ValueError, "start_step must be an int of at least 0"),
    ],
)
def test_wrong_options(name, options, error, match):
    with pytest.raises(error, match=match):
        LINKS[name](**options)


# ARWP


def _norms(leaf):
    axes = tuple(range(leaf.ndim - 1)) if leaf.ndim > 1 else (0,)
    return np.sqrt((leaf**2).sum(axis=axes, keepdims=True))


@pytest.mark.parametrize("is_split", [False, True])
def test_twenty_steps_of_arwp_follow_the_formula(is_split, x64):
    params, inputs, labels = softmax_regression()
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    inputs = inputs.astype(jnp.float64)
    expected = {k: np.asarray(v) for k, v in params.items()}
    x, y = np.asarray(inputs), np.asarray(labels)
    names = ("inputs", "labels") if is_split else ()
    tx = optax.chain(
        flatopt.arwp_gradients(SCALE, 2.0, 0.9, batch_argnames=names, key=5),
        optax.sgd(RATE),
    )
    state = tx.init(params)
    update = jax.jit(
        lambda p, s: tx.update(
            None, s, p, value_fn=softmax_loss, inputs=inputs, labels=labels
        )
    )
    memory = {k: np.zeros_like(_norms(v)) for k, v in expected.items()}
    rows, clean = (
        (slice(0, None, 2), slice(1, None, 2)) if is_split else [slice(None)] * 2
    )
    for step in range(20):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        key = jax.random.fold_in(jax.random.fold_in(KEY, step), 0)
        units = kernels.isotropic()(key, expected)
        moved = {
            k: p + SCALE * _norms(p) / np.sqrt(1 + 2 * memory[k]) * np.asarray(units[k])
            for k, p in expected.items()
        }
        noisy = softmax_gradient(moved, x[rows], y[rows])
        plain = softmax_gradient(expected, x[clean], y[clean])
        grads = {k: (noisy[k] + plain[k]) / 2 for k in expected}
        memory = {k: 0.9 * m + _norms(grads[k]) ** 2 for k, m in memory.items()}
        expected = {k: p - RATE * grads[k] for k, p in expected.items()}
    for leaf in expected:
        np.testing.assert_allclose(params[leaf], expected[leaf], rtol=2e-5)
        np.testing.assert_allclose(state[0].memory[leaf], memory[leaf], rtol=2e-5)
    assert memory["kernel"].min() > 0.3  # three quarters of RWP's noise, or less


def test_arwp_without_eta_is_rwp_and_remembers_free_filters_alone():
    params, batch = regression(24)
    mask = {"first": False, "second": True}

    def update(tx):
        return tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)

    updates, state = update(flatopt.arwp_gradients(SCALE, 0.0, mask=mask))
    rwp = flatopt.smooth_gradients(
        SCALE, kernels.filterwise(), clean_weight=0.5, mask=mask
    )
    assert_close(updates, update(rwp)[0])
    assert state.memory["first"]["kernel"] is None
    assert jax.tree.map(jnp.shape, state.memory["second"]) == {
        "bias": (1,),
        "kernel": (1, 2),
    }


def test_arwp_shrinks_the_noise_of_what_it_differentiates_alone():
    params = {"frozen": jnp.array([3.0, 4.0]), "free": jnp.array([0.6, 0.8])}
    tx = flatopt.arwp_gradients(
        SCALE, 2.0, mask={"frozen": False, "free": True},
        noise_mask=True, clean_weight=None, key=5,
    )  # fmt: skip

    def product(params):
        return jnp.sum(params["frozen"] * params["free"])

    state, memory = tx.init(params), 0.0
    for step in range(3):
        updates, state = tx.update(None, state, params, value_fn=product)
        key = jax.random.fold_in(jax.random.fold_in(KEY, step), 0)
        units = kernels.isotropic()(key, params)
        moved = np.asarray(params["frozen"]) + SCALE * 5 * np.asarray(units["frozen"])
        shrunk = SCALE / np.sqrt(1 + 2 * memory) * np.asarray(units["free"])
        np.testing.assert_allclose(updates["free"], moved, rtol=1e-5)
        np.testing.assert_array_equal(updates["frozen"], 0)
        value = (moved * (np.asarray(params["free"]) + shrunk)).sum()
        np.testing.assert_allclose(state.smoothed_value, value, rtol=1e-5)
        memory = 0.99 * memory + (moved**2).sum()
        np.testing.assert_allclose(state.memory["free"], [memory], rtol=1e-5)
    assert state.memory["frozen"] is None


# What the links of noise take


ALL = {"noise_mask", "clean_weight", "start_step"}
TAKEN = {
    "smooth_gradients": ALL,
    "lpf_gradients": ALL,
    "nso_gradients": ALL,
    "arwp_gradients": ALL,
    "noisy_sam_gradients": {"start_step"},
    "smooth_gradients_zeroth_order": set(),
    "entropy_sgd_gradients": set(),
    "ivon": set(),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_link_of_noise_takes_these_or_says_why_not(name):
    make = getattr(flatopt, name)
    taken = ALL & set(inspect.signature(make).parameters)
    assert taken == TAKEN[name]
    said = make.__doc__.partition("Args:")[0]
    for argument in ALL - taken:
        assert f"``{argument}``" in said
        with pytest.raises(TypeError, match=argument):
            make(**arguments_of(name), **{argument: None})
