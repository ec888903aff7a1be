"""The curvature at one point on one page."""

from typing import Any, NamedTuple

import jax
import numpy as np

from flatopt._core import blocks, checks, tables, trees
from flatopt._core import progress as bars
from flatopt._core.estimates import Estimate
from flatopt.curvature._density import SpectralDensity, spectral_density
from flatopt.curvature._lanczos import ROOM, eigenpairs
from flatopt.curvature._operator import Operator
from flatopt.curvature._probes import check_operator, probe

GRADIENTS = 500  # of all data in a report: 56 products of probes, some 140 of Lanczos
COMPILED = 20  # times what compiling a gradient takes, on a small network
DRAWS = 3  # of the density
SMALL = 0.01  # of the largest magnitude: an eigenvalue below counts as near zero
MOST_LEAVES = 12  # shown one by one

NAMES = {
    "Hessian": "Hessian",
    "FiniteDifferenceHessian": "Hessian",
    "GaussNewton": "Gauss-Newton matrix",
    "EmpiricalFisher": "empirical Fisher matrix",
    "GradientCovariance": "covariance of gradient noise",
}
OF_SECOND_ORDER = ("Hessian", "Gauss-Newton matrix")  # in units of the loss

# Unit, and what a row says; p is the unit of a parameter, c that of the matrix.
EXPLAINED = {
    "loss": ("loss", "mean loss of the data"),
    "gradient_norm": ("loss/p", "length of its gradient; near 0 at a minimum"),
    "trace": ("c", "sum of the eigenvalues"),
    "frobenius_norm": ("c", "root of the sum of their squares"),
    "critical_learning_rate": (
        "p^2/loss",
        "2 over the largest eigenvalue: gradient descent leaves above it",
    ),
    "eigenvalues": ("c", "largest ones; the error bounds the distance to one"),
    "lowest_node": ("c", "of the density; the smallest eigenvalue is about as low"),
    "num_negative": ("count", "eigenvalues below -1 % of the largest magnitude"),
    "num_near_zero": ("count", "eigenvalues within 1 % of it: flat directions"),
    "num_positive": ("count", "eigenvalues above 1 % of it"),
}
COMPLETE = "the search was complete"
CUT_SHORT = "the search was cut short, so some may be missing"
# The Hessian of the network of examples/digits.py by LPF-SGD and by SGD, the smaller value
# first: python -m benchmarks.typical.
TYPICAL = {
    "loss": (1.0, 1.1),
    "trace": (70.0, 160.0),
    "frobenius_norm": (18.0, 42.0),
    "critical_learning_rate": (2 / 25.0, 2 / 10.0),
    "eigenvalues": (10.0, 25.0),
}

LEAVES = ("leaf", "numbers", "trace", "error", "share %")
NOTE = (
    "error: standard error, of eigenvalues a bound. p: unit of a parameter. share: of the "
    "trace. typical: the Hessian of a convolutional network of 13,706 parameters on digits, "
    "SGD and LPF-SGD; larger networks differ."
)


