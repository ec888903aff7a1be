"""Traces, diagonals and norms of curvature operators from random probes."""

import dataclasses
import functools
import numbers
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from flatopt._core import blocks, checks, host, loops, platforms
from flatopt._core.estimates import Estimate
from flatopt._core.sharding import lay_out, placement_of
from flatopt._core.trees import is_traced
from flatopt.curvature._draws import draw_normal, draw_signs, probe_keys, signs_like
from flatopt.curvature._moments import placed, start_moments, update, values_and_errors
from flatopt.curvature._operator import (
    Operator,
    cast_for,
    check_once,
    drawn,
    products,
    quadratics,
)

GROUP = 8  # vectors that share one pass over streamed data
MOST_PROBES = 1 << 14


class Probe(NamedTuple):
    """What :func:`probe` measured; each field an :class:`Estimate`.

    Attributes:
      trace: the trace, shape ().
      diagonal: the diagonal, shaped like the parameters.
      frobenius_norm: the Frobenius norm, shape ().
      layer_traces: the trace of each leaf's diagonal block, shape () each.
      row_norms: the Euclidean norm of each row of the matrix, shaped like the parameters.
        Without intervals: the standard error is infinite. Samples of a row are too skewed
        for one; its relative error is some 1 / sqrt(2 num_probes), 0 for a diagonal matrix.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 4), jnp.ones(3))
      >>> round(float(curvature.probe(operator, jax.random.key(0)).trace.value), 3)
      36.0
    """

    trace: Estimate
    diagonal: Estimate
    frobenius_norm: Estimate
    layer_traces: Estimate
    row_norms: Estimate


def trace(
    operator: Operator,
    key: jax.Array,
    num_probes: int = 32,
    *,
    num_deflated: int = 8,
    rtol: float | None = None,
) -> Estimate:
    r"""The trace alone: no backward pass beyond the deflation, no vector kept.

    The trace over the span of a few leading directions is computed exactly, the rest
    estimated by :math:`v^\top H v` with random signs :math:`v` orthogonal to them.

    Cost in gradients of the data: 1.4 a probe, 6.6 a deflated direction; four passes over
    streamed data, one without deflation.

    Args:
      operator: the matrix.
      key: a JAX random key.
      num_probes: number of random vectors, at least 2.
      num_deflated: number of leading directions; 0: Hutchinson's estimator.
      rtol: go on, doubling the probes, until the 95 % interval is within this share of
        the value on either side. The standard error is then widened for the number of
        looks, so that the interval still holds the truth in 95 % of runs. Not inside
        ``jax.jit``.

    Returns:
      An :class:`Estimate`.

    Raises:
      ValueError: for a curvature that is not finite, fewer than 2 probes, a wrong rtol.

    References:
      Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1990;
      Meyer, Musco, Musco, Woodruff, `Hutch++: Optimal Stochastic Trace Estimation
      <https://arxiv.org/abs/2010.09649>`_, SOSA 2021.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 4), jnp.ones(20))
      >>> curvature.trace(operator, jax.random.key(0), num_deflated=0).value
      Array(240., dtype=float32)
    """
    check_probes(operator, num_probes, num_deflated, rtol)
    checks.check_random_key(key)
    basis_key, probe_key = jax.random.split(key)
    basis = leading_basis(operator, basis_key, num_deflated)
    exact = None
    if num_deflated:
        exact = host.fetch(quadratics(operator, basis)).sum()
    samples, count, look = None, 0, 0
    while True:
        keys = probe_keys(probe_key, count, count or num_probes)
        found = host.fetch(quadratics(operator, keys, drawn, basis))
        xp = host.namespace(found)
        samples = xp.concatenate([samples, found]) if count else found
        value, error, count = Estimate.of(samples)
        value = value if exact is None else exact + value
        error = error * _like(error, _look_factor(count, look, rtol))
        value, error = host.send((value, error), operator.like)
        estimate = Estimate(value, error, count)
        check_finite(operator, estimate.value)
        if _is_met([estimate], rtol):
            return estimate
        look += 1


