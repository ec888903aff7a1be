"""One way on CPU and others on accelerators, by the platform that a program is for.

JAX knows it when it lowers a trace, not before: on a CPU machine a program may be exported
or compiled for a TPU. So a trace holds all ways, and the program the one of its platform.
"""

import jax
import jax.numpy as jnp

from flatopt._core import trees

CPU = "cpu"
TPU = "tpu"
ELSEWHERE = "elsewhere"


def choose(on_cpu, elsewhere, *args, on_tpu=None):
    """``on_cpu(*args)`` in programs for CPU, ``elsewhere(*args)`` in those for others.

    With ``on_tpu`` the programs for TPUs have a way of their own. Outside a trace it is the
    platform of the arrays.
    """
    ways = {CPU: on_cpu, TPU: on_tpu or elsewhere}
    ways = {name: way for name, way in ways.items() if way is not elsewhere}
    if not ways:
        return elsewhere(*args)
    leaves = jax.tree.leaves(args)
    if not trees.is_traced(leaves) and not is_staged():
        return ways.get(platform_of(leaves), elsewhere)(*args)
    return jax.lax.platform_dependent(*args, **ways, default=elsewhere)


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
    """The jaxprs of an equation that :func:`choose` made, on CPU or elsewhere; else None."""
    platforms = equation.params.get("branches_platforms")
    if platforms is None:
        return None
    # The last branch, of no names, is that of the platforms which are not named.
    named = {name for names in platforms for name in names or ()}
    on_cpu = [
        CPU in (names if names is not None else {CPU} - named) for names in platforms
    ]
    branches = zip(equation.params["branches"], on_cpu, strict=True)
    return [branch for branch, is_cpu in branches if is_cpu == (platform == CPU)]


def is_staged():
    """Whether in a trace; outside of one a loop would compile anew at each call."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)
