"""Flat-minimum training on real handwritten digits, compared at equal budgets.

Trains a small convolutional network on few images with some wrong labels, by SGD, SAM,
LPF-SGD and NSO, or by any of flatopt's methods (``--methods all``). Every method gets
the same number of gradient evaluations of single images, and the same number of settings
to choose from on a validation split. Prints a table and saves a figure: accuracy along
training, the training loss under random perturbations of growing radius, and the test
accuracy under noise on the weights, as analog hardware adds it. The table has the accuracy
after rounding to 3 bits, too. What it prints is what it measured.
"""

import dataclasses
import functools
import inspect
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import rich.console
import rich.table
import tqdm
import tyro
from flax import nnx
from sklearn.datasets import load_digits

import flatopt
from flatopt import sharpness

RADII = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1)
BITS, WEIGHT_NOISE = 3, (0.0, 0.05, 0.1, 0.15, 0.2)
NUM_VALIDATION, NUM_TEST = 400, 800


@dataclasses.dataclass
class Config:
    """Settings of the comparison."""

    seeds: int = 5
    """Number of final runs of each method: data, labels, start and noise all change."""
    tuning_seeds: int = 2
    """Number of runs of each setting on the validation split."""
    train_images: int = 320
    """Number of training images."""
    label_noise: float = 0.3
    """Share of training labels replaced by random ones."""
    epochs: int = 100
    """Passes over the training images for a method of one gradient a step."""
    batch_size: int = 64
    """Images a step."""
    output: pathlib.Path = pathlib.Path("results")
    """Folder of the figure and of the numbers as JSON."""
    methods: tuple[str, ...] = ("SGD", "SAM", "LPF-SGD", "NSO")
    """Methods to compare, by the names of the table METHODS; "all" for all of them."""
    quick: bool = False
    """A small version: fewer seeds, epochs and settings. Its numbers mean little."""


