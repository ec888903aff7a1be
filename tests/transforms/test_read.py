"""One name for the loss of any link, through whatever is around it; chains in order."""

import types

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import TRANSFORMATIONS, optimizer, transformation

import flatopt
import flatopt.flax

START = jnp.array([3.0, 4.0])
MEASURE = [
    name
    for name in TRANSFORMATIONS
    if name not in ("anti_pgd", "ire", "track_stability")
]


def _loss(params, batch=1.0):
    return jnp.mean(batch) * jnp.sum(params**2)


def _state(tx, steps=1):
    state, params = tx.init(START), START
    for _ in range(steps):
        updates, state = tx.update(
            jnp.zeros(2), state, params, value_fn=_loss, batch=jnp.ones(8)
        )
        params = optax.apply_updates(params, updates)
    return state


@pytest.mark.parametrize("name", MEASURE)
def test_the_loss_of_every_link(name, standard_promotion):
    state = optimizer(name).init(START)
    assert flatopt.loss(state) == jnp.inf
    # 25, but for the noise of some
    np.testing.assert_allclose(flatopt.loss(_state(optimizer(name))), 25, rtol=0.5)


WRAPPERS = {
    "chain": lambda link: optax.chain(optax.clip(1.0), link, optax.sgd(0.1)),
    "named chain": lambda link: optax.named_chain(("a", link), ("b", optax.sgd(0.1))),
    "masked": lambda link: optax.masked(link, True),
    "partition": lambda link: optax.partition({"a": link}, "a"),
    "skip_nonfinite": lambda link: flatopt.skip_nonfinite(optax.chain(link)),
    "apply_if_finite": lambda link: optax.apply_if_finite(link, 5),
    "accumulate": lambda link: flatopt.accumulate(link, optax.sgd(0.1), 2),
    "conditionally_transform": lambda link: optax.conditionally_transform(
        link, lambda step: step >= 0
    ),
    "schedule_free": lambda link: optax.contrib.schedule_free(link, 0.1),
    "watched": lambda link: optax.chain(flatopt.track_stability(0.1, 8), link),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_loss_through_wrappers(wrapper, standard_promotion):
    state = _state(WRAPPERS[wrapper](flatopt.sam_gradients(0.1)))
    np.testing.assert_allclose(flatopt.loss(state), 25)
    inside = types.SimpleNamespace(opt_state=state)  # as in a train state
    np.testing.assert_allclose(flatopt.loss(inside), 25)


@pytest.mark.heart
def test_the_loss_of_an_nnx_optimizer():
    model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, flatopt.sam_sgd(0.1), wrt=nnx.Param)
    expected = jnp.sum(model.kernel[...] ** 2)
    flatopt.flax.update(optimizer, model, lambda m: jnp.sum(m.kernel[...] ** 2))
    whole = nnx.state(optimizer)
    plain = nnx.to_pure_dict(whole)
    for state in (optimizer, optimizer.opt_state, whole, whole["opt_state"], plain):
        np.testing.assert_allclose(flatopt.loss(state), expected, rtol=1e-6)
        assert list(flatopt.metrics(state)) == ["loss", "rho"]


@pytest.mark.parametrize("name", MEASURE)
def test_a_state_as_a_dict_says_the_same(name, standard_promotion):
    tx = optax.chain(flatopt.track_stability(0.1, 8), optax.chain(optimizer(name)))
    model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    found = nnx.Optimizer(model, tx, wrt=nnx.Param)
    expected = flatopt.metrics(found)
    assert {"loss", "trace"} <= {*expected}
    for state in (nnx.state(found), flax.serialization.to_state_dict(tx.init(START))):
        assert flatopt.metrics(state).keys() == expected.keys()
        assert flatopt.loss(state) == jnp.inf


def test_the_loss_under_jit_and_under_loss_scaling():
    tx = flatopt.nso_sgd(0.1, sigma=0.0)
    scaled = lambda p: 1024 * _loss(p)  # noqa: E731
    read = jax.jit(
        lambda p: flatopt.loss(tx.update(None, tx.init(p), p, value_fn=scaled)[1])
    )
    np.testing.assert_allclose(read(START), 1024 * 25)


