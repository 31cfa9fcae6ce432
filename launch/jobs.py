"""What a job is, and the file that remembers it between commands."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shlex

from fm4m.aot import topology as topology_lib
from fm4m.config_file import ConfigError
from fm4m.files import complete_file
from launch.gcloud import LaunchError

# The name is that of virtual machines, so their rule holds (RFC 1035): at most 63 characters. Slices add a number, and
# JobSet further ones, to it.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._:/]*")


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run on machines of its own.

    Attributes:
      name: of the run, its machines and their labels.
      topology: slice type, ``v4-128``.
      slices: how many of them.
      project, zone: where.
      capacity: "on-demand", "spot" or "reserved".
      queued: ask by a queued resource, which waits until there are machines; several slices need one.
      commit: git commit that runs there.
      arguments: of ``python -m fm4m.train``.
      network, service_account: as gcloud takes them; "" for the project's own.
      machines: of one slice, as Google Cloud counted them; 0 before they are up.
    """

    name: str
    topology: str
    project: str
    zone: str
    slices: int = 1
    capacity: str = "on-demand"
    queued: bool = False
    commit: str = ""
    arguments: tuple[str, ...] = ()
    network: str = ""
    service_account: str = ""
    machines: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        for flag in ("project", "zone", "network", "service_account"):
            value = getattr(self, flag)
            pattern = re.compile(r"[^\s@-][^\s@]*@[\w.-]+") if flag == "service_account" else _WORD
            if not pattern.fullmatch(value) and (value or flag in ("project", "zone")):
                raise LaunchError(f"--{flag.replace('_', '-')}={value!r}: not a name that Google Cloud could have")
        if self.slices < 1:
            raise LaunchError(f"--slices={self.slices}: at least 1")
        if self.capacity not in ("on-demand", "spot", "reserved"):
            raise LaunchError(f"capacity {self.capacity!r}: one of on-demand, spot, reserved")
        self.where  # noqa: B018 raises for an unknown slice type

    @property
    def where(self) -> topology_lib.Topology:
        """The slices. Raises LaunchError for an unknown type."""
        try:
            return topology_lib.parse(self.topology, self.slices)
        except ConfigError as error:
            raise LaunchError(str(error)) from None

    @property
    def nodes(self) -> list[str]:
        """Names of the slices' TPUs; a queued resource numbers those of several slices."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def hosts_per_slice(self) -> int:
        return self.machines or self.where.hosts_per_slice

    @property
    def hosts(self) -> int:
        return self.hosts_per_slice * self.slices

    @property
    def place(self) -> list[str]:
        """The flags that every gcloud command gets."""
        return [f"--project={self.project}", f"--zone={self.zone}"]

    @property
    def workdir(self) -> str:
        """The run folder; "" if the arguments name none."""
        found = [re.split("=", a, maxsplit=1)[1] for a in self.arguments if re.match(r"--?workdir=.", a)]
        return found[-1] if found else ""

    def describe(self) -> str:
        kind, what = f"{self.capacity}, {'queued' if self.queued else 'at once'}", self.where.describe().split(": ")[0]
        return f"{self.name}: {what}, {self.where.chips} chips in {self.hosts} machines, {kind}"

    def delete_command(self) -> list[str]:
        """The gcloud command that ends all costs."""
        what = ["queued-resources", "delete", self.name, "--force"] if self.queued else ["tpu-vm", "delete", self.name]
        return ["gcloud", "compute", "tpus", *what, *self.place, "--quiet"]

    def clean_up(self) -> str:
        """How to end all costs, for messages."""
        return f"{shlex.join(self.delete_command())}"


def check_name(name: str) -> str:
    """The name of a run. Raises LaunchError if machines cannot be called so."""
    if not _NAME.fullmatch(name):
        raise LaunchError(
            f"{name!r} cannot be the name of a run: small letters, digits and dashes, a letter first, no dash last, "
            "at most 40 characters",
            "usage",
        )
    return name


def check_run(job: Job) -> None:
    """Raises LaunchError for a run that the machines could start but not finish."""
    if not any(re.match(r"--?config=.", a) for a in job.arguments):
        raise LaunchError("--config is missing; the trainer's arguments come after --: -- --config=configs/4m_l.py")
    if not job.workdir:
        raise LaunchError("--workdir is missing among the trainer's arguments; use a folder on gs://")
    if not job.workdir.startswith("gs://") and (job.hosts > 1 or job.capacity == "spot"):
        why = "each machine would write to a disk of its own" if job.hosts > 1 else "a preempted machine's disk is lost"
        raise LaunchError(f"--workdir={job.workdir}: {why}; use a folder on gs://")


# ---- the file


def folder() -> pathlib.Path:
    """Where jobs are remembered: $FM4M_JOBS, or ~/.config/fm4m/jobs."""
    return pathlib.Path(os.environ.get("FM4M_JOBS") or pathlib.Path.home() / ".config" / "fm4m" / "jobs")


def save(job: Job) -> None:
    folder().mkdir(parents=True, exist_ok=True)
    with complete_file(folder() / f"{job.name}.json") as path:
        path.write_text(json.dumps(dataclasses.asdict(job), indent=1) + "\n")


def remembered() -> list[str]:
    """Names of the jobs that `load` knows, sorted."""
    return sorted(p.stem for p in folder().glob("*.json"))


def load(name: str) -> Job:
    """The job of that name. Raises LaunchError if it is not remembered here, or its file is not what `save` writes."""
    path = folder() / f"{check_name(name)}.json"
    try:
        values = json.loads(path.read_text())
        kinds = dict.fromkeys((field.name for field in dataclasses.fields(Job)), str)
        kinds |= {"slices": int, "machines": int, "queued": bool, "arguments": list}
        for key, value in values.items():
            if type(value) is not kinds.get(key):
                raise ValueError(f"{key[:80]!r} is {str(value)[:80]!r}")
        values["arguments"] = tuple(map(str, values["arguments"]))
        return Job(**values)
    except FileNotFoundError:
        known = ", ".join(remembered()) or "none"
        raise LaunchError(
            f"no job {name} was created from this account ({folder()}); known: {known}. "
            "Machines of others are shown by: gcloud compute tpus tpu-vm list --zone=ZONE"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = " ".join(str(error)[:300].split())
        raise LaunchError(f"{path}: not a job file ({what}); delete it; the command list shows what runs") from None


def forget(name: str) -> None:
    (folder() / f"{name}.json").unlink(missing_ok=True)
