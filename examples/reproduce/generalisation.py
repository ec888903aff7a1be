"""Does flatness pay on small real data? SGD, SAM, ASAM, LPF-SGD, NSO and WP-SGD on digits.

Two small networks learn handwritten digits from few images, some of them with wrong labels.
Every method tunes learning rate, weight decay and its own radius on a validation split, among
the same number of settings. All get the same number of gradients of single examples, counted
by flatopt; those of several gradients a step are also given as many epochs as SGD. Then
ablations of LPF-SGD and NSO, and a bound of PAC-Bayes type.
"""

import dataclasses
import functools
import itertools
import operator
import time
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.stats
import tqdm
import tyro

import flatopt

TUNING_SEED = 100

# NSO: abstract of arXiv 2306.08553, two versions of it. LPF-SGD: section 5 and official code.
PAPER = {
    "accuracy_gain": [0.018, 0.024],
    "trace_reduction": [0.177, 0.158],
    "max_eigenvalue_reduction": [0.128, 0.097],
    "chunks": 8,
    "growth": 15,
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    networks: tuple[str, ...] = ("MLP", "CNN")
    """Networks to train."""
    methods: tuple[str, ...] = (
        "SGD",
        "SAM",
        "ASAM",
        "LPF-SGD",
        "NSO, k = 1",
        "NSO, k = 2",
        "NSO, k = 4",
        "WP-SGD",
    )
    """Methods to compare; SGD and NSO with k = 1 must be among them."""
    ablations: tuple[str, ...] = ("chunks", "draws", "regularizers")
    """Ablations of LPF-SGD and NSO, on the first network."""
    rows: int = 5
    """Number of rows of each ablation, from the last."""
    settings: int = 48
    """Number of settings that each method chooses from, spread over its grid."""
    label_noise: tuple[float, ...] = (0.0, 0.2, 0.4)
    """Shares of training labels that are replaced by random ones."""
    ablation_noise: float = 0.4
    """The share for the ablations."""
    seeds: int = 20
    """Number of final runs: images, wrong labels, start, batches and noise change."""
    tuning_seeds: int = 3
    """Number of runs of each setting to choose from; other seeds than the final ones."""
    train_images: int = 192
    """Number of training images."""
    batch_size: int = 32
    """Images of a batch."""
    epochs: int = 64
    """Passes over the training images of a method of one gradient a step."""
    points: int = 16
    """Number of points of each curve."""


SMOKE = {
    "methods": ("SGD", "NSO, k = 1"),
    "networks": ("MLP",),
    "ablations": ("regularizers",),
    "rows": 1,
    "settings": 2,
    "label_noise": (0.4,),
    "seeds": 2,
    "tuning_seeds": 1,
    "train_images": 32,
    "batch_size": 16,
    "epochs": 4,
    "points": 2,
}


# Networks: functions of plain parameter trees


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


def cnn(params, images):
    hidden = images.reshape(-1, 8, 8, 1)
    for name in ("first", "second"):
        hidden = jax.nn.relu(convolve(params[name], hidden))
    return dense(params["output"], hidden.reshape(len(images), -1))


NETWORKS = {
    "MLP": (mlp, {"hidden": (64, 64), "output": (64, 10)}),
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


# Methods: SGD with momentum behind another first link


def sam(radius, key, num_steps):
    del num_steps
    return flatopt.sam_gradients(radius, key=key)


def asam(radius, key, num_steps):
    del num_steps
    return flatopt.asam_gradients(radius, key=key)


def lpf(num_samples=8, growth=1):
    def link(radius, key, num_steps):
        return flatopt.smooth_gradients(
            flatopt.schedules.cosine_growth(radius, growth, num_steps),
            flatopt.kernels.filterwise(),
            num_samples=num_samples,
            batch_argnames=("batch",),
            key=key,
        )

    return link


def noise(num_samples=1, antithetic=False):
    def link(radius, key, num_steps):
        del num_steps
        return flatopt.smooth_gradients(
            radius, num_samples=num_samples, antithetic=antithetic, key=key
        )

    return link


@dataclasses.dataclass(frozen=True)
class Method:
    """What comes before SGD, the settings to choose from, and whether images are shifted."""

    link: Callable | None
    settings: list[dict[str, float]] = dataclasses.field(compare=False)
    shifted: bool = False


def grid(**values):
    """Every combination of values."""
    return [
        dict(zip(values, chosen, strict=True))
        for chosen in itertools.product(*values.values())
    ]


RATES, DECAYS = (0.03, 0.1, 0.3, 0.6), (3e-3, 1e-2, 3e-2)
MANY_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2)
GAMMAS, NOISE = (0.04, 0.08, 0.12, 0.18), (0.03, 0.08, 0.15, 0.25)


def flat_grid(*radii):
    return grid(learning_rate=RATES, weight_decay=DECAYS, radius=radii)


# 48 settings each.
METHODS = {
    "SGD": Method(
        None,
        grid(
            learning_rate=MANY_RATES, weight_decay=(1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 6e-2)
        ),
    ),
    "SAM": Method(sam, flat_grid(0.05, 0.1, 0.2, 0.5)),
    "ASAM": Method(asam, flat_grid(0.25, 0.5, 1.0, 2.0)),
    "LPF-SGD": Method(lpf(), flat_grid(*GAMMAS)),
    "NSO, k = 1": Method(noise(1, antithetic=True), flat_grid(*NOISE)),
    "NSO, k = 2": Method(noise(2, antithetic=True), flat_grid(*NOISE)),
    "NSO, k = 4": Method(noise(4, antithetic=True), flat_grid(*NOISE)),
    "WP-SGD": Method(noise(), flat_grid(*NOISE)),
}
NO_DECAY = Method(
    None,
    grid(
        learning_rate=np.geomspace(0.01, 1.2, 48).round(4).tolist(), weight_decay=(0.0,)
    ),
)
PLAIN = METHODS["SGD"]


# Ablations: tables of methods, a comparison a row


def chunks():
    """LPF-SGD with fewer chunks, and with a gamma that grows to 15 times its start."""
    radii = 2 / (1 + PAPER["growth"]) * np.array(GAMMAS)  # the same mean over training
    return {
        f"M = {num_samples}": {
            "fixed": Method(lpf(num_samples), flat_grid(*GAMMAS)),
            "growing": Method(
                lpf(num_samples, PAPER["growth"]), flat_grid(*radii.tolist())
            ),
        }
        for num_samples in (1, 2, 4, 8)
    }


def draws():
    """NSO, and as many gradients at independent draws."""
    return {
        f"k = {k}": {
            "mirror image": METHODS[f"NSO, k = {k}"],
            "independent": Method(noise(2 * k), METHODS[f"NSO, k = {k}"].settings),
        }
        for k in (1, 2, 4)
    }


def regularizers():
    """SGD and NSO with weight decay, distance to the start, and shifted images."""
    link, settings = METHODS["NSO, k = 1"].link, METHODS["NSO, k = 1"].settings
    no_decay = grid(
        learning_rate=MANY_RATES,
        weight_decay=(0.0,),
        radius=(0.02, 0.05, 0.08, 0.12, 0.18, 0.25),
    )
    all_three = grid(
        learning_rate=RATES,
        weight_decay=DECAYS,
        distance_penalty=(1e-3, 3e-3, 1e-2, 3e-2),
    )
    all_four = grid(
        learning_rate=(0.05, 0.1, 0.2),
        weight_decay=(3e-3, 1e-2),
        distance_penalty=(3e-3, 1e-2),
        radius=NOISE,
    )
    return {
        "nothing": {"SGD": NO_DECAY, "NSO": Method(link, no_decay)},
        "decay": {"SGD": PLAIN, "NSO": Method(link, settings)},
        "distance": {
            "SGD": Method(None, at_start(PLAIN.settings)),
            "NSO": Method(link, at_start(settings)),
        },
        "shifts": {
            "SGD": Method(None, NO_DECAY.settings, shifted=True),
            "NSO": Method(link, no_decay, shifted=True),
        },
        "all three": {
            "SGD": Method(None, all_three, shifted=True),
            "NSO": Method(link, all_four, shifted=True),
        },
    }


def at_start(settings):
    """Weight decay towards the start in place of zero: a penalty on the distance."""
    return [
        setting | {"distance_penalty": setting["weight_decay"], "weight_decay": 0.0}
        for setting in settings
    ]


ABLATIONS = {"chunks": chunks, "draws": draws, "regularizers": regularizers}


class Training:
    """One network, and how to train many of it side by side."""

    def __init__(self, config, network):
        self.config = config
        self.model_fn, shapes = NETWORKS[network]
        self.initialize = jax.jit(functools.partial(initialize, shapes))
        self.problem = functools.cache(self._problem)
        self.num_steps = config.epochs * config.train_images // config.batch_size
        digits = common.split_digits(0, 0)
        self.validation, self.test = (
            jax.tree.map(jnp.asarray, digits[name]) for name in ("validation", "test")
        )

    def loss_fn(self, params, batch):
        images, labels = batch
        logits = self.model_fn(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def _problem(self, seed, label_noise):
        """Training data, start and batches of a seed."""
        config = self.config
        images, labels = common.split_digits(seed, config.train_images, label_noise)[
            "train"
        ]
        rng = np.random.default_rng(seed)
        orders = rng.permuted(
            np.tile(np.arange(len(images)), (config.epochs, 1)), axis=1
        )
        start = jax.tree.map(np.asarray, self.initialize(jax.random.key(seed)))
        return {
            "seed": np.int32(seed),
            "label_noise": np.float32(label_noise),
            "data": (images, labels),
            "batches": orders.reshape(-1, config.batch_size),
            "start": start,
        }

    def optimizer(self, method, run, num_steps):
        setting = run["setting"]

        def learning_rate(count):
            return (
                setting["learning_rate"] * (1 + jnp.cos(jnp.pi * count / num_steps)) / 2
            )

        links = [
            optax.add_decayed_weights(setting["weight_decay"]),
            optax.sgd(learning_rate, momentum=0.9),
        ]
        if method.link is not None:
            key = noise_key(run)
            links.insert(0, method.link(setting["radius"], key, self.num_steps))
        return optax.chain(*links)

    def step(self, method, run, num_steps, value_fn, carry, batch):
        params, state = carry
        setting = run["setting"]

        def loss_fn(params, batch):
            if "distance_penalty" not in setting:
                return value_fn(params, batch)
            distance = square_distance(params, run["start"])
            return value_fn(params, batch) + setting["distance_penalty"] * distance / 2

        tx = self.optimizer(method, run, num_steps)
        if method.link is None:
            grads, extra = jax.grad(loss_fn)(params, batch), {}
        else:
            grads, extra = None, {"value_fn": loss_fn, "batch": batch}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, static_argnums=(0, 1))
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def init(self, method, run):
        return run["start"], self.optimizer(method, run, 1).init(run["start"])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def advance(self, method, carry, runs, first, last, num_steps):
        """Steps ``first`` to ``last`` of all runs."""

        def one(carry, run):
            images, labels = run["data"]

            def body(index, carry):
                chosen = run["batches"][index]
                batch = images[chosen], labels[chosen]
                if method.shifted:
                    key = jax.random.fold_in(noise_key(run), index)
                    batch = shift(key, images[chosen]), labels[chosen]
                return self.step(method, run, num_steps, self.loss_fn, carry, batch)

            return jax.lax.fori_loop(first, last, body, carry)

        return jax.vmap(one)(carry, runs)

    def runs(self, chosen):
        """Runs side by side, from ``(setting, seed, label noise)`` of each."""
        trees = [
            self.problem(seed, share) | {"setting": setting}
            for setting, seed, share in chosen
        ]
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)

    def gradients_a_step(self, method):
        """Gradients of a batch a step, as flatopt counts those of single examples."""
        run = self.problem(0, 0.0) | {"setting": method.settings[0]}
        batch = jax.tree.map(lambda x: x[: self.config.batch_size], run["data"])
        carry = run["start"], self.optimizer(method, run, 1).init(run["start"])
        step = functools.partial(self.step, method, run, 1)
        return common.gradients_a_step(step, self.loss_fn, carry, batch)

    def settings(self, method):
        """The settings to choose from."""
        return method.settings[:: len(method.settings) // self.config.settings]

    def tune(self, method, num_steps, label_noise):
        """Mean validation accuracy of every setting."""
        settings = self.settings(method)
        seeds = range(TUNING_SEED, TUNING_SEED + self.config.tuning_seeds)
        chosen = itertools.product(settings, seeds, (label_noise,))
        runs = self.runs(list(chosen))
        carry = self.init(method, runs)
        params, _ = self.advance(method, carry, runs, 0, num_steps, num_steps)
        correct = self.correct(params, self.validation)
        return np.asarray(correct).reshape(len(settings), -1).mean(axis=1)

    def train(self, method, settings, num_steps):
        """Final runs of the settings chosen for each share of label noise."""
        config, shares = self.config, [*settings]
        seeds = range(1, 1 + config.seeds)
        runs = self.runs([(settings[p], s, float(p)) for p in shares for s in seeds])
        carry = self.init(method, runs)
        problems = {name: x for name, x in runs.items() if name != "setting"}
        curves, seconds = [self.look(carry[0], problems)], []
        marks = np.linspace(0, num_steps, config.points + 1).astype(int)
        for first, last in itertools.pairwise(marks.tolist()):
            start = time.perf_counter()
            carry = jax.block_until_ready(
                self.advance(method, carry, runs, first, last, num_steps)
            )
            seconds.append(time.perf_counter() - start)
            curves.append(self.look(carry[0], problems))
        found = {f"{k} curve": np.stack([c[k] for c in curves]).T for k in curves[0]}
        found |= self.measure(carry[0], problems)
        found["max_eigenvalue"] = self.max_eigenvalues(carry[0], problems)
        shape = len(shares), len(seeds)
        columns = jax.tree.map(
            lambda x: np.reshape(x, (*shape, *np.shape(x)[1:])), found
        )
        return {
            # Of one run, without compilation, which is in the first part.
            "seconds": float(np.median(seconds))
            * config.points
            / len(shares)
            / len(seeds),
            "runs": {
                p: {name: column[index] for name, column in columns.items()}
                for index, p in enumerate(shares)
            },
        }

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0, None))
    def correct(self, params, batch):
        images, labels = batch
        return (self.model_fn(params, images).argmax(axis=-1) == labels).mean()

    def trace(self, params, run, num_probes):
        # The same probes for all methods of a seed.
        hessian = flatopt.curvature.hessian(self.loss_fn, params, run["data"])
        return flatopt.curvature.trace(
            hessian, noise_key(run), num_probes, num_deflated=0
        )

    @functools.partial(jax.jit, static_argnums=0)
    def look(self, params, runs):
        def one(params, run):
            return {
                "loss": self.loss_fn(params, run["data"]),
                "trace": self.trace(params, run, 4).value,
            }

        found = jax.vmap(one)(params, runs)
        return found | {"test_accuracy": self.correct(params, self.test)}

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def measure(self, params, run):
        """Where a run ended. Gaps are to test labels as noisy as those of training."""
        train, share = run["data"], run["label_noise"]
        log_odds = jax.nn.log_softmax(self.model_fn(params, self.test[0]))
        losses = -jnp.take_along_axis(log_odds, self.test[1][:, None], axis=1)[:, 0]
        noisy_losses = (1 - share) * losses - share * log_odds.mean(axis=1)
        accuracy = (log_odds.argmax(axis=1) == self.test[1]).mean()
        noisy_accuracy = (1 - share) * accuracy + share / 10
        logits = self.model_fn(params, train[0])
        train_accuracy = (logits.argmax(axis=1) == train[1]).mean()
        train_loss = self.loss_fn(params, train)
        trace = self.trace(params, run, 64)
        return {
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": losses.mean(),
            "test_accuracy": accuracy,
            "loss_gap": noisy_losses.mean() - train_loss,
            "accuracy_gap": train_accuracy - noisy_accuracy,
            "largest_loss": -log_odds.min(),
            "trace": trace.value,
            "trace_error": trace.standard_error,
            "distance": square_distance(params, run["start"]) ** 0.5,
        }

    def max_eigenvalues(self, params, problems):
        """The largest eigenvalue of each network's Hessian, one after the other."""
        networks = jax.tree.map(np.asarray, (params, problems["data"]))
        return np.array(
            [
                self.max_eigenvalue(*jax.tree.map(operator.itemgetter(i), networks))
                for i in range(len(problems["seed"]))
            ]
        )

    def max_eigenvalue(self, params, data):
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            return np.nan
        hessian = flatopt.curvature.hessian(self.loss_fn, params, data)
        found = flatopt.curvature.eigenpairs(hessian, jax.random.key(0), rtol=1e-2)
        return found.values[0]


