"""Networks for the rule of ``strategy="auto"``: small, so that each compiles in a minute."""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.large import TITLES as LARGE_TITLES
from benchmarks.large import Decoder, language_problem, of_images
from benchmarks.problems import CNN, ResNet18, TransformerBlock
from flatopt._core import rules

TITLES = {
    "cnn": "CNN of four convolutions",
    "resnet10": "ResNet of four blocks",
    "decoder": "Transformer of four scanned layers",
    "vit": "ViT of six blocks",
    "mixer": "MLP-Mixer of six blocks",
    "vit, wide": "ViT of six blocks, twice as wide",
}
# The same networks with fewer or more images a chunk.
TITLES |= {f"cnn, {batch}": TITLES["cnn"] for batch in (128, 256, 512, 4096)}
TITLES |= {"resnet10, 512": TITLES["resnet10"]}
TITLES |= {f"resnet18, {batch}": LARGE_TITLES["resnet18"] for batch in (512, 1024)}
NAMES = tuple(TITLES)
CHUNKS = 8


class ViT(nnx.Module):
    """Attention between patches of 4 by 4, which a dense layer embeds."""

    def __init__(self, rngs, width=192, depth=6):
        self.embed = nnx.Linear(48, width, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (64, width)))
        self.blocks = nnx.List([TransformerBlock(width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        x = self.embed(_patches(images)) + self.position[...][None]
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x).mean(axis=1))


class MixerBlock(nnx.Module):
    """Dense layers across the patches, then across the features."""

    def __init__(self, patches, width, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        sizes = [(patches, 2 * patches), (2 * patches, patches)]
        sizes += [(width, 4 * width), (4 * width, width)]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in sizes])

    def __call__(self, x):
        y = self.layers[0](self.norms[0](x).swapaxes(1, 2))
        x = x + self.layers[1](nnx.gelu(y)).swapaxes(1, 2)
        return x + self.layers[3](nnx.gelu(self.layers[2](self.norms[1](x))))


class Mixer(nnx.Module):
    """An MLP-Mixer on patches of 4 by 4."""

    def __init__(self, rngs, width=256, depth=6):
        self.embed = nnx.Linear(48, width, rngs=rngs)
        self.blocks = nnx.List([MixerBlock(64, width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        x = self.embed(_patches(images))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def _patches(images):
    count, side = len(images), images.shape[1] // 4
    x = images.reshape(count, side, 4, side, 4, 3).swapaxes(2, 3)
    return x.reshape(count, side * side, 48)


def make(name):
    """One of :data:`NAMES` as shapes, in bfloat16."""
    if name == "decoder":
        return language_problem(name, Decoder(4, 256, 4, 8192, 128), 64)
    kind, _, other = name.partition(", ")
    kind = kind if other.isdigit() else name
    network, options, side, batch_size = {
        "cnn": (CNN, (), 24, 1024),
        "resnet18": (ResNet18, (), 32, 128),
        "resnet10": (ResNet18, [(64, 64, 128, 256, 512)], 32, 128),
        "vit": (ViT, (), 32, 256),
        "vit, wide": (ViT, [384], 32, 256),
        "mixer": (Mixer, (), 32, 256),
    }[kind]
    batch_size = int(other) if other.isdigit() else batch_size
    make_model = lambda: network(nnx.Rngs(0), *options)  # noqa: E731
    return of_images(name, make_model, side, batch_size, jnp.bfloat16)


def rule_for(problem, target):
    """What ``strategy="auto"`` takes on a target for chunks of a batch."""

    def chunk(x):
        return jax.ShapeDtypeStruct((len(x) // CHUNKS, *x.shape[1:]), x.dtype)

    def value_and_grad(params, batch):
        return jax.value_and_grad(problem.value_fn)(params, **batch)

    batch = {name: chunk(x) for name, x in problem.batch.items()}
    traced = jax.make_jaxpr(value_and_grad)(problem.params, batch)
    rule = {"tpu": rules.strategy_on_tpu, "h100": rules.strategy_on_gpu}[target]
    return rule(traced.jaxpr, CHUNKS, True)
