"""Whole training loops in Flax NNX, Flax Linen and Equinox against loops by hand."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state
from helpers import assert_close

import flatopt
import flatopt.flax
from flatopt import kernels

NUM_STEPS, SAMPLES, SCALE, RATE, MOMENTUM = 5, 4, 0.2, 0.2, 0.9
KEY = 3


def _batches(num_examples=16, num_steps=NUM_STEPS):
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(num_steps, num_examples, 5)).astype("f4")
    targets = rng.normal(size=(num_steps, num_examples, 2)).astype("f4")
    return [{"inputs": x, "targets": y} for x, y in zip(inputs, targets, strict=True)]


def _mean_squares(outputs, batch):
    return jnp.mean((outputs - batch["targets"]) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def _noise(kernel, params, step, sample):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), step), sample)
    return jax.tree.map(lambda u: SCALE * u, kernel(key, params))


def _sgd(params, buffer, grads):
    """One step of SGD with momentum, leaf by leaf."""
    buffer = jax.tree.map(lambda m, g: MOMENTUM * m + g, buffer, grads)
    return jax.tree.map(lambda p, m: p - RATE * m, params, buffer), buffer


def _mean(trees):
    return jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *trees)


def _zeros(tree):
    return jax.tree.map(np.zeros_like, tree)


def _numpy(tree):
    """The same in NumPy, where the loops by hand compile nothing of their own."""
    return jax.tree.map(np.asarray, tree)


# A network with BatchNorm, as modules and as a formula


class Network(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, inputs):
        return self.head(nnx.relu(self.norm(self.dense(inputs))))


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        hidden = linen.Dense(4, name="dense")(inputs)
        norm = linen.BatchNorm(
            use_running_average=False, momentum=0.9, epsilon=1e-5, name="norm"
        )
        return linen.Dense(2, name="head")(linen.relu(norm(hidden)))


def _formula(params, inputs):
    """Outputs of the network, and the batch statistics it saw."""
    hidden = inputs @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    mean, var = hidden.mean(axis=0), hidden.var(axis=0)
    hidden = (hidden - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    hidden = hidden * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    outputs = jnp.maximum(hidden, 0) @ params["head"]["kernel"]
    return outputs + params["head"]["bias"][None], {"mean": mean, "var": var}


def _formula_loss(params, batch):
    outputs, statistics = _formula(params, batch["inputs"])
    return _mean_squares(outputs, batch), statistics


_formula_pass = jax.jit(_formula_loss)
_formula_grad = jax.jit(jax.value_and_grad(_formula_loss, has_aux=True))


def _loop_by_hand(params, kernel, batch_norm):
    """LPF-SGD with running statistics; returns parameters, statistics, losses."""
    params = _numpy(params)
    buffer = _zeros(params)
    running, losses = {"mean": np.zeros(4), "var": np.ones(4)}, []
    for step, batch in enumerate(_batches()):
        seen = []
        for j in range(SAMPLES):
            moved = jax.tree.map(np.add, params, _noise(kernel, params, step, j))
            chunk = jax.tree.map(lambda x, j=j: x[j::SAMPLES], batch)
            seen.append(_formula_grad(moved, chunk))
        (loss, statistics), grads = _mean(seen)
        if batch_norm == "clean":
            statistics = _numpy(_formula_pass(params, batch)[1])
        running = jax.tree.map(lambda r, s: 0.9 * r + 0.1 * s, running, statistics)
        params, buffer = _sgd(params, buffer, grads)
        losses.append(loss)
    return params, running, losses


@pytest.mark.parametrize("batch_norm", ["perturbed", "clean"])
def test_an_nnx_loop_with_batch_norm_is_the_loop_by_hand(batch_norm):
    model = Network(nnx.Rngs(0))
    kernel = kernels.filterwise(filter_axes=flatopt.flax.filter_axes(model))
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, optax.sgd(RATE, MOMENTUM), wrt=nnx.Param)
    value_and_grad = flatopt.flax.value_and_grad(
        lambda model, batch: _mean_squares(model(batch["inputs"]), batch),
        SCALE,
        kernel,
        num_samples=SAMPLES,
        batch_argnames=("batch",),
        batch_norm=batch_norm,
    )

    @nnx.jit
    def step(model, optimizer, key, batch):
        loss, grads = value_and_grad(key, model, batch=batch)
        optimizer.update(model, grads)
        return loss

    losses = [
        step(model, optimizer, jax.random.fold_in(jax.random.key(KEY), i), batch)
        for i, batch in enumerate(_batches())
    ]
    params, running, expected = _loop_by_hand(start, kernel, batch_norm)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, 2e-4, 2e-5)
    assert_close(nnx.to_pure_dict(nnx.state(model.norm, nnx.BatchStat)), running, 1e-4)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.heart
def test_an_nnx_loop_with_the_noise_in_the_optimizer_is_the_loop_by_hand():
    model = Network(nnx.Rngs(0))
    start = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tx = flatopt.lpf_sgd(RATE, SCALE, SAMPLES, momentum=MOMENTUM, key=KEY)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, batch):
        return flatopt.flax.update(
            optimizer,
            model,
            lambda model, batch: _mean_squares(model(batch["inputs"]), batch),
            batch=batch,
        )

    losses = [step(model, optimizer, batch) for batch in _batches()]
    params, running, expected = _loop_by_hand(start, kernels.filterwise(), "clean")
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, 2e-4, 2e-5)
    assert_close(nnx.to_pure_dict(nnx.state(model.norm, nnx.BatchStat)), running, 1e-4)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert optimizer.step[...] == NUM_STEPS


class TrainState(train_state.TrainState):
    batch_stats: dict


def test_a_linen_loop_with_batch_norm_is_the_loop_by_hand():
    network = LinenNetwork()
    variables = network.init(jax.random.key(0), _batches()[0]["inputs"])
    start = variables["params"]
    state = TrainState.create(
        apply_fn=network.apply,
        params=start,
        tx=optax.sgd(RATE, MOMENTUM),
        batch_stats=variables["batch_stats"],
    )

    def loss_fn(params, batch_stats, batch):
        outputs, updated = network.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["inputs"],
            mutable=["batch_stats"],
        )
        return _mean_squares(outputs, batch), updated["batch_stats"]

    value_and_grad = flatopt.smooth_value_and_grad(
        loss_fn,
        SCALE,
        kernels.filterwise(),
        num_samples=SAMPLES,
        batch_argnames=("batch",),
        has_aux=True,
    )

    @jax.jit
    def step(state, key, batch):
        (loss, batch_stats), grads = value_and_grad(
            key, state.params, state.batch_stats, batch=batch
        )
        batch_stats = jax.tree.map(lambda x: x.mean(axis=0), batch_stats)
        return loss, state.apply_gradients(grads=grads, batch_stats=batch_stats)

    losses = []
    for i, batch in enumerate(_batches()):
        key = jax.random.fold_in(jax.random.key(KEY), i)
        loss, state = step(state, key, batch)
        losses.append(loss)
    params, running, expected = _loop_by_hand(start, kernels.filterwise(), "perturbed")
    assert_close(state.params, params, 2e-4, 2e-5)
    assert_close(state.batch_stats["norm"], running, 1e-4)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


# Dropout: on a linear model it is a ridge penalty, in closed form

DROPOUT = 0.5


def _ridge():
    """A regression, and the minimizer of its loss under dropout of the inputs."""
    rng = np.random.default_rng(5)
    inputs, targets = rng.normal(size=(12, 3)), rng.normal(size=(12, 1))
    penalty = DROPOUT / (1 - DROPOUT) * np.diag((inputs**2).sum(axis=0))
    solution = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets)
    plain = np.linalg.lstsq(inputs, targets)[0]
    assert np.abs(solution - plain).max() > 0.1
    batch = {"inputs": inputs.astype("f4"), "targets": targets.astype("f4")}
    return batch, solution


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)
        self.dense = nnx.Linear(3, 1, use_bias=False, rngs=rngs)

    def __call__(self, inputs):
        return self.dense(self.dropout(inputs))


class LinenDropped(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        dropped = linen.Dropout(DROPOUT, deterministic=False)(inputs)
        return linen.Dense(1, use_bias=False, name="dense")(dropped)


def _dropout_loss(model, batch):
    return _mean_squares(model(batch["inputs"]), batch)


def _decaying(num_steps):
    return optax.linear_schedule(0.3, 0.01, num_steps)


def _train_with_value_and_grad(batch):
    model = Dropped(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(_decaying(60)), wrt=nnx.Param)
    f = flatopt.flax.value_and_grad(
        _dropout_loss, 0.1, num_samples=64, antithetic=True, strategy="vmap"
    )

    @nnx.jit
    def step(model, optimizer, key):
        optimizer.update(model, f(key, model, batch=batch)[1])

    for i in range(60):
        step(model, optimizer, jax.random.key(i))
    assert model.dropout.rngs.count[...] == 60
    return model.dense.kernel[...]


def _train_with_update(batch):
    model = Dropped(nnx.Rngs(0))
    link = flatopt.smooth_gradients(
        0.1, num_samples=64, antithetic=True, strategy="vmap"
    )
    tx = optax.chain(link, optax.sgd(_decaying(60)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        flatopt.flax.update(optimizer, model, _dropout_loss, batch=batch)

    for _ in range(60):
        step(model, optimizer)
    return model.dense.kernel[...]


def _train_in_linen(batch):
    network = LinenDropped()
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = network.init(rngs, batch["inputs"])["params"]
    link = flatopt.smooth_gradients(
        0.1, num_samples=64, antithetic=True, strategy="vmap"
    )
    tx = optax.chain(link, optax.sgd(_decaying(60)))

    def value_fn(params, batch, sample_key):
        outputs = network.apply(
            {"params": params}, batch["inputs"], rngs={"dropout": sample_key}
        )
        return _mean_squares(outputs, batch)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=value_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(60):
        params, state = step(params, state)
    return params["dense"]["kernel"]


@pytest.mark.heart
@pytest.mark.parametrize(
    "train", [_train_with_value_and_grad, _train_with_update, _train_in_linen]
)
def test_a_loop_with_dropout_ends_at_the_ridge_solution(train, standard_promotion):
    batch, solution = _ridge()
    np.testing.assert_allclose(train(batch), solution, atol=0.03)


# Frozen parameters


def _lora_by_hand(params):
    """NSO on the factors of an adapter alone."""

    def loss(adapter, batch):
        dense = params["dense"]["kernel"] + adapter["lora_a"] @ adapter["lora_b"]
        outputs = batch["inputs"] @ dense + params["dense"]["bias"][None]
        return _mean_squares(outputs, batch)

    gradient = jax.jit(jax.grad(loss))
    params = _numpy(params)
    adapter = params["dense"]["lora"]
    buffer = _zeros(adapter)
    for step, batch in enumerate(_batches()):
        noise = _noise(ISOTROPIC, {"dense": {"lora": adapter}}, step, 0)
        u = noise["dense"]["lora"]
        plus = gradient(jax.tree.map(np.add, adapter, u), batch)
        minus = gradient(jax.tree.map(np.subtract, adapter, u), batch)
        adapter, buffer = _sgd(adapter, buffer, _mean([plus, minus]))
    return {"dense": {**params["dense"], "lora": adapter}}


ISOTROPIC = kernels.isotropic()


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.LoRALinear(5, 2, lora_rank=2, rngs=rngs)
        # The second factor starts at zero, where the first has no gradient.
        self.dense.lora.lora_b[...] = jax.random.normal(jax.random.key(9), (2, 2))

    def __call__(self, inputs):
        return self.dense(inputs)


def _adapter_only(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "lora" in jax.tree_util.keystr(path), params
    )


def _trace_size(opt_state):
    trace = optax.tree.get(opt_state, "trace")
    return sum(x.size for x in jax.tree.leaves(trace))


@pytest.mark.parametrize("frozen_by", ["wrt", "mask"])
def test_an_nnx_loop_trains_the_adapter_alone(frozen_by):
    model = Adapted(nnx.Rngs(0))
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = _adapter_only if frozen_by == "mask" else None
    wrt = nnx.LoRAParam if frozen_by == "wrt" else nnx.Param
    tx = flatopt.nso_sgd(RATE, SCALE, momentum=MOMENTUM, mask=mask, key=KEY)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer, batch):
        return flatopt.flax.update(optimizer, model, _dropout_loss, batch=batch)

    for batch in _batches():
        step(model, optimizer, batch)
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_close(trained, _lora_by_hand(start), 1e-4, 1e-5)
    np.testing.assert_array_equal(trained["dense"]["kernel"], start["dense"]["kernel"])
    np.testing.assert_array_equal(trained["dense"]["bias"], start["dense"]["bias"])
    assert _trace_size(optimizer.opt_state) == 5 * 2 + 2 * 2


class LinenAdapted(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        factors = linen.Dense(2, use_bias=False, name="lora_a")
        lifted = linen.Dense(2, use_bias=False, name="lora_b")
        return linen.Dense(2, name="dense")(inputs) + lifted(factors(inputs))


def test_a_linen_loop_with_a_mask_trains_the_adapter_alone():
    network = LinenAdapted()
    start = network.init(jax.random.key(0), _batches()[0]["inputs"])["params"]
    tx = flatopt.nso_sgd(
        RATE, SCALE, momentum=MOMENTUM, weight_decay=0.1, mask=_adapter_only, key=KEY
    )

    def value_fn(params, batch):
        return _mean_squares(network.apply({"params": params}, batch["inputs"]), batch)

    @jax.jit
    def step(params, state, batch):
        zeros = optax.tree.zeros_like(params)
        updates, state = tx.update(zeros, state, params, value_fn=value_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    params, state = start, tx.init(start)
    gradient = jax.jit(jax.grad(value_fn))
    expected, buffer = _numpy(start), _zeros(start)
    for i, batch in enumerate(_batches()):
        params, state = step(params, state, batch)
        noise = {**_noise(ISOTROPIC, expected, i, 0)}
        noise["dense"] = _zeros(noise["dense"])
        plus = gradient(jax.tree.map(np.add, expected, noise), batch)
        minus = gradient(jax.tree.map(np.subtract, expected, noise), batch)
        grads = _mean([plus, minus])
        grads = jax.tree.map(lambda g, p: g + 0.1 * p, grads, expected)
        grads["dense"] = _zeros(grads["dense"])
        expected, buffer = _sgd(expected, buffer, grads)
    assert_close(params, expected, 1e-4, 1e-5)
    assert jnp.abs(params["lora_a"]["kernel"] - start["lora_a"]["kernel"]).max() > 0.01
    assert _trace_size(state) == 5 * 2 + 2 * 2


# Equinox


def _freeze_first_layer(params):
    first = lambda model: model.layers[0]  # noqa: E731
    everything = jax.tree.map(lambda _: True, params)
    nothing = jax.tree.map(lambda _: False, first(params))
    return eqx.tree_at(first, everything, nothing)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_equinox_loop_is_the_loop_by_hand(frozen):
    model = eqx.nn.MLP(5, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    start, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, batch):
        outputs = jax.vmap(eqx.combine(params, static))(batch["inputs"])
        return _mean_squares(outputs, batch)

    filters = kernels.filterwise(filter_axes=0)
    link = flatopt.smooth_gradients(
        SCALE,
        filters,
        num_samples=SAMPLES,
        batch_argnames=("batch",),
        mask=_freeze_first_layer(start) if frozen else None,
        key=KEY,
    )
    tx = optax.chain(link, optax.sgd(RATE, MOMENTUM))

    @eqx.filter_jit
    def step(params, state, batch):
        updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=batch)
        return eqx.apply_updates(params, updates), state

    params, state = start, tx.init(start)
    for batch in _batches():
        params, state = step(params, state, batch)

    def thaw(tree):
        flags = _freeze_first_layer(tree)
        zero = lambda x, flag: x if flag or not frozen else np.zeros_like(x)  # noqa: E731
        return jax.tree.map(zero, tree, flags)

    expected, buffer = _numpy(start), _zeros(start)
    gradient = jax.jit(jax.grad(loss_fn))
    for i, batch in enumerate(_batches()):
        grads = []
        for j in range(SAMPLES):
            noise = thaw(_noise(filters, expected, i, j))
            moved = jax.tree.map(np.add, expected, noise)
            chunk = jax.tree.map(lambda x, j=j: x[j::SAMPLES], batch)
            grads.append(thaw(gradient(moved, chunk)))
        expected, buffer = _sgd(expected, buffer, _mean(grads))
    assert_close(params, expected, 1e-4, 1e-5)
    moves = jnp.abs(params.layers[0].weight - start.layers[0].weight).max()
    assert (moves == 0) == frozen
