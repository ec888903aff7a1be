"""Smoothed gradients of Flax NNX models: BatchNorm, dropout, filter axes.

Needs the extra ``flatopt[flax]``. Flax Linen needs nothing of this module: its
models are functions of a parameter tree, so use :func:`flatopt.smooth_value_and_grad`
or a chain as they are (see the guide for its TrainState).
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flatopt import smoothing
from flatopt._core import signatures


def value_and_grad(
    loss_fn: Callable[..., Any],
    scale: jax.typing.ArrayLike,
    kernel: Callable[..., Any] | None = None,
    *,
    num_samples: int = 1,
    antithetic: bool = False,
    batch_argnames: tuple[str, ...] = (),
    has_aux: bool = False,
    batch_norm: Literal["perturbed", "clean"] = "perturbed",
    weight_fn: Callable[[Any], jax.Array] | None = None,
    wrt: Any = nnx.Param,
    strategy: smoothing.Strategy = "auto",
) -> Callable[..., Any]:
    """Return the smoothed loss and its gradient: the drop-in for nnx.value_and_grad.

    The model is updated in place, as by ``nnx.value_and_grad``: running statistics of
    BatchNorm as ``batch_norm`` says, all other variables (counters, say) as the first
    draw left them; sown intermediates are dropped. Each draw of noise has its own
    dropout mask, the same at +U and -U. Works eagerly and under ``nnx.jit``.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs) -> scalar``, or ``(scalar, aux)`` with
        ``has_aux``.
      scale: standard deviation of the noise in units of the kernel, >= 0; it may be
        traced.
      kernel: ``kernel(key, params) -> perturbation``. Default:
        :func:`flatopt.kernels.isotropic`.
      num_samples: number of draws.
      antithetic: evaluate each draw at +U and at -U.
      batch_argnames: keyword arguments whose leading axis is split, one chunk a draw.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``. Leaves of ``aux`` gain
        leading axes ``(num_samples,)``, or ``(num_samples, 2)`` when antithetic.
      batch_norm: where running statistics come from. ``"perturbed"``: the mean over the
        perturbed passes, at no extra cost (LPF-SGD's code). ``"clean"``: one more
        forward pass of the whole batch at the unperturbed parameters (NSO's code).
      weight_fn: weight of a chunk, see :func:`flatopt.smooth_value_and_grad`.
      wrt: filter of the variables to perturb and differentiate.
      strategy: layout of the samples, see :func:`flatopt.smooth_value_and_grad`.

    Returns:
      A function ``f(key, model, /, *args, **kwargs)`` that returns ``(loss, grads)``,
      or ``((loss, aux), grads)`` with ``has_aux``; ``grads`` is an ``nnx.State`` for
      ``optimizer.update(model, grads)``.

    Raises:
      ValueError: if ``batch_norm`` is neither of its two words.
      TypeError, ValueError: as :func:`flatopt.smooth_value_and_grad`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flatopt, flatopt.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> def loss_fn(model, batch):
      ...     return jnp.mean(model(batch) ** 2)
      >>> value_and_grad = flatopt.flax.value_and_grad(
      ...     loss_fn, 5e-4, flatopt.kernels.filterwise(), num_samples=4,
      ...     batch_argnames=("batch",))
      >>> loss, grads = value_and_grad(jax.random.key(0), model, batch=jnp.ones((8, 3)))
      >>> updates = optimizer.update(model, grads)
      >>> grads["kernel"].shape
      (3, 1)
    """
    if batch_norm not in ("perturbed", "clean"):
        raise ValueError(
            f"batch_norm must be 'perturbed' or 'clean', got {batch_norm!r}; 'perturbed' "
            "costs nothing extra."
        )

    def smoothed(key, model, /, *args, **kwargs):
        graphdef, params, rest = nnx.split(model, wrt, ...)

        def with_state(copy, *args, **kwargs):
            out = loss_fn(copy, *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            return loss, (aux, _mutable(copy))

        (loss, (aux, states)), grads = smoothing.smooth_value_and_grad(
            _value_fn(with_state, loss_fn, graphdef, params, rest),
            scale,
            kernel,
            num_samples=num_samples,
            antithetic=antithetic,
            batch_argnames=batch_argnames,
            weight_fn=weight_fn,
            has_aux=True,
            strategy=strategy,
        )(key, params, *args, **kwargs)
        after = _mean_state(states, leading=1 + antithetic)
        if batch_norm == "clean" and nnx.state(model, nnx.BatchStat):
            after = _clean_state(loss_fn, graphdef, params, rest, args, kwargs)
        _write_back(model, after)
        return ((loss, aux), grads) if has_aux else (loss, grads)

    return smoothed


def update(
    optimizer: nnx.Optimizer, model: nnx.Module, loss_fn: Callable[..., Any], **kwargs
) -> jax.Array:
    """Make one step with an optimizer whose chain holds flatopt's links.

    Builds ``value_fn`` from ``loss_fn`` and hands it to ``optimizer.update``; no
    gradient is computed but those at perturbed parameters. Each draw of noise has its
    own dropout mask, from the key in the optimizer's state; the counters of random
    streams stay as they are. If the model holds variables that a forward pass may
    change (running statistics of BatchNorm, counters), they come from one more forward
    pass at the unperturbed parameters; :func:`value_and_grad` can do without.

    Args:
      optimizer: an ``nnx.Optimizer`` made with :func:`flatopt.smooth_gradients`,
        :func:`flatopt.lpf_sgd` or another of flatopt's links in its chain.
      model: the model to update in place.
      loss_fn: ``loss_fn(model, **kwargs) -> scalar``.
      **kwargs: arguments of ``loss_fn``, such as ``batch``, and extra arguments of
        other links in the chain.

    Returns:
      The loss before the step as the link measured it, a scalar: the smoothed loss, or
      that at the clean parameters for the sharpness-aware links.

    Raises:
      ValueError: if the chain holds no link of flatopt.

    Example:
      >>> import jax.numpy as jnp, flatopt, flatopt.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, flatopt.lpf_sgd(0.1), wrt=nnx.Param)
      >>> def loss_fn(model, batch):
      ...     return jnp.mean(model(batch) ** 2)
      >>> loss = flatopt.flax.update(optimizer, model, loss_fn, batch=jnp.ones((8, 3)))
      >>> loss.shape
      ()
    """
    if _last_value(optimizer) is None:
        raise ValueError(
            "optimizer has no link of flatopt in its chain, so value_fn would be ignored; "
            "make it with nnx.Optimizer(model, flatopt.lpf_sgd(0.1), wrt=nnx.Param)."
        )
    graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
    after = None
    if nnx.state(model, nnx.Not(nnx.Any(_FIXED, nnx.RngState))):
        given = signatures.forwarded(loss_fn, kwargs)
        after = _clean_state(loss_fn, graphdef, params, rest, (), given)
    value_fn = _value_fn(loss_fn, loss_fn, graphdef, params, rest)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer.update(model, zeros, value_fn=value_fn, **kwargs)
    if after is not None:
        _write_back(model, after)
    return _last_value(optimizer)[...]


def filter_axes(model: nnx.Module) -> dict[str, Any]:
    """The axes that index filters in each parameter of a Flax NNX model.

    A filter holds the weights of one output unit, as in the PyTorch layouts of the
    LPF-SGD paper: attention and ``LinearGeneral`` kernels have several output axes,
    embeddings index theirs first, biases and scales are one filter a layer, and layers
    stacked by ``nnx.vmap`` for ``nnx.scan`` have filters of their own in each.

    Args:
      model: an NNX model.

    Returns:
      A nested dict of tuples with the paths of ``nnx.state(model, nnx.Param)``, for
      ``flatopt.kernels.filterwise(filter_axes=...)``.

    Example:
      >>> import flatopt.flax
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(2, 6, rngs=nnx.Rngs(0))
      >>> axes = flatopt.flax.filter_axes(model)
      >>> axes["query"]["kernel"], axes["out"]["kernel"], axes["query"]["bias"]
      ((1, 2), (2,), ())
    """
    modules = dict(nnx.iter_modules(model))
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parents, name = path
        parent = modules.get(tuple(parents))
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = jax.tree.map(
            lambda leaf, parent=parent, name=name: _layer_axes(parent, name, leaf.ndim),
            variable.get_value(),
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


def _last_value(optimizer):
    for name in ("smoothed_value", "clean_value"):
        value = optax.tree.get(optimizer.opt_state, name)
        if value is not None:
            return value
    return None


def _value_fn(apply, loss_fn, graphdef, params, rest):
    """A function of parameters from one of a model, with ``loss_fn``'s signature."""
    treedef = jax.tree.structure(params)

    def value_fn(params, /, *args, sample_key, **kwargs):
        if signatures.names_keyword(loss_fn, "sample_key"):
            kwargs["sample_key"] = sample_key
        # An optimizer hands over bare arrays in place of variables.
        params = treedef.unflatten(jax.tree.leaves(params))
        streams = _fold_streams(rest, sample_key)
        return apply(nnx.merge(graphdef, params, streams, copy=True), *args, **kwargs)

    value_fn.__signature__ = _with_sample_key(loss_fn)
    return value_fn


def _with_sample_key(loss_fn):
    """The signature of ``loss_fn`` with a keyword ``sample_key``."""
    given = signatures.parameters_of(loss_fn)
    if given is None:
        given = inspect.signature(lambda params, /, **kwargs: None).parameters
    if "sample_key" in given:
        return inspect.Signature(list(given.values()))
    keyword = inspect.Parameter("sample_key", inspect.Parameter.KEYWORD_ONLY)
    variable = [p for p in given.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    others = [p for p in given.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*others, keyword, *variable])


def _fold_streams(rest, sample_key):
    """Random streams of their own for one draw of noise."""
    word = jax.random.bits(sample_key)

    def fold(variable):
        if not isinstance(variable, nnx.RngKey):
            return variable
        keys = variable[...]
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), word)
        return variable.replace(folded.reshape(keys.shape))

    return jax.tree.map(fold, rest, is_leaf=lambda x: isinstance(x, nnx.Variable))