def test_no_loss_and_two():
    for tx in (optax.adam(0.1), flatopt.track_stability(0.1, 8), optax.identity()):
        with pytest.raises(ValueError, match="must hold a link that makes a gradient"):
            flatopt.loss(tx.init(START))
    link = flatopt.sam_gradients(0.1)
    with pytest.raises(ValueError, match="must hold one loss, got 2; give the part"):
        flatopt.loss(optax.chain(link, link).init(START))


@pytest.mark.heart
def test_metrics_are_what_each_link_measured():
    tx = optax.chain(
        flatopt.track_stability(0.1, 4, every=1),
        flatopt.skip_nonfinite(
            optax.inject_hyperparams(flatopt.sam_sgd)(0.1, rho=0.25)
        ),
    )
    assert {name: float(x) for name, x in flatopt.metrics(_state(tx)).items()} == {
        "loss": 25,
        "max_eigenvalue": 2,
        "trace": 4,
        "frobenius_norm": pytest.approx(8**0.5),
        "eigenvalue_margin": 10,
        "frobenius_margin": pytest.approx(20 / 8**0.5),
        "num_skipped": 0,
        "rho": 0.25,
    }
    assert flatopt.metrics(optax.adam(0.1).init(START)) == {}


def _halving(count):
    return 0.25 / 2**count


# Where a schedule is, after two steps: made with it, or told it by optax.
SCHEDULED = {
    "scale": lambda s: flatopt.smooth_gradients(s),
    "scale, two draws": lambda s: flatopt.lpf_gradients(s, 2),
    "scale, of values": lambda s: flatopt.smooth_gradients_zeroth_order(s),
    "rho": lambda s: optax.masked(flatopt.gsam_gradients(s, 0.1), True),
    "rho, with memory": lambda s: flatopt.look_sam_gradients(s),
    "gamma": lambda s: flatopt.entropy_sgd_gradients(s, num_steps=2),
    "scale, accumulated": lambda s: flatopt.accumulate(
        flatopt.nso_gradients(s), optax.sgd(0.1), 2
    ),
    "scale, injected": lambda s: optax.inject_hyperparams(flatopt.nso_sgd)(
        0.1, sigma=s
    ),
    "rho, injected": lambda s: optax.inject_hyperparams(flatopt.sam_sgd)(0.1, rho=s),
    "scale, injected in anti_pgd": lambda s: optax.inject_hyperparams(flatopt.anti_pgd)(
        scale=s
    ),
}


@pytest.mark.parametrize("where", SCHEDULED)
def test_the_scale_of_the_last_step_is_read_off_a_schedule(where, standard_promotion):
    name, tx = where.split(",")[0], SCHEDULED[where](_halving)
    read = jax.jit(lambda state: flatopt.metrics(state)[name])
    if "injected" not in where:  # there it stands from the start
        assert read(_state(tx, 0)) == 0
    assert read(_state(tx, 2)) == 0.125
    state = nnx.state(
        nnx.Optimizer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    )
    assert name in flatopt.metrics(state)


@pytest.mark.parametrize("make", [flatopt.nso_gradients, flatopt.sam_gradients])
def test_the_scale_is_zero_before_the_start(make):
    tx = make(0.5, start_step=1)
    one, two = (flatopt.metrics(_state(tx, steps)) for steps in (1, 2))
    name = "rho" if make is flatopt.sam_gradients else "scale"
    assert (one[name], two[name]) == (0, 0.5)


def test_a_scale_given_as_an_array_survives_donation():
    scale = jnp.float32(0.5)
    tx = flatopt.nso_gradients(scale)
    step = jax.jit(
        lambda p, s: tx.update(None, s, p, value_fn=_loss)[1], donate_argnums=1
    )
    state = step(START, _state(tx))
    assert flatopt.metrics(step(START, state))["scale"] == scale == 0.5


def test_links_that_measure_the_same_are_told_apart():
    watch, link = flatopt.track_stability(0.1, 8, every=1), flatopt.sam_gradients(0.1)
    names = lambda tx: {*flatopt.metrics(tx.init(START))}  # noqa: E731
    curvature = {*watch.init(START).metrics()}
    assert names(optax.chain(watch, link)) == curvature | {"loss", "rho"}
    both = names(optax.chain(watch, watch, link))
    assert both == {f"{i}/{n}" for i in (0, 1) for n in curvature} | {"loss", "rho"}
    named = optax.named_chain(("one", watch), ("two", optax.chain(watch, link)))
    assert {"one/trace", "two/trace", "loss"} <= names(named)
    nested = optax.chain(optax.chain(watch, watch), optax.masked(watch, True))
    assert {"0/0/trace", "0/1/trace", "1/inner_state/trace"} <= names(nested)
    assert {"0/loss", "1/loss", "0/scale", "1/scale"} == names(
        optax.chain(flatopt.nso_gradients(0.1), flatopt.nso_gradients(0.2))
    )
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    twice = nnx.Optimizer(model, optax.chain(watch, watch), wrt=nnx.Param)
    assert flatopt.metrics(nnx.state(twice)).keys() == flatopt.metrics(twice).keys()


