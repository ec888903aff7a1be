"""Small problems with known answers, shared by the tests."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

STRATEGIES = ["vmap", "scan", "unroll", 3, "auto"]


def regression(num_examples=64, dtype=jnp.float32):
    """A two-layer regression: params, batch and loss_fn(params, batch)."""
    keys = jax.random.split(jax.random.key(7), 4)
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (5, 4), dtype) / 2},
        "second": {
            "kernel": jax.random.normal(keys[1], (4, 2), dtype) / 2,
            "bias": jnp.zeros(2, dtype),
        },
    }
    batch = {
        "inputs": jax.random.normal(keys[2], (num_examples, 5), dtype),
        "targets": jax.random.normal(keys[3], (num_examples, 2), dtype),
    }
    return params, batch


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["first"]["kernel"])
    bias = params["second"]["bias"]
    outputs = hidden @ params["second"]["kernel"] + bias[None]
    return jnp.mean((outputs - batch["targets"]) ** 2)


def leaves_array(tree):
    return np.concatenate(
        [np.ravel(np.asarray(x, "f8")) for x in jax.tree.leaves(tree)]
    )


def assert_close(tree, other, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, "f8"), np.asarray(y, "f8"), rtol=rtol, atol=atol
        )


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@contextlib.contextmanager
def count_compilations():
    """Collect one entry for each XLA compilation inside the block."""
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def softmax_regression():
    """Parameters, inputs, labels and a loss whose gradient NumPy can write out."""
    keys = jax.random.split(jax.random.key(11), 4)
    params = {
        "bias": jax.random.normal(keys[1], (3,)),
        "kernel": jax.random.normal(keys[0], (6, 3)),
    }
    inputs = jax.random.normal(keys[2], (32, 6))
    labels = jax.random.randint(keys[3], (32,), 0, 3)
    return params, inputs, labels


def softmax_loss(params, inputs, labels):
    logits = inputs @ params["kernel"] + params["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def softmax_gradient(params, inputs, labels):
    """The gradient of ``softmax_loss`` in NumPy."""
    logits = inputs @ params["kernel"] + params["bias"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    error = (p - np.eye(3)[labels]) / len(labels)
    return {"bias": error.sum(axis=0), "kernel": inputs.T @ error}
