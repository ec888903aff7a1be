"""Sharpness-aware minimization that moves the network and leaves its loss in place."""

import inspect
from typing import NamedTuple

import jax
import optax

from flatopt._core import checks, signatures, trees, vectors
from flatopt._core.types import AxisName, Key, LossFn, Mask
from flatopt.transforms import _ascent, _direction, _link
from flatopt.transforms._sam import Scalar


def functional_sam_gradients(
    model_fn: LossFn,
    loss_fn: LossFn,
    rho: Scalar,
    direction: optax.GradientTransformation | None = None,
    *,
    num_microbatches: int | None = None,
    batch_argnames: tuple[str, ...] = (),
    start_step: int = 0,
    mask: Mask = None,
    axis_name: AxisName = None,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Functional SAM: the network's Jacobian at moved parameters, the loss's gradient not.

    .. math:: J_F(\theta + \epsilon)^\top\, \nabla_F\, \ell(F(\theta)), \qquad
        \epsilon = \rho\, g / \|g\|

    for a loss :math:`\ell(F(\theta))`. SAM's gradient takes both factors at
    :math:`\theta + \epsilon`; in language models it mostly changes the statistics of the
    logits, which this leaves alone. For a linear model it is the plain gradient.

    The loss is given here: ``update`` needs no ``value_fn``, and does not read one that is
    there for other links of the chain. Each of the two functions is passed those extra
    arguments of ``update`` that its signature names.

    Cost of a step: two gradients. Put this link first in a
    chain: the incoming gradients are not read, and after an optimizer it would ascend;
    :func:`chain` refuses that.

    Args:
      model_fn: ``model_fn(params, **kwargs) -> outputs``, a floating array or a tree of
        them.
      loss_fn: ``loss_fn(outputs, **kwargs) -> scalar``, the mean loss.
      rho: length of the ascent step: a number, a scalar array or a schedule, >= 0.
      direction: see :func:`sam_gradients`.
      num_microbatches, batch_argnames, start_step, mask, axis_name, key: see
        :func:`sam_gradients`.

    Returns:
      A transformation with state :class:`AdversarialState`. Under
      ``optax.inject_hyperparams`` name ``model_fn`` and ``loss_fn`` in ``static_args``.

    Raises:
      TypeError, ValueError: for wrong arguments, as :func:`smooth_gradients`.

    References:
      Singh, Mobahi, Agarwala, Dauphin, `Avoiding spurious sharpness minimization broadens
      applicability of SAM <https://arxiv.org/abs/2502.02407>`_, ICML 2025.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(
      ...     flatopt.functional_sam_gradients(
      ...         lambda params, inputs: jnp.tanh(inputs @ params),
      ...         lambda outputs, targets: jnp.mean((outputs - targets) ** 2), 0.05),
      ...     optax.sgd(0.1))
      >>> params = jnp.array([0.5, -0.5])
      >>> updates, state = tx.update(
      ...     None, tx.init(params), params, inputs=jnp.eye(2), targets=jnp.ones(2))
      >>> [round(float(u), 3) for u in updates]
      [0.043, 0.11]
    """
    checks.check_function(
        model_fn, "model_fn", "model_fn(params, inputs)", count=1, more=True
    )
    signatures.check_order(model_fn, "model_fn")
    checks.check_function(
        loss_fn, "loss_fn", "loss_fn(outputs, targets)", count=1, more=True
    )

    def given(step, key, chunk):
        return _parts(step, key, chunk, mask, model_fn, loss_fn)

    def gradients(parts, params, rho, key, memory, count):
        del key, count
        outputs, pull_back = jax.vjp(parts.outputs, params)
        value, slope = jax.value_and_grad(parts.loss)(outputs)
        grads = jax.tree.map(trees.widen, pull_back(slope)[0])
        uphill, memory = _direction.along(direction, grads, memory, params)
        moved = vectors.move(params, vectors.ascent(uphill, rho))
        _, pull_back = jax.vjp(parts.outputs, moved)
        grads = jax.tree.map(trees.widen, pull_back(slope)[0])
        return trees.widen(value), grads, memory

    _direction.check_direction(direction)
    return _ascent.adversarial(
        "functional_sam_gradients",
        rho,
        gradients,
        _ascent.Options(
            num_microbatches, batch_argnames, start_step, mask, axis_name, key
        ),
        _direction.init_memory(direction),
        is_memory_of_free=True,
        own_value_fn=_composed(model_fn, loss_fn),
        given=given,
    )


class _Parts(NamedTuple):
    """A loss of a model: outputs of the free parameters, and the loss of outputs."""

    outputs: LossFn
    loss: LossFn


def _parts(step, key, chunk, mask, model_fn, loss_fn):
    value_fn, whole = step.whole
    _, merge = _link.selection(whole, mask)
    arguments = {**step.arguments, **chunk}
    arguments |= signatures.sample_options(value_fn, key)

    def outputs(free):
        params = merge(free, whole)
        return model_fn(params, **signatures.accepted(model_fn, arguments))

    def loss(outputs):
        value = loss_fn(outputs, **signatures.accepted(loss_fn, arguments))
        return checks.check_value(value, "loss_fn")

    return _Parts(outputs, loss)


def _composed(model_fn, loss_fn):
    """The loss of the model's outputs as one function, which takes what both take."""

    def value_fn(params, **arguments):
        outputs = model_fn(params, **signatures.accepted(model_fn, arguments))
        return loss_fn(outputs, **signatures.accepted(loss_fn, arguments))

    named = {}
    for function in (model_fn, loss_fn):
        for parameter in list((signatures.parameters_of(function) or {}).values())[1:]:
            is_required = parameter.default is parameter.empty
            if signatures.names_keyword(function, parameter.name) and (
                is_required or parameter.name not in named
            ):
                named[parameter.name] = parameter.replace(kind=parameter.KEYWORD_ONLY)
    kinds = inspect.Parameter
    parameters = [kinds("params", kinds.POSITIONAL_ONLY), *named.values()]
    if any(map(signatures.takes_any_keyword, (model_fn, loss_fn))):
        parameters.append(kinds("arguments", kinds.VAR_KEYWORD))
    value_fn.__signature__ = inspect.Signature(parameters)
    return value_fn
