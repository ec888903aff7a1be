"""Random vectors for curvature operators: keys, signs, normal values."""

import functools

import jax
import jax.numpy as jnp

from flatopt import kernels
from flatopt._core import binding, random
from flatopt._core.sharding import lay_out, placement_of
from flatopt.curvature._operator import like_wide


@functools.partial(jax.jit, static_argnums=2)
def probe_keys(key, start, count):
    """Keys of the probes ``start`` to ``start + count``."""
    indices = start + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda i: random.fold_in(key, i))(indices)


@functools.partial(jax.jit, static_argnums=0)
def _draw_rows(placement, params, keys):
    return lay_out(jax.vmap(signs_like(params))(keys), params, placement)


def draw_signs(operator, keys):
    """A block of random signs, one row a key."""
    return _draw_rows(placement_of(operator.like), operator.like, keys)


def signs_like(params):
    """``draw(key)`` of random signs, float32 or as wide as the parameters."""
    draw = binding.bind(kernels.isotropic(kernels.signs), jax.random.key(0), params)
    return lambda key: like_wide(draw(key), params)


def normal_like(params):
    """``draw(key)`` of standard normal values, float32 or as wide as the parameters."""
    draw = binding.bind(kernels.isotropic(), jax.random.key(0), params)
    return lambda key: like_wide(draw(key), params)


@functools.partial(jax.jit, static_argnums=0)
def _draw_normal_rows(placement, params, keys):
    return lay_out(jax.vmap(normal_like(params))(keys), params, placement)


def draw_normal(operator, keys):
    """A block of standard normal values, one row a key."""
    return _draw_normal_rows(placement_of(operator.like), operator.like, keys)
