"""IVON against its formulas in NumPy, its posterior against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
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

ESS, RATE = 50.0, 0.3
SETTINGS = {
    "defaults": {},
    "all": {
        "hess_init": 0.25,  # which float32 holds, as the authors keep it
        "beta1": 0.8,
        "beta2": 0.95,
        "weight_decay": 0.02,
        "clip_radius": 0.2,
        "rescale_lr": False,
    },
    "draws": {"beta2": 0.95, "num_samples": 3},
    "chunks": {
        "beta2": 0.95,
        "num_samples": 4,
        "batch_argnames": ("inputs", "labels"),
    },
}


def _wide_softmax_regression():
    params, inputs, labels = jax.tree.map(np.asarray, softmax_regression())
    return {k: p.astype("f8") for k, p in params.items()}, inputs.astype("f8"), labels


def _map(function, *trees):
    return {name: function(*(t[name] for t in trees)) for name in trees[0]}


@jax.jit
def _draw(step, index, params):
    key = jax.random.fold_in(jax.random.key(3), step)
    return kernels.isotropic()(jax.random.fold_in(key, index), params)


class _Reference:
    """The authors' update in NumPy, with the noise of our key."""

    def __init__(
        self,
        params,
        hess_init=1.0,
        beta1=0.9,
        beta2=0.99999,
        weight_decay=1e-4,
        clip_radius=np.inf,
        rescale_lr=True,
        num_samples=1,
        batch_argnames=(),
    ):
        self.mean = {k: np.asarray(v, "f8") for k, v in params.items()}
        self.hess = _map(lambda p: np.full_like(p, hess_init), self.mean)
        self.momentum = _map(np.zeros_like, self.mean)
        self.beta1, self.beta2, self.decay = beta1, beta2, weight_decay
        self.clip, self.samples = clip_radius, num_samples
        self.rate = RATE * (hess_init + weight_decay if rescale_lr else 1)
        self.is_split = bool(batch_argnames)
        self.count = 0

    def _noise(self, index):
        return _map(
            lambda z, h: np.asarray(z, "f8") / np.sqrt(ESS * (h + self.decay)),
            _draw(self.count, index, _map(np.float32, self.mean)),
            self.hess,
        )

    def step(self, x, y):
        grads, products = [], []
        for j in range(self.samples):
            rows = slice(j, None, self.samples) if self.is_split else slice(None)
            e = self._noise(j)
            moved = _map(np.add, self.mean, e)
            grads.append(softmax_gradient(moved, x[rows], y[rows]))
            products.append(_map(np.multiply, e, grads[-1]))
        self.count += 1
        g = _map(lambda *g: sum(g) / self.samples, *grads)
        f = _map(
            lambda h, *p: ESS * sum(p) / self.samples * (h + self.decay),
            self.hess,
            *products,
        )
        a, b, d = self.beta1, self.beta2, self.decay
        self.momentum = _map(lambda v, g: a * v + (1 - a) * g, self.momentum, g)
        self.hess = _map(
            lambda h, f: (
                b * h + (1 - b) * f + (1 - b) ** 2 / 2 * (h - f) ** 2 / (h + d)
            ),
            self.hess,
            f,
        )
        debias = 1 - a**self.count
        self.mean = _map(
            lambda m, v, h: (
                m
                - self.rate
                * np.clip((v / debias + d * m) / (h + d), -self.clip, self.clip)
            ),
            self.mean,
            self.momentum,
            self.hess,
        )


@pytest.mark.heart
@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_follow_the_formula(name, x64):
    params, inputs, labels = _wide_softmax_regression()
    reference = _Reference(params, **SETTINGS[name])
    tx = flatopt.ivon(RATE, ESS, key=3, **SETTINGS[name])
    state = tx.init(params)

    @jax.jit
    def update(params, state):
        updates, state = tx.update(
            None, state, params, value_fn=softmax_loss, inputs=inputs, labels=labels
        )
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        params, state = update(params, state)
        reference.step(inputs, labels)
    for leaf in params:
        for ours, theirs in (
            (params, reference.mean),
            (state.hess, reference.hess),
            (state.momentum, reference.momentum),
        ):
            np.testing.assert_allclose(ours[leaf], theirs[leaf], rtol=1e-6)
    if name != "defaults":
        assert np.abs(reference.hess["kernel"] - reference.hess["kernel"][0, 0]).max()


