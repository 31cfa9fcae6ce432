"""Image metadata as text (4M-21, appendix on modalities): chunks "v1=<type> v0=<bin>", two tokens each.

| types  | properties                                                       | bin                             |
|--------|------------------------------------------------------------------|---------------------------------|
| 0, 1   | width and height of the original image                           | floor(pixels / 32), at most 999 |
| 2..8   | size of the caption; numbers of people and instances             | the number, at most 999         |
| 9..15  | colourfulness, brightness, contrast, ..., walkability, objectness | one of 50 over a range          |
| 16     | semantic diversity                                               | the number, at most 999         |
| 17, 18 | geometric complexity, occlusion                                  | one of 50 over a range          |
| 19, 20 | watermark and aesthetic score                                    | between thresholds              |

Metadata describe the whole image: no crop or flip changes them. In training their order is drawn for every use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fm4m.modalities import unknown_name
from fm4m.transforms import values

RANGE_BINS = 50
PIXELS_PER_BIN = 32
_MOST = values.NUM_VALUES - 1


@dataclasses.dataclass(frozen=True)
class Pixels:
    """A length in pixels; bins of 32."""

    last = _MOST

    def bin(self, x: float) -> int:
        """Bin of a length."""
        return min(max(math.floor(x / PIXELS_PER_BIN), 0), _MOST)

    def value(self, n: int) -> float:
        """Middle of a bin, in pixels."""
        return PIXELS_PER_BIN * n + (PIXELS_PER_BIN - 1) / 2


@dataclasses.dataclass(frozen=True)
class Count:
    """A number of things."""

    last = _MOST

    def bin(self, x: float) -> int:
        """Bin of a number."""
        return min(max(math.floor(x), 0), _MOST)

    def value(self, n: int) -> float:
        """The number of a bin."""
        return float(n)


@dataclasses.dataclass(frozen=True)
class Range:
    """A real number; bin floor(49 (x - low) / (high - low)), so the 50th bin holds only x >= high."""

    low: float
    high: float
    last = RANGE_BINS - 1

    def bin(self, x: float) -> int:
        """Bin of a number, clipped to the range."""
        clipped = max(self.low, min(x, self.high))
        return int((clipped - self.low) / (self.high - self.low) * self.last)

    def value(self, n: int) -> float:
        """Middle of a bin."""
        return min(self.low + (n + 0.5) / self.last * (self.high - self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """A score; the bin is how many of the inner edges it reaches. The outer edges only matter to `value`."""

    edges: tuple[float, ...]

    @property
    def last(self) -> int:
        """The highest bin."""
        return len(self.edges) - 2

    def bin(self, x: float) -> int:
        """Bin of a score."""
        return sum(x >= edge for edge in self.edges[1:-1])

    def value(self, n: int) -> float:
        """Middle of a bin."""
        return (self.edges[n] + self.edges[n + 1]) / 2


# By type: the number after v1= is the position in this table, so entries may only be added at its end.
FIELDS: dict[str, Pixels | Count | Range | Thresholds] = {
    "original_width": Pixels(),
    "original_height": Pixels(),
    "caption_n_chars": Count(),
    "caption_n_words": Count(),
    "caption_n_sentences": Count(),
    "n_humans": Count(),
    "n_sam_instances": Count(),
    "n_coco_instances": Count(),
    "coco_instance_diversity": Count(),
    "colorfulness": Range(0, 150),
    "brightness": Range(0, 255),
    "contrast": Range(0, 127),
    "saturation": Range(0, 255),
    "entropy": Range(0, 10),
    "walkability": Range(0, 1),
    "objectness": Range(0, 1),
    "semantic_diversity": Count(),
    "geometric_complexity": Range(0, 0.75),
    "occlusion_score": Range(0, 0.25),
    "watermark_score": Thresholds((0.0, 0.5, 1.0)),
    "aesthetic_score": Thresholds((0.0, 4.5, 5.5, 10.0)),
}
NAMES = tuple(FIELDS)


class Entry(NamedTuple):
    """One property read from a text."""

    name: str
    bin: int

    @property
    def value(self) -> float:
        """Middle of the bin (of a count the count); writing it gives the bin again.

        The reference implementation shows other numbers: the lower edge 32 n for pixels, low + (high - low) n / 50 for
        ranges although bins are 1/49 wide, and the bin itself for scores.
        """
        return FIELDS[self.name].value(self.bin)


class Parsed(NamedTuple):
    """Entries of a text, in its order (a name may come twice), and how many stretches of it were not one."""

    entries: list[Entry]
    malformed: int


def chunks(metadata: Mapping[str, float], order: values.Order = None) -> list[str]:
    """One "v1=<type> v0=<bin>" a property; span masking hides whole chunks.

    Args:
      metadata: property to finite number; any subset of `NAMES`.
      order: of the chunks: None for that of the mapping, a permutation of it, or a generator that draws one.

    Raises:
      KeyError: an unknown property.
      ValueError: a value that is not a finite number, or an order that is no permutation.
    """
    written = []
    for name, x in metadata.items():
        if name not in FIELDS:
            raise KeyError(unknown_name(name, FIELDS, "metadata property"))
        if not isinstance(x, int | float | np.number) or not math.isfinite(x):
            raise ValueError(f"metadata property {name!r} is {x!r}, not a finite number")
        written.append(f"{values.word(1, NAMES.index(name))} {values.word(0, FIELDS[name].bin(x))}")
    return values.arrange(written, order, "metadata properties")


def to_text(metadata: Mapping[str, float], order: values.Order = None) -> str:
    """`chunks` as one text."""
    return " ".join(chunks(metadata, order))


def from_text(written: str) -> Parsed:
    """Entries of a text written by `to_text` or by a model; never raises.

    The text is cut before every v1=. A stretch is an entry if it is v1=<known type> and v0=<existing bin>.
    """
    entries, malformed = [], 0
    for stretch in values.stretches(values.split(written), _starts):
        kind, bin_ = values.numbers(stretch[:1], 1), values.numbers(stretch[1:], 0)
        if kind and bin_ and len(bin_) == 1 and kind[0] < len(NAMES) and bin_[0] <= FIELDS[NAMES[kind[0]]].last:
            entries.append(Entry(NAMES[kind[0]], bin_[0]))
        else:
            malformed += 1
    return Parsed(entries, malformed)


def _starts(word: str) -> bool:
    value = values.parse(word)
    return value is not None and value.kind == 1
