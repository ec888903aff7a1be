"""Running moments of probes, in units of powers of two."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt._core import blocks, host
from flatopt._core.sharding import lay_out, placement_of

VECTORS = ("diagonal", "rows")  # of a sample: shaped like the parameters


class Moments(NamedTuple):
    """Running moments of the probes, in units: a power of two a leaf, the largest for all.

    So squares and fourth powers of entries stay within float32, whatever the scale.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    units: Any
    exact: Any
    mean: Any
    deviation: Any


def start_moments(params, basis, found):
    """Moments before the first probe: what lies within the span of the basis, exactly."""
    return _start_moments(placement_of(params), params, basis, found)


@functools.partial(host.compiled, static_argnums=0)
def _start_moments(placement, params, basis, found):
    units = jax.tree.map(_unit, found)
    found = jax.tree.map(_over, found, units)
    diagonal = jax.tree.map(lambda q, h: (q * h).sum(axis=0), basis, found)
    rows = jax.tree.map(lambda h: (h * h).sum(axis=0), found)
    exact = _samples(units, diagonal, rows, _sums(diagonal))
    zeros = jax.tree.map(lambda x: host.namespace(x).zeros_like(x), exact)
    count = host.namespace(exact["trace"]).zeros((), "float32")
    return placed(Moments(count, units, exact, zeros, zeros), params, placement)


def placed(moments, params, placement):
    """The same moments; what is shaped like the parameters lies where they do."""

    def one(sample):
        vectors = {name: lay_out(sample[name], params, placement) for name in VECTORS}
        return sample | vectors

    exact, mean, deviation = map(one, moments[2:])
    return moments._replace(exact=exact, mean=mean, deviation=deviation)


def _sums(tree):
    return jax.tree.map(lambda x: x.sum(), tree)


def _unit(x):
    """The power of two of the largest magnitude; 0 for zeros, which set no scale."""
    xp, unit = host.namespace(x), blocks.power_of_two(x)
    return xp.where(xp.any(x != 0), unit, xp.zeros_like(unit))


def _over(x, unit):
    xp = host.namespace(unit)
    return x / xp.where(unit == 0, xp.ones_like(unit), unit)


def _largest(units):
    leaves = jax.tree.leaves(units)
    dtype = jnp.float64 if jnp.float64 in [x.dtype for x in leaves] else jnp.float32
    xp = host.namespace(leaves[0])
    return xp.max(xp.stack([x.astype(dtype) for x in leaves]))


def _samples(units, diagonal, rows, forms):
    """What one probe says, in units; ``forms`` are the leaves' parts of the trace."""
    top = _largest(units)
    shares = jax.tree.map(lambda u: _over(u.astype(top.dtype), top), units)

    def total(parts, power):
        parts = jax.tree.map(lambda x, s: x.astype(s.dtype) * s**power, parts, shares)
        return sum(jax.tree.leaves(parts))

    return {
        "trace": total(forms, 1),
        "square": total(_sums(rows), 2),
        "layers": _sums(diagonal),
        "diagonal": diagonal,
        "rows": rows,
    }


def _rescaled(sample, leaves, whole, power):
    """A sample times powers of its units: a number a leaf, and one for the whole."""
    each = lambda tree, n: jax.tree.map(  # noqa: E731
        lambda x, r: x * (r ** (n * power)).astype(x.dtype), tree, leaves
    )
    return {
        "trace": sample["trace"] * whole**power,
        "square": sample["square"] * whole ** (2 * power),
        "layers": each(sample["layers"], 1),
        "diagonal": each(sample["diagonal"], 1),
        "rows": each(sample["rows"], 2),
    }


def update(moments, signs, vector, found):
    """Running count, mean and sum of squared deviations (Welford) after one probe."""
    old = moments.units
    units = jax.tree.map(
        lambda u, x: host.namespace(x).maximum(u, _unit(x)), old, found
    )
    ratios = jax.tree.map(_over, old, units)
    whole = _over(_largest(old), _largest(units))
    found = jax.tree.map(_over, found, units)
    sample = _samples(
        units,
        jax.tree.map(operator.mul, signs, found),
        jax.tree.map(lambda x: x * x, found),
        jax.tree.map(lambda v, x: (v * x).sum(), vector, found),
    )
    exact = _rescaled(moments.exact, ratios, whole, 1)
    mean = _rescaled(moments.mean, ratios, whole, 1)
    deviation = _rescaled(moments.deviation, ratios, whole, 2)
    count = moments.count + 1
    change = jax.tree.map(operator.sub, sample, mean)
    mean = jax.tree.map(lambda m, c: m + c / count.astype(c.dtype), mean, change)
    deviation = jax.tree.map(
        lambda d, c, s, m: d + c * (s - m), deviation, change, sample, mean
    )
    return Moments(count, units, exact, mean, deviation)


def values_and_errors(params, moments):
    """Values and standard errors out of their units."""
    return _values_and_errors(placement_of(params), params, moments)


@functools.partial(host.compiled, static_argnums=0)
def _values_and_errors(placement, params, moments):
    moments = placed(moments, params, placement)
    count = moments.count
    value = jax.tree.map(operator.add, moments.exact, moments.mean)
    error = jax.tree.map(
        lambda d: _root(d / ((count - 1) * count).astype(d.dtype)), moments.deviation
    )
    found = {}
    whole = _largest(moments.units)
    for name in ("trace", "layers", "diagonal", "square", "rows"):
        pair = value[name], error[name]
        if name in ("square", "rows"):  # norms from their squares
            pair = root_of(*pair)
        units = moments.units
        if name in ("trace", "square"):
            units = whole
        found[name] = tuple(
            jax.tree.map(lambda x, u: x * u.astype(x.dtype), tree, units)
            for tree in pair
        )
    for name in VECTORS:
        found[name] = tuple(lay_out(x, params, placement) for x in found[name])
    return found


def _root(x):
    xp = host.namespace(x)
    return xp.sqrt(xp.maximum(x, xp.zeros_like(x)))


def root_of(square, error):
    """A norm and its error from those of its square."""

    def error_of_root(v, e):
        xp = host.namespace(v)
        return xp.where(v > 0, e / xp.where(v > 0, 2 * v, xp.ones_like(v)), xp.sqrt(e))

    value = jax.tree.map(_root, square)
    return value, jax.tree.map(error_of_root, value, error)
