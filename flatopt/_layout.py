"""Layout of Monte Carlo samples in time and memory: loops, batches, chunks."""

import functools

import jax
import jax.numpy as jnp

from flatopt._trees import explicit_sharding


def split_batch(kwargs, names, num_samples):
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
        if size % num_samples:
            raise ValueError(
                f"a batch of {size} examples does not divide into num_samples="
                f"{num_samples} chunks; choose a batch size that is a multiple of it."
            )

    def reshape(leaf):
        if not _is_split(leaf):
            return leaf
        leaf = jnp.asarray(leaf)
        shape = (leaf.shape[0] // num_samples, num_samples, *leaf.shape[1:])
        sharding = explicit_sharding(leaf)
        if sharding is None:
            return leaf.reshape(shape)
        first, *rest = (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
        spec = jax.sharding.PartitionSpec(first, None, *rest)
        return jax.lax.reshape(leaf, shape, out_sharding=sharding.update(spec=spec))

    return jax.tree.map(reshape, chunks), whole


def _is_split(leaf):
    return hasattr(leaf, "shape") and len(leaf.shape) >= 1


def sum_samples(sample, num_samples, chunks, strategy, inputs, rematerialize):
    """Sum ``sample(index, chunk)[0]`` over samples; stack the aux ``[1]``.

    ``inputs`` are the key and params, looked at to tell a trace from eager calls.
    """
    leaves, treedef = jax.tree.flatten(chunks)
    is_split = [_is_split(leaf) for leaf in leaves]
    arrays = [leaf for leaf, split in zip(leaves, is_split, strict=True) if split]

    def rebuild(parts):
        parts = iter(parts)
        return treedef.unflatten(
            [next(parts) if s else x for x, s in zip(leaves, is_split, strict=True)]
        )

    def one(index):
        parts = [jax.lax.dynamic_index_in_dim(x, index, 1, False) for x in arrays]
        return sample(index, rebuild(parts))

    def group(start, size):
        if size == 1:
            total, aux = one(start)
            return total, jax.tree.map(lambda a: jnp.asarray(a)[None], aux)
        parts = [jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in arrays]
        total, aux = jax.vmap(lambda i, p: sample(i, rebuild(p)), in_axes=(0, 1))(
            start + jnp.arange(size, dtype=jnp.int32), parts
        )
        return jax.tree.map(lambda x: x.sum(axis=0), total), aux

    if strategy == "auto":
        strategy = choose_strategy(one, num_samples, (inputs, arrays))
    if strategy == "vmap":
        return group(jnp.int32(0), num_samples)
    if strategy == "unroll" or num_samples == 1:
        return _unroll(lambda i: group(jnp.int32(i), 1), num_samples)
    size = 1 if strategy == "scan" else min(strategy, num_samples)
    return _scan(group, num_samples, size, rematerialize)


def _unroll(group, num_samples):
    total, aux = group(0)
    auxes = [aux]
    for i in range(1, num_samples):
        part, aux = group(i)
        total = jax.tree.map(jnp.add, total, part)
        auxes.append(aux)
    return total, jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)


def _scan(group, num_samples, size, rematerialize):
    """Full groups in a loop, what is left after it."""
    loops, left = divmod(num_samples, size)
    body = functools.partial(group, size=size)
    if rematerialize:
        body = jax.checkpoint(body)

    def step(total, start):
        part, aux = body(start)
        return jax.tree.map(jnp.add, total, part), aux

    starts = size * jnp.arange(loops, dtype=jnp.int32)
    shapes, _ = jax.eval_shape(body, starts[0])
    total, aux = jax.lax.scan(step, jax.tree.map(_zeros, shapes), starts)
    aux = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux)
    if left:
        part, rest = group(jnp.int32(loops * size), left)
        total = jax.tree.map(jnp.add, total, part)
        aux = jax.tree.map(lambda *a: jnp.concatenate(a), aux, rest)
    return total, aux


def _zeros(like):
    """Zeros of the type of ``like``: shape, dtype, sharding and varying axes."""
    zeros = jnp.zeros(like.shape, like.dtype, out_sharding=_explicit_sharding_of(like))
    return make_varying(zeros, varying_axes(like))


def varying_axes(like):
    """Axes of ``jax.shard_map`` over which a value differs between devices."""
    kind = getattr(like, "manual_axis_type", None)
    return tuple(sorted(kind.varying)) if kind is not None else ()


def make_varying(leaf, axes):
    """The same values, typed as different between the devices of these axes."""
    missing = tuple(a for a in axes if a not in varying_axes(jax.typeof(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def _explicit_sharding_of(like):
    sharding = getattr(like, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return None
    return sharding


def choose_strategy(sample, num_samples, inputs):
    """The layout for ``strategy="auto"``; see ``docs/strategies.md``.

    Outside a trace a loop would compile anew at each call. On CPU, XLA runs
    convolutions inside loops many times slower than outside, and everything else best
    in a loop. On accelerators a loop is the conservative choice.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs))
    if num_samples == 1 or not traced:
        return "unroll"
    if jax.default_backend() == "cpu" and _has_convolution(
        jax.make_jaxpr(sample)(jnp.int32(0)).jaxpr
    ):
        return "unroll"
    return "scan"


def _has_convolution(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and _has_convolution(inner):
                return True
    return False
