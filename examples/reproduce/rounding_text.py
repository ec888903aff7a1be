"""What does a small Transformer lose when its weights are rounded or noisy?

A character Transformer learns a text by AdamW, by AdamW with an average of its weights, and
by flat methods before AdamW, all with the same number of gradients, counted by flatopt. Then
its weights are rounded to 8 to 2 bits a channel, or get Gaussian noise. Every method chooses
its settings on validation text: those that lose least at a change, among the settings that
are as good as AdamW's before it.
"""

import dataclasses
import functools
import hashlib
import pathlib

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import transformer
from common import after, figures, statistics
from common.after import LEVELS
from common.text import read, split
from flax import nnx
from transformer import Method

import flatopt

# The share by which a phase of SAM at the end of pre-training lowers what a language model
# of 1B parameters loses by rounding to 4 bits (abstract of arXiv 2605.02105).
PAPER = {"rounding": 0.40, "bits": 4}
TARGETS = {"3 bits": ("bits", 3), "noise 0.1": ("noise", 0.1)}
TOLERANCE = 0.02  # nats, above the best of AdamW on validation text
ADAMW, AVERAGE = "AdamW", "average of weights"


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    data_dir: pathlib.Path | None = None
    """A folder with tinyshakespeare.txt. Default: Python's standard library as text."""
    methods: tuple[str, ...] = (
        ADAMW,
        AVERAGE,
        "SAM",
        "SAM, last 10 %",
        "NSO-AdamW",
        "LPF-AdamW",
    )
    """Methods to compare; AdamW must come first."""
    settings: int = 4
    """Number of settings that each method chooses from, spread over its grid."""
    seeds: int = 5
    """Number of final runs: start, batches and noise change, the text stays."""
    pretraining: int = 400
    """Gradients of a batch."""
    train_characters: int = 200_000
    """Size of the text to train on."""
    width: int = 32
    """Width of the Transformer."""
    blocks: int = 2
    """Number of its blocks."""
    length: int = 32
    """Characters of an example."""
    batch_size: int = 32
    """Examples of a batch."""
    windows: int = 256
    """Examples to measure a validation or test loss on."""
    draws: int = 8
    """Draws of the noise on the weights of a network."""


SMOKE = {
    "methods": (ADAMW,),
    "settings": 1,
    "seeds": 2,
    "pretraining": 4,
    "train_characters": 20_000,
    "width": 16,
    "blocks": 1,
    "length": 16,
    "batch_size": 8,
    "windows": 16,
    "draws": 2,
}


# Methods: AdamW behind another first link; arguments as in transformer.py


