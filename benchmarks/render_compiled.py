"""The part of ``docs/accelerators.md`` on programs that are compiled and not run."""

from benchmarks import layouts
from benchmarks.large import TITLES
from benchmarks.tables import megabytes, ratio, reason, table, versions_of

CHIPS = {"tpu": "TPU v5e", "h100": "H100"}
SHARDED_TITLE = "The same Transformer on four chips, parameters sharded (FSDP)"
CLOCK = 1.503e9  # of a v5e, Hz
COMPILED = """## Compiled for a {chip}, not run

`make bench-accelerators` compiles the steps with the chip's own compiler, which runs on a CPU,
and reads the programs. The figures are the same on every run of the same versions
({versions}).

- **Cycles over plain**: the sum of the compiler's estimates for all kernels, loops times their
  length. It knows nothing of overlap, and overstates kernels that wait for memory.
- **Bytes over plain**: what kernels read from and write to the main memory, counted in the
  program; of operands that are only sliced, the slices. What stays in the chip's own 128 MB
  does not count.
- **Temporaries** are the compiler's own figure (`temp_size_in_bytes`), beside parameters and
  state, which are written in place. It counts room that buffers share more than once.
- **Peak** is the most that is alive at once (`peak_memory_in_bytes`), with parameters, state
  and batch. On the MLP it is more than all that is allocated in the main memory, so that what
  stays in the chip's own memory seems to count here. The compiler does not refuse a program
  that is too large: a v5e has 16 GB.
- **Kernels**: how many operations a step starts.

They say which of two programs is the better one for the chip, not how long a step takes.
"""


def section(target, report):
    versions = versions_of(report["versions"])
    lines = [COMPILED.format(chip=CHIPS[target], versions=versions)]
    problems = report["problems"]
    if not problems.get("resnet18", {}).get("rows"):
        lines += ["ResNet-18 was not compiled yet: a step takes long to compile.\n"]
    for name, problem in problems.items():
        if not problem["rows"] or name in layouts.NAMES:
            continue
        size, batch = problem["num_parameters"] / 1e6, problem["batch_size"]
        title = TITLES.get(name, SHARDED_TITLE)
        lines += [
            f"### {title}: {size:.1f} M parameters, batch {batch} ({CHIPS[target]})"
        ]
        lines += [f"\n{plain_line(problem['rows'].get('plain', {}))}\n"]
        lines += [compiled_table(problem["rows"])]
        lines += memory_section(problem["rows"]) if name == "transformer" else []
    lines += noise_section(problems) + layout_section(problems)
    lines += chunk_section(problems)
    return lines + examples_section(report.get("examples", {}))


MEMORY = """**The memory of two passes**, over the plain step; peak and allocated without what
goes in. They differ: SAM's temporaries and what goes in add up to {total:.0f} MB, but the
compiler allocates {allocated:.0f} MB in all, since buffers that are not alive together share
room.
"""
COPIES = """As two copies, in an earlier version, SAM had {before:.0f} MB of temporaries, fewer
than the {after:.0f} MB of its loop of two rounds, but {cycles:.2f} times the cycles of the
plain step. The peak of the copies was not written down.
"""


def memory_section(rows):
    """The three figures of the memory of two passes, over the plain step's."""
    kinds = ("temporary", "peak", "allocated")
    names = ("plain", "NSO normal", "NSO signs", "SAM")
    known = [n for n in names if rows.get(n, {}).get("allocated_bytes")]
    sizes = {n: memory(rows[n]) for n in known}
    if "plain" not in sizes or "SAM" not in sizes:
        return []
    cells = [[n, *map(ratio, size, sizes["plain"])] for n, size in sizes.items()]
    row = rows["SAM"]
    text = MEMORY.format(
        total=(row["temporary_bytes"] + row["argument_bytes"]) / 1e6,
        allocated=row["allocated_bytes"] / 1e6,
    )
    lines = [text, table(["step", *kinds], cells)]
    if copies := row.get("two_copies"):
        before, after = (x["temporary_bytes"] / 1e6 for x in (copies, row))
        cycles = copies["cycles"] / rows["plain"]["cycles"]
        lines += [COPIES.format(before=before, after=after, cycles=cycles)]
    return lines


def memory(row):
    """Temporaries, and what peak and allocations are beside what goes in."""
    beside = [row[f"{k}_bytes"] - row["argument_bytes"] for k in ("peak", "allocated")]
    return [row["temporary_bytes"], *beside]


NOISE = """### What the noise costs

LPF-SGD over its own chunks without noise (*LPF no noise, scan*), in the compiler's cycles. A
hardware key is `jax.random.key(0, impl="rbg")`: the chip's own generator makes the bits, and
the values depend on the platform. Chunks without noise all at once are the gradient of the
whole batch: 1.13 times plain on the MLP, which no noise comes near.
"""
NOISES = {
    "signs, auto": "signs",
    "signs, scan": "signs, in a loop",
    "normal, auto": "normal",
    "normal, scan": "normal, in a loop",
    "normal, auto, rbg key": "normal, hardware key",
    "normal, scan, rbg key": "normal, hardware key, in a loop",
}


