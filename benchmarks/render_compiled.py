"""The part of ``docs/accelerators.md`` on programs that are compiled and not run."""

import textwrap

from benchmarks import layouts
from benchmarks.large import TITLES
from benchmarks.roofline import CHIPS as PEAKS
from benchmarks.tables import megabytes, ratio, reason, table, versions_of

CHIPS = {"tpu": "TPU v5e", "h100": "H100"}
ARTICLES = {"tpu": "a TPU v5e", "h100": "an H100"}
# By what programs are compared: its key, and its name on the page.
FIGURES = {"tpu": ("cycles", "cycles"), "h100": ("roofline_seconds", "roofline")}
SHARDED_TITLE = "The same Transformer on four chips, parameters sharded (FSDP)"
CLOCK = 1.503e9  # of a v5e, Hz
COMPILED = """{command} compiles the steps with the chip's own compiler, which runs on a CPU,
and reads the programs. The figures are the same on every run of the same versions ({versions}).
"""
ENDING = """They say which of two programs is the better one for the chip, not how long a step
takes.
"""
ROOFLINE = """**Roofline over plain**: the time of all kernels one after another at the chip's
peaks. Each takes the longest of three: its bytes at {bandwidth:,.0f} GB/s; its products of
matrices and convolutions at {bf16:.0f} TFLOP/s{float32}; its other arithmetic, one operation an
element, at {vector:.1f} × 10¹² a second{integer}. It does not see units that a small shape
leaves idle, nor what it takes to start a kernel: the smaller the kernels, the further it is
from the truth."""
CYCLES = """**Cycles over plain**: the sum of the compiler's estimates for all kernels, loops
times their length. It knows nothing of overlap, and overstates kernels that wait for memory."""
BYTES = """**Bytes over plain**: what kernels read from and write to the main memory, counted in
the program; of operands that are only sliced, the slices."""
TEMPORARIES = """**Temporaries** are the compiler's own figure (`temp_size_in_bytes`), beside
parameters and state, which are written in place."""
PEAK = """**Peak** is the most that is alive at once (`peak_memory_in_bytes`), with parameters,
state and batch."""
KERNELS = "**Kernels**: how many operations a step starts."
# What holds for one chip alone, after these.
MORE = {
    "tpu": {
        BYTES: """What stays in the chip's own 128 MB does not count.""",
        TEMPORARIES: "It counts room that buffers share more than once.",
        PEAK: """On the MLP it is more than all that is allocated in the main memory, so that
what stays in the chip's own memory seems to count here. The compiler refuses a program that
does not fit the 16 GB of a v5e.""",
    },
    "h100": {
        BYTES: """The cache of 50 MB is left out: what is small need not go to the main
memory.""",
        PEAK: """The compiler does not refuse a program that is too large: an H100 has 80
GB.""",
        KERNELS: """To start one takes a GPU some time, which the roofline leaves out: where it
holds few microseconds a kernel, the fewer kernels may win.""",
    },
}
UNTUNED = """Without a card the compiler cannot time what it may choose from. It makes all
products of matrices kernels of its own in small tiles, none a call of cuBLAS, and leaves the
algorithms of convolutions to cuDNN, without the memory that these may take. On a card it may
choose otherwise.
"""


def legend(target):
    """What the columns are."""
    peaks = PEAKS[target]
    products, integer = peaks.matrix["f32"], peaks.integer
    is_slower = products < peaks.matrix["bf16"]
    roofline = ROOFLINE.format(
        bandwidth=peaks.bandwidth / 1e9,
        bf16=peaks.matrix["bf16"] / 1e12,
        float32=f", those of float32 at {products / 1e12:.0f}" if is_slower else "",
        vector=peaks.vector / 1e12,
        integer=f", on integers {integer / 1e12:.1f}" if integer < peaks.vector else "",
    )
    texts = [BYTES, TEMPORARIES, PEAK, KERNELS]
    texts = [roofline, *[f"{x} {MORE[target].get(x, '')}" for x in texts]]
    texts = [CYCLES, *texts] if target == "tpu" else texts
    return "\n".join(map(bullet, texts)) + "\n"


def bullet(text):
    return wrapped(f"- {text}", "  ")


def wrapped(text, indent=""):
    """A paragraph in lines of 100 columns."""
    return textwrap.fill(
        " ".join(text.split()), 100, subsequent_indent=indent, break_on_hyphens=False
    )


def paragraph(text, **values):
    return wrapped(text.format(**values)) + "\n"


