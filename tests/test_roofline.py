"""The roofline of compiled programs, against counts and times in closed form."""

import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo, roofline

CHIP = roofline.Chip(
    bandwidth=1e3, matrix={"bf16": 1e6, "f32": 5e5}, vector=1e4, integer=2e3
)
# Three rounds of a fusion that doubles a matrix and multiplies it, then three kernels.
TEXT = """
%doubled (inner: f32[8,4]) -> f32[8,4] {
  %inner = f32[8,4]{1,0} parameter(0)
  %two = f32[] constant(2)
  %twos = f32[8,4]{1,0} broadcast(%two), dimensions={}
  ROOT %twice = f32[8,4]{1,0} multiply(%inner, %twos)
}

%product (left: f32[8,4], right: f32[4,16]) -> f32[8,16] {
  %left = f32[8,4]{1,0} parameter(0)
  %right = f32[4,16]{1,0} parameter(1)
  %more = f32[8,4]{1,0} fusion(%left), kind=kLoop, calls=%doubled
  ROOT %dot = f32[8,16]{1,0} dot(%more, %right), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%body (arg: (s32[], f32[8,4], f32[4,16])) -> (s32[], f32[8,4], f32[4,16]) {
  %arg = (s32[], f32[8,4]{1,0}, f32[4,16]{1,0}) parameter(0)
  %a = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %b = f32[4,16]{1,0} get-tuple-element(%arg), index=2
  %made = f32[8,16]{1,0:S(1)} fusion(%a, %b), kind=kOutput, calls=%product
  ROOT %out = (s32[], f32[8,4]{1,0}, f32[4,16]{1,0}) tuple(%made, %a, %b)
}

%condition (arg.1: (s32[], f32[8,4], f32[4,16])) -> pred[] {
  %arg.1 = (s32[], f32[8,4]{1,0}, f32[4,16]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%arg.1, %arg.1), direction=LT
}

%sum (one: f32[], other: f32[]) -> f32[] {
  %one = f32[] parameter(0)
  %other = f32[] parameter(1)
  ROOT %both = f32[] add(%one, %other)
}

ENTRY %main (x: f32[8,4], y: f32[4,16], z: u32[500]) -> f32[] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[4,16]{1,0} parameter(1)
  %z = u32[500]{0:S(1)} parameter(2)
  %start = (s32[], f32[8,4]{1,0}, f32[4,16]{1,0}) tuple(%x, %x, %y)
  %loop = (s32[], f32[8,4]{1,0}, f32[4,16]{1,0}) while(%start), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %bits = u32[500]{0:S(1)} xor(%z, %z)
  %floats = f32[500]{0:S(1)} convert(%bits)
  ROOT %total = f32[] reduce(%floats, %x), dimensions={0}, to_apply=%sum
}
"""


@pytest.mark.heart
def test_kernels_take_the_longest_of_their_times():
    program = hlo.Program(TEXT)
    # A round reads 128 + 256 bytes and leaves its result in the chip's own memory.
    memory = 3 * (128 + 256) / 1e3
    integers, floats = 500 / 2e3, 500 / 1e4
    # The sum reads no more than the 128 bytes of its start, and writes 4.
    last = (128 + 4) / 1e3
    expected = memory + integers + floats + last
    assert roofline.seconds(program, CHIP) == pytest.approx(expected)
    # Behind a fast memory the sum takes as long as its additions, and rounds their products.
    fast = CHIP._replace(bandwidth=1e9, matrix={"f32": 1e4})
    expected = 3 * 2 * 8 * 4 * 16 / 1e4 + integers + floats + 500 / 1e4
    assert roofline.seconds(program, fast) == pytest.approx(expected)
    fast = fast._replace(matrix={"f32": 1e9})
    expected = 3 * 8 * 4 / 1e4 + integers + floats + 500 / 1e4
    assert roofline.seconds(program, fast) == pytest.approx(expected)
    assert roofline.total_matrix_flops(program) == 3 * 2 * 8 * 4 * 16


