"""A small Transformer on real text: AdamW, LPF-AdamW and NSO-AdamW at equal budgets.

Pre-trains a causal Transformer on characters with each method, then fine-tunes that of
AdamW on a little text of another kind, with and without NSO, all weights or LoRA matrices
alone. Every method gets the same number of gradients of single examples, counted by
flatopt, and the same number of settings to choose from on a validation split.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx

import flatopt
import flatopt.flax

LIBRARY = pathlib.Path(os.__file__).parent
TUNING_SEED = 100

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


# Text


def read(path):
    """The bytes of a file or of all Python files of a folder; 63 for all but ASCII."""
    paths = sorted(path.glob("*.py")) if path.is_dir() else [path]
    text = "".join(p.read_text("utf-8", "replace") for p in paths)
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8)


def split(codes, num_train, block=2000):
    """Training, validation and test text: blocks of the whole, in random order."""
    starts = np.random.default_rng(0).permutation(len(codes) // block) * block
    blocks = codes[starts[:, None] + np.arange(block)]
    count = min(100, len(blocks) // 4)
    validation, test, rest = np.split(blocks, [count, 2 * count])
    train = rest.reshape(-1)[:num_train]
    parts = {"train": train, "validation": validation, "test": test}
    return {name: jnp.asarray(p.reshape(-1), jnp.int32) for name, p in parts.items()}


def windows(codes, config, seed=1):
    """Random pieces of a text, each with one more character to predict."""
    starts = np.random.default_rng(seed).integers(
        0, len(codes) - config.length, config.windows
    )
    return codes[starts[:, None] + np.arange(config.length + 1)]


# Network


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.LoRALinear(width, 4 * width, lora_rank=4, rngs=rngs)
        self.down = nnx.LoRALinear(4 * width, width, lora_rank=4, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    def __init__(self, config, rngs):
        width = config.width
        self.embed = nnx.Embed(128, width, rngs=rngs)
        self.positions = nnx.Embed(config.length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(config.blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 128, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


# Methods: AdamW behind another first link


def adamw(setting, num_steps, trained):
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_steps // 20 + 1, num_steps)
    return optax.adamw(
        lambda count: setting["learning_rate"] * shape(count),
        weight_decay=0.01,
        mask=trained,
    )


def plain(setting, num_steps, trained, filter_axes, key):
    del filter_axes, key
    frozen = jax.tree.map(lambda wanted: not wanted, trained)
    return optax.chain(
        optax.masked(optax.set_to_zero(), frozen), adamw(setting, num_steps, trained)
    )


def lpf(setting, num_steps, trained, filter_axes, key):
    gamma = flatopt.schedules.cosine_growth(
        setting["gamma"], PAPER["growth"], num_steps
    )
    link = flatopt.smooth_gradients(
        gamma,
        flatopt.kernels.filterwise(filter_axes=filter_axes),
        num_samples=PAPER["chunks"],
        batch_argnames=("batch",),
        mask=trained,
        key=key,
    )
    return optax.chain(link, adamw(setting, num_steps, trained))


def nso(setting, num_steps, trained, filter_axes, key):
    del filter_axes
    link = flatopt.smooth_gradients(
        setting["sigma"], antithetic=True, mask=trained, key=key
    )
    return optax.chain(link, adamw(setting, num_steps, trained))


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A first link, the settings to choose from, which weights to train, how long."""

    make: Callable
    settings: list[dict[str, float]]
    lora: bool = False
    budget: int = 1


def grid(rates, **scales):
    """Every learning rate with every scale."""
    settings = [{"learning_rate": rate} for rate in rates]
    for name, values in scales.items():
        settings = [s | {name: value} for s in settings for value in values]
    return settings


PRETRAINING = {
    "AdamW": Method(plain, grid((1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2))),
    "LPF-AdamW": Method(lpf, grid((4e-3, 8e-3, 1.6e-2), gamma=(5e-4, 2e-3))),
    "NSO-AdamW": Method(nso, grid((4e-3, 8e-3, 1.6e-2), sigma=(3e-3, 1e-2))),
}
FINETUNING = {
    "AdamW": Method(plain, grid((2e-3, 4e-3, 8e-3, 1.6e-2))),
    "NSO": Method(nso, grid((4e-3, 8e-3), sigma=(5e-3, 2e-2))),
    "NSO, twice the budget": Method(
        nso, grid((4e-3, 8e-3), sigma=(5e-3, 2e-2)), budget=2
    ),
    "AdamW, LoRA": Method(plain, grid((1.6e-2, 3.2e-2, 6.4e-2, 0.128)), lora=True),
    "NSO, LoRA": Method(nso, grid((3.2e-2, 6.4e-2), sigma=(1e-2, 4e-2)), lora=True),
}


