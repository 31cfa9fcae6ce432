"""Exit codes of the trainer, which launchers read to tell a job that may be resumed from one that must not be."""

from __future__ import annotations

DONE = 0
# An exception, or a loss that stopped being finite: the same again would fail again.
FAILED = 1
# A configuration, a checkpoint or data that the run cannot start from.
CANNOT_START = 2
# EX_TEMPFAIL of sysexits.h: told to stop (SIGTERM, the notice of a preemption), saved, to be continued.
PREEMPTED = 75
# A process of the run died, hung or never came; to be continued from the newest checkpoint.
HUNG = 76
# From 128 on, 128 + the signal that killed the process, as shells count.
FIRST_SIGNAL = 128
# SIGABRT: how JAX ends a process when another one of the run is gone. Never the cause, where another one has a code.
ABORTED = FIRST_SIGNAL + 6


def explain(code: int) -> str:
    """What an exit code of the trainer means, in a few words."""
    known = {
        DONE: "done",
        FAILED: "failed",
        CANNOT_START: "could not start",
        PREEMPTED: "told to stop; saved, and can be continued",
        HUNG: "a process of the run died or hung; can be continued",
        ABORTED: "killed by signal 6, as JAX does when another process of the run is gone",
    }
    if code > FIRST_SIGNAL and code not in known:
        return f"killed by signal {code - FIRST_SIGNAL}"
    return known.get(code, "ended in a way that the trainer does not use")
