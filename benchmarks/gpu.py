"""Measure training steps on a GPU, and train ResNet-18 on CIFAR-10 if data are given.

Each part runs in a process of its own with a share of the time, and writes its figures as
they come: a part that fails, or is stopped at its limit, leaves what it had. Needs jax with
its CUDA plugin, optax, flax, scipy and tqdm alone.

Example: python -m benchmarks.gpu --data-dir cifar-10-batches-bin
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "gpu.json"
TRAINING = "cifar10"
# What a part may take of the time, beside the others'.
SHARES = {"mlp": 1.0, "transformer": 1.5, "resnet18": 2.5, TRAINING: 6.0}
# Seconds past its limit at which a part is stopped: a compilation cannot be interrupted.
GRACE = 20
SECONDS_A_TIMING = 0.1


def contenders():
    """Steps to time, the most wanted first."""
    from benchmarks import contenders as c
    from flatopt import kernels

    return {
        "plain": c.plain,
        "LPF signs, auto": c.lpf("signs", "auto"),
        "LPF normal, auto": c.lpf("normal", "auto"),
        "NSO normal": c.nso(kernels.normal),
        "SAM": c.sam,
        "NSO signs": c.nso(kernels.signs),
        "LPF no noise, auto": c.lpf("no noise", "auto"),
        "LPF signs, vmap": c.lpf("signs", "vmap"),
        "LPF signs, scan": c.lpf("signs", "scan"),
    }


# Timing


class Row:
    """One contender: its compiled step, its state, its times."""

    def __init__(self, problem, make):
        import jax

        self.problem, self.times = problem, []
        tx, step = make(problem)
        self.start = problem.params, jax.jit(tx.init)(problem.params)
        begin = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(1, 2)).lower(
            jax.random.key(0), *self.start, problem.batch
        )
        self.compiled = lowered.compile()
        self.figures = {"compile_seconds": time.perf_counter() - begin}
        self.figures |= compiled_memory(self.compiled)
        before = device_peak()
        self.num_steps = 1
        self.run()  # the first run loads the program
        seconds = self.run()
        self.num_steps = int(np.clip(SECONDS_A_TIMING / seconds, 1, 200))
        # The device tells the highest peak of the process: a lower one is not seen.
        peak = device_peak()
        self.figures["device_peak_bytes"] = peak if peak != before else None
        self.figures["steps_a_timing"] = self.num_steps

    def run(self):
        """Seconds a step, over steps that follow each other without waiting."""
        import jax
        import jax.numpy as jnp

        key = jax.random.key(1)
        params, state = jax.block_until_ready(jax.tree.map(jnp.copy, self.start))
        begin = time.perf_counter()
        for _ in range(self.num_steps):
            params, state = self.compiled(key, params, state, self.problem.batch)
        jax.block_until_ready((params, state))
        return (time.perf_counter() - begin) / self.num_steps

    def time(self):
        self.times.append(self.run())
        self.figures["seconds"] = np.percentile(self.times, [25, 50, 75]).tolist()
        self.figures["timings"] = len(self.times)


def compiled_memory(compiled):
    memory = compiled.memory_analysis()
    names = {
        "argument_bytes": "argument_size_in_bytes",
        "output_bytes": "output_size_in_bytes",
        "alias_bytes": "alias_size_in_bytes",
        "temporary_bytes": "temp_size_in_bytes",
        "peak_bytes": "peak_memory_in_bytes",  # not in every version
    }
    return {ours: getattr(memory, theirs, None) for ours, theirs in names.items()}


def device_peak():
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def time_steps(name, arguments, report):
    """Compile and time every contender once; then all in turns while there is time."""
    from benchmarks.large import make_large

    problem = make_large(name, arguments.smoke)
    found = {
        "num_parameters": problem.num_parameters,
        "batch_size": len(problem.batch["labels"]),
        "rows": {},
    }
    rows = {}
    makers = contenders()
    for contender in arguments.contenders or makers:
        make = makers[contender]
        if time.time() > arguments.until:
            found["rows"][contender] = {"skipped": "no time was left"}
            report(found)
            continue
        print(f"{name}: {contender}", file=sys.stderr, flush=True)
        try:
            row = Row(problem, make)
            row.time()
            rows[contender] = row
            found["rows"][contender] = row.figures
        except Exception as error:  # one that does not fit, say; the rest goes on
            found["rows"][contender] = {"error": sentence(error)}
        report(found)
    for _ in range(arguments.repeats - 1):
        if time.time() > arguments.until:
            break
        for row in rows.values():
            row.time()
        report(found)


def sentence(error):
    """The kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


# The parts, each in its process


def machine():
    import flax
    import jax
    import optax

    import flatopt

    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {
            "flatopt": flatopt.__version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "flax": flax.__version__,
            "python": platform.python_version(),
        },
    }


