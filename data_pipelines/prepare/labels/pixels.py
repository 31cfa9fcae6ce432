"""What the labellers share: checks of a batch, pictures brought to a network's input, maps and boxes brought back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.prepare.labels import Record

FILTERS = ("nearest", "bilinear", "bicubic")
# Grey of the border that a letterbox adds; the value most detectors were trained with.
_BORDER = 114


def check_images(images: np.ndarray) -> np.ndarray:
    """The batch as an array.

    Raises:
      ValueError: anything but uint8 [B, H, W, 3] with B, H, W >= 1.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 3], not empty")
    return images


def check_records(records: Sequence[Record] | None, count: int, needs: Sequence[str], name: str) -> Sequence[Record]:
    """One record a picture; empty ones if none were given and none are needed.

    Raises:
      ValueError: another number of records, or an entry of `needs` is missing.
    """
    if records is None and not needs:
        return [{}] * count
    if records is None or len(records) != count:
        found = "none" if records is None else str(len(records))
        raise ValueError(f"labeller {name} needs one record for each of {count} pictures, got {found}")
    for i, record in enumerate(records):
        for entry in needs:
            if entry not in record:
                has = ", ".join(map(str, record)) or "nothing"
                raise ValueError(f"labeller {name} needs {entry!r} of every picture; record {i} has {has}")
    return records


def pad_batch(images: np.ndarray, batch_size: int) -> np.ndarray:
    """Black pictures added up to the next power of two or `batch_size`, so that few sizes of batches are compiled."""
    size = min(1 << (len(images) - 1).bit_length(), batch_size)
    return np.pad(images, [(0, size - len(images)), (0, 0), (0, 0), (0, 0)])


class Placed(NamedTuple):
    """Where a picture lies in a network's input: its rectangle there, in input pixels."""

    top: int
    left: int
    height: int
    width: int


def fit(images: np.ndarray, size: tuple[int, int], letterbox: bool, resample: str) -> tuple[np.ndarray, Placed]:
    """Pictures resized to a network's input with Pillow, which averages over source pixels when it shrinks.

    Args:
      images: uint8 [B, H, W, 3].
      size: (height, width) of the input.
      letterbox: keep the aspect and add grey at both sides; False stretches.
      resample: "nearest", "bilinear" or "bicubic".

    Returns:
      uint8 [B, height, width, 3], and where the pictures lie in it.
    """
    height, width = images.shape[1:3]
    placed = Placed(0, 0, *size)
    if letterbox:
        scale = min(size[0] / height, size[1] / width)
        inner = max(round(height * scale), 1), max(round(width * scale), 1)
        placed = Placed((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2, *inner)
    if (placed.height, placed.width) != (height, width):
        images = resize(images, (placed.height, placed.width), resample)
    if placed == (0, 0, *size):
        return images, placed
    boxed = np.full((len(images), *size, 3), _BORDER, np.uint8)
    boxed[:, placed.top : placed.top + placed.height, placed.left : placed.left + placed.width] = images
    return boxed, placed


def resize(maps: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """Maps [B, h, w] or [B, h, w, C], uint8 or float32, resized to (height, width) channel by channel; same dtype.

    Raises:
      ValueError: another dtype or filter.
    """
    from PIL import Image

    if maps.dtype not in (np.uint8, np.float32) or maps.ndim not in (3, 4) or resample not in FILTERS:
        raise ValueError(f"cannot resize {maps.dtype} {list(maps.shape)} with the filter {resample!r}")
    if maps.shape[1:3] == tuple(size):
        return maps
    mode = "L" if maps.dtype == np.uint8 else "F"
    filter_ = Image.Resampling[resample.upper()]
    if mode == "L" and maps.ndim == 4 and maps.shape[3] == 3:
        return np.stack([np.asarray(Image.fromarray(m).resize((size[1], size[0]), filter_)) for m in maps])
    planes = np.moveaxis(maps, 3, 1).reshape(-1, *maps.shape[1:3]) if maps.ndim == 4 else maps
    planes = [np.ascontiguousarray(plane) for plane in planes]
    resized = np.stack([np.asarray(Image.fromarray(p, mode).resize((size[1], size[0]), filter_)) for p in planes])
    return np.moveaxis(resized.reshape(len(maps), -1, *size), 1, 3) if maps.ndim == 4 else resized


def unfit(maps: np.ndarray, placed: Placed, of: tuple[int, int], size: tuple[int, int], resample: str) -> np.ndarray:
    """Maps of a network's input as maps of the pictures: the border cut off, then resized.

    Args:
      maps: [B, h, w] or [B, h, w, C]; h and w may be a fraction of the input's.
      placed: from `fit`.
      of: (height, width) of the input.
      size: (height, width) of the pictures.
      resample: filter.
    """
    rows, columns = maps.shape[1] / of[0], maps.shape[2] / of[1]
    top, left = round(placed.top * rows), round(placed.left * columns)
    bottom, right = round((placed.top + placed.height) * rows), round((placed.left + placed.width) * columns)
    return resize(maps[:, top : max(bottom, top + 1), left : max(right, left + 1)], size, resample)


def box(corners: Sequence[float], class_name: str, score: float) -> dict | None:
    """A box of a label, clipped to the picture; None if nothing of it is left.

    Args:
      corners: xmin, ymin, xmax, ymax relative to the picture.
      class_name: what it is.
      score: confidence in [0, 1].
    """
    xmin, ymin, xmax, ymax = (min(max(float(x), 0.0), 1.0) for x in corners)
    if not (xmax > xmin and ymax > ymin):
        return None
    # Six digits: a ten-thousandth of a pixel of a picture of 100 pixels, and JSON half as long.
    return {"boxes": [round(x, 6) for x in (xmin, ymin, xmax, ymax)], "class_name": class_name, "score": float(score)}


def suppress(instances: Sequence[dict], iou: float, across: float = 1.0) -> list[dict]:
    """Boxes by falling score, without those that say again what a better one says.

    Args:
      instances: boxes of a label.
      iou: most overlap with a better box of the same class.
      across: most overlap with a better box of any class.
    """
    kept: list[dict] = []
    for instance in sorted(instances, key=lambda instance: -instance["score"]):
        limits = ((k["boxes"], iou if k["class_name"] == instance["class_name"] else across) for k in kept)
        if all(overlap(instance["boxes"], rival) <= limit for rival, limit in limits):
            kept.append(instance)
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (xmin, ymin, xmax, ymax) that have an area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
