"""The time of the attention kernels from the TPU compiler's own instructions."""

from __future__ import annotations

import importlib.util

import pytest

from fm4m.aot import kernel_cost
from fm4m.aot.kernel_cost import KernelCostError, attention_bundles, attention_seconds, parse_bundles

# VLIW bundles on TPU v4 of a sample and 128 lanes at 256 x 256 tokens in bfloat16: every lane block, and a sample's
# first besides. They are 756, 1,236 and 269 with libtpu 0.0.42; the matrix units alone need 416 and 896.
FORWARD, BACKWARD, FIRST = 830, 1360, 300

DUMP = """
LB: loop body
     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1   :  { %2 = vsyncpa [#allocation6], 0 } /* Start region 1 */
   0x2 LB: > { %s3 = smov 0 } /* Start region 2 :: Start region 39 */
   0x3   : > { %s4 = smov 1  ;;  %s5 = smov 2 }
   0x4   : > { %6 = sbr.rel (%p7_p6) target = $region40 }
   0x5   : > { %s8 = smov 1 }
   0x6   : > { %9 = sbr.rel (%p10_p11) target = $region64 }
   0x7   : > { %v11 = vld [vmem:[#allocation2] sm:$0xff] }
   0x8   : > { %12 = vst [vmem:[#allocation3] sm:$0xff] %v11 }
   0x9   : > { %v13 = vlaneseq }
   0xa PF: > { %v14 = vlaneseq } /* Start/End empty region 64 */
   0xb   : > { %v15 = vlaneseq }
   0xc   : > { %16 = sbr.rel (!%p17_p9) target = $region70 }
   0xd   : > { %18 = dma.vmem_to_hbm [thread:$0] /*vmem=*/%s8 }
   0xe PF: > { %s19 = smov 1 } /* Start/End empty region 70 :: Start/End empty region 40 */
   0xf   : > { %20 = sbr.rel (!%p21_p1) target = $region2 }
  0x10   :  { %22 = vsyncpa [#allocation6], 1 }
"""

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler: pip install '.[aot]'"
)


def test_bundles_are_counted_by_who_runs_them():
    # The loop has 14. Three stand between a jump within the step's body and where it leads; the copy counts always.
    assert parse_bundles(DUMP) == {"step": 11, "first": 3}


@pytest.mark.parametrize("text", ["", "  0x1  :  { %s1 = smov 0 }", DUMP.replace("empty region 40", "region 41")])
def test_other_texts_are_refused(text):
    with pytest.raises(KernelCostError, match="not the text of a TPU kernel's final bundles"):
        parse_bundles(text)


def test_loops_within_the_grid_are_refused():
    with pytest.raises(KernelCostError, match="trip count"):
        parse_bundles(DUMP.replace("0x8   : >", "0x8   : >>"))


def test_seconds_are_bundles_over_clock_and_cores(monkeypatch):
    def compiled(request, folder):
        assert request["step"] == 4
        return {"forward": {"step": 4000, "first": 1600}, "backward": {"step": 8000, "first": 1600}}

    monkeypatch.setattr(kernel_cost, "_compile", compiled)
    kernel_cost._counts.cache_clear()
    seconds = attention_seconds(256, 256, 64, chip="v4", lane_blocks=8)
    kernel_cost._counts.cache_clear()
    # Two cores at 1.05 GHz, four samples a step.
    assert seconds["forward"] == pytest.approx(1.05 * 4200 / 4 / 2 / 1.05e9)
    assert seconds["backward"] == pytest.approx(1.05 * 8200 / 4 / 2 / 1.05e9)


def test_what_cannot_be_said():
    with pytest.raises(KeyError, match="no chip named 'v3'"):
        attention_seconds(256, 256, 64, chip="v3")
    with pytest.raises(ValueError, match=r"heads of width \(32, 64, 128\), not 48"):
        attention_seconds(256, 256, 48)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernel_cost._counts.cache_clear()
    with pytest.raises(KernelCostError, match="pip install"):
        attention_seconds(256, 256, 64)


@libtpu
def test_a_failed_compilation_says_why():
    with pytest.raises(KernelCostError, match="compiling notatype attention of 256 x 256 tokens for v4 failed"):
        kernel_cost._counts(256, 256, 64, "notatype", "v4", 4)


@libtpu
def test_bundles_on_v4():
    bundles = attention_bundles(256, 256, 64, chip="v4")
    assert 416 < bundles["forward"]["step"] <= FORWARD
    assert 896 < bundles["backward"]["step"] <= BACKWARD
    assert 0 < bundles["forward"]["first"] <= FIRST and 0 < bundles["backward"]["first"] <= FIRST


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "queries", "keys", "dtype"),
    [
        ("v4", 264, 128, "bfloat16"),
        ("v4", 512, 512, "float32"),
        ("v4", 1024, 1024, "bfloat16"),
        *((chip, 256, 256, "bfloat16") for chip in ("v5e", "v5p", "v6e")),
    ],
)
def test_kernels_compile_for_every_chip(chip, queries, keys, dtype):
    seconds = attention_seconds(queries, keys, 64, dtype, chip=chip)
    assert 0 < seconds["forward"] < seconds["backward"] < 1e-4
