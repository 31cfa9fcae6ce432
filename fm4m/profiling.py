"""A profile of chosen steps, for TensorBoard's profile plugin or xprof."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from typing import Any

import jax
from etils import epath

from fm4m import config as config_lib
from fm4m import files, goodput

log = logging.getLogger("fm4m")


class Profile:
    """Traces steps START .. START + COUNT - 1 into ``<workdir>/profile`` (an xplane file).

    Every process runs the same program, so one of them traces: a trace of a step of a large model is tens of megabytes
    a host.

    Args:
      text: ``config.log.profile``: "START:COUNT", or "" for none.
      workdir: folder of the run.
      clock: of the attempt; starting and writing count as "profile".
      first: the step that this process continues from; steps up to it are not made again.
      active: whether this process traces.
    """

    def __init__(
        self, text: str, workdir: str | os.PathLike, clock: goodput.Clock, first: int = 0, *, active: bool = True
    ):
        steps = config_lib.profiled_steps(text)
        if steps and steps[0] <= first:
            log.info("log.profile = %r: step %d was made by an earlier attempt; nothing is profiled", text, steps[0])
            steps = None
        self._start, count = steps if steps and active else (0, 0)
        self._last = self._start + count - 1
        self._clock, self._running = clock, False
        self._folder, self._local = epath.Path(workdir) / "profile", None

    def begin(self, step: int) -> None:
        """To be called before the step is sent to the devices."""
        if step == self._start:
            with self._clock("profile"):
                self._local = tempfile.TemporaryDirectory() if files.is_remote(self._folder) else None
                jax.profiler.start_trace(self._local.name if self._local else os.fspath(self._folder))
            self._running = True
            log.info("profiling steps %d to %d", self._start, self._last)

    def annotation(self, step: int) -> contextlib.AbstractContextManager:
        """A context for the step, by which the viewer tells steps apart."""
        if self._start <= step <= self._last:
            return jax.profiler.StepTraceAnnotation("train", step_num=step)
        return contextlib.nullcontext()

    def end(self, step: int, values: Any) -> None:
        """To be called after the step was sent; waits for its ``values`` if it is the last one to be traced."""
        if self._running and step == self._last:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Writes what was traced, also where the run ends before the last step that was asked for."""
        if not self._running:
            return
        self._running = False
        with self._clock("profile"):
            jax.profiler.stop_trace()
            if self._local is not None:
                _copy(self._local.name, self._folder)
                self._local.cleanup()
        log.info("profile written; look at it: pip install xprof; xprof --logdir=%s (or the same folder in TensorBoard "
                 "with tensorboard-plugin-profile)", self._folder)  # fmt: skip


def _copy(source: str, target: epath.Path) -> None:
    # The profiler writes through the file system of the operating system only.
    for folder, _, names in os.walk(source):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                files.write_whole(target / os.path.relpath(path, source), file.read())
