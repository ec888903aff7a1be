"""Interleaved measurements of training steps within one process."""

import time

import jax
import numpy as np
import tqdm


def measure(problem, contenders, repeats, seed=0, compiler_options=None):
    """Time steps in turn; return one row of figures a contender.

    Ratios are taken within each round, so that what slows the machine for a while
    slows all alike; medians and quartiles are over rounds.
    """
    key = jax.random.key(seed)
    compiled, rows = {}, {}
    for name, make in tqdm.tqdm(contenders.items(), desc=f"compile {problem.name}"):
        tx, step = make(problem)
        state = tx.init(problem.params)
        start = time.perf_counter()
        lowered = jax.jit(step, compiler_options=compiler_options).lower(
            key, problem.params, state, problem.batch
        )
        compiled[name] = (lowered.compile(), state)
        seconds = time.perf_counter() - start
        temporary = compiled[name][0].memory_analysis().temp_size_in_bytes
        size = 4 * problem.num_parameters
        rows[name] = {"compile_seconds": seconds, "temporary": temporary / size}
    times = {name: [] for name in compiled}
    for repeat in tqdm.trange(repeats + 1, desc=f"run {problem.name}"):
        for name, (step, state) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(step(key, problem.params, state, problem.batch))
            if repeat:
                times[name].append(time.perf_counter() - start)
    return summarize(times, rows)


def summarize(times, rows, reference="plain"):
    """Quartiles of step times and of their ratios to the reference."""
    for name, values in times.items():
        row = rows.setdefault(name, {})
        row["seconds"] = quartiles(values)
        row["over_plain"] = quartiles(np.divide(values, times[reference]))
        floor = "floor " + name.rsplit(" ", 1)[-1]
        if floor in times and name != floor:
            row["over_floor"] = quartiles(np.divide(values, times[floor]))
        if "optax SAM" in times and name.startswith("NSO"):
            row["over_sam"] = quartiles(np.divide(values, times["optax SAM"]))
    return rows


def quartiles(values):
    return [float(q) for q in np.percentile(values, [25, 50, 75])]
