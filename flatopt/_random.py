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
    *leading, last = shape or (1,)
    packed = None if out_sharding is None else _packed_sharding(out_sharding, shape)
    words = bits(key, (*leading, -(-last // 32)), packed)
    # Without the barrier each consumer draws the word again for each of its bits.
    words = jax.lax.optimization_barrier(words)
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * words.ndim + (32,))
    flags = (words[..., None] >> shifts) & jnp.uint32(1)
    flags = jax.lax.reshape(
        flags, (*leading, 32 * words.shape[-1]), out_sharding=packed
    )
    values = 1 - 2 * flags[..., :last].reshape(shape).astype(dtype)
    return values if packed is None else jax.sharding.reshard(values, out_sharding)


def _packed_sharding(sharding, shape):
    """The sharding of the words behind an array: its own, if its last axis allows."""
    if not shape:
        return sharding
    *leading, last = (*sharding.spec, *[None] * len(shape))[: len(shape)]
    names = () if last is None else (last,) if isinstance(last, str) else last
    parts = 32 * math.prod(sharding.mesh.shape[name] for name in names)
    if shape[-1] % parts:
        last = None
    return sharding.update(spec=jax.sharding.PartitionSpec(*leading, last))


def _open_interval(key, shape, out_sharding):
    """Uniform float32 in (-1, 1), as ``jax.random.normal`` makes it from its bits."""
    mantissa = (bits(key, shape, out_sharding) >> jnp.uint32(9)) | jnp.uint32(
        0x3F800000
    )
    unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - jnp.float32(1)
    lowest = jnp.float32(-0.99999994)
    return jnp.maximum(lowest, unit * (jnp.float32(1) - lowest) + lowest)
