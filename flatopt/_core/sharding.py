"""How values are laid out over devices: the door to what JAX says of it."""

import contextlib
import contextvars

import jax
import jax.numpy as jnp

from flatopt._core import trees

ALIKE = "alike"  # a placement: as parameters of a trace, which the compiler alone knows

_AVERAGED = contextvars.ContextVar("axes that links averaged over", default=None)


def axis_names(axis_name):
    """One name or several, or None, as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


@contextlib.contextmanager
def watching_averages():
    """Yield a set that gains the axes that links average over inside.

    Types tell that too, but not under ``check_vma=False``.
    """
    seen: set[str] = set()
    token = _AVERAGED.set(seen)
    try:
        yield seen
    finally:
        _AVERAGED.reset(token)


def note_average(axis_name):
    """Say that a link averages its gradient over these axes."""
    seen = _AVERAGED.get()
    if seen is not None:
        seen.update(axis_names(axis_name))


def varying_axes(aval):
    """Axes of ``jax.shard_map`` over which a value differs between devices."""
    kind = getattr(aval, "manual_axis_type", None)
    return tuple(sorted(kind.varying)) if kind is not None else ()


def manual_axes():
    """Axes of the ``jax.shard_map`` that we are in."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def tracks_varying(axes):
    """Whether types say which values differ between devices: ``check_vma``."""
    return bool(varying_axes(jax.typeof(jax.lax.axis_index(axes[0]))))


def make_varying(leaf, axes):
    """The same values, typed as different between the devices of these axes."""
    missing = tuple(a for a in axes if a not in varying_axes(jax.typeof(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def tree_varying(params, axis_name):
    """Parameters as values of each device: gradients of replicated ones come summed."""
    axes = axis_names(axis_name)
    return jax.tree.map(lambda leaf: make_varying(jnp.asarray(leaf), axes), params)


def mean_over(tree, axis_name):
    """The mean over the devices of an axis; counts are the same on all, and stay."""
    leaves, treedef = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
    floats = [x for x, flag in zip(leaves, is_float, strict=True) if flag]
    means = iter(jax.lax.pmean(floats, axis_name))

    def same(leaf):
        leaf = jnp.asarray(leaf)
        return jax.lax.pmax(leaf.astype(jnp.int32), axis_name).astype(leaf.dtype)

    return treedef.unflatten(
        [next(means) if f else same(x) for x, f in zip(leaves, is_float, strict=True)]
    )


def placement_of(params):
    """Where parameters lie, for static use: the sharding of each leaf, or ``ALIKE``.

    None where they are on no mesh.
    """
    leaves = jax.tree.leaves(params)
    if trees.is_traced(leaves):
        return ALIKE
    shardings = [leaf.sharding for leaf in leaves]
    if not all(isinstance(s, jax.sharding.NamedSharding) for s in shardings):
        return None
    return tuple(shardings)


def lay_out(tree, params, placement):
    """A vector, or a block of them, that lies over devices as the parameters do."""
    if placement is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    like = jax.tree.leaves(params)
    if placement == ALIKE:
        return treedef.unflatten(map(_alike, leaves, like))
    found = [
        jax.lax.with_sharding_constraint(x, with_rows(sharding, x.ndim - p.ndim))
        for x, p, sharding in zip(leaves, like, placement, strict=True)
    ]
    return treedef.unflatten(found)


def with_rows(sharding, count):
    """The sharding of arrays with so many axes more, which come first."""
    spec = jax.sharding.PartitionSpec(*[None] * count, *sharding.spec)
    return sharding.update(spec=spec)


def _alike(leaf, param):
    """Nothing is added, but the compiler lays out alike what it adds up."""
    if not param.ndim or not leaf.size:
        return leaf
    param = jax.lax.stop_gradient(param)
    nothing = jnp.where(jnp.isfinite(param), 0 * param, 0).astype(leaf.dtype)
    return leaf + nothing.reshape((1,) * (leaf.ndim - param.ndim) + param.shape)


def explicit_sharding(aval):
    """The sharding of a type where it is part of it (Explicit mesh), else None."""
    explicit = jax.sharding.AxisType.Explicit in aval.sharding.mesh.axis_types
    return aval.sharding if explicit else None
