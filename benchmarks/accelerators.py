"""Compile training steps for a TPU v5e or an H100 that is not here, and read the programs.

The compilers of JAX run on a CPU. Nothing is executed: figures are the compiler's own
or counted in the program, and are the same on every run of the same versions.

Examples: python -m benchmarks.accelerators --problems mlp --rows plain "NSO signs"
          python -m benchmarks.accelerators --target h100
"""

import argparse
import json
import os
import pathlib
import sys
import time

# For libtpu, which would look for a chip: before JAX is imported.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # beside another process
)

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import flatopt
from benchmarks import contenders as c
from benchmarks import hlo, layouts, roofline
from benchmarks.collectives import count_collectives
from benchmarks.large import NAMES, make_large
from flatopt import kernels

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "accelerators.json"
H100 = """gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SHARDED = "transformer, 4 chips"


def ivon(problem):
    """IVON: a whole optimizer."""
    tx = flatopt.ivon(0.1, 50_000.0, num_samples=8, batch_argnames=c.BATCH)
    return c.whole(tx, problem)


# Rows: the contender, and the generator of its key. "rbg" draws in the hardware.
ROWS = {
    "plain": (c.plain, None),
    "LPF no noise, scan": (c.lpf("no noise", "scan"), None),
    "LPF signs, scan": (c.lpf("signs", "scan"), None),
    "LPF normal, scan": (c.lpf("normal", "scan"), None),
    "NSO normal": (c.nso(kernels.normal), None),
    "NSO signs": (c.nso(kernels.signs), None),
    "SAM": (c.sam, None),
    "LPF signs, auto": (c.lpf("signs", "auto"), None),
    "LPF normal, auto": (c.lpf("normal", "auto"), None),
    "LPF signs, vmap": (c.lpf("signs", "vmap"), None),
    "LPF normal, vmap": (c.lpf("normal", "vmap"), None),
    "LPF shared, scan": (c.lpf("shared", "scan"), None),
    "LPF signs, scan, rbg key": (c.lpf("signs", "scan"), "rbg"),
    "LPF normal, scan, rbg key": (c.lpf("normal", "scan"), "rbg"),
    "LPF normal, auto, rbg key": (c.lpf("normal", "auto"), "rbg"),
    "LPF no noise, vmap": (c.lpf("no noise", "vmap"), None),
    "LPF signs, scan, 2 chunks": (c.lpf("signs", "scan", 2), None),
    "LPF signs, vmap, 2 chunks": (c.lpf("signs", "vmap", 2), None),
    "LPF signs, scan, 4 chunks": (c.lpf("signs", "scan", 4), None),
    "IVON": (ivon, None),
}
# Minutes each: without --rows these alone.
FEW = {
    "resnet18": ("plain", "LPF no noise, scan", "LPF signs, scan", "NSO signs"),
    SHARDED: ("plain", "LPF signs, scan", "NSO signs"),
}
FEW |= {name: ("plain", "LPF signs, scan", "LPF signs, vmap") for name in layouts.NAMES}


def find_topology(target):
    """The devices of a target that is not here."""
    if target == "tpu":
        return topologies.get_topology_desc("v5e:2x2", platform="tpu")
    return topologies.get_topology_desc(
        topology_name="h100", platform="cuda", topology="1x1x1", target_config=H100
    )


def make_mesh(topology, name):
    """All devices of a topology on one axis."""
    return jax.sharding.Mesh(np.array(topology.devices), (name,))


def place(tree, sharding):
    """Shapes with a sharding, or ``sharding(leaf)``, of devices that are not here."""

    def one(x):
        found = sharding(x) if callable(sharding) else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=found)

    return jax.tree.map(one, tree)


def compile_step(problem, make, topology, generator=None, is_sharded=False):
    """Compile a step, its parameters and state donated; FSDP if ``is_sharded``."""
    tx, step = make(problem)
    key = jax.eval_shape(lambda: jax.random.key(0, impl=generator))
    state = jax.eval_shape(tx.init, problem.params)
    arguments = (key, problem.params, state, problem.batch)
    if not is_sharded:
        one = SingleDeviceSharding(topology.devices[0])
        arguments = place(arguments, one)
        return jax.jit(step, donate_argnums=(1, 2)).lower(*arguments).compile()
    mesh = make_mesh(topology, "chips")
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("chips"))

    def split(x):
        if x.ndim < 2 or x.shape[-2] % 4:
            return whole
        return NamedSharding(mesh, P(*[None] * (x.ndim - 2), "chips"))

    key, params, state, batch = arguments
    key, batch = place(key, whole), place(batch, rows)
    params, state = place((params, state), split)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=shardings)
    return jitted.lower(key, params, state, batch).compile()


def measure(compiled, target):
    """What the compiler tells of a program, and what is counted in it."""
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "allocated_bytes": getattr(memory, "total_allocation_bytes", None),
        "alias_bytes": memory.alias_size_in_bytes,
    } | count(compiled.as_text(), target)


def count(text, target):
    """What is counted in a program. Cycles are estimated by the TPU's compiler alone."""
    program = hlo.Program(text)
    return {
        "cycles": program.cycles() if target == "tpu" else None,
        "roofline_seconds": roofline.seconds(program, roofline.CHIPS[target]),
        "matrix_flops": roofline.total_matrix_flops(program),
        "bytes_moved": program.bytes_moved(),
        "kernels": program.kernels(),
        "collectives": count_collectives(text),
    }