class Training:
    """Texts and network, and how to train the one on the other."""

    def __init__(self, config):
        self.config = config
        self.codes = {
            "text": read(config.text or LIBRARY),
            "shifted": read(config.shifted or LIBRARY / "pydoc_data" / "topics.py"),
        }
        self.splits = {
            "text": split(self.codes["text"], config.train_characters),
            "shifted": split(self.codes["shifted"], config.shifted_characters),
        }
        model = Transformer(config, nnx.Rngs(0))
        self.graphdef, params = nnx.split(model)
        self.filter_axes = flatopt.flax.filter_axes(model)
        self.is_lora = jax.tree_util.tree_map_with_path(
            lambda path, _: "lora" in jax.tree_util.keystr(path), params
        )
        self.start = functools.cache(self._start)
        self.costs, self.programs, self.kept = {}, {}, {}

    def _start(self, seed):
        return nnx.split(Transformer(self.config, nnx.Rngs(seed)))[1]

    def loss_fn(self, params, batch):
        logits = nnx.merge(self.graphdef, params)(batch[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return losses.mean()

    def optimizer(self, method, setting, num_steps, key):
        trained = jax.tree.map(lambda lora: lora == method.lora, self.is_lora)
        return method.make(setting, num_steps, trained, self.filter_axes, key)

    @staticmethod
    def step(method, tx, value_fn, params, state, batch):
        if method.make is plain:
            grads, extra = jax.grad(value_fn)(params, batch), {}
        else:
            grads = optax.tree.zeros_like(params)  # not read
            extra = {"value_fn": value_fn, "batch": batch}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def gradients_a_step(self, method):
        if method.make not in self.costs:
            self.costs[method.make] = self.count(method)
        return self.costs[method.make]

    def count(self, method):
        tx, params = self.optimizer(method, method.settings[0], 100, 0), self.start(0)
        batch = jnp.zeros((self.config.batch_size, self.config.length + 1), jnp.int32)

        def step(value_fn, carry, batch):
            return self.step(method, tx, value_fn, *carry, batch)

        return common.gradients_a_step(
            step, self.loss_fn, (params, tx.init(params)), batch
        )

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
            params, state, key = carry
            key, now = jax.random.split(key)
            starts = jax.random.randint(
                now, (config.batch_size,), 0, len(codes) - config.length
            )
            batch = codes[starts[:, None] + jnp.arange(config.length + 1)]
            step = self.step(method, tx, self.loss_fn, params, state, batch)
            return (*step, key), None

        return jax.lax.scan(body, carry, None, length=length)[0]

    def train(self, method, setting, seed, params, which, budget):
        """Train once; return the parameters and the validation loss on the way."""
        config, splits = self.config, self.splits[which]
        steps = budget * method.budget / self.gradients_a_step(method)
        length = int(steps / config.points)
        key, batch_key = jax.random.split(jax.random.key(seed))
        state = self.optimizer(method, setting, length * config.points, key).init(
            params
        )
        carry = params, state, batch_key
        setting = {name: jnp.float32(value) for name, value in setting.items()}
        advance = self.compiled(method, length, carry, setting, key, splits["train"])
        validation = windows(splits["validation"], config)
        curve, seconds = [self.evaluate(params, validation)], 0.0
        for _ in range(config.points):
            start = time.perf_counter()
            carry = jax.block_until_ready(advance(carry, setting, key, splits["train"]))
            seconds += time.perf_counter() - start
            curve.append(self.evaluate(carry[0], validation))
        return carry[0], {"validation": curve, "seconds": seconds}

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(self, params, batch):
        return self.loss_fn(params, batch)

    def measure(self, method, params, which):
        """Losses, and the trace of the training loss's Hessian over trained weights."""
        splits = self.splits[which]
        train, test = (windows(splits[name], self.config) for name in ("train", "test"))
        lora, rest = nnx.split_state(params, nnx.LoRAParam, ...)
        part, frozen = (lora, rest) if method.lora else (rest, lora)
        trace = self.trace(part, frozen, train[:64])
        return {
            "train": self.evaluate(params, train),
            "test": self.evaluate(params, test),
            "trace": trace.value,
            "trace_error": trace.standard_error,
        }

    @functools.partial(jax.jit, static_argnums=0)
    def trace(self, part, frozen, batch):
        def loss_fn(part, batch):
            return self.loss_fn(nnx.merge_state(part, frozen), batch)

        operator = flatopt.curvature.hessian(loss_fn, part, batch)
        return flatopt.curvature.trace(operator, jax.random.key(0), 24, num_deflated=0)

    def pretrain(self, method, setting, seed):
        params, found = self.train(
            method, setting, seed, self.start(seed), "text", self.config.pretraining
        )
        if method is PRETRAINING["AdamW"]:
            self.kept[*setting.values(), seed] = params
        return params, found

    def finetune(self, first, method, setting, seed):
        """Fine-tune what AdamW pre-trained in setting ``first``; trained again if lost."""
        if (*first.values(), seed) not in self.kept:
            self.pretrain(PRETRAINING["AdamW"], first, seed)
        params = self.kept[*first.values(), seed]
        return self.train(
            method, setting, seed, params, "shifted", self.config.finetuning
        )


def compute(config, piece):
    training = Training(config)
    tuned = {n: m for n, m in FINETUNING.items() if m.budget == 1 or not config.smoke}
    total = [
        (len(method.settings) + config.seeds) * gradients * method.budget
        for methods, gradients in (
            (PRETRAINING, config.pretraining),
            (tuned, config.finetuning),
        )
        for method in methods.values()
    ]
    with tqdm.tqdm(total=sum(total), unit="gradient") as progress:
        stage = functools.partial(run_stage, config, training, piece, progress)
        first = stage("pre-training", PRETRAINING, training.pretrain, "text")
        finetune = functools.partial(
            training.finetune, first["methods"]["AdamW"]["setting"]
        )
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


def run_stage(config, training, piece, progress, stage, methods, train, which):
    """Choose a setting for every method on validation text, then train all seeds."""
    budget = config.pretraining if which == "text" else config.finetuning

    def run(name, setting, seed, measured):
        progress.set_description(f"{stage}, {name}")

        def compute():
            params, found = train(methods[name], setting, seed)
            if not measured:
                return found
            return found | training.measure(methods[name], params, which)

        found = piece(f"{stage}, {name}, {setting}, seed {seed}", compute)
        progress.update(budget * methods[name].budget)
        return found

    found = {}
    for name, method in methods.items():
        tuned = [
            run(name, setting, TUNING_SEED, measured=False)["validation"][-1]
            for setting in method.settings
        ]
        best = method.settings[int(np.argmin(np.nan_to_num(tuned, nan=np.inf)))]
        found[name] = {
            "gradients_a_step": piece(
                f"{stage}, {name}, cost",
                functools.partial(training.gradients_a_step, method),
            ),
            "budget": budget * method.budget,
            "tuning": tuned,
            "settings": method.settings,
            "setting": best,
            "runs": [
                run(name, best, seed, measured=True)
                for seed in range(1, 1 + config.seeds)
            ],
        }
    return {"methods": found} | summarize(found)


def summarize(found):
    """Means and errors over seeds, and against AdamW seed by seed."""
    columns = {
        name: {key: [run[key] for run in method["runs"]] for key in method["runs"][0]}
        for name, method in found.items()
    }
    for column in columns.values():
        column["before"] = [curve[0] for curve in column["validation"]]
        column["validation"] = [curve[-1] for curve in column["validation"]]
    against = {}
    for name, column in columns.items():
        base = columns["AdamW, LoRA" if "LoRA" in name else "AdamW"]
        ratio = np.divide(column["trace"], base["trace"])
        seconds = np.divide(column["seconds"], base["seconds"])
        reduction = 1 - ratio
        against[name] = {
            "trace_reduction": common.mean_and_error(reduction),
            "test": common.mean_and_error(np.subtract(column["test"], base["test"])),
            "trace_ratio": common.mean_and_error(ratio),
            "seconds_ratio": common.mean_and_error(seconds),
        }
    return {
        "summary": {
            name: {key: common.mean_and_error(column[key]) for key in column}
            | {"diverged": int(np.sum(~np.isfinite(column["test"])))}
            for name, column in columns.items()
        },
        "against_adamw": against,
    }


def draw(report):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    results = report["results"]
    traces = {}
    for axis, stage in zip(axes, ("pretraining", "finetuning"), strict=False):
        for name, method in results[stage]["methods"].items():
            curves = np.asarray([run["validation"] for run in method["runs"]])
            gradients = np.linspace(0, method["budget"], curves.shape[1])
            (line,) = axis.plot(gradients, curves.mean(axis=0), label=name)
            axis.fill_between(
                gradients, curves.min(axis=0), curves.max(axis=0), alpha=0.25
            )
            trace = results[stage]["summary"][name]["trace"]
            traces[f"{name}\n({stage})"] = trace, line.get_color()
        axis.set(xlabel="gradients of a batch", ylabel="validation loss", title=stage)
        axis.legend(fontsize=8)
    axes[0].set_ylim(top=4)
    for index, (trace, color) in enumerate(traces.values()):
        axes[2].barh(index, trace["mean"], xerr=trace["error"], color=color)
    axes[2].set_yticks(range(len(traces)), traces, fontsize=7)
    axes[2].invert_yaxis()
    axes[2].set(xlabel="trace of the Hessian of the training loss", xlim=(0, None))
    return figure


def main(config):
    report = common.run("transformer", common.prepare(config, SMOKE), compute, draw)
    common.print_summaries(
        report["results"],
        ("pretraining", "finetuning"),
        ("validation", "test", "trace", "seconds"),
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
