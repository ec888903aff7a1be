"""Passes over data: one batch, or a re-iterable of batches of any sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import progress


class Stream:
    """A re-iterable of batches; equal where it is the same object."""

    def __init__(self, batches):
        self.batches = batches

    def __eq__(self, other):
        return isinstance(other, Stream) and self.batches is other.batches

    def __hash__(self):
        return id(self.batches)


class Pass(NamedTuple):
    """What one pass over a stream saw, to be compared with the next.

    Attributes:
      batches: number of batches.
      weight: their weights together.
      loss: the mean loss.
      size: the mean magnitude of the batches' losses, which sets the rounding.
      eps: the precision of a batch's loss.
    """

    batches: int
    weight: float
    loss: float
    size: float
    eps: float


def check_finite(loss):
    """Reject a loss over all data that is not a number or infinite."""
    if not np.isfinite(loss):
        raise ValueError(
            f"the loss over all data is {loss}, so the curvature is not finite and no "
            "measure means anything; look at the loss at these parameters first."
        )


def check_same(seen, found):
    """Reject data that changed since the last pass with the same parameters.

    Another order or another split into batches changes weights and losses by rounding: of
    the magnitude of the losses, which may cancel, and of an absolute size where the data
    are fitted and the losses are themselves rounding.
    """
    check_finite(found.loss)
    if seen is None:
        return
    allowed = max(1e-4, 8 * found.eps) * max(seen.size, found.size) + found.eps
    if (
        seen.batches == found.batches
        and np.isclose(seen.weight, found.weight, rtol=1e-5)
        and abs(seen.loss - found.loss) <= allowed
    ):
        return
    raise ValueError(
        "data must be the same on every pass, got "
        f"{seen.batches} batches of weight {seen.weight:g} and loss {seen.loss:g}, then "
        f"{found.batches} of {found.weight:g} and {found.loss:g}; switch off shuffling with "
        "drop_last, random augmentation and dropout."
    )


def is_stream(data):
    """Whether data is many batches: a list, or an iterable that is no tree of arrays."""
    if isinstance(data, list):
        return True
    is_leaf = jax.tree_util.all_leaves([data])
    is_array = hasattr(data, "shape") and hasattr(data, "dtype")
    return is_leaf and not is_array and hasattr(data, "__iter__")


def prepare(data):
    """``(batch, stream)``, one of them None; both for no data."""
    if data is None:
        return None, None
    if not is_stream(data):
        batch = jax.tree.map(_array, data)
        batch_size(batch)
        return batch, None
    if isinstance(data, list):
        _check_batches(data)
    if isinstance(data, str | bytes):
        raise TypeError(
            f"data must be a batch or a re-iterable of batches, got {data!r}; give arrays, "
            "or read the file that it names."
        )
    if iter(data) is data:
        raise TypeError(
            f"data must be a batch or a re-iterable of batches, got the iterator {data!r}, "
            "which ends after one pass; give the loader itself, or list(data)."
        )
    return None, Stream(data)


def _check_batches(batches):
    """Reject no batch, and one as a list ``[inputs, targets]``, taken as two batches."""
    if not batches:
        raise ValueError("data must hold examples, got 0 batches in the list [].")
    if not all(hasattr(x, "ndim") and hasattr(x, "dtype") for x in batches):
        return
    kinds = {(x.ndim, getattr(x.dtype, "kind", str(x.dtype))) for x in batches}
    if len(kinds) > 1:
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in batches[:4])
        raise ValueError(
            f"data is a list, which is taken as many batches, got arrays of different "
            f"kinds, {shapes}; give one batch as a tuple, (inputs, targets)."
        )


def passes(stream, weight_fn, description, bar=None):
    """Yield ``(batch, weight)``, counted on a bar; without one, on a bar of its own."""
    if bar is None:
        total = len(stream.batches) if hasattr(stream.batches, "__len__") else None
        with progress.bar(None, total, description) as bar:
            yield from passes(stream, weight_fn, description, bar)
        return
    for batch in stream.batches:
        batch = jax.tree.map(_array, batch)
        size = batch_size(batch)
        weight = size if weight_fn is None else float(weight_fn(batch))
        if not np.isfinite(weight) or weight < 0:
            raise ValueError(
                f"weight_fn must return a finite number of at least 0, got {weight}; "
                "return what the mean of loss_fn divides by, such as the number of tokens."
            )
        if weight:  # the mean loss of nothing is not a number
            yield batch, weight
        bar.update()


def batch_size(batch):
    """Number of examples: the leading axis of every array."""
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if x.ndim}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"data must hold arrays with one leading axis of examples, got leading sizes "
            f"{sorted(sizes)}; give each batch as arrays of the same, nonzero length."
        )
    return sizes.pop()


def _array(leaf):
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    if array.dtype == object or array.dtype.kind in "US":
        raise TypeError(
            f"data must hold arrays, got {leaf!r}; a list is taken as a list of batches, "
            "a tuple or a dict as one batch."
        )
    return jnp.asarray(array)