def adamw(setting, num_steps, trained, *links):
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_steps // 20 + 1, num_steps)

    def learning_rate(count):
        falling = shape(jnp.minimum(count, num_steps // 20 + 1))
        constant = setting.get("constant", 0.0) > 0
        return setting["learning_rate"] * jnp.where(constant, falling, shape(count))

    last = optax.adamw(
        learning_rate, weight_decay=setting["weight_decay"], mask=trained
    )
    return optax.chain(*links, last)


def only(trained):
    frozen = jax.tree.map(lambda wanted: not wanted, trained)
    return optax.masked(optax.set_to_zero(), frozen)


def plain(setting, num_steps, trained, filter_axes, key):
    del filter_axes, key
    return adamw(setting, num_steps, trained, only(trained))


def averaged(setting, num_steps, trained, filter_axes, key):
    return optax.chain(
        plain(setting, num_steps, trained, filter_axes, key),
        after.average(setting["average"]),
    )


def sam(setting, num_steps, trained, filter_axes, key):
    del filter_axes
    link = flatopt.sam_gradients(setting["rho"], mask=trained, key=key)
    return adamw(setting, num_steps, trained, link)


def sam_at_the_end(setting, num_steps, trained, filter_axes, key):
    del filter_axes
    link = flatopt.sam_gradients(
        setting["rho"], start_step=int(0.9 * num_steps), mask=trained, key=key
    )
    return adamw(setting, num_steps, trained, link)


def nso(setting, num_steps, trained, filter_axes, key):
    del filter_axes
    link = flatopt.smooth_gradients(
        setting["sigma"], antithetic=True, mask=trained, key=key
    )
    return adamw(setting, num_steps, trained, link)


def lpf(setting, num_steps, trained, filter_axes, key):
    link = flatopt.smooth_gradients(
        setting["gamma"],
        flatopt.kernels.filterwise(filter_axes=filter_axes),
        num_samples=4,
        batch_argnames=("batch",),
        mask=trained,
        key=key,
    )
    return adamw(setting, num_steps, trained, link)


def flat_grid(**radii):
    return common.grid(learning_rate=(8e-3, 1.6e-2), weight_decay=(0.01,), **radii)


# Four settings each.
METHODS = {
    ADAMW: Method(
        plain,
        common.grid(learning_rate=(8e-3, 1.6e-2), weight_decay=(0.01, 0.1)),
    ),
    AVERAGE: Method(
        averaged,
        common.grid(
            learning_rate=(8e-3, 1.6e-2),
            weight_decay=(0.01,),
            average=(0.98,),
            constant=(0.0, 1.0),
        ),
    ),
    "SAM": Method(sam, flat_grid(rho=(0.05, 0.1))),
    "SAM, last 10 %": Method(sam_at_the_end, flat_grid(rho=(0.1, 0.2))),
    "NSO-AdamW": Method(nso, flat_grid(sigma=(5e-3, 2e-2))),
    "LPF-AdamW": Method(lpf, flat_grid(gamma=(5e-3, 2e-2))),
}


class Training(transformer.Training):
    """The text and the network, and how to train the one on the other."""

    def __init__(self, config):
        self.config = config
        folder = config.data_dir
        path = folder / "tinyshakespeare.txt" if folder else transformer.LIBRARY
        self.codes = read(path)
        self.split = split(self.codes, config.train_characters)
        model = self.make(0)
        self.graphdef, params = nnx.split(model)
        self.filter_axes = flatopt.flax.filter_axes(model)
        self.is_lora = jax.tree_util.tree_map_with_path(
            lambda path, _: "lora" in jax.tree_util.keystr(path), params
        )
        self.start = functools.cache(lambda seed: nnx.split(self.make(seed))[1])

    def cost(self, method, num_steps=20):
        """Gradients of a batch a step, the mean of a short training."""
        tx, params = (
            self.optimizer(method, method.settings[0], num_steps, 0),
            self.start(0),
        )
        batch = jnp.zeros((self.config.batch_size, self.config.length + 1), jnp.int32)

        def step(value_fn, carry, batch):
            return common.step(tx, value_fn, carry, takes_loss(method), batch=batch)

        carry = params, tx.init(params)
        return common.methods.gradients_a_step(
            step, self.loss_fn, carry, batch, num_steps=num_steps
        )

    def train(self, method, num_steps, setting, seed):
        """The network after training once."""
        key, batch_key = jax.random.split(jax.random.key(seed))
        setting = {name: jnp.float32(value) for name, value in setting.items()}
        arguments = self.start(seed), setting, key, batch_key
        params, state = self.run(method, num_steps, *arguments)
        return optax.tree.get(state, "average") if method.make is averaged else params

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def run(self, method, num_steps, params, setting, key, batch_key):
        config, codes = self.config, self.split["train"]
        tx = self.optimizer(method, setting, num_steps, key)

        def body(carry, key):
            starts = jax.random.randint(
                key, (config.batch_size,), 0, len(codes) - config.length
            )
            batch = codes[starts[:, None] + jnp.arange(config.length + 1)]
            takes = takes_loss(method)
            return common.step(tx, self.loss_fn, carry, takes, batch=batch), None

        keys = jax.random.split(batch_key, num_steps)
        return jax.lax.scan(body, (params, tx.init(params)), keys)[0]

    def lost(self, method, num_steps, setting, seed, name):
        """The loss on a text, as trained and after every change."""
        params = self.train(method, num_steps, setting, seed)
        return self.kept(params, self.windows(self.split[name]))

    @functools.partial(jax.jit, static_argnums=0)
    def kept(self, params, batch):
        return after.kept(self.loss_fn, params, batch, self.config.draws)


def takes_loss(method):
    return method.make not in (plain, averaged)


# What is computed


def compute(config, piece):
    training, found = Training(config), {}
    with common.shown(piece) as piece:
        for name in config.methods:
            adamw = found.get(ADAMW, {}).get("validation")
            found[name] = study(config, piece, training, name, adamw)
    return {
        "paper": PAPER,
        "levels": LEVELS,
        "tolerance": TOLERANCE,
        "text": {
            "sha256": hashlib.sha256(training.codes).hexdigest(),
            "characters": len(training.codes),
        },
        "parameters": sum(x.size for x in jax.tree.leaves(training.start(0))),
        "methods": found,
        "summary": {target: summarize(found, target) for target in TARGETS},
    }


def study(config, piece, training, name, adamw):
    """Choose settings of a method on validation text, and train all seeds with them."""
    method = METHODS[name]
    cost = piece(f"{name}, cost", lambda: training.cost(method))
    steps = int(config.pretraining / cost)

    def run(place, seed, part):
        lost = functools.partial(
            training.lost, method, steps, method.settings[place], seed, part
        )
        return piece(f"{name}, setting {place}, seed {seed}", lost)

    places = range(0, len(method.settings), len(method.settings) // config.settings)
    tuned = {
        place: run(place, common.methods.TUNING_SEED, "validation") for place in places
    }
    chosen = chosen_of(tuned, adamw or tuned)
    return {
        "gradients_a_step": cost,
        "num_steps": steps,
        "validation": tuned,
        "chosen": chosen,
        "settings": {place: method.settings[place] for place in chosen.values()},
        "runs": {
            place: [run(place, seed, "test") for seed in range(1, 1 + config.seeds)]
            for place in sorted({*chosen.values()})
        },
    }


def after_change(losses, target):
    change, level = TARGETS[target]
    return losses[change][LEVELS[change].index(level)]


def chosen_of(tuned, adamw):
    """The setting that loses least at each change, of those as good as AdamW's."""
    enough = min(losses["float"] for losses in adamw.values()) + TOLERANCE
    enough = max(enough, min(losses["float"] for losses in tuned.values()))
    good = [place for place, losses in tuned.items() if losses["float"] <= enough]
    return {
        target: min(good, key=lambda place: after_change(tuned[place], target))
        for target in TARGETS
    }


def summarize(found, target):
    """Loss as trained and after a change, its rise, and against AdamW seed by seed."""
    tables = {name: measure(runs_for(m, target), target) for name, m in found.items()}
    base = tables[ADAMW]
    return {
        name: statistics.columns_of(own)
        | {f"{key}_gain": statistics.with_interval(base[key] - own[key]) for key in own}
        | {"rise_ratio": statistics.with_interval(own["rise"] / base["rise"])}
        for name, own in tables.items()
    }


def runs_for(method, target):
    runs = method["runs"]
    place = method["chosen"][target]
    return runs[place] if place in runs else runs[str(place)]


def measure(runs, target):
    trained = np.array([losses["float"] for losses in runs])
    changed = np.array([after_change(losses, target) for losses in runs])
    return {"float": trained, "changed": changed, "rise": changed - trained}


# Figure and table


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    labels = {
        "bits": "bits of the weights, by channel",
        "noise": "noise on the weights, in max|W|",
    }
    for axis, (target, (change, _)) in zip(axes, TARGETS.items(), strict=False):
        levels = LEVELS[change]
        places = range(len(levels)) if change == "bits" else levels
        for name, method in results["methods"].items():
            losses = [run[change] for run in runs_for(method, target)]
            found = common.mean_and_error(losses)
            axis.errorbar(places, found["mean"], found["error"], capsize=2, label=name)
        if change == "bits":
            axis.set_xticks(places, levels)
        axis.set(xlabel=labels[change], ylim=(None, 4))
    axes[0].set_ylabel("test loss (nats a character)")
    axes[0].legend(fontsize=7, loc="upper left")
    for index, (target, rows) in enumerate(results["summary"].items()):
        gains = {n: row["changed_gain"] for n, row in rows.items() if n != ADAMW}
        means = [gain["mean"] for gain in gains.values()]
        ends = [gain["high"] - gain["mean"] for gain in gains.values()]
        places = np.arange(len(gains)) + 0.2 * (index - 1)
        axes[2].errorbar(means, places, xerr=ends, fmt="o", markersize=4, label=target)
    figures.set_rows(axes[2], list(gains), fontsize=8)
    axes[2].axvline(0, color="black", linestyle=":")
    axes[2].set(xlabel="nats below AdamW after the change, 95 % intervals")
    axes[2].legend(fontsize=7)
    return figure


def lines(report):
    for target, rows in report["results"]["summary"].items():
        for name, row in rows.items():
            gain, ratio = row["changed_gain"], row["rise_ratio"]
            yield (
                f"{target:9} {name:20} trained {row['float']['mean']:.3f} "
                f"after {row['changed']['mean']:.3f} ± {row['changed']['error']:.3f}, "
                f"gain {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}], "
                f"rise over AdamW's {ratio['mean']:.2f}"
            )


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
