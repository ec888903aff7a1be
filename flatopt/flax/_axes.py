"""The axes that index filters in the layers of Flax NNX."""

from typing import Any

import jax
from flax import nnx

from flatopt.flax import _passes


def filter_axes(model: nnx.Module, *, wrt: Any = nnx.Param) -> dict[str, Any]:
    """The axes that index filters in each parameter of a Flax NNX model.

    A filter holds the weights of one output unit, as in the PyTorch layouts of the
    LPF-SGD paper: attention and ``LinearGeneral`` kernels have several output axes,
    embeddings index theirs first, biases and scales are one filter a layer, and layers
    stacked by ``nnx.vmap`` for ``nnx.scan`` have filters of their own in each.

    Args:
      model: an NNX model.
      wrt: filter of the variables that are parameters.

    Returns:
      A nested dict of tuples with the paths of ``nnx.state(model, wrt)``, for
      ``flatopt.kernels.filterwise(filter_axes=...)``.

    Example:
      >>> import flatopt.flax
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(2, 6, rngs=nnx.Rngs(0))
      >>> axes = flatopt.flax.filter_axes(model)
      >>> axes["query"]["kernel"], axes["out"]["kernel"], axes["query"]["bias"]
      ((1, 2), (2,), ())
    """
    _passes.check_model(model)
    modules = dict(nnx.iter_modules(model))
    tree: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, wrt)):
        *parents, name = path
        parent = modules.get(tuple(parents))
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = jax.tree.map(
            lambda leaf, parent=parent, name=name: _layer_axes(parent, name, leaf.ndim),
            _passes.value_of(variable),
        )
    return tree


def _layer_axes(module, name, ndim):
    own = _unstacked_axes(module, name)
    if own is None:
        axis = 0 if name == "embedding" else ndim - 1
        return (axis,) if ndim > 1 else ()
    own_ndim, axes = own
    stacked = ndim - own_ndim
    return (*range(stacked), *(stacked + axis for axis in axes))


def _unstacked_axes(module, name):
    """Number of axes and filter axes of a known layer's parameter, else None."""
    match module:
        case nnx.LinearGeneral():
            batch, inner = len(module.batch_axis), len(module.in_features)
            ndim = batch + inner + len(module.out_features)
            if name == "kernel":
                return ndim, (*range(batch), *range(batch + inner, ndim))
            if name == "bias":
                return ndim - inner, tuple(range(batch))
        case nnx.Einsum() if module.einsum_str is not None:
            inputs, outputs = module.einsum_str.replace(" ", "").split("->")
            letters = inputs.split(",")[1].replace("...", "")
            if name == "kernel":
                axes = [i for i, letter in enumerate(letters) if letter in outputs]
                return len(letters), tuple(axes)
            if name == "bias":
                return len(module.bias_shape), ()
        case nnx.Embed() if name == "embedding":
            return 2, (0,)
        case nnx.Linear() if name == "kernel":
            return 2, (1,)
        case nnx.LoRA() if name in ("lora_a", "lora_b"):
            return 2, (1,)
        case nnx.Conv() if name == "kernel":
            ndim = len(module.kernel_size) + 2
            return ndim, (ndim - 1,)
        case nnx.ConvTranspose() if name == "kernel":
            ndim = len(module.kernel_size) + 2
            return ndim, (ndim - 2 if module.transpose_kernel else ndim - 1,)
    if isinstance(module, _LAYERS_WITH_VECTORS) and name in ("bias", "scale"):
        return 1, ()
    return None


_LAYERS_WITH_VECTORS = (
    nnx.Linear,
    nnx.Conv,
    nnx.ConvTranspose,
    nnx.BatchNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
)
