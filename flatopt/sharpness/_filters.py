"""Networks in units of their filters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt import kernels
from flatopt._core import filters, risk, trees


class NormalizedFilters(NamedTuple):
    """A network in units of its filters, from :func:`normalize_filters`.

    Attributes:
      params: the parameters, each filter with its bias divided by its size.
      restore: ``restore(params)``, the original parameters from normalized ones; a tree
        of arrays, as ``constants`` of a measure take it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.normalize_filters({"kernel": jnp.array([[3.0], [4.0]])})
      >>> [round(float(x), 2) for x in found.params["kernel"][:, 0]]
      [0.6, 0.8]
    """

    params: Any
    restore: Callable[[Any], Any]


def normalize_filters(
    params: Any, filter_axes: kernels.FilterAxes = None
) -> NormalizedFilters:
    r"""Divide each filter and its bias by :math:`\|w_f\| + |b_f|`; the function stays.

    Leaves of one layer (of the same path but for its last part) are taken together: the
    norm of each filter of a kernel, plus the magnitudes of what has one value a filter (a
    ``bias``, the ``scale`` of a normalization). A filter of size zero is left alone. With
    ``normalized, restore = normalize_filters(params)``, measure
    ``lambda q, batch, restore: loss_fn(restore(q), batch)`` at ``normalized`` with
    ``constants=restore``: one such function for many networks of a shape compiles once.

    Rescaling layers then no longer matters where every filter that is rescaled takes its
    own bias along: in ReLU networks without biases, or with biases in the first layer
    alone, and for a layer with its bias in front of a normalization. It still matters where
    a later layer has a bias, be it zero: a layer times a and the next kernel over a keep
    the function with that bias as it is, so that bias and filter no longer share a unit.
    There use :func:`average_case_adaptive` or :func:`worst_case` with ``adaptive=True``,
    which no rescaling changes.

    Args:
      params: the parameters.
      filter_axes: see :func:`flatopt.kernels.filterwise`.

    Returns:
      :class:`NormalizedFilters`.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4 (the authors' code).

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([5.0])}
      >>> normalized, restore = sharpness.normalize_filters(params)
      >>> normalized["bias"], restore(normalized)["bias"]
      (Array([0.5], dtype=float32), Array([5.], dtype=float32))
    """
    params = risk.check_params(params)
    norm = filters.filter_norm(filter_axes, params)
    axes_of = filters.filter_axes_function(filter_axes, params)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    layers: dict[Any, Any] = {}
    sizes: list[Any] = []
    for path, leaf in leaves:
        name = trees.path_name(path)
        layer, _, last = name.rpartition("/")
        leaf = trees.widen(jnp.asarray(leaf))
        single = leaf.ndim <= 1 or last in ("bias", "scale")
        size = jnp.abs(leaf) if single else norm(name, leaf)
        axes = filters.check_axes(axes_of(name, leaf), name, leaf)
        shape = leaf.shape if single else tuple(leaf.shape[axis] for axis in axes)
        sizes.append((layer, shape, size))
        group = layers.setdefault((layer, shape), 0.0)
        layers[layer, shape] = group + size.reshape(shape)
    flat = []
    for layer, shape, size in sizes:
        total = layers[layer, shape]
        flat.append(jnp.where(total == 0, 1.0, total).reshape(size.shape))
    scales = jax.tree.unflatten(treedef, flat)

    normalized = jax.tree.map(
        lambda p, s: (trees.widen(jnp.asarray(p)) / s).astype(jnp.asarray(p).dtype),
        params,
        scales,
    )
    return NormalizedFilters(normalized, jax.tree_util.Partial(_times, scales))


def _times(scales, params):
    return jax.tree.map(
        lambda p, s: (trees.widen(p) * s).astype(p.dtype), params, scales
    )
