"""Plan one training step of a large model on many chips, without allocating it."""

import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results" / "planning.json"
NUM_CHIPS = 256
NUM_SAMPLES = 8
BATCH_SIZE = 2048
MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def _filter_axes(path, leaf):
    """Layers are stacked along the first axis; filters of a matrix are its columns."""
    del path
    return (0, leaf.ndim - 1) if leaf.ndim == 3 else leaf.ndim - 1


KERNEL = flatopt.kernels.filterwise(filter_axes=_filter_axes)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder Transformer; the defaults have 6.74 billion parameters."""

    num_layers: int = 32
    width: int = 4096
    num_heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    length: int = 2048

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
        x = _local(params["embedding"][batch["inputs"]])

        @jax.checkpoint
        def layer(x, weights):
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
    return jax.lax.with_sharding_constraint(x, P("chips"))


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

    def mesh(self):
        shape = (self.num_groups, NUM_CHIPS // self.num_groups)
        return jax.make_mesh(shape, ("draws", "chips"), axis_types=(AxisType.Auto,) * 2)


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


def _pair_in_a_loop(loss_fn, params, batch):
    """NSO by hand, the two passes one after the other."""

    def add(total, step):
        noise = flatopt.kernels.isotropic()(jax.random.key(0), params)
        moved = jax.tree.map(lambda p, u: p + step * u, params, noise)
        return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(moved, batch)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zeros, jnp.array([0.01, -0.01]))
    return jax.tree.map(lambda g: g / 2, total)


def _no_noise(key, params):
    del key
    return jax.tree.map(jnp.zeros_like, params)


CHUNKS = {"num_samples": NUM_SAMPLES, "batch_argnames": ("batch",), "strategy": "scan"}
PLANS = {
    "AdamW": Plan(lambda loss_fn, params, batch: jax.grad(loss_fn)(params, batch), 1),
    "AdamW, 8 microbatches": Plan(_smoothed(0.0, _no_noise, **CHUNKS), NUM_SAMPLES),
    "LPF, 8 chunks": Plan(_smoothed(5e-4, KERNEL, **CHUNKS), NUM_SAMPLES),
    "LPF, 8 chunks in 8 groups of chips": Plan(_spread, 1, NUM_SAMPLES),
    "NSO, one pair": Plan(_smoothed(0.01, antithetic=True), 2),
    "NSO by hand, in a loop": Plan(_pair_in_a_loop, 2),
}


def compile_step(model, plan):
    """Compile a step of AdamW with the plan's gradient, from shapes alone."""
    mesh, tx = plan.mesh(), optax.adamw(1e-4)

    def step(params, state, batch):
        grads = plan.gradient_fn(model.loss_fn, params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = _abstract(model.shapes(), mesh)
    state = _place(jax.eval_shape(tx.init, params), mesh)
    tokens = jax.ShapeDtypeStruct(
        (BATCH_SIZE, model.length),
        jnp.int32,
        sharding=NamedSharding(mesh, P(("draws", "chips"))),
    )
    batch = {"inputs": tokens, "targets": tokens}
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
        return jitted.lower(params, state, batch).compile(compiler_options=MEMORY)


def _abstract(shapes, mesh):
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return _place(jax.tree.map(leaf, shapes, is_leaf=is_shape), mesh)


def _place(tree, mesh):
    """FSDP: matrices are split over chips along their next to last axis."""

    def place(x):
        spec = P(*[None] * (x.ndim - 2), "chips") if _is_split(x.shape) else P()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(place, tree)


def _is_split(shape):
    return len(shape) >= 2 and shape[-2] % NUM_CHIPS == 0


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(
    rf"= (.*?) ({KINDS})(?:-start)?\(.*?replica_groups=(\S+(?: {{'.*?}})?)"
)
CALL = re.compile(r"(?:body|calls|to_apply|\w+_computation)=%?([\w.-]+)")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "s64": 8, "u64": 8}


def collectives(text):
    """Count and bytes of results of the collectives that a compiled step runs.

    Those in loops count once a round. The key names the kind and the number of chips
    that take part together.
    """
    bodies, entry, lines = {}, None, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif lines is not None:
            lines.append(line)
    found = {}

    def visit(name, times):
        for line in bodies[name]:
            if match := COLLECTIVE.search(line):
                row = found.setdefault(f"{match[2]} of {_members(match[3])}", [0, 0])
                row[0] += times
                row[1] += times * _num_bytes(match[1])
            rounds = int(trips[1]) if (trips := TRIPS.search(line)) else 1
            if " while(" in line and not trips:
                raise ValueError(f"a loop of unknown length: {line}")
            for callee in CALL.findall(line):
                visit(callee, times * rounds)

    visit(entry, 1)
    return {kind: {"count": n, "bytes": size} for kind, (n, size) in found.items()}


def _members(groups):
    """How many chips a replica group holds."""
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        axes = re.findall(r"'(\w+)'", groups.split("{")[1])
        return math.prod(int(sizes[axis]) for axis in axes)
    if groups.startswith("["):
        return int(re.match(r"\[\d+,(\d+)\]", groups)[1])
    return groups.split("}")[0].count(",") + 1


def _num_bytes(result):
    return sum(
        WIDTHS[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    )


def measure(model, plan):
    start = time.perf_counter()
    compiled = compile_step(model, plan)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return {
        "num_passes": plan.num_passes,
        "num_groups": plan.num_groups,
        "collectives": collectives(compiled.as_text()),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_CHIPS)
    model = Model()
    shapes = jax.tree.leaves(model.shapes(), is_leaf=lambda x: isinstance(x, tuple))
    matrices = [shape for shape in shapes if _is_split(shape)]
    rows = {}
    for name, plan in PLANS.items():
        rows[name] = measure(model, plan)
        print(name, json.dumps(rows[name], indent=1))
    report = {
        "num_chips": NUM_CHIPS,
        "batch_size": BATCH_SIZE,
        "length": model.length,
        "num_parameters": sum(map(math.prod, shapes)),
        "num_split_in_layers": sum(math.prod(s) for s in matrices if len(s) == 3),
        "num_split_at_the_ends": sum(math.prod(s) for s in matrices if len(s) == 2),
        "versions": {"flatopt": flatopt.__version__, "jax": jax.__version__},
        "steps": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
