"""Random bits that fuse: the numbers of jax.random, without its memory traffic.

On CPU, JAX lowers its threefry generator to a loop whose every round passes over
memory. Written as one elementwise expression the same generator fuses with what uses
the numbers: bit for bit the values of ``jax.random.bits``, several times faster, with
no temporary arrays.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import platforms, quantile

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


# Up to this size each value of any sampler depends on the key and on its flat index
# alone, so that the noise of many small leaves can be drawn in one go.
SMALL = 2048


# Jitted for eager calls, inlined in traces.
_jit = functools.partial(
    jax.jit, static_argnames=("shape", "dtype", "out_sharding"), inline=True
)


def fold_in(key, word):
    """``jax.random.fold_in``, without loops for a threefry key; ``word`` may be traced."""
    if not _is_threefry(key):
        return jax.random.fold_in(key, word)
    return _fold_in(key, word)


@functools.partial(jax.jit, inline=True)
def _fold_in(key, word):
    data = key_data(key)
    low = jnp.asarray(word).astype(jnp.uint32)
    folded = jnp.stack(_threefry(data[0], data[1], jnp.zeros_like(low), low))
    return same_kind(folded, key)


def keys_of_draws(key, num_draws):
    """A function of the index of a draw, which may be traced: ``fold_in(key, index)``.

    The keys of many draws are made at once, if they are threefry's: one at a time takes an
    accelerator a hundred operations in each round of a loop.
    """
    if num_draws == 1 or not _is_threefry(key):
        return lambda index: fold_in(key, index)
    folded = jax.vmap(fold_in, (None, 0))(key, jnp.arange(num_draws, dtype=jnp.uint32))
    return lambda index: folded[index]


def bits(key, shape, out_sharding=None):
    """Random uint32, those of ``jax.random.bits`` for a threefry key."""
    if not _is_threefry(key) or math.prod(shape) >= 2**32:
        return jax.random.bits(key, shape, jnp.uint32, out_sharding=out_sharding)
    data = key_data(key)
    low = _flat_index(shape, out_sharding)
    first, second = _threefry(data[0], data[1], jnp.zeros_like(low), low)
    return first ^ second


def key_data(key):
    """The words of a key, typed or not."""
    return jax.random.key_data(key) if _is_typed(key) else key


def same_kind(data, key):
    """Words as a key of the kind of another."""
    if not _is_typed(key):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _is_typed(key):
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _is_threefry(key):
    if not _is_typed(key):
        return key.shape[-1] == 2
    return str(jax.random.key_impl(key)) == "threefry2x32"


def _flat_index(shape, out_sharding):
    index = jnp.zeros(shape, jnp.uint32, out_sharding=out_sharding)
    stride = 1
    for axis in reversed(range(len(shape))):
        position = jax.lax.broadcasted_iota(
            jnp.uint32, shape, axis, out_sharding=out_sharding
        )
        index = index + position * jnp.uint32(stride)
        stride *= shape[axis]
    return index


def _threefry(key0, key1, x0, x1):
    """Threefry-2x32 with 20 rounds (Salmon et al., Random123, 2011)."""
    schedule = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            left = x1 << jnp.uint32(rotation)
            x1 = x0 ^ (left | (x1 >> jnp.uint32(32 - rotation)))
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


@_jit
def normal(key, shape, dtype, out_sharding=None):
    return to_normal(bits(key, shape, out_sharding)).astype(dtype)


@_jit
def uniform(key, shape, dtype, out_sharding=None):
    return to_uniform(bits(key, shape, out_sharding)).astype(dtype)


@_jit
def laplace(key, shape, dtype, out_sharding=None):
    return to_laplace(bits(key, shape, out_sharding)).astype(dtype)


@_jit
def irwin_hall(key, shape, dtype, out_sharding=None):
    return to_irwin_hall(bits(key, shape, out_sharding)).astype(dtype)


@_jit
def signs(key, shape, dtype, out_sharding=None):
    return to_signs(_flags(key, shape, out_sharding)).astype(dtype)


def to_normal(words):
    return platforms.choose(
        quantile.normal_quantile,
        lambda x: jnp.float32(2**0.5) * jax.lax.erf_inv(x),
        _open_interval(words),
    )


def to_uniform(words):
    return jnp.float32(3**0.5) * _open_interval(words)


def to_laplace(words):
    values = _open_interval(words)
    size = -jnp.log1p(-jnp.abs(values)) / jnp.float32(2**0.5)
    return jnp.sign(values) * size


def to_irwin_hall(words):
    """The sum of the four bytes of a word: two pairs at a time, then their sum."""
    pairs = (words & jnp.uint32(0x00FF00FF)) + ((words >> 8) & jnp.uint32(0x00FF00FF))
    total = (pairs & jnp.uint32(0xFFFF)) + (pairs >> 16)
    deviation = math.sqrt(4 * (256**2 - 1) / 12)
    return (total.astype(jnp.float32) - 510) * jnp.float32(1 / deviation)


def to_signs(flags):
    return 1 - 2 * flags.astype(jnp.float32)


def _unchanged(words):
    return words


def sample_leaves(keys, shapes, transform):
    """Values of a sampler for many small leaves, in one go and stored: good on CPU.

    The values are those of each leaf drawn alone, from ``transform`` of its bits.
    """
    sizes = tuple(math.prod(shape) for shape in shapes)
    values = _joint_bits(keys, sizes, transform)
    return [v.reshape(shape) for v, shape in zip(values, shapes, strict=True)]


def sample_leaves_signs(keys, shapes):
    """The values of ``signs`` for all leaves, from one run of the generator."""
    sizes = tuple(math.prod(_packed(shape)) for shape in shapes)
    words = _joint_bits(keys, sizes, _unchanged)
    return [
        to_signs(_unpack(w.reshape(_packed(shape)), shape))
        for w, shape in zip(words, shapes, strict=True)
    ]


def can_sample_leaves(keys):
    """For threefry: the values of a leaf are then those of its bits."""
    return _is_threefry(keys)


@functools.partial(jax.jit, static_argnames=("sizes", "transform"), inline=True)
def _joint_bits(keys, sizes, transform):
    """``transform(bits(key, (size,)))`` for each key, by one elementwise expression.

    The lists are laid out in blocks of one key each. XLA would fuse the generator with
    each use of its values, and so run it again for each; a barrier does not prevent
    that on CPU, but a loop does, and two rounds of it suffice.
    """
    width, rounds = 256, 2
    counts = [-(-size // width) for size in sizes]
    blocks = -(-sum(counts) // rounds) * rounds
    owners = np.zeros(blocks, np.int32)
    owners[: sum(counts)] = np.repeat(np.arange(len(sizes)), counts)
    firsts = np.cumsum([0, *counts])
    starts = (np.arange(blocks) - firsts[owners]) * width
    data = jax.random.key_data(keys)[owners].reshape(rounds, -1, 2)
    starts = jnp.asarray(starts, jnp.uint32).reshape(rounds, -1)

    def draw(block):
        data, starts = block
        lane = jnp.arange(width, dtype=jnp.uint32)[None]
        low = starts[:, None] + lane
        first, second = _threefry(data[:, :1], data[:, 1:], jnp.zeros_like(low), low)
        return transform(first ^ second)

    flat = jax.lax.map(draw, (data, starts)).reshape(-1)
    return [
        flat[first * width : first * width + size]
        for first, size in zip(firsts, sizes, strict=False)
    ]


def _flags(key, shape, out_sharding):
    """Random zeros and ones as uint32, up to 32 from each random word."""
    packed, sharding = _packed(shape), None
    if out_sharding is not None and packed != shape:
        sharding = _packed_sharding(out_sharding, _packing(shape)[0], packed)
    if packed == shape:
        words = bits(key, shape, out_sharding)
    elif _is_threefry(key) and out_sharding is None:
        words = platforms.choose(
            functools.partial(_stored_bits, shape=packed),
            functools.partial(jax.random.bits, shape=packed, dtype=jnp.uint32),
            key,
        )
    else:
        words = jax.random.bits(key, packed, jnp.uint32, out_sharding=sharding)
    flags = _unpack(words, shape, sharding)
    return flags if sharding is None else jax.sharding.reshard(flags, out_sharding)


def _stored_bits(key, shape):
    keys = jax.random.wrap_key_data(key_data(key)[None])
    return _joint_bits(keys, (math.prod(shape),), _unchanged)[0].reshape(shape)


def _packed(shape):
    """The shape of the random words behind an array of signs."""
    if math.prod(shape) <= SMALL:
        return shape
    axis, count = _packing(shape)
    return (*shape[:axis], shape[axis] // count, *shape[axis + 1 :])


def _unpack(words, shape, sharding=None):
    """The bits of random words as zeros and ones.

    Small arrays take the top bit of one word a value. In others, along the packed axis,
    values i * count + j are bit j of word i; the other axes keep their places, so the
    words of a sharded array are sharded like it.
    """
    if words.shape == shape:
        return words >> jnp.uint32(31)
    axis, count = _packing(shape)
    shifts = jnp.arange(count, dtype=jnp.uint32)
    shifts = shifts.reshape(
        [count if a == axis + 1 else 1 for a in range(words.ndim + 1)]
    )
    flags = (jnp.expand_dims(words, axis + 1) >> shifts) & jnp.uint32(1)
    return jax.lax.reshape(flags, shape, out_sharding=sharding)


def _packing(shape):
    """The axis to pack and how many values a word holds: a divisor of its length.

    The last axis comes last, so that the inner loop runs over stored words.
    """
    last = len(shape) - 1
    counts = {
        axis: max(d for d in range(1, 33) if length % d == 0)
        for axis, length in enumerate(shape)
    }
    axis = max(counts, key=lambda axis: (counts[axis], axis != last, axis))
    return axis, counts[axis]


def _packed_sharding(sharding, axis, shape):
    """The sharding of an array for its words, replicated where they are too few."""
    spec = [*sharding.spec, *[None] * len(shape)][: len(shape)]
    names = (spec[axis],) if isinstance(spec[axis], str) else spec[axis] or ()
    if shape[axis] % math.prod(sharding.mesh.shape[name] for name in names):
        spec[axis] = None
    return sharding.update(spec=jax.sharding.PartitionSpec(*spec))


def _open_interval(words):
    """Uniform float32 in (-1, 1), as ``jax.random.normal`` makes it from its bits."""
    mantissa = (words >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - jnp.float32(1)
    lowest = jnp.float32(-0.99999994)
    return jnp.maximum(lowest, unit * (jnp.float32(1) - lowest) + lowest)
