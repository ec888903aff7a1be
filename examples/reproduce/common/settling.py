"""Summaries of where optimizers settle, what they see on the way, and how they leave."""

import numpy as np

from . import statistics
from .optimizers import LIMITS

ROUNDING = 1e-6  # a loss below which a step's direction is rounding and oscillation


def intervals(table):
    """Mean, error and Student's 95 % interval of each column."""
    return {name: statistics.with_interval(table[name]) for name in table}


def settled(rows):
    """Where runs ended: those at minima, and all that are finite."""
    found = statistics.outcomes(rows)
    shares = rows.reindex(columns=["over_limit", "over_exact"])
    for name, which in {
        "minima": rows["outcome"] == "minimum",
        "finite": shares["over_exact"].notna(),
    }.items():
        own = shares[which]
        found[name] = intervals(own) if len(own) else {}
        found[name] |= {"above_exact": int((own["over_exact"] > 1.05).sum())}
    return found


def critical(rows):
    """The critical sharpness over the largest eigenvalue, at the points of the runs.

    Ratios are of points above ``ROUNDING`` at which both are finite and positive; their
    logarithms are averaged in each run first. "At the limit" are points at which the
    learning rate, warming up, times the eigenvalue is within a tenth of the limit.
    """
    points = points_of(rows)
    found, largest = points["critical"], points["max_eigenvalue"]
    is_seen = (points["loss"] > ROUNDING) & np.isfinite(found)
    is_seen &= (found > 0) & (largest > 0)
    own = points[is_seen]
    logs = np.log(own["critical"] / own["max_eigenvalue"])
    near = logs[abs(own["over_limit"] - 1) < 0.1]
    taus = [
        statistics.rank_correlation(run["critical"], run["max_eigenvalue"])
        for _, run in own.groupby("seed")
    ]
    taus = [tau for tau in taus if np.isfinite(tau)]
    return {
        "points": len(points),
        "used": len(own),
        "below_rounding": int((points["loss"] <= ROUNDING).sum()),
        "never_rises": int((found == 0).sum()),
        "rises_at_once": int(np.isinf(found).sum()),
        "unknown": int(found.isna().sum()),
        "ratio": geometric(logs.groupby(own["seed"]).mean()),
        "at_the_limit": {"points": len(near)}
        | geometric(near.groupby(own["seed"]).mean()),
        "within_half_and_twice": int((abs(logs) <= np.log(2)).sum()),
        "tau": statistics.with_interval(taus or [np.nan]),
    }


def points_of(rows):
    """A row for each point of the runs that stayed finite."""
    (name,) = rows["optimizer"].unique()
    lists = ["step", "loss", "critical", "max_eigenvalue"]
    points = rows[["seed", "learning_rate", *lists]]
    points = points[points["critical"].map(len) > 0]
    points = points.explode(lists, ignore_index=True).astype(float)
    warm_up = points["step"].max() // 4
    rate = points["learning_rate"] * np.minimum(1, points["step"] / warm_up)
    return points.assign(over_limit=rate * points["max_eigenvalue"] / LIMITS[name])


def geometric(logs):
    """The geometric mean and its 95 % interval; nothing of nothing."""
    if not len(logs):
        return {}
    found = statistics.with_interval(logs)
    return {name: np.exp(found[name]) for name in ("mean", "low", "high")}


def escapes(rows):
    """Means over minima of growth and shares, and how far the logarithms are apart."""
    kinds = "network", "linear"
    names = [f"{kind}.{what}" for kind in kinds for what in ("mean", "median", "left")]
    logs = np.log(rows[["expected", *(n for n in names if "left" not in n)]])
    apart = {f"{kind}_over_expected": f"{kind}.mean" for kind in kinds}
    apart = {n: logs[own] - logs["expected"] for n, own in apart.items()}
    apart["medians"] = logs["network.median"] - logs["linear.median"]
    signs = np.sign(logs["network.mean"]) == np.sign(logs["expected"])
    columns = rows[["growth_rate", "expected", *names, "learning_rate", "minimum_loss"]]
    return intervals(columns.astype(float)) | {
        "cells": len(rows),
        "same_side": int(signs.sum()),
        "median_same_side": int(
            (np.sign(logs["network.median"]) == np.sign(logs["expected"])).sum()
        ),
        "log_growth_apart": {n: statistics.with_interval(v) for n, v in apart.items()},
        "largest_apart": {n: np.nanmax(abs(v)) for n, v in apart.items()},
    }
