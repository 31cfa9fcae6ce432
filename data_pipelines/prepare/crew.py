"""Worker processes that make parts: tokenizers loaded once in each, one thread each, and no part lost with a worker."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Iterator
from typing import Any

from data_pipelines.prepare.parts import Job, Part, PartMaker
from data_pipelines.prepare.plan import Plan
from data_pipelines.prepare.report import Progress
from data_pipelines.prepare.writer import DiskFull, is_disk_full
from fm4m.config_file import ConfigError

# Times a part is begun before it is given up.
TRIES = 2
# One thread a worker: the machine's cores are used by several workers, and sums have one order whatever their number.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def limit_threads(environment: dict[str, str] | os._Environ) -> None:
    """Sets the variables that keep the numerical libraries of processes started from now on to one thread."""
    environment.update(_ENVIRONMENT)
    if _XLA_FLAGS not in environment.get("XLA_FLAGS", ""):
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_XLA_FLAGS}".strip()
    # Several processes cannot share an accelerator; a variable of the user's own says where a single one computes.
    environment.setdefault("JAX_PLATFORMS", "cpu")


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        limit_threads(os.environ)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclasses.dataclass(eq=False)
class _Worker:
    process: Any
    connection: Any
    part: Part | None = None
    reported: tuple[int, int] = (0, 0)

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


class Crew:
    """Makes parts in worker processes.

    Args:
      processes: how many at once.
    """

    def __init__(self, processes: int):
        self._processes = processes
        self._workers: list[_Worker] = []

    def execute(self, plan: Plan, todo: list[Part], progress: Progress) -> None:
        """Makes the parts; those that fail twice are named and left out.

        Raises:
          ConfigError: a step cannot work as configured.
          DiskFull: nothing more can be written.
        """
        waiting, tries = list(todo), dict.fromkeys((part.number for part in todo), 0)
        try:
            for _ in range(min(self._processes, len(waiting))):
                self._workers.append(_start(plan.job))
            while waiting or any(worker.part for worker in self._workers):
                for worker in self._workers:
                    if worker.part is None and waiting:
                        self._give(worker, waiting.pop(0), tries)
                self._wait(plan.job, waiting, tries, progress)
        finally:
            for worker in self._workers:
                worker.end()
            self._workers = []

    def _give(self, worker: _Worker, part: Part, tries: dict[int, int]) -> None:
        worker.part, worker.reported = part, (0, 0)
        tries[part.number] += 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died, which `_wait` finds out
            worker.connection.send(part)

    def _wait(self, job: Job, waiting: list[Part], tries: dict[int, int], progress: Progress) -> None:
        ready = multiprocessing.connection.wait([w.connection for w in self._workers])
        for worker in [w for w in self._workers if w.connection in ready]:
            try:
                kind, *values = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                self._replace(job, worker, waiting, tries, progress)
                continue
            if kind == "progress":
                worker.reported = worker.reported[0] + values[0], worker.reported[1] + values[1]
                progress.add(*values)
            elif kind == "done":
                worker.part = None
            elif kind == "full":
                raise DiskFull(values[0])
            elif kind == "wrong":
                raise ConfigError(values[0])
            else:
                self._again(worker, f"failed: {values[0]}", waiting, tries, progress)

    def _replace(self, job: Job, worker: _Worker, waiting, tries, progress: Progress) -> None:
        worker.end()
        code = worker.process.exitcode
        how = f"with exit code {code}"
        if code is not None and code < 0:
            how = f"by signal {-code} ({signal.Signals(-code).name})"
            if code == -signal.SIGKILL:
                how += ", as the system does when memory runs out; fewer --processes or a smaller batch need less"
        self._workers.remove(worker)
        if worker.part is None:
            raise ConfigError(f"a worker process ended {how} before it got any work")
        self._again(worker, f"its worker process was ended {how}", waiting, tries, progress)
        if waiting:
            self._workers.append(_start(job))

    def _again(self, worker: _Worker, what: str, waiting: list[Part], tries, progress: Progress) -> None:
        part, worker.part = worker.part, None
        progress.add(-worker.reported[0], -worker.reported[1])
        if tries[part.number] < TRIES:
            progress.say(f"{part}: {what}. It is made once more")
            waiting.insert(0, part)
        else:
            progress.say(f"{part}: {what}, for the second time. It is left out for now")


def _start(job: Job) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, job), daemon=True)
    with _worker_environment():
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(connection: Any, job: Job) -> None:
    """A worker: gets parts, sends how they went."""
    # Ctrl-C reaches the whole group; the command ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()

    def progress(samples: int, quarantined: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the command is gone; who resumes it makes the part
        connection.send(("progress", samples, quarantined))

    try:
        maker = PartMaker(job)
    except Exception as error:
        connection.send(("wrong", _sentence(error)))
        return
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        try:
            maker.make(part, progress)
        except BrokenPipeError:
            return
        except ConfigError as error:
            connection.send(("wrong", str(error)))
        except Exception as error:
            connection.send(("full" if is_disk_full(error) else "failed", _sentence(error)))
        else:
            connection.send(("done",))


def _sentence(error: Exception) -> str:
    known = isinstance(error, ValueError | FileNotFoundError | ImportError | OSError)
    return str(error) if known and str(error) else f"{type(error).__name__}: {error}"
