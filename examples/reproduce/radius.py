"""Which radius without a grid: what rules, brackets, constants and a loop lose to a search.

Four dense networks learn digits and breast cancer, with clean and with wrong labels: 16
tasks. A small CNN, a residual network on photographs and a Transformer on characters are
tasks of another kind; the last two need a folder of CIFAR-10 and of Shakespeare's plays.
NSO, SAM and LPF-SGD train each at no radius, at a grid by factors of two, at the papers'
default, at the radii that `flatopt.radius` suggests from the first batch, and in a loop that
holds what the noise undoes of what was learned. Every strategy keeps, among the runs that it
may try, the one that is best on validation data; what counts is what it then loses on test
data against the whole grid: in accuracy, loss, and accuracy at 3 bits. Constants are chosen
on other tasks, of dense networks alone. The same runs show where training collapses.
"""

import dataclasses
import itertools
import json
import pathlib
import sys

import common
import jax
import matplotlib.pyplot as plt
import numpy as np
from common import added, figures, held, radii, strategies
from common.radii import GOALS
from common.strategies import DEFAULTS, EDGES, FACTORS, GRIDS

import flatopt

sys.path.append(str(common.ROOT / "examples"))
import cifar10_data


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    data_dir: pathlib.Path | None = None
    """Folder of CIFAR-10: binary files, Python pickles or parquet files. Without it the
    residual network is left out; with --smoke, scikit-learn's digits enlarged."""
    text_dir: pathlib.Path | None = None
    """Folder of tinyshakespeare.txt. Without it the Transformer is left out; with --smoke,
    Python's standard library as text."""
    methods: tuple[str, ...] = tuple(GRIDS)
    """Methods."""
    data: tuple[str, ...] = ("digits", "breast cancer")
    """Data sets."""
    networks: tuple[str, ...] = tuple(radii.WIDTHS)
    """Dense networks."""
    added: tuple[str, ...] = ("small CNN", "ResNet", "Transformer")
    """Networks of another kind: on digits, photographs and text. "CNN", that of
    examples/digits.py, can be added."""
    shares: tuple[float, ...] = (0.0, 0.4)
    """Shares of training labels replaced by random ones; none of the text."""
    seeds: int = 3
    """Runs of each radius: examples, start, batches and noise change."""
    added_seeds: int = 2
    """The same, of networks of another kind."""
    steps: int = 400
    """Steps of each run, by every method."""
    added_steps: int = 100
    """The same, of networks of another kind."""
    batch_size: int = 32
    """Examples of a batch."""
    train_images: int = 256
    """Number of training images of digits."""
    tumours: int = 128
    """Number of training examples of breast cancer."""
    photographs: int = 512
    """Number of training photographs."""
    pieces: int = 2048
    """Number of pieces of text to train on."""
    length: int = 16
    """Characters of a piece."""
    width: int = 16
    """Width of the Transformer."""
    learning_rate: float = 0.05
    """At the start; it falls to zero along a cosine, with momentum 0.9."""
    text_rate: float = 0.01
    """The same, of the Transformer, by AdamW."""
    weight_decay: float = 1e-3
    """Decay of the weights."""


SMOKE = {
    "methods": ("LPF-SGD",),
    "added": ("ResNet", "Transformer"),
    "data": ("breast cancer",),
    "networks": ("one layer of 32",),
    "seeds": 1,
    "added_seeds": 1,
    "steps": 2,
    "added_steps": 2,
    "batch_size": 8,
    "train_images": 16,
    "tumours": 16,
    "photographs": 16,
    "pieces": 16,
    "length": 8,
    "width": 8,
}


def start_of(method, found):
    """The start value of the rule; the end of the table where its target is not reached."""
    if found.start is not None:
        return found.start
    values = found.rise.value if method == "SAM" else found.kl.value
    target = 0.5 if method == "SAM" else 0.06
    return float(found.radii[-1 if values[0] < target else 0])


def rises_at(found, wanted):
    """The rise at other radii, along powers between those of the table."""
    rise = np.nan_to_num(np.asarray(found.rise.value, float), nan=np.inf)
    return interpolated(found.radii, rise, wanted)


def interpolated(radii, rises, wanted):
    logs = np.log(np.clip(rises, 1e-9, 1e9))
    return np.exp(np.interp(np.log(wanted), np.log(radii), logs))


def cap_of(radii, rises, guess):
    """Where the loss first rises by half of what a guess loses; else the largest radius."""
    order = np.argsort(radii)
    radii, rises = np.array(radii)[order], np.array(rises)[order]
    wanted = np.geomspace(radii[radii > 0][0], radii[-1], 1000)
    found = interpolated(radii[radii > 0], rises[radii > 0], wanted)
    above = found >= held.ROOM * guess
    return wanted[np.argmax(above) if above.any() else -1]


