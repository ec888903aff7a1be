"""Samplers: one array of independent values of mean 0 and variance 1."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import random, sharding

Sampler = Callable[..., jax.Array]


def normal(key, shape, dtype=jnp.float32, *, out_sharding=None) -> jax.Array:
    """Standard normal values: those of ``jax.random.normal``, drawn faster.

    The values are computed in float32 whatever ``dtype`` (a bfloat16 draw of
    ``jax.random.normal`` never exceeds 2.9). The generator is written so that XLA fuses
    it with what uses the noise; on CPU this is faster and stores no random words.

    Args:
      key: a JAX random key.
      shape: shape of the result.
      dtype: floating dtype of the result.
      out_sharding: sharding of the result on an Explicit mesh.

    Returns:
      An array of ``shape``.

    Example:
      >>> import jax, flatopt
      >>> key = jax.random.key(0)
      >>> bool((flatopt.kernels.normal(key, (9,)) == jax.random.normal(key, (9,))).all())
      True
    """
    return random.normal(key, tuple(shape), dtype, out_sharding)


def signs(key, shape, dtype=jnp.float32, *, out_sharding=None) -> jax.Array:
    """Random signs (Rademacher), up to 32 unpacked from each random word.

    The second moments are those of the normal distribution, so smoothing with
    signs has the same leading-order penalty, at a fraction of the cost of drawing.

    Args:
      key: a JAX random key.
      shape: shape of the result.
      dtype: floating dtype of the result.
      out_sharding: sharding of the result on an Explicit mesh.

    Returns:
      An array of ``shape`` with values -1 and 1.

    Example:
      >>> import jax, flatopt
      >>> flatopt.kernels.signs(jax.random.key(0), (6,))
      Array([-1., -1.,  1.,  1., -1.,  1.], dtype=float32)
    """
    return random.signs(key, tuple(shape), dtype, out_sharding)


def uniform(key, shape, dtype=jnp.float32, *, out_sharding=None) -> jax.Array:
    """Uniform values of mean 0 and variance 1, between -sqrt(3) and sqrt(3).

    Args:
      key: a JAX random key.
      shape: shape of the result.
      dtype: floating dtype of the result.
      out_sharding: sharding of the result on an Explicit mesh.

    Returns:
      An array of ``shape``.

    Example:
      >>> import jax, flatopt
      >>> values = flatopt.kernels.uniform(jax.random.key(0), (10_000,))
      >>> round(float(values.var()), 1), bool(abs(values).max() <= 3 ** 0.5)
      (1.0, True)
    """
    return random.uniform(key, tuple(shape), dtype, out_sharding)


def laplace(key, shape, dtype=jnp.float32, *, out_sharding=None) -> jax.Array:
    """Laplace values of mean 0 and variance 1.

    Args:
      key: a JAX random key.
      shape: shape of the result.
      dtype: floating dtype of the result.
      out_sharding: sharding of the result on an Explicit mesh.

    Returns:
      An array of ``shape``.

    Example:
      >>> import jax, flatopt
      >>> values = flatopt.kernels.laplace(jax.random.key(0), (10_000,))
      >>> round(float(values.var()), 1)
      1.0
    """
    return random.laplace(key, tuple(shape), dtype, out_sharding)


def sample_leaves(sampler, keys, leaves):
    """One array of ``sampler`` values a leaf, each from its own key.

    Where it pays, leaves are drawn together (all of them for signs, small ones for
    the other samplers here): the values are the same, and a deep network compiles one
    generator instead of hundreds.
    """
    shapes = [leaf.shape for leaf in leaves]
    shardings = [sharding.explicit_sharding(jax.typeof(leaf)) for leaf in leaves]
    transforms = {
        normal: random.to_normal,
        uniform: random.to_uniform,
        laplace: random.to_laplace,
    }
    together = {}
    if leaves and not any(shardings) and random.can_sample_leaves(keys):
        if sampler is signs:
            return random.sample_leaves_signs(keys, shapes)
        if sampler in transforms:
            small = [i for i, leaf in enumerate(leaves) if leaf.size <= random.SMALL]
            values = random.sample_leaves(
                keys[np.array(small, int)],
                [shapes[i] for i in small],
                transforms[sampler],
            )
            together = dict(zip(small, values, strict=True))
    accepts_out_sharding = _accepts_out_sharding(sampler)

    def sample(i):
        if i in together:
            return together[i]
        options = {"out_sharding": shardings[i]} if accepts_out_sharding else {}
        return sampler(keys[i], shapes[i], jnp.float32, **options)

    return [sample(i) for i in range(len(leaves))]


def _accepts_out_sharding(sampler):
    try:
        return "out_sharding" in inspect.signature(sampler).parameters
    except ValueError:
        return False
