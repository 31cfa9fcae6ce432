"""Colour palettes: the 1 to 7 colours that stand best for a picture, by k-means in CIELAB.

The record is that of `fm4m.transforms.color_palette`: one palette of every size, the colour of most pixels first.
Nothing is random: the palette of n colours starts from that of n - 1 and the colour which that one serves worst.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.prepare.labels import Record
from data_pipelines.prepare.labels.pixels import check_images
from fm4m.transforms.color_palette import MAX_COLORS

# Colours are counted in cubes of 8 x 8 x 8 levels; a photograph fills about a thousand of 32,768.
_SHIFT = 3
_MAX_ROUNDS = 20
# sRGB to CIE XYZ relative to white D65 (IEC 61966-2-1), rows x, y, z.
_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])
_WHITE = _XYZ.sum(axis=1)


class Palette:
    """Lists of one mapping "1".."7" -> that many [red, green, blue], integers 0..255.

    A picture with fewer different colours than a palette has entries repeats its colours.

    Attributes:
      name, domain, needs: see `Labeller`.
    """

    name, domain, needs = "palette-kmeans-lab", "color_palette", ()

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> list[list[dict]]:
        """uint8 [B, H, W, 3] -> B records."""
        return [[palettes(image)] for image in check_images(images)]


def palettes(image: np.ndarray) -> dict[str, list[list[int]]]:
    """Palettes of all sizes of a picture uint8 [H, W, 3]."""
    rgb, share = _histogram(image)
    lab = to_lab(rgb)
    centres = (share @ lab)[None] / share.sum()
    found = {}
    for count in range(1, MAX_COLORS + 1):
        if count > 1:
            worst = np.argmax(share * _distances(lab, centres).min(axis=1))
            centres = np.concatenate([centres, lab[worst : worst + 1]])
        centres, nearest = _lloyd(lab, share, centres)
        weight = np.bincount(nearest, share, minlength=count)
        order = [i for i in np.argsort(-weight, kind="stable") if weight[i] > 0]
        mean = [np.bincount(nearest, share * channel, minlength=count) / np.maximum(weight, 1) for channel in rgb.T]
        colors = np.rint(np.stack(mean, axis=1)[order]).astype(int).tolist()
        found[str(count)] = [colors[i % len(colors)] for i in range(count)]
    return found


def _histogram(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean colours float64 [n, 3] of the cubes that have pixels, their numbers of pixels float64 [n])."""
    pixels = image.reshape(-1, 3)
    parts = pixels.astype(np.int32) >> _SHIFT
    bits = 8 - _SHIFT
    cube = (parts[:, 0] << 2 * bits) | (parts[:, 1] << bits) | parts[:, 2]
    count = np.bincount(cube, minlength=1 << 3 * bits)
    used = np.flatnonzero(count)
    sums = [np.bincount(cube, pixels[:, c], minlength=len(count))[used] for c in range(3)]
    return np.stack(sums, axis=1) / count[used, None], count[used].astype(np.float64)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [..., 3] in 0..255 -> CIELAB [..., 3] (white D65), float64; L is in 0..100."""
    x = np.asarray(rgb, np.float64) / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    t = linear @ _XYZ.T / _WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres) ** 2).sum(axis=2)


def _lloyd(points: np.ndarray, weights: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted k-means from given centres: (centres, nearest centre of each point)."""
    nearest = _distances(points, centres).argmin(axis=1)
    for _ in range(_MAX_ROUNDS):
        total = np.bincount(nearest, weights, minlength=len(centres))
        sums = [np.bincount(nearest, weights * column, minlength=len(centres)) for column in points.T]
        means = np.stack(sums, axis=1) / np.maximum(total, 1)[:, None]
        centres = np.where(total[:, None] > 0, means, centres)
        before, nearest = nearest, _distances(points, centres).argmin(axis=1)
        if np.array_equal(before, nearest):
            break
    return centres, nearest
