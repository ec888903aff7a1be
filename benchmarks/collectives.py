"""What chips send each other in a compiled program, counted in its text."""

import math
import re

from benchmarks import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
GROUPS = re.compile(r"replica_groups=(\S+(?: \{'.*?\})?)")
CHANNEL = re.compile(r"channel_id=(\d+)")
START = '"AsyncCollectiveStart"'


def count_collectives(text):
    """Count the collectives that a program runs, those in loops once a round.

    The key names the kind and how many chips take part together. ``"bytes"`` has, by
    type, the size of the whole array: what an all-gather or an all-reduce returns, what
    a reduce-scatter takes. A permutation counts what one chip sends.

    The compiler of TPUs writes a reduce-scatter as a fusion named ``all-reduce-scatter``
    that holds an all-reduce and a slice. And it repeats a gather that runs beside other
    kernels in each of them: it counts where it starts.
    """
    program, found, seen = hlo.Program(text), {}, set()
    for line, body, times in program.run():
        for kind, collective, around in _collectives(program, line, body):
            seen.update(CHANNEL.findall(collective.rest))
            groups = GROUPS.search(collective.rest)
            members = num_members(groups[1]) if groups else None
            if members == 1:
                continue  # nothing moves
            key = f"{kind} of {members}" if members else kind
            row = found.setdefault(key, {"count": 0, "bytes": {}})
            row["count"] += times
            times_whole = times * (members if kind == "all-gather" else 1)
            for name in collective.operands:
                for dtype, size in _sizes(around[name].result):
                    total = row["bytes"].get(dtype, 0)
                    row["bytes"][dtype] = total + times_whole * size
    for computation in program.computations.values():
        for line in computation.values():
            if _kind(line) and set(CHANNEL.findall(line.rest)) - seen:
                raise ValueError(f"a collective that is not counted: {line.name}")
    return found


def _collectives(program, line, body):
    """Kind, instruction and computation of what an instruction starts."""
    if kind := _kind(line):
        yield kind, line, body
    elif line.opcode == "fusion":
        callee = line.called("calls")
        inner = program.computations[callee]
        if callee.startswith("all-reduce-scatter"):
            for x in inner.values():
                if _kind(x) == "all-reduce":
                    yield "reduce-scatter", x, inner
        for x in inner.values():
            if x.opcode == "custom-call" and START in x.rest:
                started = inner[x.operands[0]]
                yield from _collectives(program, started, inner)


def _kind(line):
    kind = line.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def num_members(groups):
    """How many chips a replica group holds."""
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        axes = re.findall(r"'(\w+)'", groups.split("{")[1])
        return math.prod(int(sizes[axis]) for axis in axes)
    if groups.startswith("["):
        return int(re.match(r"\[\d+,(\d+)\]", groups)[1])
    return groups.split("}")[0].count(",") + 1


def _sizes(result):
    """Type and bytes of each array of a result."""
    for dtype, shape, _ in hlo.ARRAY.findall(result):
        count = math.prod(int(n) for n in shape.split(",") if n)
        yield dtype, hlo.WIDTHS[dtype] * count