class Network(nnx.Module):
    """Two convolutions and two dense layers, 13,706 parameters."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(128, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.avg_pool(nnx.relu(self.first(images)), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.second(x)), (2, 2), strides=(2, 2))
        return self.output(nnx.relu(self.hidden(x.reshape(len(x), -1))))


GRAPHDEF, _ = nnx.split(Network(nnx.Rngs(0)))


def logits_fn(params, images):
    return nnx.merge(GRAPHDEF, params)(images)


def loss_fn(params, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_fn(params, images), labels
    ).mean()


# Methods: a transformation, gradients a step, settings to choose from

BATCH = ("images", "labels")


def sgd(learning_rate, weight_decay):
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=0.9),
    )


def sam(learning_rate, weight_decay, radius):
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(radius))
    return optax.contrib.sam(
        sgd(learning_rate, weight_decay), ascent, opaque_mode=True, reset_state=False
    )


def lpf_sgd(learning_rate, weight_decay, radius, key):
    return flatopt.lpf_sgd(
        learning_rate,
        radius,
        weight_decay=weight_decay,
        batch_argnames=BATCH,
        key=key,
    )


def nso_sgd(learning_rate, weight_decay, radius, key):
    return flatopt.nso_sgd(learning_rate, radius, weight_decay=weight_decay, key=key)


def anti_pgd(learning_rate, weight_decay, radius, key, num_steps):
    # The last step takes the last noise away.
    noise = flatopt.anti_pgd(
        lambda count: jnp.where(count < num_steps, radius, 0.0), key=key
    )
    return optax.chain(sgd(learning_rate, weight_decay), noise)


def before_sgd(link, *args, **options):
    """A method whose ``link(radius, *args, key=key)`` comes before SGD in a chain."""

    def make(learning_rate, weight_decay, radius, key):
        return optax.chain(
            link(radius, *args, key=key, **options), sgd(learning_rate, weight_decay)
        )

    return make


@dataclasses.dataclass
class Method:
    """A method of the comparison."""

    make: object
    gradients_a_step: float
    grid: dict


RATES, DECAYS = (0.02, 0.05), (2e-3, 1e-2)


def flat_grid(radii, rates=RATES):
    return {"learning_rate": rates, "weight_decay": DECAYS, "radius": radii}


SMALL, LARGE = (0.01, 0.03, 0.1), (0.05, 0.2, 0.5)
SMOOTH, KERNELS = flatopt.smooth_gradients, flatopt.kernels

# Twelve settings each. SGD has no radius, so it has more of the other two.
METHODS = {
    "SGD": Method(
        sgd,
        1,
        {"learning_rate": (0.02, 0.05, 0.1), "weight_decay": (5e-4, 2e-3, 1e-2, 3e-2)},
    ),
    "SAM": Method(sam, 2, flat_grid(LARGE)),
    "LPF-SGD": Method(lpf_sgd, 1, flat_grid(SMALL)),
    "NSO": Method(nso_sgd, 2, flat_grid(SMALL)),
    "WP-SGD": Method(before_sgd(SMOOTH), 1, flat_grid(SMALL)),
    "SmoothOut": Method(
        before_sgd(SMOOTH, KERNELS.isotropic(KERNELS.uniform)), 1, flat_grid(SMALL)
    ),
    "one layer at a time": Method(
        before_sgd(SMOOTH, KERNELS.one_layer(KERNELS.isotropic())), 1, flat_grid(SMALL)
    ),
    "Anti-PGD": Method(anti_pgd, 1, flat_grid(SMALL)),
    "Entropy-SGD": Method(
        before_sgd(flatopt.entropy_sgd_gradients, 4, batch_argnames=BATCH),
        1,
        flat_grid((1e-4, 1e-2, 1.0), rates=(0.1, 0.3)),
    ),
    "zeroth order": Method(
        before_sgd(flatopt.smooth_gradients_zeroth_order),
        2 / 3,  # two forward passes
        flat_grid((0.001, 0.01, 0.1), rates=(1e-4, 1e-3)),
    ),
    "unnormalized SAM": Method(
        before_sgd(flatopt.usam_gradients), 2, flat_grid((0.02, 0.1, 0.3))
    ),
    "ASAM": Method(before_sgd(flatopt.asam_gradients), 2, flat_grid((0.2, 0.5, 1.0))),
    "filter-wise ASAM": Method(
        before_sgd(flatopt.filterwise_asam_gradients), 2, flat_grid((0.2, 0.5, 1.0))
    ),
    "random SAM": Method(
        before_sgd(flatopt.random_sam_gradients, 0.01), 2, flat_grid(LARGE)
    ),
    "noisy SAM": Method(
        before_sgd(flatopt.noisy_sam_gradients, 0.01), 2, flat_grid(LARGE)
    ),
    "GSAM": Method(before_sgd(flatopt.gsam_gradients, 0.2), 2, flat_grid(LARGE)),
    "LookSAM": Method(before_sgd(flatopt.look_sam_gradients), 1.2, flat_grid(LARGE)),
    "Friendly SAM": Method(
        before_sgd(flatopt.friendly_sam_gradients), 2, flat_grid(LARGE)
    ),
    "Fisher SAM": Method(before_sgd(flatopt.fisher_sam_gradients), 2, flat_grid(LARGE)),
}


def make_data(seed, config):
    """Images in [0, 1] and labels: training (some wrong), validation, test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).reshape(-1, 8, 8, 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    test, validation, rest = np.split(order, [NUM_TEST, NUM_TEST + NUM_VALIDATION])
    rng = np.random.default_rng(seed)
    train = rng.permutation(rest)[: config.train_images]
    train_labels = labels[train].copy()
    wrong = rng.random(len(train)) < config.label_noise
    train_labels[wrong] = rng.integers(0, 10, wrong.sum())
    return {
        "train": (jnp.asarray(images[train]), jnp.asarray(train_labels)),
        "validation": (
            jnp.asarray(images[validation]),
            jnp.asarray(labels[validation]),
        ),
        "test": (jnp.asarray(images[test]), jnp.asarray(labels[test])),
    }


@jax.jit
def accuracy(params, images, labels):
    return (logits_fn(params, images).argmax(axis=-1) == labels).mean()


def batch_accuracy(params, batch):
    return accuracy(params, *batch)


# In units of the largest weight of each layer; biases stay as they are.
HARDWARE = flatopt.kernels.masked(
    flatopt.kernels.relative_to_max(()),
    lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
)


def noisy_accuracy(params, key, data):
    """Test accuracy under noise on the weights, for each scale."""
    return sharpness.perturbed_accuracy(
        batch_accuracy, params, key, HARDWARE, WEIGHT_NOISE, num_samples=16, data=data
    )


@jax.jit
def perturbed_loss(params, key, radius, images, labels):
    smoothed = flatopt.smooth(
        loss_fn, radius, flatopt.kernels.filterwise(), num_samples=8, strategy="unroll"
    )
    return smoothed(key, params, images, labels)


class Trainer:
    """Trains one method; its step is compiled once for all settings and seeds."""

    def __init__(self, name, config):
        self.method, self.config = METHODS[name], config
        gradients = config.epochs * config.train_images // config.batch_size
        self.num_steps = int(gradients / self.method.gradients_a_step)
        parameters = inspect.signature(self.method.make).parameters
        self.make = (
            functools.partial(self.method.make, num_steps=self.num_steps)
            if "num_steps" in parameters
            else self.method.make
        )
        self.takes_key = "key" in parameters
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def _transformation(self, setting, seed):
        key = {"key": seed} if self.takes_key else {}
        return optax.inject_hyperparams(self.make)(**setting, **key)

    def _step(self, params, state, images, labels):
        transformation = self._transformation(dict.fromkeys(self.method.grid, 0.0), 0)
        if self.method.make in (sgd, sam, anti_pgd):
            grads = jax.grad(loss_fn)(params, images, labels)
            extra = {}
            if self.method.make is sam:
                extra["grad_fn"] = lambda params, _: jax.grad(loss_fn)(
                    params, images, labels
                )
        else:
            grads = optax.tree.zeros_like(params)  # not read: flatopt makes its own
            extra = {"value_fn": loss_fn, "images": images, "labels": labels}
        updates, state = transformation.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def train(self, setting, seed, evaluate_on, num_points=0):
        """Train once; return parameters, accuracies along training and seconds."""
        config = self.config
        data = make_data(seed, config)
        images, labels = data["train"]
        _, params = nnx.split(Network(nnx.Rngs(seed)))
        state = self._transformation(setting, seed).init(params)
        marks = set(np.linspace(0, self.num_steps, num_points + 1)[1:].astype(int))
        rng = np.random.default_rng(seed)
        batches = itertools.chain.from_iterable(
            np.array_split(
                rng.permutation(len(images)), len(images) // config.batch_size
            )
            for _ in itertools.count()
        )
        curve, seconds = [], 0.0
        for step in range(1, self.num_steps + 1):
            batch = next(batches)
            start = time.perf_counter()
            params, state = self.step(params, state, images[batch], labels[batch])
            jax.block_until_ready(params)
            seconds += time.perf_counter() - start
            if step in marks:
                evaluations = step * config.batch_size * self.method.gradients_a_step
                curve.append((evaluations, float(accuracy(params, *data[evaluate_on]))))
        return params, data, curve, seconds


def compare(config):
    """Tune and train every method; return one result a method."""
    settings = {
        name: [
            dict(zip(method.grid, values, strict=True))
            for values in itertools.product(*method.grid.values())
        ][:: 5 if config.quick else 1]
        for name, method in METHODS.items()
        if name in config.methods
    }
    total = sum(len(s) * config.tuning_seeds + config.seeds for s in settings.values())
    results = {}
    with tqdm.tqdm(total=total, unit="run") as progress:
        for name in settings:
            trainer = Trainer(name, config)
            scores = []
            for setting in settings[name]:
                progress.set_description(f"{name}, tuning")
                score = 0.0
                for seed in range(config.tuning_seeds):
                    params, data, *_ = trainer.train(setting, 100 + seed, "validation")
                    score += float(accuracy(params, *data["validation"]))
                    progress.update()
                scores.append(score / config.tuning_seeds)
            best = settings[name][int(np.argmax(scores))]
            runs = []
            for seed in range(config.seeds):
                progress.set_description(f"{name}, final")
                runs.append(final_run(trainer, best, seed))
                progress.update()
            results[name] = {
                "setting": best,
                "validation": max(scores),
                "summary": summarize(runs),
                "runs": runs,
            }
    return results


def summarize(runs):
    """Mean and standard error over seeds of what the table shows."""
    columns = {
        "test accuracy %": [100 * run["test_accuracy"] for run in runs],
        "3 bits": [100 * run["rounded_accuracy"] for run in runs],
        "weight noise": [
            100 * run["noisy_accuracy"][WEIGHT_NOISE.index(0.1)] for run in runs
        ],
        "train loss": [run["train_loss"] for run in runs],
        "radius 0.04": [run["perturbed_loss"][RADII.index(0.04)] for run in runs],
        "radius 0.1": [run["perturbed_loss"][RADII.index(0.1)] for run in runs],
        "seconds": [run["seconds"] for run in runs],
    }
    return {
        name: [float(x) for x in mean_and_error(column)]
        for name, column in columns.items()
    }


def final_run(trainer, setting, seed):
    params, data, curve, seconds = trainer.train(setting, seed, "test", num_points=20)
    key = jax.random.key(seed)
    rounded = sharpness.round_filters(params, BITS)
    return {
        "test_accuracy": float(accuracy(params, *data["test"])),
        "rounded_accuracy": float(accuracy(rounded, *data["test"])),
        "noisy_accuracy": noisy_accuracy(params, key, data["test"]).value.tolist(),
        "train_loss": float(loss_fn(params, *data["train"])),
        "perturbed_loss": [
            float(perturbed_loss(params, key, radius, *data["train"]))
            for radius in RADII
        ],
        "curve": curve,
        "seconds": seconds,
        # Of the first network of each method: it takes a few seconds.
        "curvature": measure_curvature(params, data["train"], seed) if not seed else {},
    }


def batch_loss(params, batch):
    return loss_fn(params, *batch)


def measure_curvature(params, data, seed):
    """Trace and Frobenius norm with standard errors, largest eigenvalue with its bound."""
    operator = flatopt.curvature.hessian(batch_loss, params, data)
    key = jax.random.key(seed)
    probe = flatopt.curvature.probe(operator, key)
    top = flatopt.curvature.eigenpairs(operator, key)
    return {
        "trace": [float(x) for x in probe.trace[:2]],
        "frobenius_norm": [float(x) for x in probe.frobenius_norm[:2]],
        "max_eigenvalue": [float(top.values[0]), float(top.residuals[0])],
    }


def mean_and_error(values, axis=0):
    values = np.asarray(values, float)
    if len(values) == 1:
        return values.mean(axis), np.full(values.shape[1:], np.nan)
    return values.mean(axis), values.std(axis, ddof=1) / np.sqrt(len(values))


def print_table(results, config):
    table = rich.table.Table(
        title=f"Digits: {config.train_images} training images, "
        f"{config.label_noise:.0%} of labels random, {config.seeds} seeds "
        "(mean ± standard error), equal gradient evaluations"
        + (", QUICK: far from trained" if config.quick else "")
    )
    digits = dict.fromkeys(next(iter(results.values()))["summary"], 3)
    percentages = dict.fromkeys(("test accuracy %", "3 bits", "weight noise"), 1)
    digits |= percentages | {"seconds": 2}
    for column in ["method", *digits, "chosen setting"]:
        table.add_column(column)
    for name, result in results.items():
        cells = [
            f"{mean:.{digits[column]}f} ± {error:.{digits[column]}f}"
            for column, (mean, error) in result["summary"].items()
        ]
        chosen = ", ".join(f"{k} {v:g}" for k, v in result["setting"].items())
        table.add_row(name, *cells, chosen)
    rich.console.Console(width=140).print(table)
    print(
        "3 bits: test accuracy % with each channel rounded to 3 bits\n"
        "weight noise: under Gaussian noise of 0.1 of the largest weight of each layer\n"
        "radius r: training loss under filter-normalized Gaussian noise of scale r"
    )
    print_curvature(results)


def print_curvature(results):
    table = rich.table.Table(
        title="Hessian of the training loss, first seed: estimate ± standard error, "
        "largest eigenvalue ± bound"
    )
    names = {
        "trace": "trace",
        "frobenius_norm": "Frobenius norm",
        "max_eigenvalue": "largest eigenvalue",
    }
    for column in ["method", *names.values()]:
        table.add_column(column)
    for name, result in results.items():
        found = result["runs"][0]["curvature"]
        cells = [f"{found[key][0]:.2f} ± {found[key][1]:.2g}" for key in names]
        table.add_row(name, *cells)
    rich.console.Console(width=140).print(table)


def plot(results, path):
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left, middle, right = axes
    for name, result in results.items():
        runs = result["runs"]
        evaluations = [point[0] for point in runs[0]["curve"]]
        mean, error = mean_and_error([[p[1] for p in r["curve"]] for r in runs])
        left.errorbar(evaluations, 100 * mean, 100 * error, label=name, capsize=2)
        mean, error = mean_and_error([r["perturbed_loss"] for r in runs])
        middle.errorbar(RADII, mean, error, label=name, capsize=2)
        mean, error = mean_and_error([run["noisy_accuracy"] for run in runs])
        right.errorbar(WEIGHT_NOISE, 100 * mean, 100 * error, label=name, capsize=2)
    left.set(xlabel="gradient evaluations of single images", ylabel="test accuracy (%)")
    middle.set(xlabel="perturbation radius (filter norms)", ylabel="training loss")
    right.set(xlabel="weight noise (largest weight)", ylabel="test accuracy (%)")
    left.set_title("Accuracy along training")
    middle.set_title("Loss under random perturbation")
    right.set_title("Accuracy when the weights are noisy")
    for axis in axes:
        axis.legend()
    figure.savefig(path, dpi=150)


def main(config: Config) -> None:
    if config.methods == ("all",):
        config = dataclasses.replace(config, methods=tuple(METHODS))
    unknown = set(config.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"--methods: {unknown} unknown; choose from {list(METHODS)}")
    if config.quick:
        config = dataclasses.replace(config, seeds=2, tuning_seeds=1, epochs=30)
    results = compare(config)
    print_table(results, config)
    config.output.mkdir(parents=True, exist_ok=True)
    plot(results, config.output / "digits.png")
    settings = {**dataclasses.asdict(config), "output": str(config.output)}
    report = {"config": settings, "jax": jax.__version__, "results": results}
    (config.output / "digits.json").write_text(json.dumps(report, indent=1))
    print(f"figure: {config.output / 'digits.png'}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