def problems_of(training):
    config = training.config
    return list(itertools.product(range(1, 1 + config.seeds), config.shares))


def by_share(training, found):
    """Results of all problems apart for each share of wrong labels, seeds first."""
    config = training.config
    shape = config.seeds, len(config.shares)

    def of_share(tree, index):
        if isinstance(tree, dict):
            return {name: of_share(x, index) for name, x in tree.items()}
        return np.reshape(tree, (*shape, *np.shape(tree)[1:]))[:, index]

    return {str(share): of_share(found, i) for i, share in enumerate(config.shares)}


def first_look(training, method):
    """What is known before training: radii, start values, rises, the loss of a guess."""
    rows, rises, starts, guesses = [], [], [], []
    for problem in problems_of(training):
        found = training.effects(method, *problem)
        start = start_of(method, found)
        rule = start * np.array(FACTORS[method])
        row = np.concatenate([[0.0, DEFAULTS[method]], GRIDS[method], rule])
        guess = max(float(found.loss), np.log(training.num_classes))
        rows.append(row)
        starts.append(start)
        guesses.append(guess)
        rises.append(np.concatenate([[0.0], rises_at(found, row[1:])]))
    return {"radii": rows, "start": starts, "rise": rises, "guess": guesses}


def measure(training, method):
    """All radii, seeds and shares of wrong labels of one network and method."""
    found = first_look(training, method)
    rows = np.array(found["radii"])
    return by_share(
        training, training.at_radii(method, rows, problems_of(training)) | found
    )


def measure_loop(training, method, measured):
    """The same problems in the loop, at each of its targets."""
    problems, seen = problems_of(training), []
    for seed, share in problems:
        runs = measured[str(share)]
        own = {name: runs[name][seed - 1] for name in ("radii", "rise", "guess")}
        seen.append(
            own | {"cap": cap_of(*own.values()), "start": runs["start"][seed - 1]}
        )
    starts, caps = ([own[name] for own in seen] for name in ("start", "cap"))
    found = training.hold(method, problems, starts, caps)
    return by_share(training, found | {"cap": caps})


def measure_together(training, method):
    """Both in one program, which compiles once."""
    found = first_look(training, method)
    caps = list(map(cap_of, found["radii"], found["rise"], found["guess"]))
    problems, rows = problems_of(training), np.array(found["radii"])
    runs = training.hold(method, problems, found["start"], caps, rows)
    fixed = {name: runs.pop(name) for name in ("validation", "test")}
    fixed, loops = (
        jax.tree.map(lambda x, part=part: x[:, part], fixed)
        for part in (np.s_[len(held.TARGETS) :], np.s_[: len(held.TARGETS)])
    )
    runs = {name: x[:, : len(held.TARGETS)] for name, x in runs.items()}
    return by_share(training, fixed | found | {"held": loops | runs | {"cap": caps}})


def runs_of(piece, training, label, method):
    """Runs of each share of wrong labels, those of the loop as ``"held"``."""
    if training.together:
        return piece(label, lambda: measure_together(training, method), size=2)
    found = piece(label, lambda: measure(training, method))
    loops = piece(f"{label}, loop", lambda: measure_loop(training, method, found))
    return {share: runs | {"held": loops[share]} for share, runs in found.items()}


def costs(training):
    """Gradients of a batch that a step takes, and a measurement of the loop."""
    return {
        method: {
            "gradients_a_step": training.cost(training.links[method]),
            "gradients_a_measurement": training.gradients_a_measurement(method),
        }
        for method in training.config.methods
    }


def trainings(config):
    """Network, data and how to make the training, for all whose data are there."""
    for network, data in itertools.product(config.networks, config.data):
        yield network, data, lambda n=network, d=data: radii.Training(config, n, d)
    own = added.of_added(config)
    for network in config.added:
        if network in radii.CNNS:
            yield network, "digits", lambda n=network: added.Digits(own, n, "digits")
    if "ResNet" in config.added and (config.data_dir or config.smoke):
        yield (
            "ResNet",
            "photographs",
            lambda: added.Photographs(config, cifar10_data.load),
        )
    if "Transformer" in config.added and (config.text_dir or config.smoke):
        folder = config.text_dir
        path = folder / "tinyshakespeare.txt" if folder else added.LIBRARY
        yield "Transformer", "text", lambda: added.Text(config, path)


