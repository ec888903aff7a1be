"""Cases that a second reading found: arrays as settings, hidden weights, tiny rises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TRANSFORMATIONS, arguments_of, transformation

import flatopt
from flatopt import curvature, sharpness, stability

KEY = jax.random.key(0)
SCALES = {  # of links: whole optimizers hand theirs on
    name: next(n for n in ("scale", "rho", "gamma", "sigma") if n in row.arguments)
    for name, row in TRANSFORMATIONS.items()
    if {"scale", "rho", "gamma", "sigma"} & set(row.arguments) and not row.is_optimizer
}


@pytest.mark.heart
@pytest.mark.parametrize("name", SCALES)
def test_a_scalar_array_is_a_number_under_jit(name):
    setting = SCALES[name]
    number = arguments_of(name)[setting]
    if callable(number):
        number = 0.1
    batch = np.ones((8, 2), "f4")

    @jax.jit
    def steps(params):
        return [
            tx.update(params, tx.init(params), params, value_fn=_errors, batch=batch)[0]
            for tx in (
                transformation(name, **{setting: value})
                for value in (number, jnp.array(number))
            )
        ]

    one, other = steps(np.ones(2, "f4"))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def _errors(params, batch):
    return jnp.mean((batch @ params - 1) ** 2)


def test_weights_of_outputs_are_no_plain_squared_error_at_zero_loss():
    weights = jnp.array([0.5, 1.0, 1.5])
    inputs = jax.random.normal(KEY, (8, 4))
    params = jax.random.normal(jax.random.key(1), (4, 3))

    def loss_fn(outputs, targets):
        errors = (outputs - targets) ** 2
        return jnp.mean(jnp.sum(weights[None] * errors, axis=1)) / 2

    found = stability.report(
        lambda p, x: x @ p, params, inputs, inputs @ params, 0.1, 4, loss_fn=loss_fn
    )
    top = 1.5 * np.linalg.eigvalsh(np.asarray(inputs.T @ inputs, "f8") / 8)[-1]
    np.testing.assert_allclose(found.max_eigenvalue, top, rtol=1e-4)


def test_a_report_does_not_broadcast_targets():
    inputs, params = jnp.eye(4), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4, 3\)|\(4, 3\).*\(4, 1\)"):
        stability.report(
            lambda p, x: x @ p,
            params,
            inputs,
            jnp.arange(4.0)[:, None],
            0.1,
            2,
            loss_fn=lambda o, t: jnp.mean((o - t) ** 2),
        )


@pytest.mark.parametrize("last", [0.01, 0.0])
def test_batch_statistics_are_seen_behind_a_small_last_layer(last):
    inputs = jax.random.normal(KEY, (16, 3))
    labels = jnp.arange(16) % 2
    params = {"w": jnp.ones((3, 4)), "out": last * jnp.ones((4, 2))}

    def loss_fn(params, batch):
        hidden = batch[0] @ params["w"]
        hidden = (hidden - hidden.mean(0)[None]) / (hidden.std(0)[None] + 1e-3)
        return optax.softmax_cross_entropy_with_integer_labels(
            hidden @ params["out"], batch[1]
        ).mean()

    operator = curvature.gradient_covariance(loss_fn, params, (inputs, labels))
    with pytest.raises(ValueError, match="BatchNorm"):
        operator.matvec(params)


@pytest.mark.parametrize("size", [1e-8, 1e-20, 1.0])
def test_local_entropy_of_small_rises_is_their_mean(size):
    found = sharpness.local_entropy(
        lambda p: size * jnp.sum(p**2), jnp.zeros(4), KEY, gamma=1e4, num_samples=400
    )
    # E of size |u|^2 / gamma, to first order
    expected = size * 4 / 1e4
    assert abs(float(found.value) - expected) < 5 * float(found.standard_error)
    assert 0 < float(found.standard_error) < 0.1 * expected


def test_entropy_needs_two_classes():
    with pytest.raises(ValueError, match=r"logits of shape \(n, classes\), got \(5,\)"):
        sharpness.shannon_entropy(lambda p, x: x, None, jnp.zeros(5))


def test_xtrace_goes_through_jit():
    pytest.importorskip("matfree")

    def trace(params):
        operator = curvature.hessian(lambda p: jnp.sum(p**4), params)
        return curvature.xtrace(operator, KEY, 8).value

    np.testing.assert_allclose(jax.jit(trace)(jnp.ones(4)), 48.0, rtol=1e-4)


def test_accumulate_refuses_what_is_no_link():
    with pytest.raises(TypeError, match="accumulate takes gradient transformations"):
        flatopt.accumulate(flatopt.nso_gradients, optax.sgd(0.1), 2)
    late = flatopt.accumulate(flatopt.sam_gradients(0.1), optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match="sam_gradients must come first"):
        flatopt.chain(optax.sgd(0.1), late)
    for recipe in (flatopt.lpf_sgd(0.1), flatopt.nso_adamw(0.1), flatopt.sam_sgd(0.1)):
        with pytest.raises(ValueError, match="link must be a link, got a whole opti"):
            flatopt.accumulate(recipe, optax.sgd(0.1), 2)
