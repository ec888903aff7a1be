"""What a compiled program does, read off its text: loops count once a round."""

import math
import re
from typing import NamedTuple

WIDTHS = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
# What makes no kernel of its own, as all that only waits for what was started before.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "opt-barrier",
}
# What only names the same values otherwise.
SAME = ("bitcast", "reshape", "transpose", "copy")
# What writes in place, and which of its operands it writes.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self, attribute):
        match = re.search(rf"{attribute}=%?([\w.-]+)", self.rest)
        return match and match[1]

    @property
    def is_free(self):
        return self.opcode in FREE or self.opcode.endswith("-done")

    @property
    def alone(self):
        """What is started to go on beside other kernels, as one that does not."""
        kind = self.opcode.removesuffix("-start")
        if kind in (self.opcode, "all-reduce"):
            return self
        # The result holds what goes in (after what comes out, of a copy) and more.
        first, rest = _split(self.result[1:], ",")
        result = first if kind == "copy" else _split(rest, ",")[0]
        return self._replace(opcode=kind, result=result)

    @property
    def cycles(self):
        return int(match[1]) if (match := CYCLES.search(self.rest)) else 0


class Program:
    """The computations of a compiled program, and what it runs."""

    def __init__(self, text):
        self.computations, self.entry, lines = {}, None, None
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                lines = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif lines is not None and (instruction := _instruction(line)):
                lines[instruction.name] = instruction

    def run(self, name=None, times=1):
        """Yield ``(instruction, its computation, times)`` for all that is run."""
        body = self.computations[name or self.entry]
        for instruction in body.values():
            yield instruction, body, times
            if instruction.opcode == "while":
                rounds = times * self.trips(instruction)
                yield from self.run(instruction.called("body"), rounds)
            elif instruction.opcode == "call":
                yield from self.run(instruction.called("to_apply"), times)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{(.*?)\}", instruction.rest)
                for branch in re.findall(r"[\w.-]+", branches[1]) if branches else ():
                    yield from self.run(branch, times)

    def trips(self, loop):
        """The length of a loop: told, or the number that its counter is compared with."""
        if match := TRIPS.search(loop.rest):
            return int(match[1])
        condition = self.computations[loop.called("condition")]
        numbers = [
            int(line.operands[0])
            for line in condition.values()
            if line.opcode == "constant" and re.fullmatch(r"\d+", line.operands[0])
        ]
        if len(numbers) != 1:
            raise ValueError(f"a loop of unknown length: {loop.name}")
        return numbers[0]

    def cycles(self):
        """The compiler's own estimate of the cycles of all kernels (TPU)."""
        return sum(times * line.cycles for line, _, times in self.run())

    def kernels(self):
        """How many operations are started."""
        return sum(times for line, _, times in self.run() if not line.is_free)

    def bytes_moved(self):
        """Bytes that kernels read from and write to the device's main memory."""
        return sum(times * self.moved(line, body) for line, body, times in self.run())

    def moved(self, line, body):
        """Those of one instruction of the computation ``body``."""
        if line.is_free or line.rest.find("AllocateBuffer") >= 0:
            return 0
        line = line.alone
        reads = [
            self._read(line, i, body[name].result)
            for i, name in enumerate(line.operands)
            if name in body
        ]
        return self._written(line) + sum(reads)

    def _read(self, line, index, result):
        """Of an operand that is only sliced, the slices are read."""
        whole = num_bytes(result)
        inner = self.computations.get(line.called("calls") or "", {})
        if line.opcode in ("slice", "dynamic-slice"):
            return min(whole, num_bytes(line.result, anywhere=True))
        names = {
            x.name
            for x in inner.values()
            if x.opcode == "parameter" and x.operands[0] == str(index)
        }
        users = []
        for x in inner.values():  # an operand comes before its users
            if names & set(x.operands):
                if x.opcode in SAME:
                    names.add(x.name)
                else:
                    users.append(x)
        if not users or not whole:
            return whole
        sizes = []
        for user in users:
            if user.opcode == "dynamic-slice":
                sizes.append(num_bytes(user.result, anywhere=True))
            elif user.opcode in UPDATES and user.operands[0] in names:
                sizes.append(0)
            else:
                return whole
        return min(whole, sum(sizes))

    def _written(self, line):
        inner = self.computations.get(line.called("calls") or "", {})
        updates = [x for x in inner.values() if x.opcode in UPDATES]
        whole = num_bytes(line.result)
        if len(updates) == 1 and updates[0].result.split("{")[0] in line.result:
            update = inner[updates[0].operands[UPDATES[updates[0].opcode]]]
            return min(whole, num_bytes(update.result, anywhere=True))
        return whole

    def collectives(self):
        """Count and bytes of the results of collectives, by kind."""
        found = {}
        for line, _, times in self.run():
            kind = line.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                row = found.setdefault(kind, {"count": 0, "bytes": 0})
                row["count"] += times
                row["bytes"] += times * num_bytes(line.result, anywhere=True)
        return found


def num_bytes(result, anywhere=False):
    """Bytes of a type; of arrays in main memory alone, or anywhere."""
    return sum(
        WIDTHS.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape, layout in ARRAY.findall(result)
        if anywhere or "S(" not in layout
    )


def _instruction(line):
    match = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if not match:
        return None
    result, rest = _split(line[match.end() :], " ")
    opcode, rest = rest.split("(", 1)
    inside, rest = _split(rest, ")")
    operands = re.findall(r"%([\w.-]+)", inside) or [inside]
    return Instruction(match[1], result, opcode, tuple(operands), rest)


def _split(text, end):
    """Cut at the first ``end`` outside of brackets."""
    depth = 0
    for i, letter in enumerate(text):
        if letter == end and not depth:
            return text[:i], text[i + 1 :]
        depth += (letter in "([{") - (letter in ")]}")
    return text, ""
