"""The machines of a job: asked for, waited for, looked at, deleted."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from launch import runtime
from launch.gcloud import LaunchError, Runner, refused
from launch.jobs import Job

TPUS = ["gcloud", "compute", "tpus"]
# A request costs nothing while it waits, a machine from the moment it is being made.
WAITING = ("ACCEPTED", "WAITING_FOR_RESOURCES", "CREATING", "PROVISIONING")
_FREE = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "DELETING")
_GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "SUSPENDED", "SUSPENDING", "FAILED", "DELETING", "HIDDEN")


@dataclasses.dataclass(frozen=True)
class Seen:
    """Something of a job that Google Cloud knows.

    Attributes:
      kind: "tpu-vm" or "queued-resource".
      state: as Google Cloud says it, such as READY or PREEMPTED.
      addresses: internal addresses of a TPU's machines, in the order of their numbers.
    """

    kind: str
    name: str
    state: str
    addresses: tuple[str, ...] = ()

    @property
    def costs(self) -> bool:
        return self.kind == "tpu-vm" and self.state not in _FREE

    @property
    def lost(self) -> bool:
        return self.state in _GONE


def create(runner: Runner, job: Job) -> None:
    """Asks for the machines. Raises LaunchError with the reason if Google Cloud refuses."""
    names = runtime.generation(job.where)
    flags = [*job.place, f"--accelerator-type={runtime.accelerator_type(job.where)}"]
    flags += [f"--labels=fm4m-run={job.name}"]
    flags += [f"--network={job.network}"] if job.network else []
    flags += [f"--service-account={job.service_account}"] if job.service_account else []
    flags += {"on-demand": [], "spot": ["--spot"], "reserved": ["--reserved"]}[job.capacity]
    if job.queued:
        slices = [f"--node-id={job.name}"] if job.slices == 1 else []
        slices = slices or [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
        command = [*TPUS, "queued-resources", "create", job.name, *slices, f"--runtime-version={names.image}", *flags]
        runner.check([*command, "--quiet"], f"asking for {job.describe()}")
    else:
        command = [*TPUS, "tpu-vm", "create", job.name, f"--version={names.image}", *flags]
        # gcloud waits for the machines; large slices take more than ten minutes.
        runner.check([*command, "--quiet"], f"creating {job.describe()}", timeout=3600)


def look(runner: Runner, job: Job) -> list[Seen]:
    """What Google Cloud knows of the job, nothing that does not exist. Raises LaunchError if it cannot be asked."""
    found = []
    if job.queued:
        values = _describe(runner, job, "queued-resources", job.name)
        if values:
            state = values.get("state")
            state = state.get("state") if isinstance(state, dict) else state
            found.append(Seen("queued-resource", job.name, str(state)))
    for node in job.nodes:
        if values := _describe(runner, job, "tpu-vm", node):
            addresses = tuple(str(end.get("ipAddress", "")) for end in values.get("networkEndpoints", ()))
            found.append(Seen("tpu-vm", node, str(values.get("state")), addresses))
    return found


def _describe(runner: Runner, job: Job, kind: str, name: str) -> dict[str, Any] | None:
    result = runner.run([*TPUS, kind, "describe", name, *job.place, "--format=json"], timeout=120)
    if runner.dry_run or result.kind == "missing":
        return None
    if result.code:
        raise refused(f"looking at {name}", result)
    try:
        values = json.loads(result.out)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return values
    except (ValueError, RecursionError) as error:
        raise LaunchError(f"looking at {name}: gcloud's answer is not JSON ({error}): {result.out[:200]!r}") from None


def ready(job: Job, seen: list[Seen]) -> bool:
    """Whether all machines are up."""
    return {s.name for s in seen if s.kind == "tpu-vm" and s.state == "READY"} == set(job.nodes)


def lost(job: Job, seen: list[Seen]) -> str:
    """In a few words which machines were taken away; "" if none was."""
    gone = [f"{s.name} is {s.state}" for s in seen if s.lost]
    nodes = {s.name for s in seen if s.kind == "tpu-vm"}
    waiting = any(s.state in WAITING for s in seen)
    gone += [] if waiting else [f"{node} does not exist" for node in job.nodes if node not in nodes]
    return ", ".join(gone)


def wait_ready(runner: Runner, job: Job, minutes: float, poll: float) -> list[Seen]:
    """Waits until all machines are up and returns them. Raises LaunchError if they fail or it takes longer."""
    if runner.dry_run:
        runner.say(f"every {poll:.0f} s, at most {minutes / 60:.0f} hours, until all are READY:")
        look(runner, job)
        return []
    waited, told = 0.0, ""
    while True:
        try:
            seen = look(runner, job)
        except LaunchError as error:  # the network of this machine, perhaps; nothing is wrong with the others
            if error.kind not in ("other", "timeout") or waited >= minutes * 60:
                raise
            runner.say(f"Google Cloud could not be asked, again in {poll:.0f} s: {error}")
            runner.sleep(poll)
            waited += poll
            continue
        if ready(job, seen):
            return seen
        states = ", ".join(f"{s.kind} {s.name} {s.state}" for s in seen) or "nothing there"
        if states != told:
            runner.say(f"waiting for the machines: {states}")
            told = states
        if gone := [s for s in seen if s.lost] or not seen:
            words = ", ".join(f"{s.name} is {s.state}" for s in gone) if seen else f"{job.name} does not exist"
            raise LaunchError(f"the machines did not come up: {words}", "preempted")
        if waited >= minutes * 60:
            raise LaunchError(f"the machines are not up after {minutes / 60:.1f} hours: {states}", "waiting")
        runner.sleep(poll)
        waited += poll


def delete(runner: Runner, job: Job) -> None:
    """Deletes all machines of the job and its request; those that do not exist are no error."""
    result = runner.run(job.delete_command(), timeout=3600)
    if result.code and result.kind != "missing":
        raise refused(f"deleting {job.name}", result)


def costs(runner: Runner, job: Job) -> str:
    """Sentences: what is still allocated and costs money, and the command to clean up."""
    chips = job.where.chips // job.slices
    try:
        seen = look(runner, job)
    except LaunchError as error:
        return (
            f"Whether machines are allocated could not be asked ({error}). Assume that they cost money.\n"
            f"Clean up: {job.clean_up()}"
        )
    if not seen:
        return f"Nothing of {job.name} is allocated; nothing costs money."
    parts = []
    for s in seen:
        if s.costs:
            parts.append(f"tpu-vm {s.name} ({s.state}): {chips} {job.where.name.split('-')[0]} chips, costing money")
        elif s.kind == "tpu-vm":
            parts.append(f"tpu-vm {s.name} ({s.state}): costs nothing, its name is taken")
        elif s.state in WAITING:
            parts.append(f"request {s.name} ({s.state}): free while it waits, costs from the moment it is granted")
        else:
            parts.append(f"request {s.name} ({s.state})")
    head = "Still allocated" if any(s.costs for s in seen) else "Still there"
    return f"{head}: {'; '.join(parts)}.\nClean up: {job.clean_up()}"
