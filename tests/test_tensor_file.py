"""Safetensors files written one tensor at a time are those that the library reads."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fm4m.interop.tensor_file import TensorFile, TensorFileError, write

names = st.text("abc.@é", min_size=1, max_size=6)
shapes = st.dictionaries(names, st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)


@settings(derandomize=True, max_examples=50)
@given(shapes, st.dictionaries(st.text("kö", min_size=1, max_size=3), st.text(max_size=5), max_size=2))
def test_what_is_written_is_read_by_the_library(tmp_path_factory, shapes, metadata):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    seen = []
    write(path, shapes, tensors.__getitem__, metadata, seen.append)
    read = load_file(path)
    assert set(read) == set(tensors) and sum(seen) == sum(t.size for t in tensors.values())
    with TensorFile(path) as file:
        assert file.metadata == metadata and file.shapes == shapes
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(read[name], tensor)
            np.testing.assert_array_equal(file.read(name), tensor)


def test_other_float_types_become_float32(tmp_path):
    values = np.array([0.5, -3.0, 1024.0])
    save_file({"half": values.astype(np.float16), "double": values, "int": values.astype(np.int32)}, tmp_path / "x")
    header = {"b": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}
    text = json.dumps(header).encode()
    (tmp_path / "bf16").write_bytes(
        struct.pack("<Q", len(text)) + text + (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    )
    with TensorFile(tmp_path / "x") as file:
        for name in ("half", "double"):
            assert file.read(name).dtype == np.float32
            np.testing.assert_array_equal(file.read(name), values)
        with pytest.raises(TensorFileError, match="int holds I32; weights are"):
            file.read("int")
    with TensorFile(tmp_path / "bf16") as file:
        np.testing.assert_array_equal(file.read("b"), values)


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": (2,)}, lambda name: np.ones(2, np.float32), {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a is float32 \(3,\); announced was float32 \(2,\)"):
        write(path, {"a": (2,)}, lambda name: np.ones(3, np.float32), {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@settings(derandomize=True, max_examples=60)
@given(st.binary(max_size=64), st.integers(0, 200))
def test_damaged_files_are_one_kind_of_error(tmp_path_factory, junk, cut):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    write(path, {"a": (2, 3), "b": ()}, lambda name: np.zeros((2, 3) if name == "a" else (), np.float32), {"k": "v"})
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + junk)
    if path.read_bytes() == whole:
        return
    try:
        with TensorFile(path) as file:
            for name in file.shapes:
                file.read(name)
    except TensorFileError as error:
        assert "x.safetensors" in str(error)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        TensorFile(path.with_name("absent"))
