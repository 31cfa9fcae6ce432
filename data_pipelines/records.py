"""Reading, writing and checking token files: one set of ArrayRecord files per modality, joined by index.

`data_pipelines.manifest` describes the format. A new modality is a new file set: nothing is rewritten. Groups of one
record and no compression make a random read cost one small read.

``python -m data_pipelines.records ROOT SPLIT`` checks every record of a split.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines.manifest import (
    FORMAT,
    MANIFEST,
    SAMPLES,
    VERSION,
    alignment,
    check_aligned,
    decode,
    dtype_of,
    locked,
    problem,
    read_manifest,
    row_count,
    row_shape_of,
    write_manifest,
)
from data_pipelines.storage import patiently
from fm4m.errors import DataError
from fm4m.modalities import Modality, unknown_name

# An ArrayRecord file takes at least 128 KiB, so few samples go into few files.
SAMPLES_PER_FILE = 65536


# ---- reading


class Records:
    """Random access to the records of one modality of a split: ``records[i]`` is an array; safe for threads.

    Opening compares the modality's definition and the files' presence, sizes and record counts with the manifest;
    `verify` compares the contents.

    Raises:
      FileNotFoundError, ValueError: naming the file and what mends it; while reading DataError, naming the record, for
        what is still wrong after a minute of tries.
    """

    def __init__(self, root: str | os.PathLike, split: str, modality: Modality, manifest: Mapping | None = None):
        manifest = read_manifest(root, split) if manifest is None else manifest
        self.modality = modality
        self.folder = pathlib.Path(root) / split / modality.name
        if modality.name not in manifest["modalities"]:
            manifest_path = self.folder.parent / MANIFEST
            raise ValueError(f"{manifest_path}: " + unknown_name(modality.name, manifest["modalities"], "modality"))
        self.entry = manifest["modalities"][modality.name]
        self._check_definition()
        self._mend = f"copy {self.folder} again, or write modality {modality.name!r} again with overwrite=True"
        self._files = self.entry["files"]
        self._ends = list(itertools.accumulate(f["records"] for f in self._files))
        self._check_files()
        self._readers: list[ArrayRecordReader | None] = [None] * len(self._files)
        self._lock = threading.Lock()

    def _check_definition(self) -> None:
        stored, asked = Modality.from_dict(self.entry["modality"]), self.modality

        def layout(m: Modality) -> tuple:
            rows = m.grid[0] * m.patch_size if m.kind == "pixels" else m.grid
            return m.kind, m.vocab_size, rows, row_shape_of(m)

        if layout(stored) != layout(asked) or self.entry["longest"] > row_count(asked):
            raise ValueError(
                f"modality {asked.name!r} is registered as {asked.to_dict()}, but the files in {self.folder} "
                f"were written as {stored.to_dict()} (longest record {self.entry['longest']}): correct the "
                "registration, or prepare the files again"
            )

    def _check_files(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} does not exist, though the manifest lists it: {self._mend}")
        foreign = sorted(set(os.listdir(self.folder)) - {f["name"] for f in self._files})
        if foreign:
            raise ValueError(f"{self.folder / foreign[0]} is not in the manifest: delete it, or {self._mend}")

        def check(file: Mapping) -> None:
            path = self.folder / file["name"]
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: {self._mend}")
            if path.stat().st_size != file["bytes"]:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, the manifest says {file['bytes']} (truncated or "
                    f"replaced): {self._mend}"
                )
            try:
                reader = ArrayRecordReader(str(path))
                count = reader.num_records()
                reader.close()
            except RuntimeError as error:
                raise ValueError(f"{path} is damaged ({error}): {self._mend}") from error
            if count != file["records"]:
                raise ValueError(f"{path} has {count} records, the manifest says {file['records']}: {self._mend}")

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda file: patiently(lambda: check(file), lambda: file["name"]), self._files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        shard, position = self._locate(index)
        try:
            record = patiently(lambda: self._read(shard, position), lambda: self.where(index))
            return decode(record, self.modality)
        except (RuntimeError, IndexError, OSError, ValueError) as error:
            gone = "" if os.path.exists(self.folder / self._files[shard]["name"]) else " (the file has vanished)"
            raise DataError(f"{self.where(index)} cannot be read{gone}: {error}. {self._mend}") from error

    def _read(self, shard: int, position: int) -> bytes:
        try:
            record = self._reader(shard).read(position, position + 1)[0]
        except (RuntimeError, OSError):
            self._readers[shard] = None  # a reader that failed once may fail for ever
            raise
        if not record:
            # A record without a row is one without bytes. So is, to the reader, one of a file that was cut off later.
            size, whole = os.stat(self.folder / self._files[shard]["name"]).st_size, self._files[shard]["bytes"]
            if size != whole:
                raise ValueError(f"the file has {size} bytes now, and had {whole}")
        return record

    def where(self, index: int) -> str:
        """File and record of sample ``index``, for messages."""
        shard, position = self._locate(index)
        return f"{self.folder / self._files[shard]['name']}, record {position}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, int(index - (self._ends[shard - 1] if shard else 0))

    def _reader(self, shard: int) -> ArrayRecordReader:
        if self._readers[shard] is None:
            with self._lock:
                if self._readers[shard] is None:
                    path = str(self.folder / self._files[shard]["name"])
                    # No read-ahead: records are small and read in random order.
                    self._readers[shard] = ArrayRecordReader(
                        path, options="readahead_buffer_size:0", file_reader_buffer_size=32768
                    )
        return self._readers[shard]


class Joined:
    """One sample from the same record of several modalities."""

    def __init__(self, records: Mapping[str, Records]):
        self._records = records

    def __len__(self) -> int:
        return len(next(iter(self._records.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: records[index] for name, records in self._records.items()}

    def where(self, index: int, modality: str) -> str:
        return self._records[modality].where(index) if modality in self._records else f"sample {index}"


def verify(root: str | os.PathLike, split: str) -> dict[str, int]:
    """Reads everything in a split: hashes of the files, alignment, length and vocabulary of every record.

    Returns:
      The number of records of every modality.

    Raises:
      FileNotFoundError, ValueError: at the first fault, naming file, record and modality.
    """
    manifest, folder = read_manifest(root, split), pathlib.Path(root) / split
    entries = manifest["modalities"]
    own = {MANIFEST, SAMPLES} if "samples" in manifest else {MANIFEST}
    for name in sorted(set(os.listdir(folder)) - set(entries) - own):
        raise ValueError(
            f"{folder / name} is not in the manifest: delete it (foreign, or left by an interrupted write)"
        )
    check_aligned(folder, entries, list(entries))
    if "samples" in manifest:
        _verify_samples(folder, manifest)
    counts = {}
    for name, entry in entries.items():
        records = Records(root, split, Modality.from_dict(entry["modality"]), manifest)
        for file in entry["files"]:
            if sha256(folder / name / file["name"]) != file["sha256"]:
                raise ValueError(f"{folder / name / file['name']}: its contents have changed: {records._mend}")
        for i in range(len(records)):
            if fault := problem(records[i], records.modality):
                raise ValueError(f"{records.where(i)}: modality {name!r} {fault}. {records._mend}")
        counts[name] = len(records)
    return counts


def read_samples(root: str | os.PathLike, split: str) -> Iterator[dict]:
    """The samples of a set that `data_pipelines.prepare` made, in the order of the records.

    Returns:
      Of every record ``{"key", "sample", "row", "crop", "size"}``: the record's key, the key of its sample in the
      source, the row of the sample's crop settings, that row ([top, left, height, width, flip] in pixels), and the
      picture's [height, width]. The last two are None for samples without a picture.

    Raises:
      FileNotFoundError, ValueError: the set has no such list, or it is not the one that the manifest means.
    """
    manifest, path = read_manifest(root, split), pathlib.Path(root) / split / SAMPLES
    if "samples" not in manifest:
        raise ValueError(f"{path.parent} has no list of samples: it was not written by data_pipelines.prepare")
    if not path.is_file() or path.stat().st_size != manifest["samples"]["bytes"]:
        raise ValueError(f"{path} is missing or has changed: copy {path.parent} again")
    return _json_lines(path)


def _json_lines(path: pathlib.Path) -> Iterator[dict]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def _verify_samples(folder: pathlib.Path, manifest: Mapping) -> None:
    samples = (sample["key"] for sample in read_samples(folder.parent, folder.name))
    if sha256(folder / SAMPLES) != manifest["samples"]["sha256"]:
        raise ValueError(f"{folder / SAMPLES}: its contents have changed: copy {folder} again")
    for records, expected in alignment(next(iter(manifest["modalities"].values()))):
        if hash_keys(itertools.islice(samples, records)) != expected:
            raise ValueError(f"{folder / SAMPLES} does not list the samples of the token files: copy {folder} again")


def hash_keys(keys: Iterable[str]) -> str:
    """The hash of a file's sample keys, in order, by which modalities prove that they are aligned."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode() + b"\n")
    return digest.hexdigest()


