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
import matplotlib.pyplot as plt
import numpy as np
from common import after, figures, language, statistics
from common.after import LEVELS
from common.language import Method

import flatopt

# The share by which a phase of SAM at the end of pre-training lowers what a language model
# of 1B parameters loses by rounding to 4 bits (abstract of arXiv 2605.02105).
PAPER = {"rounding": 0.40, "bits": 4}
TARGETS = {"3 bits": ("bits", 3), "noise 0.1": ("noise", 0.1)}
TOLERANCE = 0.02  # nats, above the best of AdamW on validation text
ADAMW, LARGER, AVERAGE = "AdamW", "AdamW, larger rate", "average of weights"


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    data_dir: pathlib.Path | None = None
    """A folder with tinyshakespeare.txt. Default: Python's standard library as text."""
    methods: tuple[str, ...] = (
        ADAMW,
        LARGER,
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


# Methods, as in common.language


def sam_at_the_end(setting, num_steps, trained, network, key):
    del network
    link = flatopt.sam_gradients(
        setting["rho"], start_step=int(0.9 * num_steps), mask=trained, key=key
    )
    return language.adamw(setting, num_steps, trained, link)


def flat_grid(**radii):
    return common.grid(learning_rate=(8e-3, 1.6e-2), weight_decay=(0.01,), **radii)


# Four settings each.
METHODS = {
    ADAMW: Method(
        language.plain,
        common.grid(learning_rate=(8e-3, 1.6e-2), weight_decay=(0.01, 0.1)),
    ),
    LARGER: Method(
        language.plain,
        common.grid(learning_rate=(3.2e-2, 6.4e-2), weight_decay=(0.01, 0.1)),
    ),
    AVERAGE: Method(
        language.averaged,
        common.grid(
            learning_rate=(8e-3, 1.6e-2),
            weight_decay=(0.01,),
            average=(0.98,),
            constant=(0.0, 1.0),
        ),
    ),
    "SAM": Method(language.sam, flat_grid(rho=(0.05, 0.1))),
    "SAM, last 10 %": Method(sam_at_the_end, flat_grid(rho=(0.1, 0.2))),
    "NSO-AdamW": Method(language.nso, flat_grid(sigma=(5e-3, 2e-2))),
    "LPF-AdamW": Method(language.lpf, flat_grid(gamma=(5e-3, 2e-2))),
}


class Training(language.Training):
    """The text and the network, and what is kept of it when the weights change."""

    def lost(self, method, num_steps, setting, seed, name):
        """The loss on a text, as trained and after every change."""
        params, _ = self.train(method, num_steps, setting, seed)
        return self.kept(params, self.windows(self.split[name]))

    @functools.partial(jax.jit, static_argnums=0)
    def kept(self, params, batch):
        return after.kept(self.loss_fn, params, batch, self.config.draws)


# What is computed


def compute(config, piece):
    folder = config.data_dir
    path = folder / "tinyshakespeare.txt" if folder else language.LIBRARY
    training, found = Training(config, path), {}
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
    axes[2].set(xlabel="nats below AdamW, 95 % intervals")
    axes[2].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
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
