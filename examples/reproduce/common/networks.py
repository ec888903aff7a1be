"""Small networks for digits, as functions of plain parameter trees."""

import jax
import jax.numpy as jnp


def dense(layer, inputs):
    return inputs @ layer["kernel"] + layer["bias"]


def convolve(layer, images):
    """A 3x3 convolution of stride 2: shifted slices and one matrix product.

    XLA's own convolutions are slow inside loops on CPU, and for weights under vmap.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, i : i + height : 2, j : j + width : 2]
        for i in range(3)
        for j in range(3)
    ]
    kernel = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
    return jnp.concatenate(shifted, axis=-1) @ kernel + layer["bias"]


def mlp(params, images):
    return dense(params["output"], jax.nn.relu(dense(params["hidden"], images)))


def deep_mlp(params, images):
    hidden = jax.nn.relu(dense(params["first"], images))
    return dense(params["output"], jax.nn.relu(dense(params["second"], hidden)))


def cnn(params, images):
    hidden = images.reshape(-1, 8, 8, 1)
    for name in ("first", "second"):
        hidden = jax.nn.relu(convolve(params[name], hidden))
    return dense(params["output"], hidden.reshape(len(images), -1))


NETWORKS = {
    "MLP": (mlp, {"hidden": (64, 64), "output": (64, 10)}),
    "deep MLP": (
        deep_mlp,
        {"first": (64, 64), "second": (64, 32), "output": (32, 10)},
    ),
    "CNN": (
        cnn,
        {"first": (3, 3, 1, 8), "second": (3, 3, 8, 16), "output": (64, 10)},
    ),
}


def initialize(shapes, key):
    """He's initial weights, zero biases."""
    keys = jax.random.split(key, len(shapes))
    return {
        name: {
            "kernel": jax.nn.initializers.he_normal()(key, shape),
            "bias": jnp.zeros(shape[-1]),
        }
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
