"""Where the members of a tar file are: read once, headers only; afterwards any member is read by its offset.

Nothing is ever written to disk, so what a member's name says about folders does not matter.
"""

from __future__ import annotations

import os
import tarfile
from typing import NamedTuple

from data_pipelines.prepare import headers
from data_pipelines.prepare.errors import Problem, Unusable
from data_pipelines.prepare.folder_walk import MAX_FILE_BYTES

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
_EXTENSIONS = {*headers.SUFFIXES, ".npy", ".npz", ".txt", ".json", ".cls"}


class Member(NamedTuple):
    """A regular file in a tar. ``name`` is its path without "/" at the front and without "." and ".." parts."""

    name: str
    offset: int
    size: int


class _Header(tarfile.TarInfo):
    """A header of which an ordinary file's name and size are read, and not dates and owners: a third of the time."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        ordinary = len(buf) == _BLOCK and buf[156:157] in (b"0", b"\0") and buf[124] < 128
        try:
            checksum, size = (int(buf[a:b].rstrip(b" \0") or b"0", 8) for a, b in ((148, 156), (124, 136)))
        except ValueError:
            ordinary = False
        name, prefix = buf[:100].partition(b"\0")[0], buf[345:500].partition(b"\0")[0]
        if not ordinary or name.endswith(b"/") or checksum != 256 + sum(buf) - sum(buf[148:156]):
            return super().frombuf(buf, encoding, errors)
        header = cls((prefix + b"/" + name if prefix else name).decode(encoding, errors))
        header.size, header.type, header.chksum = size, buf[156:157], checksum
        return header


def index_tar(path: str, name: str) -> tuple[list[Member], list[Problem]]:
    """All regular members in the tar's order, and what else was found.

    A tar that is cut off or damaged gives the members before the damage. Problems, by reason: ``unreadable``,
    ``missing_file``, ``compressed_tar``, ``truncated``, ``corrupt``, ``not_a_file`` (links, devices), ``hidden``.
    """
    members: list[Member] = []
    problems: list[Problem] = []

    def note(reason: str, sentence: str, key: str = name) -> None:
        problems.append(Problem(key, reason, f"{name}: {sentence}"))

    try:
        with open(path, "rb") as file:
            _index(file, members, note)
    except FileNotFoundError:
        note("missing_file", "there is no such tar.")
    except OSError as error:
        note("unreadable", f"cannot be read after {len(members)} members ({error.strerror or error}).")
    return members, problems


def _index(file, members: list[Member], note) -> None:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    if not size:
        return note("truncated", "the tar has zero bytes.")
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            return note(
                "compressed_tar", f"is compressed with {kind}, which gives no random access; unpack it to .tar."
            )
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
            while (info := archive.next()) is not None:
                end = archive.offset
                archive.members.clear()  # tarfile keeps them all, several kilobytes each
                _add(info, members, note)
    except (tarfile.TarError, ValueError, EOFError, OverflowError, UnicodeError) as error:
        cut = end > size or "end of data" in str(error) or "truncated" in str(error)
        text = "the tar ends early" if cut else f"damaged after byte {end} ({error})"
        return note(
            "truncated" if cut else "corrupt", f"{text}; the {len(members)} members before are used, the rest is lost."
        )
    # tarfile takes a bad header, and the end of the file without an end mark, for the end.
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK or end > size:
        note(
            "truncated", f"the tar has no end mark, so members may be lost; the {len(members)} that are there are used."
        )
    elif block.strip(b"\0"):
        note("corrupt", f"byte {end} is no tar header; the {len(members)} members before are used, the rest is lost.")
    return None


def _add(info: tarfile.TarInfo, members: list[Member], note) -> None:
    if info.isdir():
        return
    name = _clean(info.name)
    if not info.isreg() or info.issparse():
        note("not_a_file", f"the member {name!r} is a link, device or sparse file, and left out.", name)
    elif not name or name.rpartition("/")[2].startswith(".") or "__MACOSX/" in name:
        note("hidden", f"the member {name!r} is hidden, and left out.", name)
    else:
        members.append(Member(name, info.offset_data, info.size))


def _clean(name: str) -> str:
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\0", "")
    return "/".join(part for part in text.split("/") if part not in ("", ".", ".."))


def split_name(name: str, joint: bool) -> tuple[str, str, str]:
    """(key, field, extension) of a member's name; the extension is lower-case with its dot.

    In a tar of one modality the key ends before the known extension: ``a/b.v1.json.gz`` is ("a/b.v1", "", ".json.gz").
    In a joint tar it ends at the first dot, as WebDataset has it: ``a/b.rgb.png`` is ("a/b", "rgb", ".png"), and
    ``a/b.png`` is ("a/b", "", ".png").
    """
    folder, slash, base = name.rpartition("/")
    if joint:
        stem, dot, rest = base.partition(".")
        base, rest = stem, dot + rest
    else:
        lower = base.lower()
        cut = lower.rfind(".json.gz") if lower.endswith(".json.gz") else lower.rfind(".")
        base, rest = (base[:cut], base[cut:]) if cut > 0 else (base, "")
    if not joint:
        return folder + slash + base, "", rest.lower()
    lower = rest.lower()
    cut = lower.rfind(".json.gz") if lower.endswith(".json.gz") else lower.rfind(".")
    return folder + slash + base, rest[1:cut] if cut > 0 else "", lower[cut:] if cut >= 0 else ""


def read_member(path: str, name: str, offset: int, size: int) -> bytes:
    """A member's bytes. Raises Unusable: ``unreadable``, ``truncated`` or ``too_large``."""
    if size > MAX_FILE_BYTES:
        raise Unusable("too_large", f"{name}: {size} bytes, more than the {MAX_FILE_BYTES} that are read")
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(handle, size, offset)
        finally:
            os.close(handle)
    except OSError as error:
        raise Unusable("unreadable", f"{name}: cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise Unusable("truncated", f"{name}: the tar ends after {len(data)} of the member's {size} bytes")
    return data
