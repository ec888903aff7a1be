"""What is read off compiled programs, against programs whose figures are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from benchmarks.collectives import count_collectives

# A loop of three rounds as TPU programs have it: its length stands in the condition.
TEXT = """
%fused (param_0: f32[100,8], param_1: s32[]) -> f32[8] {
  %param_0 = f32[100,8]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,8}
}

%body (arg: (s32[], f32[8], f32[100,8])) -> (s32[], f32[8], f32[100,8]) {
  %arg = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, f32[100,8]{1,0:T(8,128)}) parameter(0)
  %stack = f32[100,8]{1,0:T(8,128)} get-tuple-element(%arg), index=2
  %count = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %row = f32[8]{0:T(128)S(1)} fusion(%stack, %count), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"70"}}
  ROOT %out = (s32[]{:T(128)}, f32[8]{0}, f32[100,8]{1,0}) tuple(%count, %row, %stack)
}

%condition (arg: (s32[], f32[8], f32[100,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %arg.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, f32[100,8]{1,0:T(8,128)}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%count.1, %limit), direction=LT
}

ENTRY %main (x: f32[100,8]) -> f32[8] {
  %x = f32[100,8]{1,0:T(8,128)} parameter(0)
  %doubled = f32[100,8]{1,0:T(8,128)} add(%x, %x), \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %start = (s32[]{:T(128)}, f32[8]{0}, /*index=2*/f32[100,8]{1,0}) tuple(%doubled)
  %loop = (s32[]{:T(128)}, f32[8]{0}, f32[100,8]{1,0}) while(%start), \
condition=%condition, body=%body
  ROOT %last = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.heart
def test_loops_count_once_a_round_and_slices_by_their_size():
    program = hlo.Program(TEXT)
    assert program.cycles() == 1000 + 3 * 70
    assert program.kernels() == 1 + 3
    # Two operands and a result of 3,200 bytes; then a row of 32 bytes a round. The row goes
    # to the chip's own memory, marked S, and so does not count when written.
    assert program.bytes_moved() == 3 * 3200 + 3 * 32


def test_a_loop_of_unknown_length_is_an_error():
    program = hlo.Program(TEXT.replace("constant(3)", "parameter(1)"))
    with pytest.raises(ValueError, match="a loop of unknown length: loop"):
        program.cycles()


def test_collectives_in_a_loop_count_once_a_round():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def run(x):
        def body(_, x):
            total = jax.lax.psum(jnp.sin(x), "data")
            return jax.lax.pcast(total, "data", to="varying")

        return jax.lax.fori_loop(0, 5, body, x)

    mapped = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    text = jax.jit(mapped).lower(jnp.ones((16, 30))).compile().as_text()
    sizes = {"f32": 5 * 2 * 30 * 4}
    assert count_collectives(text) == {"all-reduce of 8": {"count": 5, "bytes": sizes}}


def test_copies_that_go_on_beside_kernels_count_once_an_end():
    # The result names both ends, of a slice also the whole that it is taken from.
    text = """
ENTRY %main (x: f32[4,8]) -> f32[1,8] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %in = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copied = f32[4,8]{1,0:T(8,128)S(1)} copy-done(%in)
  %out = (f32[4,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%copied)
  %back = f32[4,8]{1,0:T(8,128)} copy-done(%out)
  %row = ((f32[4,8]{1,0:T(8,128)}), f32[1,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%back), slice={[0:1], [0:8]}
  ROOT %last = f32[1,8]{1,0:T(8,128)S(1)} slice-done(%row)
}
"""
    assert hlo.Program(text).bytes_moved() == 128 + 128 + 32


# As GPU programs have them: fusions that slice or write a stack of 5 rows of 32 bytes behind a
# bitcast, one of them beside other kernels, and one that writes 2 numbers in place.
FUSIONS = """
%sliced (stack: f32[8,5], at: s32[]) -> f32[8] {
  %stack = f32[8,5]{0,1} parameter(0)
  %at = s32[] parameter(1)
  %same = f32[5,8]{1,0} bitcast(%stack)
  %row = f32[1,8]{1,0} dynamic-slice(%same, %at), dynamic_slice_sizes={1,8}
  ROOT %twice = f32[1,8]{1,0} add(%row, %row)
}

%written (stack.1: f32[8,5], at.1: s32[], new: f32[1,8]) -> f32[5,8] {
  %stack.1 = f32[8,5]{0,1} parameter(0)
  %at.1 = s32[] parameter(1)
  %new = f32[1,8]{1,0} parameter(2)
  %same.1 = f32[5,8]{1,0} bitcast(%stack.1)
  ROOT %updated = f32[5,8]{1,0} dynamic-update-slice(%same.1, %new, %at.1)
}

%scattered (whole: f32[5,8], places: s32[2,2], values: f32[2]) -> f32[5,8] {
  %whole = f32[5,8]{1,0} parameter(0)
  %places = s32[2,2]{1,0} parameter(1)
  %values = f32[2]{0} parameter(2)
  ROOT %put = f32[5,8]{1,0} scatter(%whole, %places, %values), to_apply=%sum
}

ENTRY %main (x: f32[8,5], i: s32[], p: s32[2,2], v: f32[2]) -> f32[5,8] {
  %x = f32[8,5]{0,1} parameter(0)
  %i = s32[] parameter(1)
  %p = s32[2,2]{1,0} parameter(2)
  %v = f32[2]{0} parameter(3)
  %started = ((f32[8,5]{0,1}, s32[]), f32[1,8]{1,0}, u32[]) fusion-start(%x, %i), \
kind=kLoop, calls=%sliced
  %read = f32[1,8]{1,0} fusion-done(%started)
  %kept = f32[5,8]{1,0} fusion(%x, %i, %read), kind=kLoop, calls=%written
  ROOT %last = f32[5,8]{1,0} fusion(%kept, %p, %v), kind=kInput, calls=%scattered
}
"""


def test_fusions_move_what_they_slice_and_what_they_write_in_place():
    program = hlo.Program(FUSIONS)
    assert program.kernels() == 3
    row, index = 32, 4
    places, values = 4 * index, 2 * 4
    expected = (row + index + row) + (row + index + row) + (places + 2 * values)
    assert program.bytes_moved() == expected


# As TPU programs have them: a fusion inside a fusion slices a stack of 5 rows of 32 bytes; two
# stacks are updated by one fusion, each by a row; a stack of zeros is made in it, not updated.
NESTED = """
%inner (stack: f32[5,8], at: s32[]) -> f32[1,8] {
  %stack = f32[5,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%stack, %at), dynamic_slice_sizes={1,8}
}

%outer (other: s32[], whole: f32[5,8]) -> f32[1,8] {
  %other = s32[] parameter(0)
  %whole = f32[5,8]{1,0} parameter(1)
  %one = f32[1,8]{1,0} fusion(%whole, %other), kind=kLoop, calls=%inner
  ROOT %twice = f32[1,8]{1,0} add(%one, %one)
}

%both (a: f32[5,8], b: f32[5,8], i: s32[], new: f32[1,8]) -> (f32[5,8], f32[5,8], f32[5,8]) {
  %a = f32[5,8]{1,0} parameter(0)
  %b = f32[5,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %new = f32[1,8]{1,0} parameter(3)
  %zero = f32[] constant(0)
  %zeros = f32[5,8]{1,0} broadcast(%zero), dimensions={}
  %first = f32[5,8]{1,0} dynamic-update-slice(%a, %new, %i)
  %second = f32[5,8]{1,0} dynamic-update-slice(%b, %new, %i)
  %third = f32[5,8]{1,0} dynamic-update-slice(%zeros, %new, %i)
  ROOT %all = (f32[5,8]{1,0}, f32[5,8]{1,0}, f32[5,8]{1,0}) tuple(%first, %second, %third)
}

ENTRY %main (x: f32[5,8], y: f32[5,8], n: s32[]) -> (f32[5,8], f32[5,8], f32[5,8]) {
  %x = f32[5,8]{1,0} parameter(0)
  %y = f32[5,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %read = f32[1,8]{1,0} fusion(%n, %x), kind=kLoop, calls=%outer
  ROOT %made = (f32[5,8]{1,0}, f32[5,8]{1,0}, f32[5,8]{1,0}) fusion(%x, %y, %n, %read), \
kind=kLoop, calls=%both
}
"""


def test_slices_and_updates_in_nested_fusions_and_of_several_results_are_found():
    program = hlo.Program(NESTED)
    row, index, stack = 32, 4, 160
    expected = (row + index + row) + (index + row) + 2 * row + stack
    assert program.bytes_moved() == expected
