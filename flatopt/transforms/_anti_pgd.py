"""Anti-correlated noise as the last link of a chain."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels
from flatopt._core import binding, checks, linear, random, trees
from flatopt._core.types import Key, Mask, ScalarOrSchedule
from flatopt.transforms import _link


class AntiPGDState(NamedTuple):
    """State of :func:`anti_pgd`: plain numeric arrays; the noise itself is not stored.

    After a step that :func:`skip_nonfinite` skips nothing advances: the noise that the
    parameters hold is still that of the last step made.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.anti_pgd(0.01).init(jnp.zeros(3)).count
      Array(0, dtype=int32)
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    noise_key: jax.Array


def anti_pgd(
    scale: ScalarOrSchedule,
    sampler: kernels.Sampler | None = None,
    *,
    mask: Mask = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Anti-correlated noise: each step adds fresh noise and takes the last one away.

    .. math:: \theta_{t+1} = \theta_t + u_t + \xi_{t+1} - \xi_t, \qquad
        \xi_t = \text{scale}(t)\, U_t, \quad \xi_0 = 0

    with :math:`u_t` the update that comes in: put this link last in a chain, after the
    learning rate. The parameters without their noise, :math:`\theta_t - \xi_t`, follow
    gradients at noisy parameters: with SGD they are those of ``smooth_gradients(scale)``.
    The loss is to be looked at without the noise: a schedule that ends at 0 leaves none.

    Nothing is stored: the last noise is drawn again from its key.

    Args:
      scale: standard deviation of the noise: a number, a scalar array, or a schedule of
        the step count, >= 0.
      sampler: values of mean 0 and variance 1; None: standard normal.
      mask: a tree prefix of bools, a function of ``params`` that returns one, or a
        pattern of paths such as ``"encoder/*/kernel"``. Leaves masked out get no noise.
      key: an int or a JAX random key, read by ``init``.

    Returns:
      A transformation with state :class:`AntiPGDState`.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Orvieto, Kersting, Proske, Bach, Lucchi, `Anticorrelated Noise Injection for
      Improved Generalization <https://arxiv.org/abs/2202.02831>`_, ICML 2022.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(
      ...     optax.sgd(0.1), flatopt.anti_pgd(lambda count: jnp.where(count < 2, 0.1, 0)))
      >>> params = jnp.array([3.0, 4.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(2), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(float(p), 4) for p in params]  # two steps of -0.1; the noise is gone
      [2.8, 3.8]
    """
    if not callable(scale):
        checks.check_scale(scale)
    _link.check_key(key)
    kernel = kernels.isotropic(kernels.normal if sampler is None else sampler)

    def init_fn(params):
        _link.check_mask(mask, params)
        return AntiPGDState(jnp.zeros((), jnp.int32), _link.key_data(key))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if linear.is_read():  # its noise adds up to a moved minimum
            return updates, state
        _check_update(updates, params)
        select, merge = _link.selection(params, mask)
        free = checks.check_params(select(params))
        stored = _link.stored_key(state, key)
        draw = binding.bind(kernel, stored, free)

        def noise(count):
            factor = _link.at_step(scale, count, "scale")
            factor = jnp.where(count == 0, 0.0, factor)
            return factor, draw(random.fold_in(stored, count))

        count = optax.safe_increment(state.count)
        (old_scale, old), (new_scale, new) = noise(state.count), noise(count)

        def add(update, old, new):
            step = new_scale.astype(new.dtype) * new - old_scale.astype(old.dtype) * old
            return (trees.widen(update) + step).astype(update.dtype)

        noisy = jax.tree.map(add, select(updates), old, new)
        return merge(noisy, updates), AntiPGDState(count, state.noise_key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_update(updates, params):
    if params is None:
        raise ValueError(
            "anti_pgd needs params, got None; call tx.update(updates, state, params)."
        )
    if jax.tree.structure(updates) != jax.tree.structure(params):
        raise ValueError(
            "anti_pgd adds noise to updates of the structure of params, got "
            f"{jax.tree.structure(updates)}; put it after the optimizer, last in the "
            "chain."
        )
