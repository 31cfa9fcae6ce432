"""Where the wall time of a run goes, by cause, over all of its attempts.

Goodput is the share of the time since the run was first started that went into training steps which count in the end.
This is the runtime goodput of Google's ML Productivity Goodput (Machine Learning Fleet Efficiency, arXiv:2502.06982,
section 4; its library ml-goodput-measurement calls the rest badput), measured by the loop of one process: every moment
of an attempt belongs to exactly one of `CAUSES`, and between attempts and to their discarded ends to one of `BETWEEN`.

  start       from the start of the process to the first step, as far as it is nothing below
  data        waiting for input while the devices had nothing to do; a wait that a running step hides is that step's
  compile     compiling the training step
  restore     reading the checkpoint
  step        the loop: all steps, and what the host does meanwhile
  checkpoint  saving, as far as it holds the loop up; what is written in the background is hidden
  validation  validation passes, the compilation of the first included
  pictures    drawing sample pictures
  profile     starting and writing profiles
  restart     from the last sign of life of one attempt to the start of the next
  lost        steps of an attempt that the next ones had to make again, at the mean time of the attempt's steps

A killed attempt's last sign of life is its last written entry, so the steps it made after that count as restart.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from fm4m import files

log = logging.getLogger("fm4m")

CAUSES = ("start", "data", "compile", "restore", "step", "checkpoint", "validation", "pictures", "profile")
BETWEEN = ("restart", "lost")
FILE, FORMAT = "goodput.json", 1
# How long the end of a run waits for the last step: longer than steps take, shorter than others wait for news.
_LAST_STEP_SECONDS = 10.0


class LastStep:
    """Knows when the devices finished the newest step, by a thread that waits for one of its values.

    Attributes are read by `Clock.waiting`; `close` ends the thread.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._given, self._done, self._when = now, 0, 0, now()
        self._values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="fm4m last step", daemon=True)
        self._thread.start()

    def follow(self, value: Any) -> None:
        """Tells of a step that was just sent to the devices; ``value`` is any array it computes."""
        self._given += 1
        self._values.put(value)

    def idle(self, begin: float, end: float) -> float:
        """Seconds between two moments, the later one now, in which every step sent so far was finished."""
        if self._done < self._given:
            return 0.0
        return max(0.0, end - max(begin, self._when))

    def close(self) -> None:
        """Ends the thread, once the steps it was told of are finished.

        Waits for it, though not for devices that hang: a thread that still waits for one when the process ends makes it
        end by SIGABRT, whatever its exit code was to be.
        """
        self._values.put(None)
        self._thread.join(_LAST_STEP_SECONDS)

    def _watch(self) -> None:
        while (value := self._values.get()) is not None:
            # A step that failed is reported by the loop, which fetches the same values.
            with contextlib.suppress(Exception):
                value.block_until_ready()
            self._when = self._now()
            self._done += 1


class Clock:
    """Splits the time of one attempt by cause: ``with clock("compile"): ...``; time outside any block is "start".

    Blocks may be nested; time in an inner one does not count in the outer. Entering and leaving take one reading of the
    clock each.

    Args:
      age: seconds since the process started, which count as "start".
      now: the clock, in seconds.

    Attributes:
      seconds: by cause, up to the last change or `read`.
    """

    def __init__(self, age: float = 0.0, now: Callable[[], float] = time.perf_counter):
        self.seconds = dict.fromkeys(CAUSES, 0.0) | {"start": age}
        self._now, self._cause, self._mark = now, "start", now()

    @contextlib.contextmanager
    def __call__(self, cause: str) -> Iterator[None]:
        """Time in the block belongs to ``cause``. Raises KeyError for one that is not in `CAUSES`."""
        self.seconds[cause]  # a wrong name fails here and not when the block ends
        outer, self._cause = self._turn(), cause
        try:
            yield
        finally:
            self._turn()
            self._cause = outer

    @contextlib.contextmanager
    def waiting(self, device: LastStep) -> Iterator[None]:
        """Time in the block belongs to "data" as far as the devices were idle, and otherwise to the block around."""
        self._turn()
        begin = self._mark
        try:
            yield
        finally:
            idle = device.idle(begin, end := self._now())
            self.seconds["data"] += idle
            self.seconds[self._cause] += end - begin - idle
            self._mark = end

    def read(self) -> dict[str, float]:
        """Seconds by cause up to now; their sum is the age of the attempt."""
        self._turn()
        return dict(self.seconds)

    def _turn(self) -> str:
        now = self._now()
        self.seconds[self._cause] += now - self._mark
        self._mark = now
        return self._cause


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not say (it does on Linux)."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22, the name of the program is field 2
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, AttributeError):
        return 0.0