def noise_key(run):
    return jax.random.fold_in(jax.random.key(run["seed"]), 1)


def square_distance(tree, other):
    return optax.tree.norm(optax.tree.sub(tree, other), squared=True)


def shift(key, images):
    """Each image moved by up to a pixel in both directions, zeros moved in."""
    padded = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    offsets = jax.random.randint(key, (len(images), 2), 0, 3)
    moved = jax.vmap(lambda i, o: jax.lax.dynamic_slice(i, o, (8, 8)))(padded, offsets)
    return moved.reshape(images.shape)


# What is computed


def compute(config, piece):
    num_stages = len(config.networks) + len(config.ablations)
    with tqdm.tqdm(total=num_stages, unit="stage") as progress:
        trainings = {name: Training(config, name) for name in config.networks}
        networks = {}
        for name, training in trainings.items():
            progress.set_description(name)
            networks[name] = compare(config, piece, name, training)
            progress.update()
        training = trainings[config.networks[0]]
        ablations = {}
        for name in config.ablations:
            progress.set_description(name)
            rows = dict([*ABLATIONS[name]().items()][-config.rows :])
            ablations[name] = ablate(config, piece, name, training, rows)
            progress.update()
    return {
        "paper": PAPER,
        "num_settings": config.settings,
        "networks": without_seeds(networks),
        "over_cells": over_cells(networks),
        "nso_against": against_ascent(networks),
        "ablations": without_seeds(ablations),
        "bound": bounds(networks, config.train_images),
    }


