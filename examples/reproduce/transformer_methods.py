"""Which method makes a small Transformer predict better, and know better how sure it is?

AdamW with tuned weight decay and AdamW with an average of its weights, against IVON, LPF-SGD's
and NSO's noise, and SAM: plain, preconditioned, functional, and for the last 10 % of the
gradients. Every method chooses among the same number of settings on validation text, at
equal gradients, counted by flatopt, and again at equal steps where its step takes more.
"""

import dataclasses
import functools
import hashlib
import pathlib

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from common import figures, language, statistics
from common.language import LIBRARY, Method
from flax import nnx

import flatopt

ADAMW, AVERAGE, IVON = "AdamW", "AdamW, average of weights", "IVON"
POSTERIOR = "IVON, average over the posterior"
LAST = 0.1  # share of the gradients that a flat finish takes
BINS = 15
MEASURES = "test", "accuracy", "calibration", "train", "trace"


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    text: pathlib.Path | None = None
    """A text file, or a folder of Python files. Default: Python's standard library."""
    methods: int = 9
    """Number of methods, from the first."""
    settings: int = 6
    """Number of settings that each method chooses from, spread over its grid."""
    seeds: int = 5
    """Number of final runs: start, batches and noise change, the text stays."""
    gradients: int = 800
    """Gradients of a batch."""
    train_characters: int = 50_000
    """Size of the text to train on."""
    width: int = 32
    """Width of the Transformer."""
    blocks: int = 2
    """Number of its blocks."""
    length: int = 32
    """Characters of an example."""
    batch_size: int = 16
    """Examples of a batch."""
    windows: int = 2048
    """Examples to measure a validation or test loss on."""
    draws: int = 16
    """Networks drawn from IVON's posterior."""


SMOKE = {
    "methods": 2,
    "settings": 1,
    "seeds": 2,
    "gradients": 4,
    "train_characters": 20_000,
    "width": 16,
    "blocks": 1,
    "length": 16,
    "batch_size": 8,
    "windows": 16,
    "draws": 1,
}


# Methods, as in common.language


def ivon(setting, num_steps, trained, network, key):
    del network
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_steps // 20 + 1, num_steps)
    return flatopt.ivon(
        lambda count: setting["learning_rate"] * shape(count),
        ess=setting["ess"],
        hess_init=0.1,
        beta2=0.999,
        weight_decay=1e-5,
        mask=trained,
        key=key,
    )


def preconditioned_sam(setting, num_steps, trained, network, key):
    del network
    link = flatopt.sam_gradients(
        setting["rho"], optax.scale_by_adam(), mask=trained, key=key
    )
    return language.adamw(setting, num_steps, trained, link)


def functional_sam(setting, num_steps, trained, network, key):
    link = flatopt.functional_sam_gradients(
        network.model_fn, network.loss_of, setting["rho"], mask=trained, key=key
    )
    return language.adamw(setting, num_steps, trained, link)


def sam_at_the_end(setting, num_steps, trained, network, key):
    del network
    # Its steps take two gradients: 1 - LAST of the gradients are so many of the steps.
    start = round((1 - LAST) / (1 - LAST / 2) * num_steps)
    link = flatopt.sam_gradients(
        setting["rho"], start_step=start, mask=trained, key=key
    )
    return language.adamw(setting, num_steps, trained, link)


RATES, DECAYS = (8e-3, 1.6e-2, 3.2e-2), (0.01, 0.1)


def flat_grid(**radii):
    return common.grid(learning_rate=(1.6e-2,), weight_decay=DECAYS, **radii)


# Six settings each. An average wants a learning rate that stays: two of three have it.
METHODS = {
    ADAMW: Method(
        language.plain, common.grid(learning_rate=RATES, weight_decay=DECAYS)
    ),
    IVON: Method(ivon, common.grid(learning_rate=(2.0, 4.0), ess=(5e4, 5e5, 5e6))),
    AVERAGE: Method(
        language.averaged,
        flat_grid(average=(0.98,), constant=(0.0, 1.0))
        + flat_grid(average=(0.995,), constant=(1.0,)),
    ),
    "LPF-AdamW": Method(language.lpf, flat_grid(gamma=(2e-3, 1e-2, 3e-2))),
    "preconditioned SAM": Method(preconditioned_sam, flat_grid(rho=(0.01, 0.03, 0.1))),
    "functional SAM": Method(functional_sam, flat_grid(rho=(0.01, 0.03, 0.1))),
    "SAM, last 10 %": Method(sam_at_the_end, flat_grid(rho=(0.03, 0.1, 0.3))),
    "NSO-AdamW": Method(language.nso, flat_grid(sigma=(1e-3, 3e-3, 1e-2))),
    "SAM": Method(language.sam, flat_grid(rho=(0.01, 0.03, 0.1))),
}

# Those that run at equal steps as well. A flat finish takes 5 % more gradients there, which
# is all but the same.
LONGER = "preconditioned SAM", "functional SAM"


