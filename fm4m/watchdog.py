"""Ends a run whose processes do not go on, with the name of the one that is to blame.

Training is synchronous: when one process dies, freezes or waits for its input, all others wait for it in the next step,
for ever and without a word. So every process says in memory where it is (`mark`), and a thread writes that every few
seconds to ``<workdir>/processes/<number>.json``: {"process", "host", "pid", "phase", "step", "since", "time"}, the last
two in seconds since the epoch. A process that has not moved reads the files of all. One whose file is not renewed is
dead or frozen; if all files are renewed, the one that is behind is to blame once its phase has lasted longer than
``fault.timeout`` (the step loop) or ``fault.slow_timeout`` (everything else).

Whoever finds out writes ``<workdir>/processes/report.txt``. All processes look for it, log its sentence, write the
stacks of all threads to ``<number>.stacks.txt`` and end with `exit_codes.HUNG`: the run continues from its newest
checkpoint. A process that fails by itself writes the report, too, so that the others do not wait for it.

Clocks of machines are not compared: that a file is renewed is seen by its contents changing.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
from etils import epath

from fm4m import exit_codes, files

log = logging.getLogger("fm4m")

FOLDER, REPORT = "processes", "report.txt"

# Phases of the step loop, which have the shorter bound, and those in which a process waits for the others.
LOOP = ("step", "data", "fetch")
WAITING = ("step", "fetch", "barrier")
_OVER = ("done", "failed")

# Seconds for what is written when the process ends; storage that hangs may be the reason why it does.
_LAST_WORDS = 20.0

_now: tuple[str, int, float] = ("start", 0, time.monotonic())


def mark(phase: str, step: int | None = None) -> None:
    """Says where this process is. Called some times a step: it keeps the values and the time, 0.3 µs.

    Args:
      phase: "step", "data", "fetch" (of the step loop), "barrier", or any name of something slow.
      step: optimizer step; None for the one before.
    """
    global _now
    _now = (phase, _now[1] if step is None else step, time.monotonic())


class PeerError(RuntimeError):
    """Another process of the run died or failed; the message names it."""


@dataclasses.dataclass(frozen=True)
class State:
    """Where a process is, as it wrote itself; see the module."""

    process: int
    host: str
    pid: int
    phase: str
    step: int
    since: float
    time: float

    @property
    def seconds(self) -> float:
        """How long it had been there when it wrote this."""
        return self.time - self.since

    def describe(self, count: int) -> str:
        return f"{self.name(count)}: step {self.step}, {self.phase} for {self.seconds:.0f} s, pid {self.pid}"

    def name(self, count: int) -> str:
        return f"process {self.process} of {count} ({self.host})"


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a phase may last, in seconds: of the step loop, and any other."""

    timeout: float
    slow_timeout: float

    def of(self, phase: str) -> float:
        return self.timeout if phase in LOOP else self.slow_timeout


def find_culprit(states: Sequence[State | None], silent: Mapping[int, float], limits: Limits) -> str | None:
    """A sentence that names the process that the others wait for; None while it may be right to wait.

    Args:
      states: of all processes, in order; None for one that has not written any.
      silent: number -> seconds since it last wrote, of processes that should have written meanwhile.
      limits: the bounds.
    """
    count = len(states)
    if silent:
        found = []
        for i, seconds in silent.items():
            state, last = states[i], "it never wrote where it is"
            name = f"process {i} of {count}" if state is None else state.name(count)
            if state is not None:
                last = f"its last sign of life was at step {state.step} ({state.phase})"
            found.append(f"{name} is dead or frozen: nothing for {seconds:.0f} s, {last}")
        return "; ".join(found)
    alive = [s for s in states if s is not None and s.phase not in _OVER]
    if not alive:
        return None
    behind = [s for s in alive if s.step == min(s.step for s in alive)]
    behind = [s for s in behind if s.phase not in WAITING] or behind
    if not any(s.seconds > limits.of(s.phase) for s in behind):
        return None
    worst = max(behind, key=lambda s: s.seconds)
    where = f"at step {worst.step} for {worst.seconds:.0f} s"
    if worst.phase == "data":
        return f"{worst.name(count)} waits for its input (data) {where}"
    if worst.phase in WAITING:
        which = f"all {count} processes wait" if len(behind) == count else f"{worst.name(count)} waits"
        return f"{which} {where} ({worst.phase}): the devices hang, or the network between them"
    return f"{worst.name(count)} has been {where} in {worst.phase!r}"


