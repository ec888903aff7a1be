"""NNX: what is trained is ``wrt``, what a pass leaves alone is not touched or copied."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close

import flatopt
import flatopt.flax
from flatopt import kernels

# Flax has another way since 0.12; models with sow are still around.
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")

KEY = jax.random.key(3)
INPUTS = np.random.default_rng(1).normal(size=(8, 4)).astype("f4")


class Weight(nnx.Variable):
    """A type of trainable variables of one's own."""


class Table(nnx.Variable):
    """A type of constants."""


class Net(nnx.Module):
    """Variables of many types, one of them shared, one array that is no variable."""

    def __init__(self, rngs):
        self.weight = Weight(jax.random.normal(rngs.params(), (4, 3)))
        self.bias = nnx.Param(jnp.ones(3))
        self.head = nnx.LoRALinear(3, 2, lora_rank=2, rngs=rngs)
        self.head.lora.lora_b[...] = jnp.ones((2, 2))
        self.tied = self.bias
        self.table = Table(jnp.ones((20, 20)))
        self.calls = nnx.Variable(jnp.array(0))
        self.cache = nnx.Cache(jnp.zeros((2, 3)))
        self.shift = nnx.data(jnp.full(3, 0.5))

    def __call__(self, x):
        x = x @ self.weight[...] + self.bias[...][None] + self.shift[None]
        self.calls[...] += 1
        self.sow(nnx.Intermediate, "hidden", x)
        self.cache[...] = jnp.full((2, 3), self.table[0, 0])
        return self.head(jnp.tanh(x)) * self.tied[0]


def loss_fn(model, inputs):
    return jnp.mean((model(inputs) - 1) ** 2)


def _copy(model):
    return nnx.merge(*nnx.split(model), copy=True)


def _values(model):
    kept = nnx.state(model, nnx.Not(nnx.Intermediate))
    return {p: np.asarray(_value(v)) for p, v in nnx.to_flat_state(kept)}


def _value(v):
    return v.get_raw_value() if isinstance(v, nnx.Variable) else v


WRT = {
    "a type of one's own": Weight,
    "two types": nnx.Any(nnx.Param, Weight),
    "adapters": nnx.LoRAParam,
    "a path": nnx.PathContains("head"),
    "a path and a type": nnx.All(nnx.PathContains("head"), nnx.LoRAParam),
    "all but adapters": nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)),
    "a function": lambda path, x: path[-1] == "weight",
}


@pytest.mark.parametrize("wrt", WRT.values(), ids=WRT)
def test_update_without_noise_is_the_step_of_plain_nnx(wrt):
    model = Net(nnx.Rngs(0))
    plain = _copy(model)
    optimizer = nnx.Optimizer(plain, optax.sgd(0.1), wrt=wrt)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(
        plain, INPUTS
    )
    optimizer.update(plain, grads)

    for link in (flatopt.smooth_gradients(0.0), flatopt.sam_gradients(0.0)):
        ours = _copy(model)
        tx = optax.chain(link, optax.sgd(0.1))
        optimizer = nnx.Optimizer(ours, tx, wrt=wrt)
        value = flatopt.flax.update(optimizer, ours, loss_fn, inputs=INPUTS)
        np.testing.assert_allclose(value, loss, rtol=1e-6)
        after, expected = _values(ours), _values(plain)
        assert after.keys() == expected.keys()
        for path in after:
            np.testing.assert_allclose(after[path], expected[path], 1e-5, 1e-6)
        assert ours.calls[...] == 1
        assert ours.cache[0, 0] == 1
        assert not hasattr(ours, "hidden")


@pytest.mark.parametrize("wrt", WRT.values(), ids=WRT)
@pytest.mark.parametrize("options", [{}, {"batch_norm": "clean", "antithetic": True}])
def test_perturbed_weights_are_never_written_back(wrt, options):
    model = Net(nnx.Rngs(0))
    before = _values(model)
    f = flatopt.flax.value_and_grad(loss_fn, 0.5, num_samples=2, wrt=wrt, **options)
    _, grads = f(KEY, model, inputs=INPUTS)
    after = _values(model)
    changed = {p[-1] for p in after if (after[p] != before[p]).any()}
    assert changed == {"calls", "cache"}
    expected = nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))(_copy(model), INPUTS)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    assert type(grads) is type(expected)


