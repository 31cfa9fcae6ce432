"""What an ONNX model's output means, and how it becomes a label: one class a kind, its fields are the options.

    open_output("depth"), open_output({"kind": "depth", "range": "picture", "invert": True})

Dense outputs may be smaller than the picture: they are resized back to it, class ids to the nearest.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from data_pipelines.prepare.labels import pixels
from fm4m.modalities import unknown_name
from fm4m.transforms.images import VOID


class Geometry(NamedTuple):
    """(height, width) of the network's input and of the pictures, where those lie in it, and the input's layout."""

    input: tuple[int, int]
    picture: tuple[int, int]
    placed: pixels.Placed
    layout: str


@dataclasses.dataclass(frozen=True)
class Output:
    """One array. A subclass says which ranks it may have and turns it into labels."""

    domain: ClassVar[str]
    ranks: ClassVar[tuple[int, ...]]

    @property
    def roles(self) -> dict[str, tuple[int, ...]]:
        """Arrays that are read, with the numbers of dimensions that each may have."""
        return {"output": self.ranks}

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> np.ndarray | list:
        """Labels of the arrays' B rows. Raises ValueError if a shape or dtype does not fit."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Dense(Output):
    """A map. `layout` is where its channels are: "NCHW" or "NHWC"; None is as in the input."""

    ranks: ClassVar[tuple[int, ...]] = (3, 4)
    layout: str | None = None

    def channels_last(self, array: np.ndarray, where: Geometry) -> np.ndarray:
        """[B, h, w, C] of [B, h, w] or of either layout."""
        if array.ndim == 3:
            return array[..., None]
        return np.moveaxis(array, 1, 3) if (self.layout or where.layout) == "NCHW" else array

    def values(self, array: np.ndarray, where: Geometry, channels: int) -> np.ndarray:
        """float32 [B, H, W, channels] of the pictures' size."""
        maps = self.channels_last(array, where).astype(np.float32)
        if maps.shape[3] != channels:
            raise ValueError(f"the map {list(array.shape)} has {maps.shape[3]} channels, expected {channels}")
        if not np.isfinite(maps).all():
            raise ValueError("the map has values that are not finite")
        return pixels.unfit(maps, where.placed, where.input, where.picture, "bilinear")


@dataclasses.dataclass(frozen=True)
class Depth(Dense):
    """`range`: (nearest, farthest) to map to 0..1, or "picture" for each picture's own; None leaves the values.

    `invert` turns disparity-like values (large is near) around: 1 - x; it needs a range.
    """

    domain: ClassVar[str] = "depth"
    range: tuple[float, float] | str | None = None
    invert: bool = False

    def __post_init__(self):
        if self.invert and self.range is None:
            raise ValueError("invert turns values in 0..1 around: give a range too")
        if isinstance(self.range, str) and self.range != "picture":
            raise ValueError(f"range is {self.range!r}; it is two numbers, 'picture' or nothing")
        _check_range(self.range)

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> np.ndarray:
        """float32 [B, H, W]."""
        depth = self.values(arrays["output"], where, 1)[..., 0]
        if self.range is None:
            return depth
        low, high = self.range if self.range != "picture" else (depth.min((1, 2)), depth.max((1, 2)))
        low, high = np.reshape(low, (-1, 1, 1)), np.reshape(high, (-1, 1, 1))
        depth = np.clip((depth - low) / np.maximum(high - low, 1e-6), 0, 1).astype(np.float32)
        return 1 - depth if self.invert else depth