def without_seeds(tree):
    """Results less the differences of single seeds, which follow from the runs."""
    if not isinstance(tree, dict):
        return tree
    return {n: without_seeds(branch) for n, branch in tree.items() if n != "by_seed"}


def compare(config, piece, network, training):
    """All methods of a network, at equal gradients and, where it differs, at equal epochs."""
    methods = {}
    chosen = {name: METHODS[name] for name in config.methods}
    run = functools.partial(choose, training, piece, network, config.label_noise)
    for name, method in (chosen | {"SGD, no decay": NO_DECAY}).items():
        methods[name] = run(name, method)
        if methods[name]["gradients_a_step"] > 1:
            methods[f"{name}, equal epochs"] = run(name, method, equal_epochs=True)
    settings = methods["NSO, k = 1, equal epochs"]["settings"]
    settings = {
        share: {n: v for n, v in setting.items() if n != "radius"}
        for share, setting in settings.items()
    }
    label = f"{network}, SGD, settings of NSO"
    methods["SGD, settings of NSO"] = finish(
        training, piece, label, PLAIN, settings, training.num_steps
    )
    return {
        "methods": {name: shortened(method) for name, method in methods.items()},
        "against_sgd": against_sgd(methods, methods["SGD"]),
    }


def shortened(method):
    """A method's results with means over seeds in place of each run's curves."""
    runs = {
        share: {
            name: np.mean(column, axis=0) if name.endswith("curve") else column
            for name, column in columns.items()
        }
        for share, columns in method["runs"].items()
    }
    return method | {"runs": runs}