class Record:
    """``<workdir>/goodput.json``: one entry an attempt, written whole by one process of the run.

    Args:
      workdir: folder of the run.
      clock: of this attempt.
      step: the step that this attempt starts from.
      active: whether this process writes; the others measure in vain.
      now: seconds since the epoch.

    Attributes:
      attempts: the entries: {"start": seconds since the epoch, "first_step", "step": newest step finished, "seconds":
        by cause, "ended": "" while it runs or if it was killed, else how}.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        clock: Clock,
        step: int = 0,
        *,
        active: bool = True,
        now: Callable[[], float] = time.time,
    ):
        self._path, self._clock, self._active = epath.Path(workdir) / FILE, clock, active
        self.attempts = read(workdir) if active else []
        seconds = clock.read()
        entry = {"start": now() - sum(seconds.values()), "first_step": step, "step": step, "seconds": seconds}
        self.attempts.append(entry | {"ended": ""})

    def row(self, step: int) -> dict[str, float]:
        """Notes that ``step`` is finished, writes the file, and returns ``goodput/CAUSE`` shares of the whole run."""
        self.write(step)
        return {f"goodput/{cause}": share for cause, share in shares(self.attempts).items()}

    def write(self, step: int | None = None, ended: str = "") -> None:
        """Writes the file; ``step`` is the newest step finished, None for no news; ``ended`` how the attempt ended."""
        entry = self.attempts[-1]
        entry |= {"seconds": self._clock.read(), "ended": ended} | ({} if step is None else {"step": step})
        if self._active:
            text = json.dumps({"format": FORMAT, "attempts": self.attempts}, indent=1) + "\n"
            try:
                files.write_whole(self._path, text)
            except Exception as error:  # of any kind of storage; a run does not end for its bookkeeping
                log.warning("%s cannot be written: %s; going on without", self._path, error)


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The attempts of a run, oldest first; none if nothing was written. A damaged file is reported and left out."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return []
    try:
        attempts = json.loads(path.read_text())["attempts"]
        for attempt in attempts:
            numbers = [attempt[key] for key in ("start", "first_step", "step")] + list(attempt["seconds"].values())
            fine = all(isinstance(x, (int, float)) and math.isfinite(x) and x >= 0 for x in numbers)
            if not fine or not set(attempt["seconds"]) <= set(CAUSES):
                raise ValueError("an attempt is not made of numbers by cause")
        return attempts
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        log.warning("%s cannot be read (%s): goodput is counted anew from here", path, error)
        return []


def end(attempt: Mapping[str, Any]) -> float:
    """The last sign of life of an attempt, in seconds since the epoch."""
    return attempt["start"] + sum(attempt["seconds"].values())


def lost_steps(attempts: Sequence[Mapping[str, Any]]) -> list[int]:
    """For every attempt how many of its steps later attempts made again."""
    out, kept = [], None
    for attempt in reversed(attempts):
        upto = attempt["step"] if kept is None else min(attempt["step"], kept)
        out.append(max(attempt["step"] - max(upto, attempt["first_step"]), 0))
        kept = attempt["first_step"] if kept is None else min(kept, attempt["first_step"])
    return out[::-1]


def totals(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by cause, `CAUSES` and `BETWEEN`, over the attempts of a run, oldest first.

    The sum is the time from the first start to the last sign of life, less the time after an attempt that completed the
    run and before somebody made it longer.
    """
    out = dict.fromkeys((*CAUSES, *BETWEEN), 0.0)
    for i, (attempt, lost) in enumerate(zip(attempts, lost_steps(attempts))):
        for cause, seconds in attempt["seconds"].items():
            out[cause] += seconds
        if lost:
            discarded = attempt["seconds"].get("step", 0.0) * lost / (attempt["step"] - attempt["first_step"])
            out["step"] -= discarded
            out["lost"] += discarded
        if i and attempts[i - 1].get("ended") != "done":
            # Clocks of two machines may disagree by more than a restart takes.
            out["restart"] += max(attempt["start"] - end(attempts[i - 1]), 0.0)
    return out


def shares(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`totals` divided by their sum: they sum to 1. The goodput is ``shares["step"]``."""
    seconds = totals(attempts)
    whole = sum(seconds.values())
    return {cause: value / whole if whole else 0.0 for cause, value in seconds.items()}


def describe(attempts: Sequence[Mapping[str, Any]]) -> str:
    """One line: "goodput 87.2 % of 3.2 h: step 87.2 %, compile 8.1 %, ..., in 2 attempts"."""
    seconds, by_cause = totals(attempts), shares(attempts)
    listed = sorted((cause for cause in by_cause if by_cause[cause] >= 0.0005), key=by_cause.get, reverse=True)
    parts = ", ".join(f"{cause} {by_cause[cause]:.1%}" for cause in listed)
    times = f", in {len(attempts)} attempts" if len(attempts) > 1 else ""
    return f"goodput {by_cause['step']:.1%} of {duration(sum(seconds.values()))}: {parts}{times}"


def duration(seconds: float) -> str:
    """A length of time with two or three digits: "45 s", "12.3 min", "3.2 h", "2.1 days"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size or (unit != "days" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
