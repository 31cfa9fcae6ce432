"""The reader of compiled modules and the estimate made of them, on small texts."""

from __future__ import annotations

import pytest
from aot_modules import walk

from fm4m.aot import heads, hlo, kernels, loops, schedule
from fm4m.aot.chips import CHIPS

CHIP = CHIPS["v4"]


def cycles(count):
    return 'backend_config={"window_config":{"estimated_cycles":"COUNT"}}'.replace("COUNT", str(count))


ELEMENTWISE = """
HloModule jit_step, is_scheduled=true

%fused (p: f32[1024,256]) -> f32[1024,256] {
  %p = f32[1024,256]{1,0:T(8,128)} parameter(0)
  ROOT %m = f32[1024,256]{1,0:T(8,128)} multiply(%p, %p)
}

ENTRY %main (a: f32[1024,256]) -> f32[1024,256] {
  %a = f32[1024,256]{1,0:T(8,128)} parameter(0)
  ROOT %fusion.1 = f32[1024,256]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="x/mul"}, CYC
}
"""


def test_parse_keeps_types_operands_and_attributes():
    module = hlo.parse(ELEMENTWISE.replace("CYC", cycles(1234)))
    fusion = module.entry.root
    assert (fusion.name, fusion.opcode, fusion.operands, fusion.op_name) == ("fusion.1", "fusion", ("a",), "x/mul")
    assert fusion.arrays == (hlo.Array("f32", (1024, 256)),) and fusion.bytes == 2**20
    assert fusion.called("calls") == "fused" and fusion.estimated_cycles == 1234
    assert [i.opcode for i in module.inside("fused")] == ["parameter", "multiply"]


def test_parse_type_flattens_tuples_and_reads_memory_spaces():
    arrays = hlo.parse_type("((bf16[8,128]{1,0:T(8,128)(2,1)S(3)}), s32[]{:S(2)}, token[])")
    assert arrays == (hlo.Array("bf16", (8, 128), 3), hlo.Array("s32", (), 2))
    assert arrays[0].bytes == 2048


def test_parse_refuses_other_text():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("jaxpr")


def test_elementwise_time_is_capped_by_its_bytes():
    by_bytes = 2 * 2**20 / CHIP.hbm_effective
    assert walk(ELEMENTWISE.replace("CYC", cycles(10**7))).seconds == pytest.approx(by_bytes)
    assert walk(ELEMENTWISE.replace("CYC", cycles(100))).seconds == pytest.approx(100 / CHIP.clock)
    assert walk(ELEMENTWISE.replace("CYC", cycles(10**7))).raw_seconds == pytest.approx(1e7 / CHIP.clock)


def test_unknown_cycles_are_not_taken_for_a_number():
    assert hlo.parse(ELEMENTWISE.replace("CYC", cycles(2**63 - 1))).entry.root.estimated_cycles is None


MATMUL = """
ENTRY %main (a: bf16[512,256], b: bf16[256,128]) -> bf16[512,128] {
  %a = bf16[512,256]{1,0} parameter(0)
  %b = bf16[256,128]{1,0:S(3)} parameter(1)
  ROOT %c = bf16[512,128]{1,0:S(3)} convolution(%a, %b), dim_labels=bf_io->bf, CYC
}
"""


def test_products_take_their_cycles_and_at_least_their_bytes():
    slow, fast = walk(MATMUL.replace("CYC", cycles(10**6))), walk(MATMUL.replace("CYC", cycles(1)))
    assert slow.seconds == slow.product_seconds == pytest.approx(1e6 / CHIP.clock)
    assert fast.seconds == pytest.approx(512 * 256 * 2 / CHIP.hbm_effective)
    assert slow.product_flops == 2 * 512 * 256 * 128
    assert slow.hbm_bytes == 512 * 256 * 2  # the others are on the chip


