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
    """Seconds with the tracker over seconds without, a ratio a round."""
    problem = problems.make_problem(name, BATCH[name])
    plain = optax.sgd(0.01, momentum=0.9)
    watched = optax.chain(
        flatopt.track_stability(0.01, BATCH[name], every=EVERY), plain
    )

    def make_run(tx):
        @jax.jit
        def step(params, state):
            grads = jax.grad(problem.value_fn)(params, **problem.batch)
            extra = optax.with_extra_args_support(tx)
            updates, state = extra.update(
                grads, state, params, value_fn=problem.value_fn, **problem.batch
            )
            return optax.apply_updates(params, updates), state

        state = problem.params, tx.init(problem.params)

        def run():
            nonlocal state
            start = time.perf_counter()
            for _ in range(EVERY):
                state = step(*state)
            jax.block_until_ready(state)
            return time.perf_counter() - start

        return run

    runs = make_run(watched), make_run(plain)
    ratios = []
    for index in tqdm.trange(rounds + 1, desc=name):
        times = [run() for run in (runs if index % 2 else runs[::-1])]
        if index:
            ratios.append(times[0] / times[1] if index % 2 else times[1] / times[0])
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
