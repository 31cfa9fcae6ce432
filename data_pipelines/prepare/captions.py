"""Captions from .txt, .json, .json.gz and .csv bytes: always a list of texts, or `Unusable` with a reason."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from data_pipelines.prepare.errors import Problem, Unusable

# Far beyond any caption file of one picture; keeps a compressed bomb from filling the memory.
MAX_JSON_BYTES = 64 << 20
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
FALLBACKS = ("cp1252", "latin-1")
# What of a .txt file is a caption.
LINES = ("whole", "each", "first")
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_fallback(fallback: str | None) -> None:
    """Raises ValueError unless it is one of FALLBACKS or None."""
    if fallback is not None and fallback not in FALLBACKS:
        raise ValueError(f"encoding_fallback is {fallback!r}: expected one of {FALLBACKS}, or None")


def decode_text(data: bytes, name: str, *, fallback: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Text of bytes: UTF-8, or what a byte order mark says (UTF-8, UTF-16, UTF-32).

    Args:
      fallback: "cp1252" or "latin-1" for bytes that are not UTF-8; noted as ``encoding``. None refuses them.

    Raises:
      Unusable: reason ``caption_encoding``, with the offset of the first wrong byte.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            start, notes = len(mark), (f"encoding: {encoding} by its byte order mark",)
            break
    else:
        start, encoding, notes = 0, "utf-8", ()
    try:
        text = data[start:].decode(encoding)
    except UnicodeDecodeError as error:
        offset = start + error.start
        if start or fallback is None:
            hint = "" if start else " Save it as UTF-8, or set encoding_fallback='cp1252' (or 'latin-1')"
            raise Unusable(
                "caption_encoding",
                f"{name}: byte {offset} (0x{data[offset]:02x}) is not {encoding.upper()}.{hint}",
            ) from error
        try:
            text, notes = data.decode(fallback), (f"encoding: {fallback}, as the bytes are not UTF-8",)
        except UnicodeDecodeError as second:
            raise Unusable(
                "caption_encoding",
                f"{name}: byte {offset} is not UTF-8, and byte {second.start} is not {fallback} either",
            ) from second
    zero = text.find("\0")
    if zero >= 0:
        offset = start + len(text[:zero].encode(encoding))
        raise Unusable(
            "caption_encoding",
            f"{name}: byte {offset} is zero, so this is UTF-16 without its byte order mark, or no text. "
            "Save it as UTF-8",
        )
    return text, notes


def check_lines(lines: str) -> str:
    """Returns the choice. Raises ValueError for one that `parse_text` does not know."""
    if lines not in LINES:
        raise ValueError(f"caption_lines = {lines!r} must be one of {', '.join(map(repr, LINES))}")
    return lines


def parse_text(
    data: bytes, name: str, *, lines: str = "whole", aligned: bool = False, fallback: str | None = None
) -> tuple[list[str], tuple[str, ...]]:
    """Captions of a .txt file.

    Args: as `parse_json`; lines: "whole", the text is one caption; "each", every line is one; "first", the first line
      is the caption, and what follows is something else.

    Returns: captions without spaces at their ends, and notes.

    Raises: Unusable, reasons ``caption_encoding`` and ``caption_empty``.
    """
    text, notes = decode_text(data, name, fallback=fallback)
    rows = [text] if lines == "whole" else text.strip().splitlines()[: 1 if lines == "first" else None]
    rows, more = clean(rows, name, aligned=aligned)
    return rows, notes + more


def parse_json(
    data: bytes, name: str, *, aligned: bool = False, fallback: str | None = None
) -> tuple[list[str], tuple[str, ...]]:
    """Captions of a .json or .json.gz file: a string, a list of strings, an object with ``caption`` (or ``captions``),
    or a list of such objects.

    Args:
      aligned: row i belongs to crop i, so empty rows stay in their places; otherwise they are dropped and noted.
      fallback: as `decode_text`.

    Raises:
      Unusable: reasons ``caption_encoding``, ``caption_shape`` (not JSON, or JSON of another shape) and
        ``caption_empty``.
    """
    value, notes = load_json(data, name, fallback=fallback, reason="caption_shape")
    if isinstance(value, dict):
        present = [k for k in ("caption", "captions") if k in value]
        if not present:
            raise _shape(name, f"an object with the fields {sorted(value)[:8]}")
        value = value[present[0]]
    rows = value if isinstance(value, list) else [value]
    captions = []
    for i, row in enumerate(rows):
        if isinstance(row, dict):
            row = row.get("caption", row)
        if not isinstance(row, str):
            where = f"in row {i} " if isinstance(value, list) else ""
            raise _shape(name, f"{where}{_kind(row)}")
        captions.append(row)
    captions, more = clean(captions, name, aligned=aligned)
    return captions, notes + more


def load_json(
    data: bytes, name: str, *, fallback: str | None = None, reason: str = "json"
) -> tuple[Any, tuple[str, ...]]:
    """A JSON value, gzipped or not, and notes. Raises Unusable: ``caption_encoding``, or ``reason`` if not JSON."""
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, name, reason)
    text, notes = decode_text(data, name, fallback=fallback)
    try:
        return json.loads(text), notes
    except RecursionError:
        raise Unusable(reason, f"{name}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise Unusable(reason, f"{name}: not JSON ({str(error)[:120]})") from error


def clean(rows: list[str], name: str, *, aligned: bool = False) -> tuple[list[str], tuple[str, ...]]:
    """Rows without spaces at their ends; empty ones dropped, unless ``aligned``. Raises Unusable ``caption_empty``."""
    for row in rows:
        if _SURROGATE.search(row):
            raise Unusable("caption_encoding", f"{name}: has half of a surrogate pair, which is no character")
    rows = [row.strip().strip("\ufeff\0").strip() for row in rows]
    empty = sum(not row for row in rows)
    if empty == len(rows):
        raise Unusable("caption_empty", f"{name}: the caption is empty")
    if not empty:
        return rows, ()
    return rows if aligned else [row for row in rows if row], (f"empty_captions: {empty} of {len(rows)}",)


def _gunzip(data: bytes, name: str, reason: str) -> bytes:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Unusable(reason, f"{name}: begins as gzip but is damaged ({error})") from error
    if len(text) > MAX_JSON_BYTES:
        raise Unusable(reason, f"{name}: holds more than {MAX_JSON_BYTES} bytes of JSON")
    return text


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the fields {sorted(value)[:8]}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return {"NoneType": "null", "bool": "a truth value"}.get(type(value).__name__, "a number")


def _shape(name: str, found: str) -> Unusable:
    return Unusable(
        "caption_shape",
        f"{name}: expected a caption, a list of captions or objects with the field 'caption'; found {found}",
    )


# ---- CSV


@dataclasses.dataclass
class Table:
    """Captions of a CSV file. ``rows``: key as written -> captions in the file's order; ``failed``: key -> why its
    caption cannot be used; ``notes``: key -> notes; ``problems``: rows that belong to no key."""

    rows: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    failed: dict[str, Unusable] = dataclasses.field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)


def parse_csv(
    data: bytes,
    name: str,
    *,
    key_column: str,
    caption_column: str,
    delimiter: str = ",",
    fallback: str | None = None,
) -> Table:
    """Captions of a table with a header line; quoted cells may hold the delimiter, quotes and line ends.

    A damaged row costs itself only: it is reported, and reading goes on at the next line. Several rows of one key are
    several captions of it (equal ones count once, with the note ``duplicate_rows``).

    Raises:
      ValueError: no header line, or a column that it does not have. These are mistakes of the configuration.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            text = data[len(mark) :].decode(encoding, "replace" if encoding != "utf-8" else "surrogateescape")
            break
    else:
        text = data.decode("utf-8", "surrogateescape")
    table = Table()
    rows = _csv_rows(_split_lines(text), name, delimiter, table.problems)
    try:
        _, header = next(rows)
    except StopIteration:
        raise ValueError(f"{name}: the table is empty; expected a header line with {key_column!r}") from None
    header = [cell.strip() for cell in header]
    for column in (key_column, caption_column):
        if header.count(column) != 1:
            raise ValueError(
                f"{name}: the header has {header.count(column)} columns named {column!r}; its columns are {header}. "
                "Set key_column and caption_column (and delimiter, if the columns are not told apart)"
            )
    key_at, caption_at = header.index(key_column), header.index(caption_column)
    for line, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            where = f"{name}, line {line}"
            table.problems.append(
                Problem(where, "csv_row", f"{where}: {len(row)} cells, expected {len(header)}; quote cells with commas")
            )
            continue
        _add_row(table, f"{name}, line {line}", row[key_at], row[caption_at], fallback)
    return table


