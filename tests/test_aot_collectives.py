"""Collectives of a compiled module: kinds, groups, bytes, links."""

from __future__ import annotations

import pytest
from aot_modules import machine, walk

from fm4m.aot import collectives
from fm4m.aot.chips import CHIPS

CHIP = CHIPS["v4"]


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups={}, to_apply=%add", (0, 1, 2, 3)),
        ("to_apply=%add", (0, 1, 2, 3)),
        ("replica_groups=[2,2]<=[4], dimensions={0}", (0, 1)),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", (0, 2)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, dimensions={0}", (0, 2)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={0}", (0, 1)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, dimensions={0}", (0, 2)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, to_apply=%add", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, to_apply=%add", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}, to_apply=%add", (3, 1)),
    ],
)
def test_first_group(text, group):
    assert collectives.first_group(f", channel_id=1, {text}", 4) == group


def test_unreadable_groups_are_refused():
    with pytest.raises(ValueError, match="replica groups"):
        collectives.first_group("replica_groups=other", 4)


COLLECTIVES = """
%scatter (p: bf16[64,128]) -> bf16[16,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %r = bf16[64,128]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %i = u32[] partition-id()
  ROOT %s = bf16[16,128]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={16,128}
}

ENTRY %main (a: bf16[16,128], b: bf16[64,128], c: f32[64,128]) -> bf16[16,128] {
  %a = bf16[16,128]{1,0} parameter(0)
  %b = bf16[64,128]{1,0} parameter(1)
  %c = f32[64,128]{1,0} parameter(2)
  %gs = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %gd = bf16[64,128]{1,0} all-gather-done(%gs)
  %g = bf16[64,128]{1,0} all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %rs = bf16[16,128]{1,0} reduce-scatter(%b), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  %fs = bf16[16,128]{1,0} fusion(%b), kind=kCustom, calls=%scatter
  ROOT %ar = f32[64,128]{1,0} all-reduce(%c), replica_groups={{0,2},{1,3}}, to_apply=%add
}
"""


def test_collectives_are_counted_by_kind_with_the_bytes_of_the_whole_array():
    rows = {(r["kind"], r["asynchronous"], r["group"]): r for r in walk(COLLECTIVES).collectives.table()}
    whole = 64 * 128 * 2
    assert {key: (r["count"], r["bytes"]) for key, r in rows.items()} == {
        ("all-gather", True, 4): (1, whole),
        ("all-gather", False, 4): (1, whole),
        # One as JAX's psum_scatter gives it, one as XLA makes it of an all-reduce and a slice.
        ("reduce-scatter", False, 4): (2, 2 * whole),
        ("all-reduce", False, 2): (1, 2 * whole),
    }
    # 2 x 2 x 1 chips without wrap-around: two links for a group of all, one for a group along one dimension.
    assert rows["all-gather", True, 4]["seconds"] == pytest.approx(whole * 3 / 4 / (2 * 45e9))
    assert rows["all-reduce", False, 2]["seconds"] == pytest.approx(2 * (2 * whole) / 2 / 45e9)


def test_collectives_between_slices_go_over_the_network():
    text = """
ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %t = token[] after-all()
  %s = (f32[1024]{0}, u32[], token[]) send(%a, %t), channel_id=3, is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sd = token[] send-done(%s)
  ROOT %r = f32[1024]{0} all-reduce(%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""
    rows = walk(text, machine=machine(slices=2)).collectives.table()
    assert {(r["kind"], r["network"], r["group"], r["asynchronous"]) for r in rows} == {
        ("all-reduce", "DCN", 2, True),
        ("all-reduce", "DCN", 2, False),
    }
    assert sum(r["seconds"] for r in rows) == pytest.approx(2 * 4096 / CHIP.dcn_rate)


def test_collectives_fused_with_products_count_once():
    text = """
%start (p: bf16[16,128]) -> bf16[64,128] {
  %p = bf16[16,128]{1,0} parameter(0)
  ROOT %g = bf16[64,128]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_collective_fusion.1 (p.1: bf16[16,128], x: bf16[64,64]) -> bf16[64,128] {
  %p.1 = bf16[16,128]{1,0} parameter(0)
  %x = bf16[64,64]{1,0} parameter(1)
  %g.1 = bf16[64,128]{1,0} all-gather(%p.1), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = bf16[64,128]{1,0} convolution(%x, %g.1), dim_labels=bf_io->bf
}

ENTRY %main (a: bf16[16,128], x: bf16[64,64]) -> bf16[64,128] {
  %a = bf16[16,128]{1,0} parameter(0)
  %x.1 = bf16[64,64]{1,0} parameter(1)
  %async-collective-start = bf16[64,128]{1,0} fusion(%a), kind=kCustom, calls=%start
  %fusion.1 = bf16[64,128]{1,0} fusion(%a, %x.1), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %async-collective-done = bf16[64,128]{1,0} fusion(%a), kind=kCustom, calls=%start
}
"""
    total = walk(text)
    (row,) = total.collectives.table()
    assert (row["kind"], row["asynchronous"], row["count"]) == ("all-gather", True, 1)
    assert total.product_flops == 2 * 64 * 128 * 64


def test_links_of_a_group():
    cube = machine((4, 4, 4), wrap=True)
    plane = [i for i, p in enumerate(cube.places) if p.coordinates[0] == 0]
    assert cube.links(range(64)) == 6 and cube.links(plane) == 4
    assert cube.links([i for i in plane if cube.places[i].coordinates[1] == 0]) == 2
    assert cube.links(plane[:2]) == 1
