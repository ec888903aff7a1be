"""Flax: NNX models with BatchNorm and dropout, filter axes, Linen's TrainState."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state
from helpers import assert_close, count_compilations, leaves_array

import flatopt
import flatopt.flax
from flatopt import kernels

BATCH = 16


class Network(nnx.Module):
    """Convolution, BatchNorm, dropout, dense layer."""

    def __init__(self, rngs, dropout=0.5):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.relu(self.norm(self.conv(images))).mean(axis=(1, 2))
        return self.dense(self.dropout(hidden))


class Block(nnx.Module):
    """Attention and a two-layer network with normalization."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.LinearGeneral(32, (16,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    """Embedding, one block, then three blocks stacked for nnx.scan."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.block = Block(rngs)
        stack = nnx.vmap(Block, in_axes=(nnx.StateAxes({...: 0}),), out_axes=0)
        self.blocks = stack(rngs.split(3))
        self.head = nnx.Linear(16, 50, rngs=rngs)

    def __call__(self, tokens):
        x = self.block(self.embed(tokens))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.head(run(self.blocks, x))


def _batch():
    images = np.random.default_rng(1).normal(size=(BATCH, 6, 6, 1)).astype("f4")
    return {"images": images, "labels": np.arange(BATCH, dtype="i4") % 3}


def loss_fn(model, batch):
    logits = model(batch["images"])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["labels"]
    ).mean()


def _copy(model):
    return nnx.merge(*nnx.split(model), copy=True)


_pass = nnx.jit(loss_fn)


def _smoothed(model, jit=False, **options):
    f = flatopt.flax.value_and_grad(
        loss_fn,
        options.pop("scale", 0.1),
        kernels.filterwise(),
        num_samples=2,
        batch_argnames=("batch",),
        **options,
    )
    return (nnx.jit(f) if jit else f)(jax.random.key(2), model, batch=_batch())


@pytest.mark.parametrize("jit", [False, True])
def test_without_noise_it_is_nnx_value_and_grad(jit):
    # No dropout, and BatchNorm sees chunks: use running averages to compare.
    model = Network(nnx.Rngs(0))
    model.eval()
    result = _smoothed(model, jit, scale=0.0)
    expected = nnx.jit(nnx.value_and_grad(loss_fn))(model, _batch())
    assert type(result[1]) is type(expected[1])
    assert_close(result, expected)


@jax.jit
def _moved(params, key, step):
    noise = kernels.filterwise()(key, params)
    return jax.tree.map(lambda p, u: p + step * u, params, noise)


@pytest.mark.parametrize(
    ("jit", "antithetic"), [(False, True), (True, False), (True, True)]
)
def test_perturbed_batch_norm_averages_the_perturbed_passes(jit, antithetic):
    model = Network(nnx.Rngs(0))
    expected = []
    params = nnx.state(model, nnx.Param)
    for j in range(2):
        key = jax.random.fold_in(jax.random.key(2), j)
        for step in (0.1, -0.1)[: 1 + antithetic]:
            copy = _copy(model)
            nnx.update(copy, _moved(params, key, step))
            _pass(copy, jax.tree.map(lambda x, j=j: x[j::2], _batch()))
            expected.append(copy.norm.var[...])
    before = model.norm.var[...]
    _smoothed(model, jit, antithetic=antithetic, batch_norm="perturbed")
    np.testing.assert_allclose(model.norm.var[...], sum(expected) / len(expected), 1e-5)
    assert jnp.abs(model.norm.var[...] - before).max() > 1e-3


@pytest.mark.heart
@pytest.mark.parametrize("jit", [False, True])
def test_clean_batch_norm_is_that_of_one_clean_pass(jit):
    model = Network(nnx.Rngs(0))
    clean = _copy(model)
    _pass(clean, _batch())
    _smoothed(model, jit, batch_norm="clean")
    np.testing.assert_allclose(model.norm.var[...], clean.norm.var[...], rtol=1e-6)
    assert model.dropout.rngs.count[...] == 1


def test_each_draw_has_its_own_dropout_mask_shared_by_a_pair():
    model = Network(nnx.Rngs(0))
    images = jnp.ones((BATCH, 6, 6, 1))

    def masks(model, batch):
        kept = model.dropout(jnp.ones((32, 4))) != 0
        return model.dense.bias.sum() * 0 + batch.sum() * 0, kept

    f = flatopt.flax.value_and_grad(
        masks,
        0.1,
        num_samples=3,
        antithetic=True,
        has_aux=True,
    )
    (_, kept), _ = f(jax.random.key(0), model, batch=images)
    (_, later), _ = f(jax.random.key(1), model, batch=images)
    np.testing.assert_array_equal(kept[:, 0], kept[:, 1])
    flat = [tuple(np.ravel(m)) for m in [*kept[:, 0], *later[:, 0]]]
    assert len(set(flat)) == 6
    assert model.dropout.rngs.count[...] == 2


