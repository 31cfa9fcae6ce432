"""A folder of pictures as a source, with captions beside them or in a table."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

from data_pipelines.prepare import captions as caption_files
from data_pipelines.prepare import headers, images
from data_pipelines.prepare.errors import Problem, Unusable, printable
from data_pipelines.prepare.folder_walk import read_file, walk
from data_pipelines.prepare.sources import Item, describe

_BESIDE = (".txt", ".json", ".json.gz")


class FolderSource:
    """Pictures below a folder. A key is the path without suffix (with it where two pictures differ by suffix only).

    Args:
      path: the folder; folders in it and links are followed.
      captions: "beside" (``cat.txt``, ``cat.json``, ``cat.json.gz`` or ``cat.jpg.txt`` next to ``cat.jpg``; the first
        that is there), the path of a .csv or .tsv table (tried from here, then from the folder), or None for none.
      key_column, caption_column, delimiter: of the table. Its keys are paths below the folder, with or without suffix,
        or bare names where these are unique; several rows of a picture are several captions. The delimiter is a tab in
        .tsv and a comma otherwise.
      caption_lines: what of a .txt file is a caption: its "whole" text, "each" line, or the "first".
      encoding_fallback: "cp1252" or "latin-1" for captions that are not UTF-8; None refuses them.
      max_pixels: as `images.decode_image`.

    Raises:
      FileNotFoundError: no such folder or table. ValueError: an option out of range; a table without the columns.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        captions: str | os.PathLike | None = "beside",
        key_column: str = "image",
        caption_column: str = "caption",
        delimiter: str | None = None,
        caption_lines: str = "whole",
        encoding_fallback: str | None = None,
        max_pixels: int = images.MAX_PIXELS,
    ):
        self._root = os.path.abspath(os.fspath(path))
        if not os.path.isdir(self._root):
            raise FileNotFoundError(f"{printable(path)} is no folder; expected one with pictures in it")
        caption_files.check_fallback(encoding_fallback)
        self._max_pixels, self._lines = images.check_max_pixels(max_pixels), caption_files.check_lines(caption_lines)
        self._fallback = encoding_fallback
        self._options = {
            "captions": "beside" if captions == "beside" else "table" if captions else "none",
            "caption_lines": caption_lines,
            "encoding_fallback": encoding_fallback,
            "max_pixels": max_pixels,
        }
        listing = walk(self._root)
        self.problems: list[Problem] = listing.problems
        self.fields = ("rgb", "caption") if captions else ("rgb",)
        table_path = None if captions in (None, "", "beside") else self._find(os.fspath(captions))
        own = os.path.relpath(table_path, self._root) if table_path else None
        self._paths, others = self._split(listing.files, own)
        self._bytes = sum(listing.files[p] for p in self._paths)
        self.keys: list[str] = _keys(self._paths)
        self._notes = _case_notes(self.keys)
        self._caption_files: dict[int, str] = {}
        self._caption_rows: dict[int, list[str]] = {}
        self._caption_failures: dict[int, Unusable] = {}
        if captions == "beside":
            others = self._match_beside(others)
            self._bytes += sum(listing.files[p] for p in set(self._caption_files.values()))
        elif table_path:
            self._options |= {"key_column": key_column, "caption_column": caption_column}
            if delimiter is None:
                delimiter = "\t" if table_path.lower().endswith((".tsv", ".tab")) else ","
            self._match_table(table_path, key_column, caption_column, delimiter)
        self._report_others(others)

    def _find(self, path: str) -> str:
        for candidate in (path, os.path.join(self._root, path)):
            if os.path.isfile(candidate):
                return os.path.abspath(candidate)
        raise FileNotFoundError(f"{printable(path)}: no such table of captions, here or in {printable(self._root)}")

    def _split(self, files: dict[str, int], table: str | None) -> tuple[list[str], list[str]]:
        """Paths of pictures, by their suffix or, with another suffix, by their first bytes; and of all other files."""
        pictures, others = [], []
        for path in files:
            suffix = os.path.splitext(path)[1].lower()
            if path == table:
                continue
            if suffix in headers.SUFFIXES or (suffix not in (".txt", ".json", ".gz") and self._sniff(path)):
                pictures.append(path)
            else:
                others.append(path)
        return pictures, others

    def _sniff(self, path: str) -> str:
        try:
            with open(os.path.join(self._root, path), "rb") as file:
                found = headers.sniff(file.read(16))
        except OSError:
            return ""
        return "" if found in ("PPM", "BMP") else found  # two letters prove nothing

    def _match_beside(self, others: list[str]) -> list[str]:
        exact, folded = set(others), _unique_by(others, _fold)
        used: set[str] = set()
        for i, path in enumerate(self._paths):
            stem = os.path.splitext(path)[0]
            names = [base + suffix for base in (stem, path) for suffix in _BESIDE]
            found = [name for name in names if name in exact]
            if not found:
                found = [folded[_fold(name)] for name in names if _fold(name) in folded]
                if found:
                    self._note(i, f"caption_case: {printable(found[0])}")
            if found:
                self._caption_files[i] = found[0]
                used.update(found)
                if len(found) > 1:
                    self._note(i, f"other_captions: {', '.join(map(printable, found[1:]))}")
        rest = []
        for path in others:
            if path.lower().endswith(_BESIDE) and path not in used:
                key = printable(path)
                self.problems.append(Problem(key, "orphan", f"{key}: a caption file without a picture beside it."))
            elif path not in used:
                rest.append(path)
        return rest

    def _match_table(self, path: str, key_column: str, caption_column: str, delimiter: str) -> None:
        name = printable(os.path.basename(path))
        with open(path, "rb") as file:
            data = file.read()
        self._bytes += len(data)
        table = caption_files.parse_csv(
            data,
            name,
            key_column=key_column,
            caption_column=caption_column,
            delimiter=delimiter,
            fallback=self._fallback,
        )
        self.problems += table.problems
        printed = [printable(p) for p in self._paths]
        ways = [
            {p: i for i, p in enumerate(printed)},
            _unique_index(self._paths, lambda p: printable(os.path.splitext(p)[0])),
            _unique_index(printed, os.path.basename),
            _unique_index(printed, lambda p: os.path.splitext(os.path.basename(p))[0]),
            _unique_index(printed, _fold),
            _unique_index(printed, lambda p: _fold(os.path.basename(p))),
        ]
        for written in dict.fromkeys([*table.rows, *table.failed]):
            key = self._table_key(written)
            forms = [key, key, key, key, _fold(key), _fold(key)]
            found = next((way[form] for way, form in zip(ways, forms) if form in way), None)
            if found is None:
                where = f"{name}: {written}"
                self.problems.append(Problem(where, "orphan", f"{where}: a row without a picture of that name."))
            elif written in table.failed:
                self._caption_failures[found] = table.failed[written]
            else:
                rows = self._caption_rows.setdefault(found, [])
                rows += [row for row in table.rows[written] if row not in rows]
                for note in table.notes.get(written, ()):
                    self._note(found, note)

    def _table_key(self, written: str) -> str:
        key = written.replace("\\", "/")
        root = printable(self._root) + "/"
        key = key.removeprefix(root)
        while key.startswith("./"):
            key = key[2:]
        return key

    def _report_others(self, others: list[str]) -> None:
        by_suffix: dict[str, list[str]] = {}
        for path in others:
            by_suffix.setdefault(os.path.splitext(path)[1].lower(), []).append(path)
        for suffix, paths in sorted(by_suffix.items()):
            first = printable(paths[0])
            many = "" if len(paths) == 1 else f" and {len(paths) - 1} more ending in {printable(suffix) or 'no suffix'}"
            what = "not pictures" if many else "not a picture"
            self.problems.append(Problem(first, "not_an_image", f"{first}{many}: {what}, left out."))

    def _note(self, index: int, note: str) -> None:
        self._notes[index] = (*self._notes.get(index, ()), note)

    def read(self, index: int) -> Item:
        """Fields ``rgb`` and ``caption``. Raises Unusable if the picture cannot be used."""
        path = self._paths[index]
        name = printable(path)
        data = read_file(os.path.join(self._root, path), name)
        rgb, notes = images.decode_image(data, name, max_pixels=self._max_pixels)
        item = Item(self.keys[index], {"rgb": rgb}, notes + self._notes.get(index, ()))
        if not (self._caption_files or self._caption_rows or self._caption_failures):
            return item
        try:
            rows, more = self._captions(index)
        except Unusable as error:
            return Item(item.key, item.fields, item.notes, {"caption": error})
        return Item(item.key, {**item.fields, "caption": rows}, item.notes + more)

    def _captions(self, index: int) -> tuple[list[str], tuple[str, ...]]:
        if index in self._caption_rows:
            return self._caption_rows[index], ()
        if index in self._caption_failures:
            raise self._caption_failures[index]
        if index not in self._caption_files:
            raise Unusable("caption_missing", f"{printable(self._paths[index])}: has no caption")
        path = self._caption_files[index]
        name = printable(path)
        data = read_file(os.path.join(self._root, path), name)
        if path.lower().endswith(".txt"):
            return caption_files.parse_text(data, name, lines=self._lines, fallback=self._fallback)
        return caption_files.parse_json(data, name, fallback=self._fallback)

    def describe(self) -> dict[str, Any]:
        """As `sources.Source.describe`."""
        return describe("folder", self._options, self.keys, self.problems, bytes=self._bytes)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _unique_index(texts: list[str], form: Any) -> dict[str, int]:
    """Form -> index of the text that has it, for forms that one text has."""
    index: dict[str, int] = {}
    for i, text in enumerate(texts):
        key = form(text)
        index[key] = -1 if key in index else i
    return {key: i for key, i in index.items() if i >= 0}


def _unique_by(texts: list[str], form: Any) -> dict[str, str]:
    return {key: texts[i] for key, i in _unique_index(texts, form).items()}


def _keys(paths: list[str]) -> list[str]:
    stems = [printable(os.path.splitext(path)[0]) for path in paths]
    counts: dict[str, int] = {}
    for stem in stems:
        counts[stem] = counts.get(stem, 0) + 1
    keys, taken = [], set(stems)
    for path, stem in zip(paths, stems):
        key = stem if counts[stem] == 1 else printable(path)
        while counts[stem] > 1 and key in taken:  # a name spelled like another one's escaped form
            key += "~"
        taken.add(key)
        keys.append(key)
    return keys


def _case_notes(keys: list[str]) -> dict[int, tuple[str, ...]]:
    """Keys that differ by case only are different samples, but often a mistake."""
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(_fold(key), []).append(i)
    notes = {}
    for group in groups.values():
        for i in group if len(group) > 1 else ():
            notes[i] = (f"case_duplicate: {next(keys[j] for j in group if j != i)}",)
    return notes
