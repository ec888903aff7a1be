"""Plan a training step of a large model on many chips, without allocating it.

The step is compiled from shapes, by the compiler of a TPU v5e that is not here or by
the CPU's: ``make bench-planning``, or ``python -m benchmarks.planning --targets cpu``.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt
from benchmarks.collectives import count_collectives

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results" / "planning.json"
TARGETS = ("tpu", "cpu")
CHIPS = ("rows", "columns")  # of the grid that the chips form
SEQUENCES_A_CHIP = 4
NUM_CHUNKS = 4
OPTIONS = {  # of the compilers
    "tpu": {},
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
}


def _filter_axes(path, leaf):
    """Layers are stacked along the first axis; filters of a matrix are its columns."""
    del path
    return (0, leaf.ndim - 1) if leaf.ndim == 3 else leaf.ndim - 1


KERNEL = flatopt.kernels.filterwise(filter_axes=_filter_axes)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder Transformer; the defaults have 6.74 billion parameters.

    Weights lie over all chips. With ``in_two_steps`` their gradients are reduced over
    the rows of the grid of chips first, and then over its columns. With ``one_hot`` the
    embedding is a product: within groups of chips XLA would gather all activations of a
    group to scatter them into its gradient.
    """

    num_layers: int = 32
    width: int = 4096
    num_heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    length: int = 2048
    in_two_steps: bool = True
    one_hot: bool = False

    def shapes(self):
        d, f, n = self.width, self.hidden, self.num_layers
        layers = {
            "attention_norm": (n, d),
            "query_key_value": (n, d, 3 * d),
            "attention_out": (n, d, d),
            "mlp_norm": (n, d),
            "gate_up": (n, d, 2 * f),
            "down": (n, f, d),
        }
        ends = {"embedding": (self.vocabulary, d), "norm": (d,)}
        return {**ends, "head": (d, self.vocabulary), "layers": layers}

    def loss_fn(self, params, batch):
        """Mean cross-entropy of the next token; weights gathered layer by layer."""
        batch = jax.tree.map(_local, batch)
        params = {k: v if k == "layers" else self._own(k, v) for k, v in params.items()}
        x = _local(self._embed(params["embedding"], batch["inputs"]))

        @jax.checkpoint
        def layer(x, weights):
            weights = {name: self._own(name, w) for name, w in weights.items()}
            y = _norm(x) * weights["attention_norm"]
            x = _local(x + self._attention(y, weights))
            y = _norm(x) * weights["mlp_norm"]
            gate, up = jnp.split(_local(y @ weights["gate_up"]), 2, axis=-1)
            return _local(x + (jax.nn.silu(gate) * up) @ weights["down"]), None

        x, _ = jax.lax.scan(layer, x, params["layers"])
        logits = _local((_norm(x) * params["norm"]) @ params["head"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        ).mean()

    def _own(self, name, weight):
        """A weight, whose gradient is reduced in two steps."""
        is_split = self.in_two_steps and _is_split(name)
        return reduced_in_two_steps(weight) if is_split else weight

    def _embed(self, table, tokens):
        if not self.one_hot:
            return table[tokens]
        return jax.nn.one_hot(tokens, self.vocabulary, dtype=jnp.bfloat16) @ table

    def _attention(self, x, weights):
        count, length, _ = x.shape
        heads = _local(x @ weights["query_key_value"])
        heads = heads.reshape(count, length, 3, self.num_heads, -1)
        query, key, value = (heads[:, :, i] for i in range(3))
        size = min(256, length)

        @jax.checkpoint
        def block(start):
            q = jax.lax.dynamic_slice_in_dim(query, start, size, 1)
            scores = jnp.einsum("bqhc,bkhc->bhqk", q, key) / q.shape[-1] ** 0.5
            seen = start + jnp.arange(size)[:, None] >= jnp.arange(length)
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
            return _local(jnp.einsum("bhqk,bkhc->bqhc", weights, value))

        out = jax.lax.map(block, jnp.arange(0, length, size))
        out = jnp.moveaxis(out, 0, 1).reshape(x.shape)
        return _local(_local(out) @ weights["attention_out"])


def _norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _local(x):
    """Activations stay with their examples."""
    return jax.lax.with_sharding_constraint(x, P(CHIPS))


@jax.custom_vjp
def reduced_in_two_steps(weight):
    """The weight; its gradient is reduced over the rows, and then over all chips."""
    return weight


def _backward(_, gradient):
    for axes in ("rows", CHIPS):
        gradient = jax.lax.with_sharding_constraint(gradient, P(axes))
    return (gradient,)


reduced_in_two_steps.defvjp(lambda weight: (weight, None), _backward)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to compute the gradient of a step.

    ``gradient_fn(loss_fn, params, batch)`` is the gradient; it passes ``num_passes``
    times over the parameters. The chips form ``num_groups`` groups that hold all
    parameters each.
    """

    gradient_fn: Callable
    num_passes: int
    num_groups: int = 1
    in_two_steps: bool = True
    sequences_a_chip: int = SEQUENCES_A_CHIP

    def mesh(self, devices):
        """Groups of neighbouring rows of the grid of chips."""
        num_rows, num_columns = devices.shape
        shape = (self.num_groups, num_rows // self.num_groups, num_columns)
        types = (AxisType.Auto,) * 3
        return Mesh(devices.reshape(shape), ("draws", *CHIPS), axis_types=types)


def _smoothed(scale, kernel=None, **options):
    def gradient_fn(loss_fn, params, batch):
        f = flatopt.smooth_value_and_grad(loss_fn, scale, kernel, **options)
        return f(jax.random.key(0), params, batch=batch)[1]

    return gradient_fn


def _spread(loss_fn, params, batch):
    """Each group of chips makes one draw, for its own part of the batch."""
    f = flatopt.smooth_value_and_grad(loss_fn, 5e-4, KERNEL, axis_name="draws")
    return jax.shard_map(
        lambda params, batch: f(jax.random.key(0), params, batch=batch)[1],
        in_specs=(P(), P("draws")),
        out_specs=P(),
        axis_names={"draws"},
    )(params, batch)


def _no_noise(key, params):
    del key
    return jax.tree.map(jnp.zeros_like, params)


def _plain(loss_fn, params, batch):
    return jax.grad(loss_fn)(params, batch)


CHUNKS = {"num_samples": NUM_CHUNKS, "batch_argnames": ("batch",), "strategy": "scan"}
MICROBATCHES = f"AdamW, {NUM_CHUNKS} microbatches"
LPF = f"LPF, {NUM_CHUNKS} chunks"
IN_GROUPS = f"{LPF} in {NUM_CHUNKS} groups of chips"
ONE_STEP = "AdamW, reduced in one step"
PLANS = {
    "AdamW": Plan(_plain, 1),
    ONE_STEP: Plan(_plain, 1, in_two_steps=False),
    MICROBATCHES: Plan(_smoothed(0.0, _no_noise, **CHUNKS), NUM_CHUNKS),
    LPF: Plan(_smoothed(5e-4, KERNEL, **CHUNKS), NUM_CHUNKS),
    IN_GROUPS: Plan(_spread, 1, NUM_CHUNKS),
    "NSO, one pair": Plan(_smoothed(0.01, antithetic=True), 2),
    "NSO, 8 sequences a chip": Plan(
        _smoothed(0.01, antithetic=True), 2, sequences_a_chip=8
    ),
}


class Setup(NamedTuple):
    """A model, the chips it is trained on, and the grid that they form."""

    model: Model
    topology: str
    grid: tuple[int, int]

    @property
    def num_chips(self):
        return math.prod(self.grid)


SETUPS = {
    "1B": Setup(Model(16, 2048, 16, 5632), "v5e:4x4", (4, 4)),
    "7B": Setup(Model(), "v5e:16x16", (16, 16)),
}


def find_devices(target, setup):
    """The chips as a grid; those of a TPU that is not here in the order they lie in."""
    if target == "cpu":
        found = jax.devices("cpu")[: setup.num_chips]
    else:
        from benchmarks import accelerators  # prepares libtpu

        topology = accelerators.topologies.get_topology_desc(
            setup.topology, platform="tpu"
        )
        found = sorted(topology.devices, key=lambda device: device.coords)
    return np.array(found).reshape(setup.grid)


def compile_step(setup, plan, devices, options=None):
    """Compile a step of AdamW with the plan's gradient, from shapes alone."""
    mesh, tx = plan.mesh(devices), optax.adamw(1e-4)
    model = dataclasses.replace(
        setup.model, in_two_steps=plan.in_two_steps, one_hot=plan.num_groups > 1
    )

    def step(params, state, batch):
        grads = plan.gradient_fn(model.loss_fn, params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = _abstract(model.shapes(), mesh)
    state = place(jax.eval_shape(tx.init, params), mesh)
    tokens = jax.ShapeDtypeStruct(
        (plan.sequences_a_chip * setup.num_chips, model.length),
        jnp.int32,
        sharding=NamedSharding(mesh, P(("draws", *CHIPS))),
    )
    batch = {"inputs": tokens, "targets": tokens}
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
        return jitted.lower(params, state, batch).compile(compiler_options=options)


def _abstract(shapes, mesh):
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return place(jax.tree.map(leaf, shapes, is_leaf=is_shape), mesh)


def place(tree, mesh):
    """FSDP: matrices are split over chips along their next to last axis."""

    def place(path, x):
        is_split = any(_is_split(key.key) for key in path[-1:] if hasattr(key, "key"))
        spec = P(*[None] * (x.ndim - 2), CHIPS) if is_split else P()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map_with_path(place, tree)


def _is_split(name):
    return not name.endswith("norm")


def measure(setup, plan, devices, options=None, keep=None):
    """What the compiler tells of a step, and what is counted in the program."""
    start = time.perf_counter()
    compiled = compile_step(setup, plan, devices, options)
    seconds = time.perf_counter() - start
    if keep is not None:
        keep.write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "num_passes": plan.num_passes,
        "num_groups": plan.num_groups,
        "sequences_a_chip": plan.sequences_a_chip,
        "collectives": count_collectives(compiled.as_text()),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "allocated_bytes": getattr(memory, "total_allocation_bytes", None),
        "compile_seconds": round(seconds, 1),
    }


def describe(setup):
    """What the formula of the page needs to know of a model and its chips."""
    shapes = setup.model.shapes()
    layers = shapes.pop("layers")
    count = lambda tree: sum(math.prod(v) for k, v in tree.items() if _is_split(k))  # noqa: E731
    everything = [*shapes.values(), *layers.values()]
    return {
        "chips": setup.topology,
        "num_chips": setup.num_chips,
        "length": setup.model.length,
        "num_parameters": sum(map(math.prod, everything)),
        "num_split_in_layers": count(layers),
        "num_split_at_the_ends": count(shapes),
    }


def versions(target):
    if target == "cpu":
        return {"flatopt": flatopt.__version__, "jax": jax.__version__}
    from benchmarks import accelerators

    return accelerators.versions(target)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    add("--models", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    add("--steps", nargs="+", choices=list(PLANS), default=list(PLANS))
    add("--results", type=pathlib.Path, default=RESULTS)
    add("--programs", type=pathlib.Path, help="a folder that keeps the programs' texts")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(s.num_chips for s in SETUPS.values()))
    path = arguments.results
    report = json.loads(path.read_text()) if path.exists() else {}
    for target in arguments.targets:
        found = report.setdefault(target, {"models": {}})
        found["versions"] = versions(target)
        for name in arguments.models:
            setup = SETUPS[name]
            devices = find_devices(target, setup)
            rows = found["models"].setdefault(name, {"steps": {}})
            rows.update(describe(setup))
            for step in arguments.steps:
                folder = arguments.programs
                keep = folder and folder / f"scale-{target}, {name}, {step}.txt"
                try:
                    row = measure(setup, PLANS[step], devices, OPTIONS[target], keep)
                except jax.errors.JaxRuntimeError as error:  # too large, it may say
                    row = {"error": str(error)[:300]}
                known = rows["steps"] | {step: row}
                rows["steps"] = {x: known[x] for x in PLANS if x in known}
                print(target, name, step, json.dumps(row), file=sys.stderr, flush=True)
                path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
