"""Plan the curvature of a language model from its shapes: ``make bench-language``.

Compiles measurements of a Transformer of 12 layers and 50,000 words for this CPU, for one
TPU chip and for four, and writes their memory into ``docs/results/language.json``. Nothing
of that size is made, and no TPU is needed; without jax[tpu] give ``--targets cpu``.
"""

import argparse
import contextlib
import dataclasses
import inspect
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import flatopt
from benchmarks.large import Decoder
from flatopt import curvature, stability
from flatopt._core import risk, sharding
from flatopt.curvature import _operator

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results" / "language.json"
MODEL = Decoder(vocabulary=50_000)  # on several chips with its activations pinned
BATCH = 8
STREAMED = "Gauss-Newton product, streamed"
TARGETS = {"cpu": 1, "v5e, 1 chip": 1, "v5e, 4 chips": 4}


def loss_fn(params, batch):
    return MODEL.value_fn(params, *batch)


def newton(params, batch):
    return curvature.gauss_newton(MODEL.model_fn, MODEL.loss_fn, params, batch)


def hessian(params, batch):
    return curvature.hessian(loss_fn, params, batch)


def fisher(params, batch):
    return curvature.empirical_fisher(loss_fn, params, batch)


# The names of arguments say what is given; vectors are like the parameters, in float32.


def product(matrix):
    return lambda params, batch, vector: matrix(params, batch).matvec(vector)


def form(matrix):
    return lambda params, batch, vector: matrix(params, batch).quadratic_form(vector)


def probes(measure, num_deflated):
    return lambda params, batch, key: measure(
        newton(params, batch), key, num_deflated=num_deflated
    )


def streamed(params, batch, vector, total):
    """A batch of a data loader is added to the sum of those before."""
    kind = newton(params, batch).kind
    block, total = (jax.tree.map(lambda x: x[None], tree) for tree in (vector, total))
    total = jnp.zeros(()), jnp.zeros(()), (total, ())
    function = _operator.Products(kind, sharding.ALIKE)
    return risk.add_weighted(function, total, jnp.float32(1), params, batch, block)


def critical(params, batch, vector):
    return stability.critical_learning_rate(loss_fn, params, vector, batch).rate


ROWS = {
    "gradient": lambda params, batch: jax.grad(loss_fn)(params, batch),
    "Gauss-Newton product": product(newton),
    STREAMED: streamed,
    "Gauss-Newton quadratic form": form(newton),
    "empirical Fisher product": product(fisher),
    "Hessian product": product(hessian),
    "Hessian quadratic form": form(hessian),
    "trace, 32 probes": probes(curvature.trace, 0),
    "trace, 32 probes, 4 directions": probes(curvature.trace, 4),
    "probe, 32 probes, 4 directions": probes(curvature.probe, 4),
    "critical learning rate": critical,
}


def devices(target):
    """The devices of a target; TPUs that are not here."""
    if target == "cpu":
        return jax.devices("cpu")[:1]
    from benchmarks.accelerators import find_topology

    return find_topology("tpu").devices[: TARGETS[target]]


def shapes(target, mesh):
    """Arguments by name; on several chips parameters and batch are split over all."""
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, MODEL.length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if mesh is None:
        one = SingleDeviceSharding(devices(target)[0])
        params, tokens, key = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
            (params, tokens, key),
        )
        return _named(params, tokens, key)

    def place(x, spec):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    def split(x):
        return place(x, P(*[None] * (x.ndim - 2), "chips") if x.ndim > 1 else P())

    params, tokens = jax.tree.map(split, params), place(tokens, P("chips"))
    return _named(params, tokens, place(key, P()))


def _named(params, tokens, key):
    vectors = dict.fromkeys(("params", "vector", "total"), params)
    return vectors | {"batch": (tokens, tokens), "key": key}


def mesh_of(target):
    """All chips of a target on one axis; None for one chip."""
    if TARGETS[target] == 1:
        return None
    return jax.sharding.Mesh(np.array(devices(target)), ("chips",))


@contextlib.contextmanager
def pinned(mesh):
    """Within, the model keeps the activations of an example where the example lies."""
    global MODEL
    plain = MODEL
    if mesh is not None:
        MODEL = dataclasses.replace(plain, sharding=NamedSharding(mesh, P("chips")))
    try:
        yield
    finally:
        MODEL = plain


def measure(target, row):
    start = time.perf_counter()
    mesh = mesh_of(target)
    given = shapes(target, mesh)
    arguments = [given[name] for name in inspect.signature(ROWS[row]).parameters]
    options = {"donate_argnums": 3} if row == STREAMED else {}
    if mesh is not None and row == "gradient":  # as an optimizer asks for it
        options["out_shardings"] = jax.tree.map(lambda x: x.sharding, given["params"])
    with pinned(mesh):
        lowered = jax.jit(ROWS[row], **options).lower(*arguments)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    figures = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return figures | {"compile_seconds": round(time.perf_counter() - start, 1)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--targets", nargs="+", choices=list(TARGETS), default=[*TARGETS]
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=[*ROWS])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    path = arguments.results
    report = json.loads(path.read_text()) if path.exists() else {"targets": {}}
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    report |= {
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "num_logits": BATCH * MODEL.length * MODEL.vocabulary,
        "batch_size": BATCH,
        "length": MODEL.length,
        "versions": {"flatopt": flatopt.__version__},
    }
    for target in arguments.targets:
        found = report["targets"].setdefault(
            target, {"jax": jax.__version__, "rows": {}}
        )
        for row in arguments.rows:
            try:
                figures = measure(target, row)
            except Exception as error:  # the other rows go on
                figures = {"error": f"{type(error).__name__}: {error}"[:300]}
            found["rows"][row] = figures
            print(target, row, json.dumps(figures), file=sys.stderr, flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
