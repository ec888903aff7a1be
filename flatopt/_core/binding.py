"""Kernels bound to parameters: keys of leaves, checks of what a kernel returns."""

import contextlib
import contextvars
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import checks, random
from flatopt._core.trees import named_leaves, path_name


def path_hashes(params):
    names = [path for path, _ in named_leaves(params)]
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), "<u4").reshape(len(names), 2)


def leaf_keys(key, hashes):
    """One typed key a leaf: the key with the two words of its hash folded in."""
    if not len(hashes):
        return []
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    fold = random.fold_in
    return jax.vmap(lambda word: fold(fold(key, word[0]), word[1]))(hashes)


_WHOLE = contextvars.ContextVar("all parameters", default=None)


def whole_params(params):
    """All parameters of the step, where ``params`` are those of them that get noise."""
    whole = _WHOLE.get()
    return whole if whole is not None and _is_part(params, whole) else params


def _is_part(params, whole):
    """Whether every leaf stands in ``whole``: a kernel may be drawn at any tree."""
    return _shapes(params).items() <= _shapes(whole).items()


def _shapes(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): jnp.shape(leaf) for path, leaf in leaves}


@contextlib.contextmanager
def beside(whole):
    """Inside, :func:`whole_params` are these; as before where they are None."""
    token = _WHOLE.set(_WHOLE.get() if whole is None else _constant(whole))
    try:
        yield
    finally:
        _WHOLE.reset(token)


def bind(kernel, key, params, whole=None):
    """Return ``draw(key) -> perturbation`` of any kernel at these parameters.

    The noise is constant with respect to ``params``, and checked to have their
    structure and shapes. ``whole`` are the parameters that get no noise too.
    """
    checks.check_kernel(kernel)
    params = _constant(params)
    if hasattr(kernel, "bind"):
        with beside(whole):
            inner = kernel.bind(key, params)
    else:
        whole = _WHOLE.get() if whole is None else whole

        def inner(key):
            with beside(whole):
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


def _constant(params):
    """The same parameters, without derivatives; what is no array stays."""
    return jax.tree.map(
        lambda x: jax.lax.stop_gradient(x) if checks.is_numeric(x) else x, params
    )