def choose(training, piece, stage, shares, name, method, equal_epochs=False):
    """Choose a setting on validation data for each share of label noise, and train."""
    label = f"{stage}, {name}, equal {'epochs' if equal_epochs else 'gradients'}"
    cost = piece(f"{name}, cost", lambda: training.gradients_a_step(method))
    num_steps = training.num_steps if equal_epochs else int(training.num_steps / cost)
    tuned = {
        str(share): piece(
            f"{label}, tuning at noise {share}",
            functools.partial(training.tune, method, num_steps, share),
        )
        for share in shares
    }
    settings = {
        share: training.settings(method)[int(np.argmax(scores))]
        for share, scores in tuned.items()
    }
    found = finish(training, piece, label, method, settings, num_steps)
    return {"gradients_a_step": cost, "validation": tuned} | found


def finish(training, piece, label, method, settings, num_steps):
    found = piece(
        f"{label}, final", lambda: training.train(method, settings, num_steps)
    )
    summary = {
        share: {
            name: common.mean_and_error(column)
            for name, column in runs.items()
            if not name.endswith("curve")
        }
        | {
            "diverged": int(np.sum(~np.isfinite(runs["train_loss"]))),
            "stuck": int(np.sum(np.less(runs["test_accuracy"], 0.2))),
        }
        for share, runs in found["runs"].items()
    }
    return {"num_steps": num_steps, "settings": settings, "summary": summary} | found