@dataclasses.dataclass(frozen=True)
class Normal(Dense):
    """`range`: values of n = -1 and n = 1; `signs`: of x, y and z, for networks whose axes point elsewhere."""

    domain: ClassVar[str] = "normal"
    range: tuple[float, float] = (-1.0, 1.0)
    signs: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self):
        _check_range(self.range)
        if len(self.signs) != 3 or any(abs(s) != 1 for s in self.signs):
            raise ValueError(f"signs are {self.signs}; three of 1 and -1 are needed")

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> np.ndarray:
        """uint8 [B, H, W, 3], unit vectors as 127.5 (n + 1)."""
        low, high = self.range
        n = (2 * (self.values(arrays["output"], where, 3) - low) / (high - low) - 1) * np.array(self.signs, np.float32)
        n /= np.maximum(np.linalg.norm(n, axis=3, keepdims=True), 1e-6)
        return np.rint(127.5 * (n + 1)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class ClassMap(Dense):
    """Class ids, or scores of K classes, the highest counts. `class_map[i]` is the id of class i, 255 is void."""

    domain: ClassVar[str] = "semseg"
    class_map: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.class_map is not None and any(not 0 <= i <= VOID for i in self.class_map):
            raise ValueError(f"class_map must hold ids in 0..{VOID}")

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> np.ndarray:
        """uint8 [B, H, W]."""
        maps = self.channels_last(arrays["output"], where)
        ids = maps.argmax(axis=3) if maps.shape[3] > 1 else maps[..., 0].astype(np.int64)
        table = np.arange(VOID + 1) if self.class_map is None else np.asarray(self.class_map)
        if ids.min() < 0 or ids.max() >= len(table):
            raise ValueError(
                f"class ids are {ids.min()}..{ids.max()}, but "
                + (f"class_map has {len(table)} entries" if self.class_map is not None else f"ids end at {VOID}; "
                   "give a class_map")
            )  # fmt: skip
        return pixels.unfit(table[ids].astype(np.uint8), where.placed, where.input, where.picture, "nearest")


@dataclasses.dataclass(frozen=True)
class Edges(Dense):
    """`range`: values of no edge and a sure edge; `sigmoid` applies the logistic function first."""

    domain: ClassVar[str] = "edges"
    range: tuple[float, float] = (0.0, 1.0)
    sigmoid: bool = False

    def __post_init__(self):
        _check_range(self.range)

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> np.ndarray:
        """uint8 [B, H, W]."""
        edges = self.values(arrays["output"], where, 1)[..., 0]
        edges = 1 / (1 + np.exp(-edges)) if self.sigmoid else edges
        low, high = self.range
        return np.rint(255 * np.clip((edges - low) / (high - low), 0, 1)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Features(Dense):
    """A map, or tokens [B, n, C]; the first `drop_tokens` are dropped and the rest laid on `grid` (None: a square)."""

    domain: ClassVar[str] = "features"
    grid: tuple[int, int] | None = None
    drop_tokens: int = 0

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> np.ndarray:
        """float32 [B, h, w, C]."""
        array = arrays["output"].astype(np.float32)
        if array.ndim == 4:
            return np.ascontiguousarray(self.channels_last(array, where))
        tokens = array[:, self.drop_tokens :]
        edge = math.isqrt(tokens.shape[1])
        grid = self.grid or (edge, edge)
        if grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(
                f"{array.shape[1]} tokens less {self.drop_tokens} do not fill a grid of {grid[0]} x {grid[1]}: "
                "give grid and drop_tokens"
            )
        return tokens.reshape(len(tokens), *grid, -1)


@dataclasses.dataclass(frozen=True)
class Vector(Output):
    """One vector a picture, [B, C] or [B, C, 1, 1]; `normalize` gives it length 1."""

    domain: ClassVar[str] = "vector"
    ranks: ClassVar[tuple[int, ...]] = (2, 4)
    normalize: bool = False

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> np.ndarray:
        """float32 [B, C]."""
        vectors = arrays["output"].astype(np.float32)
        if vectors.ndim == 4 and vectors.shape[2:] != (1, 1):
            raise ValueError(f"{list(vectors.shape)} is a map, not a vector: use the kind 'features'")
        vectors = vectors.reshape(len(vectors), -1)
        if self.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


@dataclasses.dataclass(frozen=True)
class Logits(Output):
    """Scores of classes [B, K]; `softmax` makes them probabilities."""

    domain: ClassVar[str] = "logits"
    ranks: ClassVar[tuple[int, ...]] = (2,)
    softmax: bool = False

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> np.ndarray:
        """float32 [B, K]."""
        logits = arrays["output"].astype(np.float32)
        if not self.softmax:
            return logits
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Boxes(Output):
    """Arrays boxes [B, n, 4], scores [B, n] and classes [B, n]; or scores [B, n, K] without classes.

    Attributes:
      class_names: by class number, or a text file with one a line.
      format: "xyxy", "yxyx", "xywh" (corner and size) or "cxcywh" (centre and size).
      unit: "pixels" of the input, or "relative" to it.
      threshold: lowest score.
      iou: a box that overlaps a better one of its class by more goes.
      max_boxes: that are kept.
      first_class: number that the network gives to the first name.
    """

    domain: ClassVar[str] = "det"
    class_names: Sequence[str] | str | os.PathLike = ()
    format: str = "xyxy"
    unit: str = "pixels"
    threshold: float = 0.3
    iou: float = 0.5
    max_boxes: int = 100
    first_class: int = 0

    def __post_init__(self):
        if isinstance(self.class_names, str | os.PathLike):
            lines = pathlib.Path(self.class_names).read_text("utf-8").splitlines()
            object.__setattr__(self, "class_names", tuple(line.strip() for line in lines if line.strip()))
        if not self.class_names:
            raise ValueError("boxes need class_names, a list or a text file with one name a line")
        if self.format not in ("xyxy", "yxyx", "xywh", "cxcywh") or self.unit not in ("pixels", "relative"):
            raise ValueError(
                f"format is {self.format!r}, one of xyxy, yxyx, xywh, cxcywh; unit is {self.unit!r}, pixels or relative"
            )

    @property
    def roles(self) -> dict[str, tuple[int, ...]]:
        """boxes, scores, and classes, which are optional."""
        return {"boxes": (3,), "scores": (2, 3), "classes": (2,)}

    def labels(self, arrays: Mapping[str, np.ndarray], where: Geometry) -> list[list[dict]]:
        """B lists of boxes, highest score first."""
        boxes, scores, classes = arrays["boxes"].astype(np.float64), arrays["scores"], arrays.get("classes")
        if classes is None:
            if scores.ndim != 3:
                raise ValueError(f"scores {list(scores.shape)} are not of single classes: name the output of classes")
            scores, classes = scores.max(axis=2), scores.argmax(axis=2) + self.first_class
        if boxes.shape != (*scores.shape, 4) or classes.shape != scores.shape:
            found = [list(x.shape) for x in (boxes, scores, classes)]
            raise ValueError(f"boxes, scores and classes are {found}, expected [B, n, 4], [B, n] and [B, n]")
        return [self._picture(*row, where) for row in zip(self._corners(boxes, where), scores, classes)]

    def _corners(self, boxes: np.ndarray, where: Geometry) -> np.ndarray:
        a, b = boxes[..., :2], boxes[..., 2:]
        if self.format == "cxcywh":
            a, b = a - b / 2, a + b / 2
        elif self.format == "xywh":
            a, b = a, a + b
        elif self.format == "yxyx":
            a, b = a[..., ::-1], b[..., ::-1]
        corners = np.concatenate([a, b], axis=-1)
        placed, (height, width) = where.placed, where.input
        scale = (width, height, width, height) if self.unit == "relative" else (1, 1, 1, 1)
        origin = np.array([placed.left, placed.top] * 2)
        return (corners * scale - origin) / np.array([placed.width, placed.height] * 2)

    def _picture(self, corners: np.ndarray, scores: np.ndarray, classes: np.ndarray, where: Geometry) -> list[dict]:
        instances = []
        for i in np.flatnonzero(scores >= self.threshold):
            class_ = int(classes[i]) - self.first_class
            if not 0 <= class_ < len(self.class_names):
                raise ValueError(
                    f"class {int(classes[i])} has no name: {len(self.class_names)} names start at {self.first_class}"
                )
            instances.append(pixels.box(corners[i], self.class_names[class_], scores[i]))
        return pixels.suppress([i for i in instances if i is not None], self.iou)[: self.max_boxes]


KINDS: dict[str, type[Output]] = {
    "depth": Depth,
    "normal": Normal,
    "semseg": ClassMap,
    "edges": Edges,
    "features": Features,
    "vector": Vector,
    "logits": Logits,
    "boxes": Boxes,
}


def open_output(description: str | Mapping[str, Any]) -> Output:
    """The output that a kind, or a mapping with the key "kind" and options, describes.

    Raises:
      ValueError: an unknown kind or option, or a value that the kind refuses.
    """
    options = {"kind": description} if isinstance(description, str) else dict(description)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(unknown_name(str(kind), KINDS, "kind of output"))
    known = [field.name for field in dataclasses.fields(KINDS[kind])]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(option, known, f"option of the output kind {kind!r}"))
    if options.get("layout") not in (None, "NCHW", "NHWC"):
        raise ValueError(f"an output's layout is {options['layout']!r}; it is NCHW or NHWC")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return KINDS[kind](**values)


def _check_range(limits: tuple[float, float] | str | None) -> None:
    if limits is not None and not isinstance(limits, str) and (len(limits) != 2 or limits[0] == limits[1]):
        raise ValueError(f"range is {limits!r}; two different numbers are needed")
