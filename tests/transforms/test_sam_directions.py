"""Directions of SAM's ascent step, and SAM of a model and a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_close,
    loss_fn,
    maker,
    regression,
    softmax_gradient,
    softmax_loss,
    softmax_regression,
    types,
)

import flatopt

RHO, RATE = 0.3, 0.2


def _map(function, *trees):
    return {name: function(*(t[name] for t in trees)) for name in trees[0]}


def _step(params, direction, length):
    norm = np.sqrt(sum((leaf**2).sum() for leaf in direction.values()))
    return _map(lambda p, d: p + length * d / norm, params, direction)


def _directed_step(params, g, state, count):
    """Adam's direction in NumPy, and its moments."""
    m, v = state
    m = _map(lambda m, x: 0.9 * m + 0.1 * x, m, g)
    v = _map(lambda v, x: 0.999 * v + 0.001 * x**2, v, g)
    up = _map(
        lambda m, v: m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8),
        m,
        v,
    )
    return up, (m, v)


def test_twenty_steps_of_preconditioned_sam_follow_the_formula(x64, standard_promotion):
    params, inputs, labels = softmax_regression()
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    data = {"inputs": inputs.astype(jnp.float64), "labels": labels}
    arrays = {k: np.asarray(v) for k, v in data.items()}
    expected = {k: np.asarray(v) for k, v in params.items()}
    zeros = _map(np.zeros_like, expected)
    tx = optax.chain(flatopt.sam_gradients(RHO, optax.scale_by_adam()), optax.sgd(RATE))
    state, moments = tx.init(params), (zeros, zeros)
    update = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=softmax_loss, **data))
    for count in range(1, 21):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        g = softmax_gradient(expected, **arrays)
        up, moments = _directed_step(expected, g, moments, count)
        g = softmax_gradient(_step(expected, up, RHO), **arrays)
        expected = _map(lambda p, g: p - RATE * g, expected, g)
    for leaf in params:
        np.testing.assert_allclose(params[leaf], expected[leaf], rtol=1e-7)
    assert state[0].memory.count == 20


DIRECTIONS = {
    "adam": optax.scale_by_adam(),
    "average": optax.ema(0.4),
    "sign": optax.scale_by_sign(),
    "muon": optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(), tree
        )
    ),
}


@pytest.mark.heart
@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_is_the_adversary_of_optax_sam(name, standard_promotion):
    params, batch = regression()
    params = {"first": params["first"]}  # matrices alone, for Muon

    def value_fn(params, batch):
        outputs = jnp.tanh(batch["inputs"] @ params["first"]["kernel"])
        return jnp.mean((outputs[:, :2] - batch["targets"]) ** 2)

    ours = optax.chain(
        flatopt.sam_gradients(0.05, DIRECTIONS[name]), optax.sgd(0.1, momentum=0.9)
    )
    adversary = optax.chain(
        DIRECTIONS[name], optax.contrib.normalize(), optax.sgd(0.05)
    )
    theirs = optax.contrib.sam(
        optax.sgd(0.1, momentum=0.9), adversary, opaque_mode=True, reset_state=False
    )
    gradient = jax.jit(jax.grad(value_fn))
    update = jax.jit(
        lambda p, s: ours.update(None, s, p, value_fn=value_fn, batch=batch)
    )
    a, b = params, params
    state_a, state_b = ours.init(a), theirs.init(b)
    for _ in range(5):
        updates, state_a = update(a, state_a)
        a = optax.apply_updates(a, updates)
        updates, state_b = theirs.update(
            gradient(b, batch), state_b, b, grad_fn=lambda p, _: gradient(p, batch)
        )
        b = optax.apply_updates(b, updates)
    assert_close(a, b)
    with pytest.raises(AssertionError):  # the direction matters
        assert_close(a, _sam_steps(params, value_fn, batch, 5), rtol=1e-4, atol=1e-5)


