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
from typing import Literal

import common
import jax
import matplotlib.pyplot as plt
import numpy as np
from common import Method, figures, methods, statistics
from common.data import digits_as_photographs, of_classes
from common.residual import MEASURES, Network, Task, gradients_of, sgd

import flatopt

sys.path.append(str(common.ROOT / "examples"))
import cifar10_data

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
        whole = digits_as_photographs()
        read = [part[: config.num_images] for part in whole]
        test = [part[config.num_images :][: config.num_test] for part in whole]
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


# Methods: SGD with momentum behind another first link


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


def grid(rates, **scales):
    """Every learning rate with every scale, at the papers' weight decay."""
    decay = {"weight_decay": PAPER["weight_decay"]}
    return [decay | found for found in common.grid(learning_rate=rates, **scales)]


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
        return self.pretraining.train(sgd, PRETRAINING, seed, num_steps)

    def error_before(self, seed):
        """The error of pre-training on its own five classes."""
        return self.pretraining.error(self.pretrained(seed), "test")

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
        {n: m for n, m in table.items() if n in config.methods or not config.methods}
        for table in (COMPARISON, FINETUNING)
    )
    total = tasks.comparison.budget * methods.num_runs(comparison, config.seeds)
    total += tasks.finetuning.budget * methods.num_runs(finetuning, config.seeds)
    with common.shown(piece, total, "gradient") as piece:
        stage = functools.partial(run_stage, config, piece)
        comparison = stage("comparison", tasks.comparison, comparison)
        pretraining = [
            piece(
                f"pre-training, seed {seed}",
                functools.partial(tasks.error_before, seed),
                size=0,
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


def run_stage(config, piece, stage, task, methods):
    """Choose a setting for every method on validation images, then train all seeds."""

    def steps(method, cost):
        return task.num_steps(method.budget / cost)

    def train(method, setting, seed, cost):
        return task.train(method.make, setting, seed, steps(method, cost))

    def measured(method, setting, seed, cost):
        params = train(method, setting, seed, cost)
        found = task.measure(params, config.curvature_images, config.num_probes)
        return {"steps": steps(method, cost)} | found

    found = common.compare(
        piece,
        stage,
        methods,
        config.seeds,
        task.budget,
        lambda method, setting: gradients_of(method.make, setting, task.network),
        lambda *run: task.error(train(*run), "validation"),
        measured,
    )
    timed = {name: method for name, method in methods.items() if not method.tuned_as}
    counts = {n: steps(m, found[n]["gradients_a_step"]) for n, m in timed.items()}
    measure = functools.partial(task.seconds_over_sgd, timed, counts)
    seconds = piece(f"{stage}, seconds", measure, size=0)
    return {"methods": found, "seconds_over_sgd": seconds} | summarize(found)


def summarize(found):
    """Means and errors over seeds, and against SGD seed by seed."""
    runs = statistics.runs_of(found)
    return {
        "summary": statistics.summaries(runs, MEASURES, finite="train_loss"),
        "against": {
            base: {
                name: against(*tables)
                for name, tables in statistics.pairs(runs, base).items()
            }
            for base in found
            if base.startswith("SGD")
        },
    }


def against(own, base):
    columns = {"error_difference": own["test_error"] - base["test_error"]}
    for key in ("trace", "max_eigenvalue", "rise"):
        columns[f"{key}_ratio"] = own[key] / base[key]
    return statistics.columns_of(columns)


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
        figures.set_rows(axis, names, fontsize=8)
        axis.set(xlabel="test error (%)", title=title)
    for key, label, shift in (
        ("trace", "trace", -0.15),
        ("max_eigenvalue", "largest eigenvalue", 0.15),
    ):
        ratios = [
            results[at]["against"]["SGD"][name][f"{key}_ratio"] for at, name in rows
        ]
        places = np.arange(len(rows)) + shift
        figures.means(axes[2], places, ratios, fmt="o", markersize=4, label=label)
    labels = [f"{name} ({stages[stage]})" for stage, name in rows]
    figures.set_rows(axes[2], labels, fontsize=7)
    axes[2].axvline(1, color="black", linestyle=":")
    axes[2].set(xlabel="over SGD's", title="Hessian of the training loss")
    axes[2].legend(fontsize=8)
    return figure


def lines(report):
    columns = "test_error", "train_loss", "trace", "max_eigenvalue"
    stages = "comparison", "finetuning"
    return statistics.summary_lines(report["results"], stages, columns)


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
