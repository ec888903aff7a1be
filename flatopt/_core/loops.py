"""Loops and branches over functions that are traced once; plain Python when eager."""

import jax
import jax.numpy as jnp

from flatopt._core import jaxprs, platforms
from flatopt._core.platforms import is_staged


def fold_rows(step, start, rows):
    """Fold ``step(state, row) -> state`` over the rows of a tree."""
    return repeat(
        lambda index, state: step(state, jax.tree.map(lambda x: x[index], rows)),
        start,
        jax.tree.leaves(rows)[0].shape[0],
    )


def repeat(body, start, num_steps):
    if is_staged():
        traced, _ = jaxprs.trace(body, jnp.int32(0), start)
        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), traced, start)
    state = start
    for index in range(num_steps):
        state = body(jnp.int32(index), state)
    return state


def map_rows(function, rows, unroll=1):
    """``function`` of each row of a tree, one after another; results are stacked.

    ``unroll`` rows to a round of the loop: what they share is computed once for them.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    if count <= unroll:
        results = [
            function(jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(count)
        ]
        return jax.tree.map(lambda *x: jnp.stack(x), *results)
    traced, _ = jaxprs.trace(
        lambda group: map_rows(function, group, unroll),
        jax.tree.map(lambda x: x[:unroll], rows),
    )
    whole = count - count % unroll
    groups = jax.tree.map(
        lambda x: x[:whole].reshape(whole // unroll, unroll, *x.shape[1:]), rows
    )
    results = jax.tree.map(
        lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(traced, groups)
    )
    if whole == count:
        return results
    rest = map_rows(function, jax.tree.map(lambda x: x[whole:], rows), unroll)
    return jax.tree.map(lambda *x: jnp.concatenate(x), results, rest)


def cond(condition, yes, no):
    """``lax.cond`` in a trace; outside, where it would compile at each call, an if."""
    if not isinstance(condition, jax.core.Tracer):
        return yes() if condition else no()
    (yes, _), (no, _) = jaxprs.trace(yes), jaxprs.trace(no)
    return jax.lax.cond(condition, yes, no)


def usually(condition, quick, whole):
    """``quick()`` where a condition holds, as it usually does, else ``whole()``.

    On CPU alone: elsewhere a branch costs more than it spares, and it is ``whole()``.
    """
    return platforms.choose(lambda: cond(condition, quick, whole), whole)