def section(target, report):
    """All that the page says of the programs for one chip."""
    chip = CHIPS[target]
    command = "bench-accelerators" + (f" TARGET={target}" if target != "tpu" else "")
    versions = versions_of(report["versions"])
    text = paragraph(COMPILED, command=f"`make {command}`", versions=versions)
    lines = [f"## Compiled for {ARTICLES[target]}, not run\n", text, legend(target)]
    lines += [paragraph(ENDING)]
    lines += [paragraph(UNTUNED)] if target == "h100" else []
    problems = report["problems"]
    if not problems.get("resnet18", {}).get("rows"):
        lines += ["ResNet-18 was not compiled yet: a step takes long to compile.\n"]
    for name, problem in problems.items():
        if not problem["rows"] or name in layouts.NAMES:
            continue
        size, batch = problem["num_parameters"] / 1e6, problem["batch_size"]
        title = TITLES.get(name, SHARDED_TITLE)
        lines += [f"### {title}: {size:.1f} M parameters, batch {batch} ({chip})"]
        lines += [f"\n{plain_line(problem['rows'].get('plain', {}))}\n"]
        lines += [compiled_table(problem["rows"], target)]
        lines += memory_section(problem["rows"]) if name == "transformer" else []
    lines += noise_section(problems, target) + layout_section(problems, target)
    lines += chunk_section(problems) if target == "tpu" else []
    return lines + examples_section(report.get("examples", {}))


MEMORY = """**The memory of two passes**, over the plain step; peak and allocated without what
goes in.
"""
SHARED = """They differ: SAM's temporaries and what goes in add up to {total:.0f} MB, but the
compiler allocates {allocated:.0f} MB in all, since buffers that are not alive together share
room.
"""
COPIES = """As two plain copies, in an earlier version, SAM had {before:.0f} MB of temporaries,
now {after:.0f}, and {cycles:.2f} times the cycles of the plain step.
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
    total = (row["temporary_bytes"] + row["argument_bytes"]) / 1e6
    allocated = row["allocated_bytes"] / 1e6
    lines = [paragraph(MEMORY), table(["step", *kinds], cells)]
    if total > 1.01 * allocated:
        lines += [paragraph(SHARED, total=total, allocated=allocated)]
    if copies := row.get("two_copies"):
        before, after = (x["temporary_bytes"] / 1e6 for x in (copies, row))
        cycles = copies["cycles"] / rows["plain"]["cycles"]
        lines += [paragraph(COPIES, before=before, after=after, cycles=cycles)]
    return lines


def memory(row):
    """Temporaries, and what peak and allocations are beside what goes in."""
    beside = [row[f"{k}_bytes"] - row["argument_bytes"] for k in ("peak", "allocated")]
    return [row["temporary_bytes"], *beside]


NOISE = """LPF-SGD over its own chunks without noise (*LPF no noise, scan*), by {figure}. A
hardware key is `jax.random.key(0, impl="rbg")`: {hardware}.
"""
WHOLE = """Chunks without noise all at once are {ratio} times plain on the MLP, which no noise
comes near.
"""
HARDWARE = {
    "tpu": """the chip's own generator makes the bits, and the values depend on the
platform""",
    "h100": "XLA computes the bits by Philox, whose 64-bit products count as one operation",
}
NOISES = {
    "signs, auto": "signs",
    "signs, scan": "signs, in a loop",
    "normal, auto": "normal",
    "normal, scan": "normal, in a loop",
    "normal, auto, rbg key": "normal, hardware key",
    "normal, scan, rbg key": "normal, hardware key, in a loop",
}


def noise_section(problems, target):
    cells = []
    key, figure = FIGURES[target]
    for name, title in TITLES.items():
        rows = problems.get(name, {}).get("rows", {})
        floor = rows.get("LPF no noise, scan", {}).get(key)
        found = [rows.get(f"LPF {noise}", {}) for noise in NOISES]
        if floor and any(found):
            ratios = [ratio(row.get(key), floor) for row in found]
            cells += [[title, *ratios]]
    title = f"### What the noise costs ({CHIPS[target]})\n"
    text = paragraph(NOISE, figure=figure, hardware=HARDWARE[target])
    rows = problems.get("mlp", {}).get("rows", {})
    whole, plain = (rows.get(x, {}).get(key) for x in ("LPF no noise, vmap", "plain"))
    lines = [title, text, table(["network", *NOISES.values()], cells)]
    if whole and plain:
        lines += [paragraph(WHOLE, ratio=ratio(whole, plain))]
    return lines if cells else []


LAYOUTS = """LPF-SGD with signs and 8 chunks, all at once (*vmap*) and in a loop (*scan*):
{figure} over the plain step, and temporaries. **Rule** is what `strategy="auto"` takes;
**regret** is how much more that is than the better of the two. `strategy="vmap"` is one word.
"""
CONVOLUTIONS = {
    "tpu": """Convolutions take all at once by the rule where they are small, at a multiple of
the memory, and the loop where they are large.
""",
    "h100": """Convolutions take the loop by the rule. All at once each is a call of cuDNN in 8
