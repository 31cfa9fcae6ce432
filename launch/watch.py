"""Follows a job until it ends, and brings a preempted one back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from fm4m import exit_codes
from launch import jobs, machines, source, workers
from launch.gcloud import LaunchError, Runner
from launch.jobs import Job
from launch.workers import Status

# Polls after which a machine that does not answer counts as lost, and after which the machines of a job that ended
# on some only are stopped on the others.
PATIENCE = 5
# Kinds of errors on the way that may be gone on new machines; others, such as quota, would come again.
PASSING = ("ssh", "timeout", "missing", "preempted", "other")


@dataclasses.dataclass
class Tail:
    """How much of worker 0's log was shown, in bytes; a job that is started again on the same machines appends."""

    position: int = 0

    def show(self, runner: Runner, job: Job) -> None:
        """Prints what is new."""
        while text := workers.log_since(runner, job, self.position):
            self.position += len(text.encode())
            sys.stdout.write(text)
            sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
      how: "done", "stopped", "preempted", "crashed", "lost" or "failed"; the middle three may be tried again.
      why: sentence.
    """

    how: str
    why: str

    @property
    def again(self) -> bool:
        return self.how in ("preempted", "crashed", "lost")

    @property
    def code(self) -> int:
        """The launcher's exit code."""
        if self.how in ("done", "stopped"):
            return exit_codes.DONE
        return exit_codes.PREEMPTED if self.again else exit_codes.FAILED


def judge(found: Sequence[Status]) -> End | None:
    """How a run ended, by all machines' exit codes; None while any machine's trainer may still run."""
    if any(s.state in ("running", "unreachable") for s in found):
        return None
    codes = {s.code for s in found if s.state == "exited"}
    said = "; ".join(sorted({f"{s.describe()}" for s in found if s.code != exit_codes.DONE or s.state != "exited"}))
    if any(s.state == "stopped" for s in found):
        return End("stopped", f"the job was stopped by its user; {said}")
    if any(s.state == "none" for s in found):
        return End("lost", f"the trainer was never started on some machines; {said}")
    if all(s.code == exit_codes.DONE for s in found):
        return End("done", f"the job is done: exit code 0 on all {len(found)} machines")
    if any(s.code == exit_codes.PREEMPTED for s in found):
        return End("preempted", f"the trainer was told to stop and saved; {said}")
    # A machine that vanishes takes the trainers of the others down by a signal or an error of the connection.
    if any(s.state == "lost" for s in found) or any(
        code >= exit_codes.FIRST_SIGNAL and code != exit_codes.ABORTED for code in codes
    ):
        return End("crashed", f"the trainer was killed; {said}")
    # One that fails by itself ends the others, by the watchdog or, without process 0, by signal 6.
    if codes & {exit_codes.FAILED, exit_codes.CANNOT_START}:
        return End("failed", f"the trainer failed; the same again would fail again; {said}")
    if codes & {exit_codes.HUNG, exit_codes.ABORTED}:
        return End("crashed", f"a process of the run died or hung; {said}")
    return End("failed", f"the trainer failed; the same again would fail again; {said}")


def lost(runner: Runner, job: Job, poll: float) -> str:
    """`machines.lost`, asked until Google Cloud answers: the job does not depend on the network of this machine."""
    while True:
        try:
            return machines.lost(job, machines.look(runner, job))
        except LaunchError as error:
            runner.say(f"Google Cloud could not be asked, again in {poll:.0f} s: {error}")
            runner.sleep(poll)


