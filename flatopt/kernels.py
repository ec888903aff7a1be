"""Kernels: which noise is added to the parameters.

A kernel is a function ``kernel(key, params) -> perturbation``. The perturbation
has the tree, shapes and shardings of ``params``; it is float32, symmetric, has
mean zero and unit scale: the ``scale`` of the smoothing multiplies it.

A sampler draws one array of independent values of mean 0 and variance 1; it has
the form of ``jax.random.normal``: ``sampler(key, shape, dtype)``.

The noise of a leaf depends on the key and on the leaf's path alone: another leaf
beside it, another sharding or another number of devices changes nothing.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import binding, checks, filters, random, sharding, trees

Sampler = Callable[..., jax.Array]
FilterAxes = filters.FilterAxes


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

    def __call__(self, key, params=None):
        if params is None:
            raise TypeError(
                "a kernel needs a key and params, got one argument; under "
                "optax.inject_hyperparams, which takes functions for schedules, write "
                "static_args=('kernel',)."
            )
        return self.bind(key, params)(key)


def _accepts_out_sharding(sampler):
    try:
        return "out_sharding" in inspect.signature(sampler).parameters
    except ValueError:
        return False


def _leafwise(sampler, deviation=None):
    """The kernel of independent ``sampler`` values times a deviation.

    ``deviation(params)`` returns a function of the path of a leaf and the leaf.
    """
    checks.check_sampler(sampler)

    def bind(key, params):
        del key
        named = jax.tree_util.tree_leaves_with_path(params)
        leaves = [jnp.asarray(leaf) for _, leaf in named]
        deviations = [1.0] * len(leaves)
        if deviation is not None:
            deviation_of = deviation(params)
            deviations = [
                deviation_of(trees.path_name(path), leaf).astype(jnp.float32)
                for (path, _), leaf in zip(named, leaves, strict=True)
            ]
        hashes = binding.path_hashes(params)

        def draw(key):
            units = _sample_leaves(sampler, binding.leaf_keys(key, hashes), leaves)
            noise = [u * std for u, std in zip(units, deviations, strict=True)]
            return jax.tree.unflatten(jax.tree.structure(params), noise)

        return draw

    return Kernel(bind)


def _sample_leaves(sampler, keys, leaves):
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
    sampler: Sampler = normal,
    *,
    filter_axes: FilterAxes = None,
    norms_of: Callable[[Any], Any] | None = None,
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
        ``"dense/kernel"``; or a tree with an int or a tuple for each leaf, at
        the paths of ``params``. A tuple of ints is always the axes of one leaf, or
        of all: for ``params`` that are a tuple, give a list. Default: Flax's layouts.
        That is the last axis, but the first for a leaf named ``embedding``; beside a
        kernel, its bias tells whether the kernel has several output axes (attention)
        or stacked layers; in :mod:`flatopt.flax` the model tells. PyTorch layouts: 0.
      norms_of: a function of all parameters that returns arrays whose filter norms are
        used instead of those of the leaves, at the paths of the leaves that get noise
        and in their shapes. For noise on a frozen weight in proportion to what it makes
        with its adapters. Default: the parameters themselves.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Raises:
      ValueError: when drawn, if ``filter_axes`` names an axis that a leaf does
        not have, a tree lacks the path of a leaf, or ``norms_of`` returns another shape.

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
    if norms_of is not None and not callable(norms_of):
        raise TypeError(
            f"norms_of must be a function of the parameters, got {norms_of!r}; return "
            "arrays at the paths of the leaves that get noise."
        )

    def deviation(params):
        if norms_of is None:
            return filters.filter_norm(filter_axes, params)
        return filters.norm_of_other(
            filter_axes, norms_of(binding.whole_params(params))
        )

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
    return _leafwise(sampler, lambda params: lambda path, leaf: jnp.abs(leaf))


def shared_magnitude(kernel: Kernel) -> Kernel:
    r"""One draw of ``kernel`` a step; each sample gives it fresh random signs.

    Signs cost one random bit a value, so that M samples cost little more than one draw
    of ``kernel``. For a kernel of symmetric noise every sample is distributed exactly as
    a draw of ``kernel``, and samples of one step are uncorrelated: the Monte Carlo
    gradient has the mean of independent draws, and their variance to leading order in
    the scale. Samples of one step are not independent: they share magnitudes.

    Args:
      kernel: a kernel of noise that is symmetric in each element, such as
        :func:`filterwise` or :func:`isotropic`.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.shared_magnitude(flatopt.kernels.isotropic())
      >>> draw = kernel.bind(jax.random.key(0), jnp.zeros(64))
      >>> first, second = draw(jax.random.key(1)), draw(jax.random.key(2))
      >>> bool((abs(first) == abs(second)).all()), bool((first == second).all())
      (True, False)
    """
    checks.check_kernel(kernel)

    def shared_bind(key, params):
        # Samples fold in their index, which stays below this number.
        step_key = random.fold_in(key, 2**31 - 1)
        magnitude = binding.bind(kernel, key, params)(step_key)
        magnitude = jax.lax.optimization_barrier(magnitude)
        leaves, treedef = jax.tree.flatten(magnitude)
        hashes = binding.path_hashes(params)

        def draw(key):
            units = _sample_leaves(signs, binding.leaf_keys(key, hashes), leaves)
            return treedef.unflatten(
                [unit * leaf for unit, leaf in zip(units, leaves, strict=True)]
            )

        return draw

    return Kernel(shared_bind)


def one_layer(kernel: Kernel, layer_of: Callable[[str], str] | None = None) -> Kernel:
    r"""Noise in one layer at a time, drawn at random; none in the others.

    With L layers drawn uniformly, the penalty on the trace of the Hessian is 1/L of that
    of ``kernel``, layer by layer; what is gone are the effects between layers, which grow
    with width.

    Args:
      kernel: the kernel of the noise.
      layer_of: the name of the layer of a leaf, from the leaf's path as a string such as
        ``"dense/kernel"``. Default: all but the last part of the path, so that a kernel
        and its bias are one layer.

    Returns:
      A kernel ``(key, params) -> perturbation``.

    References:
      Orvieto, Raj, Kersting, Bach, `Explicit Regularization in Overparametrized Models via
      Noise Injection <https://arxiv.org/abs/2206.04613>`_, AISTATS 2023.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> kernel = flatopt.kernels.one_layer(flatopt.kernels.isotropic())
      >>> params = {"a": {"w": jnp.zeros(3)}, "b": {"w": jnp.zeros(3)}}
      >>> noise = kernel(jax.random.key(0), params)
      >>> [bool((leaf != 0).all()) for leaf in jax.tree.leaves(noise)]
      [False, True]
    """
    checks.check_kernel(kernel)
    if layer_of is not None:
        checks.check_function(
            layer_of, "layer_of", "lambda path: path.split('/')[0]", count=1
        )

    def layer(path):
        name = trees.path_name(path)
        return name.rpartition("/")[0] if layer_of is None else layer_of(name)

    def one_layer_bind(key, params):
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        names = [layer(path) for path, _ in paths]
        order = {name: i for i, name in enumerate(sorted(set(names)))}
        indices = treedef.unflatten([order[name] for name in names])
        inner = binding.bind(kernel, key, params)

        def draw(key):
            choice_key = random.fold_in(key, 2**31 - 2)
            chosen = jax.random.randint(choice_key, (), 0, max(len(order), 1))
            return jax.tree.map(
                lambda index, noise: jnp.where(index == chosen, noise, 0),
                indices,
                inner(key),
            )

        return draw

    return Kernel(one_layer_bind)


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
    checks.check_kernel(kernel)

    def masked_bind(key, params):
        flags = jax.tree.unflatten(
            jax.tree.structure(params), trees.mask_flags(mask, params)
        )
        inner = binding.bind(kernel, key, params)

        def draw(key):
            return jax.tree.map(
                lambda flag, noise: noise if flag else jnp.zeros_like(noise),
                flags,
                inner(key),
            )

        return draw

    return Kernel(masked_bind)
