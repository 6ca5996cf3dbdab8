"""Estimates of the time and work of compiled programs, from their texts."""

import pytest
from analysis.compile_targets import GPUS, TPUS
from analysis.estimate import estimate
from analysis.hlo import parse
from analysis.products import flops

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"1500000"}}'
LOOP = f"""HloModule f, is_scheduled=true

%region.body (carried: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {{
  %carried = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}, s32[]) parameter(0)
  %step = s32[]{{:T(128)}} get-tuple-element(%carried), index=0
  %two = s32[] constant(2)
  %limit.1 = s32[] get-tuple-element(%carried), index=2
  %next = s32[] add(%step, %two)
  %x = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%carried), index=1
  %y = f32[8,128]{{1,0:T(8,128)}} fusion(%x), kind=kLoop, calls=%doubled, {CYCLES}
  ROOT %tuple.1 = (s32[], f32[8,128]{{1,0:T(8,128)}}, s32[]) tuple(%next, %y, %limit.1)
}}

%doubled (p: f32[8,128]) -> f32[8,128] {{
  %p = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %s = f32[8,128]{{1,0:T(8,128)}} add(%p, %p)
}}

%is_below (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}}

%region.condition (carried.1: (s32[], f32[8,128], s32[])) -> pred[] {{
  %carried.1 = (s32[], f32[8,128]{{1,0:T(8,128)}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%carried.1), index=0
  %n = s32[] get-tuple-element(%carried.1), index=2
  ROOT %c = pred[] fusion(%i, %n), kind=kLoop, calls=%is_below
}}

ENTRY %main (x.1: f32[8,128]) -> f32[8,128] {{
  %x.1 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %zero = s32[] constant(0)
  %copy.1 = s32[]{{:T(128)S(6)}} copy(%zero)
  %limit = s32[] LIMIT
  %start = (s32[], f32[8,128]{{1,0:T(8,128)}}, s32[]) tuple(%copy.1, %x.1, %limit)
  %loop = (s32[], f32[8,128]{{1,0:T(8,128)}}, s32[]) while(%start), condition=%region.condition,"""
LOOP += """ body=%region.body, metadata={op_name="jit(f)/while"}
  ROOT %z = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_runs_as_often_as_its_integers_say():
    text = LOOP.replace("LIMIT", "constant(7)")
    (loop,) = (one for one in parse(text).executed() if one.instruction.opcode == "while")
    assert parse(text).trips(loop.computation, loop.instruction) == 4
    times = {one.instruction.name: one.times for one in parse(text).executed()}
    assert times["loop"] == 1
    assert times["y"] == 4
    found = estimate(text, TPUS["v5e"])
    assert found.seconds == pytest.approx(4 * 1.5e6 / TPUS["v5e"].clock)
    assert 0 <= found.bytes - 4 * 2 * 8 * 128 * 4 < 64  # of the integers
    assert not found.without_time


def test_a_loop_of_unknown_length_does_not_run_and_is_named():
    text = LOOP.replace("LIMIT", "parameter(1)")
    within = {one.instruction.name: one.within for one in parse(text).executed()}
    assert within["y"] == ("jit(f)/while",)
    found = estimate(text, TPUS["v5e"])
    assert found.without_time == {"loop of unknown length: jit(f)/while": 1}
    assert found.bytes < 64


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "pairs"),
    [
        # A product, of which the batch of 256 rows of 3 is written as a window of one.
        ("256,3,16", "16,5,1", "256,3,5", "window={size=1}, dim_labels=0bf_io0->0bf", 256 * 3 * 80),
        # Products of 6 pairs of matrices, as a window over their axis of which one term is real.
        (
            "6,4,16",
            "6,16,5",
            "6,4,5",
            "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            6 * 4 * 80,
        ),
        (
            "6,4,16",
            "6,16,5",
            "6,4,5",
            "window={size=6 stride=6 pad=5_5 lhs_dilate=5 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            6 * 4 * 80,
        ),
        # A convolution of 8 positions with a window of 3: the two at the ends meet 2 each.
        ("8,4,16", "3,16,5", "8,4,5", "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 22 * 320),
    ],
)
def test_a_convolution_counts_what_it_multiplies(left, right, result, attributes, pairs):
    text = f"""HloModule f