@pytest.mark.heart
def test_a_bare_array_that_a_pass_sets():
    class Averages(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(4))
            self.last = nnx.data(jnp.zeros(()))

        def __call__(self, x):
            self.last = x.sum()
            return x @ self.weight[...]

    model = Averages()
    flatopt.flax.value_and_grad(loss_fn, 0.1)(KEY, model, inputs=INPUTS)
    np.testing.assert_allclose(model.last, INPUTS.sum(), rtol=1e-6)


@pytest.mark.parametrize("strategy", ["scan", "vmap", "unroll"])
@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"batch_norm": "clean"}])
def test_constants_are_not_returned_once_a_draw(strategy, options):
    size = 1000 * 1000

    class Constant(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.table = Table(jnp.ones((1000, 1000)))

        def __call__(self, x):
            return self.norm(self.dense(x)) * self.table[0, 0]

    f = flatopt.flax.value_and_grad(
        loss_fn, 0.01, num_samples=3, strategy=strategy, **options
    )
    graphdef, state = nnx.split(Constant(nnx.Rngs(0)))

    def step(state, inputs):
        model = nnx.merge(graphdef, state, copy=True)
        return *f(KEY, model, inputs=inputs), nnx.state(model)

    traced = jax.jit(step, donate_argnums=0).trace(state, INPUTS)
    compiled = traced.lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    assert max(sizes(traced.jaxpr.jaxpr)) < size


def test_layers_under_nnx_transforms_keep_their_constants():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.weight = Weight(jax.random.normal(rngs.params(), (4, 4)))
            self.table = Table(jnp.ones((300, 300)))
            self.calls = nnx.Variable(jnp.array(0))

        def __call__(self, x):
            self.calls[...] += 1
            return jnp.tanh(x @ self.weight[...]) * self.table[0, 0]

    class Stack(nnx.Module):
        def __init__(self, rngs):
            axes = nnx.StateAxes({...: 0})
            self.layers = nnx.vmap(Layer, in_axes=(axes,), out_axes=0)(rngs.split(3))
            self.one = Layer(rngs)

        def __call__(self, x):
            axes = (nnx.StateAxes({...: 0}), nnx.Carry)
            run = nnx.scan(lambda m, x: m(x), in_axes=axes, out_axes=nnx.Carry)
            return nnx.remat(lambda m, x: m(x))(self.one, run(self.layers, x))

    model = Stack(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, flatopt.nso_sgd(0.1), wrt=Weight)
    before = model.layers.weight[...]
    step = nnx.jit(lambda o, m, x: flatopt.flax.update(o, m, loss_fn, inputs=x))
    step(optimizer, model, INPUTS)
    assert (model.layers.weight[...] != before).any()
    assert model.layers.calls[...].tolist() == [1, 1, 1]
    f = flatopt.flax.value_and_grad(loss_fn, 0.1, num_samples=3, wrt=Weight)
    graphdef, state = nnx.split(model)

    def run(state):
        model = nnx.merge(graphdef, state, copy=True)
        f(KEY, model, inputs=INPUTS)
        return nnx.state(model)

    text = str(jax.make_jaxpr(run)(state))
    assert "[3,3,300,300]" not in text
    assert "[3,300,300]" in text  # the table of the three layers itself


def test_wrt_that_names_nothing():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    match = "wrt names no variable of the model, got .*LoRAParam.* types Param; name"
    with pytest.raises(ValueError, match=match):
        flatopt.flax.value_and_grad(loss_fn, 0.1, wrt=nnx.LoRAParam)(KEY, model, INPUTS)
    optimizer = nnx.Optimizer(model, flatopt.nso_sgd(0.1), wrt=nnx.LoRAParam)
    with pytest.raises(ValueError, match=match):
        flatopt.flax.update(optimizer, model, loss_fn, inputs=INPUTS)
    with pytest.raises(ValueError, match=match):
        flatopt.flax.functional(model, loss_fn, wrt=nnx.LoRAParam)


# NNX objects as arguments


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.dense(self.dropout(x, rngs=rngs))


def dropped_loss(model, rngs, inputs):
    return jnp.mean((model(inputs, rngs) - 1) ** 2)


@pytest.mark.parametrize("jit", [False, True])
def test_random_streams_as_an_argument(jit):
    model, rngs = Dropped(nnx.Rngs(0)), nnx.Rngs(dropout=1)
    optimizer = nnx.Optimizer(model, flatopt.nso_sgd(0.0), wrt=nnx.Param)
    f = flatopt.flax.value_and_grad(dropped_loss, 0.0, num_samples=3)

    def step(model, optimizer, rngs, inputs):
        first, _ = f(KEY, model, rngs, inputs=inputs)
        again, _ = f(KEY, model, rngs=rngs, inputs=inputs)
        last = flatopt.flax.update(
            optimizer, model, dropped_loss, rngs=rngs, inputs=inputs
        )
        return jnp.stack([first, again, last])

    losses = (nnx.jit(step) if jit else step)(model, optimizer, rngs, INPUTS)
    assert rngs.dropout.count[...] == 3
    assert len(set(losses.tolist())) == 3  # the stream moves on


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("antithetic", [False, True])
def test_averages_take_in_every_pass(antithetic):
    model, metrics = (
        nnx.Linear(4, 2, rngs=nnx.Rngs(0)),
        nnx.metrics.MultiMetric(
            loss=nnx.metrics.Average("loss"), other=nnx.metrics.Average("loss")
        ),
    )
    metrics.update(loss=jnp.float32(2.0))
    values = None

    def loss_and_metrics(model, inputs, metrics):
        loss = loss_fn(model, inputs)
        metrics.update(loss=loss)
        return loss, loss

    f = flatopt.flax.value_and_grad(
        loss_and_metrics, 0.3, num_samples=4, antithetic=antithetic,
        batch_argnames=("inputs",), has_aux=True,
    )  # fmt: skip
    (_, values), _ = f(KEY, model, inputs=INPUTS, metrics=metrics)
    expected = np.mean([2.0, *np.ravel(values)])
    np.testing.assert_allclose(metrics.compute()["loss"], expected, rtol=1e-6)

    # One step in the optimizer: one pass, the clean one.
    optimizer = nnx.Optimizer(model, flatopt.nso_sgd(0.1), wrt=nnx.Param)
    metrics.reset()
    clean = loss_fn(model, INPUTS)
    _, aux = flatopt.flax.update(
        optimizer, model, loss_and_metrics, has_aux=True, inputs=INPUTS, metrics=metrics
    )
    np.testing.assert_allclose([metrics.compute()["loss"], aux], clean, rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_metrics_that_cannot_be_put_together():
    metric = nnx.metrics.Welford("loss")

    def loss_and_metric(model, inputs, metric):
        loss = loss_fn(model, inputs)
        metric.update(loss=loss)
        return loss

    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    f = flatopt.flax.value_and_grad(loss_and_metric, 0.1, num_samples=2)
    with pytest.raises(ValueError, match="loss_fn updates the metric Welford in each"):
        f(KEY, model, INPUTS, metric)
    one = flatopt.flax.value_and_grad(loss_and_metric, 0.0)
    loss, _ = one(KEY, model, INPUTS, metric)
    np.testing.assert_allclose(metric.compute().mean, loss, rtol=1e-6)


@pytest.mark.heart
def test_another_model_as_an_argument_is_not_perturbed():
    teacher = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def distill(model, teacher, inputs):
        return jnp.mean((model(inputs) - teacher(inputs)) ** 2), teacher(inputs)

    f = flatopt.flax.value_and_grad(distill, 0.5, num_samples=2, has_aux=True)
    (_, outputs), grads = f(KEY, model, teacher, INPUTS)
    assert_close([*outputs], [teacher(INPUTS)] * 2)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model, nnx.Param))