def _add_row(table: Table, where: str, key: str, caption: str, fallback: str | None) -> None:
    key = key.strip()
    if not key:
        table.problems.append(Problem(where, "csv_row", f"{where}: the cell that names the picture is empty"))
        return
    try:
        text, notes = decode_text(caption.encode("utf-8", "surrogateescape"), where, fallback=fallback)
        if "\ufffd" in text:
            raise Unusable("caption_encoding", f"{where}: has characters that could not be read")
        (text,), more = clean([text], where)
    except Unusable as error:
        if key in table.rows or key in table.failed:
            table.problems.append(Problem(where, error.reason, error.sentence))
        else:
            table.failed[key] = error
        return
    except UnicodeEncodeError:
        table.failed.setdefault(key, Unusable("caption_encoding", f"{where}: has half of a surrogate pair"))
        return
    known = table.rows.setdefault(key, [])
    if failed := table.failed.pop(key, None):
        table.problems.append(Problem(where, failed.reason, failed.sentence))
    if text in known:
        more += ("duplicate_rows",)
    else:
        known.append(text)
    table.notes[key] = tuple(dict.fromkeys(table.notes.get(key, ()) + notes + more))


def _split_lines(text: str) -> list[str]:
    """Lines with their ends, line feeds or (without any) carriage returns: U+2028 is part of a caption."""
    end = "\n" if "\n" in text else "\r"
    lines = text.split(end)
    return [line + end for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _csv_rows(lines: list[str], name: str, delimiter: str, problems: list[Problem]) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every row that can be read; damaged ones go to ``problems``."""
    at = 0
    while at < len(lines):
        reader = csv.reader(iter(lines[at:]), delimiter=delimiter, strict=True)
        start = at
        try:
            for row in reader:
                yield start + 1, row
                start = at + reader.line_num
            return
        except csv.Error as error:
            where = f"{name}, line {start + 1}"
            problems.append(
                Problem(where, "csv_row", f"{where}: the row cannot be read ({error}); double the quotes in a cell")
            )
            at = start + 1
