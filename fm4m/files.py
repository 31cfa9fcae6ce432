"""Files and folders that are there as a whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from etils import epath


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


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in an object store (``gs://...``), where files cannot be appended to or renamed."""
    return "://" in os.fspath(path)


class StorageError(OSError):
    """A file of a run that cannot be written; the message is a sentence that names it."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Makes a StorageError of what fails while ``path`` is written."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{os.fspath(path)} cannot be written: {error.strerror or error}. Make room or mend the storage; the same "
            "command then continues"
        ) from error


# Clients of object stores, whose errors are not OSErrors: epath reads gs:// by TensorFlow where that is installed.
_CLIENTS = ("tensorflow", "gcsfs", "aiohttp", "requests", "google")
_OF_THE_DATA = ("DataLossError", "OutOfRangeError", "NotFoundError")


def of_object_store(error: BaseException) -> bool:
    """Whether an error is an object store's client's, and says that the store did not answer or refused."""
    kind = type(error)
    return kind.__module__.partition(".")[0] in _CLIENTS and kind.__name__ not in _OF_THE_DATA


def write_whole(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes a file so that a reader, or a process killed meanwhile, leaves the old contents or the new, never a part.

    The folder is made. Object stores show a file when it is complete; elsewhere it is written beside its place and
    renamed. Unlike `complete_file` it does not wait for the disk: it is for what is written again and again.
    """
    path = epath.Path(path)
    data = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(data)
        return
    # Named by process: several may write the same file at once, such as a report that the run ended.
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