def test_an_object_in_a_closure_is_one_sentence():
    model, rngs = Dropped(nnx.Rngs(0)), nnx.Rngs(dropout=1)
    closed = lambda model, inputs: dropped_loss(model, rngs, inputs)  # noqa: E731
    with pytest.raises(
        ValueError, match="loss_fn changes an nnx object that is not am"
    ):
        flatopt.flax.value_and_grad(closed, 0.1)(KEY, model, inputs=INPUTS)


@pytest.mark.parametrize("jit", [False, True])
def test_model_and_optimizer(jit):
    make = lambda: nnx.Linear(4, 2, rngs=nnx.Rngs(0))  # noqa: E731
    both = nnx.ModelAndOptimizer(make(), flatopt.nso_sgd(0.1), wrt=nnx.Param)
    model = make()
    optimizer = nnx.Optimizer(model, flatopt.nso_sgd(0.1), wrt=nnx.Param)
    step = lambda o, x: flatopt.flax.update(o, o.model, loss_fn, inputs=x)  # noqa: E731
    loss = (nnx.jit(step) if jit else step)(both, INPUTS)
    expected = flatopt.flax.update(optimizer, model, loss_fn, inputs=INPUTS)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(both.model.kernel[...], model.kernel[...], rtol=1e-6)
    with pytest.raises(ValueError, match="model must be optimizer.model for an nnx.Mo"):
        flatopt.flax.update(both, make(), loss_fn, inputs=INPUTS)


