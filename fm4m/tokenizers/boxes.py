"""Bounding boxes as text (4M, appendix on modalities; Pix2Seq, Chen et al. 2021, section 2.1).

One box is "v0=xmin v1=ymin v2=xmax v3=ymax class name" with coordinates as bins 0..999 (round(x * 999), ties to even);
boxes stand one after another, nearest to the top left corner first. Coordinates are relative to the image, in [0, 1].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fm4m.tokenizers import text

BINS = text.NUM_VALUES - 1
SCORE_THRESHOLD = 0.6
_VALUE = re.compile(r"v([0-3])=(\d{1,3})")
_CONTROL = re.compile(r"\[(?:PAD|UNK|SOS|EOS|S_\d+)\]")


@dataclasses.dataclass(frozen=True)
class Box:
    """One detected instance; coordinates relative to the image, x to the right, y down; score in [0, 1]."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float
    class_name: str
    score: float = 1.0

    @property
    def area(self) -> float:
        """Share of the image covered by the box, 0 for an empty or inverted one."""
        return max(self.xmax - self.xmin, 0.0) * max(self.ymax - self.ymin, 0.0)


class Parsed(NamedTuple):
    """Boxes of a text, in its order, and how many stretches of it were not a box."""

    boxes: list[Box]
    malformed: int


def filter_score(boxes: Iterable[Box], threshold: float = SCORE_THRESHOLD) -> list[Box]:
    """Boxes with score >= threshold (0.6 in the reference implementation)."""
    return [box for box in boxes if box.score >= threshold]


def crop(boxes: Iterable[Box], window: tuple[float, float, float, float]) -> list[Box]:
    """Boxes in the coordinates of a crop, clipped to it; those left without area are dropped.

    Args:
      boxes: boxes relative to the full image.
      window: (xmin, ymin, xmax, ymax) of the crop relative to the full image.

    Raises:
      ValueError: an empty window.
    """
    left, top, right, bottom = window
    width, height = right - left, bottom - top
    if width <= 0 or height <= 0:
        raise ValueError(f"crop window {window} is empty; it is (xmin, ymin, xmax, ymax) relative to the image")

    def clip(x: float) -> float:
        return min(max(x, 0.0), 1.0)

    moved = (
        dataclasses.replace(
            box,
            xmin=clip((box.xmin - left) / width), ymin=clip((box.ymin - top) / height),
            xmax=clip((box.xmax - left) / width), ymax=clip((box.ymax - top) / height),
        )
        for box in boxes
    )
    return [box for box in moved if box.area > 0]


def flip(boxes: Iterable[Box]) -> list[Box]:
    """Boxes of the image mirrored left to right."""
    return [dataclasses.replace(box, xmin=1.0 - box.xmax, xmax=1.0 - box.xmin) for box in boxes]


def sort(boxes: Iterable[Box]) -> list[Box]:
    """Boxes by xmin^2 + ymin^2, smallest first; equal ones keep their order."""
    return sorted(boxes, key=lambda box: box.xmin**2 + box.ymin**2)


def to_text(
    boxes: Iterable[Box],
    threshold: float = SCORE_THRESHOLD,
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    mirrored: bool = False,
    max_boxes: int | None = None,
) -> str:
    """Score filter, crop, flip, order and write, as the reference implementation does for a training sample.

    Args:
      boxes: instances relative to the full image, in any order.
      threshold: lowest score kept.
      window: crop, see `crop`; the default clips to the image.
      mirrored: flip left to right after the crop.
      max_boxes: keep at most this many, those with the highest scores; None keeps all.

    Returns:
      The text; empty if nothing is left.

    Raises:
      ValueError: a class name that could not be read back (empty, or with a value or control token).
    """
    kept = crop(filter_score(boxes, threshold), window)
    if max_boxes is not None:
        kept = sorted(kept, key=lambda box: -box.score)[:max_boxes]
    if mirrored:
        kept = flip(kept)
    return " ".join(_box_text(box) for box in sort(kept))


def _box_text(box: Box) -> str:
    words = box.class_name.split()
    if not words or any(_VALUE.fullmatch(word) or _CONTROL.search(word) for word in words):
        raise ValueError(f"class name {box.class_name!r} cannot be written into a text of boxes")
    corners = (box.xmin, box.ymin, box.xmax, box.ymax)
    return " ".join([*(f"v{k}={round(x * BINS)}" for k, x in enumerate(corners)), *words])


def from_text(written: str) -> Parsed:
    """Boxes of a text written by `to_text` or by a model; never raises.

    The text is cut before every v0=. A stretch is a box if it is v0, v1, v2, v3 and a class name of at least one
    word, with xmax >= xmin and ymax >= ymin; every other stretch that is not empty counts as malformed. Control tokens
    ([EOS], sentinels, ...) are ignored.
    """
    stretches: list[list[str]] = [[]]
    for word in _CONTROL.sub(" ", written).split():
        value = _VALUE.fullmatch(word)
        if value and value[1] == "0":
            stretches.append([])
        stretches[-1].append(word)
    boxes, malformed = [], 0
    for words in filter(None, stretches):
        box = _parse_box(words)
        if box is None:
            malformed += 1
        else:
            boxes.append(box)
    return Parsed(boxes, malformed)


def _parse_box(words: Sequence[str]) -> Box | None:
    values, name = [_VALUE.fullmatch(word) for word in words[:4]], words[4:]
    if [value and value[1] for value in values] != ["0", "1", "2", "3"]:
        return None
    if not name or any(_VALUE.fullmatch(word) for word in name):
        return None
    xmin, ymin, xmax, ymax = (int(value[2]) / BINS for value in values)
    return Box(xmin, ymin, xmax, ymax, " ".join(name)) if xmin <= xmax and ymin <= ymax else None


def to_ids(boxes: Iterable[Box], tokenizer: text.TextTokenizer, eos: bool = True, **options) -> list[int]:
    """`to_text` with its options, then ids; 5 per box of a COCO class."""
    return tokenizer.encode(to_text(boxes, **options), eos=eos)


def from_ids(ids: Iterable[int], tokenizer: text.TextTokenizer) -> Parsed:
    """Boxes of ids up to the first [EOS]; never raises for ids of the vocabulary."""
    return from_text(tokenizer.decode(ids))
