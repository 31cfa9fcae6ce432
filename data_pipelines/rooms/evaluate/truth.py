"""The rooms that generation is measured on, exactly as they were rendered, and guesses that look at no input."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import defaultdict

import numpy as np

from data_pipelines.rooms.evaluate import words
from data_pipelines.rooms.pack import RoomsPack
from fm4m.generate import scores
from fm4m.transforms.boxes import Box

# A class must have this many boxes in the training pack for its typical box to be guessed.
MIN_BOXES = 5


@dataclasses.dataclass(frozen=True)
class Rooms:
    """N samples of a pack.

    Attributes:
      rgb, depth, normal, semseg: as `RoomsPack` gives them, stacked: uint8 [N, H, W, 3], float32 metres [N, H, W],
        uint8 [N, H, W, 3], uint8 [N, H, W]; H and W are 64 in the shipped packs.
      boxes, captions, scenes: lists of N; two samples of one scene are two views of a room.
      pack, index: where they come from: the pack, and the N numbers in it.
    """

    rgb: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    semseg: np.ndarray
    boxes: list[list[Box]]
    captions: list[str]
    scenes: list[str]
    pack: RoomsPack
    index: list[int]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the semantic classes."""
        return self.pack.classes

    def __len__(self) -> int:
        return len(self.rgb)

    def other_views(self) -> list[int] | None:
        """Of each sample, the number of another one of the same scene; None if a sample has no other view."""
        others = [[j for j, s in enumerate(self.scenes) if s == own and j != i] for i, own in enumerate(self.scenes)]
        return [found[0] for found in others] if all(others) else None


def load_rooms(path: pathlib.Path, count: int) -> Rooms:
    """``count`` samples spread evenly over a pack, all of them if it has fewer.

    Raises:
      FileNotFoundError: no such pack.
      ValueError: not a pack, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} samples of {path} cannot be evaluated: expected at least 1")
    pack = RoomsPack(path)
    count = min(count, len(pack))
    index = [int(len(pack) * (i + 0.5) / count) for i in range(count)]
    samples = [pack[i] for i in index]
    arrays = [np.stack([s[name] for s in samples]) for name in ("rgb", "depth", "normal", "semseg")]
    boxes = [[Box(*b["boxes"], b["class_name"], b["score"]) for b in s["instances"]] for s in samples]
    return Rooms(*arrays, boxes, [s["caption"] for s in samples], [s["scene"] for s in samples], pack, index)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The best guess for every sample that looks at none, estimated from training rooms.

    Attributes:
      rgb, depth, normal: the mean picture; normals have unit length again.
      semseg: the most frequent class of each pixel.
      boxes: of each class the box with the median corners, its score being the share of the training pictures in which
        it hits a true box.
      caption: the one whose words have the highest mean F1 with those of all.
    """

    rgb: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    semseg: np.ndarray
    boxes: list[Box]
    caption: str


def constant_guess(train: Rooms) -> Constant:
    """What `Constant` says, from training rooms."""
    normal = train.normal.astype(np.float64).mean(0) / 127.5 - 1.0
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    counts = np.stack([(train.semseg == c).sum(0) for c in range(len(train.classes))])
    return Constant(
        rgb=np.round(train.rgb.astype(np.float64).mean(0)).astype(np.uint8),
        depth=train.depth.astype(np.float64).mean(0).astype(np.float32),
        normal=np.round((normal + 1.0) * 127.5).astype(np.uint8),
        semseg=counts.argmax(0).astype(np.uint8),
        boxes=_typical_boxes(train.boxes),
        caption=words.typical(train.captions),
    )


def _typical_boxes(images: list[list[Box]]) -> list[Box]:
    corners = defaultdict(list)
    for image in images:
        for box in image:
            corners[box.class_name].append((box.xmin, box.ymin, box.xmax, box.ymax))
    out = []
    for name, found in sorted(corners.items()):
        if len(found) < MIN_BOXES:
            continue
        box = Box(*(float(v) for v in np.median(found, axis=0)), name)
        hits = [scores.match_boxes([t for t in image if t.class_name == name], [box]).hit[0] for image in images]
        out.append(dataclasses.replace(box, score=float(np.mean(hits))))
    return out