# ---- writing


def write_modality(
    root: str | os.PathLike,
    split: str,
    modality: Modality,
    samples: Iterable[np.ndarray],
    keys: Sequence[str],
    *,
    shards: int | None = None,
    overwrite: bool = False,
    made_from: Mapping | None = None,
) -> None:
    """Writes the files of one modality of a split and enters them in the manifest; other modalities are not touched.

    The files are written beside their place and renamed, so a reader sees the old state or the new one.

    Args:
      root, split: the folder is ``root/split``.
      modality: what the arrays are.
      samples: one array a sample, as `data_pipelines.manifest` describes; without rows where the modality is missing.
      keys: the samples' names, in the same order. Their hash is stored and must equal that of the modalities which are
        there already: that is the proof that record i is the same sample everywhere.
      shards: number of files; default that of the modalities already there, else one for every 65,536 samples.
      overwrite: replace the modality if it is there.
      made_from: JSON-able notes on the origin (hashes of inputs), kept in the manifest.

    Raises:
      ValueError: the modality exists, keys or counts differ, or an array does not fit the modality (naming its key).
    """
    present = other_modalities(root, split, modality, overwrite)
    folder = pathlib.Path(root) / split
    if shards is None:
        shards = 1 + max(len(keys) - 1, 0) // SAMPLES_PER_FILE
        if present:
            shards = len(next(iter(present.values()))["files"])
    bounds = [len(keys) * k // shards for k in range(shards + 1)]
    files = []
    for start, end in itertools.pairwise(bounds):
        files.append({"records": end - start, "keys": hash_keys(keys[start:end])})
    for name in present:
        check_aligned(folder, {**present, modality.name: {"files": files}}, [name, modality.name])
    _write(folder, modality, samples, lambda i: f"sample {i} (key {keys[i]!r})", files, made_from)


def derive_modality(
    root: str | os.PathLike,
    split: str,
    modality: Modality,
    function: Callable[..., np.ndarray],
    *,
    reads: Sequence[str],
    overwrite: bool = False,
    made_from: Mapping | None = None,
) -> None:
    """Computes a new modality from modalities that a split has: ``function(*arrays of one sample) -> array``.

    Aligned by construction; otherwise like `write_modality`.
    """
    present = other_modalities(root, split, modality, overwrite)
    manifest = read_manifest(root, split)
    for name in reads:
        if name not in present:
            raise ValueError(f"{pathlib.Path(root) / split}: " + unknown_name(name, present, "modality"))
    check_aligned(pathlib.Path(root) / split, present, list(reads))
    sources = [Records(root, split, Modality.from_dict(present[n]["modality"]), manifest) for n in reads]
    samples = (function(*(s[i] for s in sources)) for i in range(len(sources[0])))
    files = [{"records": records, "keys": keys} for records, keys in alignment(present[reads[0]])]
    _write(pathlib.Path(root) / split, modality, samples, sources[0].where, files, made_from)


def other_modalities(root, split: str, modality: Modality, overwrite: bool) -> dict:
    """The manifest's entries of the other modalities; ValueError if this one may not be written."""
    folder = pathlib.Path(root) / split
    if not modality.name or modality.name.startswith(".") or "/" in modality.name or modality.name == MANIFEST:
        raise ValueError(f"modality {modality.name!r}: the name cannot be that of a folder")
    present = read_manifest(root, split)["modalities"] if (folder / MANIFEST).is_file() else {}
    if modality.name in present and not overwrite:
        raise ValueError(f"{folder} has modality {modality.name!r} already; pass overwrite=True to replace it")
    return {name: entry for name, entry in present.items() if name != modality.name}


def _write(folder: pathlib.Path, modality: Modality, samples, where, files: list[dict], made_from) -> None:
    beside = folder / f".{modality.name}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        longest = _write_files(beside, modality, iter(samples), where, files)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    enter(folder, {modality.name: (beside, entry_of(modality, longest, made_from, files))})


def entry_of(modality: Modality, longest: int, made_from: Mapping | None, files: Sequence[Mapping]) -> dict:
    """A modality's entry in the manifest."""
    return {
        "modality": modality.to_dict(),
        "dtype": dtype_of(modality).name,
        "longest": longest,
        "made_from": dict(made_from or {}),
        "files": list(files),
    }


def enter(folder: pathlib.Path, written: Mapping[str, tuple[pathlib.Path, dict]], samples: Mapping | None = None):
    """Moves folders of files to their places and enters them in the manifest, all modalities at once."""
    with locked(folder):
        manifest = {"format": FORMAT, "version": VERSION, "modalities": {}}
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder.parent, folder.name)
        if samples is not None:
            manifest["samples"] = dict(samples)
        for name, (beside, entry) in written.items():
            manifest["modalities"][name] = entry
            target, old = folder / name, folder / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                os.replace(target, old)
            os.replace(beside, target)
        write_manifest(folder, manifest)
        for name in written:
            shutil.rmtree(folder / f".{name}.old", ignore_errors=True)


