"""The networks and batches of the benchmarks, in Flax NNX."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Problem(NamedTuple):
    """A loss ``value_fn(params, inputs, labels)`` with parameters and a batch."""

    name: str
    value_fn: Any
    params: Any
    batch: dict[str, jax.Array]

    @property
    def num_parameters(self):
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


class MLP(nnx.Module):
    """Four dense layers of 1,024 units: 3.9 million parameters."""

    def __init__(self, rngs, width=1024):
        widths = (24 * 24 * 3, width, width, width)
        self.layers = nnx.List(
            [
                nnx.Linear(a, b, rngs=rngs)
                for a, b in zip(widths, widths[1:], strict=False)
            ]
        )
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


class CNN(nnx.Module):
    """Four convolutions with GroupNorm: 0.29 million parameters."""

    def __init__(self, rngs):
        channels = (3, 32, 64, 128, 144)
        pairs = list(zip(channels, channels[1:], strict=False))
        self.convolutions = nnx.List(
            [
                nnx.Conv(a, b, (3, 3), strides=1 + (i in (1, 2)), rngs=rngs)
                for i, (a, b) in enumerate(pairs)
            ]
        )
        self.norms = nnx.List(
            [nnx.GroupNorm(b, num_groups=8, rngs=rngs) for _, b in pairs]
        )
        self.head = nnx.Linear(channels[-1], 10, rngs=rngs)

    def __call__(self, images):
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return self.head(x.mean(axis=(1, 2)))


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions with GroupNorm and a shortcut."""

    def __init__(self, inner, outer, strides, rngs):
        self.first = nnx.Conv(
            inner, outer, (3, 3), strides=strides, use_bias=False, rngs=rngs
        )
        self.second = nnx.Conv(outer, outer, (3, 3), use_bias=False, rngs=rngs)
        self.norms = nnx.List(
            [nnx.GroupNorm(outer, num_groups=8, rngs=rngs) for _ in range(2)]
        )
        same = inner == outer and strides == 1
        self.shortcut = nnx.data(
            None
            if same
            else nnx.Conv(
                inner, outer, (1, 1), strides=strides, use_bias=False, rngs=rngs
            )
        )

    def __call__(self, x):
        y = nnx.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nnx.Module):
    """ResNet-18 for CIFAR shapes: 11 million parameters."""

    WIDTHS = (64, 64, 64, 128, 128, 256, 256, 512, 512)

    def __init__(self, rngs, widths=WIDTHS):
        self.stem = nnx.Conv(3, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.GroupNorm(widths[0], num_groups=8, rngs=rngs)
        self.blocks = nnx.List(
            [
                ResidualBlock(a, b, 1 + (a != b), rngs)
                for a, b in zip(widths, widths[1:], strict=False)
            ]
        )
        self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class Transformer(nnx.Module):
    """A causal language model of four blocks, 0.9 million parameters."""

    def __init__(self, rngs, width=128, depth=4, vocabulary=256, length=64):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (length, width))
        )
        self.blocks = nnx.List([TransformerBlock(width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position[...][None, : tokens.shape[1]]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class TransformerBlock(nnx.Module):
    """Attention and a two-layer network, each after normalization."""

    def __init__(self, width, rngs):
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Words(nnx.Module):
    """Two dense layers between an embedding and a head of 50,000 words, token by token."""

    def __init__(self, rngs, width=32, vocabulary=50_000):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


NETWORKS = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet18": ResNet18,
    "transformer": Transformer,
    "words": Words,
}


def make_problem(name, batch_size=64, dtype=jnp.float32, **options):
    """One of :data:`NETWORKS` with a random batch."""
    model = NETWORKS[name](nnx.Rngs(0), **options)
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.to_pure_dict(params))
    keys = jax.random.split(jax.random.key(0), 2)
    if name == "transformer":
        length = options.get("length", 64)
        inputs = jax.random.randint(keys[0], (batch_size, length), 0, 256)
        labels = jnp.roll(inputs, -1, axis=1)
    elif name == "words":
        words = options.get("vocabulary", 50_000)
        inputs = jax.random.randint(keys[0], (batch_size,), 0, words)
        labels = jax.random.randint(keys[1], (batch_size,), 0, words)
    else:
        side = 32 if name == "resnet18" else 24
        inputs = jax.random.normal(keys[0], (batch_size, side, side, 3), dtype)
        labels = jax.random.randint(keys[1], (batch_size,), 0, 10)

    def value_fn(params, inputs, labels):
        logits = nnx.merge(graphdef, params)(inputs).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Problem(name, value_fn, params, {"inputs": inputs, "labels": labels})