ENTRY %main (x: f32[{left}], y: f32[{right}]) -> f32[{result}] {{
  %x = f32[{left}] parameter(0)
  %y = f32[{right}] parameter(1)
  ROOT %z = f32[{result}] convolution(%x, %y), {attributes}
}}
"""
    assert flops(text) == 2 * pairs


N = 1024
TPU_STEP = f"""HloModule f, is_scheduled=true

%moves (p: f32[{N},{N}]) -> f32[{N},{N}] {{
  %p = f32[{N},{N}]{{1,0}} parameter(0)
  ROOT %t = f32[{N},{N}]{{0,1}} copy(%p)
}}

%updates (q: f32[{N},{N}], u: f32[8,{N}], at: s32[]) -> f32[{N},{N}] {{
  %q = f32[{N},{N}]{{1,0}} parameter(0)
  %u = f32[8,{N}]{{1,0}} parameter(1)
  %at = s32[] parameter(2)
  %v = f32[{N},{N}]{{1,0}} fusion(%q), output_to_operand_aliasing={{{{}}: (0, {{}})}}, calls=%moves
  ROOT %w = f32[{N},{N}]{{1,0}} dynamic-update-slice(%v, %u, %at, %at)
}}

ENTRY %main (x: f32[{N},{N}], y: f32[8,{N}], i: s32[]) -> f32[{N},{N}] {{
  %x = f32[{N},{N}]{{1,0}} parameter(0)
  %y = f32[8,{N}]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  %s = ((f32[{N},{N}]{{1,0}}), f32[8,{N}]{{1,0:S(1)}}, s32[]{{:S(2)}}) slice-start(%x)
  %d = f32[8,{N}]{{1,0:S(1)}} slice-done(%s)
  %c = (f32[{N},{N}]{{1,0:S(1)}}, f32[{N},{N}]{{1,0}}, u32[]{{:S(2)}}) copy-start(%x)
  %e = f32[{N},{N}]{{1,0:S(1)}} copy-done(%c)
  %b = f32[8,{N}]{{1,0:S(1)}} custom-call(%d), custom_call_target="ConcatBitcast"
  %k = f32[8,{N}]{{1,0:S(1)}} custom-call(%d), custom_call_target="Cholesky"
  %f = f32[{N},{N}]{{0,1}} fusion(%x), kind=kLoop, calls=%moves
  ROOT %g = f32[{N},{N}]{{1,0}} fusion(%f, %y, %i), kind=kLoop, calls=%updates
}}
"""


def test_bytes_are_those_of_the_main_memory_and_copies_are_counted_apart():
    found = estimate(TPU_STEP, TPUS["v6e"])
    part, whole = 4 * 8 * N, 4 * N * N
    # The slice and the copy are read, the transposition is read and written, the update in place
    # reads and writes a part, through another tiling of the whole, at an index of 4 bytes.
    assert found.bytes == part + whole + 2 * whole + 2 * part + 4
    assert found.copied == 2 * whole
    assert found.without_time == {"Cholesky": 1}
    assert found.seconds == pytest.approx(found.bytes / TPUS["v6e"].bandwidth)


def test_a_gpu_takes_the_longer_of_products_and_bytes_for_each_instruction():
    text = f"""HloModule f

ENTRY %main (x: bf16[{N},{N}]) -> bf16[{N},{N}] {{
  %x = bf16[{N},{N}] parameter(0)
  %y = bf16[{N},{N}] custom-call(%x, %x), custom_call_target="__cublas$gemm", CONFIG
  ROOT %z = bf16[{N},{N}] add(%y, %x)
}}
"""
    config = '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'
    text = text.replace("CONFIG", f"backend_config={config}")
    card, array = GPUS["h100"], 2 * N * N
    found = estimate(text, card)
    assert (found.flops, found.bytes) == (2 * N**3, 5 * array)
    product = max(2 * N**3 / card.peak, 2 * array / card.bandwidth)
    assert found.seconds == pytest.approx(product + 3 * array / card.bandwidth)
