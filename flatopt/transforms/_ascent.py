"""What the sharpness-aware transformations share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt._core import checks, layout, loops, random, trees
from flatopt._core.types import AxisName
from flatopt.transforms import _link
from flatopt.transforms._states import AdversarialState


class Options(NamedTuple):
    num_microbatches: int | None
    batch_argnames: tuple[str, ...]
    start_step: int
    mask: Any
    axis_name: AxisName
    key: int | jax.Array


def adversarial(
    name,
    rho,
    gradients,
    options,
    init_memory=None,
    *,
    is_memory_of_free=False,
    own_value_fn=None,
    given=None,
    is_given_whole=False,
    is_linear=False,
):
    """The transformation of one method.

    ``gradients(value_and_grad, params, rho, key, memory, count)`` returns the value,
    the gradient and the new memory, for one microbatch. A method that needs other parts of
    the loss is given ``given(step, key, chunk)`` in place of ``value_and_grad``; one that
    ``is_given_whole`` has all parameters for its last argument, with those masked out, which
    tell the axes of filters. What the
    microbatches make of the memory is averaged; counts in it are those of the first one.
    ``is_linear``: the gradient is that of 1 + rho H times the loss where that is quadratic.
    """
    if not callable(rho):
        checks.check_scale(rho, "rho")
    parts = 1 if options.num_microbatches is None else options.num_microbatches
    checks.check_count(parts, "num_microbatches")
    checks.check_start_step(options.start_step)
    if parts > 1 and not checks.check_names(options.batch_argnames):
        raise ValueError(
            f"num_microbatches={parts} needs batch_argnames, got none; name the arguments "
            "to split, such as batch_argnames=('batch',)."
        )

    rho_at = _link.from_step(rho, options.start_step, "rho")

    return _link.link(
        name,
        AdversarialState,
        _estimator(rho, gradients, options, parts, given, is_given_whole),
        mask=options.mask,
        key=options.key,
        num_chunks=parts,
        batch_argnames=options.batch_argnames,
        count_name="num_microbatches",
        axis_name=options.axis_name,
        init_memory=init_memory,
        is_memory_of_free=is_memory_of_free,
        own_value_fn=own_value_fn,
        rho_near_minimum=rho_at if is_linear and parts == 1 else None,
        size_at=rho_at,
    )


def _estimator(rho, gradients, options, parts, given, is_given_whole):
    """``estimate(step)``: the mean over microbatches of what a method returns."""

    def of_microbatch(step, radius, index, chunk):
        key = random.fold_in(step.key, index)

        def value_and_grad(params):
            found = jax.value_and_grad(lambda p: step.value(p, key, chunk))(params)
            return jax.tree.map(trees.widen, found)

        def plain():
            return *value_and_grad(step.params), step.memory

        def method():
            state = step.params, radius, key, step.memory, step.count
            whole = (step.whole[1],) if is_given_whole else ()
            of_loss = value_and_grad if given is None else given(step, key, chunk)
            return gradients(of_loss, *state, *whole)

        if isinstance(options.start_step, int) and options.start_step == 0:
            return _split(method())
        return _split(loops.cond(step.count >= options.start_step, method, plain))

    def estimate(step):
        radius = _link.at_step(rho, step.count, "rho")
        total, counts = layout.sum_samples(
            lambda index, chunk: of_microbatch(step, radius, index, chunk),
            parts,
            step.chunks,
            "auto",
            rematerialize=False,
        )
        means = jax.tree.map(lambda x: x / parts, total)
        return jax.tree.map(
            lambda mean, count: mean if count is None else count[0],
            means,
            counts,
            is_leaf=lambda x: x is None,
        )

    return estimate


def _split(tree):
    """What can be averaged, and the rest, each with None in place of the other."""
    flags = [jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(tree)]
    return trees.select(tree, flags), trees.select(tree, [not flag for flag in flags])
