"""Running statistics of BatchNorm from data, for parameters that were not trained with it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def update_batch_stats(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    apply_fn: Callable[[Any, Any], Any] | None = None,
) -> None:
    r"""Recompute the running statistics of BatchNorm in one pass over data.

    After averaging parameters (a moving average, a mean of checkpoints, a merge of models)
    the statistics are those of other parameters. This sets them, in place, to the mean and
    variance of each layer's inputs over all examples, whatever the batches; each batch is
    normalized by its own statistics, as in training. Nothing else changes.

    BatchNorm is in its training mode meanwhile, all other layers in the mode that they are
    in: call ``model.eval()`` before, so that dropout is off. The statistics are gathered in
    float32 or wider; there is one compilation for each shape of a batch.

    Args:
      model: an NNX model with ``nnx.BatchNorm``, updated in place.
      batches: a re-iterable or a generator of batches, whose array leaves have a leading
        axis of examples.
      apply_fn: ``apply_fn(model, batch)`` calls the model; None: ``model(batch)``. For
        batches of images and labels write ``lambda model, batch: model(batch[0])``.

    Raises:
      TypeError: if ``model`` is no NNX model or ``batches`` cannot be iterated.
      ValueError: if the model has no BatchNorm, there are no batches, or a pass leaves
        statistics as they are.

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, `Averaging Weights Leads to Wider
      Optima and Better Generalization <https://arxiv.org/abs/1803.05407>`_, UAI 2018,
      section 3.2.

    Example:
      >>> import jax.numpy as jnp, flatopt.flax
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
      >>> flatopt.flax.update_batch_stats(model, batches)
      >>> model.mean[...], model.var[...]
      (Array([4.], dtype=float32), Array([5.], dtype=float32))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module, got {type(model).__name__}; give the model "
            "itself, as in update_batch_stats(model, batches)."
        )
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"model must hold an nnx.BatchNorm, got none in a {type(model).__name__}; "
            "without one there are no running statistics to update."
        )
    gather = _gather(model, apply_fn or (lambda model, batch: model(batch)))
    total, sums = 0, None
    for batch in _iterate(batches):
        size = _num_examples(batch)
        found = jax.tree.map(lambda x, size=size: size * x, gather(batch))
        total += size
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    if sums is None:
        raise ValueError(
            "batches must hold at least one batch, got none; a generator can be used once."
        )
    for layer, (mean, square) in zip(layers, sums, strict=True):
        mean, square = mean / total, square / total
        layer.mean[...] = mean.astype(layer.mean[...].dtype)
        variance = jnp.maximum(square - jnp.square(mean), 0)
        layer.var[...] = variance.astype(layer.var[...].dtype)


def _layers(model):
    return [
        node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)
    ]


def _gather(model, apply_fn):
    """A function of a batch: the first two moments of the inputs of each BatchNorm.

    Of a copy: with a momentum of 0 the running statistics are those of the batch alone.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def moments(state, batch):
        copy = nnx.merge(graphdef, state, copy=True)
        layers = _layers(copy)
        before = []
        for layer in layers:
            layer.momentum, layer.use_running_average = 0.0, False
            layer.mean[...] = jnp.zeros_like(layer.mean[...])
            layer.var[...] = jnp.ones_like(layer.var[...])
            before.append(layer.mean[...])
        apply_fn(copy, batch)
        for layer, mean in zip(layers, before, strict=True):
            if layer.mean[...] is mean:
                raise ValueError(
                    "apply_fn must pass through every nnx.BatchNorm in training mode, got "
                    f"one of {layer.num_features} features left as it was; do not pass "
                    "use_running_average=True to it, and call the whole model."
                )
        return [_moments(layer.mean[...], layer.var[...]) for layer in layers]

    return lambda batch: moments(state, batch)


def _moments(mean, variance):
    wide = jnp.promote_types(mean.dtype, jnp.float32)
    mean, variance = mean.astype(wide), variance.astype(wide)
    return mean, variance + jnp.square(mean)


def _iterate(batches):
    try:
        return iter(batches)
    except TypeError as error:
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; give "
            "a list or a loader."
        ) from error


def _num_examples(batch):
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "ndim", 0)}
    if len(sizes) != 1:
        raise ValueError(
            "array leaves of a batch must have one leading axis of examples, got the sizes "
            f"{sorted(sizes) or 'none'}; give arrays of examples."
        )
    return sizes.pop()