class Watchdog:
    """A context in which this process is watched and watches the others.

    If the block raises, the other processes are told; where the reason is that one of them is gone, `PeerError` names
    it. Does nothing for ``timeout`` 0.

    Args:
      workdir: folder of the run, the same for all processes.
      timeout, slow_timeout: seconds, see the module.
      process, processes: number of this process and of all; default JAX's.
      own_errors: what can only be this process's own fault; other errors may come of a connection to one that died, and
        are raised after a look at the others, half a minute later.
      end: called with the exit code to end the process.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        timeout: float,
        slow_timeout: float,
        *,
        process: int | None = None,
        processes: int | None = None,
        own_errors: tuple[type[Exception], ...] = (),
        end: Callable[[int], Any] = os._exit,
    ):
        self._folder = epath.Path(workdir) / FOLDER
        self._limits, self._own_errors, self._end = Limits(timeout, slow_timeout), own_errors, end
        self._process = jax.process_index() if process is None else process
        self._count = jax.process_count() if processes is None else processes
        # By default looks and local files every 5 s, objects every 15 s (each may be written once a second, and costs
        # money). Silence of a minute is death: a library that holds Python's lock may silence a process for seconds.
        self._poll = min(5.0, timeout / 20)
        self._every = 15.0 if files.is_remote(self._folder) else self._poll
        self.silence = 12 * self._poll
        self._host = socket.gethostname()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._states: list[State | None] = [None] * self._count
        # Of every process: the time in its file, and when this process first saw it, by its own clock.
        self._seen: list[tuple[float | None, float]] = []
        self._looked = 0.0  # when the files were last read
        self._old_report, self._report = "", ""
        self._answered = time.monotonic()
        self._looking = self._over = False

    def __enter__(self) -> Watchdog:
        if self._limits.timeout > 0:
            mark("start", 0)
            _bounded(self._start)
            for target in (self._file_loop, self._watch_loop):
                self._threads.append(threading.Thread(target=target, name=f"fm4m {target.__name__}", daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._threads:
            return
        failed = isinstance(error, Exception) and self._count > 1
        try:
            if failed:
                self._tell(error)
        finally:
            self._over = True
            if failed:
                self._let_others_go_first()
            self._stop.set()
            mark("done" if error is None else "failed")
            # An error of storage has been logged by the loop; the run itself is over.
            _bounded(self._write_state)

    # ---- files

    def _start(self) -> None:
        self._old_report = self._read_report()  # of an attempt before
        self._write_state()

    def _file_loop(self) -> None:
        """Writes and reads files; on its own, so that storage that hangs cannot stop `_watch_loop`."""
        written, looked, complained = 0.0, 0.0, False
        while not self._stop.wait(self._poll):
            now = time.monotonic()
            try:
                if now - written >= self._every:
                    self._write_state()
                    written = now
                if self._looking and now - looked >= self._every:
                    self._read_states()
                    looked = now
                self._report = self._read_report()
                complained = False
            except Exception as error:  # whatever storage raises, this thread has to live
                if not complained:
                    log.warning("%s cannot be written or read (%s); trying again", self._folder, error)
                complained = True
                continue
            self._answered = time.monotonic()

    def _own_state(self) -> State:
        (phase, step, since), now = _now, time.time()
        return State(self._process, self._host, os.getpid(), phase, step, now - (time.monotonic() - since), now)

    def _write_state(self) -> None:
        text = json.dumps(dataclasses.asdict(self._own_state())) + "\n"
        files.write_whole(self._folder / f"{self._process}.json", text)

    def _read_states(self) -> None:
        states: list[State | None] = []
        for i in range(self._count):
            try:
                states.append(State(**json.loads((self._folder / f"{i}.json").read_text())))
            except FileNotFoundError:
                states.append(None)
            except (ValueError, TypeError):  # half a file, or another version's
                states.append(self._states[i])
        now = time.monotonic()
        times = [None if s is None else s.time for s in states]
        with self._lock:
            old = self._seen or [(t, now) for t in times]
            self._seen = [o if o[0] == t else (t, now) for o, t in zip(old, times)]
            self._states, self._looked = states, now

    def _read_report(self) -> str:
        try:
            text = (self._folder / REPORT).read_text()
        except FileNotFoundError:
            return ""
        return "" if text == self._old_report else text

    # ---- judging

    def _watch_loop(self) -> None:
        while not self._stop.wait(self._poll):
            if sentence := self._judge():
                if not self._over:
                    self._leave(sentence)
                return

    def _judge(self) -> str:
        """What is wrong, in a sentence; "" while nothing is, or may be not."""
        if self._report:
            return self._report.splitlines()[0]
        phase, step, since = _now
        still, limit = time.monotonic() - since, self._limits.of(phase)
        self._looking = self._count > 1 and still > 3 * self._poll
        if not self._looking:
            return self._alone(phase) if still > limit else ""
        if time.monotonic() - self._answered > max(self._limits.timeout, self.silence) and still > limit:
            name = self._own_state().name(self._count)
            return f"{name} cannot write or read {self._folder}, nor go on at step {step}"
        with self._lock:
            states, silent, fresh = list(self._states), self._silent(), self._looked > since
        if not fresh:  # read at an earlier halt
            return ""
        if silent:
            return find_culprit(states, silent, self._limits) or ""
        states[self._process] = self._own_state()
        return find_culprit(states, {}, self._limits) or "" if still > limit else ""

    def _alone(self, phase: str) -> str:
        return find_culprit([self._own_state()], {}, self._limits) or "" if self._count == 1 else ""

    def _silent(self) -> dict[int, float]:
        # One that is over no longer writes; this one's own file is not the question.
        over = {s.process for s in self._states if s is not None and s.phase in _OVER} | {self._process}
        ages = {i: self._looked - when for i, (_, when) in enumerate(self._seen) if i not in over}
        return {i: age for i, age in ages.items() if age > self.silence}

    # ---- the end

    def _leave(self, sentence: str) -> None:
        log.critical("the run ends: %s", sentence)
        log.critical("exit code %d: %s", exit_codes.HUNG, exit_codes.explain(exit_codes.HUNG))
        if not self._report:
            _bounded(lambda: self._write_report(sentence))
        _bounded(self._write_stacks)
        self._let_others_go_first()
        sys.stdout.flush()
        sys.stderr.flush()
        self._end(exit_codes.HUNG)

    def _let_others_go_first(self) -> None:
        """Gives the others time to read the report: JAX ends them at once, by a signal, when process 0 is gone."""
        if self._process == 0 and self._count > 1:
            time.sleep(4 * self._poll)

    def _write_report(self, sentence: str) -> None:
        with self._lock:
            states = list(self._states)
        states[self._process] = self._own_state()
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
        lines = [sentence, f"found by process {self._process} of {self._count} ({self._host}), {when}"]
        lines += [s.describe(self._count) for s in states if s is not None]
        files.write_whole(self._folder / REPORT, "\n".join(lines) + "\n")

    def _write_stacks(self) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            files.write_whole(self._folder / f"{self._process}.stacks.txt", file.read())

    def _tell(self, error: Exception) -> None:
        """Tells the others of an error of this process, unless it comes of theirs: then raises PeerError."""
        mark("error")
        begin = time.monotonic()
        deadline = begin + self.silence + 3 * self._every + 5.0
        while not isinstance(error, self._own_errors) and time.monotonic() < deadline:
            self._looking = True
            with self._lock:
                states, silent = list(self._states), self._silent() if self._looked > begin else {}
            found = self._report or (find_culprit(states, silent, self._limits) if silent else "")
            if found:
                sentence = found.splitlines()[0]
                if not self._report:
                    _bounded(functools.partial(self._write_report, sentence))
                raise PeerError(sentence) from error
            time.sleep(min(self._poll, 0.5))
        said = (str(error).strip().splitlines() or [""])[0]
        name = f"process {self._process} of {self._count} ({self._host})"
        _bounded(lambda: self._write_report(f"{name} failed: {type(error).__name__}: {said}"))


def _bounded(function: Callable[[], None]) -> None:
    """Calls a function that may fail or hang, and goes on in any case."""

    def guarded() -> None:
        try:
            function()
        except Exception as error:  # clients of object stores have errors of their own
            log.warning("%s", error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(_LAST_WORDS)
