"""A small Transformer on real text: AdamW, LPF-AdamW and NSO-AdamW at equal budgets.

Pre-trains a causal Transformer on characters with each method, then fine-tunes that of
AdamW on a little text of another kind, with and without NSO, all weights or LoRA matrices
alone. Every method gets the same number of gradients of single examples, counted by
flatopt, and the same number of settings to choose from on a validation split.
"""

import dataclasses
import functools
import hashlib
import operator
import pathlib
import platform
import time

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import figures, methods, statistics
from common.language import LIBRARY, Method, Network
from common.text import read, split
from flax import nnx

import flatopt

# Of the papers, for other networks and data: nothing here is of this size. LPF-Adam in
# machine translation, section 5 of arXiv 2201.08025: chunks, gamma and its growth; NSO,
# abstract of arXiv 2306.08553: the trace is smaller by this share.
PAPER = {"chunks": 8, "gamma": 5e-4, "growth": 15, "trace_reduction": 0.158}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    text: pathlib.Path | None = None
    """A text file, or a folder of Python files. Default: Python's standard library."""
    shifted: pathlib.Path | None = None
    """The text to fine-tune on. Default: the library's help texts (pydoc_data)."""
    seeds: int = 3
    """Number of runs: start, batches and noise change, the texts stay."""
    pretraining: int = 400
    """Gradients of a batch to pre-train with."""
    finetuning: int = 160
    """Gradients of a batch to fine-tune with."""
    train_characters: int = 100_000
    """Size of the text to pre-train on."""
    shifted_characters: int = 20_000
    """Size of the text to fine-tune on."""
    width: int = 48
    """Width of the Transformer."""
    blocks: int = 2
    """Number of its blocks."""
    length: int = 48
    """Characters of an example."""
    batch_size: int = 32
    """Examples of a batch."""
    windows: int = 256
    """Examples to measure a validation or test loss on."""
    points: int = 6
    """Number of points of each curve."""

    def budget(self, which):
        return self.pretraining if which == "text" else self.finetuning


SMOKE = {
    "seeds": 2,
    "pretraining": 12,
    "finetuning": 12,
    "train_characters": 20_000,
    "width": 16,
    "blocks": 1,
    "length": 16,
    "batch_size": 8,
    "windows": 16,
    "points": 2,
}


# Methods: AdamW behind another first link


def adamw(setting, num_steps, trained):
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_steps // 20 + 1, num_steps)
    return optax.adamw(
        lambda count: setting["learning_rate"] * shape(count),
        weight_decay=0.01,
        mask=trained,
    )


def plain(setting, num_steps, trained, network, key):
    del network, key
    frozen = jax.tree.map(lambda wanted: not wanted, trained)
    return optax.chain(
        optax.masked(optax.set_to_zero(), frozen), adamw(setting, num_steps, trained)
    )


def lpf(setting, num_steps, trained, network, key):
    gamma = flatopt.schedules.cosine_growth(
        setting["gamma"], PAPER["growth"], num_steps
    )
    link = flatopt.smooth_gradients(
        gamma,
        flatopt.kernels.filterwise(filter_axes=network.filter_axes),
        num_samples=PAPER["chunks"],
        batch_argnames=("batch",),
        mask=trained,
        key=key,
    )
    return optax.chain(link, adamw(setting, num_steps, trained))


def nso(setting, num_steps, trained, network, key):
    del network
    link = flatopt.smooth_gradients(
        setting["sigma"], antithetic=True, mask=trained, key=key
    )
    return optax.chain(link, adamw(setting, num_steps, trained))


