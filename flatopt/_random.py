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

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


# Up to this size each value of any sampler depends on the key and on its flat index
# alone, so that the noise of many small leaves can be drawn in one go.
SMALL = 2048

# Jitted for eager calls, inlined in traces.
_jit = functools.partial(
    jax.jit, static_argnames=("shape", "dtype", "out_sharding"), inline=True
)


def bits(key, shape, out_sharding=None):
    """Random uint32, those of ``jax.random.bits`` for a threefry key."""
    if not _is_threefry(key) or math.prod(shape) >= 2**32:
        return jax.random.bits(key, shape, jnp.uint32, out_sharding=out_sharding)
    data = jax.random.key_data(key)
    low = _flat_index(shape, out_sharding)
    first, second = _threefry(data[0], data[1], jnp.zeros_like(low), low)
    return first ^ second


def _is_threefry(key):
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
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
    values = _open_interval(key, shape, out_sharding)
    return (jnp.float32(2**0.5) * jax.lax.erf_inv(values)).astype(dtype)


@_jit
def uniform(key, shape, dtype, out_sharding=None):
    values = _open_interval(key, shape, out_sharding)
    return (jnp.float32(3**0.5) * values).astype(dtype)


@_jit
def laplace(key, shape, dtype, out_sharding=None):
    values = _open_interval(key, shape, out_sharding)
    size = -jnp.log1p(-jnp.abs(values)) / jnp.float32(2**0.5)
    return (jnp.sign(values) * size).astype(dtype)


@_jit
def signs(key, shape, dtype, out_sharding=None):
    return 1 - 2 * _flags(key, shape, out_sharding).astype(dtype)


def _flags(key, shape, out_sharding):
    """Random zeros and ones as uint32, up to 32 from each random word.

    Small arrays take one word a value. In others, along the packed axis, values
    i * count + j are bit j of word i. Other axes keep their places, so the words of a
    sharded array are sharded like it.
    """
    if math.prod(shape) <= SMALL:
        return bits(key, shape, out_sharding) >> jnp.uint32(31)
    axis, count = _packing(shape)
    packed = (*shape[:axis], shape[axis] // count, *shape[axis + 1 :])
    sharding = None
    if out_sharding is not None:
        sharding = _packed_sharding(out_sharding, axis, packed)
    words = jnp.expand_dims(_stored_bits(key, packed, sharding), axis + 1)
    shifts = jnp.arange(count, dtype=jnp.uint32)
    shifts = shifts.reshape([count if a == axis + 1 else 1 for a in range(words.ndim)])
    flags = jax.lax.reshape(
        (words >> shifts) & jnp.uint32(1), shape, out_sharding=sharding
    )
    return flags if sharding is None else jax.sharding.reshard(flags, out_sharding)


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


def _stored_bits(key, shape, out_sharding):
    """Random words that XLA stores, since each is used for many values.

    Fused with its uses, the generator would run once for each value. On CPU a barrier
    does not prevent that; a loop does, and here two rounds of it suffice.
    """
    size, rounds = math.prod(shape), 2
    if size < 512:
        return bits(key, shape, out_sharding)
    if (
        jax.default_backend() != "cpu"
        or out_sharding is not None
        or not _is_threefry(key)
        or size >= 2**32
    ):
        return jax.random.bits(key, shape, jnp.uint32, out_sharding=out_sharding)
    data = jax.random.key_data(key)
    part = -(-size // rounds)
    low = jnp.arange(part, dtype=jnp.uint32)

    def draw(start):
        first, second = _threefry(data[0], data[1], jnp.zeros_like(low), low + start)
        return first ^ second

    starts = jnp.arange(rounds, dtype=jnp.uint32) * jnp.uint32(part)
    return jax.lax.map(draw, starts).reshape(-1)[:size].reshape(shape)


def _packed_sharding(sharding, axis, shape):
    """The sharding of an array for its words, replicated where they are too few."""
    spec = [*sharding.spec, *[None] * len(shape)][: len(shape)]
    names = (spec[axis],) if isinstance(spec[axis], str) else spec[axis] or ()
    if shape[axis] % math.prod(sharding.mesh.shape[name] for name in names):
        spec[axis] = None
    return sharding.update(spec=jax.sharding.PartitionSpec(*spec))


def _open_interval(key, shape, out_sharding):
    """Uniform float32 in (-1, 1), as ``jax.random.normal`` makes it from its bits."""
    mantissa = (bits(key, shape, out_sharding) >> jnp.uint32(9)) | jnp.uint32(
        0x3F800000
    )
    unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - jnp.float32(1)
    lowest = jnp.float32(-0.99999994)
    return jnp.maximum(lowest, unit * (jnp.float32(1) - lowest) + lowest)
