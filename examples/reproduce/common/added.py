"""Networks of another kind, for `radii`: a residual one on photographs, a Transformer."""

import dataclasses
import functools
import hashlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flatopt
import flatopt.flax
from flatopt import kernels

from . import after, links, networks, photographs, radii, text
from .data import drawn
from .language import LIBRARY
from .residual import normalize
from .side_by_side import noise_key

__all__ = ["LIBRARY", "Digits", "Photographs", "Text", "of_added"]

POOL, VALIDATION, TEST = 2000, 800, 1000  # photographs; a seed draws from the pool
WINDOWS = 256  # pieces of text to validate and to test on

# A stem and two blocks of half the size each: two convolutions beside one of 1 by 1.
RESIDUAL = {
    "stem": (3, 3, 3, 8),
    "first 1": (3, 3, 8, 12),
    "first 2": (3, 3, 12, 12),
    "first shortcut": (1, 1, 8, 12),
    "second 1": (3, 3, 12, 16),
    "second 2": (3, 3, 16, 16),
    "second shortcut": (1, 1, 12, 16),
    "head": (16, 10),
}


def normed(layer, images, stride=1):
    """A convolution as a product of matrices, a norm over each image, a bias."""
    size, _, inputs, outputs = layer["kernel"].shape
    height, width = images.shape[1:3]
    pad = size // 2
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shifted = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(size)
        for j in range(size)
    ]
    kernel = layer["kernel"].reshape(size * size * inputs, outputs)
    found = jnp.concatenate(shifted, axis=-1) @ kernel
    axes = (1, 2, 3)
    found = found - found.mean(axes, keepdims=True)
    scale = jax.lax.rsqrt((found**2).mean(axes, keepdims=True) + 1e-5)
    return found * scale + layer["bias"]


def residual(params, images):
    """Logits of images of 16 by 16."""
    hidden = jax.nn.relu(normed(params["stem"], images, 2))
    for name in ("first", "second"):
        inner = jax.nn.relu(normed(params[f"{name} 1"], hidden, 2))
        shortcut = normed(params[f"{name} shortcut"], hidden, 2)
        hidden = jax.nn.relu(normed(params[f"{name} 2"], inner) + shortcut)
    return networks.dense(params["head"], hidden.mean(axis=(1, 2)))


class Digits(radii.Training):
    """A CNN on digits."""

    together = True


class Photographs(radii.Training):
    """The residual network on a few photographs of CIFAR-10."""

    together = True

    def __init__(self, config, read):
        wanted = types.SimpleNamespace(
            smoke=config.smoke,
            data_dir=config.data_dir,
            train_images=POOL if not config.smoke else 4 * config.photographs,
            validation_images=VALIDATION,
            test_images=TEST,
        )
        parts = photographs.load(wanted, read)
        self.sha256 = digest(images for images, _ in parts.values())
        parts = {
            name: (np.asarray(normalize(images)), np.asarray(labels, np.int32))
            for name, (images, labels) in parts.items()
        }
        own = functools.partial(networks.initialize, RESIDUAL)
        self.initialize = jax.jit(own)
        split = functools.partial(split_photographs, parts)
        self.prepare(of_added(config), residual, 10, split, config.photographs)


def split_photographs(parts, seed, num_train, label_noise):
    images, labels = parts["train"]
    places = np.arange(len(labels))
    train, train_labels = drawn(labels, places, seed, num_train, label_noise, 10)
    return parts | {"train": (images[train], train_labels)}


def of_added(config, **changes):
    """The settings of networks of another kind."""
    changes = {"seeds": config.added_seeds, "steps": config.added_steps} | changes
    return dataclasses.replace(config, **changes)


def digest(arrays):
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()


# A Transformer


class Text(radii.Training):
    """The Transformer of the studies of text, on characters, by AdamW."""

    together = True

    def __init__(self, config, path):
        model = text.Transformer(config.width, 2, config.length, nnx.Rngs(0))
        graphdef, _, lora = nnx.split(model, nnx.Param, ...)  # LoRA matrices stay 0
        self.filter_axes = flatopt.flax.filter_axes(model)
        filterwise = kernels.filterwise(filter_axes=self.filter_axes)
        self.kernels = self.kernels | {"LPF-SGD": filterwise}
        lpf = after.Method(links.lpf(filterwise), self.links["LPF-SGD"].settings)
        self.links = self.links | {"LPF-SGD": lpf}
        parts = text.split(text.read(path), 200_000)
        self.sha256 = digest(parts.values())

        def model_fn(params, tokens):
            return nnx.merge(graphdef, params, lora)(tokens)

        def initialize(key):
            model = text.Transformer(config.width, 2, config.length, nnx.Rngs(key))
            return nnx.split(model, nnx.Param, ...)[1]

        self.initialize = initialize
        split = functools.partial(split_text, parts, config.length)
        own = of_added(config, shares=(0.0,), learning_rate=config.text_rate)
        self.prepare(own, model_fn, 128, split, config.pieces)

    def optimizer(self, method, run, num_steps):
        setting = run["setting"]

        def learning_rate(count):
            shape = (1 + jnp.cos(jnp.pi * count / num_steps)) / 2
            return setting["learning_rate"] * shape

        chain = [optax.adamw(learning_rate, weight_decay=setting["weight_decay"])]
        if method.make is not None:
            key = noise_key(run)
            chain.insert(0, method.make(setting["radius"], key, num_steps))
        return optax.chain(*chain)


def split_text(parts, length, seed, num_train, label_noise):
    del label_noise  # no character is replaced
    counts = {"train": num_train, "validation": WINDOWS, "test": WINDOWS}
    found = {}
    for name, count in counts.items():
        own = seed if name == "train" else 1
        windows = np.asarray(text.windows(parts[name], length, count, own))
        found[name] = windows[:, :-1], windows[:, 1:]
    return found
