"""Bounding boxes as text (4M, appendix on modalities; Pix2Seq, Chen et al. 2021, section 2.1).

One box is "v0=xmin v1=ymin v2=xmax v3=ymax class name" with coordinates as bins 0..999 (round(x * 999), ties to even);
boxes stand one after another, nearest to the top left corner first. Coordinates are relative to the image, in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fm4m.tokenizers import text
from fm4m.transforms import crops, values

SCORE_THRESHOLD = 0.6
ORDERS = ("dist_to_orig", "area", "score", "random")
FULL = (0.0, 0.0, 1.0, 1.0)
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_KEYS = {
    "dist_to_orig": lambda box: box.xmin**2 + box.ymin**2,
    "area": lambda box: -box.area,
    "score": lambda box: -box.score,
}


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


def crop(boxes: Iterable[Box], window: crops.Window, min_visibility: float = 0.0) -> list[Box]:
    """Boxes in the coordinates of a crop, clipped to it; those left without area are dropped.

    Args:
      boxes: boxes relative to the full image.
      window: (xmin, ymin, xmax, ymax) of the crop relative to the full image; `crops.Crop.window` makes it from pixels.
      min_visibility: also drop boxes of whose area less than this share is left.

    Raises:
      ValueError: an empty window.
    """
    crops.check_window(window)
    kept = []
    for box in boxes:
        corners = crops.relative((box.xmin, box.ymin, box.xmax, box.ymax), window)
        moved = dataclasses.replace(box, **dict(zip(_CORNERS, corners)))
        clipped = dataclasses.replace(box, **dict(zip(_CORNERS, map(crops.clip, corners))))
        if clipped.area > 0 and clipped.area >= min_visibility * moved.area:
            kept.append(clipped)
    return kept


def flip(boxes: Iterable[Box]) -> list[Box]:
    """Boxes of the image mirrored left to right."""
    return [dataclasses.replace(box, xmin=1.0 - box.xmax, xmax=1.0 - box.xmin) for box in boxes]


def sort(boxes: Iterable[Box], order: str = "dist_to_orig", random: values.Order = None) -> list[Box]:
    """Boxes in an order; equal ones keep theirs.

    Args:
      boxes: any boxes.
      order: "dist_to_orig": xmin^2 + ymin^2, smallest first; "area" or "score": largest first; "random": as `random`
        says.
      random: a permutation of the boxes or a generator; only with the order "random", which needs it.

    Raises:
      ValueError: another order, `random` missing or not asked for, or not a permutation.
    """
    if order not in ORDERS:
        raise ValueError(f"boxes cannot be ordered by {order!r}; orders are {', '.join(ORDERS)}")
    if (order == "random") != (random is not None):
        raise ValueError("the order 'random' of boxes, and no other, takes a permutation or a generator")
    if order == "random":
        return values.arrange(list(boxes), random, "boxes")
    return sorted(boxes, key=_KEYS[order])


def to_text(
    boxes: Iterable[Box],
    threshold: float = SCORE_THRESHOLD,
    window: crops.Window = FULL,
    mirrored: bool = False,
    max_boxes: int | None = None,
    order: str = "dist_to_orig",
    random: values.Order = None,
    bins: int = values.NUM_VALUES,
    min_visibility: float = 0.0,
) -> str:
    """Score filter, crop, flip, order and write, as the reference implementation does for a training sample.

    Args:
      boxes: instances relative to the full image, in any order.
      threshold: lowest score kept.
      window: crop, see `crop`; the default clips to the image.
      mirrored: flip left to right after the crop.
      max_boxes: keep at most this many, those with the highest scores; None keeps all.
      order, random: of the boxes, see `sort`; a permutation refers to the boxes that are left.
      bins: number of bins of a coordinate, 2..1000.
      min_visibility: see `crop`.

    Returns:
      The text; empty if nothing is left.

    Raises:
      ValueError: a class name that could not be read back (empty, or with a value or control token), or see `sort`.
    """
    kept = crop(filter_score(boxes, threshold), window, min_visibility)
    if max_boxes is not None and len(kept) > max_boxes:
        kept = sort(kept, "score")[:max_boxes]
    if mirrored:
        kept = flip(kept)
    scale = values.coordinate_bins(bins)
    return " ".join(_box_text(box, scale) for box in sort(kept, order, random))


def _box_text(box: Box, scale: values.Bins) -> str:
    words = box.class_name.split()
    if not words or any(values.parse(word) or values.is_control(word) for word in words):
        raise ValueError(f"class name {box.class_name!r} cannot be written into a text of boxes")
    corners = (scale.bin(x) for x in (box.xmin, box.ymin, box.xmax, box.ymax))
    return " ".join([*values.corners(corners), *words])


def from_text(written: str, bins: int = values.NUM_VALUES) -> Parsed:
    """Boxes of a text written by `to_text` (with as many bins) or by a model; never raises for any text.

    The text is cut before every v0=. A stretch is a box if it is v0, v1, v2, v3 and a class name of at least one
    word, with xmax >= xmin and ymax >= ymin; every other stretch that is not empty counts as malformed. Control tokens
    ([EOS], sentinels, ...) are ignored.
    """
    scale = values.coordinate_bins(bins)
    boxes, malformed = [], 0
    for words in values.stretches(values.split(written), _starts):
        box = _parse_box(words, scale)
        if box is None:
            malformed += 1
        else:
            boxes.append(box)
    return Parsed(boxes, malformed)


def _starts(word: str) -> bool:
    value = values.parse(word)
    return value is not None and value.kind == 0


def _parse_box(words: Sequence[str], scale: values.Bins) -> Box | None:
    corners, name = values.read_corners(words[:4]), words[4:]
    if corners is None or max(corners) > scale.last or not name or any(values.parse(word) for word in name):
        return None
    return Box(*(scale.value(n) for n in corners), " ".join(name))


def to_ids(boxes: Iterable[Box], tokenizer: text.TextTokenizer, eos: bool = True, **options) -> list[int]:
    """`to_text` with its options, then ids; 5 per box of a COCO class."""
    return tokenizer.encode(to_text(boxes, **options), eos=eos)


def from_ids(ids: Iterable[int], tokenizer: text.TextTokenizer) -> Parsed:
    """Boxes of ids up to the first [EOS]; never raises for ids of the vocabulary."""
    return from_text(tokenizer.decode(ids))
