"""Runs commands, and tells why gcloud refused."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import time
from collections.abc import Callable

# Keys of a new machine reach its accounts some ten seconds after it is up; the waits add up to five minutes.
SSH_WAITS = (5, 10, 15, 30, 60, 60, 60, 60)

# What gcloud prints, in the order in which it must be looked for: an error of quota also says RESOURCE_EXHAUSTED.
_SIGNS = (
    ("quota", r"quota.{0,120}exceeded|exceeded.{0,40}quota|QUOTA_EXCEEDED|quota limit|HTTPError 429"),
    ("capacity", r"no more capacity|insufficient (?:reserved )?capacity|stockout|RESOURCE_EXHAUSTED|enough resources"),
    ("exists", r"ALREADY_EXISTS|already exists"),
    ("missing", r"NOT_FOUND|was not found"),
    ("login", r"gcloud auth login|do not currently have an active account|reauthentication"),
    ("denied", r"PERMISSION_DENIED|does not have permission|HTTPError 403|has not been used in project"),
    (
        "ssh",
        r"permission denied \(publickey|connection (?:refused|timed out|closed|reset)|no route to host|"
        r"could not ssh|kex_exchange_identification|return code \[255\]|host key verification failed",
    ),
)

MEANING = {
    "quota": "Google Cloud refused it: the project's quota is used up or zero. Ask for more on the console's page "
    "'IAM & Admin > Quotas' (service TPU API, this zone), or use another zone or type",
    "capacity": "the zone has no free machines of this type. Ask later, in another zone, or with --queued, which waits",
    "exists": "a machine or request of that name exists already; it was not touched",
    "missing": "there is no machine or request of that name there",
    "login": "gcloud is not logged in; run: gcloud auth login",
    "denied": "the account may not do that; it needs the role TPU Admin (roles/tpu.admin), and the project the TPU API",
    "ssh": "no connection by ssh to the machine",
    "timeout": "the command did not end in time",
    "other": "gcloud failed",
}


class LaunchError(Exception):
    """Something that ends a command; the message is a sentence for the user.

    Attributes:
      kind: a key of `MEANING`.
    """

    def __init__(self, message: str, kind: str = "other"):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command returned."""

    code: int
    out: str
    err: str

    @property
    def kind(self) -> str:
        """Why it failed, a key of `MEANING`; "" if it did not."""
        if self.code == 0:
            return ""
        for kind, pattern in _SIGNS:
            if re.search(pattern, self.err, re.IGNORECASE | re.DOTALL):
                return kind
        return {255: "ssh", 124: "timeout"}.get(self.code, "other")

    def last_words(self) -> str:
        """The last lines of standard error, on one line."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-500:] or f"exit code {self.code}, without a message"


class Runner:
    """Runs commands given as lists, never through a shell; with ``dry_run`` it prints them instead.

    Attributes:
      sleep: waits so many seconds; nothing waits on a dry run.
    """

    def __init__(self, dry_run: bool = False, sleep: Callable[[float], None] = time.sleep):
        self.dry_run = dry_run
        self.sleep = (lambda seconds: None) if dry_run else sleep

    def say(self, text: str) -> None:
        """A line for the user; in the transcript of a dry run a comment."""
        print(f"# {text}" if self.dry_run else text, flush=True)

    def run(self, command: list[str], timeout: float | None = 600) -> Result:
        """Runs a command and returns what it printed; a timeout is exit code 124.

        Raises LaunchError if the program is not installed.
        """
        if self.dry_run:
            print(shlex.join(command), flush=True)
            return Result(0, "", "")
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
        except FileNotFoundError:
            raise LaunchError(_no_program(command[0])) from None
        except subprocess.TimeoutExpired as error:
            words = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
            return Result(124, "", f"{words}\nno answer within {timeout:.0f} seconds")
        return Result(done.returncode, done.stdout, done.stderr)

    def check(self, command: list[str], what: str, timeout: float | None = 600) -> Result:
        """As `run`; raises LaunchError that begins with ``what`` and ends with gcloud's own words if it fails."""
        result = self.run(command, timeout)
        if result.code:
            raise refused(what, result)
        return result

    def ssh(self, command: list[str], what: str, timeout: float | None = 600, waits: tuple[float, ...] = SSH_WAITS):
        """As `check`, tried again after each of ``waits`` seconds while the connection fails."""
        for wait in waits:
            result = self.run(command, timeout)
            if result.kind != "ssh":
                break
            self.say(f"{what}: no connection yet ({result.last_words()}); again in {wait:.0f} s")
            self.sleep(wait)
        else:
            result = self.run(command, timeout)
        if result.code:
            raise refused(what, result)
        return result

    def attach(self, command: list[str]) -> int:
        """Runs a command on the user's terminal and returns its exit code."""
        if self.dry_run:
            return self.run(command).code
        try:
            return subprocess.run(command).returncode
        except FileNotFoundError:
            raise LaunchError(_no_program(command[0])) from None


def refused(what: str, result: Result) -> LaunchError:
    """The error for a command that failed."""
    kind = result.kind
    return LaunchError(f"{what}: {MEANING[kind]}. It said: {result.last_words()}", kind)


def _no_program(program: str) -> str:
    hints = {
        "gcloud": "install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install",
        "xpk": "install it: pip install xpk",
    }
    return f"{program} is not on PATH; {hints.get(program, 'install it')}"
