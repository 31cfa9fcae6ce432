"""What is done on all machines of a job, by ssh; `worker.sh` is the other end."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex

from fm4m import exit_codes
from launch.gcloud import LaunchError, Result, Runner, refused
from launch.jobs import Job
from launch.machines import TPUS

# After so many machines of a slice that do not answer alone, a minute each, the others are not asked alone.
SILENT = 3
_SAID = re.compile(r"^fm4m-(installed|started|refused|status|stopped) (\d+) ?(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Status:
    """How the trainer of one machine is.

    Attributes:
      slice, worker: number of the slice, and of the machine in it.
      state: "running", "exited", "stopped" (by the command stop), "lost" (ended without an exit code, as after a
        reboot), "none" (never started) or "unreachable".
      code: exit code; -1 if there is none.
    """

    slice: int
    worker: int
    state: str
    code: int = -1

    def describe(self) -> str:
        code = f" {self.code} ({exit_codes.explain(self.code)})" if self.code >= 0 else ""
        return f"slice {self.slice} worker {self.worker}: {self.state}{code}"


def ship(runner: Runner, job: Job, archive: pathlib.Path) -> None:
    """Copies the archive to all machines, unpacks it there and installs what it needs."""
    tarball, folder = f"fm4m-{job.name}.tar.gz", f"fm4m-jobs/{job.name}"
    unpack = f"rm -rf {folder}/source && mkdir -p {folder}/source && tar -xzf {tarball} -C {folder}/source"
    for node in job.nodes:
        copy = [*TPUS, "tpu-vm", "scp", str(archive), f"{node}:{tarball}", "--worker=all", *job.place, "--quiet"]
        runner.ssh(copy, f"copying the source to {node}")
    for index, node in enumerate(job.nodes):
        install = f"{unpack} && {_script(job, 'install')}"
        result = runner.ssh(_ssh(job, node, install), f"installing on {node}", timeout=3600)
        _all_said(runner, job, index, result, "installed")


def start(runner: Runner, job: Job) -> None:
    """Starts the trainer on all machines, with the same arguments. Raises LaunchError that names those that refuse."""
    command = _script(job, "start", str(job.hosts), job.commit, "-m", "fm4m.train", *job.arguments)
    for node in job.nodes:
        what = f"starting on {node}"
        result = runner.run(_ssh(job, node, command), timeout=600)
        if result.code and result.kind != "ssh":
            raise refused(what, result)
        said = {int(worker): kind for kind, worker, _ in _SAID.findall(result.out)}
        if "refused" in said.values():
            raise LaunchError(f"{node}: the job is running there already; stop it first, or watch it", "running")
        for worker in range(job.hosts_per_slice):
            # A machine that started without our hearing of it refuses to start twice.
            if worker not in said and not runner.dry_run:
                runner.ssh(_ssh(job, node, command, worker), f"{what} worker {worker}")


def statuses(runner: Runner, job: Job) -> list[Status]:
    """The state of every machine's trainer; machines that do not answer are asked alone, and then unreachable."""
    found = []
    for index, node in enumerate(job.nodes):
        command = _script(job, "status")
        said = _statuses(index, runner.run(_ssh(job, node, command), timeout=120))
        silent = 0
        for worker in range(job.hosts_per_slice):
            if worker not in said and silent < SILENT and not runner.dry_run:
                said |= _statuses(index, runner.run(_ssh(job, node, command, worker), timeout=60))
                silent += worker not in said
            found.append(said.get(worker, Status(index, worker, "unreachable")))
    return found


def stop(runner: Runner, job: Job) -> None:
    """Tells all trainers to save and end; returns when they have, or were killed after ten minutes."""
    failed = []
    for node in job.nodes:
        result = runner.run(_ssh(job, node, _script(job, "stop")), timeout=900)
        if result.code:
            failed.append(f"{node}: {result.last_words()}")
    if failed:
        raise LaunchError(f"not all trainers could be told to stop; {'; '.join(failed)}", "ssh")


def log_since(runner: Runner, job: Job, position: int, worker: int = 0) -> str:
    """What worker 0 of the first slice logged from a byte on, at most a million bytes; "" if it cannot be asked."""
    command = _script(job, "log", str(position + 1))
    result = runner.run(_ssh(job, job.nodes[0], command, worker), timeout=120)
    return result.out if result.code == 0 else ""


def tail_command(job: Job, node: str, worker: int, lines: int, follow: bool) -> list[str]:
    """The command that shows the end of a machine's log."""
    flags = f"--lines={lines}" + (" --follow=name --retry" if follow else "")
    return _ssh(job, node, f"tail {flags} fm4m-jobs/{job.name}/log.txt", worker)


def _script(job: Job, verb: str, *arguments: str) -> str:
    return shlex.join(["bash", f"fm4m-jobs/{job.name}/source/launch/worker.sh", verb, job.name, *arguments])


def _ssh(job: Job, node: str, command: str, worker: int | None = None) -> list[str]:
    where = "all" if worker is None else str(worker)
    return [*TPUS, "tpu-vm", "ssh", node, f"--worker={where}", *job.place, "--quiet", f"--command={command}"]


def _statuses(index: int, result: Result) -> dict[int, Status]:
    found = {}
    for kind, worker, words in _SAID.findall(result.out):
        parts = words.split()
        if kind == "status" and len(parts) == 2 and re.fullmatch(r"-?\d+", parts[1]):
            found[int(worker)] = Status(index, int(worker), parts[0], int(parts[1]))
    return found


def _all_said(runner: Runner, job: Job, index: int, result: Result, word: str) -> None:
    if runner.dry_run:
        return
    said = {int(worker) for kind, worker, _ in _SAID.findall(result.out) if kind == word}
    missing = sorted(set(range(job.hosts_per_slice)) - said)
    if missing:
        which = ", ".join(map(str, missing))
        raise LaunchError(f"{job.nodes[index]}: no answer that it is {word} from worker {which}", "ssh")
