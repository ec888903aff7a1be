"""The cost of watching and of computing stability: ``make bench-stability``.

Writes ``docs/results/stability_cpu.json`` and renders it into ``docs/benchmarks.md``.
"""

import dataclasses
import json
import pathlib
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

import flatopt
from benchmarks import problems, render
from flatopt import stability

ROOT = pathlib.Path(__file__).parent.parent
EVERY = 50
STEPS = 10  # beside each two measurements of the monitor
WARM_UP = 2  # rounds in which everything is compiled
BATCH = {"mlp": 256, "cnn": 64, "transformer": 16}


@dataclasses.dataclass
class Config:
    """Settings of a run."""

    rounds: int = 24
    """Rounds of 50 steps of each network, with and without watching."""
    sizes: tuple[int, ...] = (500, 1000, 2000)
    """Numbers of examples and parameters of the thresholds."""
    parts: tuple[Literal["tracker", "monitor", "thresholds", "momentum"], ...] = (
        "tracker",
        "monitor",
        "thresholds",
        "momentum",
    )
    """What to measure; the other figures stay."""
    results: pathlib.Path = ROOT / "docs" / "results" / "stability_cpu.json"
    """Where the figures go."""


def tracker(name, rounds):
    """Seconds of watching over seconds without, a ratio a round.

    "chain": the tracker in the chain. "apart": in a jitted function of its own, called every
    so often.
    """
    problem = problems.make_problem(name, BATCH[name])
    value_fn, batch = problem.value_fn, problem.batch
    plain = optax.sgd(0.01, momentum=0.9)
    watch = flatopt.track_stability(0.01, BATCH[name], every=EVERY)
    watch_now = flatopt.track_stability(0.01, BATCH[name], every=1)

    @jax.jit
    def measure(params, seen):
        return watch_now.update(params, seen, params, value_fn=value_fn, **batch)[1]

    def make_run(tx, apart=False):
        step = make_step(tx, problem)
        carry = problem.params, tx.init(problem.params)
        seen = watch_now.init(problem.params)

        def run():
            nonlocal carry, seen
            start = time.perf_counter()
            if apart:
                seen = measure(carry[0], seen)
            for _ in range(EVERY):
                carry = step(*carry)
            jax.block_until_ready((carry, seen))
            return time.perf_counter() - start

        return run

    runs = {
        "plain": make_run(plain),
        "chain": make_run(optax.chain(watch, plain)),
        "apart": make_run(plain, apart=True),
    }
    times = {contender: [] for contender in runs}
    for index in tqdm.trange(WARM_UP + rounds, desc=name):
        order = [*runs, *runs][index % len(runs) :][: len(runs)]
        for contender in order:
            times[contender].append(runs[contender]())
    return {
        contender: np.divide(seconds, times["plain"])[WARM_UP:].tolist()
        for contender, seconds in times.items()
        if contender != "plain"
    }


def make_step(tx, problem):
    tx = optax.with_extra_args_support(tx)
    value_fn, batch = problem.value_fn, problem.batch

    @jax.jit
    def step(params, state):
        grads = jax.grad(value_fn)(params, **batch)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, **batch)
        return optax.apply_updates(params, updates), state

    return step


def monitor(name, rounds):
    """Seconds of a measurement of `flatopt.monitor` over those of a step, a value a round.

    It adds nothing to the step, so that both are timed apart, one after the other. A
    measurement is the mean of its two kinds.
    """
    problem = problems.make_problem(name, BATCH[name])
    tx = optax.sgd(0.01, momentum=0.9)
    step = make_step(tx, problem)
    carry = problem.params, tx.init(problem.params)
    watch = flatopt.monitor(problem.value_fn, tx, every=1)
    found = []
    for _ in tqdm.trange(WARM_UP + rounds, desc=f"{name}, monitor"):
        times = [time.perf_counter()]
        for _ in range(STEPS):
            carry = step(*carry)
        jax.block_until_ready(carry)
        times.append(time.perf_counter())
        for _ in range(2):
            watch(*carry, **problem.batch)
        times.append(time.perf_counter())
        steps, measurements = np.diff(times)
        found.append(float(measurements / 2 / (steps / STEPS)))
    return found[WARM_UP:]


def thresholds(size):
    rows = jax.random.normal(jax.random.key(0), (size, size))

    def model_fn(params, inputs):
        return inputs @ params

    start = time.perf_counter()
    lin = stability.linearize(model_fn, jnp.ones(size), rows, jnp.zeros(size))
    jax.block_until_ready(lin)
    middle = time.perf_counter()
    found = stability.thresholds(lin, 8)
    return {
        "linearize": middle - start,
        "thresholds": time.perf_counter() - middle,
        "mean_square": found.mean_square,
    }


def momentum(size):
    """Seconds and products of the exact threshold with momentum over those of plain SGD."""
    rows = jax.random.normal(jax.random.key(0), (size, size))
    lin = stability.linearize(
        lambda params, inputs: inputs @ params, jnp.ones(size), rows, jnp.zeros(size)
    )
    optimizers = {"plain": None, "momentum": lambda rate: optax.sgd(rate, momentum=0.9)}
    found = {}
    for name, optimizer in optimizers.items():
        counts = {}

        def count(done, total, description, counts=counts):
            del total
            counts[description] = done

        def ask(optimizer=optimizer, count=count):
            return stability.thresholds(lin, 8, optimizer=optimizer, progress=count)

        ask()  # compiles
        start = time.perf_counter()
        ask()
        found[name] = {
            "seconds": time.perf_counter() - start,
            "products": counts["the exact threshold"],
        }
    return found


def main(config: Config) -> None:
    report = json.loads(config.results.read_text()) if config.results.exists() else {}
    if "tracker" in config.parts:
        report["tracker"] = {name: tracker(name, config.rounds) for name in BATCH}
    if "monitor" in config.parts:
        report["monitor"] = {name: monitor(name, config.rounds) for name in BATCH}
    if "thresholds" in config.parts:
        report["thresholds"] = {size: thresholds(size) for size in config.sizes}
    if "momentum" in config.parts:
        report["momentum"] = momentum(min(config.sizes))
    config.results.write_text(json.dumps(report, indent=1) + "\n")
    render.write(ROOT / "docs/results/benchmarks_cpu.json", ROOT / "docs/benchmarks.md")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
