"""Which radius without a grid: what rules, brackets and constants lose against a search.

Four dense networks learn digits and breast cancer, with clean and with wrong labels: 16
tasks; the small CNN of examples/digits.py can be added. NSO, SAM and LPF-SGD train each at
no radius, at a grid by factors of two, at the papers' default, and at the radii that
`flatopt.radius` suggests from the first batch. Every strategy keeps, among the radii that it
may try, the one that is best on validation data; what counts is what it then loses on test
data against the whole grid: in accuracy, loss, and accuracy at 3 bits. Constants are chosen
on the other tasks. The same runs show where training collapses.
"""

import dataclasses
import itertools

import common
import matplotlib.pyplot as plt
import numpy as np
from common import figures, radii, statistics
from common.links import METHODS
from common.radii import GOALS

import flatopt


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    data: tuple[str, ...] = ("digits", "breast cancer")
    """Data sets."""
    networks: tuple[str, ...] = tuple(radii.WIDTHS)
    """Networks; "CNN", that of examples/digits.py, learns digits alone."""
    shares: tuple[float, ...] = (0.0, 0.4)
    """Shares of training labels replaced by random ones."""
    seeds: int = 3
    """Runs of each radius: examples, start, batches and noise change."""
    steps: int = 400
    """Steps of each run, by every method."""
    batch_size: int = 32
    """Examples of a batch."""
    train_images: int = 256
    """Number of training images of digits."""
    tumours: int = 128
    """Number of training examples of breast cancer."""
    learning_rate: float = 0.05
    """At the start; it falls to zero along a cosine, with momentum 0.9."""
    weight_decay: float = 1e-3
    """Decay of the weights."""


SMOKE = {
    "data": ("breast cancer",),
    "networks": ("one layer of 32",),
    "seeds": 1,
    "steps": 2,
    "batch_size": 8,
    "train_images": 16,
    "tumours": 16,
}


# Radii and strategies, fixed before the runs

GRIDS = {
    "NSO": 0.005 * 2.0 ** np.arange(8),
    "SAM": 0.0125 * 2.0 ** np.arange(9),
    "LPF-SGD": 0.005 * 2.0 ** np.arange(8),
}
DEFAULTS = {"NSO": 0.01, "SAM": 0.05, "LPF-SGD": 5e-4}  # the papers'
# Of the start value: what the recipe may try, from below to beyond.
FACTORS = {
    "NSO": (1 / 3, 1, 3, 9),
    "SAM": (1 / 3, 1, 3, 9),
    "LPF-SGD": (1 / 6, 1 / 2, 1, 2, 6),
}
BRACKETS = {
    "NSO": {"bracket of two": (1, 3), "bracket of three": (1 / 3, 1, 3)},
    "SAM": {"bracket of two": (1, 3), "bracket of three": (1 / 3, 1, 3)},
    "LPF-SGD": {"bracket of two": (1 / 2, 1), "bracket of three": (1 / 2, 1, 2)},
}
RECIPES = {"NSO": (1, 3), "SAM": (1, 3), "LPF-SGD": (1 / 2, 1, 2)}
CLIFFS = {"NSO": 0.5, "SAM": 2.0, "LPF-SGD": 0.5}  # of what a guess loses
EDGES = (0, 0.03, 0.1, 0.25, 0.5, 1, 2, 4, 8, np.inf)
WORST = 10.0  # nats
NONE, DEFAULT, GRID = 0, 1, 2  # places among the radii of a run


def places_of(method):
    """Where the grid and each factor of the start value stand among a run's radii."""
    grid = list(range(GRID, GRID + len(GRIDS[method])))
    rule = {factor: grid[-1] + 1 + i for i, factor in enumerate(FACTORS[method])}
    return grid, rule


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
    logs = np.log(np.clip(rise, 1e-9, 1e9))
    return np.exp(np.interp(np.log(wanted), np.log(found.radii), logs))


