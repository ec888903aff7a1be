"""Entropy-SGD: the gradient of local entropy by an inner Langevin loop."""

import jax
import jax.numpy as jnp
import optax

from flatopt import kernels
from flatopt._core import binding, checks, layout, random, sharding, trees, vectors
from flatopt._core.types import AxisName, Key, Mask, ScalarOrSchedule
from flatopt.transforms import _link
from flatopt.transforms._states import EntropySGDState


def entropy_sgd_gradients(
    gamma: ScalarOrSchedule = 1e-4,
    num_steps: int = 20,
    inner_learning_rate: jax.typing.ArrayLike = 0.1,
    noise_scale: jax.typing.ArrayLike = 1e-4,
    decay: float = 0.75,
    *,
    batch_argnames: tuple[str, ...] = (),
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Entropy-SGD: the distance to the mean of a Langevin walk around the parameters.

    From :math:`\theta' = \mu = \theta`, ``num_steps`` times,

    .. math::
        \theta' \leftarrow \theta' - \eta' (g(\theta') + \gamma (\theta' - \theta))
            + \sqrt{\eta'}\, \epsilon\, N(0, I), \qquad
        \mu \leftarrow \beta \mu + (1 - \beta)\, \theta',

    and the gradient returned is :math:`\theta - \mu`, as in the authors' code: that of
    the negative local entropy is :math:`\gamma` times it, and a learning rate of 1 moves
    to :math:`\mu`. It is a distance, not a gradient, and the noise is that of the walk: so
    there is no ``clean_weight``, ``start_step`` or ``noise_mask``.

    Cost of a step: ``num_steps`` gradients of the batch, or 1 with ``batch_argnames``. Put
    this link first in a chain: the incoming gradients are not read, and after an optimizer
    it would ascend; :func:`chain` refuses that.

    Args:
      gamma: scope :math:`\gamma`, the pull towards the parameters: a number, a scalar
        array or a schedule of the step count (the authors': ``lambda count: 1e-4 *
        (1 + 1e-3) ** count``), >= 0.
      num_steps: number of steps of the inner loop, at least 1.
      inner_learning_rate: step size :math:`\eta'` of the inner loop, >= 0.
      noise_scale: scale :math:`\epsilon` of the Langevin noise, >= 0.
      decay: decay :math:`\beta` of the mean of the walk, in [0, 1).
      batch_argnames: names of the extra arguments whose leading axis is split, one chunk
        an inner step; none: every inner step sees the whole batch.
      mask: a tree prefix of bools, a function of ``params`` that returns one, or a
        pattern of paths such as ``"encoder/*/kernel"``. Leaves masked out do not walk;
        their update is zero.
      axis_name: axis of ``jax.shard_map``; each device then walks on its own batch, and
        the walks are averaged.
      key: an int or a JAX random key, read by ``init``.

    Returns:
      A transformation with state :class:`EntropySGDState`; its ``clean_value`` is the
      loss at the parameters, on the first chunk.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun, Zecchina,
      `Entropy-SGD: Biasing Gradient Descent into Wide Valleys
      <https://arxiv.org/abs/1611.01838>`_, ICLR 2017, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.entropy_sgd_gradients(num_steps=5), optax.sgd(1.0))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2) / 2)
      >>> bool((updates < 0).all())
      True
    """
    if not callable(gamma):
        checks.check_scale(gamma, "gamma")
    checks.check_count(num_steps, "num_steps", "it counts the steps of the inner walk")
    checks.check_scale(inner_learning_rate, "inner_learning_rate")
    checks.check_scale(noise_scale, "noise_scale")
    checks.check_decay(decay)

    def estimate(step):
        scope = _link.at_step(gamma, step.count, "gamma")
        draw = binding.bind(kernels.isotropic(), step.key, step.params)
        center = jax.tree.map(trees.widen, step.params)
        first_value = jnp.zeros((), _link.value_dtype(step.params))
        if axis_name is not None:
            first_value = sharding.tree_varying(first_value, axis_name)

        def inner_step(walk, index, chunk):
            point, mean, first_value = walk
            noise_key = random.fold_in(step.key, index)

            def value_at(params):
                params = jax.tree.map(
                    lambda x, p: x.astype(p.dtype), params, step.params
                )
                return step.value(params, noise_key, chunk)

            value, grads = jax.value_and_grad(value_at)(point)
            pull = jax.tree.map(jnp.subtract, point, center)
            drift = vectors.add(grads, scope, pull)
            point = vectors.add(point, -inner_learning_rate, drift)
            noise = jax.tree.map(lambda n, x: n.astype(x.dtype), draw(noise_key), point)
            point = vectors.add(
                point, jnp.sqrt(inner_learning_rate) * noise_scale, noise
            )
            mean = vectors.add(vectors.scale(decay, mean), 1 - decay, point)
            value = value.astype(first_value.dtype)
            return point, mean, jnp.where(index == 0, value, first_value)

        _, mean, value = layout.walk(
            inner_step, (center, center, first_value), num_steps, step.chunks
        )
        return value, jax.tree.map(jnp.subtract, center, mean), ()

    return _link.link(
        "entropy_sgd_gradients",
        EntropySGDState,
        estimate,
        mask=mask,
        key=key,
        num_chunks=num_steps,
        batch_argnames=batch_argnames,
        count_name="num_steps",
        axis_name=axis_name,
        size_at=_link.from_step(gamma, 0, "gamma"),
    )
