"""Names of slice types, and the devices that libtpu makes of them."""

from __future__ import annotations

import importlib.util

import pytest

from fm4m.aot import topology
from fm4m.config_file import ConfigError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


@pytest.mark.parametrize(
    "name, shape, chips, hosts",
    [
        ("v4-8", (2, 2, 1), 4, 1),
        ("v4-128", (4, 4, 4), 64, 16),
        ("v4-4096", (8, 16, 16), 2048, 512),
        ("v5p-64", (2, 4, 4), 32, 8),
        ("v5e-1", (1, 1), 1, 1),
        ("v5e-8", (2, 4), 8, 1),
        ("v6e-16", (4, 4), 16, 4),
        ("v5litepod-256", (16, 16), 256, 64),
        ("V6E-64", (8, 8), 64, 16),
    ],
)
def test_names(name, shape, chips, hosts):
    found = topology.parse(name)
    assert (found.shape, found.chips, found.hosts) == (shape, chips, hosts)


def test_every_name_is_found_again():
    assert len(set(topology.names())) == len(topology.names())
    assert all(topology.parse(name).name == name for name in topology.names())


def test_slices_multiply_chips():
    two = topology.parse("v4-128", slices=2)
    assert (two.chips, two.hosts) == (128, 32) and "2 slices of v4-128" in two.describe()


def test_large_cubes_are_tori():
    assert topology.parse("v4-128").wrap == (True,) * 3
    assert topology.parse("v4-64").wrap == (False,) * 3
    assert topology.parse("v5e-256").wrap == (True, True)
    assert topology.parse("v5e-128").wrap == (False, True)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v4-100", "there is no v4-100; .* two a chip; the nearest: v4-64 and v4-128"),
        ("v5e-3", "counts chips; the nearest: v5e-1 and v5e-4"),
        ("v6e-9999", "the nearest: v6e-256"),
        ("v7-8", "slice type"),
        ("h100", "slice type"),
    ],
)
def test_unknown_names_give_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        topology.parse(name)


def test_a_missing_libtpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[aot\]'$"):
        topology.devices(topology.parse("v4-8"))


@needs_libtpu
@pytest.mark.parametrize(
    "name, slices, kind", [("v4-8", 1, "TPU v4"), ("v4-128", 2, "TPU v4"), ("v5p-128", 1, "TPU v5"),
                           ("v5e-256", 1, "TPU v5 lite"), ("v6e-8", 1, "TPU v6 lite"), ("v5e-1", 1, "TPU v5 lite")]
)  # fmt: skip
def test_libtpu_makes_one_device_a_chip(name, slices, kind):
    wanted = topology.parse(name, slices)
    devices = topology.devices(wanted)
    assert len(devices) == wanted.chips and len({d.process_index for d in devices}) == wanted.hosts
    assert {d.device_kind for d in devices} == {kind} == {wanted.chip.device_kind}
    assert len({getattr(d, "slice_index", 0) or 0 for d in devices}) == slices
    assert all(len(d.coords) >= len(wanted.shape) for d in devices)