def measure(config, training, method):
    """All radii, seeds and shares of wrong labels of one network and method."""
    problems = list(itertools.product(range(1, 1 + config.seeds), config.shares))
    rows, rises, starts, guesses = [], [], [], []
    for problem in problems:
        found = training.effects(method, *problem)
        start = start_of(method, found)
        rule = start * np.array(FACTORS[method])
        row = np.concatenate([[0.0, DEFAULTS[method]], GRIDS[method], rule])
        guess = max(float(found.loss), np.log(training.num_classes))
        rows.append(row)
        starts.append(start)
        guesses.append(guess)
        rises.append(np.concatenate([[0.0], rises_at(found, row[1:])]))
    found = training.at_radii(METHODS[method], np.array(rows), problems)
    found |= {"radii": rows, "start": starts, "rise": rises, "guess": guesses}
    shape = config.seeds, len(config.shares)

    def of_share(tree, index):
        if isinstance(tree, dict):
            return {name: of_share(x, index) for name, x in tree.items()}
        return np.reshape(tree, (*shape, *np.shape(tree)[1:]))[:, index]

    return {str(share): of_share(found, i) for i, share in enumerate(config.shares)}


def compute(config, piece):
    pairs = [
        pair
        for pair in itertools.product(config.networks, config.data)
        if pair[0] != "CNN" or pair[1] == "digits"
    ]
    tasks = {}
    with common.shown(piece, total=len(pairs) * len(GRIDS)) as piece:
        for network, data in pairs:
            training = radii.Training(config, network, data)
            labels = np.asarray(training.splits[0][1])
            guess = np.bincount(labels).max() / len(labels)
            for method in GRIDS:
                found = piece(
                    f"{network}, {data}, {method}",
                    lambda t=training, m=method: measure(config, t, m),
                )
                for share, runs in found.items():
                    task = tasks.setdefault(
                        f"{network}, {data}, {share} wrong",
                        {"network": network, "data": data, "guess": guess},
                    )
                    task |= {"wrong": float(share), method: runs}
    return {"tasks": tasks} | {
        method: summarize(method, list(tasks.values())) for method in GRIDS
    }


# What strategies lose


def scores(task, method, goal):
    """Validation and test scores, (seeds, radii); a loss above 10 nats counts as 10."""
    found = []
    for split in ("validation", "test"):
        values = np.array(task[method][split][goal], float)
        if goal == "loss":
            values = -np.minimum(np.nan_to_num(values, nan=WORST, posinf=WORST), WORST)
        found.append(values)
    return found


def kept(validation, test, places):
    """Test score of the radius that is best on validation data, a mean over ties."""
    own = validation[:, places]
    best = own == own.max(axis=1, keepdims=True)
    return (test[:, places] * best).sum(axis=1) / best.sum(axis=1)


def by_recipe(method, task, validation, test):
    """None and the rule's radii; then one more beyond the end that won."""
    _, rule = places_of(method)
    factors = RECIPES[method]
    low, high = rule[factors[0]], rule[factors[-1]]
    few = [NONE, *(rule[factor] for factor in factors)]
    found = []
    for seed, own in enumerate(validation):
        best = few[int(np.argmax(own[few]))]
        tried = list(few)
        if best in (NONE, low):
            tried.append(min(rule.values()))
        if best == high:
            farthest = max(rule.values())
            rise = task[method]["rise"][seed][farthest]
            if rise < CLIFFS[method] * task[method]["guess"][seed]:
                tried.append(farthest)
        found.append(kept(validation[[seed]], test[[seed]], tried)[0])
    return np.array(found)


def constant(method, goal, others, sets):
    """The set of places whose best validation score is highest, a mean of other tasks."""
    tables = [scores(task, method, goal)[0] for task in others]
    means = [
        np.mean([table[:, s].max(axis=1).mean() for table in tables]) for s in sets
    ]
    return sets[int(np.argmax(means))]


def regrets(method, goal, task, tasks):
    """What each strategy loses against the whole grid on one task, a mean over seeds."""
    validation, test = scores(task, method, goal)
    grid, rule = places_of(method)
    best = {"whole grid": [NONE, *grid], "none": [NONE], "paper's default": [DEFAULT]}
    singles = [[place] for place in grid]
    pairs = [[NONE, *pair] for pair in itertools.combinations(grid, 2)]
    for left_out in ("task", "network", "data"):
        others = [
            other
            for other in tasks
            if other is not task
            and (left_out == "task" or other[left_out] != task[left_out])
        ]
        name = {"data": "data set"}.get(left_out, left_out)
        if others:
            one = constant(method, goal, others, singles)
            two = constant(method, goal, others, pairs)
            best |= {
                f"one constant, {name} left out": one,
                f"two constants, {name} left out": two,
            }
    best["start value alone"] = [rule[1]]
    for name, factors in BRACKETS[method].items():
        best[name] = [NONE, *(rule[factor] for factor in factors)]
    found = {name: kept(validation, test, places) for name, places in best.items()}
    found["recipe"] = by_recipe(method, task, validation, test)
    found["best on test data"] = test[:, [NONE, *grid]].mean(axis=0).max()
    return {name: np.mean(found["whole grid"] - x) for name, x in found.items()}