@pytest.mark.parametrize("name", ["defaults", "all", "draws"])
def test_twenty_steps_are_those_of_the_authors(name, monkeypatch, x64):
    torch, ivon = pytest.importorskip("torch"), pytest.importorskip("ivon")
    params, inputs, labels = _wide_softmax_regression()
    settings = dict(SETTINGS[name])
    num_samples = settings.get("num_samples", 1)
    tx = flatopt.ivon(RATE, ESS, key=3, **settings)
    state, ours = tx.init(params), params
    update = jax.jit(
        lambda p, s: tx.update(
            None, s, p, value_fn=softmax_loss, inputs=inputs, labels=labels
        )
    )
    settings.pop("num_samples", None)
    weights = [torch.tensor(np.array(params[k])) for k in ("bias", "kernel")]
    theirs = [torch.nn.Parameter(w) for w in weights]
    optimizer = ivon.IVON(theirs, RATE, ESS, mc_samples=num_samples, **settings)
    noise = []
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: noise.pop(0))
    x, y = torch.tensor(np.array(inputs)), torch.tensor(np.array(labels)).long()
    for step in range(20):
        for j in range(num_samples):
            z = _draw(step, j, params)
            flat = np.concatenate([np.ravel(z["bias"]), np.ravel(z["kernel"])])
            noise.append(torch.tensor(flat.astype("f8")))
        for _ in range(num_samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                logits = x @ theirs[1] + theirs[0]
                torch.nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
        updates, state = update(ours, state)
        ours = optax.apply_updates(ours, updates)
    for leaf, other in zip((ours["bias"], ours["kernel"]), theirs, strict=True):
        np.testing.assert_allclose(leaf, other.detach().numpy(), rtol=1e-9)
    hess = np.concatenate([np.ravel(state.hess[k]) for k in ("bias", "kernel")])
    found = optimizer.param_groups[0]["hess"].numpy()
    np.testing.assert_allclose(hess, found, rtol=1e-9)


def test_the_curvature_of_a_quadratic_is_learned(x64):
    curvature = np.array([0.5, 1.0, 4.0, 0.0])
    params = np.array([1.0, -2.0, 0.5, 1.0])
    tx = flatopt.ivon(0.05, ESS, beta2=0.995, num_samples=16, weight_decay=0.01)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(
            None,
            state,
            params,
            value_fn=lambda p: jnp.sum(curvature * p**2) / 2,
        )
        return (optax.apply_updates(params, updates), state), state.hess

    _, hess = jax.jit(lambda c: jax.lax.scan(step, c, length=4000))(
        (params, tx.init(params))
    )
    np.testing.assert_allclose(
        hess[2000:].mean(axis=0), curvature, rtol=0.03, atol=0.01
    )


@pytest.mark.heart
def test_draws_have_the_mean_and_the_deviation_of_the_posterior():
    params = {"a": jnp.arange(3.0), "frozen": jnp.array(-0.0), "b": jnp.ones((2, 2))}
    mask = {"a": True, "frozen": False, "b": True}
    tx = flatopt.ivon(0.1, ESS, hess_init=0.5, weight_decay=0.1, mask=mask)
    state = tx.init(params)
    assert state.hess["frozen"] is None
    hess = {"a": jnp.array([0.1, 1.0, 10.0]), "frozen": None, "b": jnp.ones((2, 2))}
    chain = optax.chain(optax.identity(), tx)
    whole = (chain.init(params)[0], state._replace(hess=hess))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = jax.jit(jax.vmap(lambda key: flatopt.sample_posterior(key, params, whole)))(
        keys
    )
    assert jax.tree.structure(draws) == jax.tree.structure(params)
    assert (jnp.signbit(draws["frozen"])).all()
    for name in ("a", "b"):
        std = 1 / np.sqrt(ESS * (np.asarray(hess[name]) + 0.1))
        found = np.asarray(draws[name], "f8")
        np.testing.assert_allclose(found.std(axis=0), std, rtol=0.03)
        error = found.mean(axis=0) - np.asarray(params[name])
        assert (np.abs(error) < 5 * std / np.sqrt(len(keys))).all()
    one = flatopt.sample_posterior(keys[0], params, whole)
    assert_close(one, jax.tree.map(lambda x: x[0], draws))


def test_the_kernel_of_the_posterior_averages_a_loss():
    params = jnp.array([3.0, 4.0])
    state = flatopt.ivon(0.1, 10.0, weight_decay=0.25).init(params)
    state = state._replace(hess=jnp.array([0.75, 3.75]))
    average = flatopt.smooth(
        lambda p: jnp.sum(p**2),
        1.0,
        flatopt.posterior_kernel(state),
        num_samples=4000,
        antithetic=True,
    )
    found = jax.jit(average)(jax.random.key(0), params)
    np.testing.assert_allclose(found, 25 + 1 / 10 + 1 / 40, rtol=1e-3)


def test_a_posterior_of_other_parameters_is_refused():
    params = {"w": jnp.ones(3)}
    state = flatopt.ivon(0.1, ESS).init(params)
    key = jax.random.key(0)
    for wrong in ({"w": jnp.ones(2)}, {"v": jnp.ones(3)}):
        with pytest.raises(ValueError, match="^params must be those of opt_state, got"):
            flatopt.sample_posterior(key, wrong, state)
    with pytest.raises(ValueError, match="must hold one state of flatopt.ivon, got 0"):
        flatopt.sample_posterior(key, params, optax.adam(0.1).init(params))
    with pytest.raises(TypeError, match="key must be one JAX random key, got 0"):
        flatopt.sample_posterior(0, params, state)


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_draw_their_own_noise_and_share_the_state(check_vma):
    params, batch = regression()
    options = {"hess_init": 0.5, "beta2": 0.9}
    tx = flatopt.ivon(0.1, ESS, axis_name="data", **options)
    spec = jax.sharding.PartitionSpec
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
    expected, hess = _step_by_hand()
    assert_close(state.hess, hess, rtol=2e-5)
    assert_close(updates, expected, rtol=1e-4)


@functools.cache
def _step_by_hand():
    """The means over devices come before what is not linear in them."""
    params, batch = jax.tree.map(np.asarray, regression())
    scale = 1 / np.sqrt(ESS * (0.5 + 1e-4))

    @jax.jit
    def one(device, part):
        key = jax.random.fold_in(jax.random.key(0), 0)
        own = jax.random.fold_in(jax.random.fold_in(key, device), 0)
        noise = jax.tree.map(lambda z: scale * z, kernels.isotropic()(own, params))
        grads = jax.grad(loss_fn)(jax.tree.map(jnp.add, params, noise), part)
        return grads, jax.tree.map(jnp.multiply, noise, grads)

    parts = [
        one(device, jax.tree.map(lambda x, d=device: np.split(x, 8)[d], batch))
        for device in range(8)
    ]
    grads, products = jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *parts)

    def curvature(product):
        change = ESS * product * (0.5 + 1e-4) - 0.5
        return 0.5 + 0.1 * change + (0.1 * change) ** 2 / 2 / (0.5 + 1e-4)

    hess = jax.tree.map(curvature, products)
    updates = jax.tree.map(
        lambda g, h, p: -0.1 * (0.5 + 1e-4) * (g + 1e-4 * p) / (h + 1e-4),
        grads,
        hess,
        params,
    )
    return updates, hess


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_parameters_have_a_wide_state(dtype):
    params, batch = regression(16, jnp.dtype(dtype))
    tx = flatopt.ivon(0.1, ESS)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves((state.hess, state.momentum))} == {
        jnp.dtype(jnp.float32)
    }
    found = jax.eval_shape(
        lambda s: tx.update(None, s, params, value_fn=loss_fn, batch=batch), state
    )
    assert types(found) == (types(params), types(state))


