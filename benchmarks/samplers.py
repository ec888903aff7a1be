"""What a value of noise costs on this machine: ``python -m benchmarks.samplers``.

Adds noise to 4 million parameters in place, as a step does, by each sampler in turn;
ratios are within a round. Writes ``docs/results/samplers.json``.
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import flatopt
from benchmarks.measure import quartiles
from flatopt import kernels
from flatopt._core import random

OUTPUT = pathlib.Path(__file__).parent.parent / "docs" / "results" / "samplers.json"
SHAPE, ROUNDS = (4000, 1000), 30
WRITTEN, LIBRARY = "writing alone", "`normal` by XLA's `erf_inv`"


def _one_number(key, shape):
    """What writing the parameters costs."""
    del shape
    return jax.random.uniform(key)


def _by_erf_inv(key, shape):
    """Normal values of the same random words by XLA's inverse error function."""
    places = random._open_interval(random.bits(key, shape))
    return jnp.float32(2**0.5) * jax.lax.erf_inv(places)


SAMPLERS = {
    WRITTEN: _one_number,
    "`signs`": kernels.signs,
    "`uniform`": kernels.uniform,
    "`irwin_hall`": kernels.irwin_hall,
    "`normal`": kernels.normal,
    LIBRARY: _by_erf_inv,
    "`laplace`": kernels.laplace,
    "`jax.random.normal`": jax.random.normal,
}


def measure(shape=SHAPE, rounds=ROUNDS):
    """Seconds of each sampler in each round."""
    key, steps = jax.random.key(0), {}
    for name, sampler in SAMPLERS.items():

        def step(params, key, sampler=sampler):
            return params + 0.1 * sampler(key, params.shape)

        steps[name] = jax.jit(step, donate_argnums=0)
    seconds = {name: [] for name in steps}
    for _ in tqdm.trange(rounds + 1):
        for name, step in steps.items():
            params = jax.block_until_ready(jnp.zeros(shape))
            start = time.perf_counter()
            jax.block_until_ready(step(params, key))
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def table(report):
    """The rows of the page of layouts, in Markdown."""
    seconds = report["seconds"]
    lines = ["| sampler | ns a value | over `normal` by `erf_inv` |", "|---|---|---|"]
    for name, values in seconds.items():
        low, median, high = quartiles(np.divide(values, seconds[LIBRARY]))
        cost = 1e9 * np.median(values) / report["num_values"]
        ratio = "" if name == LIBRARY else f"{median:.2f} ({low:.2f}–{high:.2f})"
        lines.append(f"| {name} | {cost:.2f} | {ratio} |")
    return "\n".join(lines)


def main():
    versions = {"flatopt": flatopt.__version__, "jax": jax.__version__}
    num_values = int(np.prod(SHAPE))
    report = {"versions": versions, "num_values": num_values, "seconds": measure()}
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
