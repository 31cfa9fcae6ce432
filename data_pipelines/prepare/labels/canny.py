"""Canny's edges (Canny, 1986) in NumPy, equal pixel by pixel to OpenCV's, which the reference implementation uses.

OpenCV would be 60 MB of dependency for one function, and scikit-image's Canny is another filter (Gaussian derivatives,
thresholds relative to the picture), so that its edges do not agree with tokens made from OpenCV's.

Sobel 3 x 3 with replicated borders; length |dx| + |dy| (or the Euclidean one); a pixel is kept if no neighbour along
its gradient, whose angle is rounded to 45 degrees, is longer; kept pixels above the high threshold, and all above the
low one that touch them in a chain, are edges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.prepare.labels import Record
from data_pipelines.prepare.labels.pixels import check_images

# Binomial kernels, as OpenCV rounds its Gaussians of these sizes; the divisors are powers of 2.
_BLURS = {3: (1, 2, 1), 5: (1, 4, 6, 4, 1), 7: (2, 7, 14, 18, 14, 7, 2)}
# tan(22.5 degrees) in units of 2^-15, the fixed point that OpenCV compares with.
_TAN_22 = 13573


class Canny:
    """Edges uint8 [B, H, W], 0 or 255.

    Attributes:
      name, domain, needs: see `Labeller`.
    """

    domain, needs = "edges", ()

    def __init__(self, low: float = 100, high: float = 200, blur: int = 0, grey: bool = True, euclidean: bool = False):
        """Options, all of OpenCV's Canny.

        Args:
          low, high: thresholds of the gradient's length, 0 <= low <= high; a step from black to white has length 1020.
          blur: edge of the Gaussian applied first: 0 (none), 3, 5 or 7.
          grey: take the gradient of the luminance; False takes at each pixel the channel with the longest one.
          euclidean: sqrt(dx^2 + dy^2) instead of |dx| + |dy|.

        Raises:
          ValueError: a value out of range.
        """
        if not 0 <= low <= high:
            raise ValueError(f"Canny's thresholds are low={low}, high={high}; 0 <= low <= high is needed")
        if blur not in (0, *_BLURS):
            raise ValueError(f"Canny's blur is {blur!r}; the edge of the Gaussian is 0 (none), 3, 5 or 7")
        self.low, self.high, self.blur, self.grey, self.euclidean = low, high, blur, grey, euclidean
        flags = [word for word, on in (("colour", not grey), ("euclidean", euclidean)) if on]
        self.name = "-".join(["canny", f"{low:g}", f"{high:g}", f"blur{blur}", *flags])

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> np.ndarray:
        """uint8 [B, H, W, 3] -> uint8 [B, H, W]."""
        return np.stack([self._edges(image) for image in check_images(images)])

    def _edges(self, image: np.ndarray) -> np.ndarray:
        planes = luminance(image)[..., None] if self.grey else image
        planes = gaussian(planes, self.blur) if self.blur else planes
        p = np.pad(planes.astype(np.int32), [(1, 1), (1, 1), (0, 0)], mode="edge")
        across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
        dx = across[:-2] + 2 * across[1:-1] + across[2:]
        dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
        length = dx**2 + dy**2 if self.euclidean else np.abs(dx) + np.abs(dy)
        if length.shape[2] > 1:
            strongest = length.argmax(axis=2)[..., None]
            dx, dy, length = (np.take_along_axis(x, strongest, axis=2) for x in (dx, dy, length))
        dx, dy, length = dx[..., 0], dy[..., 0], length[..., 0]
        low, high = (t**2 if self.euclidean else np.floor(t) for t in (min(self.low, 32767), min(self.high, 32767)))
        ridge = (length > low) & _longest(dx, dy, length)
        return _connect(ridge, ridge & (length > high))


def luminance(image: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] RGB -> uint8 [...], 0.299 R + 0.587 G + 0.114 B in the fixed point of OpenCV's conversion."""
    weighted = image.astype(np.int32) @ np.array([9798, 19235, 3735], np.int32)
    return ((weighted + (1 << 14)) >> 15).astype(np.uint8)


def gaussian(planes: np.ndarray, edge: int) -> np.ndarray:
    """Blur of uint8 [H, W, C] with a Gaussian of 3, 5 or 7 pixels; borders mirrored without repeating the last row."""
    kernel = _BLURS[edge]
    mode = "reflect" if min(planes.shape[:2]) > 1 else "edge"
    total = planes.astype(np.int32)
    for axis in (0, 1):
        size = total.shape[axis]
        padded = np.pad(total, [(edge // 2,) * 2 if i == axis else (0, 0) for i in range(3)], mode=mode)
        total = sum(k * padded.take(range(i, i + size), axis) for i, k in enumerate(kernel))
    divisor = sum(kernel) ** 2
    return ((total + divisor // 2) // divisor).astype(np.uint8)


def _longest(dx: np.ndarray, dy: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bool [H, W]: no neighbour along the gradient is longer. Ties go to the pixel further right or down."""
    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    tan_22 = x * _TAN_22
    tan_67 = tan_22 + (x << 16)
    p = np.pad(length, 1)
    height, width = length.shape

    def neighbour(down: int, right: int) -> np.ndarray:
        return p[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    horizontal = (length > neighbour(0, -1)) & (length >= neighbour(0, 1))
    vertical = (length > neighbour(-1, 0)) & (length >= neighbour(1, 0))
    falling = (length > neighbour(-1, -1)) & (length > neighbour(1, 1))
    rising = (length > neighbour(-1, 1)) & (length > neighbour(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(y < tan_22, horizontal, np.where(y > tan_67, vertical, diagonal))


def _connect(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """255 at strong pixels and at weak ones reached from them over 8 neighbours."""
    width = weak.shape[1] + 2
    open_ = np.pad(weak & ~strong, 1).ravel()
    edges = np.pad(strong, 1).ravel()
    front = np.flatnonzero(edges)
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    while front.size:
        reached = (front[:, None] + steps).ravel()
        front = np.unique(reached[open_[reached]])
        edges[front], open_[front] = True, False
    return edges.reshape(-1, width)[1:-1, 1:-1].astype(np.uint8) * 255
