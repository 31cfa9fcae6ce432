"""The files of one part: written into a folder beside its place, synced, renamed. A part is there whole or not at all.

    parts/00012/part.json                    counts, and size, hash and number of records of every file
    parts/00012/quarantine.jsonl             what was left out, and why
    parts/00012/train/samples.jsonl          the records in order (new sets only)
    parts/00012/train/rgb@64.arrayrecord     ... of every modality
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.manifest import dtype_of
from data_pipelines.prepare.samples import Record
from fm4m.modalities import Modality

PART, QUARANTINE, SAMPLES, SUFFIX = "part.json", "quarantine.jsonl", "samples.jsonl", ".arrayrecord"
# A quota and a limit on the size of files say "full" in other words.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(OSError):
    """Nothing more can be written where the set is."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full. ArrayRecord's library tells it in the text of a RuntimeError."""
    if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL):
        return True
    return isinstance(error, RuntimeError) and any(os.strerror(code) in str(error) for code in _FULL)


def write_line(file: Any, value: dict) -> None:
    """Appends one line of JSON."""
    file.write(json.dumps(value, ensure_ascii=True) + "\n")


class PartWriter:
    """Writes a part; use as a context. What an exception leaves behind is removed.

    Args:
      folder: the part's place, ``parts/<number>``.
      modalities: what `add` gets arrays of.
      list_samples: write ``samples.jsonl``, too.
    """

    def __init__(self, folder: pathlib.Path, modalities: Sequence[Modality], list_samples: bool):
        self._folder, self._modalities, self._list = folder, modalities, list_samples
        self._beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        self._splits: dict[str, _SplitFiles] = {}

    def __enter__(self) -> PartWriter:
        shutil.rmtree(self._beside, ignore_errors=True)
        self._beside.mkdir(parents=True)
        self._quarantine = (self._beside / QUARANTINE).open("w")
        return self

    def add(self, split: str, record: Record, arrays: dict[str, np.ndarray | None]) -> None:
        """One record of every modality; None where it is missing."""
        if split not in self._splits:
            self._splits[split] = _SplitFiles(self._beside / split, self._modalities, self._list)
        self._splits[split].add(record, arrays)

    def left_out(self, entry: dict) -> None:
        """One line of the report."""
        write_line(self._quarantine, entry)

    def finish(self, counts: dict) -> dict:
        """Closes the files, writes ``part.json`` and puts the folder into its place. Returns what part.json holds."""
        self._quarantine.close()
        splits = {name: split.close() for name, split in self._splits.items()}
        part = {"splits": splits, "quarantine": _facts(self._beside / QUARANTINE), "counts": counts}
        (self._beside / PART).write_text(json.dumps(part, sort_keys=True))
        for path in [*self._beside.rglob("*"), self._beside]:
            _sync(path)
        try:
            os.rename(self._beside, self._folder)
        except OSError as error:
            # A worker that outlived its killed command was faster; what it made of the same samples is the same.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or read_part(self._folder) is None:
                raise
        _sync(self._folder.parent)
        return part

    def __exit__(self, kind, error, trace) -> None:
        for split in self._splits.values():
            split.abandon()
        self._quarantine.close()
        shutil.rmtree(self._beside, ignore_errors=True)


class _SplitFiles:
    def __init__(self, folder: pathlib.Path, modalities: Sequence[Modality], list_samples: bool):
        folder.mkdir()
        self._modalities = modalities
        self._paths = {m.name: folder / f"{m.name}{SUFFIX}" for m in modalities}
        self._writers = {
            name: ArrayRecordWriter(str(path), "group_size:1,uncompressed") for name, path in self._paths.items()
        }
        self._longest, self._empty = dict.fromkeys(self._paths, 0), dict.fromkeys(self._paths, 0)
        self._samples_path = folder / SAMPLES
        self._samples = self._samples_path.open("w") if list_samples else None
        self._keys, self._records = hashlib.sha256(), 0

    def add(self, record: Record, arrays: dict[str, np.ndarray | None]) -> None:
        for modality in self._modalities:
            array, name = arrays[modality.name], modality.name
            if array is None or not len(array):
                self._empty[name] += 1
                self._writers[name].write(b"")
            else:
                self._longest[name] = max(self._longest[name], len(array))
                self._writers[name].write(np.ascontiguousarray(array, dtype_of(modality)).tobytes())
        if self._samples:
            write_line(self._samples, record.listed())
        self._keys.update(record.key.encode() + b"\n")
        self._records += 1

    def close(self) -> dict:
        for writer in self._writers.values():
            writer.close()
        files = {
            name: {**_facts(path), "longest": self._longest[name], "empty": self._empty[name]}
            for name, path in self._paths.items()
        }
        found = {"records": self._records, "keys": self._keys.hexdigest(), "files": files}
        if self._samples:
            self._samples.close()
            found["samples"] = _facts(self._samples_path)
        return found

    def abandon(self) -> None:
        for writer in self._writers.values():
            # If the disk is full, that has been said already; the files go anyway.
            with contextlib.suppress(RuntimeError):
                if writer.is_open():
                    writer.close()
        if self._samples:
            with contextlib.suppress(OSError):
                self._samples.close()


def read_part(folder: pathlib.Path) -> dict | None:
    """What ``part.json`` of a finished part holds; None if the part is not there or a file has another size."""
    try:
        part = json.loads((folder / PART).read_text())
        checks = [(folder / QUARANTINE, part["quarantine"])]
        for split, found in part["splits"].items():
            checks += [(folder / split / f"{name}{SUFFIX}", facts) for name, facts in found["files"].items()]
            if "samples" in found:
                checks.append((folder / split / SAMPLES, found["samples"]))
        whole = all(path.stat().st_size == facts["bytes"] for path, facts in checks)
    except (OSError, ValueError, KeyError):
        return None
    return part if whole else None


def _facts(path: pathlib.Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
