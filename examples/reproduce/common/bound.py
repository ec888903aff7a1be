"""The shape of a PAC-Bayes bound with the trace of the Hessian, against measured gaps."""

from typing import Any

import numpy as np
import pandas as pd

from .cells import CELL, each_and_all, runs_of
from .statistics import columns_of, rank_correlation

GAPS = ("loss_gap", "accuracy_gap")


def of_runs(networks: dict[str, dict[str, dict]], num_images: int) -> pd.DataFrame:
    r"""All final runs, with :math:`\sqrt{C\,\mathrm{tr}H\,r^2 / n}` as ``"bound"``.

    C is the largest loss of a network's runs, r the distance from the start, n the number
    of training images.
    """
    runs = runs_of(networks, ["trace", "distance", *GAPS, "largest_loss"])
    largest = runs.groupby("network")["largest_loss"]
    constant = largest.transform(lambda own: own.to_numpy().max())
    shape = np.sqrt(constant * runs["trace"].clip(lower=0) / num_images)
    return runs.assign(bound=runs["distance"] * shape)


def summarize(runs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The bound against the gaps, for each network and for all."""
    return {name: summarize_group(own) for name, own in each_and_all(runs)}


def summarize_group(runs):
    bound, gap = runs["bound"].to_numpy(), runs["loss_gap"].to_numpy()
    return {
        "runs": len(runs),
        "largest_loss": runs["largest_loss"].to_numpy().max(),
        **columns_of(runs, ["bound", "loss_gap"]),
        "median_ratio": np.median(bound / gap),
        "violated": int((bound < gap).sum()),
        "kendall": kendall([runs]),
        "kendall_within_cells": kendall([own for _, own in runs.groupby(CELL)]),
    }


def kendall(groups):
    """Kendall's tau of three measures with both gaps, the mean over groups of runs."""
    return {
        measure: {
            gap: np.mean(
                [rank_correlation(runs[measure], runs[gap]) for runs in groups]
            )
            for gap in GAPS
        }
        for measure in ("bound", "trace", "distance")
    }
