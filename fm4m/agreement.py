"""What the processes of a run decide alike, though each sees its own part of the devices and of the storage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from fm4m.sharding import wait_for_all

T = TypeVar("T")

# Of an error's text, so many bytes reach the other processes.
MESSAGE_BYTES = 600
# Of a list, so many of the last numbers.
MOST_NUMBERS = 100

_events = itertools.count()


def all_or_none(action: Callable[[], T], errors: Sequence[type[Exception]]) -> T:
    """The result of ``action``; if it raised one of ``errors`` in any process, all processes raise that.

    Args:
      action: may take long, and longer in some processes than in others; without collective operations.
      errors: made from a text, the graver ones later: if processes raised different ones, all raise the gravest. An
        error counts as the first kind that it is one of.
    """
    result, raised = None, None
    try:
        result = action()
    except tuple(errors) as error:
        raised = error
    if jax.process_count() == 1:
        if raised is not None:
            raise raised
        return result
    grade = 0 if raised is None else 1 + min(i for i, kind in enumerate(errors) if isinstance(raised, kind))
    text = f"{grade}{raised}".encode()[:MESSAGE_BYTES]
    wait_for_all(f"agreement {next(_events)}")
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(MESSAGE_BYTES, b"\0"), np.uint8))
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    gravest = max(range(len(texts)), key=lambda i: texts[i][0])
    if texts[gravest][0] != "0":
        raise errors[int(texts[gravest][0]) - 1](f"process {gravest}: {texts[gravest][1:]}") from raised
    return result


def of_lead(numbers: Sequence[int]) -> list[int]:
    """The last of a list of numbers from 0 to 2^31, as process 0 has it."""
    if jax.process_count() == 1:
        return list(numbers)
    padded = np.full(MOST_NUMBERS, -1, np.int32)
    last = list(numbers)[-MOST_NUMBERS:]
    padded[: len(last)] = last
    wait_for_all(f"agreement {next(_events)}")
    return [int(x) for x in multihost_utils.broadcast_one_to_all(padded) if x >= 0]
