"""Put together what the passes of one step changed: statistics, metrics, all else."""

import jax
import jax.numpy as jnp
from flax import nnx

from flatopt._core import sharding
from flatopt.flax import _passes


def combine(
    source: _passes.Pass, change: _passes.Change, weights, axis_name
) -> _passes.Change:
    """One change from those of many passes.

    Running statistics of BatchNorm are averaged, with the weights of the chunks; averages
    of ``nnx.metrics`` take in every pass; all other variables are as the first pass left
    them. Over ``axis_name`` statistics are averaged and metrics summed.

    Args:
      source: the passes.
      change: its values have the leading axes of ``weights``.
      weights: the weight of each pass.
      axis_name: axis of ``jax.shard_map``, or None.
    """
    live = source.variables()
    lead = weights.ndim

    def mean(value):
        wide = jnp.promote_types(value.dtype, jnp.float32)
        weight = weights.astype(wide).reshape(
            weights.shape + (1,) * (value.ndim - lead)
        )
        parts = jnp.where(weight == 0, 0, weight * value.astype(wide))
        total = parts.sum(axis=tuple(range(lead))), weight.sum()
        total, weight = _over_devices(total, jax.lax.psum, axis_name)
        return (total / weight).astype(value.dtype)

    def added(value, start):
        start = jnp.asarray(start)
        more = (value - start).sum(axis=tuple(range(lead)), dtype=start.dtype)
        return start + _over_devices(more, jax.lax.psum, axis_name)

    def one(path, value):
        variable = live[path]
        if isinstance(variable, nnx.BatchStat):
            return jax.tree.map(mean, value)
        if isinstance(variable, nnx.metrics.MetricState):
            if _is_sum(source.roots, path):
                return jax.tree.map(added, value, variable.get_raw_value())
            _refuse_metric(source.roots, path, weights.size, axis_name)
        return jax.tree.map(lambda x: x[(0,) * lead], value)

    values = [one(p, v) for p, v in zip(change.paths, change.values, strict=True)]
    return _passes.Change(change.paths, values)


def alone(change: _passes.Change) -> _passes.Change:
    """The change of a single pass, with the leading axis that :func:`combine` expects."""
    values = jax.tree.map(lambda x: jnp.asarray(x)[None], change.values)
    return _passes.Change(change.paths, values)


def _over_devices(value, reduce, axis_name):
    if axis_name is None:
        return value
    return reduce(sharding.tree_varying(value, axis_name), axis_name)


def _is_sum(roots, path):
    return isinstance(_passes.parent(roots, path), nnx.metrics.Average)


def _refuse_metric(roots, path, num_passes, axis_name):
    if num_passes > 1 or axis_name is not None:
        name = type(_passes.parent(roots, path)).__name__
        raise ValueError(
            f"loss_fn updates the metric {name} in each pass, got {num_passes} passes or "
            "several devices, and only an nnx.metrics.Average can take them all in; return "
            "what it measures as aux with has_aux=True and update it after the step."
        )
