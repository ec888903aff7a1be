"""CIFAR-10: the LPF-SGD paper's comparison and NSO's fine-tuning, at equal budgets.

First the setting of the LPF-SGD paper (arXiv 2201.08025) without augmentation, its
hyper-parameters kept, for a small network and few images. Then that of NSO (arXiv
2306.08553): pre-trained on five classes, all weights fine-tuned on a few images of the
other five. Every method gets the same number of gradients of single images, counted by
flatopt, and the same number of settings to choose from on validation images.

ResNet-18 on all of CIFAR-10, for an accelerator:
python examples/reproduce/cifar10.py --data-dir FOLDER --width 64 --blocks 2 2 2 2
--dtype bfloat16 --num-images 50000 --num-train 45000 --num-validation 5000
--num-test 10000 --epochs 30 --pretraining-epochs 20 --finetuning-epochs 30
--curvature-images 2000
"""

import dataclasses
import functools
import hashlib
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Literal

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx
from sklearn.datasets import load_digits

import flatopt
from flatopt import curvature, kernels, sharpness

sys.path.append(str(common.ROOT / "examples"))
import cifar10_data
import resnet

TUNING_SEED = 100
RISE = 0.05  # scale of the noise under which the rise of the loss is measured
FILTERWISE = kernels.filterwise()
FLATNESS = (
    "trace",
    "trace_error",
    "max_eigenvalue",
    "max_eigenvalue_error",
    "rise",
    "rise_error",
)
MEASURES = ("train_loss", "train_error", "test_loss", "test_error", *FLATNESS)

# Errors of ResNet-18 after 200 epochs of all of CIFAR-10, five seeds, with the
# hyper-parameters used here: LPF-SGD's authors (arXiv 2201.08025, their logs), M = 1;
# gamma and its growth for M = 8 are those of their experiments with augmentation. NSO:
# abstract of arXiv 2306.08553, larger networks pre-trained on other data.
PAPER = {
    "error": {"SGD": 0.1149, "SAM": 0.10, "LPF-SGD": 0.0904},
    "deviation": {"SGD": 0.0044, "SAM": 0.0018, "LPF-SGD": 0.0021},
    "rho": 0.05,
    "gamma": 0.002,
    "chunks": 8,
    "gamma_of_chunks": 5e-4,
    "growth": 15,
    "sigma": 0.01,
    "weight_decay": 5e-4,
    "accuracy_gain": 0.024,
    "trace_reduction": 0.158,
    "max_eigenvalue_reduction": 0.097,
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    data_dir: pathlib.Path | None = None
    """Folder of CIFAR-10: binary files, Python pickles or parquet files. Without it,
    tensorflow_datasets or datasets; with --smoke, scikit-learn's digits enlarged."""
    seeds: int = 3
    """Number of runs: start, batches and noise change, the images stay."""
    num_images: int = 10_000
    """Images to read of the training file: the first train, the next validate; those of
    the first five classes pre-train."""
    num_train: int = 2000
    """Training images."""
    num_validation: int = 2000
    """Validation images."""
    num_test: int = 5000
    """Test images."""
    methods: tuple[str, ...] = ()
    """Methods to run, by their names in the figure, SGD and those whose settings others
    take among them. Default: all."""
    images_a_class: int = 100
    """Training images of each class to fine-tune on."""
    width: int = 8
    """Channels of the network's first stage."""
    blocks: tuple[int, ...] = (1, 1, 1)
    """Blocks of each stage; 2 2 2 2 is ResNet-18."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What to train in; parameters, their updates and all measurements are in float32."""
    epochs: int = 8
    """Gradients of each training image to spend on the paper's comparison."""
    pretraining_epochs: int = 4
    """Passes over the images of the first five classes."""
    finetuning_epochs: int = 15
    """Gradients of each training image to spend on fine-tuning."""
    batch_size: int = 128
    """Images a step; in fine-tuning a quarter of them."""
    curvature_images: int = 100
    """Training images to measure trace and largest eigenvalue on."""
    num_probes: int = 16
    """Random vectors for the trace, beside four leading directions."""


SMOKE = {
    "methods": (
        "SGD",
        "label smoothing",
        "LPF-SGD, M = 8",
        "SGD at the rate of M = 8",
        "NSO",
    ),
    "seeds": 2,
    "num_images": 200,
    "num_train": 48,
    "num_validation": 40,
    "num_test": 40,
    "images_a_class": 3,
    "width": 4,
    "blocks": (),
    "epochs": 2,
    "pretraining_epochs": 1,
    "finetuning_epochs": 2,
    "batch_size": 16,
    "curvature_images": 8,
    "num_probes": 2,
}


# Data


FIRST, LAST = range(5), range(5, 10)


def load(config):
    """Splits of (images, labels)."""
    if config.smoke and config.data_dir is None:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).repeat(4, 1).repeat(4, 2).repeat(3, 3)
        images, labels = (16 * images).clip(0, 255).astype(np.uint8), labels
        parts = (
            np.split(images, [config.num_images]),
            np.split(labels, [config.num_images]),
        )
        read, test = zip(*parts, strict=True)
        test = [part[: config.num_test] for part in test]
    else:
        data = cifar10_data.load(config.data_dir, config.num_images, config.num_test)
        read, test = (
            (data[name]["images"], data[name]["labels"]) for name in ("train", "test")
        )
    size = config.num_train + config.num_validation
    return {
        "read": read,
        "train": [part[: config.num_train] for part in read],
        "validation": [part[config.num_train : size] for part in read],
        "test": test,
    }