class Training(language.Training):
    """The text and the network: choosing a setting, and measuring what was trained."""

    def cost_of(self, method, setting=None):
        del setting
        return self.cost(method, num_steps=19)  # a flat finish is the last of these

    def fit(self, method, setting, seed, cost):
        num_steps = round(self.config.gradients * method.budget / cost)
        return self.train(method, num_steps, setting, seed)

    def tune(self, *run):
        params, _ = self.fit(*run)
        return self.evaluate(params, self.windows(self.split["validation"]))

    def measure(self, method, setting, seed, cost):
        """Losses, accuracy, calibration and flatness of a final run."""
        params, state = self.fit(method, setting, seed, cost)
        train, test = (self.windows(self.split[name]) for name in ("train", "test"))
        lora, rest = nnx.split_state(params, nnx.LoRAParam, ...)
        found = self.quality(jax.tree.map(lambda x: x[None], params), test)
        found |= {
            "train": self.evaluate(params, train),
            "trace": self.trace(rest, lora, train[:64]).value,
        }
        if method.make is ivon:
            found["posterior"] = self.quality(self.drawn(params, state), test)
        return found

    @functools.partial(jax.jit, static_argnums=0)
    def drawn(self, params, state):
        keys = jax.random.split(jax.random.key(0), self.config.draws)
        return jax.vmap(flatopt.sample_posterior, (0, None, None))(keys, params, state)

    @functools.partial(jax.jit, static_argnums=0)
    def quality(self, networks, batch):
        """Of the mean prediction of some networks: loss, accuracy, calibration."""
        odds = jax.lax.map(
            lambda params: jax.nn.softmax(self.model_fn(params, batch)), networks
        ).mean(axis=0)
        targets = batch[:, 1:]
        likelihood = jnp.take_along_axis(odds, targets[..., None], axis=-1)
        right = odds.argmax(axis=-1) == targets
        return {
            "test": -jnp.log(likelihood).mean(),
            "accuracy": right.mean(),
            "calibration": calibration_error(odds.max(axis=-1), right),
        }


def calibration_error(confidence, right, bins=BINS):
    """Expected calibration error: confidence less accuracy in bins, by their share."""
    places = jnp.minimum((confidence * bins).astype(jnp.int32), bins - 1)
    gap = jnp.zeros(bins).at[places.ravel()].add((confidence - right).ravel())
    return jnp.abs(gap).sum() / right.size


# What is computed


def compute(config, piece):
    training = Training(config, config.text or LIBRARY)
    with common.shown(piece) as piece:
        found = common.compare(
            piece,
            "equal gradients",
            methods_of(config, training, piece),
            config.seeds,
            config.gradients,
            training.cost_of,
            training.tune,
            training.measure,
        )
    runs = statistics.runs_of(expanded(found))
    bases = [name for name in (ADAMW, AVERAGE) if name in found]
    return {
        "text": {
            "sha256": hashlib.sha256(training.codes).hexdigest(),
            "characters": len(training.codes),
        },
        "parameters": sum(x.size for x in jax.tree.leaves(training.start(0))),
        "methods": found,
        "summary": statistics.summaries(runs, MEASURES, finite="test"),
        "against": {
            base: {
                name: against(own, other)
                for name, (own, other) in statistics.pairs(runs, base).items()
            }
            for base in bases
        },
    }


def methods_of(config, training, piece):
    """The methods at equal gradients; those of ``LONGER`` at equal steps as well.

    These take the setting that was chosen at equal gradients.
    """
    chosen, longer = {}, {}
    for name, method in list(METHODS.items())[: config.methods]:
        every = len(method.settings) // config.settings
        chosen[name] = dataclasses.replace(method, settings=method.settings[::every])
        if name not in LONGER:
            continue
        cost = piece(
            f"cost of {method.make.__name__}",
            functools.partial(training.cost_of, method),
            size=0,
        )
        longer[f"{name}, equal steps"] = dataclasses.replace(
            method, settings=[], tuned_as=name, budget=cost
        )
    return chosen | longer


def expanded(found):
    """The average over IVON's posterior as a method of its own."""
    if IVON not in found:
        return found
    runs = found[IVON]["runs"]
    posterior = [run | run["posterior"] for run in runs]
    table = found | {POSTERIOR: {"runs": posterior}}
    return {
        name: {
            "runs": [
                {k: x for k, x in run.items() if k != "posterior"} for run in m["runs"]
            ]
        }
        for name, m in table.items()
    }


def against(own, base):
    columns = {name: own[name] - base[name] for name in MEASURES[:3]}
    columns["trace_ratio"] = own["trace"] / base["trace"]
    return {name: statistics.with_interval(x) for name, x in columns.items()}


# Figure and table


def draw(report):
    results = report["results"]
    found = results["against"][ADAMW].items()
    rows = [(name, row) for name, row in found if name != ADAMW]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.5), layout="constrained")
    labels = {
        "test": "test loss (nats a character)",
        "accuracy": "accuracy",
        "calibration": "expected calibration error",
    }
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        found = [row[name] for _, row in rows]
        means = [value["mean"] for value in found]
        ends = [value["high"] - value["mean"] for value in found]
        axis.errorbar(means, range(len(rows)), xerr=ends, fmt="o", markersize=4)
        axis.axvline(0, color="black", linestyle=":")
        axis.set_xlabel(label)
        figures.set_rows(axis, [label for label, _ in rows], fontsize=7)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    figure.suptitle("less AdamW's, seed by seed: means and 95 % intervals", fontsize=10)
    return figure


def lines(report):
    results = report["results"]
    for name, row in results["summary"].items():
        cells = (f"{k} {row[k]['mean']:.4f} ± {row[k]['error']:.4f}" for k in MEASURES)
        yield "   ".join([f"{name:32}", *cells])
    for base, rows in results["against"].items():
        for name, row in rows.items():
            cells = (
                f"{key} {found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
                for key, found in row.items()
            )
            yield "   ".join([f"{name:32} against {base:25}", *cells])


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
