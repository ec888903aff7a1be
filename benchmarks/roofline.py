"""The least time a chip takes for a compiled program, read off its text.

A kernel takes the longest of three: its bytes through the main memory, its products of
matrices, its other arithmetic. Kernels follow one another.
"""

import functools
import math
import re
from typing import NamedTuple

from benchmarks import hlo


class Chip(NamedTuple):
    """What a chip does in a second, at most.

    ``matrix`` holds the operations of products by the type of what is multiplied, and
    ``integer`` those of ``vector`` that can be on integers.
    """

    bandwidth: float
    matrix: dict[str, float]
    vector: float
    integer: float


# Products of float32 are taken in bfloat16 by default. The vector unit has 8 by 128 lanes of
# 4 units, at 1.503 GHz. The compiler's cycles agree: a sampler of 166 operations takes 28 ps
# a value by them, so it does 5.9e12 a second.
LANES = 8 * 128 * 4 * 1.503e9
V5E = Chip(819e9, {"bf16": 197e12, "f32": 197e12}, vector=LANES, integer=LANES)
# An SXM card, without sparsity. Products of float32 are taken in TF32 by default. The 67
# TFLOP/s of its data sheet count a fused multiply-add as two operations: it starts half as
# many. Of integers it starts half of these, on 64 units for 128.
H100 = Chip(
    3.35e12,
    {"bf16": 989e12, "f16": 989e12, "f32": 495e12},
    vector=67e12 / 2,
    integer=67e12 / 4,
)
CHIPS = {"tpu": V5E, "h100": H100}
# One operation an element each, though an exponential takes longer than a sum.
OPERATIONS = """
    abs add and atan2 cbrt ceil clamp compare convert cosine count-leading-zeros divide erf
    exponential exponential-minus-one floor is-finite log log-plus-one logistic maximum
    minimum multiply negate not or popcnt power remainder round-nearest-afz
    round-nearest-even rsqrt select shift-left shift-right-arithmetic shift-right-logical
    sign sine sqrt subtract tan tanh xor
"""
ELEMENTWISE = frozenset(OPERATIONS.split())
TARGET = re.compile(r'custom_call_target="([^"]*)"')
# An attribute of a dot, or in the JSON of a call of cuBLAS.
CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)')
WINDOW = re.compile(r"window=\{([^}]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


def seconds(program, chip):
    """The roofline of a whole program, loops times their length."""
    return math.fsum(  # the same on every Python
        times * kernel_seconds(program, line, body, chip)
        for line, body, times in program.run()
        if not line.is_free
    )


def kernel_seconds(program, line, body, chip):
    """That of one instruction of the computation ``body``."""
    matrix, vector, integer = 0.0, 0, 0
    for instruction, inside in contents(program, line, body):
        flops, dtype = matrix_flops(instruction, inside)
        matrix += flops / chip.matrix.get(dtype, chip.matrix["f32"])
        count, dtype = vector_operations(program, instruction, inside)
        vector += count
        integer += count * (dtype[0] in "su")
    memory = program.moved(line, body) / chip.bandwidth
    return max(memory, matrix, vector / chip.vector, integer / chip.integer)


def total_matrix_flops(program):
    """Floating-point operations of all dots and convolutions."""
    return sum(
        times * matrix_flops(*found)[0]
        for line, body, times in program.run()
        for found in contents(program, line, body)
    )


def contents(program, line, body):
    """Yield an instruction, or what a fusion holds, with the computation it is in."""
    inner = program.computations.get(line.called("calls") or "")
    if inner is None:
        yield line, body
        return
    for instruction in inner.values():
        yield from contents(program, instruction, inner)


def vector_operations(program, line, body):
    """Elements of an elementwise instruction, of a reduction those that go in; their type."""
    if line.opcode in ELEMENTWISE:
        dtype, shape = arrays(line.result)[0]
        return math.prod(shape), dtype
    if line.opcode != "reduce":
        return 0, "f32"
    reducer = program.computations.get(line.called("to_apply") or "", {})
    steps = sum(x.opcode in ELEMENTWISE for x in reducer.values())
    dtype, shape = operand(line, body, 0)
    return steps * math.prod(shape), dtype


def matrix_flops(line, body):
    """Operations of a dot or a convolution, a multiply-add as two; the type of its input."""
    target = TARGET.search(line.rest)
    target = target[1] if target else ""
    if line.opcode == "dot" or target.startswith("__cublas$"):
        dtype, left = operand(line, body, 0)
        axes = re.findall(r"\d+", CONTRACTED.search(line.rest)[1])
        contracted = math.prod(left[int(axis)] for axis in axes)
        return 2 * contracted * math.prod(arrays(line.result)[0][1]), dtype
    if line.opcode == "convolution" or target.startswith("__cudnn$conv"):
        (dtype, left), (_, right) = (operand(line, body, i) for i in range(2))
        result = arrays(line.result)[0][1]
        # Input, filter and output of the forward convolution, of which the window tells.
        shapes = left, right, result
        if target.endswith("BackwardInput"):
            shapes = result, right, left
        elif target.endswith("BackwardFilter"):
            shapes = left, result, right
        return 2 * multiplications(line.rest, *shapes), dtype
    return 0, "f32"


def multiplications(rest, inputs, filters, outputs):
    """Of a convolution: none of padding, nor of the zeros of a dilated input."""
    labels = LABELS.search(rest).groups()
    inputs, filters, outputs = (
        dict(zip(names, shape, strict=True))
        for names, shape in zip(labels, (inputs, filters, outputs), strict=True)
    )
    groups = re.search(r"batch_group_count=(\d+)", rest)
    count = inputs["b"] * filters["i"] * outputs["f"] // int(groups[1] if groups else 1)
    window = WINDOW.search(rest)
    window = [x.split("=") for x in window[1].split()] if window else []
    for axis in set(inputs) - {"b", "f"}:
        settings = tuple((name, value.split("x")[int(axis)]) for name, value in window)
        count *= pairs(inputs[axis], outputs[axis], settings)
    return count


@functools.cache
def pairs(inputs, outputs, settings):
    """Along one axis: how many places of the window, over all outputs, hold an input."""
    settings = dict(settings)
    low = int(settings.get("pad", "0_0").split("_")[0])
    names = ("size", "stride", "lhs_dilate", "rhs_dilate")
    size, stride, holes, spread = (int(settings.get(name, 1)) for name in names)
    places = (
        i * stride + j * spread - low for i in range(outputs) for j in range(size)
    )
    last = (inputs - 1) * holes
    return sum(0 <= place <= last and place % holes == 0 for place in places)


def operand(line, body, index):
    """Type and shape of an operand."""
    return arrays(body[line.operands[index]].result)[0]


def arrays(result):
    """Types and shapes in the type of a result."""
    return [
        (dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape, _ in hlo.ARRAY.findall(result)
    ]