def of_classes(split, classes, count=None):
    """Images of these classes, at most ``count`` of each."""
    images, labels = split
    places = [np.flatnonzero(labels == name)[:count] for name in classes]
    chosen = np.sort(np.concatenate(places))
    return images[chosen], labels[chosen]


# Network


MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class Network:
    """A residual network as functions of its parameters.

    A training step computes the statistics of BatchNorm from what it sees; those to
    evaluate with come from a pass over the training images after training.
    """

    def __init__(self, config):
        self.config = config
        key = jax.random.key(0)
        self.graphdef, _, self.statistics = self.split(self.make(key, config.dtype))
        view = nnx.view(self.make(key, "float32"), use_running_average=True)
        self.evaluation_graphdef = self.split(view)[0]

    @functools.partial(nnx.jit, static_argnums=(0, 2))
    def make(self, key, dtype):
        width, blocks = self.config.width, self.config.blocks
        model = resnet.ResNet(width, blocks, jnp.dtype(dtype), nnx.Rngs(key))
        # A forward pass leaves the statistics of its batch.
        model.set_attributes(nnx.BatchNorm, momentum=0.0)
        return model

    @staticmethod
    def split(model):
        return nnx.split(model, nnx.Param, ...)

    def start(self, seed):
        return self.split(self.make(jax.random.key(seed), "float32"))[1]

    def loss_fn(self, params, batch):
        images, targets = batch
        model = nnx.merge(self.graphdef, params, self.statistics, copy=True)
        return loss_of(model, images, targets)

    def evaluation_loss_fn(self, params, batch):
        """The loss with the statistics that each row of the batch repeats."""
        images, targets, rows = batch
        statistics = jax.tree.map(lambda row: row[0], rows)
        model = nnx.merge(self.evaluation_graphdef, params, statistics, copy=True)
        return loss_of(model, images, targets)

    @functools.partial(jax.jit, static_argnums=0)
    def statistics_of(self, params, images):
        model = nnx.merge(self.graphdef, params, self.statistics, copy=True)
        model(normalize(images))
        return self.split(model)[2]

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(self, params, statistics, images, labels):
        model = nnx.merge(self.evaluation_graphdef, params, statistics, copy=True)
        logits = model(normalize(images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([losses.sum(), jnp.sum(logits.argmax(axis=1) != labels)])

    def mean_statistics(self, params, images, size=250):
        """Statistics of BatchNorm: the mean of those of batches."""
        starts = range(0, max(1, len(images) - size + 1), size)
        found = [self.statistics_of(params, images[s : s + size]) for s in starts]
        return jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)

    def loss_and_error(self, params, statistics, split, size=250):
        images, labels = split
        total = sum(
            self.evaluate(
                params, statistics, images[s : s + size], labels[s : s + size]
            )
            for s in range(0, len(labels), size)
        )
        return np.asarray(total) / len(labels)


def one_hot(labels, smoothing=0.0):
    return (1 - smoothing) * np.eye(10, dtype=np.float32)[labels] + smoothing / 10


def normalize(images):
    return (images / 255.0 - jnp.array(MEAN)) / jnp.array(STD)


def loss_of(model, images, targets):
    return optax.softmax_cross_entropy(model(normalize(images)), targets).mean()


# Methods: SGD with momentum behind another first link


def sgd(setting, rate, num_steps, weight_decay, key):
    del setting, num_steps, key
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, 0.9))


