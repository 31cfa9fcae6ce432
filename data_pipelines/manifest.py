"""The format of token files: what a record's bytes are, and the manifest that proves the alignment of modalities.

    <root>/<split>/manifest.json
    <root>/<split>/<modality>/data-00000-of-00004.arrayrecord ...
    <root>/<split>/samples.jsonl                              (sets of data_pipelines.prepare)

Record i of every modality belongs to sample i. A record is the raw array: uint16 codes (``tokens``, ``sequence``),
uint8 [H, W, C] (``pixels``), float16 [n, width] (``embedding``), all little-endian and row-major; an empty record means
that the sample lacks the modality. `data_pipelines.records` reads and writes the files.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fm4m.files import complete_file
from fm4m.modalities import Modality

FORMAT = "fm4m token files"
VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.jsonl"

_DTYPES = {
    "tokens": np.dtype("<u2"),
    "sequence": np.dtype("<u2"),
    "pixels": np.dtype("u1"),
    "embedding": np.dtype("<f2"),
}


def dtype_of(modality: Modality) -> np.dtype:
    """Type of the stored numbers of a modality."""
    return _DTYPES[modality.kind]


def row_shape_of(modality: Modality) -> tuple[int, ...]:
    """Shape of a sample's array without its first axis, which is empty where the sample lacks the modality."""
    if modality.kind == "pixels":
        return (modality.grid[1] * modality.patch_size, modality.channels)
    return (modality.channels,) if modality.kind == "embedding" else ()


def row_count(modality: Modality) -> int:
    """Largest first axis of a sample's array: image rows for pixels, tokens otherwise."""
    return modality.grid[0] * modality.patch_size if modality.kind == "pixels" else modality.max_tokens


def problem(array: np.ndarray, modality: Modality) -> str:
    """What is wrong with a sample's array of a modality, or "". An array without rows, a missing one, is all right."""
    if array.dtype == np.uint16 and array.ndim == 1 and modality.discrete:
        # Every record of a stream passes here, so the usual answer comes without wording (3 us instead of 20).
        rows, full = len(array), modality.max_tokens
        whole = rows == full or not (rows > full or modality.grid)
        if not rows or (whole and array.max() < modality.vocab_size):
            return ""
    row, full, rows = row_shape_of(modality), row_count(modality), len(array) if array.ndim else 0
    if array.ndim != 1 + len(row) or array.shape[1:] != row:
        return f"has shape {array.shape}, expected {(full, *row)}"
    kind = {"pixels": np.uint8, "embedding": np.floating}.get(modality.kind, np.integer)
    if not np.issubdtype(array.dtype, kind):
        return f"has dtype {array.dtype}, expected {dtype_of(modality).name}"
    if rows > full or (modality.grid and rows not in (0, full)):
        exactly = f"exactly {full} (grid {modality.grid}) or none" if modality.grid else f"at most {full}"
        return f"has {rows} {'rows' if modality.kind == 'pixels' else 'tokens'}, {exactly} are allowed"
    if modality.discrete and rows and not 0 <= array.min() <= array.max() < modality.vocab_size:
        token = array.min() if array.min() < 0 else array.max()
        return f"has token {token}, outside the vocabulary 0..{modality.vocab_size - 1}"
    return ""


def decode(record: bytes, modality: Modality) -> np.ndarray:
    """A record's bytes as an array (read-only, not copied). Raises ValueError if they are not whole rows."""
    dtype, row = dtype_of(modality), row_shape_of(modality)
    if len(record) % (dtype.itemsize * math.prod(row)):
        raise ValueError(f"has {len(record)} bytes, which are not whole rows of {dtype.name} {row}")
    array = np.frombuffer(record, dtype)
    return array.reshape(-1, *row) if row else array


# ---- manifest


