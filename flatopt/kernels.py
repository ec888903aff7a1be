"""Kernels: which noise is added to the parameters.

A kernel is a function ``kernel(key, params) -> perturbation``. The perturbation
has the tree, shapes and shardings of ``params``; it is float32, symmetric, has
mean zero and unit scale: the ``scale`` of the smoothing multiplies it.

A sampler draws one array of independent values of mean 0 and variance 1; it has
the form of ``jax.random.normal``: ``sampler(key, shape, dtype)``.

The noise of a leaf depends on the key and on the leaf's path alone: another leaf
beside it, another sharding or another number of devices changes nothing.
"""

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import _random

Sampler = Callable[..., jax.Array]
FilterAxes = int | tuple[int, ...] | Callable[[str, jax.Array], Any] | Any


class Kernel:
    """A kernel in two steps: what one step of training shares, then each draw.

    ``kernel(key, params)`` is one perturbation. ``kernel.bind(key, params)`` does
    the work that all draws at the same parameters share (filter norms, say) and
    returns ``draw(key) -> perturbation``. Any plain function
    ``(key, params) -> perturbation`` serves as a kernel too.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.Kernel(
      ...     lambda key, params: lambda key: jax.tree.map(jnp.ones_like, params))
      >>> kernel(jax.random.key(0), {"w": jnp.zeros(2)})
      {'w': Array([1., 1.], dtype=float32)}
    """

    def __init__(self, bind):
        self.bind = bind

    def __call__(self, key, params):
        return self.bind(key, params)(key)


def bind(kernel, key, params):
    """Return ``draw(key) -> perturbation`` of any kernel at these parameters.

    The noise is constant with respect to ``params``, and checked to have their
    structure and shapes.
    """
    params = jax.lax.stop_gradient(params)
    if isinstance(kernel, Kernel):
        inner = kernel.bind(key, params)
    else:

        def inner(key):
            return kernel(key, params)

    def draw(key):
        noise = inner(key)
        if jax.tree.structure(noise) != jax.tree.structure(params):
            raise ValueError(
                "kernel must return a perturbation of the tree structure of params, "
                f"got {jax.tree.structure(noise)}; return one array for each leaf of "
                f"{jax.tree.structure(params)}."
            )
        for (path, leaf), value in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(noise),
            strict=True,
        ):
            if jnp.shape(value) != jnp.shape(leaf):
                raise ValueError(
                    f"kernel returned shape {jnp.shape(value)} for the leaf "
                    f"{path_name(path)!r} of shape {jnp.shape(leaf)}; return noise of "
                    "the leaf's own shape."
                )
        return jax.lax.stop_gradient(noise)

    return draw


def path_name(path):
    """Name a leaf: its keys joined by ``/``, without a trailing attribute ``.value``.

    Flax NNX spells the same parameter with and without it.

    Example:
      >>> import jax
      >>> tree = {"dense": {"kernel": 0.0}}
      >>> path, leaf = jax.tree_util.tree_leaves_with_path(tree)[0]
      >>> path_name(path)
      'dense/kernel'
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _path_hashes(params):
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), "<u4").reshape(len(names), 2)


def _leaf_keys(key, hashes):
    fold = jax.random.fold_in
    return jax.vmap(lambda word: fold(fold(key, word[0]), word[1]))(hashes)


def _explicit_sharding(leaf):
    """The leaf's sharding where it is part of its type (Explicit mesh), else None."""
    sharding = jax.typeof(leaf).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def _accepts_out_sharding(sampler):
    try:
        return "out_sharding" in inspect.signature(sampler).parameters
    except ValueError:
        return False


def _leafwise(sampler, deviation=None):
    """The kernel of independent ``sampler`` values times ``deviation(path, leaf)``."""
    accepts_out_sharding = _accepts_out_sharding(sampler)

    def bind(key, params):
        del key
        named = jax.tree_util.tree_leaves_with_path(params)
        leaves = [jnp.asarray(leaf) for _, leaf in named]
        deviations = [1.0] * len(leaves)
        if deviation is not None:
            deviations = [
                deviation(path_name(path), leaf)
                for (path, _), leaf in zip(named, leaves, strict=True)
            ]
        hashes = _path_hashes(params)

        def draw(key):
            noise = []
            if leaves:
                keys = _leaf_keys(key, hashes)
            for i, (leaf, std) in enumerate(zip(leaves, deviations, strict=True)):
                options = {}
                if accepts_out_sharding:
                    options["out_sharding"] = _explicit_sharding(leaf)
                unit = sampler(keys[i], leaf.shape, jnp.float32, **options)
                noise.append(unit * std)
            return jax.tree.unflatten(jax.tree.structure(params), noise)

        return draw

    return Kernel(bind)