_FIXED = nnx.Any(nnx.Param, nnx.RngKey, nnx.Intermediate)


def _mutable(model):
    """What a forward pass may change: all but parameters, keys and intermediates."""
    return nnx.state(model, nnx.Not(_FIXED))


def _clean_state(loss_fn, graphdef, params, rest, args, kwargs):
    """What one forward pass at the unperturbed parameters leaves."""
    copy = nnx.merge(graphdef, params, rest, copy=True)
    loss_fn(copy, *args, **kwargs)
    return _mutable(copy)


def _mean_state(states, leading):
    """The mean over draws of BatchNorm's statistics; of all else the first draw."""

    def mean(value):
        wide = jnp.promote_types(value.dtype, jnp.float32)
        return value.astype(wide).mean(axis=tuple(range(leading))).astype(value.dtype)

    def first(value):
        return value[(0,) * leading]

    def combine(variable):
        pick = mean if isinstance(variable, nnx.BatchStat) else first
        return variable.replace(jax.tree.map(pick, variable.get_value()))

    return jax.tree.map(combine, states, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _write_back(model, state):
    known = dict(nnx.to_flat_state(_mutable(model)))
    flat = [(path, v) for path, v in nnx.to_flat_state(state) if path in known]
    nnx.update(model, nnx.from_flat_state(flat))