def _write_files(folder: pathlib.Path, modality: Modality, samples, where, files: list[dict]) -> int:
    """Writes the samples; completes ``files`` with names, sizes and hashes. Returns the rows of the longest sample."""
    longest = index = 0
    for shard, file in enumerate(files):
        file["name"] = f"data-{shard:05d}-of-{len(files):05d}.arrayrecord"
        path = folder / file["name"]
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for array in itertools.islice(samples, file["records"]):
            array = np.asarray(array)
            if fault := problem(array, modality):
                raise ValueError(f"modality {modality.name!r}, {where(index)} {fault}; nothing was written")
            writer.write(np.ascontiguousarray(array, dtype_of(modality)).tobytes())
            longest, index = max(longest, len(array)), index + 1
        writer.close()
        file["bytes"], file["sha256"] = path.stat().st_size, sha256(path)
    total = sum(f["records"] for f in files)
    if index != total or next(samples, None) is not None:
        count = f"only {index}" if index != total else f"more than {total}"
        raise ValueError(f"modality {modality.name!r}: {count} samples for {total} keys; nothing was written")
    return longest


def sha256(path: pathlib.Path) -> str:
    """Hexadecimal hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Prints the number of records of every modality of a split, after checking them all."""
    import argparse

    parser = argparse.ArgumentParser(description="Checks every record of a folder of token files.")
    parser.add_argument("root")
    parser.add_argument("split")
    args = parser.parse_args()
    for name, count in verify(args.root, args.split).items():
        print(f"{name}: {count} records, all right")


if __name__ == "__main__":
    main()
