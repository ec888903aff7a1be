"""The links of a chain that make a gradient: a method is its ``estimate`` alone."""

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import (
    binding,
    checks,
    layout,
    linear,
    platforms,
    random,
    sharding,
    signatures,
    trees,
)
from flatopt.transforms import _states


class Step(NamedTuple):
    """What the estimate of one step is made of.

    Attributes:
      value_fn: the loss of the free parameters, with the signature of the user's.
      params: the parameters to differentiate; None in place of those masked out.
      whole: the loss and the parameters as the user gave them, for what masks by itself.
      arguments: keyword arguments of the loss that are not split.
      chunks: those that are split, as ``layout.split_batch`` returns them.
      key: the random key of this step, on this device.
      count: the number of steps before this one.
      memory: what the method keeps between steps, of the free parameters.
    """

    value_fn: Any
    params: Any
    whole: tuple[Any, Any]
    arguments: dict[str, Any]
    chunks: dict[str, Any]
    key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuple.count
    memory: Any

    def value(self, params, key, chunk):
        """The loss at parameters, with the key of one sample and one chunk."""
        options = signatures.sample_options(self.value_fn, key)
        value = self.value_fn(params, **self.arguments, **chunk, **options)
        return checks.check_value(value)


def link(
    name,
    state_type,
    estimate,
    *,
    mask,
    key,
    num_chunks=1,
    batch_argnames=(),
    count_name="num_samples",
    axis_name=None,
    init_memory=None,
    is_memory_of_free=False,
    own_value_fn=None,
    finish=None,
    rho_near_minimum=None,
    size_at=None,
):
    """The transformation whose gradient is ``estimate(step)``.

    ``estimate`` takes a :class:`Step` and returns the loss, the gradient with respect to
    ``step.params`` and the new memory, on one device: they are averaged over
    ``axis_name``, cast and put into place here. A state of ``state_type`` has count, key
    and loss as its first fields; with ``init_memory`` it has ``memory`` too: a tree like
    the parameters, or, if it ``is_memory_of_free``, any tree made of the free ones alone.
    ``own_value_fn`` stands in for the loss that is passed to ``update``. ``finish(step,
    result)`` makes of what was averaged over devices the loss, the gradient and the memory.

    ``rho_near_minimum``: r, a number or a schedule, where the gradient of a quadratic loss
    is that of the loss times 1 + r H, such as 0 for an average over noise; else None.

    ``size_at(count)``: the scale or radius of a step, to be read from the state, whose
    field for it is the one that begins with ``last_``.
    """
    check_key(key)
    size_name = next((f for f in state_type._fields if f.startswith("last_")), None)
    names = checks.check_names(batch_argnames)

    def init_fn(params):
        check_mask(mask, params)
        state = state_type(
            jnp.zeros((), jnp.int32), key_data(key), unknown(params, np.inf)
        )
        state = state._replace(is_finite=_states.initial_flag())
        if size_at is not None:
            zero = jnp.zeros((), value_dtype(params))
            state = state._replace(**{size_name: zero})
        if init_memory is None:
            return state
        if is_memory_of_free and jax.tree.leaves(params):
            free = selection(params, mask)[0](params)
            with binding.beside(params):
                return _with_memory(state, init_memory(free))
        return _with_memory(state, init_memory(params))

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        if linear.is_read():
            rho = rho_near_minimum
            linear.hand_on(name, rho(state.count) if callable(rho) else rho)
            return hand_on(updates, params, mask), state
        del updates
        value_fn = value_fn if own_value_fn is None else own_value_fn
        check_update(params, value_fn, name)
        _check_not_accumulated(name)
        checks.check_batch_argnames(names, value_fn)
        checks.check_axis_name(axis_name)
        value_of, select, merge = partition(value_fn, params, mask)
        free = checks.check_params(select(params))
        memory = () if init_memory is None else state.memory
        if init_memory is not None and not is_memory_of_free:
            memory = select(memory)
        given = signatures.forwarded(value_fn, extra_args)
        signatures.check_first(value_fn, given, names)
        chunks, whole = layout.split_batch(given, names, num_chunks, count_name)
        own_key = step_key(state, key)
        shared = memory, free  # the same on all devices
        if axis_name is not None:
            own_key = jax.random.fold_in(own_key, jax.lax.axis_index(axis_name))
            free, memory = sharding.tree_varying((free, memory), axis_name)
        step = Step(
            value_of,
            free,
            (value_fn, params),
            whole,
            chunks,
            own_key,
            state.count,
            memory,
        )
        with signatures.naming_what_lacks(value_fn, {**whole, **chunks}, extra_args):
            result = estimate(step)
        if axis_name is not None:
            sharding.note_average(axis_name)
            result = sharding.mean_over(result, axis_name)
        if finish is not None:
            memory, free = shared
            result = finish(step._replace(params=free, memory=memory), result)
        value, grads, memory = result
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, free)
        loss_name = state_type._fields[2]
        new_state = state._replace(
            count=optax.safe_increment(state.count),
            is_finite=_states.flag(state, value, grads),
            **{loss_name: value.astype(getattr(state, loss_name).dtype)},
        )
        if size_at is not None:
            # A copy: the state may be donated, and the user's array is not.
            size = jnp.array(size_at(state.count), value_dtype(params), copy=True)
            new_state = new_state._replace(**{size_name: size})
        if init_memory is not None:
            if not is_memory_of_free:
                memory = merge(memory, state.memory)
            new_state = _with_memory(new_state, memory)
        return merge(grads, trees.zeros_like(params)), new_state

    return optax.GradientTransformationExtraArgs(
        init_fn, makes_gradient(update_fn, name)
    )


