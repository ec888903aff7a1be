"""Draws from the posterior that IVON learned."""

from typing import Any

import jax
import jax.numpy as jnp

from flatopt import kernels
from flatopt._core import binding, checks, risk, trees, vectors
from flatopt._core.types import ParamsT
from flatopt.optimizers import _ivon
from flatopt.transforms import _read


def posterior_kernel(opt_state: Any) -> kernels.Kernel:
    r"""Return the noise of IVON's posterior as a kernel, to be used with a scale of 1.

    For losses and sharpness averaged over the posterior; for predictions see
    :func:`sample_posterior`.

    Args:
      opt_state: a state of any optimizer that holds one of :func:`ivon`.

    Returns:
      A kernel ``(key, params) -> perturbation``, normal with standard deviation
      :math:`1 / \sqrt{\lambda (h + \delta)}`; zero for leaves masked out of training.

    Raises:
      ValueError: if ``opt_state`` does not hold one state of :func:`ivon`; when drawn, if
        ``params`` have other shapes.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> params = jnp.array([3.0, 4.0])
      >>> state = flatopt.ivon(0.1, ess=100, weight_decay=0.0).init(params)
      >>> average = flatopt.smooth(
      ...     lambda p: jnp.sum(p ** 2), 1.0, flatopt.posterior_kernel(state),
      ...     num_samples=1000, antithetic=True)
      >>> round(float(average(jax.random.key(0), params)), 1)  # 25 + 2 / 100
      25.0
    """
    state = _read.one_state(opt_state, _ivon.IVONState, "flatopt.ivon")
    ess, weight_decay = (_read.array(x) for x in (state.ess, state.weight_decay))
    hess = _by_path(state)

    def bind(key, params):
        named = jax.tree_util.tree_leaves_with_path(params)
        paths = [trees.path_name(path) for path, _ in named]
        for path, (_, leaf) in zip(paths, named, strict=True):
            if path in hess and hess[path].shape != jnp.shape(leaf):
                raise ValueError(
                    f"params must be those of opt_state, got shape {jnp.shape(leaf)} at "
                    f"{path!r} for a posterior of shape {hess[path].shape}; give the "
                    "parameters that were trained with it."
                )
        flags = [path in hess for path in paths]
        if not any(flags):
            raise ValueError(
                f"params must be those of opt_state, got leaves at {paths} for a posterior "
                f"of {sorted(hess)}; give the parameters that were trained with it."
            )
        free = trees.select(params, flags)
        deviations = _ivon._deviations(
            jax.tree.unflatten(
                jax.tree.structure(free), [hess[p] for p in paths if p in hess]
            ),
            ess,
            weight_decay,
        )
        units = binding.bind(kernels.isotropic(), key, free)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), params
        )

        def draw(key):
            noise = jax.tree.map(
                lambda z, d: z.astype(d.dtype) * d, units(key), deviations
            )
            return trees.merge(noise, zeros, flags)

        return draw

    return kernels.Kernel(bind)


def _by_path(state):
    named = jax.tree_util.tree_leaves_with_path(state.hess)
    return {trees.path_name(path): _read.array(leaf) for path, leaf in named}


def sample_posterior(key: jax.Array, params: ParamsT, opt_state: Any) -> ParamsT:
    """Draw parameters from the posterior that :func:`ivon` learned.

    Average predictions, not parameters, over draws: that is what makes them uncertain.

    Args:
      key: a JAX random key.
      params: the parameters that were trained, the mean of the posterior.
      opt_state: a state of any optimizer that holds one of :func:`ivon`.

    Returns:
      Parameters like ``params``; leaves masked out of training are the same.

    Raises:
      TypeError: if ``key`` is no random key.
      ValueError: as :func:`posterior_kernel`.

    References:
      Shen, Daheim, Cong, Nickl, Marconi, Bazan, Yokota, Gurevych, Cremers, Khan,
      Möllenhoff, `Variational Learning is Effective for Large Deep Networks
      <https://arxiv.org/abs/2402.17641>`_, ICML 2024.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> params = {"w": jnp.ones(2)}
      >>> state = flatopt.ivon(0.1, ess=1e4).init(params)
      >>> keys = jax.random.split(jax.random.key(0), 100)
      >>> predict = lambda key: jax.nn.sigmoid(
      ...     flatopt.sample_posterior(key, params, state)["w"].sum())
      >>> predictions = jax.vmap(predict)(keys)
      >>> round(float(predictions.mean()), 2), bool(predictions.std() > 0)
      (0.88, True)
    """
    checks.check_random_key(key)
    params = risk.check_params(params)
    noise = posterior_kernel(opt_state)(key, params)
    free = _by_path(_read.one_state(opt_state, _ivon.IVONState, "flatopt.ivon"))

    def move(path, leaf, unit):
        is_free = trees.path_name(path) in free
        return vectors.move(jnp.asarray(leaf), unit) if is_free else leaf

    return jax.tree_util.tree_map_with_path(move, params, noise)
