"""Accumulation of gradients: the link first, then optax.MultiSteps."""

import contextlib
import types

import optax

from flatopt._core import checks
from flatopt.transforms import _chain, _link

RECIPES = "flatopt.optimizers"


def accumulate(
    link: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
) -> optax.GradientTransformationExtraArgs:
    """Step once in ``num_microbatches`` calls, with the mean of their gradients.

    The link measures the gradient of each microbatch; ``optax.MultiSteps`` around the
    optimizer averages them. The other order, ``optax.MultiSteps(flatopt.lpf_sgd(0.1), 4)``,
    is an error: it would average the incoming zeros and train on the last microbatch alone.

    Call ``update`` once a microbatch. The updates are zero but for the last of a group. The
    link draws fresh noise in each call, and a schedule of its scale counts calls; a
    schedule of the learning rate counts steps.

    Args:
      link: one of flatopt's links, such as :func:`lpf_gradients`, or a chain of it and
        what should see the gradient of each microbatch.
      optimizer: what makes a step of the mean gradient, such as ``optax.adamw(1e-3)`` or a
        chain of clipping and an optimizer.
      num_microbatches: number of calls to a step.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: if ``num_microbatches`` is no int of at least 1, or ``link`` is
        a whole optimizer such as :func:`lpf_sgd`.

    Example:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = flatopt.accumulate(flatopt.nso_gradients(0.01), optax.sgd(0.1), 2)
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> for target in (1.0, 2.0):
      ...     updates, state = tx.update(
      ...         params, state, params, target=target,
      ...         value_fn=lambda params, target: (params - target) ** 2 / 2)
      ...     print(round(float(updates), 4))
      0.0
      0.15
    """
    checks.check_count(num_microbatches, "num_microbatches")
    for given in (link, optimizer):
        _link.check_transformation(given, "accumulate")
    if _holds_optimizer(link.update):
        raise ValueError(
            "link must be a link, got a whole optimizer, whose steps another would turn "
            "around; write flatopt.accumulate(flatopt.lpf_gradients(), optax.sgd(0.1), 4)."
        )
    steps = optax.MultiSteps(optimizer, every_k_schedule=num_microbatches)
    return _chain.chain(link, steps.gradient_transformation())


def _holds_optimizer(value):
    """Whether a function, or one that it closes over, is that of a recipe or makes one."""
    seen, found = set(), [value]
    while found:
        value = found.pop()
        if id(value) in seen:  # functions may close over themselves
            continue
        seen.add(id(value))
        if isinstance(value, tuple | list):
            found.extend(value)
        elif isinstance(value, types.FunctionType):
            module = value.__module__ or ""
            if hasattr(value, "is_optimizer") or module.startswith(RECIPES):
                return True
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # it may be empty yet
                    found.append(cell.cell_contents)
    return False
