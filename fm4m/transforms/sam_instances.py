"""Instances of Segment Anything as text (4M-21, appendix on modalities).

For each query point "point v0=y v1=x", then for every instance whose outline holds the point "polygon v0=xmin v1=ymin
v2=xmax v3=ymax" in pixels and the 16 codes of its mask (v0=code below 512, v1=code-512 above), or "none" if there is no
such instance. Seven random points are drawn for every use; the orders of points and of instances are random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fm4m.transforms import values

NONE, POINT, POLYGON = "none", "point", "polygon"
NUM_POINTS = 7
NUM_CODES = 16
SIZE = (224, 224)


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    """One instance of a crop; coordinates in pixels of the resized crop.

    Attributes:
      polygon: [n, 2] outline as (x, y), closed from the last corner to the first.
      box: (xmin, ymin, xmax, ymax) in 0..999; fractions are cut off.
      codes: of its mask, 0..1023.
    """

    polygon: np.ndarray
    box: tuple[float, float, float, float]
    codes: Sequence[int]


class Found(NamedTuple):
    """An instance as a text tells it: box (xmin, ymin, xmax, ymax) in pixels, codes of the mask."""

    box: tuple[int, int, int, int]
    codes: tuple[int, ...]


class Query(NamedTuple):
    """A query point in pixels and the instances under it."""

    x: int
    y: int
    instances: list[Found]


class Parsed(NamedTuple):
    """Queries of a text, in its order, and how many stretches of it were neither a point nor an instance of one."""

    queries: list[Query]
    malformed: int


def from_arrays(polygons: Sequence, boxes: Sequence, codes: Sequence) -> list[Instance]:
    """Instances of one crop.

    Args:
      polygons: n outlines [corners, 2] (x, y).
      boxes: [n, 4] as (ymin, xmin, ymax, xmax), the order in which the reference implementation stores them.
      codes: [n, 16] integers.

    Raises:
      ValueError: lengths differ, an outline is not [corners, 2], a box has not four numbers.
    """
    if not len(polygons) == len(boxes) == len(codes):
        raise ValueError(f"SAM instances: {len(polygons)} outlines, {len(boxes)} boxes, {len(codes)} rows of codes")
    instances = []
    for polygon, box, row in zip(polygons, boxes, codes):
        polygon = np.asarray(polygon)
        if polygon.ndim != 2 or polygon.shape[1] != 2 or len(polygon) == 0:
            raise ValueError(f"a SAM instance's outline has shape {list(polygon.shape)}, expected [corners, 2]")
        ymin, xmin, ymax, xmax = (float(v) for v in box)
        instances.append(Instance(polygon, (xmin, ymin, xmax, ymax), tuple(int(c) for c in row)))
    return instances


def random_points(rng: np.random.Generator, count: int = NUM_POINTS, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Query points drawn uniformly from the pixels of a crop of `size` (height, width): int [count, 2] as (x, y)."""
    height, width = size
    return np.stack([rng.integers(width, size=count), rng.integers(height, size=count)], axis=1)


def grid_points(per_side: int = NUM_POINTS, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A regular grid of query points inside a crop of `size` (height, width).

    Returns:
      int [per_side^2, 2] as (x, y), column after column.
    """
    height, width = size
    x, y = (np.linspace(0, edge, per_side + 2)[1:-1].astype(np.int64) for edge in (width, height))
    return np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2)


def inside(polygon: np.ndarray, point: Sequence[float]) -> bool:
    """Whether a point (x, y) lies in an outline [n, 2] or on it, by the even-odd rule (Shimrat 1962)."""
    start = np.asarray(polygon, np.float64) - np.asarray(point, np.float64)
    end = np.roll(start, -1, axis=0)
    cross = start[:, 0] * end[:, 1] - start[:, 1] * end[:, 0]
    # The point is the origin now: it is on an edge if it is on the edge's line and between its ends.
    if np.any((cross == 0) & np.all(np.minimum(start, end) <= 0, axis=1) & np.all(np.maximum(start, end) >= 0, axis=1)):
        return True
    # Edges that cross the horizontal line through the point, right of the point.
    upward = end[:, 1] > start[:, 1]
    crossing = (start[:, 1] > 0) != (end[:, 1] > 0)
    return bool(np.count_nonzero(crossing & ((cross > 0) == upward)) % 2)


def under(instances: Iterable[Instance], point: Sequence[float]) -> list[Instance]:
    """The instances whose outline holds a point (x, y), in their order."""
    return [instance for instance in instances if inside(instance.polygon, point)]


def to_text(
    instances: Sequence[Instance],
    points: np.ndarray,
    point_order: values.Order = None,
    instance_order: values.Order = None,
) -> str:
    """What lies under query points, as text.

    Args:
      instances: of the crop.
      points: integers [n, 2] as (x, y); points that are equal count once.
      point_order: of the different points: None as given, a permutation, or a generator.
      instance_order: of the instances, likewise; a generator draws anew for every point.

    Raises:
      ValueError: a number without a word (a coordinate outside 0..999, a code outside 0..1023), or no permutation.
    """
    distinct = list(dict.fromkeys((int(x), int(y)) for x, y in points))
    written = []
    for x, y in values.arrange(distinct, point_order, "query points"):
        written += [POINT, values.word(0, y), values.word(1, x)]
        found = under(values.arrange(instances, instance_order, "instances"), (x, y))
        for instance in found:
            written += [POLYGON, *values.corners(int(v) for v in instance.box), *values.code_words(instance.codes)]
        if not found:
            written.append(NONE)
    return " ".join(written)


def from_text(written: str, num_codes: int = NUM_CODES) -> Parsed:
    """Queries of a text written by `to_text` or by a model; never raises.

    The text is cut before every "point" and "polygon". Malformed are a point without "v0= v1=", or with neither "none"
    nor instances behind it, an instance without a box and `num_codes` codes, and one that follows no such point.
    """
    queries: list[Query] = []
    malformed = 0
    # The query that an instance would belong to.
    current: Query | None = None
    pieces = values.stretches(values.split(written), lambda word: word in (POINT, POLYGON))
    for piece, following in zip(pieces, [*pieces[1:], [""]]):
        if piece[0] == POINT:
            current = _parse_point(piece, following[0] == POLYGON)
            if current is None:
                malformed += 1
                continue
            queries.append(current)
            continue
        found = _parse_instance(piece, num_codes)
        if found is None or current is None:
            malformed += 1
        else:
            current.instances.append(found)
    return Parsed(queries, malformed)


def _parse_point(words: Sequence[str], instances_follow: bool) -> Query | None:
    y, x, rest = values.numbers(words[1:2], 0), values.numbers(words[2:3], 1), list(words[3:])
    if not y or not x or rest != ([] if instances_follow else [NONE]):
        return None
    return Query(x[0], y[0], [])


def _parse_instance(words: Sequence[str], num_codes: int) -> Found | None:
    box, codes = values.read_corners(words[1:5]), values.read_codes(words[5:])
    if words[0] != POLYGON or box is None or codes is None or len(codes) != num_codes:
        return None
    return Found(box, tuple(codes))
