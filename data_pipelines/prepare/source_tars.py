"""Tar shards as a source: one tar per modality, or all modalities of a sample in one tar (WebDataset's layout)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.prepare import arrays, captions, headers, images, patterns
from data_pipelines.prepare.errors import Problem, Unusable, printable
from data_pipelines.prepare.sources import Item, describe
from data_pipelines.prepare.tar_index import Member, index_tar, read_member, split_name

# Columns of the table of members, -1 where a sample lacks the field.
_FILE, _EXTENSION, _OFFSET, _SIZE = range(4)


class TarSource:
    """Samples of tar shards, joined by key.

    Where the reference drops the rest of a shard when keys differ, samples here are joined by key: across all shards
    if a key never occurs in two shards of one modality, otherwise within each shard, and the keys then begin with the
    shard's name. What lacks what is reported.

    Args:
      path: ``root/[rgb,caption]/shard-{00000..00009}.tar`` for a tar per modality, whose members are ``<key>.<ext>``;
        without brackets, tars whose members are ``<key>.<modality>.<ext>`` or ``<key>.<ext>`` (a picture is then
        ``rgb``, .txt ``caption``, and .json ``caption`` where no sample has a .txt). ``*`` and ``?`` match files.
      names: modality in the tars (or extension without its dot) -> field, or None to leave it out:
        ``{"rgb@448": "rgb", "json": None}``.
      fields: read these only; None reads all.
      required: a sample without these cannot be used.
      caption_lines, encoding_fallback: as of `FolderSource`. max_pixels: as `images.decode_image`.
      depth_unit: metres a step of depth that is stored as integers.

    Raises:
      FileNotFoundError: none of the tars exists. ValueError: a pattern or an option that makes no sense, or a required
      field that no tar has.
    """

    def __init__(
        self,
        path: str,
        names: Mapping[str, str | None] | None = None,
        fields: Sequence[str] | None = None,
        required: Sequence[str] = ("rgb",),
        caption_lines: str = "whole",
        encoding_fallback: str | None = None,
        max_pixels: int = images.MAX_PIXELS,
        depth_unit: float = 0.001,
    ):
        captions.check_fallback(encoding_fallback)
        self._decode = {
            "max_pixels": images.check_max_pixels(max_pixels),
            "depth_unit": depth_unit,
            "caption_lines": captions.check_lines(caption_lines),
            "fallback": encoding_fallback,
        }
        self._names, self._required = dict(names or {}), tuple(required)
        self._wanted = None if fields is None else {*fields, *required}
        self._options = {
            "joint": "[" not in path,
            "names": self._names,
            "fields": None if fields is None else sorted(fields),
            "required": list(required),
            **self._decode,
        }
        self.problems: list[Problem] = []
        self._files: list[str] = []
        self._extensions: list[str] = []
        found = self._list(patterns.shards(path), path)
        self.fields: tuple[str, ...] = tuple(sorted({field for shard in found.values() for field in shard}))
        lacking = [field for field in self._required if field not in self.fields]
        if self.fields and lacking:
            raise ValueError(
                f"{path}: no tar has the required field {lacking[0]!r}; there are {list(self.fields)}. Map a modality "
                "to it with names={...}, or set required"
            )
        self._join(found)

    # ---- listing

    def _list(self, shards: list[tuple[str, dict[str, str]]], pattern: str) -> dict[str, dict[str, dict]]:
        """{shard: {field: {key: (file, extension, offset, size)}}}, from the headers of all tars."""
        paths = [p for _, tars in shards for p in tars.values()]
        if not any(os.path.exists(p) for p in paths):
            shown = f"{printable(paths[0])} and {len(paths) - 1} more" if paths else "no file matches"
            raise FileNotFoundError(f"{pattern}: none of these tars exists ({shown})")
        raw: dict[str, dict[tuple[str, str], list[tuple[str, Member, int]]]] = {}
        for shard, tars in shards:
            listed = raw.setdefault(shard, {})
            for modality, path in tars.items():
                members, problems = index_tar(path, printable(path))
                self.problems += problems
                self._files.append(path)
                for member in members:
                    key, field, extension = split_name(member.name, joint=not modality)
                    place = (key, member, len(self._files) - 1)
                    listed.setdefault((modality or field, extension), []).append(place)
        texts = any(extension == ".txt" and not name for listed in raw.values() for name, extension in listed)
        return {shard: self._by_field(listed, texts) for shard, listed in raw.items()}

    def _by_field(self, listed: dict, texts: bool) -> dict[str, dict]:
        fields: dict[str, dict] = {}
        for (name, extension), places in listed.items():
            field = self._field(name, extension, texts)
            if field is None or (self._wanted is not None and field not in self._wanted):
                continue
            number = self._extension(extension)
            have = fields.setdefault(field, {})
            for key, member, file in places:
                if key in have:
                    where = printable(self._files[file])
                    self.problems.append(
                        Problem(
                            key,
                            "duplicate_key",
                            f"{where}: {member.name!r} is there twice as {field!r}; the last one is used, as tar does.",
                        )
                    )
                    if have[key][_OFFSET] > member.offset:
                        continue
                have[key] = (file, number, member.offset, member.size)
        return fields

    def _field(self, name: str, extension: str, texts: bool) -> str | None:
        """The field of a member of this modality (or "") and extension; None to leave it out."""
        for known in (name, extension[1:]):
            if known in self._names:
                return self._names[known]
        if name:
            return name
        if extension in headers.SUFFIXES:
            return "rgb"
        if extension == ".txt" or (extension in arrays.JSON_SUFFIXES and not texts):
            return "caption"
        return extension[1:] or "no_extension"

    def _extension(self, extension: str) -> int:
        if extension not in self._extensions:
            self._extensions.append(extension)
        return self._extensions.index(extension)

    # ---- joining

    def _join(self, found: dict[str, dict[str, dict]]) -> None:
        apart = _repeats(found)
        labels = {shard: patterns.shard_label(shard) for shard in found}
        if len(set(labels.values())) < len(labels):
            labels = {shard: printable(shard.replace("\0", "")) for shard in found}
        rows: dict[str, list] = {}
        # Required fields first: their order in the tars is the order of the samples.
        order = [f for f in self.fields if f in self._required] + [f for f in self.fields if f not in self._required]
        columns = {field: i for i, field in enumerate(self.fields)}
        for field in order:
            for shard, fields in found.items():
                for key, place in fields.get(field, {}).items():
                    ident = f"{labels[shard]}/{key}" if apart else key
                    rows.setdefault(ident, [None] * len(columns))[columns[field]] = place
        needed = [columns[field] for field in self._required if field in columns]
        self.keys: list[str] = []
        table = []
        for ident, row in rows.items():
            lacking = [self.fields[c] for c in needed if row[c] is None]
            if lacking:
                has = [f for f, place in zip(self.fields, row) if place is not None]
                where = printable(self._files[next(p for p in row if p is not None)[_FILE]])
                sentence = f"{where}: the sample {ident!r} has {', '.join(has)} but no {lacking[0]}."
                self.problems.append(Problem(ident, "field_missing", sentence))
                continue
            self.keys.append(ident)
            table.append([place or (-1,) * 4 for place in row])
        self._table = np.array(table, np.int64).reshape(len(table), len(columns), 4)
        self._report_lacking(needed)

    def _report_lacking(self, needed: list[int]) -> None:
        if not needed or not len(self._table):
            return
        home = self._table[:, needed[0], _FILE]
        for file in np.unique(home):
            inside = np.flatnonzero(home == file)
            for column, field in enumerate(self.fields):
                lacking = inside[self._table[inside, column, _FILE] < 0]
                if len(lacking):
                    where = printable(self._files[file])
                    sentence = (
                        f"{where}: {len(lacking)} of its {len(inside)} samples have no {field} "
                        f"(the first is {self.keys[lacking[0]]!r})."
                    )
                    self.problems.append(Problem(f"{where} {field}", "field_missing", sentence))

    # ---- reading

    def read(self, index: int) -> Item:
        """All fields of a sample. Raises Unusable if a required one cannot be used."""
        key, row = self.keys[index], self._table[index]
        present = dict(zip(self.fields, row[:, _FILE] >= 0))
        aligned = present.get("crop_settings", False)
        fields: dict[str, Any] = {}
        notes: tuple[str, ...] = ()
        failures: dict[str, Unusable] = {}
        for field, place in zip(self.fields, row):
            try:
                if not present[field]:
                    reason = "caption_missing" if field == "caption" else "field_missing"
                    raise Unusable(reason, f"{key}: the sample has no {field}")
                fields[field], more = self._read(field, key, place, aligned)
                notes += more
            except Unusable as error:
                if field in self._required:
                    raise
                failures[field] = error
        crops = fields.get("crop_settings")
        for field, value in list(fields.items()):
            if field.startswith("tok_") and crops is not None and len(value) != len(crops):
                sentence = f"{key}: {field} has {len(value)} rows for {len(crops)} rows of crop settings"
                if field in self._required:
                    raise Unusable("array", sentence)
                failures[field] = Unusable("array", sentence)
                del fields[field]
        return Item(key, fields, notes, failures)

    def _read(self, field: str, key: str, place: np.ndarray, aligned: bool) -> tuple[Any, tuple[str, ...]]:
        path, extension = self._files[place[_FILE]], self._extensions[place[_EXTENSION]]
        name = f"{printable(path)}/{key}.{field}{extension}"
        data = read_member(path, name, int(place[_OFFSET]), int(place[_SIZE]))
        return arrays.decode_field(field, extension, data, name, aligned=aligned, **self._decode)

    def describe(self) -> dict[str, Any]:
        """As `sources.Source.describe`."""
        used = self._table[..., _FILE] >= 0
        total = int(self._table[..., _SIZE][used].sum())
        return describe("tars", self._options, self.keys, self.problems, fields=list(self.fields), bytes=total)


def _repeats(found: dict[str, dict[str, dict]]) -> bool:
    """Whether a key occurs in two shards of one field: then the same key in two shards is not the same sample."""
    seen: dict[str, set[str]] = {}
    for fields in found.values():
        for field, members in fields.items():
            have = seen.setdefault(field, set())
            if not have.isdisjoint(members):
                return True
            have.update(members)
    return False
