"""The cost of watching and of computing stability: ``make bench-stability``.

Writes ``docs/results/stability_cpu.json`` and renders it into ``docs/benchmarks.md``.
"""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import optax
import tqdm
import tyro

import flatopt
from benchmarks import problems, render
from flatopt import stability

ROOT = pathlib.Path(__file__).parent.parent
EVERY = 50
BATCH = {"mlp": 256, "cnn": 64, "transformer": 16}


@dataclasses.dataclass
class Config:
    """Settings of a run."""

    rounds: int = 8
    """Rounds of 50 steps of each network, with and without the tracker."""
    sizes: tuple[int, ...] = (500, 1000, 2000)
    """Numbers of examples and parameters of the thresholds."""
    results: pathlib.Path = ROOT / "docs" / "results" / "stability_cpu.json"
    """Where the figures go."""


def tracker(name, rounds):
    """Seconds with the tracker over seconds without, a ratio a round.

    "chain": in the chain. "apart": in a jitted function of its own, called every so often.
    """
    problem = problems.make_problem(name, BATCH[name])
    value_fn, batch = problem.value_fn, problem.batch
    plain = optax.sgd(0.01, momentum=0.9)
    watch = flatopt.track_stability(0.01, BATCH[name], every=EVERY)
    watch_now = flatopt.track_stability(0.01, BATCH[name], every=1)

    def make_run(tx, apart=False):
        tx = optax.with_extra_args_support(tx)

        @jax.jit
        def step(params, state):
            grads = jax.grad(value_fn)(params, **batch)
            updates, state = tx.update(grads, state, params, value_fn=value_fn, **batch)
            return optax.apply_updates(params, updates), state

        @jax.jit
        def measure(params, seen):
            return watch_now.update(params, seen, params, value_fn=value_fn, **batch)[1]

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
    ratios = {"chain": [], "apart": []}
    for index in tqdm.trange(rounds + 1, desc=name):
        order = list(runs)[index % 3 :] + list(runs)[: index % 3]
        times = {contender: runs[contender]() for contender in order}
        if index:
            for contender in ratios:
                ratios[contender].append(times[contender] / times["plain"])
    return ratios


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


def main(config: Config) -> None:
    report = {
        "tracker": {name: tracker(name, config.rounds) for name in BATCH},
        "thresholds": {size: thresholds(size) for size in config.sizes},
    }
    config.results.write_text(json.dumps(report, indent=1) + "\n")
    render.write(ROOT / "docs/results/benchmarks_cpu.json", ROOT / "docs/benchmarks.md")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
