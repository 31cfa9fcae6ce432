"""Reading .pth files without executing them; the files are assembled opcode by opcode, as torch.save writes them."""

from __future__ import annotations

import struct
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines.features import torch_file

PROTO, STOP, EMPTY_ORDERED_DICT = b"\x80\x02", b".", b"ccollections\nOrderedDict\n)R"
SYSTEM_CALL = b"cposix\nsystem\n" + b"X\x04\x00\x00\x00true" + b"\x85R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def sizes(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(integer(v) for v in values) + b"t"


def tensor(key, size, shape, strides, offset=0, legacy=True, kind=b"ctorch\nFloatStorage\n") -> bytes:
    storage = (
        b"(" + text("storage") + kind + text(key) + text("cpu") + integer(size) + (b"N" if legacy else b"") + b"tQ"
    )
    arguments = storage + integer(offset) + sizes(shape) + sizes(strides) + b"\x89" + EMPTY_ORDERED_DICT
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def table(entries: dict[str, bytes]) -> bytes:
    body = b"".join(text(name) + value for name, value in entries.items())
    metadata = b"}" + text("_metadata") + EMPTY_ORDERED_DICT + b"sb"
    return PROTO + EMPTY_ORDERED_DICT + b"(" + body + b"u" + metadata + STOP


def legacy_file(entries: dict[str, bytes], storages: dict[str, np.ndarray]) -> bytes:
    machine = b"}(" + text("protocol_version") + b"M\xe9\x03" + text("little_endian") + b"\x88u"
    head = PROTO + b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + PROTO + b"M\xe9\x03." + PROTO + machine + STOP
    keys = PROTO + b"](" + b"".join(map(text, storages)) + b"e" + STOP
    contents = b"".join(struct.pack("<q", a.size) + a.tobytes() for a in storages.values())
    return head + table(entries) + keys + contents


def write_zip(path, entries, storages, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", table(entries))
        archive.writestr("archive/byteorder", b"little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


NUMBERS = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize("layout", ["legacy", "zip"])
def test_torch_file_reads_strided_tensors(tmp_path, layout):
    legacy = layout == "legacy"
    count = np.array([7], np.int64)
    entries = {
        "plain": tensor("a", 24, (2, 3, 4), (12, 4, 1), legacy=legacy),
        "transposed": tensor("b", 24, (4, 3), (1, 4), offset=12, legacy=legacy),
        "scalar": tensor("c", 1, (), (), legacy=legacy, kind=b"ctorch\nLongStorage\n"),
    }
    storages = {"a": NUMBERS, "b": NUMBERS, "c": count}
    path = tmp_path / "weights.pth"
    if legacy:
        path.write_bytes(legacy_file(entries, storages))
    else:
        write_zip(path, entries, storages)
    state = torch_file.read_torch_file(path)
    assert list(state) == list(entries)
    np.testing.assert_array_equal(state["plain"], NUMBERS.reshape(2, 3, 4))
    np.testing.assert_array_equal(state["transposed"], NUMBERS[12:].reshape(3, 4).T)
    assert state["scalar"].dtype == np.int64 and state["scalar"].shape == () and state["scalar"] == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (SYSTEM_CALL, "opcode GLOBAL .* 'posix system' is not allowed"),
        (b"cbuiltins\neval\n", "opcode GLOBAL .* 'builtins eval' is not allowed"),
        (text("os") + text("system") + b"\x93", "opcode STACK_GLOBAL .* not allowed"),
        (b"(" + text("true") + b"iposix\nsystem\n", "opcode INST .* not allowed"),
        (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ .* not allowed"),
        (b"\x82\x01", "opcode EXT1 .* not allowed"),
        (b"ccollections\nOrderedDict\n" + integer(3) + b"\x85R", "opcode REDUCE .* neither OrderedDict"),
        (EMPTY_ORDERED_DICT + b"}" + text("__class__") + integer(1) + b"sb", "opcode BUILD .* _metadata"),
        (integer(3), "entry 'w' is no tensor but int"),
        (b"R", "opcode REDUCE"),
        (tensor("a", 24, (24,), (1,), kind=b"ctorch\nHalfStorage\n"), "'torch HalfStorage' is not allowed"),
        (tensor("a", 24, (24,), (1,), offset=1), "reach outside its storage"),
        (tensor("a", 24, (5, 5), (4, 1)), "more than its storage"),
        (tensor("a", 24, (2, 2), (-1, 1)), "neither OrderedDict"),
        (tensor("a", 24, (100000, 100000), (0, 0)), "more than its storage"),
        (tensor("a", 25, (24,), (1,)), "storage a has 24 elements, the table says 25"),
        # A tuple of two times a tuple of two times ...: 2**60 leaves, which an error message must not print.
        (b")" + b"q\x01h\x01\x86" * 60 + b"Q", "reference to something else"),
    ],
)
def test_torch_file_refuses_anything_else(tmp_path, value, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(legacy_file({"w": value}, {"a": NUMBERS}))
    with pytest.raises(ValueError, match=message) as error:
        torch_file.read_torch_file(path)
    assert str(path) in str(error.value)


def test_torch_file_refuses_shared_storages_and_compressed_zips(tmp_path):
    path = tmp_path / "weights.pth"
    one = tensor("a", 24, (24,), (1,))
    path.write_bytes(legacy_file({"w": one, "v": one}, {"a": NUMBERS}))
    with pytest.raises(ValueError, match="tensor v shares storage a"):
        torch_file.read_torch_file(path)
    entries = {"w": tensor("a", 24, (24,), (1,), legacy=False)}
    write_zip(path, entries, {"a": NUMBERS}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        torch_file.read_torch_file(path)
    write_zip(path, entries, {"a": NUMBERS[:5]})
    with pytest.raises(ValueError, match="storage a has 20 bytes"):
        torch_file.read_torch_file(path)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_torch_file_damage_is_a_value_error(tmp_path_factory, data):
    whole = legacy_file({"w": tensor("a", 24, (4, 6), (6, 1))}, {"a": NUMBERS})
    position = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(whole[:position])
    with pytest.raises(ValueError, match=r"damaged\.pth"):
        torch_file.read_torch_file(path)
    changed = bytearray(whole)
    changed[position] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        state = torch_file.read_torch_file(path)
    except ValueError:
        return
    assert all(isinstance(array, np.ndarray) and array.size <= 24 for array in state.values())
