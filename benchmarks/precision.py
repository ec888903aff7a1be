"""How much of the noise bfloat16 parameters keep: ``python -m benchmarks.precision``.

Trains a small network on digits, hands flatopt its parameters in bfloat16 and the same
numbers in float32, and compares, for the same random draws, how far the parameters move and
what that adds to the loss and the gradient (both computed in float64). ``variance_float32``
is the variance of float32 parameters that the model rounds to bfloat16 when it uses them.
Writes ``docs/results/precision.json``.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tqdm
import tyro
from sklearn.datasets import load_digits

import flatopt

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = 8  # binary digits of bfloat16, with the leading one


@dataclasses.dataclass
class Config:
    """Settings of a run."""

    training_steps: int = 300
    """Steps of SGD before the measurement."""
    num_keys: int = 8
    """Independent repetitions, for the error bars."""
    num_samples: int = 64
    """Pairs of draws in each."""
    results: pathlib.Path = ROOT / "docs" / "results" / "precision.json"
    """Where the figures go."""


def loss_fn(params, images, labels):
    hidden = jnp.tanh(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(images, labels, num_steps):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "hidden": {
            "kernel": jax.random.normal(keys[0], (64, 48), jnp.float32) / 8,
            "bias": jnp.zeros(48, jnp.float32),
        },
        "output": {
            "kernel": jax.random.normal(keys[1], (48, 10), jnp.float32) / 7,
            "bias": jnp.zeros(10, jnp.float32),
        },
    }
    tx = optax.sgd(0.2, momentum=0.9)

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, images, labels), state)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    return jax.lax.scan(step, carry, None, length=num_steps)[0][0]


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def perturbed(key, params, sigma, num_samples):
    """The parameters that flatopt hands to a loss, stacked over draws and signs."""

    def value_fn(params):
        return jnp.zeros((), jnp.float32), params

    f = flatopt.smooth_value_and_grad(
        value_fn,
        sigma,
        num_samples=num_samples,
        antithetic=True,
        has_aux=True,
        strategy="vmap",
    )
    (_, moved), _ = f(key, params)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), moved)


def flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def predicted(params, sigma):
    """The formula: second moment of noise rounded to whole steps, mean over parameters."""
    size = np.abs(np.asarray(flat(cast(params, jnp.float64))))
    size = size[size > 0]
    ratio = sigma / 2.0 ** (np.floor(np.log2(size)) + 1 - DIGITS)
    few = np.minimum(ratio, 4.0)[:, None]
    k = np.arange(-30, 31)
    mass = scipy.stats.norm.cdf((k + 0.5) / few) - scipy.stats.norm.cdf((k - 0.5) / few)
    kept = ((k / few) ** 2 * mass).sum(axis=1)
    return float(np.where(ratio < 4, kept, 1 + 1 / (12 * ratio**2)).mean())


def measure(config):
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images[:512] / 16), jnp.asarray(labels[:512])
    trained = train(images.astype(jnp.float32), labels, config.training_steps)
    rounded = cast(trained, jnp.bfloat16)
    size = float(jnp.sqrt(jnp.mean(flat(cast(rounded, jnp.float64)) ** 2)))

    @jax.jit
    def value_and_grad(params):
        params = cast(params, jnp.float64)
        value, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        return value, flat(grads)

    @jax.jit
    def effect(start, moved):
        """What smoothing adds to the loss and the gradient."""
        values, grads = jax.lax.map(value_and_grad, moved)
        value, grad = value_and_grad(start)
        return values.mean() - value, grads.mean(axis=0) - grad

    @jax.jit
    def variance(start, moved):
        start = flat(cast(start, jnp.float64))
        rows = jax.vmap(lambda row: flat(cast(row, jnp.float64)))(moved)
        return jnp.mean((rows - start) ** 2)

    jitted = jax.jit(perturbed, static_argnums=3)

    def one(key, sigma):
        wide = jitted(key, cast(rounded, jnp.float32), sigma, config.num_samples)
        narrow = jitted(key, rounded, sigma, config.num_samples)
        master = cast(jitted(key, trained, sigma, config.num_samples), jnp.bfloat16)
        (loss, grad), (kept_loss, kept_grad) = (
            effect(rounded, moved) for moved in (wide, narrow)
        )
        asked = variance(rounded, wide)
        unmoved = variance(trained, jax.tree.map(lambda x: x[None], rounded))
        found = {
            "variance": variance(rounded, narrow) / asked,
            "loss": kept_loss / loss,
            "gradient_error": jnp.linalg.norm(kept_grad - grad) / jnp.linalg.norm(grad),
            "variance_float32": (variance(trained, master) - unmoved) / asked,
        }
        return {name: float(value) for name, value in found.items()}

    def summarize(runs):
        values = np.array(runs)
        error = values.std(ddof=1) / len(values) ** 0.5
        return [float(values.mean()), float(error)]

    points = []
    for ratio in tqdm.tqdm(2.0 ** np.arange(-13, -2.5, 0.5)):
        sigma = jnp.float32(ratio * size)
        keys = jax.random.split(jax.random.key(1), config.num_keys)
        runs = [one(key, sigma) for key in keys]
        points.append(
            {
                "sigma_over_size": float(ratio),
                "predicted_variance": predicted(rounded, float(sigma)),
                **{name: summarize([run[name] for run in runs]) for name in runs[0]},
            }
        )
    return {
        "num_parameters": int(flat(trained).size),
        "root_mean_square": size,
        "num_keys": config.num_keys,
        "num_samples": config.num_samples,
        "jax": jax.__version__,
        "points": points,
    }


def main(config: Config) -> None:
    with jax.enable_x64(True):
        report = measure(config)
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
