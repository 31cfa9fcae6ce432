"""Crop, resize, flip and normalise what is stored as pictures (4M, appendix on modalities). Arrays are [H, W, (C)].

| domain | stored                        | resized | mirrored         | normalised                               |
|--------|-------------------------------|---------|------------------|------------------------------------------|
| rgb    | uint8 [H,W,3]                 | bicubic |                  | ImageNet's for the model, else [-1,1]    |
| depth  | uint16 [H,W]                  | bicubic |                  | [0,1], or standardised per image         |
| normal | uint8 [H,W,3], 127.5 (n + 1)  | bicubic | red is 255 - red | [-1,1]                                   |
| semseg | uint8 [H,W], 255 is void      | nearest |                  | class + 1, void is 0                     |
| mask   | uint8 [H,W], 255 is valid     | nearest |                  | bool                                     |

What a crop holds beyond its image is 0. Resizing is Pillow's, which averages over the source pixels when it shrinks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from fm4m.transforms.crops import Crop

# The reference implementation normalises the encoder's pixels by these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILTERS = ("nearest", "bilinear", "bicubic")
VOID = 255
DEPTH_MAX = 65535.0
# Share of the pixels left out on either side before a depth map's mean and variance are taken.
DEPTH_TRIM = 0.1
DEPTH_EPS = 1e-6

_MODES = {("uint8", 2): "L", ("uint8", 3): "RGB", ("uint16", 2): "I;16"}


def crop_resize(image: np.ndarray, crop: Crop, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """Cuts a crop out of an image, resizes it, and mirrors it if the crop says so.

    Args:
      image: uint8 [H, W] or [H, W, 3], or uint16 [H, W].
      crop: in pixels of the image.
      size: (height, width) of the result.
      resample: "nearest", "bilinear" or "bicubic".

    Returns:
      The crop, of the image's dtype.

    Raises:
      ValueError: another dtype or shape, another filter, an empty crop or size.
    """
    from PIL import Image

    image = np.asarray(image)
    if (image.dtype.name, image.ndim) not in _MODES or (image.ndim == 3 and image.shape[2] != 3) or image.size == 0:
        raise ValueError(
            f"cannot resize {image.dtype} {list(image.shape)}: expected uint8 [H, W], uint8 [H, W, 3] or uint16 [H, W]"
        )
    if resample not in FILTERS:
        raise ValueError(f"no filter {resample!r}; there are {', '.join(FILTERS)}")
    top, left, height, width, mirrored = crop
    if min(height, width, *size) <= 0:
        raise ValueError(f"{crop} resized to {size[0]} x {size[1]} pixels is empty")
    picture = Image.fromarray(np.ascontiguousarray(image)).crop((left, top, left + width, top + height))
    resized = np.asarray(picture.resize((size[1], size[0]), Image.Resampling[resample.upper()]))
    return np.ascontiguousarray(resized[:, ::-1]) if mirrored else resized


def rgb(image: np.ndarray, crop: Crop, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """A crop of a colour image: uint8 [h, w, 3]."""
    return crop_resize(_expect(image, "rgb", "uint8", 3), crop, size, resample)


def depth(image: np.ndarray, crop: Crop, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """A crop of a 16-bit depth map: float32 [h, w] in [0, 1]."""
    cut = crop_resize(_expect(image, "depth", "uint16", 2), crop, size, resample)
    return (cut / DEPTH_MAX).astype(np.float32)


def normal(image: np.ndarray, crop: Crop, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """A crop of surface normals: uint8 [h, w, 3]; mirroring also turns their x around."""
    cut = crop_resize(_expect(image, "normal", "uint8", 3), crop, size, resample)
    if crop.flip:
        cut = np.concatenate([255 - cut[..., :1], cut[..., 1:]], axis=-1)
    return cut


def semseg(image: np.ndarray, crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """A crop of class ids, raised by one so that void (255, and what is outside the image) is 0: int32 [h, w]."""
    shifted = _expect(image, "semseg", "uint8", 2) + np.uint8(1)  # 255 wraps around to 0
    return crop_resize(shifted, crop, size, "nearest").astype(np.int32)


def unshift_semseg(classes: np.ndarray) -> np.ndarray:
    """Class ids as stored, uint8 with void 255: the inverse of the shift of `semseg`.

    Raises:
      ValueError: a class outside 0..255.
    """
    classes = np.asarray(classes)
    if classes.size and not 0 <= classes.min() <= classes.max() <= VOID:
        raise ValueError(f"shifted classes are 0..255, got {classes.min()}..{classes.max()}")
    return ((classes.astype(np.int64) - 1) % 256).astype(np.uint8)


def mask(image: np.ndarray, crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """A crop of a mask of valid pixels: bool [h, w], False outside the image."""
    return crop_resize(_expect(image, "mask", "uint8", 2), crop, size, "nearest") == 255


def normalise(image: np.ndarray, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> np.ndarray:
    """uint8 [..., C] to float32 (x / 255 - mean) / std; mean = std = 0.5 gives [-1, 1], what tokenizers take."""
    return ((np.asarray(image, np.float32) / 255.0 - np.float32(mean)) / np.float32(std)).astype(np.float32)


def denormalise(image: np.ndarray, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> np.ndarray:
    """The inverse of `normalise`: float [..., C] to uint8, rounded and clipped."""
    pixels = (np.asarray(image, np.float32) * np.float32(std) + np.float32(mean)) * 255.0
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def standardise_depth(depth: Any, xp: ModuleType = np) -> Any:
    """(x - mean) / sqrt(var + 1e-6) per image, mean and unbiased var of the sorted values from 10 % to 90 %.

    Args:
      depth: float [..., h, w], images of at least three pixels.
      xp: the library of the array, NumPy or `jax.numpy`.

    Returns:
      float32 [..., h, w]; scale and shift of the map are lost.
    """
    ordered = xp.sort(depth.reshape(*depth.shape[:-2], -1), axis=-1)
    size = ordered.shape[-1]
    kept = ordered[..., int(DEPTH_TRIM * size) : int((1 - DEPTH_TRIM) * size)]
    mean, variance = kept.mean(-1)[..., None, None], kept.var(-1, ddof=1)[..., None, None]
    return ((depth - mean) / xp.sqrt(variance + DEPTH_EPS)).astype(np.float32)


def _expect(image: np.ndarray, domain: str, dtype: str, ndim: int) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != dtype or image.ndim != ndim:
        shape = "[H, W, 3]" if ndim == 3 else "[H, W]"
        raise ValueError(f"{domain}: expected {dtype} {shape}, got {image.dtype} {list(image.shape)}")
    return image
