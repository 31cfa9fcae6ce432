"""Files and folders that are there as a whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` when the block ends, or vanishes if it fails.

    The folder is made. The two names share their suffix, which some writers go by.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        with open(beside, "rb") as file:  # or a crash of the machine could leave the new name without its contents
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A new folder beside ``path`` to fill; it becomes ``path`` when the block ends, or vanishes if it fails.

    Raises FileExistsError if ``path`` exists and is not an empty folder, before anything is done.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: choose another folder, or remove it")
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        beside.mkdir(parents=True)
        yield beside
        if path.exists():
            path.rmdir()
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
