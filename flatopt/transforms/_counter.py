"""How many gradients of single examples a training run evaluates."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core.types import Params


class GradientCounter:
    """A loss that counts the gradients of single examples taken of it, as they run.

    Methods differ in what a step costs: SAM and NSO take two gradients of the batch,
    LPF-SGD one of each chunk. Train with this in place of the loss to compare at equal
    budgets; whatever takes gradients of it is counted, in loops, branches and under
    ``jax.vmap`` too. For the cost of a method count a few steps: every gradient calls back
    to the host. Not for forward mode (Hessian products).

    Attributes:
      value_fn: ``value_fn(params, ...)``, the mean loss.
      count: gradients of single examples so far: the sum of the leading axes of the
        batches. Arrays of ``batch_argnames``, or all arrays of one axis or more, must agree
        in it; a loss without such arguments counts as one example.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> loss = flatopt.GradientCounter(lambda p, batch: jnp.mean((batch - p) ** 2))
      >>> tx = flatopt.nso_sgd(0.1)
      >>> params, batch = jnp.zeros(()), jnp.ones(8)
      >>> _ = tx.update(None, tx.init(params), params, value_fn=loss, batch=batch)
      >>> loss.count
      16
    """

    def __init__(
        self, value_fn: Callable[..., jax.Array], batch_argnames: tuple[str, ...] = ()
    ):
        self.value_fn = value_fn
        self.batch_argnames = batch_argnames
        self.__signature__ = inspect.signature(value_fn)
        self._count = 0

    @property
    def count(self) -> int:
        """Gradients of single examples so far, when all that was dispatched has run."""
        jax.effects_barrier()
        return self._count

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> jax.Array:
        """The value, of parameters whose gradients are counted."""
        size = self._num_examples(params, args, kwargs)
        return self.value_fn(_counted(params, size, self._add), *args, **kwargs)

    def _add(self, size, _):
        self._count += size

    def _num_examples(self, params, args, kwargs):
        given = dict(self.__signature__.bind(params, *args, **kwargs).arguments)
        given |= kwargs
        names = self.batch_argnames or [*given][1:]
        leaves = jax.tree.leaves([given[name] for name in names if name in given])
        sizes = {x.shape[0] for x in leaves if hasattr(x, "shape") and x.ndim}
        if len(sizes) > 1:
            raise ValueError(
                f"arrays of the batch must agree in their leading axis, got {sizes}; name "
                "those of the batch in batch_argnames."
            )
        return sizes.pop() if sizes else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _counted(params, size, add):
    del size, add
    return params


def _forward(params, size, add):
    return _counted(params, size, add), None


def _backward(size, add, _, cotangents):
    # A value of each sample's own, so that samples under vmap call one by one.
    own = sum(jnp.sum(leaf, dtype="float32") for leaf in jax.tree.leaves(cotangents))
    jax.debug.callback(functools.partial(add, size), own)
    return (cotangents,)


_counted.defvjp(_forward, _backward)
