"""Reads the tensors of a PyTorch ``.pth`` file without executing anything in it.

A ``.pth`` file stores its table of tensors as a pickle, and unpickling runs whatever the file says. Here the opcodes
are only parsed (``pickletools.genops``) and a machine with no access to Python's import system walks over the few
that a plain state dict needs. Four names may occur in the file, and none of them is imported: they become marks on
the stack. Any other opcode or name is an error that names it.

Both layouts of ``torch.save`` are read: the zip archive (the default since PyTorch 1.6), and the older sequence of
pickles (magic number, protocol, machine, table, storage keys) followed by the storages.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pathlib
import pickletools
import reprlib
import zipfile
from typing import Any, BinaryIO

import numpy as np

# First value of the older layout, and its protocol number.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_DTYPES = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_GLOBALS = (_ORDERED_DICT, _REBUILD_TENSOR, *_DTYPES)

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")
_TUPLE_SIZES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in the file; never looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A reference to a run of numbers elsewhere in the file."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage; strides and offset count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()  # reprs in errors go through reprlib: a tuple of twice a tuple of twice ... prints exponentially


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a state dict of float32 and int64 tensors from a ``.pth`` file.

    Args:
      path: the file, in either layout of ``torch.save``.

    Returns:
      Name to array, in the file's order; C-contiguous copies.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is truncated, or uses an opcode, a name or a tensor layout that a plain state dict does not
        need. The message names the file and what was found.
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    try:
        if data[:4] == b"PK\x03\x04":
            return _read_zip(data)
        return _read_legacy(data)
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a plain PyTorch state dict: {error}") from error


def _read_zip(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        tables = [name for name in members if name.endswith("/data.pkl")]
        if len(tables) != 1:
            raise ValueError(f"expected one member named */data.pkl in the zip archive, found {tables}")
        root = tables[0].removesuffix("data.pkl")

        def member(name: str) -> bytes:
            info = members.get(root + name)
            if info is None:
                raise ValueError(f"zip member {root + name} is missing")
            # torch.save stores members as they are; a compressed one could unpack to any size.
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"zip member {info.filename} is compressed; torch.save never does that")
            return archive.read(info)

        if root + "byteorder" in members and member("byteorder") != b"little":
            raise ValueError(f"byte order {member('byteorder')!r}; only little-endian files are read")
        table = _state_dict(_parse(io.BytesIO(member("data.pkl"))))
        storages = {tensor.storage.key: tensor.storage for tensor in table.values()}
        contents = {}
        for key, storage in storages.items():
            raw = member(f"data/{key}")
            if len(raw) != storage.size * storage.dtype.itemsize:
                expected = f"{storage.size} {storage.dtype.name}"
                raise ValueError(f"storage {key} has {len(raw)} bytes, the table says {expected}")
            contents[key] = np.frombuffer(raw, storage.dtype)
    return {name: _view(name, tensor, contents) for name, tensor in table.items()}


def _read_legacy(data: bytes) -> dict[str, np.ndarray]:
    stream = io.BytesIO(data)
    if _parse(stream) != _LEGACY_MAGIC:
        raise ValueError("the first value is not PyTorch's magic number")
    protocol = _parse(stream)
    if protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"protocol {reprlib.repr(protocol)}, expected {_LEGACY_PROTOCOL}")
    machine = _parse(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError(f"only little-endian files are read; the file's machine record is {reprlib.repr(machine)}")
    table = _state_dict(_parse(stream))
    keys = _parse(stream)
    storages = {tensor.storage.key: tensor.storage for tensor in table.values()}
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(storages):
        raise ValueError("the list of storage keys does not agree with the table of tensors")
    contents = {}
    for key in keys:
        storage = storages[key]
        size = int.from_bytes(_read_exactly(stream, 8), "little", signed=True)
        if size != storage.size:
            raise ValueError(f"storage {key} has {size} elements, the table says {storage.size}")
        contents[key] = np.frombuffer(_read_exactly(stream, size * storage.dtype.itemsize), storage.dtype)
    return {name: _view(name, tensor, contents) for name, tensor in table.items()}


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    raw = stream.read(size)
    if len(raw) != size:
        raise ValueError(f"truncated: {size} bytes expected, {len(raw)} left")
    return raw


def _view(name: str, tensor: _Tensor, contents: dict[str, np.ndarray]) -> np.ndarray:
    """The tensor as an array; the weights of TensorFlow ports are transposed views, so strides matter."""
    shape, strides = tensor.shape, tensor.strides
    if math.prod(shape) > tensor.storage.size:
        raise ValueError(f"tensor {name}: {shape} is more than its storage's {tensor.storage.size} elements")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, strides))
    if 0 in shape or last >= tensor.storage.size:
        raise ValueError(f"tensor {name}: shape {shape}, strides {strides} reach outside its storage")
    values = contents[tensor.storage.key]
    itemsize = values.itemsize
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], shape, [s * itemsize for s in strides])
    return np.array(view, order="C")


def _state_dict(value: Any) -> dict[str, _Tensor]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"expected a dict of tensors, found {type(value).__name__}")
    keys: set[str] = set()
    for name, tensor in value.items():
        if not isinstance(tensor, _Tensor):
            raise ValueError(f"entry {name!r} is no tensor but {type(tensor).__name__}")
        # Shared storages would let a small file ask for any amount of memory.
        if tensor.storage.key in keys:
            raise ValueError(f"tensor {name} shares storage {tensor.storage.key} with another one")
        keys.add(tensor.storage.key)
    return value


def _parse(stream: BinaryIO) -> Any:
    """Value of the pickle at the stream's position, which moves behind it."""
    start = stream.tell()
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, position in pickletools.genops(stream):
        name = opcode.name
        if name == "STOP":
            if len(stack) != 1:
                raise ValueError(f"{len(stack)} values left at the end of the pickle at byte {start}")
            return stack[0]
        try:
            _step(name, argument, stack, memo)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"opcode {name} at byte {position} finds the wrong values on the stack") from error
        except ValueError as error:
            raise ValueError(f"opcode {name} at byte {position}: {error}") from error
    raise ValueError("the pickle does not end")  # genops raises first; here for the reader


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Executes one opcode."""
    if name == "PROTO":
        if argument != 2:
            raise ValueError(f"pickle protocol {argument}, expected 2")
    elif name in _LITERALS:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "TUPLE":
        stack.append(tuple(_pop_to_mark(stack)))
    elif name in _TUPLE_SIZES:
        items = [stack.pop() for _ in range(_TUPLE_SIZES[name])]
        stack.append(tuple(reversed(items)))
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _set_items(stack[-1], [key, value])
    elif name == "SETITEMS":
        items = _pop_to_mark(stack)
        _set_items(stack[-1], items)
    elif name in ("APPEND", "APPENDS"):
        items = [stack.pop()] if name == "APPEND" else _pop_to_mark(stack)
        if not isinstance(stack[-1], list):
            raise TypeError
        stack[-1].extend(items)
    elif name == "GLOBAL":
        if argument not in _GLOBALS:
            raise ValueError(f"the name {argument!r} is not allowed; a state dict needs only {', '.join(_GLOBALS)}")
        stack.append(_Global(argument))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_reduce(function, arguments))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "BUILD":
        # state_dict() hangs its version numbers on the dict as the attribute _metadata; they carry no weights.
        state = stack.pop()
        if not isinstance(stack[-1], dict) or not isinstance(state, dict) or set(state) != {"_metadata"}:
            raise ValueError("only the _metadata of a state dict may be set")
    else:
        raise ValueError("this opcode is not allowed in a plain state dict")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise TypeError
    for key, value in zip(items[::2], items[1::2]):
        if not isinstance(key, str) or key in target:
            raise ValueError(f"dict key {key!r} is repeated or no string")
        target[key] = value


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _reduce(function: Any, arguments: Any) -> Any:
    if function == _Global(_ORDERED_DICT) and arguments == ():
        return {}
    if function == _Global(_REBUILD_TENSOR) and isinstance(arguments, tuple) and len(arguments) == 6:
        storage, offset, shape, strides, _, hooks = arguments
        if (
            isinstance(storage, _Storage)
            and _is_sizes((offset,))
            and _is_sizes(shape)
            and _is_sizes(strides)
            and len(shape) == len(strides)
            and hooks == {}
        ):
            return _Tensor(storage, offset, shape, strides)
    raise ValueError("a call that is neither OrderedDict() nor a tensor")


def _storage(reference: Any) -> _Storage:
    # ("storage", type, key, device, size), and in the older layout a sixth value for views of storages, always None.
    if isinstance(reference, tuple) and (len(reference) == 5 or (len(reference) == 6 and reference[5] is None)):
        tag, kind, key, _, size = reference[:5]
        dtype = _DTYPES.get(kind.name) if isinstance(kind, _Global) else None
        if tag == "storage" and dtype is not None and isinstance(key, str) and _is_sizes((size,)):
            return _Storage(key, dtype, size)
    raise ValueError(f"a reference to something else than a storage: {reprlib.repr(reference)}")