def _program(f, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.Program(jax.jit(f).lower(*arguments).compile().as_text())


def test_products_of_matrices_count_two_an_inner_element():
    program = _program(
        lambda a, b: jnp.einsum("bij,bjk->bki", a, b), (3, 5, 7), (3, 7, 2)
    )
    assert roofline.total_matrix_flops(program) == 2 * 3 * 5 * 7 * 2

    def rounds(a, b):
        return jax.lax.fori_loop(0, 4, lambda _, a: jnp.sin(a @ b), a)

    program = _program(rounds, (64, 64), (64, 64))
    assert roofline.total_matrix_flops(program) == 4 * 2 * 64**3


LABELS = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("strides", "per_axis"),
    # Of 8 places and 3 taps at padding 1, the ends lack one; every second place lacks one
    # at its end, where the padding is.
    [(1, 3 * 8 - 2), (2, 3 * 4 - 1)],
)
def test_a_convolution_and_its_gradients_count_the_same(strides, per_axis):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (strides, strides), "SAME", dimension_numbers=LABELS
        )

    forward = 2 * 16 * 6 * 10 * per_axis**2
    shapes = (16, 8, 8, 6), (3, 3, 6, 10)
    assert roofline.total_matrix_flops(_program(convolve, *shapes)) == forward

    def loss(x, w):
        return (convolve(x, w) ** 2).sum()

    program = _program(jax.grad(loss, argnums=(0, 1)), *shapes)
    assert roofline.total_matrix_flops(program) == 3 * forward


def test_a_convolution_in_groups_counts_each_group_alone():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=LABELS, feature_group_count=3
        )

    program = _program(convolve, (2, 8, 8, 6), (3, 3, 2, 9))
    assert roofline.total_matrix_flops(program) == 2 * 2 * (6 * 3) ** 2 * 2 * 9


def _line(operands, result, rest):
    lines = [f"  %x{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    names = ", ".join(f"%x{i}" for i in range(len(operands)))
    lines += [f"  ROOT %made = {result} {rest.format(names)}"]
    return hlo.Program("ENTRY %main () -> f32[] {\n" + "\n".join(lines) + "\n}\n")


FORWARD = "bf16[4,8,8,6]{3,2,1,0}", "bf16[10,3,3,6]{3,2,1,0}", "bf16[4,4,4,10]{3,2,1,0}"


@pytest.mark.parametrize(
    ("target", "order"),
    [
        ("convForward", (0, 1, 2)),
        ("convBiasActivationForward", (0, 1, 2)),
        ("convBackwardInput", (2, 1, 0)),
        ("convBackwardFilter", (0, 2, 1)),
    ],
)
def test_calls_of_cudnn_count_as_their_forward_convolution(target, order):
    left, right, result = (FORWARD[i] for i in order)
    call = (
        "custom-call({}), window={{size=3x3 stride=2x2 pad=0_1x0_1}}, "
        f'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn${target}"'
    )
    program = _line((left, right), f"({result}, u8[0]{{0}})", call)
    flops = 2 * 4 * 6 * 10 * (3 * 4 - 1) ** 2
    assert roofline.total_matrix_flops(program) == flops
    chip = CHIP._replace(bandwidth=math.inf)
    assert roofline.seconds(program, chip) == pytest.approx(flops / 1e6)


def test_calls_of_cublas_count_as_dots():
    call = (
        'custom-call({}), custom_call_target="__cublas$gemm", backend_config='
        '{{"gemm_backend_config":{{"dot_dimension_numbers":'
        '{{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["1"]}}}}}}'
    )
    operands = "f32[5,7]{1,0}", "f32[9,5]{1,0}"
    program = _line(operands, "(f32[7,9]{1,0}, s8[4194304]{0})", call)
    assert roofline.total_matrix_flops(program) == 2 * 5 * 7 * 9


def test_groups_written_as_a_dilated_axis_do_not_count_its_zeros():
    # As a TPU's compiler writes the convolutions of 8 chunks, each with its own kernel.
    call = (
        "convolution({}), window={{size=3x3x8 stride=1x1x7 pad=1_1x1_1x0_0 "
        "lhs_dilate=1x1x8}}, dim_labels=b012f_01i2o->b012f"
    )
    operands = "bf16[4,6,6,8,5]{4,3,2,1,0}", "bf16[3,3,5,8,7]{4,3,2,1,0}"
    program = _line(operands, "bf16[4,6,6,8,7]{4,3,2,1,0}", call)
    one = 2 * 4 * (3 * 6 - 2) ** 2 * 5 * 7
    assert roofline.total_matrix_flops(program) == 8 * one
