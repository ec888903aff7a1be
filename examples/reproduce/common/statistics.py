"""Means with errors, paired comparisons and rank correlations.

Runs are the rows of a table: its columns say which run it is and what was measured.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import tqdm


def mean_and_error(values: Any) -> dict[str, Any]:
    """Mean, standard error over the first axis, and the number of values."""
    values = np.asarray(values, float)
    count = len(values)
    error = values.std(axis=0, ddof=1) / count**0.5 if count > 1 else np.nan
    return {"mean": values.mean(axis=0), "error": error, "count": count}


def with_interval(values: Any) -> dict[str, Any]:
    """`mean_and_error`, and the ends of Student's 95 % interval of the mean."""
    found = mean_and_error(values)
    half = scipy.stats.t.ppf(0.975, max(found["count"] - 1, 1)) * found["error"]
    return found | {"low": found["mean"] - half, "high": found["mean"] + half}


def from_logarithm(summary: dict[str, Any]) -> dict[str, Any]:
    """The geometric mean and its error, of `mean_and_error` of logarithms."""
    mean = np.exp(summary["mean"])
    return summary | {"mean": mean, "error": mean * summary["error"]}


def columns_of(
    table: pd.DataFrame | dict[str, Any], names: Iterable[str] | None = None
) -> dict[str, dict]:
    """`mean_and_error` of each column, or of those named."""
    names = table.keys() if names is None else names
    return {name: mean_and_error(table[name]) for name in names}


def mean_of(values: pd.Series) -> float:
    """The mean, not finite where a value is not: a run that diverged is never dropped."""
    return values.to_numpy().mean()


def outcomes(rows: pd.DataFrame) -> dict[str, Any]:
    """How many runs there are, and how many had each outcome."""
    return {
        "runs": len(rows),
        "outcomes": rows["outcome"].value_counts().sort_index().to_dict(),
    }


def by_group(table: pd.DataFrame, by: str | list[str], function: Callable) -> dict:
    """``function`` of the rows of each group, in order of appearance.

    Where ``by`` is a list, the dict is nested: a level for each name.
    """
    if isinstance(by, str):
        by = [by]
    name, *rest = by
    return {
        key: by_group(group, rest, function) if rest else function(group)
        for key, group in table.groupby(name, sort=False)
    }


# Comparisons of methods


def runs_of(methods: dict[str, dict]) -> pd.DataFrame:
    """A row for each final run of `methods.compare`: method, run, what was measured."""
    return pd.DataFrame(
        [
            {"method": name, "run": index} | run
            for name, method in methods.items()
            for index, run in enumerate(method["runs"])
        ]
    )


def summaries(runs: pd.DataFrame, names: Iterable[str], finite: str) -> dict:
    """Means and errors for each method, and how many runs have no finite ``finite``."""
    return by_group(
        runs,
        "method",
        lambda group: (
            columns_of(group, names)
            | {"diverged": int((~np.isfinite(group[finite])).sum())}
        ),
    )


def pairs(
    runs: pd.DataFrame, base: str | Callable[[str], str]
) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """For each method its runs and those of a base, paired by the run's number."""
    tables = by_group(runs, "method", lambda group: group.set_index("run"))
    base_of = base if callable(base) else lambda _: base
    return {name: (table, tables[base_of(name)]) for name, table in tables.items()}


def summary_lines(
    results: dict, stages: tuple[str, ...], columns: tuple[str, ...]
) -> Iterable[str]:
    """Means and errors of some columns, a line for each method of each stage."""
    for stage in stages:
        for name, row in results[stage]["summary"].items():
            cells = (
                f"{column} {row[column]['mean']:.4g} ± {row[column]['error']:.2g}"
                for column in columns
            )
            yield "   ".join([f"{stage}, {name:24}", *cells])


# Rank correlations


def rank_correlation(
    x: Any, y: Any, correlation: Callable = scipy.stats.kendalltau
) -> float:
    """Kendall's tau-b, or ``scipy.stats.spearmanr``, where both values are finite."""
    x, y = np.asarray(x), np.asarray(y)
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 2:
        return np.nan
    return float(correlation(x[both], y[both]).statistic)


def correlation_within(by: pd.DataFrame, x: pd.Series, y: pd.Series) -> dict:
    """Mean and error of the rank correlations within groups of rows that agree in ``by``."""
    groups = by.assign(_x=x, _y=y).groupby(list(by.columns))
    found = [
        rank_correlation(own["_x"], own["_y"]) for _, own in groups if len(own) > 1
    ]
    found = [value for value in found if np.isfinite(value)]
    return (
        mean_and_error(found)
        if found
        else {"mean": np.nan, "error": np.nan, "count": 0}
    )


def resampled_correlations(
    values: pd.DataFrame, y: pd.Series, resamples: int, seed: int = 0
) -> pd.DataFrame:
    """The rank correlation of each column with ``y``, a row for each bootstrap sample."""
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, len(y), (resamples, len(y)))
    y = y.to_numpy()
    columns = {name: column.to_numpy() for name, column in values.items()}
    return pd.DataFrame(
        [
            {name: rank_correlation(x[rows], y[rows]) for name, x in columns.items()}
            for rows in tqdm.tqdm(samples, desc="bootstrap", leave=False)
        ]
    )


def interval(samples: Any) -> np.ndarray:
    """The middle 95 percent of bootstrap samples."""
    return np.quantile(samples, [0.025, 0.975])
