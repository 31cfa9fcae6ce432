"""The files below a folder, in a fixed order, whatever links, devices and names are in it."""

from __future__ import annotations

import dataclasses
import os
import stat

from data_pipelines.prepare.errors import Problem, Unusable, printable

# A file of more is no picture; reading it could take all memory.
MAX_FILE_BYTES = 1 << 30


@dataclasses.dataclass
class Listing:
    """Paths relative to the folder ("/" between parts) with sizes in bytes, sorted; and what is not among them."""

    files: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)


def walk(root: str) -> Listing:
    """Regular files below ``root``; links are followed, each folder is visited once, hidden names are left out.

    Links to folders come after the folders themselves, so that a file's path is the one without links. Nothing is
    opened. Left out with a problem: hidden files and folders, dangling links, loops, folders met twice, devices and
    pipes, folders without permission.
    """
    found = Listing()
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        links: list[str] = []
        for start in waiting:
            _walk(root, start, seen, links, found)
        waiting = sorted(links)
    found.files = dict(sorted(found.files.items()))
    return found


def _walk(root: str, start: str, seen: set[tuple[int, int]], links: list[str], found: Listing) -> None:
    stack = [start]
    while stack:
        folder = stack.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            identity = status.st_dev, status.st_ino
            if identity in seen:
                inside = os.path.realpath(path)
                above = os.path.dirname(os.path.abspath(path))
                loop = os.path.commonpath([inside, os.path.realpath(above)]) == inside
                reason = "symlink_loop" if loop else "duplicate_folder"
                _note(found, folder, reason, "leads to a folder that is read already; its pictures count once")
                continue
            seen.add(identity)
            entries = sorted(os.scandir(path), key=lambda e: e.name)
        except OSError as error:
            _note(found, folder, _link_reason(error), f"cannot be read ({error.strerror})")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or entry.name in ("__MACOSX", "Thumbs.db", "desktop.ini"):
                _note(found, name, "hidden", "is hidden and left out")
                continue
            try:
                status = entry.stat()
            except OSError as error:
                _note(found, name, _link_reason(error), f"cannot be read ({error.strerror})")
                continue
            if stat.S_ISDIR(status.st_mode):
                (links if entry.is_symlink() else stack).append(name)
            elif stat.S_ISREG(status.st_mode):
                found.files[name] = status.st_size
            else:
                _note(found, name, "not_a_file", "is a pipe, socket or device, and left out")


def _link_reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "dangling_link"
    return "symlink_loop" if "symbolic links" in (error.strerror or "") else "unreadable"


def _note(found: Listing, name: str, reason: str, sentence: str) -> None:
    key = printable(name) or "."
    found.problems.append(Problem(key, reason, f"{key} {sentence}."))


def read_file(path: str, name: str) -> bytes:
    """A file's bytes. Raises Unusable: ``unreadable`` (gone, no permission, disk error) or ``too_large``."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise Unusable("too_large", f"{name}: {size} bytes, more than the {MAX_FILE_BYTES} that are read")
            return file.read()
    except OSError as error:
        raise Unusable("unreadable", f"{name}: cannot be read ({error.strerror})") from error