class Report(NamedTuple):
    """The curvature at one point, from :func:`report`; ``print`` shows a page.

    Attributes:
      matrix: the name of the matrix.
      num_parameters: its number of rows.
      loss: the mean loss.
      gradient_norm: the norm of its gradient.
      trace, frobenius_norm: an :class:`Estimate` each.
      eigenvalues: the largest ones, shape (k,).
      bounds: shape (k,): some eigenvalue lies within this distance of each.
      layer_traces: the trace of each leaf's diagonal block, by the path of the leaf.
      layer_sizes: the number of parameters of each.
      density: :class:`SpectralDensity`.
      seconds: what each part took, with compilation; None: not known.
      is_complete: whether the search for eigenvalues ended: a run from a fresh random
        vector found nothing that was missing, see :class:`Eigenpairs`.

    Example:
      >>> from flatopt import curvature
      >>> curvature.Report._fields[0]
      'matrix'
    """

    matrix: str
    num_parameters: int
    loss: float
    gradient_norm: float
    trace: Estimate
    frobenius_norm: Estimate
    eigenvalues: np.ndarray
    bounds: np.ndarray
    layer_traces: dict[str, Estimate]
    layer_sizes: dict[str, int]
    density: SpectralDensity
    seconds: dict[str, float] | None = None
    is_complete: bool = True

    @property
    def critical_learning_rate(self) -> float:
        """2 over the largest eigenvalue of a Hessian or a Gauss-Newton matrix.

        Infinite where none is positive beyond its bound. Not a number for the other
        matrices, which have another unit.
        """
        if self.matrix not in OF_SECOND_ORDER:
            return np.nan
        largest, bound = float(self.eigenvalues[0]), float(self.bounds[0])
        return 2 / largest if largest > bound else np.inf

    @property
    def counts(self) -> dict[str, Estimate]:
        """About how many eigenvalues are negative, near zero and positive."""
        nodes, weights = self.density
        edge = SMALL * max(np.abs(nodes).max(), np.abs(self.eigenvalues).max())
        parts = {
            "num_negative": nodes < -edge,
            "num_near_zero": np.abs(nodes) <= edge,
            "num_positive": nodes > edge,
        }
        return {
            name: Estimate.of(self.num_parameters * (weights * part).sum(axis=1))
            for name, part in parts.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by name, for JSON; errors as ``NAME_standard_error``.

        Without ``critical_learning_rate`` where there is none.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from flatopt import curvature
          >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 2), jnp.ones(2))
          >>> found = curvature.report(operator, jax.random.key(0)).to_dict()
          >>> round(found["critical_learning_rate"], 3)
          1.0
        """
        found: dict[str, Any] = {}
        for name, value in self._measures().items():
            found[name] = value
            if isinstance(value, Estimate):
                found[name] = float(value.value)
                found[f"{name}_standard_error"] = float(value.standard_error)
        found["eigenvalues"] = np.asarray(self.eigenvalues, "f8").tolist()
        found["is_complete"] = bool(self.is_complete)
        found["eigenvalue_bounds"] = np.asarray(self.bounds, "f8").tolist()
        found["layer_traces"] = {
            name: float(x.value) for name, x in self.layer_traces.items()
        }
        if self.seconds is not None:
            found["seconds"] = float(sum(self.seconds.values()))
        return found

    def __str__(self):
        leaves = [(*row, "") for row in self._leaf_rows()]
        parts = [
            "\n".join(tables.wrapped(self._head())),
            tables.table(tables.OF_MEASURES, self._rows()),
            tables.table((*LEAVES, ""), leaves),
            "\n".join(tables.wrapped(self._note())),
        ]
        return "\n\n".join(parts)

    def _repr_html_(self):
        return "\n".join(
            [
                tables.paragraph(self._head()),
                tables.html_table(tables.OF_MEASURES, self._rows()),
                tables.html_table(LEAVES, self._leaf_rows()),
                tables.paragraph(self._note()),
            ]
        )

    def _measures(self):
        """Numbers and Estimates by name, in the order of the page."""
        found = {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "trace": self.trace,
            "frobenius_norm": self.frobenius_norm,
        }
        if np.isfinite(self.critical_learning_rate):
            found["critical_learning_rate"] = self.critical_learning_rate
        return {**found, "lowest_node": float(self.density.nodes.min()), **self.counts}

    def _rows(self):
        rows = []
        for name, value in self._measures().items():
            if name == "lowest_node":
                rows += self._eigenvalue_rows()
            error = ""
            if isinstance(value, Estimate):
                value, error = value.value, f"{float(value.standard_error):.2g}"
            rows.append(self._row(name, name, float(value), error))
        return rows

    def _eigenvalue_rows(self):
        pairs = zip(self.eigenvalues, self.bounds, strict=True)
        rows = [
            self._row("eigenvalues", f"eigenvalue {i}", float(value), f"{bound:.2g}")
            for i, (value, bound) in enumerate(pairs, 1)
        ]
        # Only the first says what is usual, what they took and what they are.
        return [rows[0], *[(*row[:4], "", "", "") for row in rows[1:]]]

    def _row(self, name, shown, value, error):
        unit, meaning = EXPLAINED[name]
        if name == "eigenvalues":
            meaning += f"; {COMPLETE if self.is_complete else CUT_SHORT}"
        of_second_order = self.matrix in OF_SECOND_ORDER
        unit = (
            ("loss/p^2" if of_second_order else "loss^2/p^2") if unit == "c" else unit
        )
        typical = TYPICAL.get(name, ()) if of_second_order or name == "loss" else ()
        took = (self.seconds or {}).get(name)
        return tables.row_of_measure(shown, value, error, unit, typical, took, meaning)

    def _leaf_rows(self):
        """Leaves by the magnitude of their trace; many small ones as one row."""
        total = float(self.trace.value)

        def share(value):
            return 100 * value / total if total else ""

        names = sorted(
            self.layer_traces, key=lambda n: -abs(float(self.layer_traces[n].value))
        )
        rows = []
        for name in names[:MOST_LEAVES]:
            found = self.layer_traces[name]
            value, error = float(found.value), float(found.standard_error)
            size = self.layer_sizes[name]
            rows.append((name or "all", size, value, f"{error:.2g}", share(value)))
        others = names[MOST_LEAVES:]
        if others:
            value = sum(float(self.layer_traces[name].value) for name in others)
            size = sum(self.layer_sizes[name] for name in others)
            rows.append((f"{len(others)} others", size, value, "", share(value)))
        return rows

    def _head(self):
        found = f"{self.matrix} of {self.num_parameters:,} parameters"
        if self.matrix not in OF_SECOND_ORDER:
            return f"{found}."
        rate = self.critical_learning_rate
        if not np.isfinite(rate):
            return f"{found}: no eigenvalue is positive beyond its error."
        return f"{found}: gradient descent leaves at learning rates above {rate:.3g}."

    def _note(self):
        return tables.note_of_time(NOTE, self.seconds)


def report(
    operator: Operator, key: jax.Array, k: int = 3, *, progress: Any = None
) -> Report:
    """The curvature at one point on one page.

    Trace, norm and traces by leaf from one :func:`probe`, the largest eigenvalues from
    :func:`eigenpairs`, and about how many are negative, near zero and positive from
    :func:`spectral_density`. Cost: some 500 gradients of all data. Runs on the host.

    Args:
      operator: the matrix.
      key: a JAX random key.
      k: number of eigenvalues to show; at most all.
      progress: True for a bar of its four parts, or a function ``progress(done, total,
        description)``; None: a bar where it takes long; False: none. Before it starts, a
        line says about how long it will take, where that is more than three seconds.

    Returns:
      A :class:`Report`: ``print`` it, show it in a notebook, or log its ``to_dict()``.

    Raises:
      TypeError: inside ``jax.jit``.
      ValueError: for a curvature that is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 2), jnp.ones(2))
      >>> found = curvature.report(operator, jax.random.key(0))
      >>> print(str(found).splitlines()[0])
      Hessian of 2 parameters: gradient descent leaves at learning rates above 1.
    """
    check_operator(operator)
    checks.check_random_key(key)
    checks.check_count(k, "k")
    bars.check_progress(progress)
    size, risk = blocks.size(operator.like), operator.risk
    keys = jax.random.split(key, 3)
    checks.check_concrete((operator, key), "report")
    loss = checks.float_of(risk.value, "report")  # looks at the data once
    each, compiling = risk.time_gradient()  # then the gradient compiles once
    expected = GRADIENTS * each + COMPILED * compiling
    bars.announce(progress, expected, "curvature.report", bars.SHORT)
    measures = {
        "gradient_norm": lambda: _norm(risk.gradient),
        "trace": lambda: probe(operator, keys[0]),
        "eigenvalues": lambda: eigenpairs(operator, keys[1], min(k, size)),
        "lowest_node": lambda: spectral_density(
            operator, keys[2], num_draws=DRAWS, num_steps=2 * k + ROOM
        ),  # as many vectors as for the eigenpairs, so that code is shared
    }
    found, seconds = bars.timed(measures, progress, "curvature.report")
    probed, pairs = found["trace"], found["eigenvalues"]
    return Report(
        matrix=NAMES[type(operator.kind).__name__],
        num_parameters=size,
        loss=loss,
        gradient_norm=found["gradient_norm"],
        trace=probed.trace,
        frobenius_norm=probed.frobenius_norm,
        eigenvalues=pairs.values,
        bounds=pairs.residuals,
        layer_traces=_by_path(probed.layer_traces),
        layer_sizes={
            trees.path_name(path): leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(operator.like)
        },
        density=found["lowest_node"],
        seconds=seconds,
        is_complete=pairs.is_complete,
    )


def _norm(tree):
    """The Euclidean norm, on the host in float64: squares stay within it."""
    squares = [np.sum(np.asarray(x, "f8") ** 2) for x in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(squares)))


def _by_path(estimate):
    """An Estimate of a tree of numbers as a dict of Estimates."""
    named = jax.tree_util.tree_leaves_with_path(estimate.value)
    errors = jax.tree.leaves(estimate.standard_error)
    return {
        trees.path_name(path): Estimate(value, error, estimate.num_probes)
        for (path, value), error in zip(named, errors, strict=True)
    }
