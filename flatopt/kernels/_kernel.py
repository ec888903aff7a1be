"""What a kernel is, and one of independent values."""

import jax
import jax.numpy as jnp

from flatopt._core import binding, checks, trees
from flatopt.kernels._samplers import sample_leaves


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

    def __init__(self, bind, unit=None):
        self.bind = bind
        self.unit = unit  # what a scale of 1 is; None: not one of those with a rule

    def __call__(self, key, params=None):
        if params is None:
            raise TypeError(
                "a kernel needs a key and params, got one argument; under "
                "optax.inject_hyperparams, which takes functions for schedules, write "
                "static_args=('kernel',)."
            )
        return self.bind(key, params)(key)


PARAMETER, FILTER = "parameter", "filter"  # units of the scale that have a rule of size


def leafwise(sampler, deviation=None, unit=None):
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
            units = sample_leaves(sampler, binding.leaf_keys(key, hashes), leaves)
            noise = [u * std for u, std in zip(units, deviations, strict=True)]
            return jax.tree.unflatten(jax.tree.structure(params), noise)

        return draw

    return Kernel(bind, unit)