def sam(setting, rate, num_steps, **options):
    del num_steps
    return flatopt.sam_sgd(rate, setting["rho"], **options)


def asam(setting, rate, num_steps, **options):
    del num_steps
    return flatopt.asam_sgd(rate, setting["rho"], **options)


def nso(setting, rate, num_steps, **options):
    del num_steps
    return flatopt.nso_sgd(rate, setting["sigma"], **options)


def lpf(setting, rate, num_steps, **options):
    del num_steps
    return flatopt.lpf_sgd(rate, setting["gamma"], 1, **options)


def lpf_in_chunks(setting, rate, num_steps, **options):
    gamma = flatopt.schedules.cosine_growth(
        setting["gamma"], PAPER["growth"], num_steps
    )
    return flatopt.lpf_sgd(rate, gamma, PAPER["chunks"], **options)


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """An optimizer, the settings to choose from, or whose to take, and its budget."""

    make: Callable
    settings: list[dict[str, float]] = dataclasses.field(default_factory=list)
    tuned_as: str = ""
    budget: int = 1


def grid(rates, **scales):
    """Every learning rate with every scale."""
    decay = PAPER["weight_decay"]
    settings = [{"weight_decay": decay, "learning_rate": rate} for rate in rates]
    for name, values in scales.items():
        settings = [s | {name: value} for s in settings for value in values]
    return settings


COMPARISON_RATES = (0.1, 0.2, 0.4)
COMPARISON = {
    "SGD": Method(sgd, grid(COMPARISON_RATES)),
    "SAM": Method(sam, grid(COMPARISON_RATES, rho=(PAPER["rho"],))),
    "LPF-SGD": Method(lpf, grid(COMPARISON_RATES, gamma=(PAPER["gamma"],))),
    "LPF-SGD, M = 8": Method(
        lpf_in_chunks, grid(COMPARISON_RATES, gamma=(PAPER["gamma_of_chunks"],))
    ),
    "SGD at the rate of M = 8": Method(sgd, tuned_as="LPF-SGD, M = 8"),
    "NSO": Method(nso, grid(COMPARISON_RATES, sigma=(PAPER["sigma"],))),
    "SAM, twice the budget": Method(sam, tuned_as="SAM", budget=2),
    "NSO, twice the budget": Method(nso, tuned_as="NSO", budget=2),
}
FINETUNING_RATES = (0.1, 0.2)
FINETUNING = {
    "SGD": Method(sgd, grid(FINETUNING_RATES, weight_decay=(5e-4, 5e-3))),
    "label smoothing": Method(sgd, grid(FINETUNING_RATES, smoothing=(0.2, 0.4))),
    "SAM": Method(sam, grid(FINETUNING_RATES, rho=(0.02, 0.1))),
    "ASAM": Method(asam, grid(FINETUNING_RATES, rho=(0.1, 0.5))),
    "LPF-SGD": Method(lpf, grid(FINETUNING_RATES, gamma=(0.002, 0.02))),
    "NSO": Method(nso, grid(FINETUNING_RATES, sigma=(0.01, 0.03))),
    "SGD at the decay of NSO": Method(sgd, tuned_as="NSO"),
    "NSO, twice the budget": Method(nso, tuned_as="NSO", budget=2),
    "SAM, twice the budget": Method(sam, tuned_as="SAM", budget=2),
}
PRETRAINING = {"learning_rate": 0.1, "weight_decay": PAPER["weight_decay"]}


