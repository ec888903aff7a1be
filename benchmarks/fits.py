"""Whether the training steps of the examples fit a TPU v5e, at full size: nothing is run.

Each step is compiled by the chip's own compiler, which says how much memory it takes.

Example: python -m benchmarks.fits --steps "cifar10.py, nso"
"""

import argparse
import ast
import contextlib
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

import flatopt
from benchmarks import accelerators

EXAMPLES = accelerators.ROOT / "examples"
KINDS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
CONSTANTS = {
    "MEAN",
    "STD",
    "SMOKE",
    "LEARNING_RATE",
    "WEIGHT_DECAY",
    "WIDTH",
    "BLOCKS",
    "BATCH_SIZE",
    "length",
    "make_model",
}


def definitions(path):
    """The functions, classes and constants of a script, of which nothing else is run."""
    space = {"__name__": path.stem}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            targets = {
                x.id for x in ast.walk(node.targets[0]) if isinstance(x, ast.Name)
            }
            is_wanted = targets <= CONSTANTS
        else:
            is_wanted = isinstance(node, KINDS)
        if is_wanted:
            with contextlib.suppress(ImportError):  # of what a step does not need
                exec(compile(ast.Module([node], []), str(path), "exec"), space)
    return space


def flax_step(step, make_model, tx, batch, wrt=nnx.Param):
    """A step of a Flax example as a function of arrays, and its arguments as shapes."""

    def make():
        model = make_model()
        return model, nnx.Optimizer(model, tx, wrt=wrt)

    graphdef, state = nnx.split(nnx.eval_shape(make))

    def run(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        loss = step(model, optimizer, batch)
        return nnx.state((model, optimizer)), loss

    return run, (state, batch)


def images(batch_size):
    """A batch of CIFAR-10 as shapes."""
    shape = jax.ShapeDtypeStruct
    return {
        "images": shape((batch_size, 32, 32, 3), jnp.uint8),
        "labels": shape((batch_size,), jnp.int32),
    }


def cifar10(method):
    """A step of ``examples/cifar10.py`` with its own settings."""
    space = definitions(EXAMPLES / "cifar10.py")
    config = space["Config"]()
    tx = space["make_transformation"](method, config, 1000)
    step = space["plain_step" if method == "sgd" else "flat_step"]
    make_model = lambda: space["make_model"](config)  # noqa: E731
    return flax_step(step, make_model, tx, images(config.batch_size))


def cifar10_notebook(method):
    """A step of the notebook, in bfloat16 as on a TPU; the whole batch on one chip."""
    space = definitions(EXAMPLES / "notebooks" / "cifar10_resnet18.py")
    tx = space["make_transformation"](method, 1000)
    step = space["plain_step" if method == "SGD" else "flat_step"]
    options = space["WIDTH"], space["BLOCKS"], jnp.bfloat16
    make_model = lambda: space["ResNet"](*options, nnx.Rngs(0))  # noqa: E731
    return flax_step(step, make_model, tx, images(space["BATCH_SIZE"]))


def lora_notebook():
    """NSO on the LoRA matrices alone."""
    space = definitions(EXAMPLES / "notebooks" / "finetune_lora.py")
    tokens = jax.ShapeDtypeStruct((32, space["length"] + 1), jnp.int32)
    tx = flatopt.nso_adamw(3e-3, sigma=0.02)
    return flax_step(space["nso_step"], space["make_model"], tx, tokens, nnx.LoRAParam)


STEPS = {
    "cifar10.py, nso": lambda: cifar10("nso"),
    "cifar10.py, lpf_sgd": lambda: cifar10("lpf_sgd"),
    "cifar10.py, sam": lambda: cifar10("sam"),
    "cifar10.py, sgd": lambda: cifar10("sgd"),
    "cifar10_resnet18.ipynb, NSO": lambda: cifar10_notebook("NSO"),
    "cifar10_resnet18.ipynb, LPF-SGD": lambda: cifar10_notebook("LPF-SGD"),
    "cifar10_resnet18.ipynb, SAM": lambda: cifar10_notebook("SAM"),
    "finetune_lora.ipynb, NSO": lora_notebook,
}


def measure(make, topology):
    """Bytes that a step takes, by the compiler."""
    run, arguments = make()
    arguments = accelerators.place(arguments, SingleDeviceSharding(topology.devices[0]))
    compiled = jax.jit(run, donate_argnums=0).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "allocated_bytes": memory.total_allocation_bytes,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--results", type=pathlib.Path, default=accelerators.RESULTS)
    arguments = parser.parse_args(argv)
    sys.path.insert(0, str(EXAMPLES))
    path, topology = arguments.results, accelerators.find_topology("tpu")
    report = json.loads(path.read_text()) if path.exists() else {}
    found = report.setdefault("tpu", {"problems": {}}).setdefault("examples", {})
    report["tpu"]["versions"] = accelerators.versions("tpu")
    for name in arguments.steps:
        start = time.perf_counter()
        figures = measure(STEPS[name], topology)
        figures["compile_seconds"] = round(time.perf_counter() - start, 1)
        found[name] = figures
        print(name, json.dumps(figures), file=sys.stderr, flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    if path == accelerators.RESULTS:
        from benchmarks import render_accelerators

        render_accelerators.write()


if __name__ == "__main__":
    main()