def probe(
    operator: Operator,
    key: jax.Array,
    num_probes: int = 32,
    *,
    num_deflated: int = 8,
    rtol: float | None = None,
    progress: Any = None,
) -> Probe:
    r"""Trace, diagonal, Frobenius norm, layer traces and row norms from the same probes.

    With :math:`Q` an orthonormal basis of a few leading directions and :math:`v` random
    signs, :math:`w = H (v - Q Q^\top v)` gives unbiased samples of what is beyond
    :math:`Q`, and :math:`H Q` what is within, exactly: :math:`v_i w_i` for the diagonal,
    :math:`w_i^2` for the squared row norms, their sums for the layer traces and the
    squared Frobenius norm. Without deflation one large eigenvalue would dominate the
    error. Errors of norms are those of their squares over twice the norm.

    Cost in gradients of the data: 2 a probe, 6 a deflated direction. Memory: some
    50 vectors with the default deflation, whatever the number of probes. Streamed data is
    passed over three times for the deflated directions and once for each eight probes.

    On a sample of the data, the Frobenius norm of the sample's matrix is what is measured;
    it is larger than that of all data by the sampling noise. Where that matters, see
    :func:`population_frobenius_norm`.

    Args:
      operator: the matrix.
      key: a JAX random key.
      num_probes: number of random vectors, at least 2.
      num_deflated: number of leading directions; 0: none.
      rtol: go on, doubling the probes, until the 95 % intervals of trace and Frobenius
        norm are within this share of the value on either side. Standard errors are then
        widened for the number of looks, as in :func:`trace`. Not inside ``jax.jit``.
      progress: True for a bar, or a function ``progress(done, total, description)``; None:
        a bar where streamed data takes long; False: none.

    Returns:
      A :class:`Probe`.

    Raises:
      ValueError: for a curvature that is not finite, fewer than 2 probes, a wrong rtol.

    References:
      Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1990;
      Bekas, Kokiopoulou, Saad, An Estimator for the Diagonal of a Matrix, 2007; deflation
      after Meyer, Musco, Musco, Woodruff, `Hutch++ <https://arxiv.org/abs/2010.09649>`_,
      SOSA 2021.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.hessian(lambda p: jnp.sum(p ** 4), jnp.array([1.0, 2.0]))
      >>> found = curvature.probe(operator, jax.random.key(0))
      >>> round(float(found.trace.value), 3), round(float(found.frobenius_norm.value), 3)
      (60.0, 49.477)
    """
    check_probes(operator, num_probes, num_deflated, rtol)
    checks.check_random_key(key)
    basis_key, probe_key = jax.random.split(key)
    passes = 3 * bool(num_deflated) + -(-num_probes // GROUP)
    with operator.risk.watched(progress, passes, "probe"):
        basis = leading_basis(operator, basis_key, num_deflated)
        moments = moments_within(operator, basis_key, basis)
        count = look = 0
        while True:
            new = count or num_probes
            keys = probe_keys(probe_key, count, new)
            moments = observe(operator, keys, basis, moments)
            count += new
            factor = _look_factor(count, look, rtol)
            found = summarize(operator.like, moments, count, factor)
            check_finite(operator, found.trace.value)
            if _is_met([found.trace, found.frobenius_norm], rtol):
                return found
            look += 1


def check_probes(operator, num_probes, num_deflated=0, rtol=None):
    check_operator(operator)
    checks.check_count(num_probes, "num_probes")
    if num_probes < 2:
        raise ValueError(
            f"num_probes must be at least 2 for a standard error, got {num_probes}."
        )
    if num_deflated:
        checks.check_count(num_deflated, "num_deflated")
    if rtol is not None:
        check_share(rtol, "write rtol=0.05 for an interval of 5 % to either side")
        _check_decides(operator)


def _check_decides(found):
    """Reject an rtol where nothing can be decided."""
    if is_traced(found):
        raise TypeError(
            "rtol decides while running how many probes to draw, got a call inside jax.jit "
            "or jax.vmap; give num_probes there."
        )


def check_share(rtol, advice):
    """Reject what is not a number between 0 and 1."""
    is_number = isinstance(rtol, numbers.Real | np.ndarray | jax.Array)
    if isinstance(rtol, bool) or not is_number or np.ndim(rtol) or not 0 < rtol < 1:
        raise ValueError(
            f"rtol must lie between 0 and 1, got {checks.described(rtol)}; {advice}."
        )


def check_operator(operator):
    if not isinstance(operator, Operator):
        raise TypeError(
            f"operator must be a curvature operator, got {checks.described(operator)}; "
            "make one with curvature.hessian(loss_fn, params, data)."
        )


def check_finite(operator, value):
    if not is_traced((operator, value)) and not np.isfinite(value):
        raise ValueError(
            f"the curvature is not finite, got {value}; look at the loss and "
            "its gradient at these parameters first."
        )


def _look_factor(count, look, rtol):
    """What widens an interval so that all looks together miss in 5 % of runs.

    A look finds too small an error most often where it stops: 2.5 % are spent on the first
    look, half as much on each later one.
    """
    if rtol is None:
        return 1.0
    import scipy.stats  # slow to import, and seldom needed

    ends = scipy.stats.t.ppf([1 - 0.0125 / 2**look, 0.975], count - 1)
    return float(ends[0] / ends[1])


def _is_met(estimates, rtol):
    """Whether to stop: all intervals narrow enough, or the most probes spent."""
    if rtol is None:
        return True
    _check_decides(estimates)
    widths = []
    for estimate in estimates:
        low, high = estimate.interval()
        value = abs(float(estimate.value))
        widths.append(float(high - low) / 2 / value if value else np.inf)
        if float(high) == float(low):
            widths[-1] = 0.0
    if max(widths) <= rtol:
        return True
    if estimates[0].num_probes * 2 > MOST_PROBES:
        warnings.warn(
            f"rtol={rtol} was not met with {estimates[0].num_probes} probes: the interval "
            f"is {max(widths):.2g} to either side.",
            stacklevel=3,
        )
        return True
    return False


def leading_basis(operator, key, count, num_steps=2):
    """Orthonormal rows near the leading eigenvectors, by block power steps."""
    like = operator.like
    if not count:
        return blocks.zeros(like, 0)
    count = min(count, blocks.size(like))
    bring = bringing(operator, key)
    basis = _orthonormalize(bring(draw_normal(operator, probe_keys(key, 0, count))))
    for _ in range(num_steps):
        basis = _orthonormalize(bring(products(operator, basis)))
    return host.send(basis, operator.like)


_orthonormalize = host.compiled(blocks.orthonormalize)
_project_out = host.compiled(blocks.project_out)


def bringing(operator, key):
    """What brings blocks to where their algebra is done: to the host where they are small.

    Otherwise they stay on the devices, and inside a trace.
    """
    is_traced_at_all = platforms.is_staged() or is_traced((operator, key))
    is_small = not is_traced_at_all and host.suits(operator.like)
    return host.fetch if is_small else lambda block: block


@dataclasses.dataclass(frozen=True)
class _Observe:
    """Moments after some more probes of one batch that is all the data, in one trace."""

    kind: Any
    placement: Any  # of the parameters, see sharding.placement_of

    def __call__(self, params, batch, keys, basis, moments):
        loss, shared, product = self.kind.linearize(params, batch)
        shared = blocks.widen(shared)
        draw = signs_like(params)

        def step(moments, key):
            signs = draw(key)
            vector = blocks.project_out(blocks.single(signs), basis)
            vector = lay_out(vector, params, self.placement)
            found = product(cast_for(self.kind, blocks.row(vector, 0), params))
            found = lay_out(found, params, self.placement)
            found = blocks.single(blocks.widen(found))
            found = self.kind.finish(found, shared, vector)
            vector, found = blocks.row(vector, 0), blocks.row(found, 0)
            new = update(moments, signs, vector, found)
            return placed(new, params, self.placement)

        return loss, loops.fold_rows(step, moments, keys)


@functools.partial(host.compiled, donate_argnums=0)
def _observe_rows(moments, signs, vectors, found):
    rows = signs, vectors, found
    if host.namespace(moments.count) is np:
        for index in range(len(jax.tree.leaves(signs)[0])):
            moments = update(moments, *blocks.row(rows, index))
        return moments
    return loops.fold_rows(lambda moments, row: update(moments, *row), moments, rows)


def moments_within(operator, key, basis):
    """Moments before the first probe, from the products with a basis."""
    bring = bringing(operator, key)
    count = len(jax.tree.leaves(basis)[0])
    found = products(operator, basis) if count else basis
    basis, found = host.together(bring(basis), bring(found))
    return start_moments(operator.like, basis, found)


def observe(operator, keys, basis, moments):
    """Moments after some more probes; outside of a trace by the code of the products."""
    check_once(operator, keys)
    if operator.stream is None and is_traced((operator, keys)):
        function = _Observe(operator.kind, placement_of(operator.like))
        return operator.risk.mean(function, keys, basis, moments)
    bring = bringing(operator, keys)
    basis = bring(basis)
    for start in range(0, len(keys), GROUP):
        signs = bring(draw_signs(operator, keys[start : start + GROUP]))
        signs, basis = host.together(signs, basis)
        vectors = _project_out(signs, basis)
        found = bring(products(operator, vectors))
        rows = host.together(moments, signs, vectors, found)
        moments = _observe_rows(*rows)
    return moments


def summarize(params, moments, count, factor):
    found = {}
    for name, (value, error) in values_and_errors(params, moments).items():
        error = jax.tree.map(lambda e: e * _like(e, factor), error)
        if name == "rows":
            error = jax.tree.map(
                lambda e: host.namespace(e).full_like(e, np.inf), error
            )
        value, error = (host.send(x, params) for x in (value, error))
        found[name] = Estimate(value, error, count)
    fields = "trace", "diagonal", "square", "layers", "rows"
    return Probe(*map(found.get, fields))


def _like(array, number):
    return host.namespace(array).asarray(number, array.dtype)
