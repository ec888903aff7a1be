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
        self.computations, self.roots, self.entry, lines = {}, {}, None, None
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name, lines = head[2], self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif lines is not None and (instruction := _instruction(line)):
                lines[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self.roots[name] = instruction

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
        if line.opcode in ("slice", "dynamic-slice"):
            return min(whole, num_bytes(line.result, anywhere=True))
        sliced = self._sliced(line.called("calls"), index) if whole else None
        return whole if sliced is None else min(whole, sliced)

    def _sliced(self, name, index):
        """Bytes that a computation slices from a parameter; ``None`` if it takes it all."""
        total, names = 0, set()
        for x in self.computations.get(name or "", {}).values():
            if x.opcode == "parameter" and x.operands[0] == str(index):
                names.add(x.name)
            places = [i for i, operand in enumerate(x.operands) if operand in names]
            if not places:
                continue
            if x.opcode in SAME:
                names.add(x.name)  # an operand comes before its users
            elif x.opcode in ("slice", "dynamic-slice"):
                total += num_bytes(x.result, anywhere=True)
            elif x.opcode == "fusion":
                parts = [self._sliced(x.called("calls"), i) for i in places]
                if None in parts:
                    return None
                total += sum(parts)
            elif x.opcode not in UPDATES or places != [0]:
                return None
        return total if names else None

    def _written(self, line):
        """Of a result that an operand is updated to, in place, the updates are written."""
        arrays = [match[0] for match in ARRAY.finditer(line.result)]
        outputs = self._outputs(line.called("calls"))
        if len(outputs) != len(arrays):
            return num_bytes(line.result)
        total = 0
        for array, (name, output) in zip(arrays, outputs, strict=True):
            whole, updated = num_bytes(array), self._updated(name, output)
            total += whole if updated is None else min(whole, updated)
        return total

    def _outputs(self, name):
        """What a computation gives, with the name of the computation."""
        root = self.roots.get(name)
        if root is None:
            return []
        names = root.operands if root.opcode == "tuple" else (root.name,)
        return [(name, self.computations[name][x]) for x in names]

    def _updated(self, name, output):
        """Bytes that a computation writes into a parameter to make an output, or ``None``."""
        body = self.computations[name]
        if output.opcode == "parameter":
            return 0
        if output.opcode == "fusion":
            inner = self._outputs(output.called("calls"))
            return self._updated(*inner[0]) if len(inner) == 1 else None
        if output.opcode == "get-tuple-element":
            made = body[output.operands[0]]
            inner = self._outputs(made.called("calls"))
            index = int(output.called("index"))
            return self._updated(*inner[index]) if index < len(inner) else None
        if output.opcode in SAME:
            return self._updated(name, body[output.operands[0]])
        if output.opcode not in UPDATES:
            return None
        before = self._updated(name, body[output.operands[0]])
        update = body[output.operands[UPDATES[output.opcode]]]
        size = num_bytes(update.result, anywhere=True)
        return None if before is None else before + size


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