def against_sgd(methods, base):
    """Differences and ratios seed by seed, for each method and share of label noise."""
    return {
        name: {
            "seconds_ratio": method["seconds"] / base["seconds"],
            "by_noise": {
                share: differences(runs, base["runs"][share])
                for share, runs in method["runs"].items()
            },
        }
        for name, method in methods.items()
    }


def differences(runs, base):
    level, trace = np.transpose(
        [
            at_matched_loss(*curves)
            for curves in zip(
                runs["loss curve"],
                runs["trace curve"],
                base["loss curve"],
                base["trace curve"],
                strict=True,
            )
        ]
    )
    by_seed = at_the_end(runs, base) | {"log matched_trace_ratio": np.log(trace)}
    return means_over_seeds(by_seed) | {
        "matched_loss": common.mean_and_error(level),
        "by_seed": by_seed,
    }


def at_the_end(runs, base):
    """Gains in accuracy and logarithms of ratios, seed by seed."""
    gain = np.subtract(runs["test_accuracy"], base["test_accuracy"])
    ratios = {
        f"log {name}_ratio": np.log(np.divide(runs[name], base[name]))
        for name in ("trace", "max_eigenvalue")
    }
    return {"accuracy_gain": gain} | ratios


def means_over_seeds(by_seed):
    """Means and errors; geometric means of ratios."""
    found = {}
    for name, values in by_seed.items():
        summary = common.mean_and_error(values)
        if name.startswith("log "):
            mean = np.exp(summary["mean"])
            summary |= {"mean": mean, "error": mean * summary["error"]}
        found[name.removeprefix("log ")] = summary
    return found