def test_each_value_stands_under_its_own_label():
    loss_fn = lambda p: jnp.sum(p["a"] ** 2) + 3 * jnp.sum(p["b"] ** 2)  # noqa: E731
    tx = optax.named_chain(
        *[
            (name, flatopt.track_stability(0.1, 8, every=1, mask=mask))
            for name, mask in (
                ("a", {"a": True, "b": False}),
                ("b", {"a": False, "b": True}),
            )
        ]
    )
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    _, state = tx.update(params, tx.init(params), params, value_fn=loss_fn)
    found = flatopt.metrics(state)
    np.testing.assert_allclose((found["a/trace"], found["b/trace"]), (2, 6), rtol=1e-6)


# Chains in order

GRADIENTS = [n for n in MEASURE if not TRANSFORMATIONS[n].is_optimizer]


@pytest.mark.parametrize("name", [*GRADIENTS])
def test_a_link_after_anything_else_is_refused(name):
    link = transformation(name)
    for before in (optax.sgd(0.1), optax.clip(1.0), link, flatopt.skip_nonfinite(link)):
        with pytest.raises(
            ValueError,
            match=f"^{name} must come first in a chain, got 1 transformation",
        ):
            flatopt.chain(before, link)
    with pytest.raises(
        ValueError, match=f"{name} must .* got 2 transformations before"
    ):
        flatopt.chain(optax.clip(1.0), optax.sgd(0.1), flatopt.chain(link))


AROUND = {
    "inject_hyperparams": lambda: optax.inject_hyperparams(flatopt.sam_gradients)(0.1),
    "masked": lambda: optax.masked(flatopt.sam_gradients(0.1), True),
    "apply_if_finite": lambda: optax.apply_if_finite(flatopt.nso_gradients(0.1), 5),
    "optax.chain": lambda: optax.chain(flatopt.entropy_sgd_gradients(), optax.clip(1)),
    "inside": lambda: flatopt.chain(
        optax.inject_hyperparams(flatopt.lpf_gradients)(0.1), optax.sgd(0.1)
    ),
}


@pytest.mark.parametrize("wrapper", AROUND)
def test_a_wrapped_link_after_anything_else_is_refused(wrapper, standard_promotion):
    watch = flatopt.track_stability(0.1, 8)
    flatopt.chain(watch, AROUND[wrapper](), optax.sgd(0.1)).init(START)
    tx = flatopt.chain(watch, optax.sgd(0.1), AROUND[wrapper]())
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(ValueError, match="must come first in a chain, got 1 trans"):
            init(START)


RECIPES = [n for n in MEASURE if n.endswith(("_sgd", "_adamw"))]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_after_anything_else_is_refused(name):
    with pytest.raises(ValueError, match="must come first in a chain, got 1"):
        flatopt.chain(optax.clip(1.0), transformation(name))


def test_a_chain_in_order_is_that_of_optax():
    links = (flatopt.track_stability(0.1, 8), flatopt.sam_gradients(0.1))
    tx = flatopt.chain(*links, optax.sgd(0.1), flatopt.anti_pgd(0.1))
    other = optax.chain(*links, optax.sgd(0.1), flatopt.anti_pgd(0.1))
    for one, two in zip(
        *map(jax.tree.leaves, (_state(tx), _state(other))), strict=True
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (optax.MultiSteps(optax.sgd(0.1), 2), "MultiSteps"),
        (optax.sgd, "sgd"),
        (0.1, "float"),
    ],
)
def test_a_chain_of_something_else_is_refused(wrong, name):
    with pytest.raises(TypeError, match=f"chain takes gradient .* got {name}; call"):
        flatopt.chain(flatopt.sam_gradients(0.1), wrong)
