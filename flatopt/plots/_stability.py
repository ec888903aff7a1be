"""Figures of the stability of SGD: thresholds, norms over their bounds, losses."""

from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from flatopt import stability
from flatopt._core.types import Optimizer, Sampling
from flatopt.plots._axes import check_axes, ink, new_axes
from flatopt.stability import _checks


def stability_thresholds(
    lin: stability.Linearization,
    *,
    batch_sizes: Any = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """The largest stable learning rate against the batch size, by each theory.

    Args:
      lin: from :func:`flatopt.stability.linearize`.
      batch_sizes: the batch sizes; default: powers of two up to all examples.
      learning_rate: with ``batch_size``, a setting to mark.
      batch_size: with ``learning_rate``, a setting to mark.
      sampling, optimizer, opt_state: see :func:`flatopt.stability.thresholds`.
      ax: matplotlib axes to draw into.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax.numpy as jnp
      >>> from flatopt import plots, stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> ax = plots.stability_thresholds(lin)
      >>> ax.get_xlabel()
      'batch size'
    """
    check_axes(ax)
    _check_mark(learning_rate, batch_size, lin)
    asked = dict(sampling=sampling, optimizer=optimizer, opt_state=opt_state)
    found = _thresholds(lin, batch_sizes, asked)
    return _draw_thresholds(found, learning_rate, batch_size, ax)


def stability_plane(
    lin: stability.Linearization,
    *,
    mu: float | None = None,
    batch_sizes: Any = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The Frobenius norm over its bound, for each learning rate and batch size.

    Colors show :math:`\|H\|_F` over :math:`1 / (\eta \sqrt{p \mu})`, which is
    :math:`\sqrt{B / \mu} / \eta` for much data; above the thin line, where they are equal,
    the theory of Wu, Wang and Su has SGD leave. The thick line is the exact threshold.
    The bound is for plain SGD: with another optimizer colors show the learning rate over
    the exact threshold, and the thin line is the limit of the whole data in one batch.

    Args:
      lin: from :func:`flatopt.stability.linearize`.
      mu: the alignment; default: that of ``lin``, or 1 at zero loss.
      batch_sizes, learning_rate, batch_size, sampling, optimizer, opt_state, ax: see
        :func:`stability_thresholds`.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax.numpy as jnp
      >>> from flatopt import plots, stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> ax = plots.stability_plane(lin)
      >>> ax.get_ylabel()
      'learning rate'
    """
    check_axes(ax)
    _check_mark(learning_rate, batch_size, lin)
    if mu is not None:
        _checks.check_rate(mu, "mu")
    asked = dict(sampling=sampling, optimizer=optimizer, opt_state=opt_state)
    found = _thresholds(lin, batch_sizes, asked)
    return _draw_plane(lin, found, mu, learning_rate, batch_size, asked, ax)


def stability_losses(
    lin: stability.Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    num_steps: int = 100,
    num_runs: int = 200,
    key: jax.Array | None = None,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Losses of linearized SGD: the exact mean, and the median and spread of runs.

    Rare runs carry the mean: it can grow while a typical run shrinks.

    Args:
      lin: from :func:`flatopt.stability.linearize`.
      learning_rate: the step size.
      batch_size: B.
      num_steps: number of steps.
      num_runs: number of runs.
      key: a JAX random key for the runs; default: ``jax.random.key(0)``.
      sampling, optimizer, opt_state, ax: see :func:`stability_thresholds`.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax.numpy as jnp
      >>> from flatopt import plots, stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> ax = plots.stability_losses(lin, 3.0, 1, num_steps=3)
      >>> round(float(ax.lines[0].get_ydata()[-1]), 3)  # 2.5 to the third
      15.625
    """
    check_axes(ax)
    arguments = learning_rate, batch_size, num_steps
    asked = dict(sampling=sampling, optimizer=optimizer, opt_state=opt_state)
    exact = stability.expected_losses(lin, *arguments, **asked)
    key = jax.random.key(0) if key is None else key
    runs = np.asarray(
        stability.simulate(lin, key, *arguments, num_runs=num_runs, **asked)
    )
    ax = new_axes(ax, xlabel="step", ylabel="loss, linearized", yscale="log")
    ax.plot(exact, linewidth=2, label="mean, exact")
    (line,) = ax.plot(np.median(runs, axis=0), "--", label="median run")
    low, high = np.quantile(runs, [0.05, 0.95], axis=0)
    ax.fill_between(
        np.arange(num_steps + 1),
        low,
        high,
        alpha=0.2,
        color=line.get_color(),
        label="nine runs of ten",
    )
    ax.legend(fontsize="small")
    return ax


def stability_report(
    lin: stability.Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
) -> tuple[Axes, ...]:
    """Thresholds, norms and losses at one setting, side by side.

    Args:
      lin: from :func:`flatopt.stability.linearize`.
      learning_rate: the step size.
      batch_size: B.
      sampling, optimizer, opt_state: see :func:`flatopt.stability.thresholds`.

    Returns:
      The three axes, of :func:`stability_thresholds`, :func:`stability_plane` and
      :func:`stability_losses`.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax.numpy as jnp
      >>> from flatopt import plots, stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> len(plots.stability_report(lin, 1.0, 1))
      3
    """
    _check_mark(learning_rate, batch_size, lin)
    _, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    setting = learning_rate, batch_size
    asked = dict(sampling=sampling, optimizer=optimizer, opt_state=opt_state)
    found = _thresholds(lin, None, asked)
    _draw_thresholds(found, *setting, axes[0])
    _draw_plane(lin, found, None, *setting, asked, axes[1])
    stability_losses(lin, *setting, ax=axes[2], **asked)
    return tuple(axes)


def _thresholds(lin, batch_sizes, asked):
    """Thresholds by batch size."""
    if batch_sizes is not None and not np.size(batch_sizes):
        raise ValueError("batch_sizes must hold batch sizes, got none; write [1, 8].")
    if batch_sizes is None:
        n = len(lin.coordinates)
        batch_sizes = sorted({*(2 ** np.arange(int(np.log2(n)) + 1)).tolist(), n})
    sizes = np.atleast_1d(batch_sizes).tolist()
    return {b: stability.thresholds(lin, b, **asked) for b in sizes}


def _setting_axes(ax):
    return new_axes(
        ax, xlabel="batch size", ylabel="learning rate", xscale="log", yscale="log"
    )


def _draw_thresholds(found, learning_rate, batch_size, ax):
    ax = _setting_axes(ax)
    batch_sizes, found = list(found), list(found.values())
    for name in found[0].rates:
        rates = np.array([f.rates[name] for f in found])
        rates[~np.isfinite(rates)] = np.nan
        exact = name == "mean_square"
        ax.plot(
            batch_sizes,
            rates,
            label=name.replace("_", " ") + (" (exact)" if exact else ""),
            linewidth=3 if exact else 1,
        )
    _mark(ax, learning_rate, batch_size)
    ax.legend(fontsize="small")
    return ax


def _draw_plane(lin, found, mu, learning_rate, batch_size, asked, ax):
    batch_sizes, found = list(found), list(found.values())
    exact = np.array([f.mean_square for f in found])
    rates = np.geomspace(exact.min() / 10, 4 * found[0].gradient_descent, 60)
    if asked["optimizer"] is None:
        ratio = _norm_over_bound(lin, mu, rates, batch_sizes, asked["sampling"])
        quantity, line = "Frobenius norm over its bound", "norm at its bound"
    else:
        ratio = rates[:, None] / exact[None]
        quantity, line = "learning rate over the exact threshold", None
    ax = _setting_axes(ax)
    ratio = np.log10(np.maximum(ratio, 1e-2))
    filled = ax.contourf(batch_sizes, rates, ratio, levels=20, cmap="coolwarm")
    ax.figure.colorbar(filled, ax=ax, label=f"log10 of {quantity}")
    if line is None:
        limit = found[0].gradient_descent
        ax.axhline(limit, color="k", linewidth=1, label="all data in one batch")
    elif ratio.min() < 0 < ratio.max():
        ax.contour(batch_sizes, rates, ratio, levels=[0], colors="k", linewidths=1)
        ax.plot([], [], "k", linewidth=1, label=line)
    ax.plot(batch_sizes, exact, linewidth=3, label="exact threshold")
    _mark(ax, learning_rate, batch_size)
    ax.legend(fontsize="small")
    return ax


def _norm_over_bound(lin, mu, rates, batch_sizes, sampling):
    """The Frobenius norm over the bound of plain SGD, shape (rates, batch sizes)."""
    if mu is None:
        is_fitted = not np.any(np.asarray(lin.residuals))
        mu = 1.0 if is_fitted else float(stability.alignment(lin).mu)
    norm = float(np.linalg.norm(np.asarray(lin.eigenvalues, "f8")))
    n = len(lin.coordinates)
    bounds_at_one = [
        stability.sharpest_minimum(1.0, b, n, mu=mu, sampling=sampling).frobenius_norm
        for b in batch_sizes
    ]
    return norm * rates[:, None] / np.array(bounds_at_one)[None]


def _check_mark(learning_rate, batch_size, lin):
    """A setting to mark is both, or none."""
    _checks.check_linearization(lin)
    if (learning_rate is None) != (batch_size is None):
        raise ValueError(
            "learning_rate and batch_size mark a setting together, got "
            f"{learning_rate!r} and {batch_size!r}; give both or none."
        )
    if learning_rate is not None:
        _checks.check_rate(learning_rate)
        _checks.check_batch(batch_size, len(lin.coordinates), "bernoulli")


def _mark(ax, learning_rate, batch_size):
    if learning_rate is not None:
        label = "this setting"
        ax.plot(batch_size, learning_rate, "*", color=ink(), markersize=12, label=label)
