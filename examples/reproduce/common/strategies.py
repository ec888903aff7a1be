"""Which radii a strategy may try, what it loses against a grid, and which runs collapse."""

import itertools

import numpy as np

from . import held, statistics
from .radii import GOALS

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


def loops_of(method):
    """The places of the loop's runs that each strategy tries, behind those of the radii."""
    _, rule = places_of(method)
    first, second, third = (max(rule.values()) + 1 + i for i in range(3))
    low, middle, high = held.TARGETS
    return {
        f"loop at {low}": [first],
        f"loop at {middle}": [second],
        f"loop at {high}": [third],
        f"loop at {middle}, or none": [NONE, second],
        f"loop at {low} and {high}, or none": [NONE, first, third],
        "loop at all three, or none": [NONE, first, second, third],
    }


# What strategies lose


def scores(task, method, goal):
    """Validation and test scores, (seeds, radii); a loss above 10 nats counts as 10.

    The runs of the loop follow those of the radii, where there are any.
    """
    parts = [task[method]]
    if "held" in task[method]:
        parts.append(task[method]["held"])
    found = []
    for split in ("validation", "test"):
        own = [np.array(part[split][goal], float) for part in parts]
        values = np.concatenate(own, axis=1)
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
    if "held" in task[method]:
        best |= loops_of(method)
    found = {name: kept(validation, test, places) for name, places in best.items()}
    found["recipe"] = by_recipe(method, task, validation, test)
    found["best on test data"] = test[:, [NONE, *grid]].mean(axis=0).max()
    return {name: np.mean(found["whole grid"] - x) for name, x in found.items()}


def summarize(method, dense, added):
    """What strategies lose on the dense networks' tasks, and on those of another kind.

    Constants are chosen on the dense networks alone.
    """
    found = {"regret": {}, "added": {}, "cliff": cliff(method, dense)}
    for goal in GOALS:
        rows = [regrets(method, goal, task, dense) for task in dense + added]
        parts = {"regret": (rows[: len(dense)], dense)}
        if added:
            parts["added"] = rows[len(dense) :], added
        for part, (own, tasks) in parts.items():
            found[part][goal] = {
                strategy: summary([row[strategy] for row in own], tasks)
                for strategy in own[0]
                if all(strategy in row for row in own)
            }
    return found | {"loop": loop(method, found, dense, added)}


# Fixed before the runs. The loop is confirmed where it loses less than as many runs of the
# rule by more than two standard errors, no less on tasks of another kind, and no run fails.
PAIRS = (
    ("bracket of two", f"loop at {held.TARGETS[0]} and {held.TARGETS[2]}, or none"),
    ("bracket of three", "loop at all three, or none"),
    ("start value alone", f"loop at {held.TARGETS[1]}"),
)


def loop(method, found, dense, added):
    """What the loop loses less than as many runs of the rule, and its runs that fail."""
    regret = {"dense": found["regret"], "added": found["added"]}
    gains = {
        f"{theirs} less {ours}": {
            part: {
                goal: statistics.with_interval(
                    own[goal][theirs]["each"] - own[goal][ours]["each"]
                )
                for goal in own
            }
            for part, own in regret.items()
            if own and ours in own["accuracy"]
        }
        for theirs, ours in PAIRS
    }
    return {"gains": gains} | {
        part: [failures(task, method) for task in tasks if "held" in task[method]]
        for part, tasks in (("dense", dense), ("added", added))
    }


def summary(values, tasks):
    """Over all tasks, and apart for clean and wrong labels."""
    values = np.array(values)
    wrong = np.array([task["wrong"] > 0 for task in tasks])
    found = {"all": values, "clean": values[~wrong], "wrong": values[wrong]}
    found = {name: statistics.with_interval(x) for name, x in found.items() if len(x)}
    return found | {"worst": values.max(), "each": values}


def collapsed(task, method, accuracy):
    """Which validation accuracies, (seeds, runs), are those of runs that have collapsed.

    They have lost three quarters of what the accuracy without perturbation has above that
    of the most frequent class.
    """
    plain = np.array(task[method]["validation"]["accuracy"], float)[:, [NONE]]
    limit = task["guess"] + (plain - task["guess"]) / 4
    return np.array(accuracy, float) < limit


def failures(task, method):
    """How many runs of the loop have collapsed at each target, and how far it went."""
    runs = task[method]["held"]
    own = collapsed(task, method, runs["validation"]["accuracy"])
    start = np.array(task[method]["start"])[:, None]
    return {
        "runs": own.shape[0],
        "collapsed": own.sum(axis=0),
        "last": np.median(np.array(runs["last"]) / start, axis=0),
        "largest": np.median(np.array(runs["largest"]) / start, axis=0),
        "share": np.median(np.array(runs["share"], float), axis=0),
    }


def cliff(method, tasks):
    """Where training collapses, by the rise at the start over what a guess loses."""
    rises, lost, changes = [], [], []
    for task in tasks:
        runs = task[method]
        rise = np.array(runs["rise"]) / np.array(runs["guess"])[:, None]
        rises.append(rise[:, 1:].ravel())
        own = collapsed(task, method, runs["validation"]["accuracy"])
        lost.append(own[:, 1:].ravel())
        test = np.array(runs["test"]["accuracy"], float)
        changes.append((test - test[:, [NONE]])[:, 1:].ravel())
    rises, lost, changes = map(np.concatenate, (rises, lost, changes))
    bins = [
        {"from": low, "runs": int(inside.sum()), "collapsed": int(own.sum())}
        for low, high in itertools.pairwise(EDGES)
        for inside in [(rises >= low) & (rises < high)]
        for own in [lost[inside]]
    ]

    def wrong_calls(limit):
        return int(((rises >= limit) != lost).sum())

    limits = np.geomspace(0.03, 30, 61)
    best = limits[int(np.argmin([wrong_calls(limit) for limit in limits]))]
    nothing = rises < 1e-4
    return {
        "runs": len(rises),
        "collapsed": int(lost.sum()),
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
