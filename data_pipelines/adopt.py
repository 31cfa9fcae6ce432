"""Finished token files that become part of a set without being written again."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence

from data_pipelines import records
from data_pipelines.manifest import SAMPLES, check_aligned
from fm4m.files import complete_file
from fm4m.modalities import Modality

_FILE_FACTS = ("records", "keys", "bytes", "sha256")


@dataclasses.dataclass(frozen=True)
class Finished:
    """Files of one modality that were written elsewhere, in the order of their records.

    Attributes:
      modality: what the records are.
      paths: one file for every part of the samples.
      files: for each path ``{"records", "keys", "bytes", "sha256"}``, as in the manifest.
      longest: rows of the longest record.
      made_from: kept in the manifest.
    """

    modality: Modality
    paths: Sequence[pathlib.Path]
    files: Sequence[Mapping]
    longest: int
    made_from: Mapping


def adopt_files(
    root: str | os.PathLike,
    split: str,
    modalities: Sequence[Finished],
    *,
    samples: Iterable[pathlib.Path] = (),
    samples_made_from: Mapping | None = None,
    overwrite: bool = False,
) -> None:
    """Takes finished files into a split and enters all of them in the manifest at once; nothing is written again.

    The files are linked, or copied where the file system has no links: they stay where they are, so that the call can
    be repeated if it was cut off.

    Args:
      root, split: the folder is ``root/split``.
      modalities: aligned with each other and with what is there.
      samples: JSON lines of the samples (`data_pipelines.records.read_samples`), in parts, for a new split.
      samples_made_from: what decides which samples those are; kept in the manifest.
      overwrite: replace modalities that are there.

    Raises:
      ValueError: a modality exists, files are not aligned, or a file has another size than was said.
    """
    folder = pathlib.Path(root) / split
    entries: dict[str, dict] = {}
    for finished in modalities:
        entries = {**records.other_modalities(root, split, finished.modality, overwrite), **entries}
    replaced = {finished.modality.name for finished in modalities}
    kept = {name: entry for name, entry in entries.items() if name not in replaced}
    written: dict[str, tuple[pathlib.Path, dict]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for finished in modalities:
            name, count = finished.modality.name, len(finished.paths)
            files = [
                {"name": f"data-{i:05d}-of-{count:05d}.arrayrecord", **{k: f[k] for k in _FILE_FACTS}}
                for i, f in enumerate(finished.files)
            ]
            beside = folder / f".{name}.writing"
            written[name] = beside, records.entry_of(finished.modality, finished.longest, finished.made_from, files)
            aligned = {**kept, **{n: entry for n, (_, entry) in written.items()}}
            check_aligned(folder, aligned, [next(iter(aligned)), name])
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            for path, file in zip(finished.paths, files, strict=True):
                if path.stat().st_size != file["bytes"]:
                    size = path.stat().st_size
                    raise ValueError(f"{path} has {size} bytes, not the {file['bytes']} it was written with")
                _link(path, beside / file["name"])
        facts = None
        if samples_made_from is not None:
            with complete_file(folder / SAMPLES) as whole:
                with whole.open("wb") as file:
                    for path in samples:
                        with path.open("rb") as part:
                            shutil.copyfileobj(part, file)
                facts = {"bytes": whole.stat().st_size, "sha256": records.sha256(whole)}
                facts["made_from"] = dict(samples_made_from)
        records.enter(folder, written, facts)
    except BaseException:
        for beside, _ in written.values():
            shutil.rmtree(beside, ignore_errors=True)
        raise


def _link(path: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without hard links; a full disk fails again in the copy
        shutil.copyfile(path, target)