def test_a_step_that_is_skipped_leaves_the_posterior():
    params = jnp.array([3.0, 4.0])
    tx = flatopt.skip_nonfinite(flatopt.ivon(0.1, ESS, beta2=0.5))

    def update(state, factor):
        return tx.update(None, state, params, value_fn=lambda p: factor * jnp.sum(p**2))

    _, before = update(tx.init(params), 1.0)
    updates, after = update(before, jnp.nan)
    np.testing.assert_array_equal(updates, 0)
    assert after.inner_state.count == 2
    assert_close(after.inner_state.memory, before.inner_state.memory, rtol=0, atol=0)


def test_numbers_of_ivon_may_be_injected():
    params, batch = regression()
    numbers = {"learning_rate": 0.1, "ess": ESS, "weight_decay": 0.01, "beta2": 0.9}
    injected = optax.inject_hyperparams(flatopt.ivon)(**numbers)
    plain = flatopt.ivon(**numbers)

    def update(tx):
        zeros = optax.tree.zeros_like(params)
        return jax.jit(
            lambda s: tx.update(zeros, s, params, value_fn=loss_fn, batch=batch)
        )(tx.init(params))

    assert_close(update(injected)[0], update(plain)[0])
    sample = flatopt.sample_posterior
    key = jax.random.key(0)
    assert_close(
        sample(key, params, update(injected)[1]), sample(key, params, update(plain)[1])
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ess": 0}, ValueError, "ess must be greater than 0, got 0"),
        ({"ess": -1.0}, ValueError, "ess must be finite and not negative, got -1"),
        ({"hess_init": 0.0}, ValueError, "hess_init must be greater than 0, got 0"),
        ({"beta1": 1.0}, ValueError, "beta1 must be less than 1, got 1"),
        ({"beta2": "x"}, TypeError, "beta2 must be a number or a scalar array"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and not neg"),
        ({"clip_radius": 0.0}, ValueError, "clip_radius must be greater than 0, got 0"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be finite and not"),
        ({"num_samples": 0}, ValueError, "num_samples must be an int of at least 1"),
        ({"rescale_lr": 1}, TypeError, "rescale_lr must be a bool, got 1; it says"),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        flatopt.ivon(**{"learning_rate": 0.1, "ess": ESS, **options})


def test_a_flax_model_and_draws_from_its_posterior():
    nnx = pytest.importorskip("flax.nnx")
    import flatopt.flax

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = flatopt.ivon(0.1, ESS, num_samples=2, batch_argnames=("batch",))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = nnx.jit(
        lambda model, optimizer, batch: flatopt.flax.update(
            optimizer,
            model,
            lambda model, batch: jnp.mean(model(batch) ** 2),
            batch=batch,
        )
    )(model, optimizer, jnp.ones((8, 3)))
    assert jnp.isfinite(loss)
    params = nnx.state(model, nnx.Param)
    draw = flatopt.sample_posterior(jax.random.key(0), params, optimizer)
    assert jax.tree.structure(draw) == jax.tree.structure(params)
    noise = draw["kernel"][...] - params["kernel"][...]
    assert 0.3 < float(jnp.std(noise)) * np.sqrt(ESS) < 3
