"""One way on CPU and another on accelerators, by the platform that a program is for.

JAX knows it when it lowers a trace, not before: on a CPU machine a program may be exported
or compiled for a TPU. So a trace holds both ways, and the program the one of its platform.
"""

import jax
import jax.numpy as jnp

from flatopt._core import trees

CPU = "cpu"
ELSEWHERE = "elsewhere"


def choose(on_cpu, elsewhere, *args):
    """``on_cpu(*args)`` in programs for CPU, ``elsewhere(*args)`` in those for others.

    Outside a trace it is the platform of the arrays.
    """
    leaves = jax.tree.leaves(args)
    if not trees.is_traced(leaves) and not is_staged():
        return (on_cpu if platform_of(leaves) == CPU else elsewhere)(*args)
    return jax.lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)


def platform_of(leaves):
    """The platform of concrete arrays: ``"cpu"``, ``"tpu"``, ``"gpu"``."""
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.devices())).platform
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def branches_on(equation, platform):
    """The jaxprs of an equation that :func:`choose` made, on one of the two; else None."""
    platforms = equation.params.get("branches_platforms")
    if platforms is None:
        return None
    is_cpu = platform == CPU
    return [
        branch
        for branch, names in zip(equation.params["branches"], platforms, strict=True)
        if (names is not None and CPU in names) == is_cpu
    ]


def is_staged():
    """Whether in a trace; outside of one a loop would compile anew at each call."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)
