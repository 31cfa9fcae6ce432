"""Reading from storage that fails for a while, as network file systems do."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger("fm4m")
T = TypeVar("T")

# Errors that may be gone when the same is tried again. Not among them: files that are missing, and permissions.
PASSING = tuple(
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "ECONNRESET", "ECONNREFUSED",
                 "ECONNABORTED", "ENOTCONN", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH")
    if hasattr(errno, name)
)  # fmt: skip
_WORDS = tuple(os.strerror(number) for number in PASSING)

# Seconds between tries, a minute in all: as long as a file server takes to fail over. Ten times that is what
# fault.timeout allows.
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# A read that takes longer is logged; a random read of a disk takes 0.01 s.
SLOW_SECONDS = 10.0


def passes(error: BaseException) -> bool:
    """Whether an error of reading may be gone the next time; those of C++ readers are known by the system's words."""
    if isinstance(error, OSError):
        return isinstance(error, TimeoutError) or error.errno in PASSING
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def patiently(read: Callable[[], T], where: Callable[[], str], sleep: Callable[[float], None] = time.sleep) -> T:
    """Calls ``read`` until it succeeds, at most ``1 + len(DELAYS)`` times; ``where`` says what is read, for the log.

    Raises what ``read`` raised, if it is not an error that passes, or has not passed.
    """
    for i, delay in enumerate((*DELAYS, None)):
        begin = time.monotonic()
        try:
            value = read()
        except (OSError, RuntimeError) as error:
            if delay is None or not passes(error):
                raise
            log.warning("%s: %s; again in %.0f s (%d of %d)", where(), error, delay, i + 1, len(DELAYS))
            sleep(delay)
            continue
        if (seconds := time.monotonic() - begin) > SLOW_SECONDS:
            log.warning("%s took %.0f s to read", where(), seconds)
        return value
    raise AssertionError("the last try returns or raises")
