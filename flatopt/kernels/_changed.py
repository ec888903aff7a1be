"""Kernels made of a kernel: magnitudes shared, one layer at a time, masked."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flatopt._core import binding, checks, random, trees
from flatopt._core.types import Mask
from flatopt.kernels._kernel import Kernel
from flatopt.kernels._samplers import sample_leaves, signs


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
            units = sample_leaves(signs, binding.leaf_keys(key, hashes), leaves)
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


def masked(kernel: Kernel, mask: Mask) -> Kernel:
    """No noise where the mask says False.

    Args:
      kernel: the kernel to mask.
      mask: a tree prefix of ``params`` made of bools, a function of ``params`` that
        returns one, as in ``optax.masked``, or a pattern of paths such as
        ``"encoder/*/kernel"``.

    Returns:
      A kernel whose perturbation is zero for the leaves masked out.

    Raises:
      ValueError: when drawn, if ``mask`` is not a prefix of ``params`` or leaves out every
        leaf.

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
