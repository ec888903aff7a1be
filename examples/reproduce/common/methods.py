"""Methods with the settings they choose from, and how to compare them at equal cost."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax

import flatopt

TUNING_SEED = 100  # no final run has it


@dataclasses.dataclass(frozen=True)
class Method:
    """How to make an optimizer, the settings to choose from, and what it may cost.

    Methods that differ in settings and budget alone are equal: they are one program.
    """

    make: Callable | None
    """The optimizer, or what comes before it; its arguments are up to the study."""
    settings: list[dict[str, float]] = dataclasses.field(
        default_factory=list, compare=False
    )
    """The settings to choose from; none where ``tuned_as`` says whose choice to take."""
    tuned_as: str = dataclasses.field(default="", compare=False)
    """Name of the method whose chosen setting to take."""
    budget: float = dataclasses.field(default=1, compare=False)
    """How often the gradients of the others."""


def grid(**values: Iterable) -> list[dict[str, Any]]:
    """Every combination of values, the last varying fastest."""
    return [
        dict(zip(values, chosen, strict=True))
        for chosen in itertools.product(*values.values())
    ]


def step(
    tx: optax.GradientTransformationExtraArgs,
    value_fn: Callable,
    carry: tuple[Any, Any],
    takes_loss: bool = True,
    **batch: Any,
) -> tuple[Any, Any]:
    """Parameters and state after a step.

    Args:
      tx: the optimizer.
      value_fn: ``value_fn(params, **batch)``, the loss.
      carry: parameters and state.
      takes_loss: whether ``tx`` takes the loss, as flatopt's links do, or its gradient.
      **batch: arguments of the loss.
    """
    params, state = carry
    if takes_loss:
        grads, extra = None, {"value_fn": value_fn, **batch}
    else:
        grads, extra = jax.grad(value_fn)(params, **batch), {}
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def gradients_a_step(
    step: Callable, loss_fn: Callable, carry: Any, *batch: Any, num_steps: int = 2
) -> float:
    """Gradients of a batch a step takes, as flatopt counts those of single examples.

    Args:
      step: ``step(value_fn, carry, *batch) -> carry``, a training step on that loss.
      loss_fn: the loss.
      carry: parameters and state at the start.
      *batch: arrays of equal leading axis.
      num_steps: over which to take the mean.
    """
    counter = flatopt.GradientCounter(loss_fn)
    run = jax.jit(lambda carry, batch: step(counter, carry, *batch))
    for _ in range(num_steps):
        carry = run(carry, batch)
    return counter.count / num_steps / len(jax.tree.leaves(batch)[0])


def compare(
    piece: Callable,
    stage: str,
    methods: dict[str, Method],
    seeds: int,
    budget: int,
    cost: Callable[[Method, dict], float],
    tune: Callable[..., float],
    train: Callable[..., dict],
) -> dict[str, dict]:
    """Choose a setting for every method on validation data, then train all seeds.

    Args:
      piece: as in `runs.shown`.
      stage: a name for the pieces.
      methods: by name; one that is tuned as another comes after it.
      seeds: number of final runs.
      budget: gradients that each run may take, times the method's own.
      cost: ``cost(method, setting)``, gradients of a batch a step.
      tune: ``tune(method, setting, seed, cost)``, what to choose the least of.
      train: ``train(method, setting, seed, cost)``, the results of a final run.

    Returns:
      For each method its cost, budget, tuning, settings, chosen setting, and runs.
    """
    found = {}
    for name, method in methods.items():
        size = budget * method.budget
        settings = method.settings or [found[method.tuned_as]["setting"]]
        price = piece(
            f"cost of {method.make.__name__}",
            functools.partial(cost, method, settings[0]),
            size=0,
        )

        def run(function, setting, seed, name=name, size=size, price=price):
            return piece(
                f"{stage}, {name}, {setting}, seed {seed}",
                functools.partial(function, methods[name], setting, seed, price),
                size=size,
            )

        tuned = [run(tune, setting, TUNING_SEED) for setting in method.settings]
        best = settings[best_of(tuned)] if tuned else settings[0]
        found[name] = {
            "gradients_a_step": price,
            "budget": size,
            "tuning": tuned,
            "settings": method.settings,
            "setting": best,
            "runs": [run(train, best, seed) for seed in range(1, 1 + seeds)],
        }
    return found


def best_of(scores: list[float]) -> int:
    """Index of the least score; one that is not finite is never the least."""
    return int(np.argmin(np.nan_to_num(scores, nan=np.inf)))


def num_runs(methods: dict[str, Method], seeds: int) -> int:
    """Runs that `compare` makes, each counted as often as its budget."""
    return sum((len(m.settings) + seeds) * m.budget for m in methods.values())