def _with_memory(state, memory):
    """A state with another memory, in the field of this name unless it says otherwise."""
    if hasattr(state, "with_memory"):
        return state.with_memory(memory)
    return state._replace(memory=memory)


def hand_on(updates, params, mask):
    """What comes in, zero where it is masked out."""
    select, merge = selection(params, mask)
    return merge(select(updates), trees.zeros_like(updates))


def check_transformation(given, name="chain"):
    if not isinstance(given, optax.GradientTransformation):
        raise TypeError(
            f"{name} takes gradient transformations, got "
            f"{getattr(given, '__name__', None) or type(given).__name__}; call what makes "
            "one, and write optax.MultiSteps(...).gradient_transformation()."
        )


def check_mask(mask, params):
    """Refuse a wrong mask at ``init`` already, before a wrapper of optax meets it."""
    if mask is not None and jax.tree.leaves(params):
        trees.mask_flags(mask, params)


def _check_not_accumulated(name):
    """Reject a link inside of ``optax.MultiSteps``, which averages what the link ignores.

    Only the call stack can tell: the link sees the mean of the incoming zeros.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is optax.MultiSteps.update.__code__:
            raise ValueError(
                f"{name} is inside of optax.MultiSteps, which would train on the last "
                "microbatch alone, since it averages the incoming gradients that "
                f"{name} does not read; write flatopt.accumulate({name}(...), optimizer, "
                "num_microbatches)."
            )
        frame = frame.f_back


def makes_gradient(update_fn, name):
    """Mark an ``update`` that does not read what comes in, with the link's name."""
    update_fn.makes_gradient = name
    return update_fn


def keeps_updates(update_fn):
    """Mark an ``update`` that leaves what comes in as it is."""
    update_fn.keeps_updates = True
    return update_fn


def at_step(number, count, name):
    """A number, or a schedule's at this step."""
    number = number(count) if callable(number) else number
    checks.check_scale(number, name)
    return number


def unknown(params, value):
    """An infinity or a NaN for a state, as wide as the parameters.

    Outside of a trace it is put on the device as it is: what is computed, if by a copy
    alone, fails under ``jax_debug_infs`` and ``jax_debug_nans``. What a jitted function
    returns always does: there the largest number stands for an infinity, and zero for NaN.
    """
    dtype = value_dtype(params)
    if not platforms.is_staged():
        return jax.device_put(np.full((), value, dtype))
    if np.isnan(value) and jax.config.jax_debug_nans:
        value = 0.0
    if np.isinf(value) and jax.config.jax_debug_infs:
        value = jnp.finfo(dtype).max
    return jnp.full((), value, dtype)


def from_step(number, start_step, name):
    """A function of the count: a number or a schedule, and 0 before ``start_step``."""

    def size_at(count):
        return jnp.where(count < start_step, 0.0, at_step(number, count, name))

    return size_at


def _is_typed(key):
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def check_key(key):
    whole = isinstance(key, int | np.integer) and not isinstance(key, bool)
    arrays = isinstance(key, jax.Array | np.ndarray) and (
        (_is_typed(key) and key.shape == ())
        or (jnp.issubdtype(key.dtype, jnp.integer) and key.shape == ())
        or (key.dtype == jnp.uint32 and key.shape == checks.raw_key_shape())
    )
    if not (whole or arrays):
        got = repr(key)
        if isinstance(key, jax.Array | np.ndarray):
            got = f"an array of shape {key.shape} and dtype {key.dtype}"
        raise TypeError(
            f"key must be an int or a single JAX random key, got {got}; write key=0 or "
            "key=jax.random.key(0)."
        )
    if whole and not -(2**63) <= key < 2**63:
        raise ValueError(
            f"key must be an int of at most 64 bits, got {key}; write key=0 or "
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


def check_update(params, value_fn, name):
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
    signatures.check_order(value_fn, "value_fn")
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            f"params hold MaskedNodes, which value_fn cannot take: optax.masked or "
            f"optax.partition is around {name}; put {name} outside of "
            "them and pass it mask= instead."
        )


def partition(value_fn, params, mask):
    """The parameters to differentiate, by a mask.

    Returns ``value_fn`` of the free leaves alone, and what :func:`selection` returns.
    """
    select, merge = selection(params, mask)
    if mask is None:
        return value_fn, select, merge

    @functools.wraps(value_fn)
    def value_of(free, **kwargs):
        return value_fn(merge(free, params), **kwargs)

    return value_of, select, merge


def selection(params, mask):
    """``select(tree)`` and ``merge(tree, others)`` of the leaves where a mask is True.

    The one puts None in place of the others, so that paths stay; the other fills these
    places from a whole tree.
    """
    if mask is None:
        return lambda tree: tree, lambda tree, others: tree
    flags = trees.mask_flags(mask, params)
    select = functools.partial(trees.select, flags=flags)
    return select, functools.partial(trees.merge, flags=flags)


def widened(params):
    """Floating leaves in float32 or wider, to make a state from; shapes become zeros."""
    zeros = wide_zeros(params)

    def widen(leaf, zero):
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        return trees.widen(leaf) if is_array and zero.dtype != jnp.bool else zero

    return jax.tree.map(widen, params, zeros)


def wide_zeros(params):
    """Zeros for a state to keep, in float32 or wider; small where there are no numbers."""

    def zeros(leaf):
        dtype = getattr(leaf, "dtype", jnp.float32)
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros_like(leaf, dtype=trees.wide(dtype))
        return jnp.zeros(getattr(leaf, "shape", ()), jnp.bool)

    return jax.tree.map(zeros, params)