# Training


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What to train on, and how long."""

    network: Network
    splits: dict
    start: Callable
    batch_size: int
    epochs: int

    @property
    def budget(self):
        """Gradients of single images."""
        return self.epochs * len(self.splits["train"][1])

    def num_steps(self, share):
        return int(share * self.budget / self.batch_size)


def make_optimizer(make, setting, num_steps, key):
    shape = optax.cosine_decay_schedule(1.0, num_steps)
    return make(
        setting,
        lambda count: setting["learning_rate"] * shape(count),
        num_steps,
        weight_decay=setting["weight_decay"],
        key=key,
    )


def step(make, tx, value_fn, carry, batch):
    params, state = carry
    if make is sgd:
        grads, extra = jax.grad(value_fn)(params, batch), {}
    else:
        grads = optax.tree.zeros_like(params)  # not read
        extra = {"value_fn": value_fn, "batch": batch}
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def advance(make, network, num_steps, carry, setting, batch):
    tx = make_optimizer(make, setting, num_steps, 0)
    return step(make, tx, network.loss_fn, carry, batch)


def gradients_a_step(make, setting, network):
    """Gradients of a batch a step, as flatopt counts those of single images."""
    tx = make_optimizer(make, setting, 100, 0)
    params = network.start(0)
    size = PAPER["chunks"]
    batch = jnp.zeros((size, 32, 32, 3)), jnp.zeros((size, 10))
    return common.gradients_a_step(
        functools.partial(step, make, tx),
        network.loss_fn,
        (params, tx.init(params)),
        batch,
    )


def batches(task, num_steps, seed, smoothing):
    """Batches of (images, targets), epoch after epoch in random order."""
    images, labels = task.splits["train"]
    targets = one_hot(labels, smoothing)
    whole = len(labels) // task.batch_size * task.batch_size
    num_epochs = -(-num_steps * task.batch_size // whole)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(labels))[:whole] for _ in range(num_epochs)]
    places = np.concatenate(orders).reshape(-1, task.batch_size)[:num_steps]
    return ((images[chosen], targets[chosen]) for chosen in places)


def train(task, make, setting, seed, num_steps):
    """The parameters after training once."""
    carry = start_of(task, make, setting, seed, num_steps)
    scales = scales_of(setting)
    for batch in batches(task, num_steps, seed, setting.get("smoothing", 0.0)):
        carry = advance(make, task.network, num_steps, carry, scales, batch)
    return jax.block_until_ready(carry[0])


def start_of(task, make, setting, seed, num_steps):
    params = task.start(seed)
    tx = make_optimizer(make, setting, num_steps, jax.random.key(seed))
    return params, tx.init(params)


def scales_of(setting):
    return {n: jnp.float32(value) for n, value in setting.items() if n != "smoothing"}


def seconds_over_sgd(task, methods, num_steps, rounds=8):
    """Of a step, the median over rounds in which each method has its turn."""
    steps = {}
    for name, method in methods.items():
        setting, count = method.settings[0], num_steps[name]
        carry = start_of(task, method.make, setting, TUNING_SEED, count)
        batch = next(batches(task, 1, TUNING_SEED, 0.0))
        arguments = (method.make, task.network, count, carry, scales_of(setting), batch)
        steps[name] = functools.partial(advance, *arguments)
        jax.block_until_ready(steps[name]())  # compiles
    seconds = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {n: np.median(np.divide(s, seconds["SGD"])) for n, s in seconds.items()}


def measure(task, config, params):
    """Losses and errors, and how flat the training loss is."""
    network, (images, labels) = task.network, task.splits["train"]
    statistics = network.mean_statistics(params, images)
    found = {}
    for name in ("train", "test"):
        loss, error = network.loss_and_error(params, statistics, task.splits[name])
        found |= {f"{name}_loss": loss, f"{name}_error": error}
    if not np.isfinite(found["train_loss"]):
        return found | dict.fromkeys(FLATNESS, np.nan)
    count = min(config.curvature_images, len(labels))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), statistics)
    batch = images[:count], one_hot(labels[:count]), rows
    operator = curvature.hessian(network.evaluation_loss_fn, params, batch)
    key = jax.random.key(0)
    trace = curvature.trace(operator, key, config.num_probes, num_deflated=4)
    top = curvature.eigenpairs(operator, key, rtol=0.02)
    rise = sharpness.low_pass(
        network.evaluation_loss_fn,
        params,
        key,
        sigma=RISE,
        num_samples=config.num_probes,
        kernel=FILTERWISE,
        data=batch,
    )
    values = (
        trace.value,
        trace.standard_error,
        top.values[0],
        top.residuals[0],
        rise.value,
        rise.standard_error,
    )
    return found | dict(zip(FLATNESS, values, strict=True))


def error_of(task, params, name):
    statistics = task.network.mean_statistics(params, task.splits["train"][0])
    return task.network.loss_and_error(params, statistics, task.splits[name])[1]


class Tasks:
    """The paper's comparison, pre-training and fine-tuning."""

    def __init__(self, config, data):
        self.network = Network(config)
        splits = {name: data[name] for name in ("train", "validation", "test")}
        first = {
            "train": of_classes(data["read"], FIRST),
            "test": of_classes(data["test"], FIRST),
        }
        last = {name: of_classes(split, LAST) for name, split in splits.items()}
        last["train"] = of_classes(data["train"], LAST, config.images_a_class)
        start, size = self.network.start, config.batch_size
        make = functools.partial(Task, self.network)
        self.comparison = make(splits, start, size, config.epochs)
        self.pretraining = make(first, start, size, config.pretraining_epochs)
        self.finetuning = make(
            last, self.with_new_head, size // 4, config.finetuning_epochs
        )
        self.pretrained = functools.cache(self._pretrained)

    def _pretrained(self, seed):
        num_steps = self.pretraining.num_steps(1)
        return train(self.pretraining, sgd, PRETRAINING, seed, num_steps)

    def with_new_head(self, seed):
        """Parameters of pre-training, trained again if lost, but for the last layer."""
        return jax.tree_util.tree_map_with_path(
            lambda path, old, new: new if "head" in jax.tree_util.keystr(path) else old,
            self.pretrained(seed),
            self.network.start(seed),
        )