def summarize(method, tasks):
    regret = {}
    for goal in GOALS:
        rows = [regrets(method, goal, task, tasks) for task in tasks]
        regret[goal] = {
            strategy: summary([row[strategy] for row in rows], tasks)
            for strategy in rows[0]
            if all(strategy in row for row in rows)
        }
    return {"regret": regret, "cliff": cliff(method, tasks)}


def summary(values, tasks):
    """Over all tasks, and apart for clean and wrong labels."""
    values = np.array(values)
    wrong = np.array([task["wrong"] > 0 for task in tasks])
    found = {"all": values, "clean": values[~wrong], "wrong": values[wrong]}
    found = {name: statistics.with_interval(x) for name, x in found.items()}
    return found | {"worst": values.max(), "each": values}


def cliff(method, tasks):
    """Where training collapses, by the rise at the start over what a guess loses.

    A run has collapsed where three quarters of the validation accuracy that it has without
    perturbation, above that of the most frequent class, are lost.
    """
    rises, collapsed, changes = [], [], []
    for task in tasks:
        runs = task[method]
        accuracy = np.array(runs["validation"]["accuracy"], float)
        rise = np.array(runs["rise"]) / np.array(runs["guess"])[:, None]
        limit = task["guess"] + (accuracy[:, NONE] - task["guess"]) / 4
        rises.append(rise[:, 1:].ravel())
        collapsed.append((accuracy < limit[:, None])[:, 1:].ravel())
        test = np.array(runs["test"]["accuracy"], float)
        changes.append((test - test[:, [NONE]])[:, 1:].ravel())
    rises, collapsed, changes = map(np.concatenate, (rises, collapsed, changes))
    bins = [
        {"from": low, "runs": int(inside.sum()), "collapsed": int(own.sum())}
        for low, high in itertools.pairwise(EDGES)
        for inside in [(rises >= low) & (rises < high)]
        for own in [collapsed[inside]]
    ]

    def wrong_calls(limit):
        return int(((rises >= limit) != collapsed).sum())

    limits = np.geomspace(0.03, 30, 61)
    best = limits[int(np.argmin([wrong_calls(limit) for limit in limits]))]
    nothing = rises < 1e-4
    return {
        "runs": len(rises),
        "collapsed": int(collapsed.sum()),
        "bins": bins,
        "limit": CLIFFS[method],
        "wrong_at_limit": wrong_calls(CLIFFS[method]),
        "best_limit": best,
        "wrong_at_best": wrong_calls(best),
        "nothing": {
            "runs": int(nothing.sum()),
            "change": np.abs(changes[nothing]).mean() if nothing.any() else 0.0,
        },
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
    "whole grid",
)


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(1, 4, figsize=(17, 5), layout="constrained")
    for axis, method in zip(axes, GRIDS, strict=False):
        found = results[method]["regret"]["accuracy"]
        names = [name for name in SHOWN if name in found]
        for index, labels in enumerate(("clean", "wrong")):
            own = [found[name][labels] for name in names]
            means = np.array([100 * x["mean"] for x in own])
            errors = np.array([100 * x["error"] for x in own])
            rows = np.arange(len(names)) + 0.2 * index
            axis.errorbar(means, rows, xerr=errors, fmt="o", label=f"{labels} labels")
        figures.set_rows(axis, names if method == "NSO" else [""] * len(names))
        axis.axvline(0, color="black", linestyle=":")
        axis.set(title=method, xlabel="points lost against the whole grid")
    axes[0].legend(loc="lower right")
    for method in GRIDS:
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
    for method, goal in itertools.product(GRIDS, GOALS):
        for name, found in report["results"][method]["regret"][goal].items():
            scale = 1 if goal == "loss" else 100
            cells = (
                f"{key} {scale * found[key]['mean']:.2f} ± {scale * found[key]['error']:.2f}"
                for key in ("all", "clean", "wrong")
            )
            worst = scale * found["worst"]
            yield "   ".join([f"{method}, {goal}, {name:34}", *cells, f"{worst:.1f}"])
        if goal == GOALS[-1]:
            yield f"{method}: {report['results'][method]['cliff']}"


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
