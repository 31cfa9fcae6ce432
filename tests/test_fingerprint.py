"""Fingerprints: equal to their definition, on any layout, and different after any damage."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fm4m import fingerprint, sharding

TYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool")
FIXED = settings(derandomize=True, deadline=None, max_examples=60)


def by_definition(array):
    """Word by word, in Python's integers."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    words = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}").tolist()
    one = sum(mix(word ^ index * 0x9E3779B1 % 2**32) for index, word in enumerate(words))
    two = sum(mix((word * 0x85EBCA77 + index * 0xC2B2AE3D) % 2**32) for index, word in enumerate(words))
    return f"{one % 2**32:08x}{two % 2**32:08x}"


def values(shape, dtype, seed=0):
    drawn = np.random.default_rng(seed).normal(size=shape) * 50
    return (drawn > 0) if dtype == "bool" else drawn.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def of(array):
    sums = fingerprint.host_sums(array, [0] * array.ndim, array.shape)
    return f"{sums[0]:08x}{sums[1]:08x}"


def tree():
    shapes = [(), (1,), (7,), (16, 24), (3, 8, 40), (2, 0)]
    return {f"{dtype}/{len(shape)}/{i}": values(shape, dtype, i) for dtype in TYPES for i, shape in enumerate(shapes)}


def test_numpy_and_xla_do_as_defined():
    arrays = tree() | {"over a block": values((3, 30_000), "float32")}
    expected = {name: by_definition(np.asarray(x)) for name, x in arrays.items()}
    placed = {name: jnp.asarray(x) for name, x in arrays.items()}
    assert fingerprint.fingerprints(placed) == (expected, [])
    few = [name for name in arrays if not name.startswith(("float16", "int8"))]
    (sums,) = fingerprint._device_sums(None, [placed[name] for name in few]).values()
    assert {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(few, sums)} == {name: expected[name] for name in few}


def test_what_is_not_supported_is_named():
    with pytest.raises(TypeError, match=r"a/key is key<fry>: fingerprints are for types of at most 32 bits"):
        fingerprint.fingerprints({"a": {"key": jax.random.key(0)}})


@FIXED
@given(st.data())
def test_every_flipped_bit_is_seen(data):
    array = values((9, 13), data.draw(st.sampled_from(TYPES[:-1])))
    damaged = array.copy()
    raw = damaged.reshape(-1).view(np.uint8)
    raw[data.draw(st.integers(0, raw.size - 1))] ^= data.draw(st.integers(1, 255))
    a, b = of(array), of(damaged)
    # Each of the two sums alone.
    assert a[:8] != b[:8] and a[8:] != b[8:]


@FIXED
@given(st.data())
def test_every_exchange_and_lost_block_is_seen(data):
    array = values((12, 16), data.draw(st.sampled_from(TYPES[:4])))
    damaged = array.copy()
    i, j = data.draw(st.lists(st.integers(0, 11), min_size=2, max_size=2, unique=True))
    how = data.draw(st.sampled_from(["rows", "columns", "sign", "zero", "shift", "repeat"]))
    if how == "rows":
        damaged[[i, j]] = damaged[[j, i]]
    elif how == "columns":
        damaged[:, [i, j]] = damaged[:, [j, i]]
    elif how == "sign":  # x and -x change places
        array[i, 3], array[j, 5] = 4, -4
        damaged = array.copy()
        damaged[i, 3], damaged[j, 5] = -4, 4
    elif how == "zero":
        damaged[min(i, j) : max(i, j)] = 0
    elif how == "shift":
        damaged = np.roll(damaged.reshape(-1), i + 1).reshape(12, 16)
    else:
        damaged[i] = damaged[j]
    assert of(array) != of(damaged)


@FIXED
@given(st.data())
def test_parts_add_up_to_the_whole(data):
    shape = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    array = values(shape, "float32")
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    total = np.zeros(2, np.uint64)
    for index in np.ndindex(*(len(c) - 1 for c in cuts)):
        offsets = [c[i] for c, i in zip(cuts, index)]
        part = array[tuple(slice(c[i], c[i + 1]) for c, i in zip(cuts, index))]
        total += fingerprint.host_sums(part, offsets, shape)
    assert (total % 2**32 == fingerprint.host_sums(array, [0] * len(shape), shape)).all()


def on_eight_devices():
    """The same for every layout, by both ways; copies that differ are named. Runs in a process of its own."""
    mesh, x = sharding.make_mesh(2, 2, 2), values((16, 24), "float32")
    arrays = [x, x.astype(ml_dtypes.bfloat16), np.int32(3)]
    expected = [by_definition(np.asarray(a)) for a in arrays]
    split = [P("fsdp"), P(("tensor", "fsdp")), P("fsdp", "tensor"), P("tensor", ("data", "fsdp")), P(None, "data")]
    for spec in (P(), *split):
        put = [jax.device_put(a, NamedSharding(mesh, spec if a.ndim else P())) for a in map(np.asarray, arrays)]
        assert fingerprint.fingerprints(put) == (dict(zip("012", expected)), []), spec
        if any(isinstance(axes, tuple) for axes in spec):  # a compilation each
            host, device = fingerprint._host_sums(put), fingerprint._device_sums(mesh, put)
            for place in mesh.devices.flat:
                np.testing.assert_array_equal(host[place], device[place], err_msg=str(spec))
    copies = [x.copy() for _ in range(8)]
    copies[5][3, 3] += 1
    shards = [jax.device_put(c, d) for c, d in zip(copies, mesh.devices.flat)]
    uneven = jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, P()), shards)
    assert fingerprint.fingerprints({"a": put[0], "b": uneven}) == ({"a": expected[0], "b": expected[0]}, ["b"])


def test_layouts_change_nothing():
    here = pathlib.Path(__file__).resolve().parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    paths = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "test_fingerprint.py")],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    on_eight_devices()