def _sam_steps(params, value_fn, batch, steps):
    tx = optax.chain(flatopt.sam_gradients(0.05), optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(None, state, params, value_fn=value_fn, batch=batch)
        params = optax.apply_updates(params, updates)
    return params


def _directed(**options):
    return flatopt.sam_gradients(RHO, optax.scale_by_adam(), **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_state_of_a_direction_keeps_its_types(dtype, x64, standard_promotion):
    params, batch = regression(16, jnp.dtype(dtype))
    tx = _directed(start_step=2, num_microbatches=2, batch_argnames=("batch",))
    state = tx.init(params)
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    moments = (state.memory.mu, state.memory.nu)
    assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype(wide)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert types(jax.eval_shape(tx.init, shapes)) == types(state)
    assert types(tx.init(shapes)) == types(state)
    update = jax.eval_shape(
        lambda s: tx.update(None, s, params, value_fn=loss_fn, batch=batch), state
    )
    assert types(update) == (types(params), types(state))
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert mapped.memory.count == 0
    assert (mapped.memory.mu["second"]["bias"] == 1).all()


def test_the_state_of_a_direction_is_that_of_the_leaves_that_are_trained(
    standard_promotion,
):
    params, batch = regression()
    mask = {"first": False, "second": True}
    tx = _directed(mask=mask)
    state = tx.init(params)
    assert state.memory.mu["first"]["kernel"] is None
    updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=batch)
    np.testing.assert_array_equal(updates["first"]["kernel"], 0)
    assert (state.memory.nu["second"]["kernel"] > 0).all()
    only = flatopt.sam_gradients(RHO, optax.scale_by_adam())
    expected, _ = only.update(
        None,
        only.init(params["second"]),
        params["second"],
        value_fn=lambda p: loss_fn({**params, "second": p}, batch),
    )
    assert_close(updates["second"], expected)


def test_microbatches_average_the_states_of_a_direction(standard_promotion):
    params, batch = regression()
    split = _directed(num_microbatches=4, batch_argnames=("batch",))
    alone = _directed()

    def update(tx, batch):
        return tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)

    updates, state = jax.jit(lambda: update(split, batch))()
    parts = [
        update(alone, jax.tree.map(lambda x, j=j: x[j::4], batch)) for j in range(4)
    ]
    assert_close(updates, jax.tree.map(lambda *x: sum(x) / 4, *[p[0] for p in parts]))
    means = jax.tree.map(lambda *x: sum(x) / 4, *[p[1].memory.nu for p in parts])
    assert_close(state.memory.nu, means)
    assert state.memory.count == 1
    assert state.memory.count.dtype == jnp.int32


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_share_the_state_of_a_direction(check_vma, standard_promotion):
    params, batch = regression()
    tx, spec = _directed(axis_name="data"), jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(params, batch):
        return tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(spec(), spec("data")),
        out_specs=spec(),
        check_vma=check_vma,
    )
    updates, state = jax.jit(mapped)(params, batch)
    # Contiguous rows on the devices: the strided chunks of the rows in another order.
    order = jnp.arange(64).reshape(8, 8).T.ravel()
    split = _directed(num_microbatches=8, batch_argnames=("batch",))
    expected, other = jax.jit(
        lambda b: split.update(
            None, split.init(params), params, value_fn=loss_fn, batch=b
        )
    )(jax.tree.map(lambda x: x[order], batch))
    assert_close(updates, expected, rtol=2e-5)
    assert_close(state.memory, other.memory, rtol=2e-5)


@pytest.mark.parametrize(
    ("direction", "error", "match"),
    [
        (optax.adam(0.1), ValueError, "direction must point uphill, got .*downhill;"),
        (optax.sgd(0.1), ValueError, "direction must point uphill"),
        (
            optax.scale_by_adam,
            TypeError,
            "direction must be an optax .* scale_by_adam;",
        ),
        (0.9, TypeError, "direction must be an optax transformation, got float; write"),
    ],
)
@pytest.mark.parametrize("name", ["sam", "functional_sam"])
def test_a_direction_that_is_none_is_refused(name, direction, error, match):
    with pytest.raises(error, match=match):
        maker(f"{name}_gradients")(rho=RHO, direction=direction)


# Functional SAM


def _tanh_model(params, inputs):
    return jnp.tanh(inputs @ params["kernel"] + params["bias"][None])


def _tanh_parts(params, x):
    """Outputs, and the pull-back of a cotangent, in NumPy."""
    outputs = np.tanh(x @ params["kernel"] + params["bias"])

    def pull_back(c):
        inner = c * (1 - outputs**2)
        return {"bias": inner.sum(axis=0), "kernel": x.T @ inner}

    return outputs, pull_back


def _cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def _output_gradient(outputs, labels):
    p = np.exp(outputs)
    p /= p.sum(axis=1, keepdims=True)
    return (p - np.eye(3)[labels]) / len(labels)


