"""The rows of a report on stability, each with its unit and what it means."""

import math

MEANINGS = {
    "gradient_descent": "all data in one batch, 2 / eigenvalue",
    "mean_square": "exact: the second moment stays bounded at smaller rates alone",
    "trace_ratio": "necessary, from traces",
    "rank_one": "necessary, from one direction",
    "top_direction": "necessary, from the top eigenvector",
    "trace": "necessary, from the trace alone",
    "frobenius": "necessary, from the norm and the least alignment",
    "frobenius_estimate": "rule of thumb, alignment as measured here",
    "coherence": "necessary, from how alike examples are",
    "sufficient": "below it SGD stays for sure",
}


MEASURED = ("measured", "value", "unit", "usual", "meaning")
RATES = ("largest stable rate by", "rate", "yours", "margin", "meaning")


def measured_rows(report):
    """Rows of what was measured: name, value, unit, what is usual, meaning."""
    return [*_loss_rows(report), *_curvature_rows(report), *_alignment_rows(report)]


def _loss_rows(report):
    convention = "your loss_fn"
    if report.loss_scale is not None:
        convention = f"loss_scale {report.loss_scale:.4g}"
    return [
        ("loss", report.loss, "loss", "", f"in the convention of {convention}"),
        (
            "constant loss",
            report.constant_loss,
            "loss",
            "",
            "that of the best constant output, for comparison",
        ),
        (
            "reducible loss",
            report.reducible_loss,
            "loss",
            f"< {0.01 * report.constant_loss:.3g}",
            "what the linearized model could still lose; little at a minimum",
        ),
        (
            "gradient norm",
            report.gradient_norm,
            "" if report.is_preconditioned else "loss/p",
            "near 0",
            "0 at a minimum",
        ),
    ]


def _curvature_rows(report):
    top = report.max_eigenvalue
    margin = report.thresholds.gradient_descent / report.learning_rate
    ratio = report.thresholds.mean_square / report.learning_rate
    matrix = "the Gauss-Newton matrix"
    if report.is_preconditioned:
        matrix += ", preconditioned"
    smallest = report.smallest_batch_size
    return [
        (
            "top eigenvalue of H",
            top,
            "1/rate",
            f"< {top * margin:.3g}" if math.isfinite(top * margin) else "",
            f"H is {matrix}; beyond the usual range training leaves, even with all "
            "data in one batch",
        ),
        (
            "that of the Hessian",
            report.hessian_eigenvalue,
            "1/rate",
            f"{0.9 * top:.3g} to {1.1 * top:.3g}",
            "in the usual range H is the curvature that training sees",
        ),
        (
            "trace of H",
            report.trace,
            "1/rate",
            "",
            f"sum of the eigenvalues; training stays up to {ratio:.3g} times this H",
        ),
        (
            "Frobenius norm of H",
            report.frobenius_norm,
            "1/rate",
            "",
            "root of the sum of their squares",
        ),
        (
            "growth rate",
            report.growth_rate,
            "a step",
            "< 1",
            "factor of the second moment; below 1 it falls",
        ),
        (
            "smallest batch",
            "none" if smallest is None else smallest,
            "examples",
            f"<= {report.batch_size}",
            "the smallest one that would stay at this learning rate",
        ),
    ]


def _alignment_rows(report):
    found = report.alignment
    if found is None:
        return []
    about = "how far SGD's noise lies along H, for c outputs; alpha times beta"
    return [
        ("alignment mu", found.mu, "1", "about 1/c", about),
        (
            "alpha",
            found.alpha,
            "1",
            "0 to 1",
            "cosine of the angle between the noise covariance and H",
        ),
        (
            "beta",
            found.beta,
            "1",
            "",
            "size of the covariance, over that of H and twice the loss",
        ),
        (
            "isotropic mu",
            found.isotropic_mu,
            "1",
            "",
            "that of isotropic noise of equal trace, for comparison",
        ),
    ]


def rate_rows(report):
    """Rows of the thresholds: theory, rate, verdict, margin, meaning."""
    meanings = MEANINGS
    if "trace_ratio" not in report.thresholds.rates:  # not plain SGD
        meanings = MEANINGS | {"gradient_descent": "all data in one batch"}
    rows = []
    for name, rate in report.thresholds.rates.items():
        # Beyond what suffices nothing is known; beyond the others SGD leaves.
        beyond = "not met" if name == "sufficient" else "violated"
        holds = "holds" if report.learning_rate <= rate else beyond
        rows.append((name, rate, holds, rate / report.learning_rate, meanings[name]))
    return rows
