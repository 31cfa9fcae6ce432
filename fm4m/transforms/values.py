"""The words v0=0..v3=999 that carry numbers in 4M's texts, and the bins behind them (4M, appendix on modalities)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from fm4m.tokenizers import text

NUM_KINDS = len(text.VALUE_NAMES)
NUM_VALUES = text.NUM_VALUES
# A codebook of 1024 entries does not fit into 1000 words: its lower half is written with v0, its upper half with v1.
NUM_CODES = 1024
_HALF = NUM_CODES // 2

_VALUE = re.compile(r"v([0-3])=(0|[1-9][0-9]{0,2})")
_CONTROL = re.compile(r"\[(?:PAD|UNK|SOS|EOS|S_\d+)\]")

T = TypeVar("T")
# How to arrange n things: as they are, by a permutation of range(n), or by one drawn now.
Order = Sequence[int] | np.ndarray | np.random.Generator | None


class Value(NamedTuple):
    """A word vK=N: kind K in 0..3, number N in 0..999."""

    kind: int
    number: int


def word(kind: int, number: int) -> str:
    """The word of a kind in 0..3 and an integer in 0..999.

    Raises:
      ValueError: no word of the vocabulary stands for them.
    """
    if not 0 <= kind < NUM_KINDS or not 0 <= number < NUM_VALUES or number != int(number):
        raise ValueError(
            f"there is no word v{kind}={number}: kinds are 0..{NUM_KINDS - 1}, numbers are integers in "
            f"0..{NUM_VALUES - 1}; bring the value into range first"
        )
    return f"v{kind}={int(number)}"


def words(kind: int, numbers: Iterable[int]) -> list[str]:
    """`word` for several numbers of one kind."""
    return [word(kind, number) for number in numbers]


def corners(numbers: Iterable[int]) -> list[str]:
    """The four words of a box: v0=xmin v1=ymin v2=xmax v3=ymax."""
    return [word(kind, number) for kind, number in zip(range(NUM_KINDS), numbers, strict=True)]


def parse(written: str) -> Value | None:
    """The value of one word, None for any other word. Inverse of `word`."""
    match = _VALUE.fullmatch(written)
    return Value(int(match[1]), int(match[2])) if match else None


def is_control(written: str) -> bool:
    """Whether a text holds [PAD], [UNK], [SOS], [EOS] or a sentinel."""
    return _CONTROL.search(written) is not None


def split(written: str) -> list[str]:
    """Words of a text between its spaces, without control tokens."""
    return _CONTROL.sub(" ", written).split()


def stretches(written: Iterable[str], starts: Callable[[str], bool]) -> list[list[str]]:
    """Words cut before every one that starts something; no stretch is empty."""
    found: list[list[str]] = []
    for w in written:
        if not found or starts(w):
            found.append([])
        found[-1].append(w)
    return found


def numbers(written: Sequence[str], kind: int) -> list[int] | None:
    """The numbers of words that are all values of one kind, else None. Inverse of `words`."""
    found = [parse(w) for w in written]
    return [v.number for v in found] if all(v is not None and v.kind == kind for v in found) else None


def read_corners(written: Sequence[str]) -> tuple[int, int, int, int] | None:
    """(xmin, ymin, xmax, ymax) of the four words of a box that is not inside out, else None. Inverse of `corners`."""
    found = [parse(w) for w in written]
    if [v and v.kind for v in found] != list(range(NUM_KINDS)):
        return None
    xmin, ymin, xmax, ymax = (v.number for v in found)
    return (xmin, ymin, xmax, ymax) if xmin <= xmax and ymin <= ymax else None


def code_words(codes: Iterable[int]) -> list[str]:
    """Codes 0..1023 as words: v0=code below 512, v1=code-512 from there on.

    Raises:
      ValueError: a code outside 0..1023.
    """
    written = []
    for code in codes:
        if not 0 <= code < NUM_CODES:
            raise ValueError(f"code {code} is outside 0..{NUM_CODES - 1}, the codebook that words can be written for")
        kind, number = divmod(code, _HALF)
        written.append(word(kind, number))
    return written


def read_codes(written: Iterable[str]) -> list[int] | None:
    """Codes of words, None if one of them is no code. Inverse of `code_words`."""
    found = [parse(w) for w in written]
    if not all(v is not None and v.kind < 2 and v.number < _HALF for v in found):
        return None
    return [v.kind * _HALF + v.number for v in found]


@dataclasses.dataclass(frozen=True)
class Bins:
    """round(slope x + offset), ties to even, as in the reference implementation; `what` is what messages call x.

    Attributes:
      slope, offset: of the line from values to bins.
      last: highest bin; the lowest is 0.
    """

    slope: float
    offset: float
    last: int = NUM_VALUES - 1
    what: str = "value"

    def bin(self, x: float, clip: bool = True) -> int:
        """Bin of a value.

        Args:
          x: the value.
          clip: put a value outside the range into the nearest bin; the reference implementation does not always.

        Raises:
          ValueError: not a finite number, or outside the range and `clip` is False.
        """
        if not math.isfinite(x):
            raise ValueError(f"{self.what} {x} is not a finite number")
        n = round(float(self.slope * x + self.offset))
        if not clip and not 0 <= n <= self.last:
            low, high = self.value(0), self.value(self.last)
            raise ValueError(f"{self.what} {x} is outside {low:g}..{high:g}; clip it or check its unit")
        return min(max(n, 0), self.last)

    def value(self, n: int) -> float:
        """Centre of a bin; `bin(value(n)) == n`."""
        return (n - self.offset) / self.slope


def coordinate_bins(count: int = NUM_VALUES) -> Bins:
    """Bins of a coordinate relative to the image: round(x (count - 1)).

    Raises:
      ValueError: fewer than two bins, or more than there are words.
    """
    if not 2 <= count <= NUM_VALUES:
        raise ValueError(f"{count} coordinate bins: there are words for 2 to {NUM_VALUES}")
    return Bins(count - 1, 0.0, count - 1, "coordinate")


def arrange(items: Sequence[T], order: Order, what: str = "items") -> list[T]:
    """Items in their order (None), in a given one (a permutation), or in one drawn from a generator.

    Raises:
      ValueError: not a permutation of range(len(items)); `what` names the items in the message.
    """
    if order is None:
        return list(items)
    if isinstance(order, np.random.Generator):
        order = order.permutation(len(items))
    indices = [int(i) for i in order]
    if sorted(indices) != list(range(len(items))):
        raise ValueError(f"order {indices} of {len(items)} {what} is not a permutation of 0..{len(items) - 1}")
    return [items[i] for i in indices]
