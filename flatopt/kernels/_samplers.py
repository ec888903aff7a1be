"""Samplers: one array of independent values of mean 0 and variance 1."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import platforms, random, sharding

Sampler = Callable[..., jax.Array]


def normal(key, shape, dtype=jnp.float32, *, out_sharding=None) -> jax.Array:
    """Standard normal values: those of ``jax.random.normal`` up to rounding, drawn faster.

    The random words are the same everywhere. On CPU the values differ from the exact ones
    that belong to these words by at most 1e-5, elsewhere, as those of ``jax.random.normal``,
    by up to 2.2e-5. They are computed in float32 whatever ``dtype`` (a bfloat16 draw of
    ``jax.random.normal`` never exceeds 2.9).
    The generator is written so that XLA fuses it with what uses the noise; on CPU this is
    faster and stores no random words.

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
      >>> difference = flatopt.kernels.normal(key, (9,)) - jax.random.normal(key, (9,))
      >>> bool(abs(difference).max() < 3e-5)
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


def irwin_hall(key, shape, dtype=jnp.float32, *, out_sharding=None) -> jax.Array:
    """Nearly normal values: the sum of the four bytes of a random word.

    Sums of four independent uniform variables (Irwin-Hall), of mean 0 and variance 1. Their
    fourth moment is 2.7 where the normal one is 3, and none is beyond 3.47. On CPU they cost
    little more than the random words, a third of what :func:`normal` costs.

    Args:
      key: a JAX random key.
      shape: shape of the result.
      dtype: floating dtype of the result.
      out_sharding: sharding of the result on an Explicit mesh.

    Returns:
      An array of ``shape``.

    Example:
      >>> import jax, flatopt
      >>> values = flatopt.kernels.irwin_hall(jax.random.key(0), (10_000,))
      >>> round(float(values.var()), 1), bool(abs(values).max() < 3.47)
      (1.0, True)
    """
    return random.irwin_hall(key, tuple(shape), dtype, out_sharding)


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
    shardings = [sharding.explicit_sharding(jax.typeof(leaf)) for leaf in leaves]
    accepts_out_sharding = _accepts_out_sharding(sampler)

    def sample(key, leaf, out_sharding):
        options = {"out_sharding": out_sharding} if accepts_out_sharding else {}
        return sampler(key, leaf.shape, jnp.float32, **options)

    together = _drawn_together(sampler, keys, leaves)
    if not together or any(shardings):
        return [sample(keys[i], leaf, shardings[i]) for i, leaf in enumerate(leaves)]
    shapes = [leaves[i].shape for i in together]

    def at_once(keys):
        if sampler is signs:
            return random.sample_leaves_signs(keys, shapes)
        return random.sample_leaves(keys, shapes, TRANSFORMS[sampler])

    def one_by_one(keys):
        return [sample(keys[n], leaves[i], None) for n, i in enumerate(together)]

    values = platforms.choose(at_once, one_by_one, keys[np.array(together, int)])
    found = dict(zip(together, values, strict=True))
    return [
        found[i] if i in found else sample(keys[i], leaf, None)
        for i, leaf in enumerate(leaves)
    ]


def _drawn_together(sampler, keys, leaves):
    """The indices of leaves that are drawn in one go on CPU."""
    if not leaves or not random.can_sample_leaves(keys):
        return []
    if sampler is signs:
        return list(range(len(leaves)))
    if sampler not in TRANSFORMS:
        return []
    return [i for i, leaf in enumerate(leaves) if leaf.size <= random.SMALL]


TRANSFORMS = {
    normal: random.to_normal,
    uniform: random.to_uniform,
    irwin_hall: random.to_irwin_hall,
    laplace: random.to_laplace,
}


def _accepts_out_sharding(sampler):
    try:
        return "out_sharding" in inspect.signature(sampler).parameters
    except ValueError:
        return False