def run_part(arguments):
    """Measure one part and write its figures, again after each of them."""
    path = pathlib.Path(arguments.part_results)

    def report(figures):
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": machine(), "figures": figures}))
        partial.replace(path)

    try:
        if arguments.part == TRAINING:
            from benchmarks import gpu_training

            gpu_training.train(arguments, report)
        else:
            time_steps(arguments.part, arguments, report)
    except Exception as error:
        done = json.loads(path.read_text())["figures"] if path.exists() else {}
        report(done | {"error": sentence(error)})
        raise


def start_part(name, limit, arguments, folder):
    """Run a part in a process; return what it wrote, and why it ended if it did not."""
    path = pathlib.Path(folder) / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name]
    command += ["--part-results", str(path), "--until", str(time.time() + limit)]
    command += ["--repeats", str(arguments.repeats), "--epochs", str(arguments.epochs)]
    command += ["--smoke"] * arguments.smoke
    for flag in ("contenders", "methods"):
        chosen = getattr(arguments, flag)
        command += [f"--{flag}", *chosen] if chosen else []
    if arguments.data_dir:
        command += ["--data-dir", str(arguments.data_dir.absolute())]
    ending = None
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=limit + GRACE).returncode
        ending = f"the process ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        ending = f"stopped at its limit of {limit:.0f} s"
    part = json.loads(path.read_text()) if path.exists() else {"figures": {}}
    if ending:
        part["figures"].setdefault("error", ending)
    return part


def main(argv=None):
    arguments = parse(argv)
    if arguments.part:
        return run_part(arguments)
    check(arguments)
    parts = [n for n in arguments.parts if n != TRAINING or arguments.data_dir]
    deadline = time.time() + 60 * arguments.minutes - GRACE
    report = {"parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(parts):
            left = deadline - time.time()
            share = SHARES[name] / sum(SHARES[n] for n in parts[i:])
            if left < 0:
                report["parts"][name] = {"skipped": "no time was left"}
            else:
                part = start_part(name, share * left, arguments, folder)
                report |= {k: v for k, v in part.items() if k == "machine"}
                report["parts"][name] = part["figures"]
            write(report, arguments)
    if arguments.results == RESULTS:
        from benchmarks import render_accelerators

        render_accelerators.write()
    print(summary(report))
    failed = [name for name, part in report["parts"].items() if "error" in part]
    return f"these parts did not end well: {', '.join(failed)}." if failed else None


def write(report, arguments):
    """Write the JSON; parts measured before, with the same versions and device, stay."""
    path = arguments.results
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("machine") == report.get("machine"):
        report = report | {"parts": before["parts"] | report["parts"]}
    path.write_text(json.dumps(report, indent=1) + "\n")


def check(arguments):
    """Ask a process of its own which device there is: this one must not hold it."""
    if arguments.smoke:
        return
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = done.stdout.strip() or done.stderr.strip().splitlines()[-1:]
    if found not in ("gpu", "cuda", "rocm"):
        raise SystemExit(
            f"there must be a GPU that JAX sees, got {found!r}; install jax[cuda13], or "
            "give --smoke to try the program on a CPU."
        )
    if arguments.data_dir and not arguments.data_dir.is_dir():
        raise SystemExit(f"--data-dir must be a folder, got {arguments.data_dir}.")


def summary(report):
    """A line a row: milliseconds, times plain, temporaries."""
    lines = []
    for name, part in report["parts"].items():
        lines.append(f"{name}: {part.get('error') or part.get('skipped') or 'done'}")
        for contender, row in part.get("rows", {}).items():
            text = row.get("error") or row.get("skipped")
            if text is None:
                plain = part["rows"].get("plain", {}).get("seconds")
                ratio = f"{row['seconds'][1] / plain[1]:6.2f}" if plain else "     –"
                text = f"{1e3 * row['seconds'][1]:9.3f} ms {ratio} times plain"
                text += f"  {(row['temporary_bytes'] or np.nan) / 1e6:8.0f} MB"
            lines.append(f"  {contender:24}{text}")
        for method, row in part.get("methods", {}).items():
            last = row["accuracies"][-1] if row.get("accuracies") else float("nan")
            text = f"{100 * last:6.2f} % after {len(row.get('accuracies', []))} epochs"
            lines.append(f"  {method:24}{row.get('error') or text}")
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="time for everything")
    add("--data-dir", type=pathlib.Path, help="folder of CIFAR-10, to train on it too")
    add("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    add("--results", type=pathlib.Path, default=RESULTS, help="where the JSON goes")
    add("--contenders", nargs="+", help="steps to time, by name; all of them if absent")
    add("--methods", nargs="+", help="methods to train by, by name; all if absent")
    add("--repeats", type=int, default=20, help="timings of each step, at most")
    add("--epochs", type=int, default=12, help="epochs of each training")
    add("--smoke", action="store_true", help="tiny problems, also without a GPU")
    add("--part", choices=list(SHARES), help=argparse.SUPPRESS)
    add("--part-results", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.smoke and arguments.results == RESULTS:
        arguments.results = ROOT / "results" / "gpu_smoke.json"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
