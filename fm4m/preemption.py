"""The notice that a machine will be taken away: SIGTERM, some tens of seconds before it is gone."""

from __future__ import annotations

import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class Notice:
    """A context in which SIGTERM asks the run to stop after the step it is in.

    Of several processes one may hear of it alone. JAX's distributed runtime, which then listens for the signal itself,
    tells the others and finds a step that all of them still have before them.
    """

    def __init__(self):
        self._told = threading.Event()
        self._before = None

    def __enter__(self) -> Notice:
        # Only the main thread may handle signals; tests and notebooks may train in another.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._told.set())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after ``step``; all processes ask for every step, and get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told.is_set()
