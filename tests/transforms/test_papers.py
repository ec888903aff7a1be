"""LPF-SGD's and NSO's links, accumulation, noise on frozen weights."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import loss_fn, regression

import flatopt
from flatopt import kernels

RATE = 0.1


def _tanh_loss(params, batch):
    """A loss of few operations, of one leaf; no parabola, as pairs of noise cancel there."""
    outputs = jnp.tanh(batch["inputs"] @ params["w"])
    return jnp.mean((outputs - batch["targets"]) ** 2)


WEIGHTS = {"w": np.random.default_rng(6).normal(size=(5, 2)).astype("f4")}


def _run(tx, steps=3, loss_fn=_tanh_loss, params=None):
    _, batch = regression(16)
    params = jax.device_put(WEIGHTS) if params is None else params
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        zeros = optax.tree.zeros_like(params)
        updates, state = tx.update(zeros, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def _check(params, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-6), params, expected
    )


_gradient = jax.jit(jax.grad(loss_fn))


def _gradients(key, params, scale, kernel, parts, signs, batch):
    """The mean gradient over draws, written out."""
    total = jax.tree.map(jnp.zeros_like, params)
    for j in range(parts):
        chunk = (
            jax.tree.map(lambda x, j=j: x[j::parts], batch) if len(signs) < 2 else batch
        )
        noise = kernel(jax.random.fold_in(key, j), params)
        for sign in signs:
            moved = jax.tree.map(lambda p, u, s=sign: p + s * scale * u, params, noise)
            grads = _gradient(moved, chunk)
            total = jax.tree.map(
                lambda t, g: t + g / (parts * len(signs)), total, grads
            )
    return total


@pytest.mark.heart
@pytest.mark.parametrize("given", [None, "isotropic", "signs"])
def test_links_against_the_papers_written_out(given):
    kernel = {
        None: None,
        "isotropic": kernels.isotropic(),
        "signs": kernels.filterwise(kernels.signs),
    }[given]
    start, batch = regression(16)
    step_key = jax.random.fold_in(jax.random.key(4), 0)
    cases = [
        (flatopt.lpf_gradients(0.2, 4, kernel, key=4), kernels.filterwise(), 4, (1,)),
        (flatopt.nso_gradients(0.2, 2, kernel, key=4), kernels.isotropic(), 2, (1, -1)),
    ]
    for link, default, parts, signs in cases:
        expected = _gradients(
            step_key, start, 0.2, kernel or default, parts, signs, batch
        )
        updates, _ = link.update(
            None, link.init(start), start, value_fn=loss_fn, batch=batch
        )
        _check(updates, expected)


def test_counts_are_left_out_of_injected_hyperparameters():
    for make, scale in (
        (flatopt.lpf_gradients, "gamma"),
        (flatopt.nso_gradients, "sigma"),
    ):
        tx = optax.inject_hyperparams(make)(**{scale: 0.2})
        state = tx.init(WEIGHTS)
        assert set(state.hyperparams) == {scale, "key", "start_step"}
        expected = _run(optax.chain(make(0.2), optax.sgd(RATE)))
        _check(_run(optax.chain(tx, optax.sgd(RATE))), expected)


RECIPES = {
    "lpf_sgd": (flatopt.lpf_gradients, {"kernel": kernels.isotropic()}),
    "nso_sgd": (flatopt.nso_gradients, {"kernel": kernels.filterwise()}),
    "lpf_adamw": (flatopt.lpf_gradients, {"kernel": kernels.isotropic()}),
    "nso_adamw": (flatopt.nso_gradients, {"kernel": kernels.filterwise()}),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_chains_and_take_what_their_parts_take(name):
    link, options = RECIPES[name]
    recipe = getattr(flatopt, name)
    if name.endswith("sgd"):
        settings = {
            "momentum": 0.5,
            "nesterov": True,
            "accumulator_dtype": jnp.bfloat16,
        }
        inner = optax.sgd(RATE, **settings)
    else:
        settings = {
            "b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-4, "nesterov": True,
            "mu_dtype": jnp.bfloat16, "weight_decay": 0.3,
        }  # fmt: skip
        inner = optax.adamw(RATE, **settings)
    expected = _run(optax.chain(link(0.1, 2, **options), inner))
    _check(_run(recipe(RATE, 0.1, 2, **options, **settings)), expected, rtol=1e-4)
    taken = set(inspect.signature(recipe).parameters)
    assert set(inspect.signature(link).parameters) <= taken | {"value"}
    wrapped = inspect.signature(optax.sgd if name.endswith("sgd") else optax.adamw)
    assert set(wrapped.parameters) - {"mask"} <= taken


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", [*RECIPES, "sam_sgd", "asam_sgd"])
def test_masks_of_training_and_of_decay(name):
    start, _ = regression(16)
    train = {"first": False, "second": True}
    decay = {"first": True, "second": {"kernel": True, "bias": False}}
    recipe = getattr(flatopt, name)
    # Without a gradient decay alone moves the parameters.
    flat = lambda params, batch: 0.0 * loss_fn(params, batch)  # noqa: E731
    both = {"weight_decay": 0.5, "weight_decay_mask": decay}
    if name.startswith("lpf"):
        both["num_samples"] = 1
    start["second"]["bias"] = jnp.ones(2)
    after = _run(recipe(RATE, mask=train, **both), 1, flat, start)
    np.testing.assert_array_equal(after["first"]["kernel"], start["first"]["kernel"])
    np.testing.assert_array_equal(after["second"]["bias"], start["second"]["bias"])
    shrunk = (1 - RATE * 0.5) * start["second"]["kernel"]
    np.testing.assert_allclose(after["second"]["kernel"], shrunk, rtol=1e-5)
    only_decay = _run(recipe(RATE, **both), 1, flat, start)
    np.testing.assert_allclose(
        only_decay["first"]["kernel"], (1 - RATE * 0.5) * start["first"]["kernel"], 1e-5
    )
    with pytest.raises(ValueError, match="weight_decay_mask must be a tree prefix"):
        recipe(RATE, weight_decay=0.5, weight_decay_mask={"first": True}).init(start)
    with pytest.raises(ValueError, match="^mask must be a tree prefix of params"):
        recipe(RATE, mask={"v": True}).init(start)


def test_sam_recipes_split_into_microbatches():
    chain = optax.chain(
        flatopt.sam_gradients(0.3, num_microbatches=4, batch_argnames=("batch",)),
        optax.sgd(RATE, momentum=0.9),
    )
    options = {"num_microbatches": 4, "batch_argnames": ("batch",)}
    _check(_run(flatopt.sam_sgd(RATE, 0.3, **options)), _run(chain))


# Accumulation


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", [flatopt.smooth_gradients, flatopt.nso_gradients])
def test_accumulation_without_noise_is_one_big_batch(make):
    start, batch = regression(12)
    tx = flatopt.accumulate(make(0.0), optax.adam(RATE), 3)
    state, params = tx.init(start), start

    @jax.jit
    def step(params, state, part):
        updates, state = tx.update(params, state, params, value_fn=loss_fn, batch=part)
        return updates, optax.apply_updates(params, updates), state

    for j in range(6):
        rows = slice(4 * (j % 3), 4 * (j % 3) + 4)
        part = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], batch)
        updates, params, state = step(params, state, part)
        if j % 3 < 2:
            assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(updates))
    plain, expected = optax.adam(RATE), start

    @jax.jit
    def plain_step(params, state):
        updates, state = plain.update(jax.grad(loss_fn)(params, batch), state)
        return optax.apply_updates(params, updates), state

    plain_state = plain.init(start)
    for _ in range(2):
        expected, plain_state = plain_step(expected, plain_state)
    _check(params, expected, rtol=1e-4)


@pytest.mark.heart
@pytest.mark.usefixtures("standard_promotion")
def test_accumulation_with_noise_is_the_loop_written_out():
    start, batch = regression(16)
    tx = flatopt.accumulate(flatopt.lpf_gradients(0.2, 4, key=4), optax.sgd(RATE), 3)
    state, total = tx.init(start), jax.tree.map(jnp.zeros_like, start)
    for step in range(3):
        key = jax.random.fold_in(jax.random.key(4), step)
        part = jax.tree.map(lambda x, s=step: jnp.roll(x, s, axis=0), batch)
        grads = _gradients(key, start, 0.2, kernels.filterwise(), 4, (1,), part)
        total = jax.tree.map(lambda t, g: t + g / 3, total, grads)
        updates, state = tx.update(
            optax.tree.zeros_like(start), state, start, value_fn=loss_fn, batch=part
        )
    _check(updates, jax.tree.map(lambda g: -RATE * g, total))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("jit", [False, True])
def test_accumulation_in_the_wrong_order_is_an_error(jit):
    params, batch = regression(16)
    for recipe in (flatopt.lpf_adamw(RATE), flatopt.nso_sgd(RATE)):
        tx = optax.MultiSteps(recipe, 4)
        update = lambda state, tx=tx: tx.update(  # noqa: E731
            optax.tree.zeros_like(params), state, params, value_fn=loss_fn, batch=batch
        )
        with pytest.raises(
            ValueError, match="is inside of optax.MultiSteps, which wou"
        ):
            (jax.jit(update) if jit else update)(tx.init(params))


@pytest.mark.parametrize("count", [0, 1.5, None])
def test_num_microbatches(count):
    with pytest.raises(ValueError, match="num_microbatches must be an int of at least"):
        flatopt.accumulate(flatopt.nso_gradients(), optax.sgd(RATE), count)


@pytest.mark.parametrize(
    "link",
    [
        flatopt.nso_sgd(RATE),
        flatopt.chain(flatopt.nso_sgd(RATE)),
        optax.chain(flatopt.nso_sgd(RATE)),
        optax.named_chain(("recipe", flatopt.lpf_adamw(RATE))),
        optax.masked(flatopt.sam_sgd(RATE), True),
        flatopt.skip_nonfinite(flatopt.nso_sgd(RATE)),
        optax.inject_hyperparams(flatopt.nso_sgd)(RATE),
        optax.inject_hyperparams(flatopt.ivon)(RATE, ess=100.0),
    ],
)
def test_accumulation_refuses_an_optimizer_in_place_of_its_link(link):
    with pytest.raises(ValueError, match="got a whole optimizer"):
        flatopt.accumulate(link, optax.sgd(RATE), 2)


def test_accumulation_takes_links_in_wrappers():
    inner = flatopt.nso_gradients(0.01)

    def update(updates, state, params=None, **arguments):
        if params is None:
            return update(updates, state, late, **arguments)
        return inner.update(updates, state, params, **arguments)

    for link in (
        # Closes over itself, and over what has no value yet.
        optax.GradientTransformationExtraArgs(inner.init, update),
        optax.inject_hyperparams(flatopt.nso_gradients)(0.01),
        flatopt.skip_nonfinite(
            flatopt.sam_gradients(0.1, direction=optax.scale_by_adam())
        ),
        optax.chain(flatopt.lpf_gradients(0.1), optax.clip_by_global_norm(1.0)),
    ):
        flatopt.accumulate(link, optax.sgd(RATE), 2)
    late = None


# Noise on frozen weights, gradients for their adapters


def _adapted():
    rng = np.random.default_rng(2)
    base, down, up, batch = (
        jax.device_put(rng.normal(size=shape).astype("f4"))
        for shape in ((30, 20), (30, 2), (2, 20), (8, 30))
    )
    return {"base": base, "down": down, "up": up}, batch


def _adapted_loss(params, batch):
    outputs = batch @ params["base"] + (batch @ params["down"]) @ params["up"]
    return jnp.mean(jnp.tanh(outputs) ** 2)


ADAPTERS = {"base": False, "down": True, "up": True}
BASE = {"base": True, "down": False, "up": False}


def _merged(params):
    return {"base": params["base"] + params["down"] @ params["up"]}


@pytest.mark.parametrize(
    ("strategy", "antithetic"),
    [("scan", False), ("scan", True), ("vmap", False), ("unroll", True)],
)
def test_noise_on_frozen_weights_against_the_sum_written_out(strategy, antithetic):
    params, batch = _adapted()
    kernel = kernels.filterwise(norms_of=_merged)
    f = flatopt.smooth_value_and_grad(
        _adapted_loss, 0.2, kernel, num_samples=3, antithetic=antithetic,
        mask=ADAPTERS, noise_mask=BASE, strategy=strategy,
    )  # fmt: skip
    key = jax.random.key(8)
    value, grads = jax.jit(f)(key, params, batch)
    base, down, up, x = (
        np.asarray(a, "f8") for a in (*map(params.get, ("base", "down", "up")), batch)
    )
    norms = np.linalg.norm(base + down @ up, axis=0)
    values, total = [], {"down": 0.0, "up": 0.0}
    signs = (1, -1) if antithetic else (1,)
    for j in range(3):
        draw = kernels.isotropic()(jax.random.fold_in(key, j), params)["base"]
        for sign in signs:
            moved = base + sign * 0.2 * np.asarray(draw, "f8") * norms
            out = np.tanh(x @ moved + (x @ down) @ up)
            values.append(np.mean(out**2))
            slope = 2 * out * (1 - out**2) / out.size / (3 * len(signs))
            total["down"] = total["down"] + x.T @ slope @ up.T
            total["up"] = total["up"] + (x @ down).T @ slope
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-5)
    _check({n: grads[n] for n in total}, total)
    np.testing.assert_array_equal(grads["base"], 0)


def _authors_deviation(weight, step, num_steps, rho):
    """Flat-LoRA's deviations in PyTorch's layout, a row an output, as its authors write."""
    num_inputs = weight.shape[1]
    factor = 0.5 * (1 - np.cos(step / num_steps * np.pi))
    row_norms = np.linalg.norm(weight, axis=1, keepdims=True)
    return np.broadcast_to(factor * rho * row_norms / num_inputs**0.5, weight.shape)


@pytest.mark.parametrize("step", [0, 3, 10])
def test_the_noise_of_flat_lora_is_that_of_its_authors(step):
    params, _ = _adapted()
    params["base"] *= jnp.arange(1.0, 21.0)[None]  # outputs of very different norms
    num_steps, rho = 10, 0.3

    def norms_of(params):
        return {"base": _merged(params)["base"] / 30**0.5}

    seen = []  # the bases at which the loss is evaluated

    def value_fn(params):
        jax.debug.callback(lambda x: seen.append(np.asarray(x, "f8")), params["base"])
        return jnp.sum(params["up"])

    tx = flatopt.smooth_gradients(
        lambda count: (
            rho * (1 - jnp.cos(jnp.pi * count.astype(jnp.float32) / num_steps)) / 2
        ),
        kernels.filterwise(norms_of=norms_of),
        num_samples=200,
        mask=ADAPTERS,
        noise_mask=BASE,
    )
    state = tx.init(params)._replace(count=jnp.int32(step))
    jax.block_until_ready(
        jax.jit(lambda s: tx.update(None, s, params, value_fn=value_fn))(state)
    )
    jax.effects_barrier()
    noise = np.stack(seen) - np.asarray(params["base"], "f8")
    merged = np.asarray(_merged(params)["base"], "f8")
    deviation = _authors_deviation(merged.T, step, num_steps, rho).T
    if step == 0:
        np.testing.assert_array_equal(noise, 0)
        return
    scaled = noise / deviation
    # Of each output the deviation, and the mean of all.
    std = np.sqrt((scaled**2).mean(axis=(0, 1)))
    np.testing.assert_allclose(std, 1, atol=5 / np.sqrt(2 * 200 * 30))
    assert abs(scaled.mean()) < 5 / np.sqrt(scaled.size)


def _count_products(jaxpr, shape):
    """How many products make an array of this shape, anywhere in a jaxpr."""
    count = 0
    for equation in jaxpr.eqns:
        made = [v.aval.shape for v in equation.outvars]
        count += equation.primitive.name == "dot_general" and (
            shape in made or shape[::-1] in made
        )
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count += _count_products(inner, shape)
    return count


def test_no_gradient_of_the_frozen_weight_is_made_and_it_stays_bit_equal():
    params, batch = _adapted()
    make = lambda noise: optax.chain(  # noqa: E731
        flatopt.lpf_gradients(
            0.1, 2, kernels.filterwise(norms_of=noise), mask=ADAPTERS, noise_mask=BASE
        ),
        optax.sgd(0.1),
    )
    plain = flatopt.lpf_gradients(0.1, 2)

    def step(params, state, tx):
        updates, state = tx.update(
            params, state, params, value_fn=_adapted_loss, batch=batch
        )
        return optax.apply_updates(params, updates), state

    def products(tx):
        jaxpr = jax.make_jaxpr(lambda p, s: step(p, s, tx))(params, tx.init(params))
        return _count_products(jaxpr.jaxpr, (30, 20))

    assert products(plain) >= 1  # the gradient of the base: the count can see it
    assert products(make(lambda params: {"base": params["base"]})) == 0
    assert products(make(_merged)) == 1  # the merged weight itself

    tx = make(_merged)
    run = jax.jit(
        lambda p, s: jax.lax.scan(
            lambda c, _: (step(*c, tx), None), (p, s), length=1000
        )
    )
    (after, _), _ = run(params, tx.init(params))
    np.testing.assert_array_equal(after["base"], params["base"])
    assert (after["up"] != params["up"]).all()


def test_masks_of_noise_in_sentences():
    params, batch = _adapted()
    f = flatopt.smooth_value_and_grad(_adapted_loss, 0.1, noise_mask={"base": True})
    with pytest.raises(ValueError, match="noise_mask must be a tree prefix of params"):
        f(jax.random.key(0), params, batch)
    for norms_of in (lambda p: {"base": p["down"]}, lambda p: {"other": p["base"]}):
        kernel = kernels.filterwise(norms_of=norms_of)
        f = flatopt.smooth_value_and_grad(
            _adapted_loss, 0.1, kernel, mask=ADAPTERS, noise_mask=BASE
        )
        with pytest.raises(
            ValueError, match=r"norms_of must return an array of shape \(30"
        ):
            f(jax.random.key(0), params, batch)
    with pytest.raises(
        TypeError, match="norms_of must be a function of the parameters"
    ):
        kernels.filterwise(norms_of={"base": 0})
