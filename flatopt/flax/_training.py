"""Smoothed gradients and steps of NNX models."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flatopt import smoothing
from flatopt._core import checks, filters, random, sharding, signatures
from flatopt._core.types import AxisName, KernelFn, LossFn, Strategy, WeightFn
from flatopt.flax import _axes, _changes, _passes
from flatopt.transforms._read import losses


def value_and_grad(
    loss_fn: LossFn,
    scale: jax.typing.ArrayLike,
    kernel: KernelFn | None = None,
    *,
    num_samples: int = 1,
    antithetic: bool = False,
    batch_argnames: tuple[str, ...] = (),
    has_aux: bool = False,
    batch_norm: Literal["perturbed", "clean"] = "perturbed",
    weight_fn: WeightFn | None = None,
    wrt: Any = nnx.Param,
    noise_wrt: Any = None,
    clean_weight: jax.typing.ArrayLike | None = None,
    strategy: Strategy = "auto",
    axis_name: AxisName = None,
) -> Callable[..., tuple[Any, Any]]:
    """Return the smoothed loss and its gradient: the drop-in for nnx.value_and_grad.

    The model is updated in place, as by ``nnx.value_and_grad``: running statistics of
    BatchNorm as ``batch_norm`` says, all other variables that a pass changes (counters,
    say) as the first draw left them. The variables in ``wrt`` stay as they are, and what
    a pass creates, as by ``sow``, is dropped. Each draw of noise has its own dropout mask,
    the same at +U and -U. Works eagerly and under ``nnx.jit``.

    Arguments of ``loss_fn`` may be NNX objects too: ``nnx.Rngs``, another model, metrics.
    They are updated likewise; an ``nnx.metrics.Average`` takes in every pass.

    A :func:`flatopt.kernels.filterwise` without ``filter_axes`` takes those of the model,
    :func:`filter_axes`.

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
        forward pass of the whole batch at the unperturbed parameters (NSO's code), which
        gives all other variables too.
      weight_fn: weight of a chunk, in the loss and in running statistics, see
        :func:`flatopt.smooth_value_and_grad`.
      wrt: filter of the variables to differentiate.
      noise_wrt: filter of the variables to perturb; None: those of ``wrt``. For noise on
        frozen weights with gradients for their adapters alone.
      clean_weight: weight of the gradient at the parameters themselves, see
        :func:`flatopt.smooth_value_and_grad`; what that pass changes is dropped.
      strategy: layout of the samples, see :func:`flatopt.smooth_value_and_grad`.
      axis_name: axis of ``jax.shard_map`` to average over: loss, gradient and running
        statistics; ``aux`` stays each device's own. Do not average again.

    Returns:
      A function ``f(key, model, /, *args, **kwargs)`` that returns ``(loss, grads)``,
      or ``((loss, aux), grads)`` with ``has_aux``; ``grads`` is an ``nnx.State`` for
      ``optimizer.update(model, grads)``.

    Raises:
      ValueError: if ``batch_norm`` is neither of its two words, ``wrt`` names no variable
        of the model, or ``loss_fn`` changes an NNX object that it closes over.
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
    checks.check_function(loss_fn, "loss_fn", "loss_fn(model, batch)")
    if kernel is not None:
        checks.check_kernel(kernel)

    def smoothed(key, model, /, *args, **kwargs):
        checks.check_random_key(key)
        objects, (args, kwargs) = _passes.take_out((args, kwargs))
        source = _passes.Pass(loss_fn, model, objects, wrt, noise_wrt)
        paths = []

        def with_change(params, rest, args, kwargs):
            out, change = source.run(params, rest, args, kwargs)
            loss, aux = _loss_and_aux(out, has_aux)
            weight = jnp.float32(1)
            if weight_fn is not None:
                chunk = {name: kwargs[name] for name in batch_argnames}
                chunk = [*chunk.values()][0] if len(chunk) == 1 else chunk
                weight = checks.check_weight(weight_fn(chunk))
            paths[:] = change.paths
            return loss, (aux, change.values, weight)

        with filters.model_axes(_axes.filter_axes(model, wrt=source.wrt)):
            (loss, (aux, values, weights)), grads = smoothing.smooth_value_and_grad(
                _value_fn(with_change, source),
                scale,
                kernel,
                num_samples=num_samples,
                antithetic=antithetic,
                batch_argnames=batch_argnames,
                weight_fn=weight_fn,
                has_aux=True,
                mask=source.flags(wrt),
                noise_mask=source.flags(wrt if noise_wrt is None else noise_wrt),
                clean_weight=clean_weight,
                strategy=strategy,
                axis_name=axis_name,
            )(key, source.params, *args, **kwargs)
        change = _passes.Change(paths, values)
        kinds = [type(source.variables()[path]) for path in paths]
        if batch_norm == "clean" and any(issubclass(k, nnx.BatchStat) for k in kinds):
            given = _passes.given_sample_key(loss_fn, kwargs, key)
            _, change = source.run(source.params, source.rest, args, given)
            change = _changes.alone(change)
            # Of the whole batch of a device, whose chunks may be padding.
            weights = jnp.ones(1) if weight_fn is None else weights.sum()[None]
        source.write(_changes.combine(source, change, weights, axis_name))
        grads = source.select(grads, wrt)
        return ((loss, aux), grads) if has_aux else (loss, grads)

    return smoothed


def update(
    optimizer: nnx.Optimizer,
    model: nnx.Module,
    loss_fn: LossFn,
    *,
    has_aux: bool = False,
    axis_name: AxisName = None,
    **kwargs,
) -> jax.Array | tuple[jax.Array, Any]:
    """Make one step with an optimizer whose chain holds flatopt's links.

    Builds ``value_fn`` from ``loss_fn`` and hands it to ``optimizer.update``; no
    gradient is computed but those at perturbed parameters. What is trained is
    ``optimizer.wrt``. Each draw of noise has its own dropout mask, from the key in the
    optimizer's state.

    If a forward pass may change other variables (running statistics of BatchNorm, counters
    of random streams, metrics), they come from one more forward pass of the whole batch at
    the unperturbed parameters. Under ``nnx.jit`` it costs what these variables need, so
    nothing for counters; :func:`value_and_grad` can do without.

    A :func:`flatopt.kernels.filterwise` without ``filter_axes``, as in
    :func:`flatopt.lpf_sgd`, takes those of the model, :func:`filter_axes`.

    Args:
      optimizer: an ``nnx.Optimizer`` or ``nnx.ModelAndOptimizer`` made with
        :func:`flatopt.smooth_gradients`, :func:`flatopt.lpf_sgd` or another of flatopt's
        links in its chain.
      model: the model to update in place.
      loss_fn: ``loss_fn(model, **kwargs) -> scalar``, or ``(scalar, aux)`` with
        ``has_aux``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``. This ``aux`` is that of the
        forward pass at the unperturbed parameters.
      axis_name: axis of ``jax.shard_map``, the same as the link's: running statistics are
        averaged over it; ``aux`` stays each device's own.
      **kwargs: arguments of ``loss_fn``, such as ``batch``, ``nnx.Rngs`` or metrics, and
        extra arguments of other links in the chain.

    Returns:
      The loss before the step as the link measured it, a scalar: the smoothed loss, or
      that at the clean parameters for the sharpness-aware links; ``(loss, aux)`` with
      ``has_aux``.

    Raises:
      ValueError: if the chain holds no link of flatopt, ``optimizer.wrt`` names no variable
        of the model, the model is another than the optimizer's, or ``loss_fn`` changes an
        NNX object that it closes over.

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
    if not hasattr(optimizer, "opt_state"):
        raise TypeError(
            f"optimizer must be an nnx.Optimizer, got {checks.described(optimizer)}; write "
            "update(optimizer, model, loss_fn)."
        )
    if not losses(optimizer):
        raise ValueError(
            "optimizer has no link of flatopt in its chain, so value_fn would be ignored; "
            "make it with nnx.Optimizer(model, flatopt.lpf_sgd(0.1), wrt=nnx.Param)."
        )
    objects, kwargs = _passes.take_out(kwargs)
    source = _passes.Pass(loss_fn, model, objects, optimizer.wrt)
    aux = change = None
    if has_aux or source.may_change():
        given = signatures.forwarded(loss_fn, kwargs)
        given = _passes.given_sample_key(loss_fn, given, _clean_key(optimizer))
        with signatures.naming_what_lacks(loss_fn, given, kwargs):
            out, change = source.run(source.params, source.rest, (), given)
        aux = _loss_and_aux(out, has_aux)[1]
        change = _changes.combine(
            source, _changes.alone(change), jnp.ones(1), axis_name
        )

    def loss_alone(params, rest, args, kwargs):
        return _loss_and_aux(source.run(params, rest, args, kwargs)[0], has_aux)[0]

    with (
        filters.model_axes(_axes.filter_axes(model, wrt=optimizer.wrt)),
        sharding.watching_averages() as averaged,
    ):
        _step(optimizer, model, source, _value_fn(loss_alone, source), kwargs)
    loss = losses(optimizer)[0]
    _check_averaged(loss, axis_name, averaged)
    if change is not None and change.paths:
        _check_statistics(axis_name, averaged)
    if change is not None:
        source.write(change)
    return (loss, aux) if has_aux else loss


def _step(optimizer, model, source, value_fn, kwargs):
    zeros = jax.tree.map(jnp.zeros_like, source.params)
    if not isinstance(optimizer, nnx.ModelAndOptimizer):
        optimizer.update(model, zeros, value_fn=value_fn, **kwargs)
        return
    if model is not optimizer.model:
        raise ValueError(
            "model must be optimizer.model for an nnx.ModelAndOptimizer, got another "
            f"{type(model).__name__}; write update(optimizer, optimizer.model, loss_fn)."
        )
    optimizer.update(zeros, value_fn=value_fn, **kwargs)


def _check_averaged(loss, axis_name, averaged):
    for name in sharding.axis_names(axis_name):
        if sharding.tracks_varying((name,)):
            differs = name in sharding.varying_axes(jax.typeof(loss))
        else:
            differs = name not in averaged
        if differs:
            raise ValueError(
                f"axis_name={name!r} is not averaged over by the link in the optimizer's "
                f"chain, so devices would train apart; give it axis_name={name!r} too."
            )


def _check_statistics(axis_name, averaged):
    lacking = sorted(averaged - {*sharding.axis_names(axis_name)})
    if lacking:
        raise ValueError(
            f"axis_name must name {', '.join(map(repr, lacking))} as the link in the "
            f"optimizer's chain does, got {axis_name!r}; without it devices would keep "
            "running statistics of their own."
        )


def _loss_and_aux(out, has_aux):
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"loss_fn must return (loss, aux) with has_aux=True, got {type(out).__name__}; "
            "return a pair."
        )
    return out


def _clean_key(optimizer):
    """A key for the clean pass, which follows from those in the optimizer's state."""
    key = jax.random.key(0)
    for name in ("noise_key", "count"):
        for _, words in optax.tree.get_all_with_path(optimizer.opt_state, name)[:1]:
            for word in jnp.ravel(words[...]):
                key = random.fold_in(key, word)
    return key


def _value_fn(apply, source):
    """A function of parameters from one of a model, with ``loss_fn``'s signature."""
    treedef = jax.tree.structure(source.params)

    def value_fn(params, /, *args, sample_key, **kwargs):
        kwargs = _passes.given_sample_key(source.loss_fn, kwargs, sample_key)
        # An optimizer hands over bare arrays in place of variables.
        params = treedef.unflatten(jax.tree.leaves(params))
        rest = _passes.fold_streams(source.rest, sample_key)
        return apply(params, rest, args, kwargs)

    value_fn.__signature__ = _with_sample_key(source.loss_fn)
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
