"""Colour palettes as text (4M-21, appendix on modalities): "v1=n" and three words v0=red v0=green v0=blue a colour.

A record holds one palette of every size from 1 to 7; training draws the size. 1 + 3 n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fm4m.transforms import values

MAX_COLORS = 7
_CHANNEL = values.Bins(1.0, 0.0, 255, "colour channel")

Color = tuple[float, float, float]


class Parsed(NamedTuple):
    """Palettes of a text, in its order, and how many stretches of it were not a palette."""

    palettes: list[list[tuple[int, int, int]]]
    malformed: int


def choose(record: Sequence[Mapping[str, Sequence[Color]]], count: int | np.random.Generator) -> list[Color]:
    """A palette of a record.

    Args:
      record: a list whose first entry maps "1".."7" to that many colours (red, green, blue) in 0..255.
      count: number of colours, or a generator that draws it uniformly from 1..7.

    Raises:
      ValueError: a count outside 1..7, or a record without a palette of that many colours.
    """
    if isinstance(count, np.random.Generator):
        count = int(count.integers(1, MAX_COLORS + 1))
    _check_count(count)
    colors = record[0].get(str(count)) if record and isinstance(record[0], Mapping) else None
    if colors is None or len(colors) != count:
        raise ValueError(
            f'no palette of {count} colours: a colour palette is a list whose first entry maps "1".."{MAX_COLORS}" '
            f"to as many [red, green, blue]; found {colors!r:.80}"
        )
    return [tuple(color) for color in colors]


def to_text(colors: Sequence[Color]) -> str:
    """The palette of 1 to 7 colours with channels in 0..255, which are rounded.

    Raises:
      ValueError: another number of colours, a colour without three channels, a channel out of range.
    """
    _check_count(len(colors))
    written = [values.word(1, len(colors))]
    for color in colors:
        if len(color) != 3:
            raise ValueError(f"colour {color!r} does not have three channels")
        written += values.words(0, (_CHANNEL.bin(channel, clip=False) for channel in color))
    return " ".join(written)


def from_text(written: str) -> Parsed:
    """Palettes of a text written by `to_text` or by a model; never raises.

    The text is cut before every v1=. A stretch is a palette if it is v1=n with n in 1..7 and 3 n words v0=0..255.
    """
    palettes, malformed = [], 0
    for stretch in values.stretches(values.split(written), _starts):
        first, channels = values.parse(stretch[0]), values.numbers(stretch[1:], 0)
        fits = first is not None and first.kind == 1 and channels is not None and 0 < len(channels) == 3 * first.number
        if fits and first.number <= MAX_COLORS and max(channels) <= _CHANNEL.last:
            palettes.append(list(zip(channels[::3], channels[1::3], channels[2::3])))
        else:
            malformed += 1
    return Parsed(palettes, malformed)


def _starts(word: str) -> bool:
    value = values.parse(word)
    return value is not None and value.kind == 1


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_COLORS:
        raise ValueError(f"a palette of {count} colours; 1 to {MAX_COLORS} can be written")