def noise_section(problems):
    cells = []
    for name, title in TITLES.items():
        rows = problems.get(name, {}).get("rows", {})
        floor = rows.get("LPF no noise, scan", {}).get("cycles")
        found = [rows.get(f"LPF {noise}", {}) for noise in NOISES]
        if floor and any(found):
            ratios = [ratio(row.get("cycles"), floor) for row in found]
            cells += [[title, *ratios]]
    return [NOISE, table(["network", *NOISES.values()], cells)] if cells else []


LAYOUTS = """### The layout of the chunks

LPF-SGD with signs and 8 chunks, all at once (*vmap*) and in a loop (*scan*): cycles over the
plain step, and temporaries. **Rule** is what `strategy="auto"` takes; **regret** is how much
more cycles that takes than the better of the two. Convolutions take the loop by the rule: by
this compiler all at once is better for them, at a multiple of the memory, but what a GPU does
with a kernel for each chunk was not looked at. `strategy="vmap"` is one word.
"""


def layout_section(problems):
    head = ["network", "parameters, M", "batch", "scan", "vmap"]
    head += ["scan, MB", "vmap, MB", "rule", "regret, %"]
    cells = []
    for name, problem in problems.items():
        rows = problem["rows"]
        both = {
            layout: rows.get(f"LPF signs, {layout}", {}) for layout in ("scan", "vmap")
        }
        cycles = {layout: row.get("cycles") for layout, row in both.items()}
        plain, rule = rows.get("plain", {}).get("cycles"), problem.get("rule")
        if not all(cycles.values()) or not plain or not rule:
            continue
        regret = 100 * (cycles[rule] / min(cycles.values()) - 1)
        cells += [
            [
                (TITLES | layouts.TITLES)[name],
                f"{problem['num_parameters'] / 1e6:.1f}",
                str(problem["batch_size"]),
                *[ratio(row["cycles"], plain) for row in both.values()],
                *[megabytes(row["temporary_bytes"]) for row in both.values()],
                rule,
                f"{regret:.0f}",
            ]
        ]
    return [LAYOUTS, table(head, cells)] if cells else []


CHUNKS = """### Small chunks

LPF-SGD with signs in a loop of 8 chunks over the plain step, in cycles, by the examples in a
chunk: a chunk that does not fill the chip takes nearly as long as one that does.
"""


def chunk_section(problems):
    cells = []
    for name, problem in problems.items():
        if not name.startswith(("cnn", "resnet")):
            continue
        rows, batch = problem["rows"], problem["batch_size"]
        plain, loop = (
            rows.get(row, {}).get("cycles") for row in ("plain", "LPF signs, scan")
        )
        if plain and loop:
            title = (TITLES | layouts.TITLES)[name]
            cells += [[title, batch, batch // layouts.CHUNKS, ratio(loop, plain)]]
    head = ["network", "batch", "images a chunk", "cycles over plain"]
    cells = [[str(cell) for cell in row] for row in sorted(cells)]
    return [CHUNKS, table(head, cells)] if len(cells) > 1 else []


EXAMPLES = """### Do the examples fit?

`make bench-fits` compiles the training steps of `examples/cifar10.py` and of the
notebooks at full size for one v5e, which has 16 GB. *Goes in* are parameters, state and batch;
*in all* is what the compiler allocates, these included. Only the steps in the table were
compiled so far.
"""


def examples_section(examples):
    head = ["step", "goes in, MB", "peak, MB", "in all, MB", "of 16 GB, %"]
    cells = []
    for name, row in examples.items():
        sizes = [row[f"{kind}_bytes"] for kind in ("argument", "peak", "allocated")]
        share = f"{100 * sizes[-1] / 16e9:.1f}"
        cells += [[name, *map(megabytes, sizes), share]]
    return [EXAMPLES, table(head, cells)] if cells else []


def plain_line(plain):
    if "cycles" not in plain:
        return "The plain step was not compiled."
    text = f"Plain: {plain['temporary_bytes'] / 1e6:.0f} MB of temporaries"
    if plain["cycles"]:
        milliseconds = 1e3 * plain["cycles"] / CLOCK
        text += f", {plain['cycles'] / 1e6:.2f} M cycles ({milliseconds:.2f} ms)"
    return text + f", {plain['bytes_moved'] / 1e9:.2f} GB moved."


def compiled_table(rows):
    plain = rows.get("plain", {})
    kinds = sorted({k for row in rows.values() for k in row.get("collectives", {})})
    head = [
        "step",
        "cycles over plain",
        "bytes over plain",
        "temporaries, MB",
        "peak, MB",
        "kernels",
    ]
    head += [f"{kind}, GB" for kind in kinds]
    cells = []
    for name, row in rows.items():
        if "error" in row:
            cells += [[name, reason(row), *["–"] * (len(head) - 2)]]
            continue
        ratios = [ratio(row[k], plain.get(k)) for k in ("cycles", "bytes_moved")]
        sizes = [megabytes(row["temporary_bytes"]), megabytes(row.get("peak_bytes"))]
        sizes += [f"{row['kernels']:,}"]
        moved = [row["collectives"].get(kind, {"bytes": 0})["bytes"] for kind in kinds]
        cells += [
            [
                name,
                *ratios,
                *sizes,
                *[f"{size / 1e9:.2f}" for size in moved],
            ]
        ]
    return table(head, cells)