def left_out(config):
    """Tasks of an earlier report whose data are not there, and where those came from."""
    missing = [
        network
        for network, folder in (
            ("ResNet", config.data_dir),
            ("Transformer", config.text_dir),
        )
        if network in config.added and not (folder or config.smoke)
    ]
    if not missing:
        return {}, {}
    print(
        f"{' and '.join(missing)} left out: give --data-dir, a folder of CIFAR-10, and "
        "--text-dir, one of tinyshakespeare.txt."
    )
    path = config.output / "radius.json"
    report = json.loads(path.read_text()) if path.exists() else {"results": {}}
    earlier = report["results"]
    tasks = {
        name: task
        for name, task in earlier.get("tasks", {}).items()
        if task["network"] in missing
    }
    if tasks and report["settings"] != common.settings(config):
        raise SystemExit(
            f"{path} holds {' and '.join(missing)} with other settings: give --output, "
            "another folder."
        )
    places = {task["data"] for task in tasks.values()}
    return tasks, {name: earlier["sources"][name] for name in places}


def compute(config, piece):
    todo = list(trainings(config))
    earlier, sources = left_out(config)
    tasks = {}
    with common.shown(piece, total=2 * len(todo) * len(config.methods)) as piece:
        for network, data, make in todo:
            training = make()
            sources |= {data: getattr(training, "sha256", "scikit-learn")}
            labels = np.asarray(training.splits[0][1]).ravel()
            guess = np.bincount(labels).max() / len(labels)
            for method in config.methods:
                label = f"{network}, {data}, {method}"
                for share, runs in runs_of(piece, training, label, method).items():
                    task = tasks.setdefault(
                        f"{network}, {data}, {share} wrong",
                        {"network": network, "data": data, "guess": guess},
                    )
                    task |= {"wrong": float(share), method: runs}
            cost = piece("cost", lambda t=training: costs(t), size=0)
    tasks |= earlier
    dense = [task for task in tasks.values() if task["network"] in radii.WIDTHS]
    others = [task for task in tasks.values() if task["network"] not in radii.WIDTHS]
    return {"tasks": tasks, "sources": sources, "cost": cost} | {
        method: strategies.summarize(method, dense, others) for method in config.methods
    }


# Figure and table

SHOWN = (
    "none",
    "paper's default",
    "one constant, task left out",
    "one constant, network left out",
    "one constant, data set left out",
    "two constants, network left out",
    "two constants, data set left out",
    "start value alone",
    "bracket of two",
    "bracket of three",
    "recipe",
    "loop at 0.1",
    "loop at 0.05 and 0.2, or none",
    "whole grid",
)
NOTHING = {"mean": np.nan, "error": np.nan}
PARTS = {
    "dense networks, clean labels": ("regret", "clean"),
    "dense networks, wrong labels": ("regret", "wrong"),
    "networks of another kind": ("added", "all"),
}


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(1, 4, figsize=(17, 5), layout="constrained")
    measured = [method for method in GRIDS if method in results]
    for axis, method in zip(axes, measured, strict=False):
        found = results[method]["regret"]["accuracy"]
        names = [name for name in SHOWN if name in found]
        for index, (label, (part, tasks)) in enumerate(PARTS.items()):
            lost = results[method][part].get("accuracy")
            if not lost:
                continue
            own = [lost.get(name, {}).get(tasks, NOTHING) for name in names]
            means = np.array([100 * x["mean"] for x in own])
            errors = np.array([100 * x["error"] for x in own])
            rows = np.arange(len(names)) + 0.2 * index
            axis.errorbar(means, rows, xerr=errors, fmt="o", label=label)
        figures.set_rows(axis, names if axis is axes[0] else [""] * len(names))
        axis.axvline(0, color="black", linestyle=":")
        axis.set(title=method, xlabel="points lost against the whole grid")
    axes[0].legend(loc="lower right", fontsize=8)
    for method in measured:
        bins = [x for x in results[method]["cliff"]["bins"] if x["runs"]]
        shares = [100 * x["collapsed"] / x["runs"] for x in bins]
        ticks = [EDGES.index(x["from"]) for x in bins]
        axes[3].plot(ticks, shares, "o-", label=method)
    axes[3].set_xticks(range(len(EDGES) - 1), [f"{x:g}" for x in EDGES[:-1]])
    axes[3].set(
        xlabel="rise at the start, over a guess's loss",
        ylabel="runs that collapse (%)",
    )
    axes[3].legend()
    return figure


def lines(report):
    yield f"flatopt {flatopt.__version__}: points (or nats) lost against the whole grid"
    measured = [method for method in GRIDS if method in report["results"]]
    for method, part, goal in itertools.product(measured, ("regret", "added"), GOALS):
        scale = 1 if goal == "loss" else 100
        for name, found in report["results"][method][part].get(goal, {}).items():
            cells = (
                f"{key} {scale * found[key]['mean']:.2f} ± {scale * found[key]['error']:.2f}"
                for key in ("all", "clean", "wrong")
                if key in found
            )
            row = f"{method}, {part}, {goal}, {name:34}"
            yield "   ".join([row, *cells, f"{scale * found['worst']:.1f}"])
    for method in measured:
        yield f"{method}: {report['results'][method]['cliff']}"
        yield f"{method}: {report['results'][method]['loop']}"


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
