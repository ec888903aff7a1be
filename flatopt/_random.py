"""Random bits that fuse: the numbers of jax.random, without its memory traffic.

On CPU, JAX lowers its threefry generator to a loop whose every round passes over
memory. Written as one elementwise expression the same generator fuses with what uses
the numbers: bit for bit the values of ``jax.random.bits``, several times faster, with
no temporary arrays.
"""

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def bits(key, shape, *, out_sharding=None):
    """Random uint32, those of ``jax.random.bits`` for a threefry key."""
    size = 1
    for length in shape:
        size *= length
    if not _is_threefry(key) or size >= 2**32:
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


def open_interval(words):
    """Uniform float32 in (-1, 1) from random words, as ``jax.random.normal`` makes it."""
    mantissa = (words >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - jnp.float32(1)
    lowest = jnp.float32(-0.99999994)
    return jnp.maximum(lowest, unit * (jnp.float32(1) - lowest) + lowest)
