"""What the sharpness-aware transformations share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, layout, loops, random, sharding, signatures, trees
from flatopt.transforms import _link


class AdversarialState(NamedTuple):
    """State of the sharpness-aware transformations: plain numeric arrays.

    Attributes:
      count: number of updates made, shape (), int32.
      noise_key: raw data of the random key, uint32.
      clean_value: the loss at the parameters before the last step, shape (), float32
        or wider; of :func:`random_sam_gradients` and :func:`bayesian_sam_gradients`
        the loss at the noisy parameters. Infinite before the first update.
      memory: what the method keeps between steps, shaped like the parameters; ``()``
        for most.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> flatopt.sam_gradients(0.05).init(jnp.zeros(3)).count
      Array(0, dtype=int32)
    """

    count: jax.Array
    noise_key: jax.Array
    clean_value: jax.Array
    memory: Any


class Options(NamedTuple):
    num_microbatches: int | None
    batch_argnames: tuple[str, ...]
    start_step: int
    mask: Any
    axis_name: str | tuple[str, ...] | None
    key: int | jax.Array


def adversarial(name, rho, gradients, options, init_memory=None):
    """The transformation of one method.

    ``gradients(value_and_grad, params, rho, key, memory, count)`` returns the value,
    the gradient and the new memory, for one microbatch.
    """
    if not callable(rho):
        checks.check_scale(rho, "rho")
    parts = 1 if options.num_microbatches is None else options.num_microbatches
    checks.check_num_samples(parts, "num_microbatches")
    names = checks.check_names(options.batch_argnames)
    checks.check_start_step(options.start_step)
    if parts > 1 and not names:
        raise ValueError(
            f"num_microbatches={parts} needs batch_argnames, got none; name the arguments "
            "to split, such as batch_argnames=('batch',)."
        )
    _link.check_key(options.key)

    def init_fn(params):
        return AdversarialState(
            count=jnp.zeros((), jnp.int32),
            noise_key=_link.key_data(options.key),
            clean_value=jnp.full((), jnp.inf, _link.value_dtype(params)),
            memory=() if init_memory is None else init_memory(params),
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        del updates
        _link.check_update(params, value_fn, name)
        checks.check_batch_argnames(names, value_fn)
        value_of, select, merge = _link.partition(value_fn, params, options.mask)
        free = checks.check_params(select(params))
        memory = select(state.memory) if init_memory else ()
        chunks, whole = layout.split_batch(
            signatures.forwarded(value_fn, extra_args), names, parts
        )
        radius = rho(state.count) if callable(rho) else rho
        checks.check_scale(radius, "rho")
        key = _link.step_key(state, options.key)
        if options.axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(options.axis_name))
            free, memory = sharding.tree_varying((free, memory), options.axis_name)

        def microbatch(index, chunk):
            sample_key = random.fold_in(key, index)
            sample = signatures.sample_options(value_fn, sample_key)

            def value_and_grad(params):
                def value_at(params):
                    return checks.check_value(
                        value_of(params, **whole, **chunk, **sample)
                    )

                return jax.tree.map(trees.widen, jax.value_and_grad(value_at)(params))

            def plain():
                return *value_and_grad(free), memory

            def method():
                return gradients(
                    value_and_grad, free, radius, sample_key, memory, state.count
                )

            if isinstance(options.start_step, int) and options.start_step == 0:
                return method(), None
            return loops.cond(state.count >= options.start_step, method, plain), None

        total, _ = layout.sum_samples(
            microbatch, parts, chunks, "auto", rematerialize=False
        )
        if options.axis_name is not None:
            total = jax.lax.pmean(total, options.axis_name)
        value, grads, memory = jax.tree.map(lambda x: x / parts, total)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, free)
        new_state = AdversarialState(
            count=optax.safe_increment(state.count),
            noise_key=state.noise_key,
            clean_value=value.astype(state.clean_value.dtype),
            memory=merge(memory, state.memory) if init_memory else (),
        )
        return merge(grads, _link.zeros_like(params)), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
