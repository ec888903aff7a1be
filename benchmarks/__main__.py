"""Measure every contender; write JSON and ``docs/benchmarks.md`` from it."""

import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys

import flax
import jax
import optax
import tyro

import flatopt
from benchmarks import contenders as c
from benchmarks import render
from benchmarks.measure import LOOK, measure, summarize
from benchmarks.problems import make_problem
from flatopt import kernels

ROOT = pathlib.Path(__file__).parent.parent
MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclasses.dataclass
class Config:
    """Settings of a run."""

    repeats: int = 20
    """Rounds of each problem; ResNet-18 gets a fourth of them."""
    problems: tuple[str, ...] = ("mlp", "cnn", "transformer", "resnet18")
    """Problems to measure."""
    torch: bool = True
    """Whether to measure the PyTorch loops too."""
    growth: bool = True
    """Whether to measure growth with samples, parameters and batch size."""
    results: pathlib.Path = ROOT / "docs" / "results" / "benchmarks_cpu.json"
    """Where the figures go."""
    page: pathlib.Path = ROOT / "docs" / "benchmarks.md"
    """Where the page goes."""


def lpf_contenders(strategy, names):
    return {f"LPF-SGD {name}, {strategy}": c.lpf(name, strategy) for name in names}


def suite(problem_name):
    """The contenders of one problem, and its batch size."""
    pairs = {
        "optax SAM": c.optax_sam,
        "SAM": c.sam,
        "NSO signs": c.nso(kernels.signs),
        "NSO normal": c.nso(kernels.normal),
        LOOK[0]: c.look_sam(0),
        LOOK[1]: c.look_sam(1),
    }
    few = ["no noise", "copy", "signs", "shared", "normal"]
    if problem_name == "mlp":
        chunks = lpf_contenders("scan", [*few, "jax.random.normal"])
        chunks |= lpf_contenders("unroll", ["no noise", "signs"])
        chunks |= lpf_contenders("vmap", ["no noise", "signs"])
        return {"plain": c.plain, **chunks, **pairs}, 64
    if problem_name == "cnn":
        chunks = lpf_contenders("unroll", [*few, "jax.random.normal"])
        chunks |= lpf_contenders("scan", ["no noise", "copy", "signs", "normal"])
        chunks |= lpf_contenders("vmap", ["no noise", "signs"])
        return {"plain": c.plain, **chunks, **pairs}, 64
    if problem_name == "transformer":
        chunks = lpf_contenders("scan", few)
        chunks |= lpf_contenders("unroll", ["no noise", "signs"])
        return {"plain": c.plain, **chunks, **pairs}, 32
    chunks = lpf_contenders("scan", few)
    chunks |= lpf_contenders("unroll", ["no noise", "signs"])
    return {"plain": c.plain, **chunks, **pairs}, 16


def growth(repeats):
    """LPF-SGD with signs in a loop, against samples, parameters and batch size."""
    rows = {"samples": {}, "width": {}, "batch": {}}
    for num_samples in (1, 2, 4, 8, 16, 32):
        rows["samples"][num_samples] = _ratio(make_problem("mlp"), num_samples, repeats)
    for batch_size in (16, 64, 256):
        problem = make_problem("mlp", batch_size)
        rows["batch"][batch_size] = _ratio(problem, 8, repeats)
    for width in (64, 128, 256, 512):
        problem = make_problem("transformer", 16, width=width)
        rows["width"][problem.num_parameters] = _ratio(problem, 8, repeats)
    return rows


def _ratio(problem, num_samples, repeats):
    found = measure(
        problem,
        {
            "plain": c.plain,
            "LPF-SGD no noise, scan": c.lpf("no noise", "scan", num_samples),
            "LPF-SGD signs, scan": c.lpf("signs", "scan", num_samples),
        },
        repeats,
    )["LPF-SGD signs, scan"]
    return {"over_plain": found["over_plain"], "over_floor": found["over_floor"]}


def torch_rows(name, repeats):
    command = [sys.executable, "-m", "benchmarks.torch_loops", name, str(repeats)]
    result = subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    report = json.loads(result.stdout)
    return {"version": report["version"], "rows": summarize(report["times"], {})}


def main(config: Config) -> None:
    report = {
        "hardware": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
        },
        "versions": {
            "flatopt": flatopt.__version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "flax": flax.__version__,
            "python": platform.python_version(),
        },
        "repeats": config.repeats,
        "problems": {},
    }
    for name in config.problems:
        entries, batch_size = suite(name)
        problem = make_problem(name, batch_size)
        repeats = max(config.repeats // (4 if name == "resnet18" else 1), 1)
        rows = measure(problem, entries, repeats)
        report["problems"][name] = {
            "num_parameters": problem.num_parameters,
            "batch_size": batch_size,
            "rows": rows,
        }
        if name in ("mlp", "cnn"):
            memory = measure(problem, entries, 0, compiler_options=MEMORY)
            for contender, row in memory.items():
                rows[contender]["temporary_memory_scheduler"] = row["temporary"]
            if config.torch:
                report["problems"][name]["torch"] = torch_rows(name, repeats)
    if config.growth:
        report["growth"] = growth(max(config.repeats // 2, 1))
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(report, indent=1) + "\n")
    render.write(config.results, config.page)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
