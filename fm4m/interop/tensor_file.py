"""Safetensors files, one tensor at a time: a model of 14 GB is neither read nor written as a whole.

A file is eight bytes of header length, a JSON header with every tensor's dtype, shape and place, then the tensors'
bytes. The `safetensors` library checks header and length on opening. It has no writer that streams, and it reads
through a memory map, whose pages count as this process's memory until the system takes them back (twice the size of a
model at the end of an import); so both are plain file accesses here.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping

import numpy as np

from fm4m.files import complete_file

# How the floats of a file are stored. NumPy has no BF16; it is the upper half of a float32.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class TensorFileError(ValueError):
    """A file that is no whole safetensors file; the message names the file."""


class TensorFile:
    """A safetensors file opened for reading; a context manager.

    Attributes:
      path: the file.
      metadata: texts by name.
      shapes, dtypes: by tensor; dtypes in the format's own names ("F32").

    Raises TensorFileError for a file that is truncated, damaged or of another format, FileNotFoundError for none.
    """

    def __init__(self, path: str | os.PathLike):
        from safetensors import SafetensorError, safe_open

        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            with safe_open(self.path, "numpy") as checked:
                self.metadata: dict[str, str] = dict(checked.metadata() or {})
        except (SafetensorError, OSError, ValueError) as error:
            raise TensorFileError(f"{self.path} is not a whole safetensors file: {error}") from error
        self._file = open(self.path, "rb")  # noqa: SIM115
        (length,) = struct.unpack("<Q", self._file.read(8))
        self._header = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length
        self.shapes = {key: tuple(entry["shape"]) for key, entry in sorted(self._header.items())}
        self.dtypes = {key: entry["dtype"] for key, entry in self._header.items()}

    def read(self, key: str) -> np.ndarray:
        """One tensor as float32. Raises TensorFileError for a dtype that is not a float of 16, 32 or 64 bits."""
        dtype, (start, end) = self.dtypes[key], self._header[key]["data_offsets"]
        if dtype not in DTYPES:
            raise TensorFileError(f"{self.path}: {key} holds {dtype}; weights are {', '.join(DTYPES)}")
        array = np.empty(self.shapes[key], DTYPES[dtype])
        self._file.seek(self._start + start)
        if self._file.readinto(array.reshape(-1).view(np.uint8)) != end - start:
            raise TensorFileError(f"{self.path} became shorter while {key} was read")
        if dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=False)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def write(
    path: str | os.PathLike,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
    progress: Callable[[int], object] = lambda elements: None,
) -> None:
    """Writes a float32 safetensors file; at no time are two tensors in memory.

    The file appears under its name when it is complete; what a failure leaves is removed.

    Args:
      path: the file; an existing one is replaced.
      shapes: of all tensors; they are written in this order.
      tensor: makes the float32 tensor of a name.
      metadata: texts by name.
      progress: called with the number of elements after each tensor.

    Raises ValueError if a tensor has not the announced shape or dtype.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    with complete_file(path) as beside, open(beside, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            array = tensor(name)
            if array.shape != tuple(shape) or array.dtype != np.float32:
                raise ValueError(f"{name} is {array.dtype} {array.shape}; announced was float32 {tuple(shape)}")
            file.write(np.ascontiguousarray(array).data)
            progress(array.size)
