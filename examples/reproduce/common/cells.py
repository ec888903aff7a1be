"""Comparisons of methods over cells: a network and a share of label noise each.

A table of runs has an index of network, method, share of label noise ("noise") and seed;
runs of equal seeds have the same images and start, and are compared in pairs.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from .statistics import by_group, columns_of, from_logarithm, mean_and_error, mean_of

MEASURED = ("test_accuracy", "trace", "max_eigenvalue", "loss curve", "trace curve")
CELL = ["network", "noise"]


def runs_of(
    networks: dict[str, dict[str, dict]], names: Iterable[str] = MEASURED
) -> pd.DataFrame:
    """These columns of all final runs, a row each.

    Args:
      networks: for each network, or row of a table, its methods by name; in each method's
        ``"runs"`` a dict of columns for each share of label noise, the same for all.
      names: of the columns.
    """
    tables = {
        (network, method, noise): pd.DataFrame(
            {name: found["runs"][noise][name] for name in names}
        )
        for network, methods in networks.items()
        for noise in next(iter(methods.values()))["runs"]
        for method, found in methods.items()
    }
    return pd.concat(tables, names=["network", "method", "noise", "seed"])


def by_method(runs: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """The runs of each method of each network, by share of label noise and seed."""
    levels = ["network", "method"]
    return by_group(runs, levels, lambda own: own.droplevel(levels))


def shortened(method: dict) -> dict:
    """A method's results with means over seeds in place of each run's curves."""
    runs = {
        share: {
            name: np.mean(column, axis=0) if name.endswith("curve") else column
            for name, column in columns.items()
        }
        for share, columns in method["runs"].items()
    }
    return method | {"runs": runs}


def paired(runs: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Gains in accuracy, and ratios as logarithms, over those of equal cell and seed.

    Args:
      runs: some runs.
      base: runs of one method, whose index has the same levels or lacks the method.
    """
    missing = [name for name in runs.index.names if name not in base.index.names]
    base = base.loc[runs.index.droplevel(missing)].set_axis(runs.index)
    curves = [t[name] for t in (runs, base) for name in ("loss curve", "trace curve")]
    matched = [at_matched_loss(*four) for four in zip(*curves, strict=True)]
    level, trace = np.transpose(matched)
    ratios = runs[["trace", "max_eigenvalue"]] / base[["trace", "max_eigenvalue"]]
    ratios = ratios.add_suffix("_ratio").assign(matched_trace_ratio=trace)
    table = np.log(ratios).assign(matched_loss=level)
    table.insert(0, "accuracy_gain", runs["test_accuracy"] - base["test_accuracy"])
    return table


def at_matched_loss(loss, trace, base_loss, base_trace):
    """The lowest training loss both runs of a pair have passed, and the ratio of traces."""
    level = max(min(loss), min(base_loss))
    return level, trace_at(level, loss, trace) / trace_at(level, base_loss, base_trace)


def trace_at(level, loss, trace):
    """The trace where a run first passes a loss, interpolated in logarithms."""
    after = int(np.argmax(np.asarray(loss) <= level))
    before = max(after - 1, 0)
    log_losses = np.log([loss[after], loss[before]])
    log_traces = np.log(np.maximum([trace[after], trace[before]], 1e-3))
    return np.exp(np.interp(np.log(level), log_losses, log_traces))


def means(pairs: pd.DataFrame) -> dict[str, dict]:
    """Means and errors of what `paired` returns; geometric means of ratios."""
    found = columns_of(pairs)
    ratios = [name for name in found if name.endswith("_ratio")]
    return found | {name: from_logarithm(found[name]) for name in ratios}


def means_over_cells(pairs: pd.DataFrame) -> dict[str, dict]:
    """The same of each seed's mean over the cells."""
    return means(pairs.groupby("seed").agg(mean_of))


def each_and_all(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each network, then all."""
    yield from table.groupby("network", sort=False)
    yield "all", table


def over_cells(pairs: pd.DataFrame) -> dict[str, dict[str, dict]]:
    """For each method wins and losses beyond two standard errors, and means over cells."""
    pairs = pairs.drop(columns="matched_loss")
    return {
        name: by_group(own, "method", summarize_cells)
        for name, own in each_and_all(pairs)
    }


def summarize_cells(pairs):
    cells = pairs["accuracy_gain"].groupby(CELL)
    gains = pd.DataFrame([mean_and_error(own) for _, own in cells])
    wins = int((gains["mean"] > 2 * gains["error"]).sum())
    losses = int((gains["mean"] < -2 * gains["error"]).sum())
    return {
        "wins": wins,
        "losses": losses,
        "ties": len(gains) - wins - losses,
        "largest_gain": gains["mean"].max(),
    } | means_over_cells(pairs)