@pytest.mark.parametrize(("batch_norm", "extra"), [("perturbed", 0), ("clean", 1)])
def test_no_pass_is_thrown_away(batch_norm, extra):
    calls = []

    def counted(model, batch):
        calls.append(batch["labels"].shape)
        return loss_fn(model, batch)

    f = flatopt.flax.value_and_grad(
        counted, 0.1, num_samples=2, batch_argnames=("batch",), batch_norm=batch_norm
    )
    f(jax.random.key(0), Network(nnx.Rngs(0)), batch=_batch())
    assert calls == [(BATCH // 2,)] * 2 + [(BATCH,)] * extra


def test_wrong_batch_norm_and_names():
    with pytest.raises(ValueError, match="batch_norm must be 'perturbed' or 'clean'"):
        flatopt.flax.value_and_grad(loss_fn, 0.1, batch_norm="frozen")
    with pytest.raises(ValueError, match="'data', which value_fn does not take"):
        flatopt.flax.value_and_grad(loss_fn, 0.1, batch_argnames=("data",))(
            jax.random.key(0), Network(nnx.Rngs(0)), data=_batch()
        )


@pytest.mark.heart
def test_wrt_freezes_the_rest():
    model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
    f = flatopt.flax.value_and_grad(
        lambda model, x: (model(x) ** 2).mean(), 0.1, wrt=nnx.LoRAParam
    )
    _, grads = f(jax.random.key(0), model, jnp.ones((2, 4)))
    paths = [path for path, _ in nnx.to_flat_state(grads)]
    assert paths == [("lora", "lora_a"), ("lora", "lora_b")]


# One call with links inside nnx.Optimizer


@pytest.mark.parametrize("jit", [False, True])
def test_update_makes_the_step_of_value_and_grad(jit):
    tx = optax.chain(
        flatopt.smooth_gradients(
            0.1, kernels.filterwise(), num_samples=2, batch_argnames=("batch",), key=3
        ),
        optax.sgd(0.1),
    )
    model = Network(nnx.Rngs(0))
    by_hand = _copy(model)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    update = flatopt.flax.update
    step = lambda o, m, b: update(o, m, loss_fn, batch=b)  # noqa: E731
    loss = (nnx.jit(step) if jit else step)(optimizer, model, _batch())

    f = flatopt.flax.value_and_grad(
        loss_fn,
        0.1,
        kernels.filterwise(),
        num_samples=2,
        batch_argnames=("batch",),
        batch_norm="clean",
    )
    key = jax.random.fold_in(jax.random.key(3), 0)
    expected, grads = nnx.jit(f)(key, by_hand, batch=_batch())
    plain = nnx.Optimizer(by_hand, optax.sgd(0.1), wrt=nnx.Param)
    plain.update(by_hand, grads)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param, nnx.BatchStat)[0]),
        nnx.to_pure_dict(nnx.state(by_hand, nnx.Param, nnx.BatchStat)[0]),
    )
    np.testing.assert_allclose(model.norm.mean[...], by_hand.norm.mean[...], rtol=1e-5)
    assert optimizer.step[...] == 1