@pytest.mark.parametrize(
    "line, flops",
    [
        ("dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 512 * 128 * 256),
        # Attention scores of 4 heads: the heads are a window dimension of which one position counts.
        ("convolution(%q, %k), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf", 2 * 4 * 64 * 32 * 16),
        # A true window of 3 positions.
        ("convolution(%q, %k), window={size=3}, dim_labels=0bf_0oi->0bf", 2 * 4 * 64 * 32 * 16 * 3),
    ],
)
def test_product_flops(line, flops):
    out = "bf16[512,128]{1,0}" if "dot" in line else "bf16[4,64,32]{2,1,0}"
    text = f"""
ENTRY %main (a: bf16[512,256]) -> bf16[] {{
  %a = bf16[512,256]{{1,0}} parameter(0)
  %b = bf16[256,128]{{1,0}} parameter(1)
  %q = bf16[4,64,16]{{2,1,0}} parameter(2)
  %k = bf16[4,32,16]{{2,1,0}} parameter(3)
  ROOT %c = {out} {line}
}}
"""
    assert walk(text).product_flops == flops


# A loop over 24 layers: each takes its slice of the stacked weights and writes its part of the stacked outputs.
LOOP = """
%sliced (w: f32[24,128,128], i: s32[]) -> f32[1,128,128] {
  %w = f32[24,128,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[24,128,128]{2,1,0} bitcast(%w)
  ROOT %s = f32[1,128,128]{2,1,0} dynamic-slice(%b, %i), dynamic_slice_sizes={1,128,128}
}

%updated (o: f32[24,128,128], u: f32[1,128,128], i: s32[]) -> f32[24,128,128] {
  %o = f32[24,128,128]{2,1,0} parameter(0)
  %u = f32[1,128,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[24,128,128]{2,1,0} dynamic-update-slice(%o, %u, %i)
}

%body (state: (s32[], f32[24,128,128], f32[24,128,128])) -> (s32[], f32[24,128,128], f32[24,128,128]) {
  %state = (s32[], f32[24,128,128]{2,1,0}, f32[24,128,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = f32[24,128,128]{2,1,0} get-tuple-element(%state), index=1
  %o = f32[24,128,128]{2,1,0} get-tuple-element(%state), index=2
  %x = f32[1,128,128]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%sliced
  %n = f32[24,128,128]{2,1,0} fusion(%o, %x, %i), kind=kLoop, calls=%updated
  %one = s32[] constant(STEP)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[24,128,128]{2,1,0}, f32[24,128,128]{2,1,0}) tuple(%next, %w, %n)
}

%condition (state: (s32[], f32[24,128,128], f32[24,128,128])) -> pred[] {
  %state.1 = (s32[], f32[24,128,128]{2,1,0}, f32[24,128,128]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] BOUND
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (w: f32[24,128,128], o: f32[24,128,128], n: s32[]) -> f32[24,128,128] {
  %w.2 = f32[24,128,128]{2,1,0} parameter(0)
  %o.2 = f32[24,128,128]{2,1,0} parameter(1)
  %n.2 = s32[] parameter(2)
  %zero = s32[] constant(START)
  %t.2 = (s32[], f32[24,128,128]{2,1,0}, f32[24,128,128]{2,1,0}) tuple(%zero, %w.2, %o.2)
  %loop = (s32[], f32[24,128,128]{2,1,0}, f32[24,128,128]{2,1,0}) while(%t.2), condition=%condition, body=%body NOTE
  ROOT %r = f32[24,128,128]{2,1,0} get-tuple-element(%loop), index=2
}
"""


def loop(bound="constant(24)", start="0", step="1", note=""):
    return LOOP.replace("BOUND", bound).replace("START", start).replace("STEP", step).replace("NOTE", note)


def test_slices_and_in_place_updates_count_as_what_they_move():
    # Each layer reads one slice and writes it, then reads it and writes the update: 4 times 64 KB.
    assert walk(loop()).hbm_bytes == pytest.approx(24 * 4 * 128 * 128 * 4, rel=1e-3)


@pytest.mark.parametrize(
    "options, trips",
    [
        ({}, 24),
        ({"start": "4"}, 20),
        ({"step": "5"}, 5),
        ({"note": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
        ({"bound": "get-tuple-element(%state.1), index=1"}, None),
    ],
)
def test_trip_counts(options, trips):
    module = hlo.parse(loop(**options))
    assert loops.trip_count(module, module.entry, module.entry.by_name["loop"]) == trips


def test_trip_count_of_a_bound_that_is_carried_along():
    text = loop(bound="get-tuple-element(%state.1), index=1").replace("tuple(%zero, %w.2,", "tuple(%zero, %c9,")
    text = text.replace("  %zero = ", "  %c9 = s32[] constant(9)\n  %zero = ")
    module = hlo.parse(text)
    assert loops.trip_count(module, module.entry, module.entry.by_name["loop"]) == 9


def test_loops_that_depend_on_data_run_as_often_as_expected():
    text = loop(bound="get-tuple-element(%state.1), index=1")
    expected = walk(text, loop_trips=lambda module, i: 2.5)
    assert expected.loops == [("loop", 2.5, True)] and not expected.unknown
    assert expected.hbm_bytes == pytest.approx(2.5 * 4 * 128 * 128 * 4, rel=1e-3)
    unknown = walk(text)
    assert unknown.loops == [("loop", 1, True)] and "loop" in unknown.unknown[0]


def test_conditionals_count_the_average_of_their_branches():
    branch = """
%BRANCH (p: f32[DIM]) -> f32[DIM] {
  %pBRANCH = f32[DIM]{0} parameter(0)
  ROOT %cBRANCH = f32[DIM]{0} copy(%pBRANCH)
}
"""
    branches = "".join(branch.replace("BRANCH", n).replace("DIM", d) for n, d in (("yes", "4096"), ("no", "1024")))
    text = f"""{branches}
ENTRY %main (q: pred[], a: f32[4096]) -> f32[4096] {{
  %q = pred[] parameter(0)
  %a = f32[4096]{{0}} parameter(1)
  ROOT %c = f32[4096]{{0}} conditional(%q, %a, %a), true_computation=%yes, false_computation=%no
}}
"""
    mean = 2 * 4 * (4096 + 1024) / 2
    assert walk(text).hbm_bytes == mean
    listed = text.replace("true_computation=%yes, false_computation=%no", "branch_computations={%yes, %no}")
    assert walk(listed).hbm_bytes == mean


def test_copies_beside_the_arithmetic_take_bytes_but_no_time():
    text = """
ENTRY %main (a: f32[4096]) -> f32[4096] {
  %a = f32[4096]{0} parameter(0)
  %s = (f32[4096]{0:S(3)}, f32[4096]{0}, u32[]{:S(2)}) copy-start(%a)
  %l = ((f32[4096]{0}), f32[1024]{0:S(3)}, s32[]{:S(2)}) async-start(%a), calls=%slice
  %d = f32[4096]{0:S(3)} copy-done(%s)
  ROOT %e = f32[1024]{0:S(3)} async-done(%l)
}
"""
    total = walk(text)
    assert (total.hbm_bytes, total.seconds) == (4 * 4096 + 4 * 1024, 0)


def test_kernels_take_what_they_are_said_to_take():
    text = """
ENTRY %main (a: bf16[8,256,128]) -> bf16[8,256,128] {
  %a = bf16[8,256,128]{2,1,0} parameter(0)
  %z = bf16[8,256,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %k = bf16[8,256,128]{2,1,0} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"1610612736"}}}
}
"""
    total = walk(text, kernel_seconds=lambda computation, i: 0.5 * computation.by_name[i.operands[0]].arrays[0].dims[0])
    assert total.seconds == total.kernel_seconds == 4.0 and not total.unknown
    assert total.product_flops == 1610612736
    assert "kernel k" in walk(text).unknown[0]


def test_attention_kernels_are_known_by_name():
    text = """
ENTRY %main (q: bf16[8,128,768], k: bf16[8,256,768]) -> bf16[8,128,768] {
  %q = bf16[8,128,768]{2,1,0} parameter(0)
  %k = bf16[8,256,768]{2,1,0} parameter(1)
  %jvp_attention_forward_.1 = bf16[8,128,768]{2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"
  %b = bf16[8,128,768]{2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/transpose(jvp(attention_backward))/pallas_call"}
  ROOT %other = bf16[8,128,768]{2,1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call"
}
"""
    calls = []

    def cost(*arguments, **options):
        calls.append((*arguments, *options.values()))
        return {"forward": 1.0, "backward": 10.0}

    seconds = kernels.kernel_seconds({"model": {"dim": 768, "num_heads": 12}}, CHIP, cost)
    total = walk(text, kernel_seconds=seconds)
    assert total.kernel_seconds == 8 * 6 * 11.0 and calls == [(128, 256, 64, "bfloat16", "v4", 8, 6)] * 2
    assert len(total.unknown) == 1 and "other" in total.unknown[0]


# ---- loops of the loss

# One loop over modalities that holds a loop over blocks of 128 rows, and one over modalities with a block of 64.
HEADS = """
%block (s: (s32[], s32[], bf16[512,64])) -> (s32[], s32[], bf16[512,64]) {
  %s = (s32[], s32[], bf16[512,64]{1,0}) parameter(0)
  %x = bf16[128,64]{1,0} constant(0)
  %h = bf16[512,64]{1,0} get-tuple-element(%s), index=2
  %l = bf16[128,512]{1,0} convolution(%x, %h), dim_labels=bf_oi->bf
  ROOT %t = (s32[], s32[], bf16[512,64]{1,0}) copy(%s)
}

%short (s.4: (s32[], s32[], bf16[512,64])) -> (s32[], s32[], bf16[512,64]) {
  %s.4 = (s32[], s32[], bf16[512,64]{1,0}) parameter(0)
  %x.4 = bf16[64,64]{1,0} constant(0)
  %h.4 = bf16[512,64]{1,0} get-tuple-element(%s.4), index=2
  %l.4 = bf16[64,512]{1,0} convolution(%x.4, %h.4), dim_labels=bf_oi->bf
  ROOT %t.4 = (s32[], s32[], bf16[512,64]{1,0}) copy(%s.4)
}

%more (s.1: (s32[], s32[], bf16[512,64])) -> pred[] {
  %s.1 = (s32[], s32[], bf16[512,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s.1), index=0
  %n = s32[] get-tuple-element(%s.1), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%blocks (s.2: (s32[], s32[], bf16[512,64])) -> (s32[], s32[], bf16[512,64]) {
  %s.2 = (s32[], s32[], bf16[512,64]{1,0}) parameter(0)
  ROOT %inner = (s32[], s32[], bf16[512,64]{1,0}) while(%s.2), condition=%more, body=%block
}

ENTRY %main (s.3: (s32[], s32[], bf16[512,64])) -> (s32[], s32[], bf16[512,64]) {
  %s.3 = (s32[], s32[], bf16[512,64]{1,0}) parameter(0)
  %whole = (s32[], s32[], bf16[512,64]{1,0}) while(%s.3), condition=%more, body=%blocks
  ROOT %rest = (s32[], s32[], bf16[512,64]{1,0}) while(%whole), condition=%more, body=%short
}
"""


def trips_of_the_loss(slots, lengths=(64, 128)):
    facts = {
        "rows_per_pass": 100, "vocabularies": {"a": 512, "b": 512}, "loss": {"slots": slots, "lengths": lengths},
        "expected_targets": {"a": 10.0, "b": 10.0}, "target_deviations": {"a": 5.0, "b": 5.0},
    }  # fmt: skip
    total = walk(HEADS, loop_trips=heads.loop_trips(facts))
    assert not total.unknown
    return {name: trips for name, trips, _ in total.loops}


def test_loops_of_the_loss_run_as_often_as_the_recipe_has_them():
    # 1,000 targets on average with a deviation of 50, for each of two modalities.
    mean = trips_of_the_loss({"a": 1000, "b": 1000})
    assert mean["whole"] == pytest.approx(2 * 0.1003, abs=0.02)  # over 64 rows left: 1.28 deviations
    assert mean["rest"] == pytest.approx(2 * (0.5 - 0.1003 + 0.0052), abs=0.06)
    seldom = trips_of_the_loss({"a": 1100, "b": 1100})
    assert seldom["rest"] == pytest.approx(2 * 0.0228, abs=0.01)
    # No slots: both have 7 or 8 blocks of 128, half of the time one of 64.
    none = trips_of_the_loss({})
    assert none["whole"] == pytest.approx(2.0) and none["inner"] == pytest.approx(7.55, abs=0.3)
    assert 0.5 < none["rest"] < 1.5
    # With one length only, the rest is a block too.
    one = trips_of_the_loss({}, (128,))
    assert one["whole"] == pytest.approx(2.0) and one["inner"] == pytest.approx(8.3, abs=0.3)


def test_other_loops_are_not_taken_for_the_losss():
    text = loop(bound="get-tuple-element(%state.1), index=1")
    facts = {"rows_per_pass": 1, "vocabularies": {"a": 512}, "loss": {"slots": {}, "lengths": (64,)},
             "expected_targets": {"a": 1.0}, "target_deviations": {"a": 1.0}}  # fmt: skip
    assert walk(text, loop_trips=heads.loop_trips(facts)).unknown


def test_time_is_told_apart_by_the_innermost_named_scope():
    text = ELEMENTWISE.replace("CYC", cycles(100))
    assert [schedule.part(n) for n in ("jit(step)/transpose(jvp(encoder))/embeddings/add", "a/loss_fn/mul")] == [
        "embeddings", schedule.OTHER,
    ]  # fmt: skip
    walked = walk(text.replace("x/mul", "jit(step)/transpose(jvp(loss))/mul"))
    assert walked.parts["loss"] == sum(walked.parts.values()) == walked.seconds > 0
