"""Flat-LoRA: adapters trained with noise on the frozen weights that they are merged into.

A network is trained on upright digits, frozen, and adapted to digits that lie on their side by
`nnx.LoRALinear`: once by AdamW alone, once with noise on the merged weights. What comes is
merged into the weights and tested as it is and rounded to a few bits.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import load_digits

import flatopt
import flatopt.flax


@dataclasses.dataclass
class Config:
    """Settings."""

    rho: float = 0.5
    """Deviation of the noise, over the norm of an output's weights and sqrt(inputs)."""
    rank: int = 4
    """Rank of the adapters."""
    width: int = 64
    """Hidden units."""
    bits: int = 3
    """Bits of a weight after rounding, with a step for each output."""
    pretraining_steps: int = 1500
    """Steps on upright digits."""
    num_steps: int = 600
    """Steps of fine-tuning."""
    num_images: int = 200
    """Images to fine-tune on."""
    num_seeds: int = 3
    """Runs of each method."""
    output: pathlib.Path = pathlib.Path("results")
    """Folder of the numbers as JSON."""
    quick: bool = False
    """A small version."""


class Network(nnx.Module):
    def __init__(self, width, rank, rngs):
        self.first = nnx.LoRALinear(64, width, lora_rank=rank, rngs=rngs)
        self.second = nnx.LoRALinear(width, 10, lora_rank=rank, rngs=rngs)

    def __call__(self, images):
        return self.second(nnx.relu(self.first(images)))


def loss_fn(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def merge(layer):
    """The weight that a layer multiplies with: its own and the product of the adapter."""
    return (
        layer["kernel"][...]
        + layer["lora"]["lora_a"][...] @ layer["lora"]["lora_b"][...]
    )


def norms_of(variables):
    """Arrays with the norms of Flat-LoRA's noise: merged weights over sqrt(inputs)."""
    layers = {name: merge(variables[name]) for name in ("first", "second")}
    return {n: {"kernel": w / w.shape[0] ** 0.5} for n, w in layers.items()}


def batches(images, labels, num_steps, seed, size=64):
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        rows = rng.integers(0, len(images), size)
        yield images[rows], labels[rows]


def fit(model, data, num_steps, seed, wrt, noise=None):
    """Train the variables in `wrt`, with noise on the frozen weights if it is given."""
    schedule = optax.cosine_decay_schedule(1e-2, num_steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=wrt)
    weights = nnx.All(nnx.Not(nnx.LoRAParam), nnx.PathContains("kernel"))

    @nnx.jit
    def step(model, optimizer, key, scale, images, labels):
        if noise is None:
            grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))(
                model, images, labels
            )
        else:
            kernel = flatopt.kernels.filterwise(norms_of=norms_of)
            _, grads = flatopt.flax.value_and_grad(
                loss_fn, scale, kernel, wrt=wrt, noise_wrt=weights
            )(key, model, images, labels)
        optimizer.update(model, grads)

    for i, batch in enumerate(batches(*data, num_steps, seed)):
        scale = (
            0.0 if noise is None else noise * (1 - np.cos(np.pi * i / num_steps)) / 2
        )
        step(
            model, optimizer, jax.random.fold_in(jax.random.key(seed), i), scale, *batch
        )


def rounded(kernel, bits):
    """A weight in signed symmetric integers of a few bits, a step for each output."""
    step = 2 * jnp.abs(kernel).max(axis=0) / (2**bits - 2)
    return jnp.round(kernel / step) * step


def accuracy(model, data, bits=None):
    """The accuracy of the merged network, rounded if bits are given."""
    merged = nnx.clone(model)
    for layer in (merged.first, merged.second):
        weight = layer.kernel[...] + layer.lora.lora_a[...] @ layer.lora.lora_b[...]
        layer.kernel[...] = weight if bits is None else rounded(weight, bits)
        layer.lora.lora_b[...] = jnp.zeros_like(layer.lora.lora_b[...])
    return float((merged(data[0]).argmax(-1) == data[1]).mean())


def main(config: Config):
    if config.quick:
        config = dataclasses.replace(
            config, pretraining_steps=20, num_steps=10, num_seeds=1
        )
    images, labels = load_digits(return_X_y=True)
    images = (images / 16 - 0.3).astype(np.float32)
    turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    half = len(images) // 2
    tuning = turned[: config.num_images], labels[: config.num_images]
    testing = jnp.asarray(turned[half:]), labels[half:]

    base = Network(config.width, config.rank, nnx.Rngs(0))
    own = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    fit(base, (images[:half], labels[:half]), config.pretraining_steps, 0, own)

    results = {}
    for name, noise in {"LoRA": None, "Flat-LoRA": config.rho}.items():
        runs = []
        for seed in range(1, config.num_seeds + 1):
            model = nnx.clone(base)
            fit(model, tuning, config.num_steps, seed, nnx.LoRAParam, noise)
            before, after = base.first.kernel[...], model.first.kernel[...]
            assert (before == after).all(), "a frozen weight has changed"
            runs.append(
                [accuracy(model, testing), accuracy(model, testing, config.bits)]
            )
        mean, error = np.mean(runs, 0), np.std(runs, 0) / max(len(runs) - 1, 1) ** 0.5
        results[name] = {"accuracy": mean.tolist(), "standard_error": error.tolist()}
        print(
            f"{name:>9}: {mean[0]:.1%} ± {error[0]:.1%}, "
            f"in {config.bits} bits {mean[1]:.1%} ± {error[1]:.1%}"
        )
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "flat_lora.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config))