def problem_named(name):
    if name == SHARDED:
        # As many sequences a chip as on one chip, in as many chunks.
        return make_large("transformer", abstract=True, batch_size=32)
    if name in layouts.NAMES:
        return layouts.make(name)
    return make_large(name, abstract=True)


def versions(target):
    import importlib.metadata

    package = {"tpu": "libtpu", "h100": "jax-cuda13-plugin"}[target]
    return {
        "flatopt": flatopt.__version__,
        "jax": jax.__version__,
        package: importlib.metadata.version(package),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    names = [*NAMES, SHARDED, *layouts.NAMES]
    add("--target", choices=["tpu", "h100"], default="tpu")
    add("--problems", nargs="+", choices=names, default=names)
    add(
        "--rows", nargs="+", choices=list(ROWS), help="all if absent; few of those slow"
    )
    add("--results", type=pathlib.Path, default=RESULTS)
    add("--programs", type=pathlib.Path, help="a folder that keeps the programs' texts")
    arguments = parser.parse_args(argv)
    topology = find_topology(arguments.target)
    path, report = arguments.results, {}
    if path.exists():
        report = json.loads(path.read_text())
    target = report.setdefault(arguments.target, {"problems": {}})
    target["versions"] = versions(arguments.target)
    for name in arguments.problems:
        if arguments.target == "h100" and name == SHARDED:
            continue
        problem = problem_named(name)
        found = target["problems"].setdefault(name, {"rows": {}})
        found["num_parameters"] = problem.num_parameters
        found["batch_size"] = len(problem.batch["labels"])
        if name != SHARDED:
            found["rule"] = layouts.rule_for(problem, arguments.target)
        for row in arguments.rows or FEW.get(name, ROWS):
            make, generator = ROWS[row]
            start = time.perf_counter()
            try:
                compiled = compile_step(
                    problem, make, topology, generator, name == SHARDED
                )
                figures = measure(compiled, arguments.target)
                if arguments.programs:
                    kept = arguments.programs / f"{arguments.target}, {name}, {row}.txt"
                    kept.write_text(compiled.as_text())
            except Exception as error:  # the other rows go on
                text = f"{type(error).__name__}: {error}"
                figures = {"error": text.splitlines()[0][:300]}
            figures["compile_seconds"] = round(time.perf_counter() - start, 1)
            found["rows"][row] = figures
            print(name, row, json.dumps(figures), file=sys.stderr, flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    if path == RESULTS:
        from benchmarks import render_accelerators

        render_accelerators.write()


if __name__ == "__main__":
    main()
