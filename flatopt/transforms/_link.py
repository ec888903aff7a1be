"""What the links of a chain share: keys in states, value_fn, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks, random, trees


def _is_typed(key):
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def check_key(key):
    whole = isinstance(key, int | np.integer) and not isinstance(key, bool)
    arrays = isinstance(key, jax.Array | np.ndarray) and (
        (_is_typed(key) and key.shape == ())
        or (jnp.issubdtype(key.dtype, jnp.integer) and key.shape in ((), (2,)))
    )
    if not (whole or arrays):
        raise TypeError(
            f"key must be an int or a single JAX random key, got {key!r}; write key=0 or "
            "key=jax.random.key(0)."
        )


def key_data(key):
    """The raw data of a key for a state, as a copy: the state may be donated."""
    if not _is_typed(key):
        key = jax.random.wrap_key_data(key) if np.ndim(key) else jax.random.key(key)
    return jnp.array(jax.random.key_data(key), copy=True)


def stored_key(state, key):
    """The key of a state, of ``key``'s generator."""
    impl = jax.random.key_impl(key) if _is_typed(key) else None
    return jax.random.wrap_key_data(state.noise_key, impl=impl)


def step_key(state, key):
    """The key of this step: that of the state with the count folded in."""
    return random.fold_in(stored_key(state, key), state.count)


def value_dtype(params):
    dtypes = [getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(params)]
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def check_update(params, value_fn, name, advice=" and pass it mask= instead"):
    if params is None:
        raise ValueError(
            f"{name} needs params, got None; call "
            "tx.update(grads, state, params, value_fn=loss_fn)."
        )
    if value_fn is None:
        raise ValueError(
            f"{name} needs value_fn, which was not passed; call "
            "tx.update(grads, state, params, value_fn=loss_fn, batch=batch) with "
            "loss_fn(params, batch); where a wrapper drops it (optax.lookahead, Flax "
            "Linen's TrainState) take gradients from smooth_value_and_grad instead."
        )
    if not callable(value_fn):
        raise TypeError(
            f"value_fn must be a function of params, got {value_fn!r}; pass the loss "
            "function itself, not its value."
        )
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            f"params hold MaskedNodes, which value_fn cannot take: optax.masked or "
            f"optax.partition is around {name}; put {name} outside of them{advice}."
        )


def partition(value_fn, params, mask):
    """The parameters to differentiate, by a mask.

    Returns ``value_fn`` of the free leaves alone; ``select(tree)``, which puts None in
    place of the others, so that paths stay; and ``merge(tree, others)``, which fills
    these places from a whole tree.
    """
    if mask is None:
        return value_fn, lambda tree: tree, lambda tree, others: tree
    flags = trees.mask_flags(mask, params)
    treedef = jax.tree.structure(params)

    def select(tree):
        leaves = treedef.flatten_up_to(tree)
        return treedef.unflatten(
            [x if flag else None for x, flag in zip(leaves, flags, strict=True)]
        )

    def merge(tree, others):
        pairs = zip(
            treedef.flatten_up_to(tree),
            treedef.flatten_up_to(others),
            flags,
            strict=True,
        )
        return treedef.unflatten([x if flag else y for x, y, flag in pairs])

    @functools.wraps(value_fn)
    def value_of(free, **kwargs):
        return value_fn(merge(free, params), **kwargs)

    return value_of, select, merge


def zeros_like(params):
    """Zeros for numbers and arrays; what is neither stays."""
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if checks.is_numeric(leaf) else leaf, params
    )


def memory_dtype(leaf):
    """The dtype of what a state keeps for a leaf; placeholders have none."""
    dtype = getattr(leaf, "dtype", jnp.float32)
    return trees.wide(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype


def wide_zeros(params):
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=memory_dtype(p)), params)
