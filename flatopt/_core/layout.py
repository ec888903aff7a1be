"""Layout of Monte Carlo samples in time and memory: loops, batches, chunks."""

import functools
import sys

import jax
import jax.numpy as jnp

from flatopt._core import jaxprs, platforms, rules
from flatopt._core.loops import repeat
from flatopt._core.platforms import is_staged
from flatopt._core.sharding import explicit_sharding, make_varying, varying_axes

INNER = (*rules.LOOPS, "cond")


def split_batch(kwargs, names, num_samples, count_name="num_samples"):
    """Split the named arguments into ``num_samples`` strided chunks.

    Returns ``(chunks, whole)``: the named arguments with array leaves of shape
    ``(B, ...)`` reshaped to ``(B/M, M, ...)``, so that ``[:, j]`` is chunk j and a
    sharded leading axis stays where it is; and the other arguments.
    """
    missing = [name for name in names if name not in kwargs]
    if missing:
        raise ValueError(
            f"batch_argnames names {missing[0]!r}, which was not passed; pass "
            f"{missing[0]}= as a keyword argument, or set batch_argnames to the names of "
            "the arguments that hold the batch (a closure over the batch cannot be split)."
        )
    chunks = {name: kwargs[name] for name in names}
    _check_dense(chunks)
    whole = {name: value for name, value in kwargs.items() if name not in names}
    sizes = {
        leaf.shape[0]: name
        for name in names
        for leaf in jax.tree.leaves(chunks[name])
        if _is_split(leaf)
    }
    if names and not sizes:
        raise ValueError(
            f"batch_argnames {names} hold no array to split; pass arrays with a leading "
            "axis of examples."
        )
    if len(sizes) > 1:
        (first, a), (second, b) = list(sizes.items())[:2]
        raise ValueError(
            f"the batch leaves disagree: {first} examples in {a!r}, {second} in {b!r}; "
            "give all array leaves the same leading axis."
        )
    for size in sizes:
        if not size or size % num_samples:
            raise ValueError(
                f"a batch of {size} examples does not divide into {count_name}="
                f"{num_samples} chunks; choose a batch size that is a multiple of it, and "
                "drop the last batch of an epoch (drop_last=True) or pad it"
                + (
                    " with examples of weight 0 for weight_fn."
                    if count_name == "num_samples"
                    else "."
                )
            )

    def reshape(leaf):
        if not _is_split(leaf):
            return leaf
        leaf = _as_array(leaf)
        shape = (leaf.shape[0] // num_samples, num_samples, *leaf.shape[1:])
        sharding = explicit_sharding(jax.typeof(leaf))
        if sharding is None:
            return leaf.reshape(shape)
        first, *rest = (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
        spec = jax.sharding.PartitionSpec(first, None, *rest)
        return jax.lax.reshape(leaf, shape, out_sharding=sharding.update(spec=spec))

    return jax.tree.map(reshape, chunks), whole


def _check_dense(chunks):
    # Where the module was not imported there are no sparse arrays.
    sparse = getattr(sys.modules.get("jax.experimental.sparse"), "JAXSparse", ())
    for name, chunk in chunks.items():
        for leaf in jax.tree.leaves(chunk, is_leaf=lambda x: isinstance(x, sparse)):
            if isinstance(leaf, sparse):
                raise TypeError(
                    f"batch_argnames names {name!r}, got a sparse {type(leaf).__name__}, "
                    "whose examples cannot be split; give a dense array "
                    f"({name}.todense()), or leave it out of batch_argnames."
                )


def _as_array(leaf):
    try:
        return jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "the batch must be made of arrays to be split, got a "
            f"{type(leaf).__name__} of dtype {getattr(leaf, 'dtype', 'unknown')}; give "
            "arrays of numbers, or leave it out of batch_argnames."
        ) from error


def _is_split(leaf):
    return hasattr(leaf, "shape") and len(leaf.shape) >= 1


def chunk_at(chunks, index):
    """Chunk ``index`` of what :func:`split_batch` returned."""
    return jax.tree.map(
        lambda x: (
            jax.lax.dynamic_index_in_dim(x, index, 1, False) if _is_split(x) else x
        ),
        chunks,
    )


def walk(step, start, num_steps, chunks):
    """Fold ``step(state, index, chunk) -> state`` over chunks, one after the other."""
    return repeat(
        lambda index, state: step(state, index, chunk_at(chunks, index)),
        start,
        num_steps,
    )


def sum_samples(sample, num_samples, chunks, strategy, rematerialize):
    """Sum ``sample(index, chunk)[0]`` over samples; stack the aux ``[1]``."""
    leaves, treedef = jax.tree.flatten(chunks)
    is_split = [_is_split(leaf) for leaf in leaves]
    arrays = [leaf for leaf, split in zip(leaves, is_split, strict=True) if split]

    def rebuild(parts):
        parts = iter(parts)
        return treedef.unflatten(
            [next(parts) if s else x for x, s in zip(leaves, is_split, strict=True)]
        )

    def one(index, parts):
        return sample(index, rebuild(parts))

    def at(one, index):
        parts = [jax.lax.dynamic_index_in_dim(x, index, 1, False) for x in arrays]
        total, aux = one(index, parts)
        return total, jax.tree.map(lambda a: jnp.asarray(a)[None], aux)

    def batch(one, size, start):
        parts = [jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in arrays]
        indices = start + jnp.arange(size, dtype=jnp.int32)
        total, aux = jax.vmap(one, in_axes=(0, 1))(indices, parts)
        return jax.tree.map(lambda x: x.sum(axis=0), total), aux

    def lay_out(strategy, one):
        if strategy == "vmap":
            return batch(one, num_samples, jnp.int32(0))
        at_index = functools.partial(at, one)
        if strategy == "unroll":
            return _unroll(at_index, num_samples)
        size = 1 if strategy == "scan" else min(strategy, num_samples)
        loops, left = divmod(num_samples, size)
        body = at_index if strategy == "scan" else functools.partial(batch, one, size)
        traced, jaxpr = jaxprs.trace(body, jnp.int32(0))
        total, aux = _scan(traced, jaxpr, loops * size, size, rematerialize)
        if not left:
            return total, aux
        part, rest = batch(one, left, jnp.int32(loops * size))
        return jax.tree.map(jnp.add, total, part), _concatenate(aux, rest)

    if strategy == "vmap" or not isinstance(strategy, str):
        return lay_out(strategy, one)
    if num_samples == 1 or not is_staged():
        eager = "scan" if strategy == "scan" and num_samples > 1 else "unroll"
        return lay_out(eager, one)
    traced, jaxpr = jaxprs.trace(one, jnp.int32(0), [x[:, 0] for x in arrays])
    if strategy != "auto":
        return lay_out(strategy, traced)
    names = (
        rules.strategy_on_cpu(jaxpr, num_samples, rematerialize),
        rules.strategy_on_gpu(jaxpr, num_samples, bool(arrays)),
        rules.strategy_on_tpu(jaxpr, num_samples, bool(arrays)),
    )
    ways = {name: functools.partial(lay_out, name, traced) for name in names}
    on_cpu, on_gpu, on_tpu = (ways[name] for name in names)
    return platforms.choose(on_cpu, on_gpu, on_tpu=on_tpu)


def mean_of_pair(one, draw):
    """The mean of ``one(sign, noise)[0]`` at the signs 1 and -1; the aux ``[1]`` stacked.

    Where ``one`` has a loop of its own, such as scanned layers, XLA keeps the activations of
    two copies of it side by side, which is twice the memory. So the passes are one loop of
    two rounds; on a TPU the second one stands in a computation of its own. Accelerators
    draw the noise once more, rather than keep it through a pass. On CPU two copies, if
    ``one`` has convolutions that would be slow in the loop. Without a loop an accelerator
    begins the second pass when the first is done: TPUs kept the activations of both.
    """
    signs = jnp.array([1.0, -1.0], jnp.float32)
    if not is_staged():
        noise = draw()
        outs = [one(sign, noise) for sign in signs]
        return _mean_of_two(*outs)
    # Both signs use it: without the barrier XLA may draw it twice.
    noise = jax.lax.optimization_barrier(draw())
    traced, jaxpr = jaxprs.trace(one, signs[0], noise)

    def copies():
        return _mean_of_two(*[traced(sign, noise) for sign in signs])

    def in_turn():
        first = traced(signs[0], noise)
        later, _ = jax.lax.optimization_barrier((noise, first[0]))
        return _mean_of_two(first, traced(signs[1], later))

    if not rules.has_loop(jaxpr):
        return platforms.choose(copies, in_turn)

    def kept():
        return _halve(_scan_rows(lambda sign: traced(sign, noise), jaxpr, signs))

    def redrawn():
        return _halve(_scan_rows(lambda sign: traced(sign, draw(sign)), jaxpr, signs))

    def second(first):
        total, aux = traced(signs[1], draw())
        return _mean(first[0], total), aux

    def apart():
        total, aux = traced(signs[0], draw())
        total, other = _apart(second, (total, aux))
        return total, _stack(aux, other)

    on_cpu = copies if _is_slow_in_rounds(jaxpr) else kept
    return platforms.choose(on_cpu, redrawn, on_tpu=apart)


def _halve(found):
    total, aux = found
    return jax.tree.map(lambda x: x / 2, total), aux


def _mean_of_two(plus, minus):
    return _mean(plus[0], minus[0]), _stack(plus[1], minus[1])


def _mean(tree, other):
    return jax.tree.map(lambda a, b: (a + b) / 2, tree, other)


def _stack(*auxes):
    return jax.tree.map(lambda *a: jnp.stack(a), *auxes)


def _apart(function, like):
    """``function(like)``, of the same types as ``like``, in a computation of its own.

    It is one branch of a conditional. The barrier hides from XLA that it is always taken.
    """
    is_true = jax.lax.optimization_barrier(jnp.array(True))
    return jax.lax.cond(is_true, function, lambda like: like, like)


def two_passes(value_and_grad, first, move):
    """Gradients at ``first``, then at the point that ``move`` makes of them.

    ``move(grads)`` returns the point and what else is to be kept. Returns the first value,
    the second gradients and what was kept. Where the loss has a loop of its own, two copies
    of it would share the zeros that their stacked activations begin as, and XLA would write
    them in each step on a TPU. There the second pass stands in a computation of its own. On
    GPU the loss stands in the program once, in a loop of two rounds; on CPU too, but for a
    loss with convolutions that would be slow in the loop.
    """

    def copies(first_pass, second_pass):
        value, grads = first_pass(first)
        point, kept = move(grads)
        _, grads = second_pass(point)
        return value, grads, kept

    if not is_staged():
        return copies(value_and_grad, value_and_grad)
    traced, jaxpr = jaxprs.trace(value_and_grad, first)
    rounds = _two_rounds(traced, jaxpr, first, move) if rules.has_loop(jaxpr) else None
    if rounds is None:
        return copies(traced, value_and_grad)

    def apart():
        value, grads = traced(first)
        _, kept = move(grads)
        grads = _apart(lambda grads: traced(move(grads)[0])[1], grads)
        return value, grads, kept

    is_slow = _is_slow_in_rounds(jaxpr)
    on_cpu = (lambda: copies(traced, traced)) if is_slow else rounds
    return platforms.choose(on_cpu, rounds, on_tpu=apart)


def _is_slow_in_rounds(jaxpr):
    """Whether convolutions that are fast on CPU in two copies would not be in a loop."""
    return not jaxprs.are_fast_in_loops(jaxpr, apart_from=INNER)


def _two_rounds(traced, jaxpr, first, move):
    """A function of both passes in one loop; None where its state would change type."""
    shapes = jax.eval_shape(traced, first)
    zeros = [_zeros(v.aval) for v in jaxpr.outvars]
    value, grads = jax.tree.unflatten(jax.tree.structure(shapes), zeros)
    moved, jaxpr = jaxprs.trace(move, grads)
    leaves = jax.tree.leaves(first)
    points, kept = jaxpr.outvars[: len(leaves)], jaxpr.outvars[len(leaves) :]
    same = all(
        varying_axes(v.aval) == varying_axes(jax.typeof(leaf))
        for v, leaf in zip(points, leaves, strict=True)
    )
    if not same or any(jnp.issubdtype(v.aval.dtype, jax.dtypes.extended) for v in kept):
        return None
    _, shapes = jax.eval_shape(moved, grads)
    kept = jax.tree.unflatten(
        jax.tree.structure(shapes), [_zeros(v.aval) for v in kept]
    )

    def step(state, is_second):
        value, grads, _ = state
        point, kept = moved(grads)  # of zeros in the first round, and not used
        point = jax.tree.map(lambda p, q: jnp.where(is_second, q, p), first, point)
        found, grads = traced(point)
        return (jnp.where(is_second, value, found), grads, kept), None

    rounds = jnp.array([False, True])
    return lambda: jax.lax.scan(step, (value, grads, kept), rounds)[0]


def _unroll(one, num_samples):
    total, aux = one(jnp.int32(0))
    auxes = [aux]
    for i in range(1, num_samples):
        part, aux = one(jnp.int32(i))
        total = jax.tree.map(jnp.add, total, part)
        auxes.append(aux)
    return total, _concatenate(*auxes)


def _concatenate(*auxes):
    return jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)


def _scan(traced, jaxpr, num_samples, size, rematerialize):
    starts = jnp.arange(0, num_samples, size, dtype=jnp.int32)
    body = jax.checkpoint(traced) if rematerialize else traced
    total, aux = _scan_rows(body, jaxpr, starts)
    return total, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux)


def _scan_rows(body, jaxpr, rows):
    """The sum of ``body(row)[0]``, whose types ``jaxpr`` tells; the aux stacked."""

    def step(total, row):
        part, aux = body(row)
        return jax.tree.map(jnp.add, total, part), aux

    shapes, _ = jax.eval_shape(body, rows[0])
    treedef = jax.tree.structure(shapes)
    zeros = [_zeros(v.aval) for v in jaxpr.outvars[: treedef.num_leaves]]
    return jax.lax.scan(step, treedef.unflatten(zeros), rows)


def _zeros(aval):
    """Zeros of an abstract value's type: shape, dtype, sharding and varying axes."""
    sharding = explicit_sharding(aval)
    zeros = jnp.zeros(aval.shape, aval.dtype, out_sharding=sharding)
    return make_varying(zeros, varying_axes(aval))
