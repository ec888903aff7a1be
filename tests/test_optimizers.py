"""The recipes against straightforward loops in NumPy with the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import softmax_gradient, softmax_loss, softmax_regression

import flatopt
from flatopt import kernels

STEPS = 20


def _run(tx, steps=STEPS):
    params, inputs, labels = softmax_regression()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            optax.tree.zeros_like(params),
            state,
            params,
            value_fn=softmax_loss,
            inputs=inputs,
            labels=labels,
        )
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def _reference(gradient, learning_rate, momentum, nesterov, weight_decay):
    """SGD as in PyTorch: decay added to the gradient, then the momentum buffer."""
    params, _, _ = softmax_regression()
    params = {name: np.asarray(leaf, "f8") for name, leaf in params.items()}
    buffer = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    for step in range(STEPS):
        grads = gradient(params, step)
        for name in params:
            grad = grads[name] + weight_decay * params[name]
            buffer[name] = momentum * buffer[name] + grad
            move = grad + momentum * buffer[name] if nesterov else buffer[name]
            params[name] = params[name] - learning_rate * move
    return params


@jax.jit
def _draw(step, sample, params):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(9), step), sample)
    return kernels.isotropic()(key, params)


def _noise(step, sample, params):
    params = {name: np.float32(leaf) for name, leaf in params.items()}
    return {n: np.asarray(u, "f8") for n, u in _draw(step, sample, params).items()}


def _check(params, expected):
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=2e-5, atol=2e-5)


# Both recipes end in the same SGD: its four settings are tried over the two of them.
@pytest.mark.heart
@pytest.mark.parametrize(("nesterov", "weight_decay"), [(False, 0.0), (True, 0.1)])
def test_lpf_sgd_against_numpy(nesterov, weight_decay):
    gamma, chunks = 0.2, 4
    _, inputs, labels = (np.asarray(x) for x in (0, *softmax_regression()[1:]))

    def gradient(params, step):
        total = {name: 0.0 for name in params}
        for j in range(chunks):
            unit = _noise(step, j, params)
            norms = {
                "kernel": np.sqrt((params["kernel"] ** 2).sum(axis=0)),
                "bias": np.sqrt((params["bias"] ** 2).sum()),
            }
            perturbed = {n: params[n] + gamma * norms[n] * unit[n] for n in params}
            grads = softmax_gradient(perturbed, inputs[j::chunks], labels[j::chunks])
            total = {n: total[n] + grads[n] / chunks for n in params}
        return total

    tx = flatopt.lpf_sgd(
        0.3,
        gamma,
        chunks,
        nesterov=nesterov,
        weight_decay=weight_decay,
        batch_argnames=("inputs", "labels"),
        key=9,
    )
    _check(_run(tx), _reference(gradient, 0.3, 0.9, nesterov, weight_decay))


@pytest.mark.parametrize(("nesterov", "weight_decay"), [(True, 0.0), (False, 0.1)])
def test_nso_sgd_against_numpy(nesterov, weight_decay):
    sigma, pairs = 0.3, 2
    _, inputs, labels = (np.asarray(x) for x in (0, *softmax_regression()[1:]))

    def gradient(params, step):
        total = {name: 0.0 for name in params}
        for j in range(pairs):
            unit = _noise(step, j, params)
            for sign in (1, -1):
                perturbed = {n: params[n] + sign * sigma * unit[n] for n in params}
                grads = softmax_gradient(perturbed, inputs, labels)
                total = {n: total[n] + grads[n] / (2 * pairs) for n in params}
        return total

    tx = flatopt.nso_sgd(
        0.3, sigma, pairs, nesterov=nesterov, weight_decay=weight_decay, key=9
    )
    _check(_run(tx), _reference(gradient, 0.3, 0.9, nesterov, weight_decay))


@pytest.mark.heart
def test_defaults_are_the_papers():
    import inspect

    lpf = inspect.signature(flatopt.lpf_sgd).parameters
    nso = inspect.signature(flatopt.nso_sgd).parameters
    assert (lpf["gamma"].default, lpf["momentum"].default) == (5e-4, 0.9)
    assert (nso["sigma"].default, nso["momentum"].default) == (0.01, 0.9)
    tx = flatopt.lpf_sgd(0.1)
    with pytest.raises(ValueError, match="num_samples=8"):
        tx.update(
            None,
            tx.init(jnp.ones(2)),
            jnp.ones(2),
            value_fn=lambda p, batch: (p * batch).sum(),
            batch=jnp.ones((12, 2)),
        )


def test_masked_leaves_do_not_move_under_weight_decay():
    mask = {"kernel": True, "bias": False}
    before, _, _ = softmax_regression()
    for tx in (
        flatopt.lpf_sgd(
            0.1, weight_decay=0.5, mask=mask, batch_argnames=("inputs", "labels")
        ),
        flatopt.nso_sgd(0.1, weight_decay=0.5, mask=mask),
    ):
        after = _run(tx, 3)
        np.testing.assert_array_equal(after["bias"], before["bias"])
        assert jnp.all(after["kernel"] != before["kernel"])


def test_nso_descends_the_trace_penalty_of_a_valley():
    # f = (x y - 1)^2 / 2: all minima have x y = 1, the flattest is x = y = 1.
    def value_fn(params):
        return (params[0] * params[1] - 1) ** 2 / 2

    def train(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jnp.zeros(2), state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.array([4.0, 0.25])
        (params, _), _ = jax.jit(
            lambda: jax.lax.scan(step, (start, tx.init(start)), length=4000)
        )()
        return params

    flat = train(flatopt.nso_sgd(0.02, 0.2, momentum=0.0))
    sharp = train(optax.with_extra_args_support(optax.sgd(0.02)))
    assert jnp.sum(flat**2) < 2.6  # the trace of the Hessian at a minimum
    assert jnp.sum(sharp**2) > 15


def test_other_recipes_are_their_chains(standard_promotion):
    def sgd(weight_decay):
        return optax.chain(
            optax.add_decayed_weights(weight_decay), optax.sgd(0.1, momentum=0.9)
        )

    smooth = flatopt.smooth_gradients
    names = ("inputs", "labels")
    lpf = smooth(5e-4, kernels.filterwise(), num_samples=8, batch_argnames=names, key=2)
    pairs = [
        (
            flatopt.sam_sgd(0.1, 0.3, weight_decay=0.01),
            optax.chain(flatopt.sam_gradients(0.3), sgd(0.01)),
        ),
        (
            flatopt.asam_sgd(0.1, 0.3, 0.05, weight_decay=0.01),
            optax.chain(flatopt.asam_gradients(0.3, 0.05), sgd(0.01)),
        ),
        (
            flatopt.lpf_adamw(0.1, weight_decay=0.01, batch_argnames=names, key=2),
            optax.chain(lpf, optax.adamw(0.1, weight_decay=0.01)),
        ),
        (
            flatopt.nso_adamw(0.1, 0.3, weight_decay=0.01, key=2),
            optax.chain(
                smooth(0.3, antithetic=True, key=2), optax.adamw(0.1, weight_decay=0.01)
            ),
        ),
    ]
    before, _, _ = softmax_regression()
    for recipe, chain in pairs:
        result, expected = _run(recipe, 3), _run(chain, 3)
        for name in result:
            np.testing.assert_array_equal(result[name], expected[name])
            assert jnp.all(result[name] != before[name])
