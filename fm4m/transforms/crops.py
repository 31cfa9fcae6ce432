"""Crops that all modalities of one image share: stored, drawn, or fixed (4M, section on pre-tokenised training data).

Codes are made before training, for a few crops of every image; which crops is kept in an integer array [n, 5] beside
them, a row being (top, left, height, width, flip) in pixels and row 0 the centred square. The row that a training step
draws selects codes and captions, and is applied to pixels and boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SCALE = (0.8, 1.0)
RATIO = (0.75, 1.3333)
FLIP_PROBABILITY = 0.5
# Tries of `random_crop` before it gives up on the drawn shape (as torchvision's RandomResizedCrop).
_TRIES = 10

Window = tuple[float, float, float, float]


class Crop(NamedTuple):
    """A rectangle of an image in pixels, mirrored left to right after cutting if `flip`. It may lie partly outside."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def window(self, size: tuple[int, int]) -> Window:
        """(xmin, ymin, xmax, ymax) relative to an image of `size` (height, width); the flip is not in it.

        Raises:
          ValueError: an empty crop or image.
        """
        height, width = size
        if min(height, width, self.height, self.width) <= 0:
            raise ValueError(f"{self} of an image of {height} x {width} pixels is empty")
        return (
            self.left / width,
            self.top / height,
            (self.left + self.width) / width,
            (self.top + self.height) / height,
        )


def check_window(window: Window) -> None:
    """Raises ValueError for a window without area."""
    left, top, right, bottom = window
    if not (left < right and top < bottom):
        raise ValueError(f"crop window {window} is empty; it is (xmin, ymin, xmax, ymax) relative to the image")


def relative(box: Sequence[float], window: Window) -> tuple[float, float, float, float]:
    """(xmin, ymin, xmax, ymax) of an image in the coordinates of a window of it that has an area, not clipped."""
    left, top, right, bottom = window
    width, height = right - left, bottom - top
    xmin, ymin, xmax, ymax = box
    return (xmin - left) / width, (ymin - top) / height, (xmax - left) / width, (ymax - top) / height


def clip(x: float) -> float:
    """A relative coordinate brought into 0..1."""
    return min(max(x, 0.0), 1.0)


def center_crop(size: tuple[int, int], flip: bool = False) -> Crop:
    """The largest square in the middle of an image of `size` (height, width)."""
    height, width = _check_size(size)
    edge = min(height, width)
    return Crop((height - edge) // 2, (width - edge) // 2, edge, edge, flip)


def pad_to_square(size: tuple[int, int], flip: bool = False) -> Crop:
    """The smallest square that holds an image of `size` (height, width), with the image at its top left."""
    edge = max(_check_size(size))
    return Crop(0, 0, edge, edge, flip)


def random_crop(
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    flip_probability: float = FLIP_PROBABILITY,
) -> Crop:
    """A crop with random area, shape and place (Szegedy et al. 2015, section 6).

    Area is uniform, shape uniform in its logarithm; a crop that does not fit is drawn again, and after ten tries the
    largest centred one with the nearest allowed shape is taken.

    Args:
      size: (height, width) of the image.
      rng: source of randomness.
      scale: range of the crop's share of the area.
      ratio: range of width / height.
      flip_probability: how often the crop is mirrored.
    """
    height, width = _check_size(size)
    flip = bool(rng.random() < flip_probability)
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w, flip)
    w, h = width, height
    if width / height < ratio[0]:
        h = min(round(width / ratio[0]), height)
    elif width / height > ratio[1]:
        w = min(round(height * ratio[1]), width)
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip)


def draw_settings(size: tuple[int, int], count: int, rng: np.random.Generator, **options) -> np.ndarray:
    """Crop settings of one image: row 0 the centred square, the others `random_crop` with its options.

    Returns:
      int32 [count, 5].

    Raises:
      ValueError: count below 1, or an empty image.
    """
    if count < 1:
        raise ValueError(f"{count} crops asked for; at least the centred one is needed")
    rows = [center_crop(size), *(random_crop(size, rng, **options) for _ in range(count - 1))]
    return np.array(rows, np.int32)


def stored_crop(settings, row: int = 0) -> Crop:
    """One row of crop settings. Evaluation takes row 0, training draws one with `rng.integers(len(settings))`.

    Args:
      settings: integers [n, 5]: top, left, height, width, flip.
      row: which one.

    Raises:
      ValueError: another shape, an empty crop, or a flip that is neither 0 nor 1.
      IndexError: no such row.
    """
    settings = np.asarray(settings)
    if settings.ndim != 2 or settings.shape[1] != 5 or not np.issubdtype(settings.dtype, np.integer):
        raise ValueError(
            "crop settings are integers [crops, 5] (top, left, height, width, flip), "
            f"got {settings.dtype} {list(settings.shape)}"
        )
    if not 0 <= row < len(settings):
        raise IndexError(f"crop settings have {len(settings)} rows, row {row} was asked for")
    top, left, height, width, flip = (int(x) for x in settings[row])
    if height <= 0 or width <= 0 or flip not in (0, 1):
        raise ValueError(f"crop settings, row {row}: {settings[row].tolist()} is empty or its flip is not 0 or 1")
    return Crop(top, left, height, width, bool(flip))


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height <= 0 or width <= 0:
        raise ValueError(f"an image of {height} x {width} pixels cannot be cropped")
    return height, width
