"""Can SGD stay at the minimum of a small network on real handwritten digits?

Trains a network with square loss by full-batch gradient descent with momentum to a minimum
that fits its images, prints what each theory says of a learning rate and batch size, and
runs SGD itself from there: below the exact threshold the loss stays, above it leaves. The
figure shows thresholds against the batch size, and the losses of the runs.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
import tyro
from sklearn.datasets import load_digits

from flatopt import plots, stability


@dataclasses.dataclass
class Config:
    """Settings."""

    num_images: int = 60
    """Number of training images."""
    hidden: int = 32
    """Hidden units."""
    training_steps: int = 20_000
    """Steps of training towards the minimum."""
    batch_size: int = 1
    """Batch size of SGD at the minimum."""
    factors: tuple[float, ...] = (0.7, 0.95, 1.2, 2.0)
    """Learning rates of the runs, over the exact threshold."""
    num_steps: int = 300
    """Steps of each run of SGD."""
    num_runs: int = 20
    """Runs of SGD for each learning rate."""
    seed: int = 0
    """Seed of everything."""
    output: pathlib.Path = pathlib.Path("results")
    """Folder of the figure and of the numbers as JSON."""
    quick: bool = False
    """A small version."""


def model_fn(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"] + params["bias"])
    return hidden @ params["output"]


def loss_fn(outputs, targets):
    """The square loss of the papers: half the squared error, mean over examples."""
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)) / 2


def whole_loss(params, inputs, targets):
    return loss_fn(model_fn(params, inputs), targets)


def train(config, inputs, targets):
    keys = jax.random.split(jax.random.key(config.seed), 2)
    params = {
        "hidden": jax.random.normal(keys[0], (64, config.hidden)) / 8,
        "bias": jnp.zeros((1, config.hidden)),
        "output": jax.random.normal(keys[1], (config.hidden, 10)) / config.hidden**0.5,
    }
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, config.training_steps))

    @jax.jit
    def steps(carry):
        def body(carry, _):
            params, state = carry
            grads = jax.grad(whole_loss)(params, inputs, targets)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, carry, None, length=config.training_steps // 20)[0]

    carry = params, tx.init(params)
    for _ in tqdm.trange(20, desc="train"):
        carry = steps(carry)
    return carry[0]


def run_sgd(config, params, inputs, targets, learning_rate):
    """Losses of plain SGD from the minimum, a little displaced; (runs, steps + 1)."""

    def run(key):
        start_key, key = jax.random.split(key)
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(start_key, len(leaves))
        start = treedef.unflatten(
            [
                leaf + 1e-3 * jax.random.normal(k, leaf.shape)
                for leaf, k in zip(leaves, keys, strict=True)
            ]
        )

        def body(params, key):
            loss = whole_loss(params, inputs, targets)
            chosen = jax.random.choice(
                key, len(inputs), (config.batch_size,), replace=False
            )
            grads = jax.grad(whole_loss)(params, inputs[chosen], targets[chosen])
            return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss

        keys = jax.random.split(key, config.num_steps + 1)
        return jax.lax.scan(body, start, keys)[1]

    keys = jax.random.split(jax.random.key(config.seed + 1), config.num_runs)
    return np.asarray(jax.jit(jax.vmap(run))(keys))


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(
            config, num_images=30, training_steps=4000, num_steps=60, num_runs=4
        )
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(config.seed).permutation(len(images))
    chosen = chosen[: config.num_images]
    inputs = jnp.asarray(images[chosen] / 16, jnp.float32)
    targets = jax.nn.one_hot(labels[chosen], 10)
    params = train(config, inputs, targets)

    lin = stability.linearize(model_fn, params, inputs, targets, loss_fn=loss_fn)
    limit = stability.thresholds(lin, config.batch_size).mean_square
    report = stability.report(
        model_fn,
        params,
        inputs,
        targets,
        1.2 * limit,
        config.batch_size,
        loss_fn=loss_fn,
    )
    print(report)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    plots.stability_thresholds(
        lin, learning_rate=1.2 * limit, batch_size=config.batch_size, ax=left
    )
    results = {"threshold": limit, "runs": {}}
    for factor in config.factors:
        losses = run_sgd(config, params, inputs, targets, factor * limit)
        growth = stability.growth_rate(lin, factor * limit, config.batch_size)
        mean = losses.mean(axis=0)
        results["runs"][factor] = {"growth_rate": growth, "mean_loss": mean.tolist()}
        right.semilogy(mean, label=f"{factor:g} of the threshold")
        print(
            f"learning rate {factor:g} of the threshold: predicted growth {growth:.4f} a step, "
            f"loss of SGD from {mean[0]:.1e} to {mean[-1]:.1e} (largest {mean.max():.1e})"
        )
    right.set(xlabel="step of SGD", ylabel="mean training loss")
    right.legend()
    config.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output / "stability.png", dpi=150)
    (config.output / "stability.json").write_text(json.dumps(results, indent=1))
    print(f"figure: {config.output / 'stability.png'}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
