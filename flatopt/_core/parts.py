"""A part of the parameters: leaves that are measured, the others and constants beside."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt._core import checks, trees


class Beside(NamedTuple):
    """A batch with what goes to the loss beside it.

    So what is not differentiated stays an argument of compiled code, and new values
    compile nothing.
    """

    batch: Any
    whole: Any  # all parameters; their measured leaves are not looked at
    constants: Any


class Part(NamedTuple):
    """Which leaves are measured, from :func:`choose`.

    Attributes:
      params: the measured leaves, None in place of the others.
      rest: all parameters and the constants; None where all is measured and no constants.
      wrap: turns a function of all parameters, a batch and constants into one of the
        measured leaves and a :class:`Beside`.
    """

    params: Any
    rest: Any
    wrap: Callable[[Callable], Callable]


@dataclasses.dataclass(frozen=True)
class OfPart:
    """A function of all parameters as one of a part of them; hashable."""

    function: Callable
    flags: tuple[bool, ...]
    with_constants: bool

    def __call__(self, params, beside):
        whole = trees.merge(params, beside.whole, self.flags)
        batch = () if beside.batch is None else (beside.batch,)
        constants = (beside.constants,) if self.with_constants else ()
        return self.function(whole, *batch, *constants)


def choose(params, mask=None, constants=None):
    """The part of parameters that a mask names."""
    if mask is None and constants is None:
        return Part(params, None, lambda function: function)
    flags = [True] * len(jax.tree.leaves(params))
    if mask is not None:
        flags = trees.mask_flags(mask, params)
    rest = _arrays(params, "params"), _arrays(constants, "constants")

    def wrap(function):
        return OfPart(function, tuple(flags), constants is not None)

    return Part(trees.select(params, flags), rest, wrap)


def _arrays(tree, name):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not checks.is_numeric(leaf):
            raise TypeError(
                f"{name} must be arrays, got {leaf!r} at {trees.path_name(path)!r}; "
                "close over what is not an array."
            )
    return jax.tree.map(jnp.asarray, tree)


def batch_of(batch):
    """The batch alone."""
    return batch.batch if isinstance(batch, Beside) else batch


def replaced(batch, new):
    """Another batch, with the same beside it."""
    return batch._replace(batch=new) if isinstance(batch, Beside) else new


def whole_of(batch):
    """All parameters, where a part of them is measured; else None."""
    return batch.whole if isinstance(batch, Beside) else None