def read_manifest(root: str | os.PathLike, split: str) -> dict:
    """The manifest of a split.

    Returns:
      ``{"format", "version", "modalities": {name: {"modality": Modality.to_dict(), "dtype", "longest", "made_from",
      "files": [{"name", "records", "bytes", "sha256", "keys"}]}}}``; ``longest`` is the largest number of rows in a
      record, ``keys`` a hash of the sample keys in order. Sets of `data_pipelines.prepare` have also ``"samples":
      {"bytes", "sha256", "made_from"}``: the list of their samples (`data_pipelines.records.read_samples`).

    Raises:
      FileNotFoundError: there is none. ValueError: it is something else, damaged, or from a newer version.
    """
    path = pathlib.Path(root) / split / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {path.parent} is not a folder of token files. "
            "Write the files with data_pipelines.records.write_modality, or correct the path"
        )
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy the folder again, or delete and write it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not a manifest of {FORMAT}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {str(manifest.get('version'))[:80]}, this code reads {VERSION}: update fm4m, "
            "or write the files again"
        )
    try:
        _check_entries(manifest)
    except (ValueError, TypeError, KeyError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged ({what}): copy {path.parent} again, or write it again") from None
    return manifest


def _check_entries(manifest: Mapping) -> None:
    """Raises ValueError, TypeError or KeyError for entries that `write_manifest` was never given."""

    def need(value: object, kind: type, where: str) -> object:
        if type(value) is not kind or (kind is int and value < 0):
            wanted = {int: "a number from 0 on", str: "a text", list: "a list", dict: "an object"}[kind]
            raise ValueError(f"{where} is {str(value)[:80]!r}, expected {wanted}")
        return value

    for name, entry in need(manifest["modalities"], dict, "modalities").items():
        where = f"modality {name!r}"
        need(entry, dict, where)
        stored = Modality.from_dict(need(entry["modality"], dict, f"{where}: modality"))
        if stored.name != name:
            raise ValueError(f"{where} is the entry of {stored.name!r}")
        need(entry["longest"], int, f"{where}: longest")
        if not need(entry["files"], list, f"{where}: files"):
            raise ValueError(f"{where} has no files")
        names = set()
        for file in entry["files"]:
            need(file, dict, f"{where}: a file")
            for key, kind in {"name": str, "records": int, "bytes": int, "sha256": str, "keys": str}.items():
                need(file[key], kind, f"{where}: {key} of a file")
            # Only files of the modality's own folder are ever opened.
            if file["name"] in ("", ".", "..", *names) or "/" in file["name"] or "\0" in file["name"]:
                raise ValueError(f"{where}: {file['name'][:80]!r} cannot be the name of one of its files")
            names.add(file["name"])
    if "samples" in manifest:
        need(need(manifest["samples"], dict, "samples")["bytes"], int, "samples: bytes")
        need(manifest["samples"]["sha256"], str, "samples: sha256")


def write_manifest(folder: pathlib.Path, manifest: dict) -> None:
    """Replaces the manifest of a split's folder in one step."""
    with complete_file(folder / MANIFEST) as beside:
        beside.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Several processes may each write one modality of a split; only the manifest's update must not overlap."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def alignment(entry: Mapping) -> list[tuple[int, str]]:
    """(number of records, hash of the sample keys) of every file of a modality; equal for aligned modalities."""
    return [(f["records"], f["keys"]) for f in entry["files"]]


def check_aligned(folder: pathlib.Path, modalities: Mapping[str, Mapping], names: Sequence[str]) -> None:
    """Raises ValueError naming the modality and file whose sample keys differ from those of ``names[0]``."""
    for name in names[1:]:
        first, other = alignment(modalities[names[0]]), alignment(modalities[name])
        if first == other:
            continue
        shard = next(i for i, (a, b) in enumerate(itertools.zip_longest(first, other)) if a != b)
        raise ValueError(
            f"{folder}: modality {name!r} is not aligned with {names[0]!r}: file {shard} of {len(other)} has "
            f"{_describe(other, shard)}, that of {names[0]!r} {_describe(first, shard)}. Record i of every modality "
            f"must be the same sample; write {name!r} again with the keys in that order and overwrite=True"
        )


def _describe(files: list[tuple[int, str]], shard: int) -> str:
    return f"{files[shard][0]} records, keys {files[shard][1][:12]}" if shard < len(files) else "no counterpart"