def at_matched_loss(loss, trace, base_loss, base_trace):
    """The lowest training loss both runs of a pair have passed, and the ratio of traces."""
    level = max(min(loss), min(base_loss))
    return level, trace_at(level, loss, trace) / trace_at(level, base_loss, base_trace)


def trace_at(level, loss, trace):
    """The trace where a run first passes a loss, interpolated in logarithms."""
    after = int(np.argmax(np.asarray(loss) <= level))
    before = max(after - 1, 0)
    log_losses = np.log([loss[after], loss[before]])
    log_traces = np.log(np.maximum([trace[after], trace[before]], 1e-3))
    return np.exp(np.interp(np.log(level), log_losses, log_traces))


def over_cells(networks):
    """Of each method, wins and losses beyond two standard errors, and means over cells."""
    groups = {name: [network] for name, network in networks.items()}
    groups["all"] = [*networks.values()]
    names = groups["all"][0]["against_sgd"]
    return {
        group: {
            name: summarize_cells(
                [
                    cell
                    for network in members
                    for cell in network["against_sgd"][name]["by_noise"].values()
                ]
            )
            for name in names
        }
        for group, members in groups.items()
    }


def summarize_cells(cells):
    gains = [cell["accuracy_gain"] for cell in cells]
    wins = sum(gain["mean"] > 2 * gain["error"] for gain in gains)
    losses = sum(gain["mean"] < -2 * gain["error"] for gain in gains)
    return {
        "wins": wins,
        "losses": losses,
        "ties": len(cells) - wins - losses,
        "largest_gain": max(gain["mean"] for gain in gains),
    } | means_over_cells([cell["by_seed"] for cell in cells])