def compute(config, piece):
    try:
        data = load(config)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    tasks = Tasks(config, data)
    comparison, finetuning = (
        {n: m for n, m in methods.items() if n in config.methods or not config.methods}
        for methods in (COMPARISON, FINETUNING)
    )
    total = sum(
        task.budget * method.budget * (len(method.settings) + config.seeds)
        for task, methods in (
            (tasks.comparison, comparison),
            (tasks.finetuning, finetuning),
        )
        for method in methods.values()
    )
    with tqdm.tqdm(total=total, unit="gradient", unit_scale=True) as progress:
        stage = functools.partial(run_stage, config, piece, progress)
        comparison = stage("comparison", tasks.comparison, comparison)
        pretraining = [
            piece(
                f"pre-training, seed {seed}",
                lambda seed=seed: error_of(
                    tasks.pretraining, tasks.pretrained(seed), "test"
                ),
            )
            for seed in range(1, 1 + config.seeds)
        ]
        finetuning = stage("fine-tuning", tasks.finetuning, finetuning)
    return {
        "paper": PAPER,
        "sha256": {
            name: hashlib.sha256(data[name][0].tobytes()).hexdigest()
            for name in ("read", "test")
        },
        "parameters": sum(x.size for x in jax.tree.leaves(tasks.comparison.start(0))),
        "images": {
            name: {split: len(part[1]) for split, part in task.splits.items()}
            for name, task in vars(tasks).items()
            if isinstance(task, Task)
        },
        "comparison": comparison,
        "pretraining": {"test_error": common.mean_and_error(pretraining)},
        "finetuning": finetuning,
    }


