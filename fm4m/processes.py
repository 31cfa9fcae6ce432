"""Joins the processes of a run, and ends them: one process a machine, as JAX wants it.

The rule, in `start`: on TPUs JAX finds the processes by itself; everywhere else the three variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say what they are, and without them there is one process.
On TPUs nothing else is right in all places. The chips are numbered by libtpu, from what Google tells every machine: the
metadata server of a TPU VM, or TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and MEGASCALE_* (several slices) in a pod of GKE.
JAX numbers the processes from the same source; numbers of a launcher, such as the order in which it made the slices,
may differ, and then process 0 would not be where the others look for it. What a launcher knows for certain is how many
processes it started: JAX_NUM_PROCESSES is compared with what was found, so that a machine that is missing, or slices
that do not see each other, are an error and not several small runs that overwrite each other's files.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping

import jax

from fm4m import exit_codes
from fm4m.config_file import ConfigError

log = logging.getLogger("fm4m")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# Machines of a slice start within seconds of each other, pods of a job within the minutes that an image takes to be
# pulled.
START_SECONDS = 900
# After so many seconds without a sign of life JAX ends all other processes, by signal 6. `fm4m.watchdog` is faster (one
# to two minutes) and names the culprit; this is for when it cannot, and well above what a busy network swallows.
HEARTBEAT_SECONDS = 300


def start(start_seconds: float = START_SECONDS, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
    """Joins the processes of a run; before anything else is asked of JAX.

    Ends the process with `exit_codes.HUNG` and one sentence if the others are not there after ``start_seconds``; the
    same start may succeed later.

    Raises ConfigError for variables that are incomplete or wrong, and if JAX finds another number of processes.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    tpu = on_tpu()
    if not tpu and not given:
        return
    # Later than our own bound: JAX's ends the process by signal 6, with ten lines of a stack.
    limits = {"initialization_timeout": int(start_seconds) + 60, "heartbeat_timeout_seconds": int(heartbeat_seconds)}
    if tpu:
        _start_on_tpu(given, start_seconds, limits)
    else:
        address, number, index = parse(given)
        try:
            with _Deadline(start_seconds, address, index, number):
                jax.distributed.initialize(address, number, index, cluster_detection_method="deactivate", **limits)
        except jax.errors.JaxRuntimeError as error:  # a port in use, above all
            raise ConfigError(f"process {index} of {number} could not join the others at {address}: {error}") from error
    wanted, found = int(given.get("JAX_NUM_PROCESSES", 0)), jax.process_count()
    if wanted and wanted != found:
        raise ConfigError(
            f"{wanted} processes were started (JAX_NUM_PROCESSES), but JAX finds {found}: a machine is missing, or the "
            "slices do not know of each other (on GKE: MEGASCALE_NUM_SLICES, which Google sets for JobSets of "
            "multi-host slices)"
        )
    if found > 1 and not jax.distributed.is_initialized():
        raise ConfigError(f"JAX sees the chips of {found} machines, but could not join their processes")


def on_tpu() -> bool:
    """Whether JAX will use TPUs; where it finds chips it says so in its own configuration, before it touches them."""
    return "tpu" in (jax.config.jax_platforms or "").split(",")


def parse(given: Mapping[str, str]) -> tuple[str, int, int]:
    """Address, number of processes and number of this one, of the three variables.

    Raises ConfigError naming what is missing or wrong.
    """
    if missing := [name for name in VARIABLES if name not in given]:
        raise ConfigError(
            f"{', '.join(given)} without {', '.join(missing)}: several processes need all three (on TPUs JAX finds "
            "them by itself, but this machine's JAX finds no TPU)"
        )
    address, number, index = (given[name] for name in VARIABLES)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS={address}: must be HOST:PORT of process 0, as in 10.0.0.2:8476")
    if not number.isdecimal() or not index.isdecimal() or int(index) >= int(number):
        raise ConfigError(
            f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={number}: must be whole numbers, the first below the second"
        )
    return address, int(number), int(index)


def _start_on_tpu(given: Mapping[str, str], start_seconds: float, limits: Mapping[str, int]) -> None:
    address, number = given.get("JAX_COORDINATOR_ADDRESS", ""), given.get("JAX_NUM_PROCESSES", "0")
    if not number.isdecimal():
        raise ConfigError(f"JAX_NUM_PROCESSES={number}: must be a whole number")
    with _Deadline(start_seconds, address, None, int(number)):
        try:
            jax.distributed.initialize(**limits)
        except ValueError as error:
            # JAX's words where neither a metadata server nor GKE's variables say what the slice is: TPUs of a notebook.
            if "coordinator_address" not in str(error):
                raise
            log.info("neither Google's metadata server nor variables name other machines; this one is alone")
        except OSError as error:  # of the package requests, by which JAX asks
            raise ConfigError(f"JAX could not ask Google's metadata server which machines there are: {error}") from None


class _Deadline:
    """Ends the process in one sentence if the block takes too long."""

    def __init__(self, seconds: float, address: str, index: int | None, number: int):
        self._seconds, self._address, self._index, self._number = seconds, address, index, number
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        which = "this process" if self._index is None else f"process {self._index} of {self._number}"
        where = self._address or "the address that JAX found"
        why = "some of the other processes have not started"
        if self._address and self._index != 0 and not answers(self._address):
            why = "nothing answers there: process 0 has not started, or the network between the machines is closed"
        print(f"error: {which} ({socket.gethostname()}) waited {self._seconds:.0f} s for the others at {where}; {why}",
              file=sys.stderr, flush=True)  # fmt: skip
        os._exit(exit_codes.HUNG)


def answers(address: str, seconds: float = 5.0) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
            return True
    except OSError:
        return False


def run(program: Callable[[], int]) -> None:
    """Calls a program's main function and ends the process with the code that it returns.

    JAX's own end waits until all processes have come to theirs, five minutes if one is gone. So of several processes
    one that failed does not wait: it has told the others (`fm4m.watchdog`), and leaves.
    """
    try:
        code = program()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = exit_codes.FAILED
    if code not in (exit_codes.DONE, exit_codes.PREEMPTED) and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