def means_over_cells(cells):
    return means_over_seeds(
        {name: np.mean([cell[name] for cell in cells], axis=0) for name in cells[0]}
    )


def against_ascent(networks):
    """NSO with one pair against SAM and ASAM, which cost the same: means over cells."""
    first = next(iter(networks.values()))["methods"]
    return {
        f"{base}{mode}": means_over_cells(
            [
                at_the_end(runs, network["methods"][f"{base}{mode}"]["runs"][share])
                for network in networks.values()
                for share, runs in network["methods"][f"NSO, k = 1{mode}"][
                    "runs"
                ].items()
            ]
        )
        for base in ("SAM", "ASAM")
        for mode in ("", ", equal epochs")
        if base in first
    }


def ablate(config, piece, stage, training, table):
    """Each method of a table, and against the first of its row and of its column."""
    shares = (config.ablation_noise,)
    found = {
        row: {
            name: choose(training, piece, stage, shares, f"{row}, {name}", method)
            for name, method in methods.items()
        }
        for row, methods in table.items()
    }
    top = next(iter(found.values()))
    return {
        row: {
            name: {key: method[key] for key in ("gradients_a_step", "settings")}
            | {
                "summary": only(method["summary"]),
                "against_first": compared(method, next(iter(methods.values()))),
                "against_top": compared(method, top[name]),
            }
            for name, method in methods.items()
        }
        for row, methods in found.items()
    }


def compared(method, base):
    return differences(only(method["runs"]), only(base["runs"]))


def only(values):
    (value,) = values.values()
    return value


def bounds(networks, num_images):
    """The shape of a PAC-Bayes bound with tr H, against the gaps of all final runs."""
    groups = {name: cells_of(network, num_images) for name, network in networks.items()}
    groups["all"] = [cell for cells in groups.values() for cell in cells]
    found = {}
    for name, cells in groups.items():
        whole = join(cells)
        found[name] = {
            "runs": len(whole["loss_gap"]),
            "largest_loss": np.max(whole["largest_loss"]),
            "bound": common.mean_and_error(whole["bound"]),
            "loss_gap": common.mean_and_error(whole["loss_gap"]),
            "median_ratio": np.median(whole["bound"] / whole["loss_gap"]),
            "violated": int(np.sum(whole["bound"] < whole["loss_gap"])),
            "kendall": kendall(whole),
            "kendall_within_cells": jax.tree.map(
                lambda *taus: np.mean(taus), *map(kendall, cells)
            ),
        }
    return found