groups, and so are its gradients: that of a kernel is a convolution whose window is the whole
image, and around strides zeros are written out and multiplied. Products over the loop's:
{products}.
""",
}


def layout_section(problems, target):
    key, figure = FIGURES[target]
    head = ["network", "parameters, M", "batch", "scan", "vmap"]
    head += ["scan, MB", "vmap, MB", "rule", "regret, %"]
    head += ["scan, kernels", "vmap, kernels"] if target == "h100" else []
    cells, products = [], []
    for name, problem in problems.items():
        rows = problem["rows"]
        both = {
            layout: rows.get(f"LPF signs, {layout}", {}) for layout in ("scan", "vmap")
        }
        found = {layout: row.get(key) for layout, row in both.items()}
        plain, rule = rows.get("plain", {}).get(key), problem.get("rule")
        if not all(found.values()) or not plain or not rule:
            continue
        regret = 100 * (found[rule] / min(found.values()) - 1)
        cells += [
            [
                (TITLES | layouts.TITLES)[name],
                f"{problem['num_parameters'] / 1e6:.1f}",
                str(problem["batch_size"]),
                *[ratio(value, plain) for value in found.values()],
                *[megabytes(row["temporary_bytes"]) for row in both.values()],
                rule,
                f"{regret:.0f}",
                *[f"{row['kernels']:,}" for row in both.values() if target == "h100"],
            ]
        ]
        more, less = (
            both[layout].get("matrix_flops", 0) for layout in ("vmap", "scan")
        )
        if more > 1.001 * less:
            products += [f"{(TITLES | layouts.TITLES)[name]} {ratio(more, less)}"]
    title = f"### The layout of the chunks ({CHIPS[target]})\n"
    text = LAYOUTS + CONVOLUTIONS[target]
    text = paragraph(text, figure=figure, products="; ".join(dict.fromkeys(products)))
    return [title, text, table(head, cells)] if cells else []


CHUNKS = """### Small chunks

LPF-SGD with signs over the plain step of the same batch, in cycles, by the images in a chunk: a
chunk that does not fill the chip takes nearly as long as one that does.
"""
COUNTS = {8: "", 4: ", 4 chunks", 2: ", 2 chunks"}


def chunk_section(problems):
    cells = []
    for name, problem in problems.items():
        if not name.startswith(("cnn", "resnet")):
            continue
        rows, batch = problem["rows"], problem["batch_size"]
        plain = rows.get("plain", {}).get("cycles")
        for count, ending in COUNTS.items():
            both = [
                rows.get(f"LPF signs, {layout}{ending}", {}).get("cycles")
                for layout in ("scan", "vmap")
            ]
            if any(both):
                title = (TITLES | layouts.TITLES)[name]
                sizes = batch, count, batch // count
                cells += [[title, *sizes, *[ratio(x, plain) for x in both]]]
    head = ["network", "batch", "chunks", "images a chunk", "in a loop", "all at once"]
    cells = [[str(cell) for cell in row] for row in sorted(cells)]
    return [CHUNKS, table(head, cells)] if len(cells) > 1 else []


EXAMPLES = """### Do the examples fit?

`make bench-fits` compiles the training steps of `examples/cifar10.py` and of the
notebooks at full size for one v5e, which has 16 GB. *Goes in* are parameters, state and batch;
*in all* is what the compiler allocates, these included.
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
    if "bytes_moved" not in plain:
        return "The plain step was not compiled."
    text = f"Plain: {plain['temporary_bytes'] / 1e6:.0f} MB of temporaries"
    if plain.get("cycles"):
        milliseconds = 1e3 * plain["cycles"] / CLOCK
        text += f", {plain['cycles'] / 1e6:.2f} M cycles ({milliseconds:.2f} ms)"
    if plain.get("roofline_seconds"):
        text += f", roofline {1e3 * plain['roofline_seconds']:.3f} ms"
    return text + f", {plain['bytes_moved'] / 1e9:.2f} GB moved."


def compiled_table(rows, target="tpu"):
    plain = rows.get("plain", {})
    compared = {
        "cycles": "cycles",
        "roofline_seconds": "roofline",
        "bytes_moved": "bytes",
    }
    if target != "tpu":
        del compared["cycles"]
    moved = {name: moved_by_kind(row) for name, row in rows.items()}
    kinds = sorted({kind for sizes in moved.values() for kind in sizes})
    head = ["step", *[f"{name} over plain" for name in compared.values()]]
    head += ["temporaries, MB", "peak, MB", "kernels"]
    head += [f"{kind}, GB" for kind in kinds]
    cells = []
    for name, row in rows.items():
        if "error" in row:
            cells += [[name, reason(row), *["–"] * (len(head) - 2)]]
            continue
        ratios = [ratio(row.get(key), plain.get(key)) for key in compared]
        sizes = [megabytes(row["temporary_bytes"]), megabytes(row.get("peak_bytes"))]
        sizes += [f"{row['kernels']:,}"]
        cells += [
            [
                name,
                *ratios,
                *sizes,
                *[f"{moved[name].get(kind, 0) / 1e9:.2f}" for kind in kinds],
            ]
        ]
    return table(head, cells)


def moved_by_kind(row):
    """Bytes of the arrays that each kind of collective makes or takes."""
    sizes = {}
    for name, found in row.get("collectives", {}).items():
        kind = name.partition(" of ")[0]
        sizes[kind] = sizes.get(kind, 0) + sum(found["bytes"].values())
    return sizes
