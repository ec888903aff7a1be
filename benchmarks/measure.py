"""Interleaved measurements of training steps within one process."""

import time

import jax
import numpy as np
import tqdm

LOOK = ("LookSAM, looking", "LookSAM, between")


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
    if LOOK[0] in times and repeats:
        looking, between = (np.asarray(times[name]) for name in LOOK)
        times["LookSAM, average of 5"] = (looking + 4 * between) / 5
        rows["LookSAM, average of 5"] = dict(rows[LOOK[0]])
    return summarize(times, rows) if repeats else rows


def summarize(times, rows):
    """Quartiles of step times and of their ratios to the references of each row."""
    for name, values in times.items():
        row = rows.setdefault(name, {})
        row["seconds"] = quartiles(values)
        for column, reference in references(name).items():
            if reference in times and reference != name:
                row[column] = quartiles(np.divide(values, times[reference]))
    return rows


def references(name):
    """What a contender is compared with, by column."""
    found = {"over_plain": "plain"}
    if name.startswith("LPF-SGD "):
        found["over_floor"] = f"LPF-SGD no noise, {name.rsplit(', ', 1)[-1]}"
        found["over_copy"] = f"LPF-SGD copy, {name.rsplit(', ', 1)[-1]}"
    if name == "SAM" or name.startswith("NSO"):
        found["over_sam"] = "optax SAM"
    return found


def quartiles(values):
    return [float(q) for q in np.percentile(values, [25, 50, 75])]
