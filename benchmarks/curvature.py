"""Curvature products and traces against curvlinops and PyHessian: ``make bench-curvature``.

Writes ``docs/results/curvature_cpu.json`` and renders it into ``docs/benchmarks.md``.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import optax
import scipy.stats
import tqdm
import tyro
from flax import nnx

from benchmarks import problems, render
from flatopt import curvature
from flatopt._core import blocks
from flatopt.curvature import _draws, _operator

ROOT = pathlib.Path(__file__).parent.parent
BATCH = {"mlp": 256, "cnn": 64, "words": 256}
PROBES = 8
RTOL = 0.02


@dataclasses.dataclass
class Config:
    """Settings of a run."""

    networks: tuple[str, ...] = tuple(BATCH)
    """Which to measure; the others keep their figures."""
    repeats: int = 8
    """Rounds of each network."""
    training_steps: int = 60
    """Steps of SGD before the measurement."""
    trace: bool = True
    """Time traces to a precision, too; minutes where words are many."""
    results: pathlib.Path = ROOT / "docs" / "results" / "curvature_cpu.json"
    """Where the figures go."""


def train(problem, steps):
    tx = optax.sgd(0.02, momentum=0.9)

    @jax.jit
    def step(params, state):
        grads = jax.grad(problem.value_fn)(params, **problem.batch)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, state = problem.params, tx.init(problem.params)
    for _ in range(steps):
        params, state = step(params, state)
    return problem._replace(params=params)


def save(problem, path):
    """Weights in the order of the layers, for PyTorch."""
    params = problem.params
    if problem.name in ("mlp", "words"):
        layers = [params["layers"][i] for i in sorted(params["layers"])]
        layers = [params[name] for name in ("embed",) if name in params] + layers
    else:
        layers = []
        for i in sorted(params["convolutions"]):
            layers += [params["convolutions"][i], params["norms"][i]]
    arrays = {}
    for index, layer in enumerate([*layers, params["head"]]):
        (kind,) = layer.keys() - {"bias"}
        arrays[f"weight{index}"] = layer[kind]
        if "bias" in layer:
            arrays[f"bias{index}"] = layer["bias"]
    np.savez(path, **arrays, **problem.batch)


def contenders(problem):
    graphdef, _ = nnx.split(problems.NETWORKS[problem.name](nnx.Rngs(0)))

    def loss_fn(params, batch):
        return problem.value_fn(params, **batch)

    def model_fn(params, inputs):
        return nnx.merge(graphdef, params)(inputs)

    def output_loss(outputs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    pair = problem.batch["inputs"], problem.batch["labels"]
    hessian = curvature.hessian(loss_fn, problem.params, problem.batch)
    newton = curvature.gauss_newton(model_fn, output_loss, problem.params, pair)
    gradient = jax.jit(jax.grad(loss_fn))
    keys = _draws.probe_keys(jax.random.key(0), 0, 2 * PROBES)
    block = _draws.draw_signs(hessian, keys[:PROBES])
    one = jax.tree.map(lambda x: x[:1], block)
    nothing = blocks.zeros(hessian.like, 0)
    return hessian, {
        "gradient": (lambda: gradient(problem.params, problem.batch), 1),
        "Hessian": (lambda: _operator.products(hessian, one), 1),
        "Hessian, 8 vectors": (lambda: _operator.products(hessian, block), PROBES),
        "Gauss-Newton": (lambda: _operator.products(newton, one), 1),
        "Gauss-Newton, 8 vectors": (lambda: _operator.products(newton, block), PROBES),
        "quadratic form of the Hessian": (
            lambda: _operator.quadratics(hessian, keys, _operator.drawn, nothing),
            2 * PROBES,
        ),
        "quadratic form of Gauss-Newton": (
            lambda: _operator.quadratics(newton, one),
            1,
        ),
    }


def measure(name, config):
    problem = train(problems.make_problem(name, BATCH[name]), config.training_steps)
    hessian, entries = contenders(problem)
    times = {contender: [] for contender in entries}
    for repeat in tqdm.trange(config.repeats + 1, desc=name):
        for contender, (run, count) in entries.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                times[contender].append((time.perf_counter() - start) / count)
    trace = to_precision(hessian) if config.trace else None
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "network.npz"
        save(problem, path)
        command = [sys.executable, "-m", "benchmarks.torch_curvature", name, str(path)]
        result = subprocess.run(
            [*command, str(config.repeats)],
            check=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
    peer = json.loads(result.stdout.splitlines()[-1])
    loss = float(problem.value_fn(problem.params, **problem.batch))
    return {
        "batch_size": BATCH[name],
        "training_steps": config.training_steps,
        "num_parameters": problem.num_parameters,
        "times": times,
        "peer": peer,
        "loss": loss,
        "trace": trace,
        "memory": memory(hessian),
    }


def to_precision(hessian):
    """Seconds until the 95 % interval of the trace is within 2 %, compiled before."""
    runs = []
    for seed in range(4):
        start = time.perf_counter()
        found = curvature.trace(hessian, jax.random.key(seed), 16, rtol=RTOL)
        seconds = time.perf_counter() - start
        if seed:
            runs.append({"seconds": seconds, "probes": found.num_probes})
    plain = curvature.trace(hessian, jax.random.key(9), 256, num_deflated=0)
    deviation = float(plain.standard_error) * 256**0.5 / abs(float(plain.value))
    quantile = scipy.stats.norm.ppf(0.975)
    return {
        "value": float(found.value),
        "runs": runs,
        "deviation_of_one_probe": deviation,
        "hutchinson_probes_needed": float((quantile * deviation / RTOL) ** 2),
    }


def memory(hessian):
    """Temporary memory of a probe in parameter sizes, by the number of probes."""
    found = {}
    for count in (16, 256):
        probe = jax.jit(lambda o, k, n=count: curvature.probe(o, k, n))
        compiled = probe.lower(hessian, jax.random.key(0)).compile()
        size = 4 * blocks.size(hessian.like)
        found[count] = compiled.memory_analysis().temp_size_in_bytes / size
    return found


def main(config: Config) -> None:
    report = {}
    if config.results.exists():
        report = json.loads(config.results.read_text())
    report |= {name: measure(name, config) for name in config.networks}
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(report, indent=1) + "\n")
    render.write(ROOT / "docs/results/benchmarks_cpu.json", ROOT / "docs/benchmarks.md")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
