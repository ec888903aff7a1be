"""Passes over data: one batch, or a re-iterable of batches of any sizes."""

import jax
import jax.numpy as jnp
import numpy as np

try:
    import tqdm
except ImportError:  # a progress bar is a comfort, not a need
    tqdm = None


class Stream:
    """A re-iterable of batches; equal where it is the same object."""

    def __init__(self, batches):
        self.batches = batches

    def __eq__(self, other):
        return isinstance(other, Stream) and self.batches is other.batches

    def __hash__(self):
        return id(self.batches)


def check_same(seen, found):
    """Reject data that changed since the last pass with the same parameters.

    Both are ``(batches, weight, loss)``; ``seen`` is None on the first pass.
    """
    if not np.isfinite(found[2]):
        raise ValueError(
            f"the curvature is not finite, since the loss over all data is {found[2]}; look "
            "at the loss at these parameters first."
        )
    if seen is None:
        return
    if seen[:2] != found[:2] or not np.isclose(seen[2], found[2], rtol=1e-4):
        raise ValueError(
            "data must be the same on every pass, got "
            f"{seen[0]} batches of weight {seen[1]:g} and loss {seen[2]:g}, then "
            f"{found[0]} of {found[1]:g} and {found[2]:g}; switch off shuffling with "
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
    if iter(data) is data:
        raise TypeError(
            f"data must be a batch or a re-iterable of batches, got the iterator {data!r}, "
            "which ends after one pass; give the loader itself, or list(data)."
        )
    return None, Stream(data)


def passes(stream, weight_fn, description):
    """Yield ``(batch, weight)``, with a progress bar on long passes."""
    batches = stream.batches
    if tqdm is not None:
        batches = tqdm.tqdm(batches, desc=description, delay=3, leave=False)
    for batch in batches:
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
