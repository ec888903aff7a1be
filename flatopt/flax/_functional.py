"""NNX models as functions of their parameters, for the analysis."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from flatopt._core.types import LossFn
from flatopt.flax import _passes


def functional(
    model: nnx.Module, loss_fn: LossFn, *, wrt: Any = nnx.Param
) -> tuple[dict[str, Any], Callable[..., jax.Array]]:
    """The parameters of an NNX model and its loss as a function of them.

    For :mod:`flatopt.curvature` and :mod:`flatopt.sharpness`, which take a ``loss_fn``
    of a tree of parameters. All other variables (running statistics, random streams) are
    constants with the values of now, and the model stays as it is. Call ``model.eval()``
    before, so that BatchNorm uses its running statistics and dropout is off.

    Args:
      model: an NNX model.
      loss_fn: ``loss_fn(model, *args, **kwargs) -> scalar``.
      wrt: filter of the variables that are parameters.

    Returns:
      ``(params, value_fn)``: a nested dict of arrays, and
      ``value_fn(params, *args, **kwargs) -> scalar``.

    Raises:
      ValueError: if ``wrt`` names no variable of the model.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt, flatopt.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> def loss_fn(model, batch):
      ...     return jnp.mean(model(batch) ** 2)
      >>> params, value_fn = flatopt.flax.functional(model, loss_fn)
      >>> hessian = flatopt.curvature.hessian(value_fn, params, jnp.eye(2))
      >>> hessian.dense()
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    source = _passes.Pass(loss_fn, model, (), wrt)
    like = source.params

    def value_fn(params, /, *args, **kwargs):
        state = nnx.clone(like)
        nnx.replace_by_pure_dict(state, params)
        return source.run(state, source.rest, args, kwargs)[0]

    return nnx.to_pure_dict(like), value_fn
