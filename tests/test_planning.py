"""What is counted in a planned step, and that the plan computes the gradient it says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import planning
from benchmarks.collectives import KINDS, count_collectives, num_members

# As the compiler of TPUs writes it: a gather of bfloat16 that starts before a loop, goes on
# in it beside another kernel, and is done after; a reduce-scatter as a fusion.
GATHER = "all-gather(%p), channel_id=7, replica_groups=mesh['rows'=4,'columns'=4] \
{'rows','columns'}, dimensions={0}"
TEXT = f"""
%start (p: bf16[2,64]) -> (bf16[2,64], bf16[32,64]) {{
  %p = bf16[2,64]{{1,0}} parameter(0)
  %all-gather.1 = bf16[32,64]{{1,0}} {GATHER}
  ROOT %custom-call.1 = (bf16[2,64]{{1,0}}, bf16[32,64]{{1,0}}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}}

%beside (p: bf16[2,64]) -> bf16[32,64] {{
  %p = bf16[2,64]{{1,0}} parameter(0)
  ROOT %all-gather.2 = bf16[32,64]{{1,0}} {GATHER}
}}

%done (p: bf16[2,64]) -> bf16[32,64] {{
  %p = bf16[2,64]{{1,0}} parameter(0)
  %all-gather.3 = bf16[32,64]{{1,0}} {GATHER}
  ROOT %custom-call.2 = bf16[32,64]{{1,0}} custom-call(%p, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter.5 (input: f32[32,64]) -> f32[8,64] {{
  %input = f32[32,64]{{1,0:T(8,128)}} parameter(0)
  %all-reduce.4 = f32[32,64]{{1,0:T(8,128)}} all-reduce(%input), channel_id=8, \
replica_groups={{{{0,4,8,12}},{{1,5,9,13}},{{2,6,10,14}},{{3,7,11,15}}}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %slice.6 = f32[8,64]{{1,0}} dynamic-slice(%all-reduce.4, %id), \
dynamic_slice_sizes={{8,64}}
}}

%body (arg: (s32[], bf16[2,64])) -> (s32[], bf16[2,64]) {{
  %arg = (s32[], bf16[2,64]{{1,0}}) parameter(0)
  %count = s32[] get-tuple-element(%arg), index=0
  %part = bf16[2,64]{{1,0}} get-tuple-element(%arg), index=1
  %step = bf16[32,64]{{1,0}} fusion(%part), kind=kCustom, calls=%beside
  %norm = (f32[64]{{0}}, bf16[8]{{0}}) custom-call(%count), custom_call_target="norms"
  %first = f32[64]{{0}} get-tuple-element(%norm), index=0
  %second = bf16[8]{{0}} get-tuple-element(%norm), index=1
  %sums = (f32[64]{{0}}, bf16[8]{{0}}) all-reduce(%first, %second), channel_id=9, \
replica_groups=[1,16]<=[16], to_apply=%add
  %alone = f32[64]{{0}} all-reduce(%first), channel_id=10, replica_groups=[16,1]<=[16]
  ROOT %out = (s32[], bf16[2,64]{{1,0}}) tuple(%count, %part)
}}

%condition (arg: (s32[], bf16[2,64])) -> pred[] {{
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%limit, %limit), direction=LT
}}

ENTRY %main (x: bf16[2,64], g: f32[32,64]) -> f32[8,64] {{
  %x = bf16[2,64]{{1,0}} parameter(0)
  %g = f32[32,64]{{1,0}} parameter(1)
  %begin = (bf16[2,64]{{1,0}}, bf16[32,64]{{1,0}}) fusion(%x), kind=kCustom, calls=%start
  %zero = s32[] constant(0)
  %into = (s32[], bf16[2,64]{{1,0}}) tuple(%zero, %x)
  %loop = (s32[], bf16[2,64]{{1,0}}) while(%into), condition=%condition, body=%body
  %end = bf16[32,64]{{1,0}} fusion(%x), kind=kCustom, calls=%done
  %ring = (bf16[2,64]{{1,0}}, bf16[2,64]{{1,0}}, u32[], u32[]) \
collective-permute-start(%x), channel_id=11, source_target_pairs={{{{0,1}},{{1,0}}}}
  ROOT %part = f32[8,64]{{1,0}} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.5
}}
"""


@pytest.mark.heart
def test_collectives_of_a_tpu_program_count_once_by_the_size_of_the_whole():
    assert count_collectives(TEXT) == {
        "all-gather of 16": {"count": 1, "bytes": {"bf16": 32 * 64 * 2}},
        "all-reduce of 16": {"count": 3, "bytes": {"f32": 3 * 256, "bf16": 3 * 16}},
        "collective-permute": {"count": 1, "bytes": {"bf16": 2 * 64 * 2}},
        "reduce-scatter of 4": {"count": 1, "bytes": {"f32": 32 * 64 * 4}},
    }


def test_a_collective_that_would_be_missed_is_an_error():
    text = TEXT.replace("AsyncCollectiveStart", "Else")
    with pytest.raises(ValueError, match=r"not counted: all-gather\.1"):
        count_collectives(text)


def test_collectives_in_a_loop_and_their_groups_on_cpu():
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)

    def run(x):
        def body(_, x):
            whole = jax.lax.all_gather(jnp.sin(x), "columns", tiled=True)
            return jax.lax.psum_scatter(whole, "columns", tiled=True)

        return jax.lax.fori_loop(0, 5, body, x)

    spec = P(("rows", "columns"))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    text = jax.jit(mapped).lower(jnp.ones((16, 30))).compile().as_text()
    once = {"count": 5, "bytes": {"f32": 5 * 8 * 30 * 4}}
    assert count_collectives(text) == {
        "all-gather of 4": once,
        "reduce-scatter of 4": once,
    }


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,128]<=[256]", 128),
        ("mesh['draws'=4,'rows'=4,'columns'=16] {'rows','columns'}", 64),
    ],
)
def test_members_of_a_group(groups, members):
    assert num_members(groups) == members


@pytest.mark.parametrize("in_two_steps", [True, False])
def test_the_gradient_is_that_of_one_device(in_two_steps):
    model = planning.Model(2, 16, 2, 32, 64, 8, in_two_steps=in_two_steps)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape) / 4, jnp.float32),
        model.shapes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tokens = jnp.asarray(random.integers(0, 64, (2, 16, 8)))
    batch = {"inputs": tokens[0], "targets": tokens[1]}
    grads = []
    for shape in ((1, 1), (4, 2)):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = planning.PLANS["AdamW"].mesh(devices)
        places = jax.tree.map(lambda x: x.sharding, planning.place(params, mesh))
        rows = NamedSharding(mesh, P(planning.CHIPS))
        with jax.set_mesh(mesh), jax.numpy_rank_promotion("allow"):
            placed = jax.device_put(params, places), jax.device_put(batch, rows)
            grads += [jax.jit(jax.grad(model.loss_fn), out_shardings=places)(*placed)]
    for one, many in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(one, many, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", list(planning.SETUPS))
def test_the_model_is_as_large_as_it_is_said_to_be(name):
    setup = planning.SETUPS[name]
    sizes = {"1B": (0.9e9, 1.1e9), "7B": (6.7e9, 6.8e9)}[name]
    assert sizes[0] < planning.describe(setup)["num_parameters"] < sizes[1]


def _sizes(row, *kinds):
    return {
        name: sum(entry["bytes"].values())
        for name, entry in row["collectives"].items()
        if name.startswith(kinds)
    }


def _received(row, *kinds):
    """What reaches a chip, each collective at the least that it can send."""
    total = 0
    for name, size in _sizes(row, *kinds).items():
        kind, _, members = name.partition(" of ")
        if kind == "collective-permute":
            total += size
            continue
        share = 1 - 1 / int(members)
        total += size * share * (2 if kind == "all-reduce" else 1)
    return total / 1e9


def test_the_page_says_what_was_compiled():
    report = json.loads(planning.RESULTS.read_text())
    steps = report["tpu"]["models"]["7B"]["steps"]
    on_cpu = report["cpu"]["models"]["7B"]["steps"]
    assert not [row for row in (*steps.values(), *on_cpu.values()) if "error" in row]
    plain, pair, eight = (
        steps[x] for x in ("AdamW", "NSO, one pair", "NSO, 8 sequences a chip")
    )
    small = [
        report["tpu"]["models"]["1B"]["steps"][x]["allocated_bytes"] / 1e9
        for x in ("AdamW", "NSO, one pair")
    ]
    lpf, groups = steps[planning.LPF], steps[planning.IN_GROUPS]
    reductions = ("all-reduce", "reduce-scatter", "collective-permute")
    halves = [_received(row, *reductions) for row in (steps[planning.ONE_STEP], plain)]
    norms, chunks = (
        sum(_sizes(row, "all-reduce").values())
        for row in (steps[planning.MICROBATCHES], lpf)
    )
    average = _sizes(groups, "all-reduce of 4")["all-reduce of 4"]
    falls = _received(lpf, *KINDS) / _received(groups, *KINDS)
    gathered = _sizes(on_cpu["AdamW"], "all-gather")["all-gather of 256"]
    told = [
        f"allocates {pair['allocated_bytes'] / 1e9:.1f} GB where the plain step takes "
        f"{plain['allocated_bytes'] / 1e9:.1f}",
        f"{small[1]:.1f} for {small[0]:.1f} with 1 billion parameters",
        f"8 sequences a chip it allocates {eight['allocated_bytes'] / 1e9:.1f} GB",
        f"{eight['temporary_bytes'] / 1e9:.1f} GB for NSO with 8 sequences",
        f"filter norms add {(chunks - norms) / 1e6:.1f} MB",
        f"average sharded gradients ({average / 1e9:.2f} GB)",
        f"receives {falls:.1f} times less",
        f"from {halves[0]:.1f} to {halves[1]:.1f} GB received",
        f"gathers {gathered / 1e9:.1f} GB in float32",
        f"allocates {on_cpu['AdamW']['allocated_bytes'] / 1e9:.1f} GB for it and "
        f"{on_cpu['NSO, one pair']['allocated_bytes'] / 1e9:.1f} for NSO",
    ]
    page = " ".join((planning.RESULTS.parents[1] / "scale.md").read_text().split())
    assert [x for x in told if x not in page] == []
    # NSO moves twice as much.
    assert _received(pair, *KINDS) == pytest.approx(2 * _received(plain, *KINDS), 1e-3)
    assert max(row["allocated_bytes"] for row in steps.values()) < 16e9
