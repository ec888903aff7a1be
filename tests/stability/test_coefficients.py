"""Coefficients read off optax chains: what they are, and what is refused by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import linear_outputs

import flatopt
from flatopt import stability

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}


def _model(params, inputs):
    return inputs @ params["w"] + params["b"][None]


def _linear(preconditioner=None):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    targets = _model(PARAMS, inputs)
    return stability.linearize(
        _model, PARAMS, inputs, targets, preconditioner=preconditioner
    )


@functools.cache
def _trained(optimizer, num_steps=30):
    tx = optimizer(0.1)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        grads = {
            name: (1 + leaf.ndim) * rng.normal(size=leaf.shape).astype("f4")
            for name, leaf in PARAMS.items()
        }
        with jax.numpy_dtype_promotion("standard"):  # of optax's own links
            _, state = update(grads, state, PARAMS)
    return state


def _adam_factor(nu, count):
    corrected = nu / (1 - 0.999**count)
    return 1 / ((1 - 0.9**count) * (np.sqrt(corrected) + 1e-8))


@pytest.mark.heart
def test_the_preconditioner_of_adam_is_its_formula_at_the_state():
    state = _trained(optax.adamw)
    found = stability.preconditioner(optax.adamw, state, PARAMS)
    for name, leaf in found.items():
        expected = _adam_factor(np.asarray(state[0].nu[name], "f8"), 30)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5)


def test_rmsprop_and_adagrad_have_theirs():
    rmsprop = lambda rate: optax.rmsprop(rate, momentum=0.9, eps=1e-3)  # noqa: E731
    state = _trained(rmsprop)
    found = stability.preconditioner(rmsprop, state, PARAMS)
    nu = np.asarray(optax.tree.get(state, "nu")["w"], "f8")
    expected = 1 / np.sqrt(nu + 1e-3)  # optax: eps inside of the root
    np.testing.assert_allclose(found["w"], expected, rtol=1e-4)
    state = _trained(optax.adagrad)
    found = stability.preconditioner(optax.adagrad, state, PARAMS)
    total = np.asarray(optax.tree.get(state, "sum_of_squares")["b"], "f8")
    np.testing.assert_allclose(found["b"], 1 / np.sqrt(total + 1e-7), rtol=1e-4)


def test_parts_with_rates_of_their_own_are_a_preconditioner():
    def optimizer(rate):
        parts = {"w": optax.sgd(rate, 0.9), "b": optax.sgd(rate / 4, 0.9)}
        return optax.multi_transform(parts, {"w": "w", "b": "b"})

    found = stability.preconditioner(optimizer, optimizer(0.1).init(PARAMS), PARAMS)
    np.testing.assert_allclose(found["w"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found["b"], 0.25, rtol=1e-6)
    limit = stability.thresholds(_linear(found), 5, optimizer=optimizer).mean_square
    rows = np.concatenate(
        [np.random.default_rng(0).normal(size=(5, 3)), np.full((5, 1), 0.5)], axis=1
    )
    top = np.linalg.eigvalsh(rows.T @ rows / 5)[-1]
    np.testing.assert_allclose(limit, 2 * 1.9 / top, rtol=1e-5)


def test_a_schedule_counts_at_the_step_of_the_state():
    def optimizer(rate):
        return optax.sgd(optax.linear_schedule(rate, 0.0, 100))

    plain = stability.thresholds(_linear(), 2).mean_square
    state = _trained(optimizer, 50)  # half of the rate
    found = stability.thresholds(_linear(), 2, optimizer=optimizer, opt_state=state)
    np.testing.assert_allclose(found.mean_square, 2 * plain, rtol=1e-5)
    constant = lambda rate: optax.sgd(lambda count: rate)  # noqa: E731
    found = stability.thresholds(_linear(), 2, optimizer=constant)
    np.testing.assert_allclose(found.mean_square, plain, rtol=1e-5)


SAME_AS_HEAVY_BALL = {
    "injected": lambda rate: optax.inject_hyperparams(optax.sgd)(rate, momentum=0.9),
    "clipped": lambda rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(rate, 0.9)
    ),
    "lpf": flatopt.lpf_sgd,
    "nso": flatopt.nso_sgd,
    "skip": lambda rate: flatopt.skip_nonfinite(flatopt.lpf_sgd(rate)),
    "finite": lambda rate: optax.apply_if_finite(optax.sgd(rate, 0.9), 3),
    "tracked": lambda rate: flatopt.chain(
        flatopt.track_stability(0.1, 4), optax.sgd(rate, 0.9)
    ),
    "float": lambda rate: optax.sgd(float(rate), 0.9),
    "bfloat16": lambda rate: optax.sgd(rate, 0.9, accumulator_dtype=jnp.bfloat16),
}


@functools.cache
def _heavy_ball():
    return stability.thresholds(
        _linear(), 2, optimizer=lambda rate: optax.sgd(rate, 0.9)
    ).mean_square


@pytest.mark.parametrize("name", SAME_AS_HEAVY_BALL)
def test_what_does_nothing_near_a_minimum_changes_nothing(name):
    found = stability.thresholds(_linear(), 2, optimizer=SAME_AS_HEAVY_BALL[name])
    tolerance = 0.02 if name == "bfloat16" else 1e-5
    np.testing.assert_allclose(found.mean_square, _heavy_ball(), rtol=tolerance)


def _masked_decay(rate):
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    return optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(rate))


REFUSED = {
    "scale_by_lion": optax.lion,
    "scale_by_sign": optax.sign_sgd,
    "scale_by_trust_ratio": optax.lamb,
    "partition": optax.contrib.muon,
    "is not \\(masked\\)": optax.lars,
    "factored": optax.adafactor,
    "mixes": lambda rate: optax.chain(optax.centralize(), optax.sgd(rate)),
    "add_noise": lambda rate: optax.noisy_sgd(rate, key=0),
    "MultiSteps": lambda rate: optax.MultiSteps(
        optax.sgd(rate), 4
    ).gradient_transformation(),
    "schedule": lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, 100, 0.1)),
    "updates of zero": lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, 100)),
    "alike": _masked_decay,
    "sam_gradients": flatopt.sam_sgd,
    "preconditioner=": optax.adam,
    "several": optax.adadelta,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_linear_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        stability.thresholds(_linear(), 2, optimizer=REFUSED[name])


def test_coupled_decay_before_a_preconditioner_is_refused():
    def optimizer(rate):
        return optax.chain(optax.add_decayed_weights(0.1), optax.adam(rate))

    state = _trained(optimizer)
    factors = stability.preconditioner(optimizer, state, PARAMS)
    with pytest.raises(ValueError, match="coupled weight decay"):
        stability.thresholds(_linear(factors), 2, optimizer=optimizer)


def test_what_does_not_belong_together_is_refused():
    factors = stability.preconditioner(optax.adam, _trained(optax.adam), PARAMS)
    with pytest.raises(ValueError, match="needs the optimizer that has it"):
        stability.thresholds(_linear(factors), 2)
    with pytest.raises(ValueError, match="optimizer has no preconditioner"):
        stability.thresholds(_linear(factors), 2, optimizer=optax.sgd)
    with pytest.raises(ValueError, match="opt_state needs the optimizer"):
        stability.thresholds(_linear(), 2, opt_state=optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="opt_state must be the state"):
        stability.thresholds(_linear(), 2, optimizer=optax.sgd, opt_state=(1, 2))
    with pytest.raises(TypeError, match="write lambda rate"):
        stability.thresholds(_linear(), 2, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="opt_state must be .* after training"):
        stability.preconditioner(optax.adam, None, PARAMS)
    with pytest.raises(ValueError, match="shapes of params"):
        _linear({"w": jnp.ones(2), "b": jnp.ones(4)})


def test_unnormalized_sam_is_exact_for_one_example_and_for_all(x64):
    rng = np.random.default_rng(1)
    jacobian = rng.normal(size=(5, 2, 3))
    rho = 0.2

    def optimizer(rate):
        return flatopt.chain(flatopt.usam_gradients(rho), optax.sgd(rate))

    lin = stability.linearize(
        linear_outputs,
        jnp.zeros(3),
        jnp.asarray(jacobian),
        jnp.zeros((5, 2)),
    )
    hessians = np.einsum("ncd,nce->nde", jacobian, jacobian)
    steps = hessians + rho * hessians @ hessians
    for rate in (0.05, 0.2):
        dense = [np.eye(3) - rate * step for step in steps]
        expected = np.linalg.eigvals(np.mean([np.kron(a, a) for a in dense], axis=0))
        found = stability.growth_rate(lin, rate, 1, optimizer=optimizer)
        np.testing.assert_allclose(found, np.abs(expected).max(), rtol=1e-7)
    mean = hessians.mean(axis=0)
    top = np.linalg.eigvalsh(mean + rho * mean @ mean)[-1]
    limit = stability.thresholds(lin, 5, optimizer=optimizer).mean_square
    np.testing.assert_allclose(limit, 2 / top, rtol=1e-7)
    with pytest.raises(ValueError, match="usam_gradients"):
        stability.thresholds(lin, 2, optimizer=optimizer)


def test_the_report_names_the_optimizer_and_shows_its_own_rates():
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    data = _model, PARAMS, inputs, _model(PARAMS, inputs)
    found = stability.report(
        *data, 0.1, 2, loss_scale=1.0, optimizer=lambda rate: optax.sgd(rate, 0.9)
    )
    assert str(found).startswith("SGD with momentum, learning rate 0.1, batch size 2")
    assert "trace_ratio" not in str(found)
    with pytest.raises(ValueError, match="opt_state is needed"):
        stability.report(*data, 0.1, 2, loss_scale=1.0, optimizer=optax.adam)
    state = _trained(optax.adamw)
    found = stability.report(
        *data, 0.1, 5, loss_scale=1.0, optimizer=optax.adamw, opt_state=state
    )
    factors = [_adam_factor(np.asarray(state[0].nu[name]), 30) for name in ("b", "w")]
    rows = np.concatenate([np.ones((5, 1)), np.asarray(inputs)], axis=1)
    tops = [
        np.linalg.eigvalsh(
            (scales[:, None] ** 0.5 * rows.T) @ (scales[:, None] ** 0.5 * rows.T).T / 5
        )[-1]
        for scales in np.concatenate([factors[0][None], factors[1]]).T
    ]
    np.testing.assert_allclose(found.max_eigenvalue, max(tops), rtol=1e-4)
    np.testing.assert_allclose(found.hessian_eigenvalue, max(tops), rtol=1e-4)
    assert "preconditioner is held" in found.caveat