def normal(key, shape, dtype=jnp.float32, *, out_sharding=None) -> jax.Array:
    """Standard normal values: those of ``jax.random.normal``, drawn faster.

    The values are computed in float32 whatever ``dtype`` (a bfloat16 draw of
    ``jax.random.normal`` never exceeds 2.9). The generator is written so that XLA fuses
    it with what uses the noise; on CPU this is several times faster and needs no
    temporary memory.

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
    values = _open_interval(key, shape, out_sharding)
    return (jnp.float32(2**0.5) * jax.lax.erf_inv(values)).astype(dtype)


def signs(key, shape, dtype=jnp.float32, *, out_sharding=None) -> jax.Array:
    """Random signs (Rademacher), unpacked from one random bit a value.

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
      Array([-1., -1., -1.,  1.,  1., -1.], dtype=float32)
    """
    *leading, last = shape or (1,)
    packed = None if out_sharding is None else _packed_sharding(out_sharding, shape)
    words = _random.bits(key, (*leading, -(-last // 32)), out_sharding=packed)
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
    values = _open_interval(key, shape, out_sharding)
    return (jnp.float32(3**0.5) * values).astype(dtype)


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
    values = _open_interval(key, shape, out_sharding)
    size = -jnp.log1p(-jnp.abs(values)) / jnp.float32(2**0.5)
    return (jnp.sign(values) * size).astype(dtype)


def _open_interval(key, shape, out_sharding):
    words = _random.bits(key, shape, out_sharding=out_sharding)
    return _random.open_interval(words)


def isotropic(sampler: Sampler = normal) -> Kernel:
    """Independent noise of unit variance for every parameter (the kernel of NSO).

    Args:
      sampler: values of mean 0 and variance 1, in the form of
        ``jax.random.normal``. Default: standard normal.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    References:
      Zhang, Li, Ju, `Noise Stability Optimization for Finding Flat Minima
      <https://arxiv.org/abs/2306.08553>`_, 2024, Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.isotropic(flatopt.kernels.signs)
      >>> noise = kernel(jax.random.key(0), {"w": jnp.zeros((2, 3))})
      >>> noise["w"].shape, bool(jnp.all(jnp.abs(noise["w"]) == 1))
      ((2, 3), True)
    """
    return _leafwise(sampler)


def filterwise(
    sampler: Sampler = normal, *, filter_axes: FilterAxes = None
) -> Kernel:
    r"""Noise in proportion to the norm of each filter (the kernel of LPF-SGD).

    Every element of filter :math:`\theta_f` gets noise of standard deviation
    :math:`\|\theta_f\|_2`, the norm over the whole filter at the present
    parameters. A leaf with at most one axis is one filter. No leaf is skipped.

    Args:
      sampler: values of mean 0 and variance 1. Default: standard normal.
      filter_axes: the axes of a leaf that index its filters: an int; a tuple of
        ints (``()``: the whole leaf is one filter); a function
        ``(path, leaf) -> axes`` of the path as a string such as
        ``"dense/kernel"``; or a tree of ints and tuples with the paths of
        ``params``. Default: the last axis, as in Flax, but the first for a leaf
        named ``embedding``. PyTorch layouts: 0.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Raises:
      ValueError: when drawn, if ``filter_axes`` names an axis that a leaf does
        not have, or a tree lacks the path of a leaf.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 5; as in the
      authors' code the scale multiplies the standard deviation.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.filterwise(flatopt.kernels.signs)
      >>> noise = kernel(jax.random.key(0), {"w": jnp.array([[3.0, 0.0], [4.0, 1.0]])})
      >>> jnp.abs(noise["w"])  # the columns have norms 5 and 1
      Array([[5., 1.],
             [5., 1.]], dtype=float32)
    """
    axes_of = _filter_axes_function(filter_axes)

    def deviation(path, leaf):
        axes = _check_axes(axes_of(path, leaf), path, leaf)
        others = tuple(a for a in range(leaf.ndim) if a not in axes)
        square = jnp.square(leaf.astype(jnp.float32))
        return jnp.sqrt(jnp.sum(square, axis=others, keepdims=True))

    return _leafwise(sampler, deviation)


def elementwise(sampler: Sampler = normal) -> Kernel:
    r"""Noise of standard deviation :math:`|\theta_i|` for element i.

    Args:
      sampler: values of mean 0 and variance 1. Default: standard normal.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.elementwise(flatopt.kernels.signs)
      >>> jnp.abs(kernel(jax.random.key(0), jnp.array([0.0, -2.0, 3.0])))
      Array([0., 2., 3.], dtype=float32)
    """
    return _leafwise(sampler, lambda path, leaf: jnp.abs(leaf.astype(jnp.float32)))


def masked(kernel: Kernel, mask: Any) -> Kernel:
    """No noise where the mask says False.

    Args:
      kernel: the kernel to mask.
      mask: a tree prefix of ``params`` made of bools, or a function of ``params``
        that returns one, as in ``optax.masked``.

    Returns:
      A kernel whose perturbation is zero for the leaves masked out.

    Raises:
      ValueError: when drawn, if ``mask`` is not a prefix of ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.masked(
      ...     flatopt.kernels.isotropic(), {"w": True, "b": False})
      >>> kernel(jax.random.key(0), {"w": jnp.ones(2), "b": jnp.ones(2)})["b"]
      Array([0., 0.], dtype=float32)
    """

    def masked_bind(key, params):
        flags = jax.tree.unflatten(jax.tree.structure(params), mask_flags(mask, params))
        inner = bind(kernel, key, params)

        def draw(key):
            return jax.tree.map(
                lambda flag, noise: noise if flag else jnp.zeros_like(noise),
                flags,
                inner(key),
            )

        return draw

    return Kernel(masked_bind)


def mask_flags(mask, params):
    """One bool for each leaf of ``params`` from a mask as in ``optax.masked``."""
    given = mask(params) if callable(mask) else mask
    try:
        flags = jax.tree.leaves(
            jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), given, params)
        )
    except ValueError as error:
        raise ValueError(
            f"mask must be a tree prefix of params, got {jax.tree.structure(given)} for "
            f"params {jax.tree.structure(params)}; give one bool for each leaf or subtree."
        ) from error
    for flag in flags:
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"mask must be made of Python bools, got {flag!r}; write True where the "
                "leaf takes part and False where it does not."
            )
    return [bool(flag) for flag in flags]


def default_filter_axes(path: str, leaf: jax.Array) -> int:
    """The axis that indexes filters in Flax layouts: last, or first for embeddings.

    Example:
      >>> import jax.numpy as jnp
      >>> default_filter_axes("dense/kernel", jnp.ones((3, 4)))
      -1
      >>> default_filter_axes("embed/embedding", jnp.ones((3, 4)))
      0
    """
    del leaf
    return 0 if path.split("/")[-1] == "embedding" else -1


def _is_axes(value):
    return isinstance(value, int) or (
        isinstance(value, tuple) and all(isinstance(a, int) for a in value)
    )


def _filter_axes_function(filter_axes):
    if filter_axes is None:
        return default_filter_axes
    if _is_axes(filter_axes):
        return lambda path, leaf: filter_axes
    if callable(filter_axes):
        return filter_axes
    by_path = {
        path_name(path): axes
        for path, axes in jax.tree_util.tree_leaves_with_path(
            filter_axes, is_leaf=_is_axes
        )
    }

    def from_tree(path, leaf):
        if path not in by_path:
            raise ValueError(
                f"filter_axes has no entry for the leaf {path!r} of shape {leaf.shape}; "
                f"it names {sorted(by_path)}, so give a tree with the paths of params."
            )
        return by_path[path]

    return from_tree


def _check_axes(axes, path, leaf):
    if not _is_axes(axes) or isinstance(axes, bool):
        raise ValueError(
            f"filter_axes must give an int or a tuple of ints, got {axes!r} for the leaf "
            f"{path!r}."
        )
    if leaf.ndim <= 1:
        return ()
    axes = (axes,) if isinstance(axes, int) else axes
    if any(not -leaf.ndim <= a < leaf.ndim for a in axes):
        raise ValueError(
            f"filter_axes names axis {axes} for the leaf {path!r} of shape {leaf.shape}; "
            f"give axes between {-leaf.ndim} and {leaf.ndim - 1}."
        )
    return tuple(a % leaf.ndim for a in axes)