def test_has_aux_in_update():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, flatopt.nso_sgd(0.1), wrt=nnx.Param)
    expected = model(INPUTS)

    def with_aux(model, inputs, sample_key):
        del sample_key
        return loss_fn(model, inputs), model(inputs)

    loss, aux = flatopt.flax.update(
        optimizer, model, with_aux, has_aux=True, inputs=INPUTS
    )
    np.testing.assert_allclose(aux, expected, rtol=1e-6)
    assert loss.shape == ()
    with pytest.raises(
        TypeError, match=r"loss_fn must return \(loss, aux\) with has_a"
    ):
        flatopt.flax.update(optimizer, model, loss_fn, has_aux=True, inputs=INPUTS)


def test_weights_of_chunks_weigh_running_statistics():
    model = nnx.BatchNorm(4, momentum=0.0, rngs=nnx.Rngs(0))
    weights = jnp.array([1.0, 3.0, 0.0, 2.0])
    batch = {"x": INPUTS, "weight": jnp.tile(weights, 2)}
    f = flatopt.flax.value_and_grad(
        lambda model, batch: (model(batch["x"]) ** 2).mean(), 0.1, num_samples=4,
        batch_argnames=("batch",), weight_fn=lambda chunk: chunk["weight"].sum(),
    )  # fmt: skip
    f(KEY, model, batch=batch)
    means = np.stack([INPUTS[j::4].mean(axis=0) for j in range(4)])
    expected = np.average(means, axis=0, weights=weights)
    np.testing.assert_allclose(model.mean[...], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_norm", ["perturbed", "clean"])
@pytest.mark.parametrize("counts", [(4, 1), (3, 0)])
def test_weights_of_chunks_weigh_running_statistics_over_devices(counts, batch_norm):
    def loss_fn(model, batch):
        return (model(batch["x"]) ** 2).mean()

    f = flatopt.flax.value_and_grad(
        loss_fn, 0.1, num_samples=1, axis_name="data",
        batch_norm=batch_norm,
        batch_argnames=("batch",), weight_fn=lambda chunk: chunk["weight"].sum(),
    )  # fmt: skip
    weights = (np.arange(4) < np.array(counts)[:, None]).astype("f4").ravel()
    graphdef, state = nnx.split(nnx.BatchNorm(4, momentum=0.0, rngs=nnx.Rngs(0)))

    def one(state, batch):
        model = nnx.merge(graphdef, state, copy=True)
        f(KEY, model, batch=batch)
        return model.mean[...]

    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    spec = jax.sharding.PartitionSpec
    run = jax.shard_map(
        one, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec()
    )
    found = jax.jit(run)(state, {"x": INPUTS, "weight": weights})
    means = np.stack([part.mean(axis=0) for part in np.split(np.asarray(INPUTS), 2)])
    expected = np.average(means, axis=0, weights=counts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# Many devices


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x)) * self.dense.bias[...].sum()


def _normed():
    model = Normed(nnx.Rngs(0))
    model.dense.bias[...] = jnp.array([1.0, 2.0])
    return model


def _on_devices(step, check_vma=True):
    """``step(model, inputs)`` by 4 devices, each with its own part of the batch."""
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    spec = jax.sharding.PartitionSpec
    model = _normed()
    graphdef, state = nnx.split(model)

    def one(state, inputs):
        model = nnx.merge(graphdef, state, copy=True)
        out = step(model, inputs)
        return out, nnx.to_pure_dict(nnx.state(model))

    run = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(spec(), spec("data")),
        out_specs=spec(),
        check_vma=check_vma,
    )
    return jax.jit(run)(state, OF_FOUR), model


