"""Writes steps with Orbax, in the background or not, and again if the storage failed for a moment."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from fm4m.files import of_object_store
from fm4m.stored_step import PAUSES, CheckpointError, brief, of_tensorstore, steps_in

log = logging.getLogger("fm4m")

# Errors of a system that another attempt does not mend.
LASTING = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)


class SaveError(CheckpointError):
    """A checkpoint that could not be written. The message says what is still complete."""


class Writer:
    """Writes steps into a folder; all processes of a run call its methods alike.

    Args:
      folder: of the checkpoints.
      options: Orbax's. Its manager, which owns threads, is made when it is first needed.
      concurrent_gb: about how much may be on its way to the disk at a time.
    """

    def __init__(self, folder: epath.Path, options: ocp.CheckpointManagerOptions, concurrent_gb: int):
        self._folder, self._options, self._concurrent_gb = folder, options, concurrent_gb
        self._manager: ocp.CheckpointManager | None = None
        # What is being written in the background: step, arrays, description.
        self._writing: tuple[int, dict, dict] | None = None
        # What failed in the background, step and error, if nothing has been written since.
        self._failed: tuple[int, Exception] | None = None

    @property
    def failed(self) -> bool:
        """Whether a write in the background has failed, and none has succeeded since."""
        return self._failed is not None

    def write(self, step: int, parts: Mapping[str, Any], meta: Mapping) -> None:
        """Writes a step, after `finish`: in the background, or at once if the last write there has failed.

        Raises SaveError.
        """
        for pause in (*PAUSES, None):
            try:
                items = {name: ocp.args.StandardSave(value) for name, value in parts.items()}
                args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(dict(meta)))
                self._open().save(step, args=args, force=True)
                if self.failed:
                    self._manager.wait_until_finished()
            except Exception as error:  # of Orbax, TensorStore, JAX or the system
                self._again_or_raise(step, error, pause)
                continue
            self._writing = None if self.failed else (step, dict(parts), dict(meta))
            self._failed = None
            return

    def look(self) -> None:
        """Notices, without waiting, that a write in the background has failed. Does nothing with several processes,
        which would notice at different steps."""
        if self._writing and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.finish()

    def finish(self, last: bool = False) -> None:
        """Waits for the write in the background. If it failed, it is repeated, as long as its arrays are still there.

        Otherwise `failed` is set, or with ``last``, when no other write will follow, SaveError raised. With several
        processes, of which some may have failed and others not, SaveError is raised at once.
        """
        if self._writing is None:
            if last and self._failed:
                self._again_or_raise(*self._failed, None)
            return
        (step, parts, meta), self._writing = self._writing, None
        try:
            self._manager.wait_until_finished()
            return
        except Exception as error:
            # The training step takes over the arrays of the state that it is given.
            gone = any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(parts))
            self._again_or_raise(step, error, None if last and gone else PAUSES[0])
            self._failed = step, error
        if not gone:
            self.write(step, parts, meta)

    def close(self) -> None:
        """Ends the threads, after they have finished."""
        manager, self._manager = self._manager, None
        if manager is not None:
            # What a write raised is raised by `finish`.
            with contextlib.suppress(Exception):
                manager.close()
            logging.getLogger("absl").removeFilter(_no_traces_of_orbax)

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            # Named here so that shapes can be looked at before anything is restored, and for the limit.
            arrays = ocp.StandardCheckpointHandler
            handlers: dict[str, Any] = {
                name: arrays(save_concurrent_gb=self._concurrent_gb) for name in ("params", "opt_state", "ema")
            }
            handlers["meta"] = ocp.JsonCheckpointHandler()
            logging.getLogger("absl").addFilter(_no_traces_of_orbax)
            make = functools.partial(ocp.CheckpointManager, self._folder, item_handlers=handlers)
            try:
                self._manager = make(options=self._options)
            except (TypeError, ValueError):
                # The record of the times of some step is damaged; a run does not need it.
                self._manager = make(options=dataclasses.replace(self._options, lightweight_initialize=True))
        return self._manager

    def _again_or_raise(self, step: int, error: Exception, pause: float | None) -> None:
        """Waits for another attempt, or raises if there is none to make."""
        if not isinstance(error, OSError) and not of_tensorstore(error) and not of_object_store(error):
            raise error
        several = jax.process_count() > 1
        if not several:
            self.close()
            # What was half written: it may be what fills the disk. On object stores the next start removes it.
            with contextlib.suppress(OSError):
                (self._folder / f"{step}{ocp.path.step.TMP_DIR_SUFFIX}").rmtree()
        why = brief(error)
        if pause is None or several or getattr(error, "errno", None) in LASTING:
            self._failed = None
            newest = max(steps_in(self._folder), default=None)
            complete = "no step is complete" if newest is None else f"the newest complete one is step {newest}"
            raise SaveError(
                f"the checkpoint of step {step} could not be written to {self._folder}: {why}; {complete}. Make room "
                "or mend the storage; the same command then continues"
            ) from error
        log.warning("the checkpoint of step %d could not be written: %s; trying again in %.0f s", step, why, pause)
        time.sleep(pause)


def _no_traces_of_orbax(record: logging.LogRecord) -> bool:
    """Whether to log a record of absl's logger: not the stack traces of errors that `Writer` raises anyway."""
    return not (record.exc_info and "orbax" in record.pathname)
