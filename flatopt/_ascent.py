"""What the sharpness-aware transformations share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _layout, _links, _random, _trees


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


def adaptive(name, rho, eta, size_of, options):
    """SAM in units of ``size_of(path, leaf) + eta``."""
    _checks.check_scale(eta, "eta")

    def gradients(value_and_grad, params, rho, key, memory, count):
        del key, count
        value, grads = value_and_grad(params)
        sizes = jax.tree_util.tree_map_with_path(
            lambda path, p: size_of(_trees.path_name(path), _trees.widen(p)) + eta,
            params,
        )
        sizes = jax.tree.map(lambda s, g: s.astype(g.dtype), sizes, grads)
        _, grads = value_and_grad(move(params, scaled_ascent(grads, sizes, rho)))
        return value, grads, memory

    return adversarial(name, rho, gradients, options)


def noisy(name, rho, sigma, kernel, options):
    """SAM whose ascent step follows the gradient at noisy parameters."""
    _checks.check_scale(sigma, "sigma")

    def gradients(value_and_grad, params, rho, key, memory, count):
        del count
        noise = _trees.bind(kernel, key, params)(key)
        value, grads = value_and_grad(move(params, scale(sigma, noise)))
        _, grads = value_and_grad(move(params, ascent(grads, rho)))
        return value, grads, memory

    return adversarial(name, rho, gradients, options)


def adversarial(name, rho, gradients, options, init_memory=None):
    """The transformation of one method.

    ``gradients(value_and_grad, params, rho, key, memory, count)`` returns the value,
    the gradient and the new memory, for one microbatch.
    """
    if not callable(rho):
        _checks.check_scale(rho, "rho")
    parts = 1 if options.num_microbatches is None else options.num_microbatches
    _checks.check_num_samples(parts, "num_microbatches")
    names = _checks.check_names(options.batch_argnames)
    _checks.check_start_step(options.start_step)
    if parts > 1 and not names:
        raise ValueError(
            f"num_microbatches={parts} needs batch_argnames, got none; name the arguments "
            "to split, such as batch_argnames=('batch',)."
        )
    _links.check_key(options.key)

    def init_fn(params):
        return AdversarialState(
            count=jnp.zeros((), jnp.int32),
            noise_key=_links.key_data(options.key),
            clean_value=jnp.full((), jnp.inf, _links.value_dtype(params)),
            memory=() if init_memory is None else init_memory(params),
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        del updates
        _links.check_update(params, value_fn, name)
        _checks.check_batch_argnames(names, value_fn)
        value_of, select, merge = _links.partition(value_fn, params, options.mask)
        free = _checks.check_params(select(params))
        memory = select(state.memory) if init_memory else ()
        chunks, whole = _layout.split_batch(
            _checks.forwarded(value_fn, extra_args), names, parts
        )
        radius = rho(state.count) if callable(rho) else rho
        _checks.check_scale(radius, "rho")
        key = _links.step_key(state, options.key)
        if options.axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(options.axis_name))
            free, memory = _layout.tree_varying((free, memory), options.axis_name)

        def microbatch(index, chunk):
            sample_key = _random.fold_in(key, index)
            sample = _checks.sample_options(value_fn, sample_key)

            def value_and_grad(params):
                def value_at(params):
                    return _checks.check_value(
                        value_of(params, **whole, **chunk, **sample)
                    )

                return jax.tree.map(_trees.widen, jax.value_and_grad(value_at)(params))

            def plain():
                return *value_and_grad(free), memory

            def method():
                return gradients(
                    value_and_grad, free, radius, sample_key, memory, state.count
                )

            if isinstance(options.start_step, int) and options.start_step == 0:
                return method(), None
            return _layout.cond(state.count >= options.start_step, method, plain), None

        total, _ = _layout.sum_samples(
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
        return merge(grads, _links.zeros_like(params)), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def normalize(tree):
    """The tree over its norm, and the norm; zero at zero.

    Scaled by the largest entry first, so that squares of tiny ones do not underflow.
    """
    largest = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    dtype = jnp.float64 if jnp.float64 in [x.dtype for x in largest] else jnp.float32
    top = jnp.max(jnp.stack([x.astype(dtype) for x in largest])) if largest else 0.0
    divisor = jnp.where(top == 0, 1.0, top)
    scaled = jax.tree.map(lambda x: x / divisor.astype(x.dtype), tree)
    length = jnp.sqrt(dot(scaled, scaled))
    unit = jnp.where(length == 0, 1.0, length)
    return jax.tree.map(lambda x: x / unit.astype(x.dtype), scaled), length * divisor


def dot(tree, other):
    parts = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), tree, other))
    dtype = jnp.float64 if jnp.float64 in [x.dtype for x in parts] else jnp.float32
    return sum((x.astype(dtype) for x in parts), jnp.zeros((), dtype))


def scale(factor, tree):
    return jax.tree.map(lambda x: jnp.asarray(factor).astype(x.dtype) * x, tree)


def add(tree, factor, other):
    return jax.tree.map(jnp.add, tree, scale(factor, other))


def ascent(grads, rho):
    """The step of length rho along the gradient."""
    return scale(rho, normalize(grads)[0])


def scaled_ascent(grads, sizes, rho):
    """The step rho T^2 g / |T g| in units of the sizes T."""
    direction, _ = normalize(jax.tree.map(jnp.multiply, sizes, grads))
    return scale(rho, jax.tree.map(jnp.multiply, sizes, direction))


def orthogonal(tree, other):
    """The part of a tree that is orthogonal to another."""
    direction, _ = normalize(other)
    return add(tree, -dot(tree, direction), direction)


def move(params, step):
    return jax.tree.map(
        lambda p, e: (_trees.widen(p) + e.astype(_trees.wide(p.dtype))).astype(p.dtype),
        params,
        step,
    )


def wide_zeros(params):
    return jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=_links.memory_dtype(p)), params
    )