def follow(runner: Runner, job: Job, poll: float, tail: Tail | None = None) -> End:
    """Shows the log of worker 0 until the job ends on all machines, or the machines are taken away."""
    if runner.dry_run:
        runner.say(f"every {poll:.0f} s, until all machines have an exit code or are gone:")
        machines.look(runner, job)
        workers.statuses(runner, job)
        workers.log_since(runner, job, 0)
        return End("done", "dry run: nothing was run")
    tail, silent, partly = tail or Tail(), 0, 0
    while True:
        if gone := lost(runner, job, poll):
            return End("preempted", f"the machines were taken away: {gone}")
        found = workers.statuses(runner, job)
        tail.show(runner, job)
        if (end := judge(found)) is not None:
            # The notice of a preemption reaches the trainer some seconds before the machine goes.
            if end.again:
                runner.sleep(poll)
                gone = lost(runner, job, poll)
                end = End("preempted", f"{end.why}; the machines were taken away: {gone}") if gone else end
            return end
        unreachable = [s for s in found if s.state == "unreachable"]
        # One that is done may be ahead of others that still write; one that failed leaves them waiting for it.
        ended = [s for s in found if s.state not in ("running", "unreachable") and (s.state, s.code) != ("exited", 0)]
        silent, partly = (silent + 1 if unreachable else 0), (partly + 1 if ended else 0)
        if unreachable:
            names = ", ".join(f"slice {s.slice} worker {s.worker}" for s in unreachable)
            runner.say(f"no answer from {names}, {silent} of {PATIENCE} times")
            if silent >= PATIENCE:
                return End("lost", f"no answer from {names} in {PATIENCE} polls; the others cannot go on without")
        if partly >= PATIENCE and not unreachable:
            words = "; ".join(s.describe() for s in ended)
            runner.say(f"ended on some machines only ({words}); stopping the others")
            workers.stop(runner, job)
            return judge(ended) or End("crashed", words)  # the culprits' codes, not those of the stopped
        runner.sleep(poll)


def prepare(runner: Runner, job: Job, minutes: float, poll: float) -> Job:
    """Waits for the machines of a job, ships the source to them, and returns the job with the number of machines."""
    seen = machines.wait_ready(runner, job, minutes, poll)
    if counts := [len(s.addresses) for s in seen if s.kind == "tpu-vm" and s.addresses]:
        job = dataclasses.replace(job, machines=counts[0])
        jobs.save(job)
    workers.ship(runner, job, source.archive_path(job.name))
    return job


def watch(runner: Runner, job: Job, restarts: int, poll: float, minutes: float) -> tuple[Job, End]:
    """Follows a job, and starts it again when it was preempted, until it is done or ``restarts`` are spent.

    A job that is not running is started first, on new machines if it has none. ``minutes`` is how long to wait for
    machines each time.
    """
    used, tail = 0, Tail()
    if runner.dry_run:
        end = follow(runner, job, poll)
        runner.say(f"after a preemption, at most {restarts} times:")
        _bring_back(runner, job, True, minutes, poll)
        return job, end
    bring = None  # whether to bring the job back, and then whether on new machines
    seen = machines.look(runner, job)
    gone = machines.lost(job, seen)
    if gone or not machines.ready(job, seen):
        bring = bool(gone)
    elif (before := judge(workers.statuses(runner, job))) and (before.again or before.how == "stopped"):
        workers.start(runner, job)
    while True:
        try:
            if bring is not None:
                tail = Tail() if bring else tail
                job = _bring_back(runner, job, bring, minutes, poll)
            end = follow(runner, job, poll, tail)
            bring = end.how == "lost" or (end.again and bool(lost(runner, job, poll)))
        except LaunchError as error:
            if error.kind not in PASSING:
                raise
            end, bring = End("lost", str(error)), True
            pause = min(60.0 * 2**used, 900.0)
            runner.sleep(pause if used < restarts else 0)
        if not end.again:
            return job, end
        if used >= restarts:
            spent = f"All {restarts} restarts are spent; watched again, the run continues from its newest checkpoint"
            return job, End(end.how, f"{end.why}. {spent}")
        used += 1
        runner.say(f"{end.why}. Restart {used} of {restarts}")


def _bring_back(runner: Runner, job: Job, new: bool, minutes: float, poll: float) -> Job:
    """Starts the job again; with ``new`` on new machines, waiting for free ones."""
    if new:
        machines.delete(runner, job)
        waited, pause = 0.0, max(poll, 60.0)
        while True:
            try:
                machines.create(runner, job)
                break
            except LaunchError as error:
                if error.kind != "capacity" or waited >= minutes * 60:
                    raise
                runner.say(f"{error}. Asking again in {pause / 60:.0f} minutes")
                runner.sleep(pause)
                waited, pause = waited + pause, min(2 * pause, 900.0)
    job = prepare(runner, job, minutes, poll)
    workers.start(runner, job)
    return job
