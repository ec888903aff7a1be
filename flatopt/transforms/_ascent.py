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


def adversarial(name, rho, gradients, options, init_memory=None, is_linear=False):
    """The transformation of one method.

    ``gradients(value_and_grad, params, rho, key, memory, count)`` returns the value,
    the gradient and the new memory, for one microbatch. ``is_linear``: it is that of
    1 + rho H times the loss where the loss is quadratic.
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

    def rho_near_minimum(count):
        return jnp.where(
            count < options.start_step, 0.0, _link.at_step(rho, count, "rho")
        )

    def estimate(step):
        radius = _link.at_step(rho, step.count, "rho")

        def microbatch(index, chunk):
            key = random.fold_in(step.key, index)

            def value_and_grad(params):
                found = jax.value_and_grad(lambda p: step.value(p, key, chunk))(params)
                return jax.tree.map(trees.widen, found)

            def plain():
                return *value_and_grad(step.params), step.memory

            def method():
                return gradients(
                    value_and_grad, step.params, radius, key, step.memory, step.count
                )

            if isinstance(options.start_step, int) and options.start_step == 0:
                return method(), None
            return loops.cond(step.count >= options.start_step, method, plain), None

        total, _ = layout.sum_samples(
            microbatch, parts, step.chunks, "auto", rematerialize=False
        )
        return jax.tree.map(lambda x: x / parts, total)

    return _link.link(
        name,
        AdversarialState,
        estimate,
        mask=options.mask,
        key=options.key,
        num_chunks=parts,
        batch_argnames=options.batch_argnames,
        count_name="num_microbatches",
        axis_name=options.axis_name,
        init_memory=init_memory,
        rho_near_minimum=rho_near_minimum if is_linear and parts == 1 else None,
    )