OF_FOUR = np.random.default_rng(5).normal(size=(16, 4)).astype("f4")


@functools.cache
def _expected():
    """Loss, gradient and statistics as means over the devices' parts."""
    results, value_and_grad = [], nnx.jit(nnx.value_and_grad(loss_fn))
    for part in np.split(OF_FOUR, 4):
        model = _normed()
        loss, grads = value_and_grad(model, part)
        stats = [model.norm.mean[...], model.norm.var[...]]
        results.append((loss, nnx.to_pure_dict(grads), stats))
    return jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *results)


@pytest.mark.heart
@pytest.mark.parametrize("batch_norm", ["perturbed", "clean"])
def test_value_and_grad_over_devices(batch_norm):
    f = flatopt.flax.value_and_grad(
        loss_fn, 0.0, axis_name="data", batch_norm=batch_norm
    )
    step = lambda model, x: f(KEY, model, inputs=x)  # noqa: E731
    ((loss, grads), state), _ = _on_devices(step)
    expected_loss, expected, stats = _expected()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_close(nnx.to_pure_dict(grads), expected, rtol=1e-4)
    assert_close([state["norm"]["mean"], state["norm"]["var"]], stats)


def _updating(make_link, axis_name="data"):
    def step(model, x):
        tx = optax.chain(make_link(), optax.sgd(0.1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        return flatopt.flax.update(
            optimizer, model, loss_fn, axis_name=axis_name, inputs=x
        )

    return step


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("method", ["smooth_gradients", "sam_gradients"])
def test_update_over_devices(method, check_vma):
    make = functools.partial(getattr(flatopt, method), 0.0)
    step = _updating(functools.partial(make, axis_name="data"))
    (loss, state), model = _on_devices(step, check_vma)
    expected_loss, grads, stats = _expected()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    kernel = model.dense.kernel[...] - 0.1 * grads["dense"]["kernel"]
    np.testing.assert_allclose(state["dense"]["kernel"], kernel, rtol=1e-4, atol=1e-6)
    assert_close([state["norm"]["mean"], state["norm"]["var"]], stats)


@pytest.mark.parametrize("method", ["smooth_gradients", "sam_gradients"])
def test_an_axis_of_the_link_alone_or_of_the_update_alone_is_refused(method):
    make = functools.partial(getattr(flatopt, method), 0.0)
    with pytest.raises(ValueError, match="axis_name='data' is not averaged over by"):
        _on_devices(_updating(make))
    step = _updating(functools.partial(make, axis_name="data"), axis_name=None)
    with pytest.raises(ValueError, match="axis_name must name 'data' as the link"):
        _on_devices(step)


def test_an_axis_that_is_none_of_the_call_is_one_sentence():
    model = Normed(nnx.Rngs(0))
    for given in ("data", ("data",), 3):
        f = flatopt.flax.value_and_grad(loss_fn, 0.0, axis_name=given)
        with pytest.raises(ValueError, match="axis_name must name an axis of the jax"):
            f(KEY, model, inputs=jnp.ones((4, 4)))


# Filter axes without being asked for them


def test_flax_supplies_the_filter_axes_of_the_model():
    class General(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.LinearGeneral(4, (3, 5), use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.dense(x)

    model = General(nnx.Rngs(0))
    axes = flatopt.flax.filter_axes(model)
    assert axes == {"dense": {"kernel": (1, 2)}}
    value = lambda model, inputs: model.dense.kernel[...][0, 0, 0] * 1e3  # noqa: E731

    def measured(kernel):
        f = flatopt.flax.value_and_grad(value, 0.1, kernel)
        tx = optax.chain(flatopt.smooth_gradients(0.1, kernel, key=3), optax.sgd(0.0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        losses = [
            f(jax.random.fold_in(KEY, 0), model, inputs=INPUTS)[0],
            flatopt.flax.update(optimizer, model, value, inputs=INPUTS),
        ]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
        return losses[0]

    right = measured(kernels.filterwise(filter_axes=axes))
    last = measured(kernels.filterwise(filter_axes=-1))
    assert abs(right - last) > 1
    for kernel in (
        kernels.filterwise(),
        kernels.one_layer(kernels.filterwise()),
        kernels.masked(kernels.filterwise(), True),
    ):
        np.testing.assert_allclose(measured(kernel), right, rtol=1e-5)


# Noise on frozen weights, and models as functions


def test_noise_on_frozen_weights_alone():
    model = nnx.LoRALinear(4, 3, lora_rank=2, use_bias=False, rngs=nnx.Rngs(0))
    model.lora.lora_b[...] = jnp.ones((2, 3))
    base = model.kernel[...]
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))

    def merged(params):
        low = params["lora"]["lora_a"][...] @ params["lora"]["lora_b"][...]
        return {"kernel": params["kernel"][...] + low}

    f = flatopt.flax.value_and_grad(
        loss_fn, 0.2, kernels.filterwise(norms_of=merged), num_samples=2,
        wrt=nnx.LoRAParam, noise_wrt=frozen,
    )  # fmt: skip
    loss, grads = f(KEY, model, INPUTS)
    np.testing.assert_array_equal(model.kernel[...], base)

    norms = np.linalg.norm(merged(nnx.state(model, nnx.Param))["kernel"], axis=0)
    losses, total = [], 0.0
    for j in range(2):
        moved = _copy(model)
        draw = kernels.isotropic()(jax.random.fold_in(KEY, j), {"kernel": base})
        moved.kernel[...] += 0.2 * norms[None] * draw["kernel"]
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, grad = nnx.value_and_grad(loss_fn, argnums=wrt)(moved, INPUTS)
        losses.append(value)
        total = jax.tree.map(lambda g, t=total: g / 2, grad) if j == 0 else jax.tree.map(
            lambda g, t: t + g / 2, grad, total
        )  # fmt: skip
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert_close(grads, total)

    # The same with the noise in the optimizer, by masks.
    adapters = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "lora" in jax.tree_util.keystr(path), params
    )
    others = lambda params: jax.tree.map(lambda x: not x, adapters(params))  # noqa: E731
    tx = flatopt.lpf_sgd(0.1, 0.2, 2, batch_argnames=("inputs",), weight_decay=0.1,
                         mask=adapters, noise_mask=others)  # fmt: skip
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = model.lora.lora_b[...]
    flatopt.flax.update(optimizer, model, loss_fn, inputs=INPUTS)
    np.testing.assert_array_equal(model.kernel[...], base)
    assert (model.lora.lora_b[...] != before).all()
    with pytest.raises(ValueError, match="noise_wrt names no variable of the model"):
        flatopt.flax.value_and_grad(loss_fn, 0.1, noise_wrt=Weight)(KEY, model, INPUTS)


def test_functional_is_the_loss_with_statistics_as_constants():
    model = Normed(nnx.Rngs(0))
    model.norm.mean[...] = jnp.array([0.3, -0.2])
    model.dense.bias[...] = jnp.array([1.0, 2.0])
    model.eval()
    params, value_fn = flatopt.flax.functional(model, loss_fn)
    np.testing.assert_allclose(value_fn(params, INPUTS), loss_fn(model, INPUTS), 1e-6)
    grads = jax.grad(value_fn)(params, INPUTS)
    assert_close(grads, nnx.to_pure_dict(nnx.grad(loss_fn)(model, INPUTS)))
    before = _values(model)
    model.train()
    params, value_fn = flatopt.flax.functional(model, loss_fn)
    value_fn(params, INPUTS)
    jax.tree.map(np.testing.assert_array_equal, _values(model), before)


def test_missing_flax_is_one_sentence():
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "try: import flatopt.flax\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert out == (
        "flatopt.flax needs Flax, which is not installed; run "
        "pip install 'flatopt[flax]'.\n"
    )


@pytest.mark.parametrize("kernel", [kernels.filterwise, kernels.signs])
def test_what_is_no_kernel(kernel):
    with pytest.raises(TypeError, match="kernel must be a function .* got"):
        flatopt.flax.value_and_grad(loss_fn, 0.1, kernel)
    with pytest.raises(TypeError, match="key must be one JAX random key, got 0; write"):
        flatopt.flax.value_and_grad(loss_fn, 0.1)(
            0, nnx.Linear(4, 2, rngs=nnx.Rngs(0)), INPUTS
        )