@pytest.mark.heart
def test_twenty_steps_of_functional_sam_follow_the_formula(x64):
    params, inputs, labels = softmax_regression()
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    inputs = inputs.astype(jnp.float64)
    x, y = np.asarray(inputs), np.asarray(labels)
    expected = {k: np.asarray(v) for k, v in params.items()}
    tx = optax.chain(
        flatopt.functional_sam_gradients(_tanh_model, _cross_entropy, RHO),
        optax.sgd(RATE),
    )
    state = tx.init(params)
    update = jax.jit(lambda p, s: tx.update(None, s, p, inputs=inputs, labels=labels))
    for _ in range(20):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        outputs, pull_back = _tanh_parts(expected, x)
        slope = _output_gradient(outputs, y)
        _, moved_back = _tanh_parts(_step(expected, pull_back(slope), RHO), x)
        grads = moved_back(slope)
        expected = _map(lambda p, g: p - RATE * g, expected, grads)
    for leaf in params:
        np.testing.assert_allclose(params[leaf], expected[leaf], rtol=1e-9)


def test_functional_sam_of_a_linear_model_is_the_plain_gradient():
    params, inputs, labels = softmax_regression()
    targets = jax.nn.one_hot(labels, 3)

    def model_fn(params, inputs):
        return inputs @ params["kernel"] + params["bias"][None]

    def squares(outputs, targets):
        return jnp.mean((outputs - targets) ** 2)

    tx = flatopt.functional_sam_gradients(model_fn, squares, 0.5)
    updates, state = tx.update(
        None, tx.init(params), params, inputs=inputs, targets=targets, other=1
    )
    value, grads = jax.value_and_grad(lambda p: squares(model_fn(p, inputs), targets))(
        params
    )
    assert_close(updates, grads)
    np.testing.assert_allclose(state.clean_value, value, rtol=1e-6)
    sam = flatopt.sam_gradients(0.5)
    other, _ = sam.update(
        None,
        sam.init(params),
        params,
        value_fn=lambda p: squares(model_fn(p, inputs), targets),
    )
    with pytest.raises(AssertionError):
        assert_close(other, grads, rtol=1e-2)


def test_functional_sam_counts_two_gradients_and_shares_its_arguments():
    params, batch = regression()

    def model_fn(params, batch, sample_key):
        kept = jax.random.bernoulli(sample_key, 0.5, batch["inputs"].shape)
        kept = kept.astype(jnp.float32)
        hidden = jnp.tanh((batch["inputs"] * kept) @ params["first"]["kernel"])
        return {"y": hidden @ params["second"]["kernel"]}

    def loss(outputs, batch):
        return jnp.mean((outputs["y"] - batch["targets"]) ** 2)

    counted = flatopt.GradientCounter(model_fn, ("batch",))
    options = {"num_microbatches": 4, "batch_argnames": ("batch",)}
    tx = flatopt.functional_sam_gradients(counted, loss, RHO, **options)
    update = jax.jit(lambda s, b: tx.update(None, s, params, batch=b))
    _, state = update(tx.init(params), batch)
    assert counted.count == 2 * 64
    assert jnp.isfinite(state.clean_value)
    with pytest.raises(TypeError, match="needs the argument 'batch', got arguments n"):
        flatopt.functional_sam_gradients(model_fn, loss, RHO).update(
            None, state, params, batches=batch
        )
    with pytest.raises(
        TypeError, match="^loss_fn must return a real scalar, got shape"
    ):
        flatopt.functional_sam_gradients(lambda p: p, lambda p: p, RHO).update(
            None, state, jnp.ones(2)
        )
    with pytest.raises(TypeError, match="^model_fn must be a function, got 1; give"):
        flatopt.functional_sam_gradients(1, loss, RHO)


def test_rho_of_functional_sam_may_be_a_schedule_and_a_hyperparameter():
    params, inputs, labels = softmax_regression()

    def update(tx, state):
        return tx.update(params, state, params, inputs=inputs, labels=labels)

    def make(rho):
        return flatopt.functional_sam_gradients(_tanh_model, _cross_entropy, rho)

    expected = [update(make(rho), make(rho).init(params))[0] for rho in (0.1, 0.5)]
    scheduled = make(lambda count: jnp.where(count == 0, 0.1, 0.5))
    injected = optax.inject_hyperparams(
        flatopt.functional_sam_gradients, static_args=("model_fn", "loss_fn")
    )(_tanh_model, _cross_entropy, rho=0.1)
    for tx in (scheduled, injected):
        first, state = update(tx, tx.init(params))
        if tx is injected:
            state.hyperparams["rho"] = jnp.float32(0.5)
        second, _ = update(tx, state)
        assert_close([first, second], expected)
    with pytest.raises(AssertionError):
        assert_close(*expected, rtol=1e-3)