def test_update_trains_and_compiles_once():
    model = Network(nnx.Rngs(0))
    tx = flatopt.lpf_sgd(0.1, num_samples=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(optimizer, model, batch):
        return flatopt.flax.update(optimizer, model, loss_fn, batch=batch)

    batch = _batch()
    batch["images"] += batch["labels"].astype("f4")[:, None, None, None]
    first = step(optimizer, model, batch)
    step(optimizer, model, batch)
    with count_compilations() as compiled:
        for _ in range(60):
            last = step(optimizer, model, batch)
    assert not compiled
    assert last < 0.7 * first


def test_update_computes_no_gradient_that_is_thrown_away():
    calls = []

    def counted(model, batch):
        calls.append(batch["labels"].shape)
        return loss_fn(model, batch)

    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, flatopt.lpf_sgd(0.1, num_samples=2), wrt=nnx.Param)
    flatopt.flax.update(optimizer, model, counted, batch=_batch())
    assert calls == [(BATCH,)] + [(BATCH // 2,)] * 2  # statistics, then the chunks


def test_update_takes_the_sharpness_aware_links():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    inputs = jnp.arange(12.0).reshape(4, 3) / 12

    def value_fn(model, inputs):
        return jnp.sin(model(inputs)).mean()

    tx = optax.chain(flatopt.sam_gradients(0.1), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = value_fn(model, inputs)
    loss = flatopt.flax.update(optimizer, model, value_fn, inputs=inputs)
    np.testing.assert_allclose(loss, before, rtol=1e-6)
    assert value_fn(model, inputs) < before


@pytest.mark.heart
def test_update_without_our_links_and_closures_over_the_batch():
    model = Network(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="optimizer has no link of flatopt in its chain"
    ):
        flatopt.flax.update(
            nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), model, loss_fn
        )
    optimizer = nnx.Optimizer(model, flatopt.lpf_sgd(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match="'batch', which value_fn does not take"):
        flatopt.flax.update(
            optimizer, model, lambda model: loss_fn(model, _batch()), batch=_batch()
        )


class Counter(nnx.Module):
    """A layer with variables of its own kinds."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(2, 1, rngs=rngs)
        self.pair = nnx.Param({"a": jnp.ones((2, 3)), "b": jnp.ones(2)})
        self.calls = nnx.Variable(jnp.array(0))
        self.nothing = nnx.Variable(None)
        self.tree = nnx.Variable({"a": jnp.zeros(2)})

    def __call__(self, x):
        self.calls[...] += 1
        return self.dense(x) + self.pair.get_value()["b"].sum()


def test_variables_of_any_kind_are_kept_and_counted():
    model = Counter(nnx.Rngs(0))
    value_fn = lambda model, batch: (model(batch) ** 2).mean()  # noqa: E731
    f = flatopt.flax.value_and_grad(value_fn, 0.1, num_samples=2)
    f(jax.random.key(0), model, batch=jnp.ones((4, 2)))
    assert model.calls[...] == 1
    optimizer = nnx.Optimizer(model, flatopt.nso_sgd(0.1), wrt=nnx.Param)
    flatopt.flax.update(optimizer, model, value_fn, batch=jnp.ones((4, 2)))
    assert model.calls[...] == 2
    assert model.nothing.get_value() is None
    assert flatopt.flax.filter_axes(model)["pair"] == {"a": (1,), "b": ()}


def test_loss_fn_may_name_sample_key_and_params():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))

    def value_fn(model, params, sample_key):
        noise = jax.random.normal(sample_key, (4, 1))
        return ((model(params) + noise) ** 2).mean()

    f = flatopt.flax.value_and_grad(value_fn, 0.1)
    loss, _ = f(jax.random.key(0), model, params=jnp.ones((4, 2)))
    assert jnp.isfinite(loss)


@pytest.mark.parametrize("kernel", ["isotropic", "filterwise"])
def test_every_form_of_the_model_sees_the_same_noise(kernel):
    kernel = getattr(kernels, kernel)()
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    inputs = jnp.arange(12.0).reshape(4, 3)

    def value_fn(model, inputs):
        return jnp.sin(model(inputs)).mean()

    def plain(params, inputs):
        return value_fn(nnx.merge(graphdef, params), inputs)

    def with_key(params, inputs, sample_key):
        return plain(params, inputs)

    key = jax.random.key(5)
    step_key = jax.random.fold_in(key, 0)
    expected = flatopt.smooth_value_and_grad(plain, 0.5, kernel)(
        step_key, state, inputs
    )
    forms = [nnx.to_pure_dict(state), nnx.as_pure(state)]
    values = [
        flatopt.smooth_value_and_grad(f, 0.5, kernel)(step_key, form, inputs)[0]
        for form in forms
        for f in (plain, with_key)
    ]
    in_flax = flatopt.flax.value_and_grad(value_fn, 0.5, kernel)
    values.append(in_flax(step_key, model, inputs)[0])
    tx = optax.chain(flatopt.smooth_gradients(0.5, kernel, key=key), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    values.append(flatopt.flax.update(optimizer, model, value_fn, inputs=inputs))
    np.testing.assert_allclose(values, expected[0], rtol=1e-6)


# Paths and filters


def test_nnx_split_optimizer_and_plain_dict_give_the_same_noise():
    model = Transformer(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    forms = [state, nnx.as_pure(state), nnx.to_pure_dict(state)]
    axes = flatopt.flax.filter_axes(model)
    for kernel in (kernels.isotropic(), kernels.filterwise(filter_axes=axes)):
        noises = [leaves_array(kernel(jax.random.key(0), form)) for form in forms]
        for other in noises[1:]:
            np.testing.assert_array_equal(other, noises[0])


def _papers_rms(path, leaf):
    """Root mean square of the paper's noise: filters are rows of PyTorch's layouts."""
    leaf = np.asarray(leaf, "f8")
    if path[0] == "blocks":
        parts = [_papers_rms(("block", *path[1:]), layer) for layer in leaf]
        return np.sqrt(np.mean(np.square(parts)))
    layer, name = path[-2:]
    if name in ("bias", "scale"):
        rows = leaf.reshape(1, -1)
    elif name == "embedding":
        rows = leaf
    elif layer in ("query", "key", "value"):
        rows = leaf.reshape(leaf.shape[0], -1).T
    else:
        rows = leaf.reshape(-1, leaf.shape[-1]).T
    return np.sqrt(np.mean((rows**2).sum(axis=1)))


def test_filter_axes_give_the_papers_noise_on_a_transformer():
    model = Transformer(nnx.Rngs(0))
    # Biases start at zero, where the noise of every convention is zero.
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = 0.1 * rng.normal(size=variable.shape)
        variable.set_value(np.asarray(variable.get_value()) + noise.astype("f4"))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    axes = flatopt.flax.filter_axes(model)
    noise, default, last = (  # by the layers, by names and shapes, by the last axis
        kernels.filterwise(kernels.signs, filter_axes=choice)(jax.random.key(0), params)
        for choice in (axes, None, -1)
    )
    assert_close(default, noise)
    worst_last = 1.0
    for (path, leaf), unit, naive in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(noise),
        jax.tree.leaves(last),
        strict=True,
    ):
        expected = _papers_rms([p.key for p in path], leaf)
        ratio = np.sqrt(np.mean(np.square(unit))) / expected
        np.testing.assert_allclose(ratio, 1.0, rtol=1e-4, err_msg=str(path))
        off = np.sqrt(np.mean(np.square(naive))) / expected
        worst_last = max(worst_last, off, 1 / off)
    assert worst_last > 2  # the last axis alone would not do


def test_filter_axes_of_other_layers():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        transpose=nnx.ConvTranspose(2, 5, (3,), transpose_kernel=True, rngs=rngs),
        general=nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs),
        einsum=nnx.Einsum("abc,cde->abde", (3, 4, 5), (4, 5), rngs=rngs),
        own=nnx.Param(jnp.ones((2, 3))),
    )
    assert flatopt.flax.filter_axes(model) == {
        "transpose": {"kernel": (1,), "bias": ()},
        "general": {"kernel": (2, 3), "bias": ()},
        "einsum": {"kernel": (1, 2), "bias": ()},
        "own": (1,),
    }


# Linen


def test_linen_train_state_recipe():
    model = linen.Dense(3)
    inputs = jax.random.normal(jax.random.key(1), (BATCH, 5))

    def value_fn(params, batch):
        logits = model.apply({"params": params}, batch["images"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"]
        ).mean()

    class TrainState(train_state.TrainState):
        batch_stats: dict

        def apply_gradients(self, *, grads=None, **kwargs):
            names = [name for name in kwargs if name in self.__dataclass_fields__]
            fields = {name: kwargs.pop(name) for name in names}
            updates, opt_state = self.tx.update(
                grads, self.opt_state, self.params, **kwargs
            )
            return self.replace(
                step=self.step + 1,
                params=optax.apply_updates(self.params, updates),
                opt_state=opt_state,
                **fields,
            )

    params = model.init(jax.random.key(0), inputs)["params"]
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=flatopt.lpf_sgd(0.5), batch_stats={}
    )
    batch = {"images": inputs, "labels": jnp.arange(BATCH) % 3}

    @jax.jit
    def step(state, batch):
        return state.apply_gradients(
            value_fn=value_fn, batch=batch, batch_stats={"mean": jnp.ones(2)}
        )

    first = value_fn(state.params, batch)
    for _ in range(50):
        state = step(state.replace(batch_stats={}), batch)
    assert state.batch_stats["mean"].tolist() == [1.0, 1.0]
    assert value_fn(state.params, batch) < 0.8 * first
    assert state.step == 50

    stock = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=flatopt.lpf_sgd(0.5)
    )
    with pytest.raises(ValueError, match="value_fn, which was not passed.*TrainState"):
        stock.apply_gradients(grads=optax.tree.zeros_like(params))
