"""Patterns for shards: ``root/[rgb,caption]/shard-{00000..00009}.tar``.

Square brackets list modalities, each with a tar of its own; braces list or count shards; ``*`` and ``?`` match files.
"""

from __future__ import annotations

import glob
import os
import re

MAX_PATHS = 1_000_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.([1-9]\d*))?")
_MODALITY = re.compile(r"[A-Za-z0-9_@.\-]+")


def expand_braces(pattern: str) -> list[str]:
    """All texts that braces stand for: ``{a,b}``, ``{00..12}`` (padded as the longer end if one begins with 0),
    ``{0..100..10}``, nested and side by side; the last braces vary fastest.

    Raises ValueError: braces that do not match, hold neither a list nor a range, or make more than a million texts.
    """
    opening = pattern.find("{")
    if opening < 0:
        if "}" in pattern:
            raise ValueError(f"the pattern {pattern!r} has a closing brace without an opening one")
        return [pattern]
    if "}" in pattern[:opening]:
        raise ValueError(f"the pattern {pattern!r} has a closing brace without an opening one")
    closing = _matching(pattern, opening)
    inside = pattern[opening + 1 : closing]
    if match := _RANGE.fullmatch(inside):
        middle = _count(pattern, *match.groups())
    else:
        parts = split_commas(inside)
        if len(parts) < 2:
            raise ValueError(
                f"the pattern {pattern!r} has the braces {{{inside}}}: no list {{a,b}} and no range {{00000..00009}}"
            )
        middle = [text for part in parts for text in expand_braces(part)]
    rest = expand_braces(pattern[closing + 1 :])
    if len(middle) * len(rest) > MAX_PATHS:
        raise ValueError(f"the pattern {pattern!r} stands for more than {MAX_PATHS} paths")
    return [pattern[:opening] + m + r for m in middle for r in rest]


def split_modalities(pattern: str) -> tuple[str, list[str]]:
    """A pattern with its square brackets replaced by NUL, and the modalities in them (none: []).

    Raises ValueError: brackets that do not match, more than one pair, a modality twice or with unusual characters.
    """
    if "\0" in pattern:
        raise ValueError(f"the pattern {pattern!r} holds a zero character")
    opening, closing = pattern.find("["), pattern.find("]")
    if opening < 0 and closing < 0:
        return pattern, []
    if not 0 <= opening < closing or pattern.count("[") + pattern.count("]") != 2:
        raise ValueError(f"the pattern {pattern!r} must have one pair of square brackets, around the modalities")
    names = [
        name.strip() for part in split_commas(pattern[opening + 1 : closing]) for name in expand_braces(part.strip())
    ]
    for name in names:
        if not _MODALITY.fullmatch(name) or set(name) == {"."}:
            raise ValueError(f"the pattern {pattern!r} names the modality {name!r}; expected letters, digits and _@.-")
        if names.count(name) > 1:
            raise ValueError(f"the pattern {pattern!r} names the modality {name!r} twice")
    return pattern[:opening] + "\0" + pattern[closing + 1 :], names


def shards(pattern: str) -> list[tuple[str, dict[str, str]]]:
    """(shard, {modality: path of its tar}) of every shard, in the pattern's order; without brackets the modality is "".

    ``shard`` is the path with the modality left out, equal for the tars that belong together. Paths of braces need not
    exist; ``*`` gives those that do, sorted.

    Raises ValueError: as `expand_braces` and `split_modalities`; ``*`` before the brackets; or a shard twice.
    """
    holed, modalities = split_modalities(pattern)
    found: dict[str, dict[str, str]] = {}
    for text in expand_braces(holed):
        for modality in modalities or [""]:
            for shard, path in _files(text, modality, pattern):
                if modality in found.setdefault(shard, {}):
                    raise ValueError(f"the pattern {pattern!r} names {path} twice")
                found[shard][modality] = path
    return list(found.items())


def _files(text: str, modality: str, pattern: str) -> list[tuple[str, str]]:
    """(shard, path) of the files that an expanded pattern means."""
    if not glob.has_magic(text):
        return [(text, text.replace("\0", modality))]
    before, hole, _ = text.partition("\0")
    if hole and glob.has_magic(before):
        raise ValueError(f"the pattern {pattern!r} has * or ? before its square brackets; write that folder's name")
    paths = sorted(glob.glob(text.replace("\0", modality), recursive=True))
    if not hole:
        return [(path, path) for path in paths]
    return [(before + "\0" + path[len(before) + len(modality) :], path) for path in paths]


def shard_label(shard: str) -> str:
    """A shard's name for people and keys: ``shard-00003`` of ``root/NUL/shard-00003.tar``."""
    return os.path.splitext(os.path.basename(shard.replace("\0", "")))[0]


def split_commas(text: str) -> list[str]:
    """Parts between the commas that are not inside braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _matching(pattern: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(pattern)):
        depth += (pattern[i] == "{") - (pattern[i] == "}")
        if depth == 0:
            return i
    raise ValueError(f"the pattern {pattern!r} has an opening brace without a closing one")


def _count(pattern: str, first: str, last: str, step: str | None) -> list[str]:
    start, stop, by = int(first), int(last), int(step or 1)
    if abs(stop - start) // by >= MAX_PATHS:
        raise ValueError(f"the pattern {pattern!r} stands for more than {MAX_PATHS} paths")
    padded = any(end.lstrip("-").startswith("0") and len(end.lstrip("-")) > 1 for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    numbers = range(start, stop + 1, by) if start <= stop else range(start, stop - 1, -by)
    return [f"{number:0{width}d}" if width else str(number) for number in numbers]