def run_stage(config, piece, progress, stage, task, methods):
    """Choose a setting for every method on validation images, then train all seeds."""

    def run(name, setting, seed, look):
        method = methods[name]
        progress.set_description(f"{stage}, {name}")

        def compute():
            params = train(task, method.make, setting, seed, num_steps[name])
            return {"steps": num_steps[name]} | look(params)

        found = piece(f"{stage}, {name}, {setting}, seed {seed}", compute)
        progress.update(task.budget * method.budget)
        return found

    def validate(params):
        return {"error": error_of(task, params, "validation")}

    found, num_steps = {}, {}
    for name, method in methods.items():
        settings = method.settings or [found[method.tuned_as]["setting"]]
        cost = piece(
            f"cost of {method.make.__name__}",
            functools.partial(gradients_a_step, method.make, settings[0], task.network),
        )
        num_steps[name] = task.num_steps(method.budget / cost)
        tuned = [
            run(name, setting, TUNING_SEED, validate)["error"]
            for setting in method.settings
        ]
        best = settings[int(np.argmin(tuned))] if tuned else settings[0]
        found[name] = {
            "gradients_a_step": cost,
            "budget": task.budget * method.budget,
            "tuning": tuned,
            "settings": method.settings,
            "setting": best,
            "runs": [
                run(name, best, seed, functools.partial(measure, task, config))
                for seed in range(1, 1 + config.seeds)
            ],
        }
    seconds = piece(
        f"{stage}, seconds",
        functools.partial(
            seconds_over_sgd,
            task,
            {n: m for n, m in methods.items() if not m.tuned_as},
            num_steps,
        ),
    )
    return {"methods": found, "seconds_over_sgd": seconds} | summarize(found)


def summarize(found):
    """Means and errors over seeds, and against SGD seed by seed."""
    columns = {
        name: {key: np.array([run[key] for run in method["runs"]]) for key in MEASURES}
        for name, method in found.items()
    }
    return {
        "summary": {
            name: {key: common.mean_and_error(column[key]) for key in MEASURES}
            | {"diverged": int(np.sum(~np.isfinite(column["train_loss"])))}
            for name, column in columns.items()
        },
        "against": {
            base: {
                name: against(column, columns[base]) for name, column in columns.items()
            }
            for base in columns
            if base.startswith("SGD")
        },
    }


def against(column, base):
    ratios = {
        f"{key}_ratio": common.mean_and_error(column[key] / base[key])
        for key in ("trace", "max_eigenvalue", "rise")
    }
    difference = column["test_error"] - base["test_error"]
    return {"error_difference": common.mean_and_error(difference)} | ratios


def draw(report):
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    results = report["results"]
    stages = {"comparison": "ten classes", "finetuning": "fine-tuning"}
    rows = [(stage, name) for stage in stages for name in results[stage]["methods"]]
    for axis, (stage, title) in zip(axes, stages.items(), strict=False):
        names = [name for at, name in rows if at == stage]
        for row, name in enumerate(names):
            runs = results[stage]["methods"][name]["runs"]
            errors = [100 * run["test_error"] for run in runs]
            axis.plot(errors, [row] * len(errors), "o", color="C0", alpha=0.4)
            axis.plot(np.mean(errors), row, "|", color="black", markersize=14)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(xlabel="test error (%)", title=title)
        axis.invert_yaxis()
    for key, label, shift in (
        ("trace", "trace", -0.15),
        ("max_eigenvalue", "largest eigenvalue", 0.15),
    ):
        ratios = [
            results[at]["against"]["SGD"][name][f"{key}_ratio"] for at, name in rows
        ]
        axes[2].errorbar(
            [ratio["mean"] for ratio in ratios],
            np.arange(len(rows)) + shift,
            xerr=[ratio["error"] for ratio in ratios],
            fmt="o",
            markersize=4,
            label=label,
        )
    labels = [f"{name} ({stages[stage]})" for stage, name in rows]
    axes[2].set_yticks(range(len(rows)), labels, fontsize=7)
    axes[2].axvline(1, color="black", linestyle=":")
    axes[2].set(xlabel="over SGD's", title="Hessian of the training loss")
    axes[2].legend(fontsize=8)
    axes[2].invert_yaxis()
    return figure


def main(config):
    report = common.run("cifar10", common.prepare(config, SMOKE), compute, draw)
    common.print_summaries(
        report["results"],
        ("comparison", "finetuning"),
        ("test_error", "train_loss", "trace", "max_eigenvalue"),
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