FEW, MANY = (4e-3, 8e-3, 1.6e-2), (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
PRETRAINING = {
    "AdamW": Method(plain, common.grid(learning_rate=MANY)),
    "LPF-AdamW": Method(lpf, common.grid(learning_rate=FEW, gamma=(5e-4, 2e-3))),
    "NSO-AdamW": Method(nso, common.grid(learning_rate=FEW, sigma=(3e-3, 1e-2))),
}
NSO = common.grid(learning_rate=(4e-3, 8e-3), sigma=(5e-3, 2e-2))
PLAIN_LORA = common.grid(learning_rate=(1.6e-2, 3.2e-2, 6.4e-2, 0.128))
NSO_LORA = common.grid(learning_rate=(3.2e-2, 6.4e-2), sigma=(1e-2, 4e-2))
FINETUNING = {
    "AdamW": Method(plain, common.grid(learning_rate=(2e-3, *FEW))),
    "NSO": Method(nso, NSO),
    "NSO, twice the budget": Method(nso, NSO, budget=2),
    "AdamW, LoRA": Method(plain, PLAIN_LORA, lora=True),
    "NSO, LoRA": Method(nso, NSO_LORA, lora=True),
}
QUICK = ("AdamW", "LPF-AdamW", "NSO")  # those of the tiny version


class Training(Network):
    """Texts and network, and how to train the one on the other."""

    def __init__(self, config):
        super().__init__(config)
        self.codes = {
            "text": read(config.text or LIBRARY),
            "shifted": read(config.shifted or LIBRARY / "pydoc_data" / "topics.py"),
        }
        self.splits = {
            "text": split(self.codes["text"], config.train_characters),
            "shifted": split(self.codes["shifted"], config.shifted_characters),
        }
        self.programs, self.kept = {}, {}

    def gradients_a_step(self, method, setting):
        tx, params = self.optimizer(method, setting, 100, 0), self.start(0)
        batch = jnp.zeros((self.config.batch_size, self.config.length + 1), jnp.int32)

        def step(value_fn, carry, batch):
            return common.step(
                tx, value_fn, carry, method.make is not plain, batch=batch
            )

        carry = params, tx.init(params)
        return methods.gradients_a_step(step, self.loss_fn, carry, batch)

    def compiled(self, method, length, *arguments):
        """A part of training, compiled once for all settings and seeds."""
        key = method.make, method.lora, length, len(arguments[-1])
        if key not in self.programs:
            advance = jax.jit(functools.partial(self.advance, method, length))
            self.programs[key] = advance.lower(*arguments).compile()
        return self.programs[key]

    def advance(self, method, length, carry, setting, key, codes):
        config = self.config
        tx = self.optimizer(method, setting, length * config.points, key)

        def body(carry, _):
            *carry, key = carry
            key, now = jax.random.split(key)
            starts = jax.random.randint(
                now, (config.batch_size,), 0, len(codes) - config.length
            )
            batch = codes[starts[:, None] + jnp.arange(config.length + 1)]
            takes_loss = method.make is not plain
            carry = common.step(tx, self.loss_fn, carry, takes_loss, batch=batch)
            return (*carry, key), None

        return jax.lax.scan(body, carry, None, length=length)[0]

    def train(self, method, setting, seed, cost, params, which):
        """Train once; return the parameters and the validation loss on the way."""
        config, splits = self.config, self.splits[which]
        length = int(config.budget(which) * method.budget / cost / config.points)
        key, batch_key = jax.random.split(jax.random.key(seed))
        state = self.optimizer(method, setting, length * config.points, key).init(
            params
        )
        carry = params, state, batch_key
        setting = {name: jnp.float32(value) for name, value in setting.items()}
        advance = self.compiled(method, length, carry, setting, key, splits["train"])
        validation = self.windows(splits["validation"])
        curve, seconds = [self.evaluate(params, validation)], 0.0
        for _ in range(config.points):
            start = time.perf_counter()
            carry = jax.block_until_ready(advance(carry, setting, key, splits["train"]))
            seconds += time.perf_counter() - start
            curve.append(self.evaluate(carry[0], validation))
        return carry[0], {"validation": curve, "seconds": seconds}

    def measure(self, method, params, which):
        """Losses, and the trace of the training loss's Hessian over trained weights."""
        splits = self.splits[which]
        train, test = (self.windows(splits[name]) for name in ("train", "test"))
        lora, rest = nnx.split_state(params, nnx.LoRAParam, ...)
        part, frozen = (lora, rest) if method.lora else (rest, lora)
        trace = self.trace(part, frozen, train[:64])
        return {
            "train": self.evaluate(params, train),
            "test": self.evaluate(params, test),
            "trace": trace.value,
            "trace_error": trace.standard_error,
        }

    def pretrain(self, method, setting, seed, cost):
        found = self.train(method, setting, seed, cost, self.start(seed), "text")
        if method is PRETRAINING["AdamW"]:
            self.kept[*setting.values(), seed] = found[0]
        return found

    def finetune(self, first, method, setting, seed, cost):
        """Fine-tune what AdamW pre-trained, ``first``; trained again if lost."""
        key = *first["setting"].values(), seed
        if key not in self.kept:
            adamw, cost_of_adamw = PRETRAINING["AdamW"], first["gradients_a_step"]
            self.pretrain(adamw, first["setting"], seed, cost_of_adamw)
        return self.train(method, setting, seed, cost, self.kept[key], "shifted")


def compute(config, piece):
    training = Training(config)
    pretrained, tuned = (
        {n: m for n, m in found.items() if n in QUICK or not config.smoke}
        for found in (PRETRAINING, FINETUNING)
    )
    total = config.pretraining * methods.num_runs(pretrained, config.seeds)
    total += config.finetuning * methods.num_runs(tuned, config.seeds)
    with common.shown(piece, total, "gradient") as piece:
        stage = functools.partial(run_stage, config, training, piece)
        first = stage("pre-training", pretrained, training.pretrain, "text")
        finetune = functools.partial(training.finetune, first["methods"]["AdamW"])
        second = stage("fine-tuning", tuned, finetune, "shifted")
    texts = {
        name: {"sha256": hashlib.sha256(codes).hexdigest(), "characters": len(codes)}
        for name, codes in training.codes.items()
    }
    return {
        "paper": PAPER,
        "python": platform.python_version(),
        "texts": texts,
        "pretraining": first,
        "finetuning": second,
    }


def run_stage(config, training, piece, stage, methods, train, which):
    """Choose a setting for every method on validation text, then train all seeds."""

    def tune(*run):
        return train(*run)[1]["validation"][-1]

    def train_and_measure(method, *run):
        params, found = train(method, *run)
        return found | training.measure(method, params, which)

    found = common.compare(
        piece,
        stage,
        methods,
        config.seeds,
        config.budget(which),
        training.gradients_a_step,
        tune,
        train_and_measure,
    )
    return {"methods": found} | summarize(found)


def summarize(found):
    """Means and errors over seeds, and against AdamW seed by seed."""
    runs = statistics.runs_of(found)
    curves = runs["validation"]
    first, last = (curves.map(operator.itemgetter(index)) for index in (0, -1))
    runs = runs.assign(validation=last, before=first)
    names = runs.columns.drop(["method", "run"])
    return {
        "summary": statistics.summaries(runs, names, finite="test"),
        "against_adamw": {
            name: against(own, base)
            for name, (own, base) in statistics.pairs(
                runs, lambda name: "AdamW, LoRA" if "LoRA" in name else "AdamW"
            ).items()
        },
    }


def against(own, base):
    ratio = own["trace"] / base["trace"]
    return statistics.columns_of(
        {
            "trace_reduction": 1 - ratio,
            "test": own["test"] - base["test"],
            "trace_ratio": ratio,
            "seconds_ratio": own["seconds"] / base["seconds"],
        }
    )


def draw(report):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    results = report["results"]
    traces = {}
    for axis, stage in zip(axes, ("pretraining", "finetuning"), strict=False):
        for name, method in results[stage]["methods"].items():
            curves = np.asarray([run["validation"] for run in method["runs"]])
            gradients = np.linspace(0, method["budget"], curves.shape[1])
            line = figures.band(axis, gradients, curves, name)
            trace = results[stage]["summary"][name]["trace"]
            traces[f"{name}\n({stage})"] = trace, line.get_color()
        axis.set(xlabel="gradients of a batch", ylabel="validation loss", title=stage)
        axis.legend(fontsize=8)
    axes[0].set_ylim(top=4)
    for index, (trace, color) in enumerate(traces.values()):
        axes[2].barh(index, trace["mean"], xerr=trace["error"], color=color)
    figures.set_rows(axes[2], traces, fontsize=7)
    axes[2].set(xlabel="trace of the Hessian of the training loss", xlim=(0, None))
    return figure


def lines(report):
    stages, columns = ("pretraining", "finetuning"), ("validation", "test", "trace")
    return statistics.summary_lines(report["results"], stages, (*columns, "seconds"))


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
