"""Where samples come from: SeqIO data sources with random access, sample number -> {modality: array}."""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import os
import pathlib
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import seqio

from data_pipelines.manifest import check_aligned, read_manifest
from data_pipelines.records import Joined, Records
from data_pipelines.storage import patiently
from fm4m import modalities as modalities_lib
from fm4m.errors import DataError

Sample = dict[str, np.ndarray]


class Samples(Protocol):
    """The samples of one split. Reading the same index twice gives the same sample; safe for threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def where(self, index: int, modality: str) -> str:
        """Where the array of a modality of a sample is stored, for messages."""
        ...


class RandomAccessSource(seqio.DataSource):
    """A SeqIO data source of which any sample can be read by its number, so that any position of a stream can be.

    Subclasses implement `open_split`, `describe` and `identity`. Tasks of `data_pipelines.registry` read them through
    Grain; SeqIO's own `seqio.Task`, which reads tf.data, cannot.
    """

    def __init__(self, splits: Sequence[str]):
        super().__init__(splits=tuple(splits), performs_internal_shuffling=True, caching_permitted=False)
        self._open: dict[tuple, Samples] = {}
        self._open_lock = threading.Lock()

    @abc.abstractmethod
    def open_split(self, split: str, modalities: Sequence[str]) -> Samples:
        """Opens a split and checks cheaply that it is whole. Raises an error naming the file and the remedy."""

    @abc.abstractmethod
    def describe(self, split: str, modalities: Sequence[str]) -> dict:
        """JSON-able description of the contents (sizes and hashes, no paths): it changes when the samples do."""

    @abc.abstractmethod
    def identity(self) -> tuple:
        """What makes two sources of this class the same source; compared when a task is registered again."""

    def open(self, split: str, modalities: Sequence[str]) -> Samples:
        """The samples of a split, opened once. Raises ValueError for a split that the source does not have.

        Errors of storage that may pass are waited for, here and while reading; then a read raises DataError.
        """
        if split not in self.splits:
            raise ValueError(modalities_lib.unknown_name(split, self.splits, "split of the data source"))
        key = (split, *modalities)
        with self._open_lock:
            if key not in self._open:
                where = lambda: f"split {split!r} of {type(self).__name__}"  # noqa: E731
                self._open[key] = _Patient(patiently(lambda: self.open_split(split, modalities), where))
            return self._open[key]

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def get_dataset(self, *args, **kwargs):
        """Not available: raises NotImplementedError."""
        raise NotImplementedError(
            f"{type(self).__name__} is read by random access: use seqio.get_dataset with a task or mixture defined by "
            "data_pipelines.registry"
        )


class _Patient:
    """`Samples` of any source, with a second chance for storage that fails for a while."""

    def __init__(self, samples: Samples):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        where = lambda: self._samples.where(index, "")  # noqa: E731
        try:
            return patiently(lambda: self._samples[index], where)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{where()} cannot be read: {error}") from error

    def where(self, index: int, modality: str) -> str:
        return self._samples.where(index, modality)


class TokenSource(RandomAccessSource):
    """Token files as `data_pipelines.records` writes them; record i of every modality is sample i.

    Args:
      root: folder that holds a folder for every split. It is looked at when a stream is opened, not before.
      splits: names of the splits.
      prepare: the command that writes the files; errors name it as the remedy.
    """

    def __init__(self, root: str | os.PathLike, splits: Sequence[str] = ("train", "validation"), prepare: str = ""):
        super().__init__(splits)
        self.root = pathlib.Path(root)
        self._prepare = prepare

    def open_split(self, split: str, modalities: Sequence[str]) -> Samples:
        try:
            manifest = read_manifest(self.root, split)
            joined = {name: Records(self.root, split, modalities_lib.get(name), manifest) for name in modalities}
            check_aligned(self.root / split, manifest["modalities"], list(modalities))
        except (FileNotFoundError, ValueError) as error:
            if not self._prepare:
                raise
            raise type(error)(f"{error}. The files are prepared by: {self._prepare}") from error
        return Joined(joined)

    def describe(self, split: str, modalities: Sequence[str]) -> dict:
        entries = read_manifest(self.root, split)["modalities"]
        files = {name: entries[name]["files"] for name in modalities}
        return {
            "kind": "token files",
            "records": sum(f["records"] for f in files[modalities[0]]),
            "modalities": {
                name: {"files": len(listed), "bytes": sum(f["bytes"] for f in listed), "sha256": digest(listed)}
                for name, listed in files.items()
            },
        }

    def identity(self) -> tuple:
        return str(self.root.absolute()), tuple(self.splits)

    def num_input_examples(self, split: str) -> int:
        entries = read_manifest(self.root, split)["modalities"]
        return sum(f["records"] for f in next(iter(entries.values()))["files"])


class ArraySource(RandomAccessSource):
    """Samples in memory.

    Args:
      splits: the samples of every split, each a dict from modality to an array (no entry: the sample lacks it).
    """

    def __init__(self, splits: Mapping[str, Sequence[Mapping[str, np.ndarray]]]):
        super().__init__(tuple(splits))
        self._samples = {split: [dict(s) for s in samples] for split, samples in splits.items()}

    def open_split(self, split: str, modalities: Sequence[str]) -> Samples:
        return Listed(self._samples[split], f"split {split!r}")

    def describe(self, split: str, modalities: Sequence[str]) -> dict:
        sha = hashlib.sha256()
        for sample in self._samples[split]:
            for name in sorted(sample):
                array = np.ascontiguousarray(sample[name])
                sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
        return {"kind": "arrays", "records": len(self._samples[split]), "sha256": sha.hexdigest()}

    def identity(self) -> tuple:
        return tuple((split, self.describe(split, ())["sha256"]) for split in self.splits)

    def num_input_examples(self, split: str) -> int:
        return len(self._samples[split])


class Listed:
    """`Samples` over any sequence of dicts."""

    def __init__(self, samples: Sequence[Sample], name: str):
        self._samples, self._name = samples, name

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def where(self, index: int, modality: str) -> str:
        return f"{self._name}, sample {index}"


def function_identity(function: Callable) -> object:
    """What makes two functions the same function, although the module that defines them was imported twice."""
    if isinstance(function, functools.partial):
        return function_identity(function.func), function.args, tuple(sorted(function.keywords.items()))
    code = getattr(function, "__code__", None)
    return (function.__qualname__, _code_identity(code)) if code else function


def _code_identity(code: types.CodeType) -> tuple:
    constants = tuple(_code_identity(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts)
    return code.co_code, code.co_names, constants


def function_name(function: Callable) -> str:
    """Name of a function in descriptions, without its module (which depends on how it was imported)."""
    function = function.func if isinstance(function, functools.partial) else function
    return getattr(function, "__qualname__", type(function).__qualname__)


def digest(value: object) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