def kendall(runs):
    """Kendall's tau of three measures with both gaps."""
    return {
        measure: {
            gap: scipy.stats.kendalltau(runs[measure], runs[gap]).statistic
            for gap in ("loss_gap", "accuracy_gap")
        }
        for measure in ("bound", "trace", "distance")
    }


def join(cells):
    return {key: np.concatenate([cell[key] for cell in cells]) for key in cells[0]}


def cells_of(network, num_images):
    """The final runs of all methods, for each share of label noise."""
    methods = network["methods"].values()
    keys = ("trace", "distance", "loss_gap", "accuracy_gap", "largest_loss")
    cells = [
        join([{key: method["runs"][share][key] for key in keys} for method in methods])
        for share in next(iter(methods))["runs"]
    ]
    constant = max(cell["largest_loss"].max() for cell in cells)
    for cell in cells:
        squared = constant * np.maximum(cell["trace"], 0) / num_images
        cell["bound"] = cell["distance"] * np.sqrt(squared)
    return cells


# Figure and table


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    draw_methods(axes[0], results, "accuracy_gain", 100)
    draw_methods(axes[1], results, "matched_trace_ratio", 1)
    axes[0].set_xscale("symlog", linthresh=3)
    axes[0].set_xlim(-25, 4)
    set_ticks(axes[0], (-20, -10, -5, -2, 0, 2))
    axes[0].axvline(0, color="black", linestyle=":")
    axes[0].set_xlabel("test accuracy less SGD's, percentage points")
    axes[1].set_xscale("log")
    axes[1].set_xlim(0.28, 4.5)
    set_ticks(axes[1], (0.3, 0.5, 0.7, 1, 1.5, 2))
    axes[1].axvline(1, color="black", linestyle=":")
    axes[1].set(xlabel="trace over SGD's at the same training loss", yticks=[])
    axes[1].legend(fontsize=8, loc="upper right")
    for name, network in results["networks"].items():
        found = join(cells_of(network, report["settings"]["train_images"]))
        axes[2].plot(found["bound"], found["loss_gap"], ".", alpha=0.3, label=name)
    axes[2].axline((1, 1), slope=1, color="black", linestyle=":", label="equal")
    axes[2].set(
        xlabel=r"shape of the bound, $\sqrt{C\,\mathrm{tr}H\,r^2/n}$",
        ylabel="test loss less training loss",
        xscale="log",
        yscale="log",
    )
    axes[2].legend(fontsize=8, loc="lower left")
    return figure


def set_ticks(axis, ticks):
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def draw_methods(axis, results, key, factor):
    """Every cell of a method as a point of its network, and the mean over cells."""
    means = {n: row for n, row in results["over_cells"]["all"].items() if n != "SGD"}
    for index, (name, network) in enumerate(results["networks"].items()):
        points = [
            (factor * cell[key]["mean"], row)
            for row, method in enumerate(means)
            for cell in network["against_sgd"][method]["by_noise"].values()
        ]
        axis.plot(
            *np.transpose(points), "os"[index], alpha=0.6, markersize=4, label=name
        )
    axis.errorbar(
        [factor * row[key]["mean"] for row in means.values()],
        range(len(means)),
        xerr=[2 * factor * row[key]["error"] for row in means.values()],
        fmt="kD",
        capsize=3,
        markersize=4,
        label="mean ± 2 errors",
    )
    axis.set_yticks(range(len(means)), means)
    axis.invert_yaxis()


def main(config):
    report = common.run("generalisation", common.prepare(config, SMOKE), compute, draw)
    for name, row in report["results"]["over_cells"]["all"].items():
        gain, trace = row["accuracy_gain"], row["trace_ratio"]
        print(
            f"{name:26} wins {row['wins']}, losses {row['losses']}, ties {row['ties']}, "
            f"accuracy {100 * gain['mean']:+.2f} ± {100 * gain['error']:.2f}, "
            f"trace over SGD's {trace['mean']:.2f} ± {trace['error']:.2f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
