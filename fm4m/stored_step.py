"""One stored step of a run: its description, its arrays, and whether both are what was saved.

The description (Orbax item ``meta``, JSON) holds dtype, shape and fingerprint (`fm4m.fingerprint`) of every array, and
a digest of itself, so that whatever is damaged in a stored step is noticed when it is read. Reading changes nothing on
disk and works beside a run that writes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from fm4m.files import is_remote, of_object_store
from fm4m.fingerprint import fingerprints
from fm4m.optim import path_name

log = logging.getLogger("fm4m")

# 1: without fingerprints. Still read.
FORMAT = 2
# Keys of the stored description that are about the files, not about the run.
ARRAYS, DIGEST = "arrays", "digest"
# Seconds between attempts when storage does not answer.
PAUSES = (1.0, 4.0, 16.0)
# Errors of a system that say something about the file; others are about the storage as a whole.
OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
# TensorStore's errors begin with the name of a status, if it is known.
STATUS = re.compile(r"[A-Z]+(?:_[A-Z]+)*(?=: )")
OF_THE_STORAGE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED",
                  "ABORTED", "CANCELLED")  # fmt: skip
# What asyncio says of an event loop that was closed under those who wait for it.
CLOSED = "Event loop is closed"


class CheckpointError(ValueError):
    """A checkpoint that does not fit what is asked of it. The message names the first difference and what to do."""


class DamagedError(CheckpointError):
    """A stored step that is incomplete, unreadable, or not what was saved."""


def run_folder(path: str | os.PathLike) -> epath.Path:
    """The absolute path of a run folder, local or of an object store (``gs://bucket/run``)."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


def steps_in(folder: epath.Path) -> list[int]:
    """The complete steps in a folder of checkpoints, ascending."""
    if not folder.is_dir():
        return []
    names = (p for p in folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", p.name))
    return sorted(int(p.name) for p in names if ocp.path.step.is_path_finalized(p))


def array_table(state: Mapping[str, Any]) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """What is stored about the arrays of a train state, by part and path, and those whose copies differ."""
    table, unequal = {}, []
    for part, tree in state.items():
        prints, differing = fingerprints(tree)
        shapes = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        table[part] = {
            name: {"dtype": str(x.dtype), "shape": list(x.shape), "fingerprint": prints[name]}
            for name, x in shapes.items()
        }
        unequal += [f"{part}/{name}" for name in differing]
    return table, unequal


def seal(meta: Mapping, table: Mapping) -> dict:
    """The description as it is stored: with the table of the arrays and the digest of everything."""
    sealed = json.loads(json.dumps({**meta, "format": FORMAT, ARRAYS: table}))
    return sealed | {DIGEST: _digest(sealed)}


def _digest(meta: Mapping) -> str:
    rest = {k: v for k, v in meta.items() if k != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class StoredStep:
    """A stored step, to be read. Methods raise DamagedError if it is damaged, and otherwise CheckpointError."""

    def __init__(self, folder: epath.Path, step: int):
        self.path, self.step = folder / str(step), step
        self._where = f"the checkpoint of step {step} in {folder}"
        self._sealed: dict | None = None

    def meta(self) -> dict:
        """The description that was given when the step was saved."""
        if self._sealed is None:
            found = self._read("meta", lambda: ocp.JsonCheckpointHandler().restore(self.path / "meta"))
            if not isinstance(found, dict):
                raise DamagedError(f"{self._where} is damaged: its description is {found!r}")
            sealed = DIGEST in found or found.get("format") == FORMAT
            if sealed and found.get(DIGEST) != _digest(found):
                raise DamagedError(f"{self._where} is damaged: its description is not what was saved (SHA-256 differs)")
            if found.get("format") not in (1, FORMAT):
                raise CheckpointError(
                    f"{self._where} has format {found.get('format')!r}; this version of fm4m reads 1 and {FORMAT}"
                )
            self._sealed = found
        return {k: v for k, v in self._sealed.items() if k not in (ARRAYS, DIGEST)}

    def shapes(self, part: str) -> Any:
        """The tree of shapes and dtypes of one part of the stored train state. Raises CheckpointError for no such part,
        DamagedError if Orbax's record of the shapes is not the description's."""
        self.meta()
        table = self._sealed.get(ARRAYS)
        missing = part not in table if table is not None else not (self.path / part).exists()
        if missing:
            why = " (optimizer.ema was 0)" if part == "ema" else ""
            if part == "opt_state":
                why = ": imported weights without it cannot be continued; start a new run from them (train.init_from)"
            raise CheckpointError(f"{self._where} has no {part!r}{why}")
        found = self._read(part, lambda: ocp.StandardCheckpointHandler().metadata(self.path / part))
        tree = getattr(found, "tree", found)
        if table is not None:
            have = {path_name(p): [str(x.dtype), list(x.shape)] for p, x in jax.tree_util.tree_leaves_with_path(tree)}
            for name in {**table[part], **have}:
                saved = table[part].get(name)
                if saved is None or have.get(name) != [saved["dtype"], saved["shape"]]:
                    raise DamagedError(
                        f"{self._where} is damaged: it has {part}/{name} as {have.get(name)}, not {saved}"
                    )
        return tree

    def check(self, abstract: Mapping[str, Any]) -> None:
        """Raises CheckpointError naming the first array that is missing, left over, or of another shape or dtype than
        in ``abstract``, a train state without "step"."""
        self.meta()
        for part in sorted(abstract, key=lambda part: part != "params"):  # so that an error names a parameter
            table = self._sealed.get(ARRAYS, {}).get(part)
            if table is None:
                leaves = jax.tree_util.tree_leaves_with_path(self.shapes(part))
                table = {path_name(p): {"dtype": str(x.dtype), "shape": list(x.shape)} for p, x in leaves}
            wanted = jax.tree_util.tree_leaves_with_path(abstract[part])
            self._compare(part, table, {path_name(p): x for p, x in wanted})

    def _compare(self, part: str, have: Mapping[str, dict], want: Mapping[str, Any]) -> None:
        mend = "it belongs to another model: use the configuration beside it, or another --workdir"
        for name, x in want.items():
            if name not in have:
                raise CheckpointError(
                    f"{self._where} has no array {part}/{name} (expected shape {tuple(x.shape)}); {mend}"
                )
            shape, dtype = tuple(have[name]["shape"]), have[name]["dtype"]
            if shape != tuple(x.shape):
                raise CheckpointError(
                    f"{self._where} has {part}/{name} of shape {shape}, but the model's is {tuple(x.shape)}; {mend}"
                )
            if dtype != str(x.dtype):
                raise CheckpointError(
                    f"{self._where} has {part}/{name} as {dtype}, but the model's is {x.dtype}; {mend}"
                )
        for name in have:
            if name not in want:
                shape = tuple(have[name]["shape"])
                raise CheckpointError(
                    f"{self._where} has an array {part}/{name} {shape} that the model does not have; {mend}"
                )

    def restore(self, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """The parts named in ``abstract``, sharded as its leaves say; still to be verified."""
        out = {}
        for part, tree in abstract.items():
            self.shapes(part)
            handler, args = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(tree)
            out[part] = self._read(part, functools.partial(handler.restore, self.path / part, args=args))
        return out

    def verify(self, state: Mapping[str, Any]) -> None:
        """Raises DamagedError naming the arrays that are not those that were saved. All processes must come here."""
        table = self._sealed.get(ARRAYS)
        if table is None:
            log.warning("%s was saved without fingerprints: damage to its arrays would not be noticed", self._where)
            return
        for part, tree in state.items():
            found, unequal = fingerprints(tree)
            wrong = [name for name in found if found[name] != table[part][name]["fingerprint"] or name in unequal]
            if wrong:
                shown = ", ".join(f"{part}/{name}" for name in wrong[:3])
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise DamagedError(f"{self._where} is damaged: {shown}{more} have other values than were saved")

    def _read(self, part: str, action: Callable[[], Any]) -> Any:
        """What ``action`` reads. Tries again while the storage does not answer."""
        for pause in (*PAUSES, None):
            try:
                with _without_traces():
                    return action()
            except Exception as error:  # readers of many formats lie below, each with errors of its own
                if not about_storage(error):
                    raise DamagedError(f"{self._where} is damaged: {part} cannot be read: {brief(error)}") from error
                if pause is None:
                    raise CheckpointError(f"{self._where} cannot be read at the moment: {brief(error)}") from error
                log.warning("%s: %s; trying again in %.0f s", self._where, brief(error), pause)
                time.sleep(pause)


def of_tensorstore(error: BaseException) -> bool:
    """Whether an error is one of TensorStore's, which are ValueErrors."""
    return isinstance(error, ValueError) and (str(error).startswith("Error ") or STATUS.match(str(error)) is not None)


def about_storage(error: BaseException) -> bool:
    """Whether an error of reading says nothing about the file: no memory, no permission, no answer."""
    if of_object_store(error):
        return True
    if isinstance(error, OSError):
        known = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
        return not known and error.errno is not None and error.errno not in OF_THE_FILE
    if of_tensorstore(error):
        return str(error).startswith(OF_THE_STORAGE)
    return isinstance(error, (MemoryError, jax.errors.JaxRuntimeError))


def brief(error: BaseException) -> str:
    """An error in a line: its cause, if it was made from another. TensorStore's name every layer that they went
    through; the first and the last say enough."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join((str(error) or type(error).__name__).split())
    if of_tensorstore(error):
        status = STATUS.match(text)
        cause = re.sub(r" \[[a-z_ ]+='.*$", "", text).rsplit('": ', 1)[-1]
        text = f"{status.group()}: {cause.removeprefix(status.group() + ': ')}" if status else cause
    if not isinstance(error, (OSError, ValueError)) or isinstance(error, UnicodeError):
        text = f"{type(error).__name__}: {text}"
    text = text.rstrip(".")
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-90:]}"


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """Keeps the stack traces of abandoned reads off the terminal.

    When one array cannot be read, Orbax closes the event loop under those that still are; TensorStore's threads find
    out, each with a trace, up to seconds later. So the filter stays if the block fails.
    """
    unraisable, uncaught = sys.unraisablehook, sys.excepthook

    def on_unraisable(found: Any) -> None:
        if CLOSED not in str(found.exc_value) and "_read_array" not in str(found.object):
            unraisable(found)

    def on_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if CLOSED not in str(error):
            uncaught(kind, error, trace)

    sys.unraisablehook, sys.excepthook = on_unraisable, on_uncaught
    yield
    sys.unraisablehook, sys.excepthook = unraisable, uncaught
