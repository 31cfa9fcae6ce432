"""Dense image features for the slot that CLIP features have in 4M.

4M trains on tokenised CLIP feature maps. CLIP's weights come in no package that this project may rely on, so the
built-in data set fills the slot with the last feature map of an ImageNet classifier, EfficientNet-lite0, and says so:
the modality is ``tok_imnet@64`` (ImageNet features of 64-pixel images), never ``tok_clip``.

**Real CLIP features drop in** in either of two ways; the tokenizer's training and everything behind it stay the same:

1. A class with the four members of `FeatureExtractor`. For CLIP ViT-B/16 at 224 pixels: ``name="clip-vit-b16"``,
   ``channels=768``, ``grid=(14, 14)``, and a call that returns the patch states without the class token.
2. A file made elsewhere: a ``.npy`` array float16 or float32 [N, h, w, C], row i for record i of the pack. Pass its
   path as the extractor: ``load_features("rooms_train.zip", extractor="clip_b16_train.npy")``.

The tokenizer takes grid and channels from the array. The modality's ``grid`` in the mixture must then say the new
grid, and its name should say ``clip``.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data_pipelines.features.lite0 import EfficientNetLite0
from fm4m.files import complete_file

__all__ = ["EfficientNetLite0", "FeatureExtractor", "load_features"]

# Images handed to the extractor at once; a progress bar moves this often.
_CHUNK = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@runtime_checkable
class FeatureExtractor(Protocol):
    """What turns images into feature maps.

    Attributes:
      name: unique for architecture, weights, input size and layer, because cached features are found by it. Letters,
        digits, ``-``, ``_``, ``.`` and ``@`` only.
      channels: C, the width of a feature.
      grid: (h, w), rows and columns of the map.
    """

    name: str
    channels: int
    grid: tuple[int, int]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] RGB, any B >= 1 -> float32 [B, h, w, C]; row i depends on image i only."""
        ...


def load_features(
    pack_path: str | os.PathLike[str] | Sequence[Any],
    extractor: FeatureExtractor | str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """Feature maps of all images of a pack, computed once and cached.

    The cache file is ``<extractor's name>-<hash>.npy``; the hash covers the bytes of the pack and the name. It is
    written beside its final name and renamed, so that it is whole or absent; processes that race do the work twice,
    no harm.

    Args:
      pack_path: path of a rooms pack, or the images themselves: a sequence of uint8 [H, W, 3] arrays, of records with
        the key ``"rgb"``, or one array [N, H, W, 3].
      extractor: a `FeatureExtractor`; None is `EfficientNetLite0` with the weights of the installed package. A path is
        a ``.npy`` file of features made elsewhere, [N, h, w, C] (see the module's description); nothing is computed.
      cache_dir: folder of the cache. None is ``$XDG_CACHE_HOME/fm4m/features`` (``~/.cache`` without the variable)
        for a pack, and no cache for images in memory.

    Returns:
      float16 [N, h, w, C].

    Raises:
      FileNotFoundError: the pack, the features file or the weights are missing.
      ValueError: there are no images, an image, the extractor's output or a file has the wrong shape or dtype, or a
        feature is not finite in float16, or the extractor's name cannot be part of a file name.
    """
    pack, key = _open(pack_path)
    if len(pack) == 0:
        raise ValueError(f"{_describe(pack_path)} has no images")
    if isinstance(extractor, str | os.PathLike):
        return _precomputed(pathlib.Path(extractor), len(pack))
    if extractor is None:
        extractor = EfficientNetLite0()
    if not _NAME.fullmatch(extractor.name):
        raise ValueError(
            f"extractor name {extractor.name!r}: only letters, digits and - _ . @ (it becomes a file name)"
        )
    shape = (len(pack), *extractor.grid, extractor.channels)

    if cache_dir is None and key is None:
        return _compute(pack, extractor, shape)
    folder = pathlib.Path(cache_dir) if cache_dir is not None else _default_cache()
    content = _hash_images(pack) if key is None else key
    digest = hashlib.sha256(f"{content} {extractor.name}".encode()).hexdigest()[:16]
    path = folder / f"{extractor.name}-{digest}.npy"
    if path.is_file():
        return _read_cache(path, shape)
    features = _compute(pack, extractor, shape)
    with complete_file(path) as partial:
        np.save(partial, features, allow_pickle=False)
    return features


def _default_cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fm4m" / "features"


def _describe(pack_path: Any) -> str:
    return str(pack_path) if isinstance(pack_path, str | os.PathLike) else "the sequence of images"


def _open(pack_path: Any) -> tuple[Sequence[Any], str | None]:
    """(records or images, hash of the pack's file or None)."""
    if not isinstance(pack_path, str | os.PathLike):
        return pack_path, None
    path = pathlib.Path(pack_path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such pack")
    from data_pipelines.rooms.pack import RoomsPack

    with path.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()
    return RoomsPack(path), key


def _image(pack: Sequence[Any], i: int) -> np.ndarray:
    record = pack[i]
    if isinstance(record, Mapping):
        if "rgb" not in record:
            raise ValueError(f"record {i} has no key 'rgb', only {sorted(record)}")
        record = record["rgb"]
    image = np.asarray(record)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image {i} is {image.dtype} {image.shape}, expected uint8 [H, W, 3]")
    return image


def _hash_images(pack: Sequence[Any]) -> str:
    sha = hashlib.sha256()
    for i in range(len(pack)):
        image = _image(pack, i)
        sha.update(f"{image.shape}\n".encode())
        sha.update(np.ascontiguousarray(image).tobytes())
    return sha.hexdigest()


def _compute(pack: Sequence[Any], extractor: FeatureExtractor, shape: tuple[int, ...]) -> np.ndarray:
    from tqdm import tqdm

    features = np.empty(shape, np.float16)
    with tqdm(total=len(pack), desc=extractor.name, unit="image", disable=None) as bar:
        for start in range(0, len(pack), _CHUNK):
            images = [_image(pack, i) for i in range(start, min(start + _CHUNK, len(pack)))]
            if len({image.shape for image in images}) > 1:
                raise ValueError(f"images {start}..{start + len(images) - 1} differ in size: resize them to one")
            values = np.asarray(extractor(np.stack(images)))
            if values.shape != (len(images), *shape[1:]):
                raise ValueError(
                    f"extractor {extractor.name} returned {values.shape} for {len(images)} images; its grid "
                    f"{extractor.grid} and channels {extractor.channels} promise {(len(images), *shape[1:])}"
                )
            _check_range(values, f"extractor {extractor.name}", start)
            features[start : start + len(images)] = values
            bar.update(len(images))
    return features


def _check_range(values: np.ndarray, source: str, start: int) -> None:
    """Float16 holds magnitudes to 65,504; more would silently become infinite."""
    bad = ~(np.abs(values) <= _FLOAT16_MAX)
    if bad.any():
        record = start + int(np.argmax(bad.any(axis=(1, 2, 3))))
        raise ValueError(f"{source}: features of record {record} are not finite in float16; scale them down")


def _load_npy(path: pathlib.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a .npy array, or only part of one: {error}") from error


def _read_cache(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    features = _load_npy(path)
    if features.shape != shape or features.dtype != np.float16:
        raise ValueError(
            f"{path}: cached features are {features.dtype} {features.shape}, the extractor promises float16 {shape}; "
            "delete the file, and give a changed extractor a new name"
        )
    return features


def _precomputed(path: pathlib.Path, count: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such features file")
    features = _load_npy(path)
    if features.ndim != 4 or features.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path}: {features.dtype} {features.shape}, expected float16 or float32 [N, h, w, C]")
    if len(features) != count:
        raise ValueError(f"{path}: {len(features)} feature maps for {count} images; row i must belong to record i")
    for start in range(0, count, _CHUNK):
        _check_range(features[start : start + _CHUNK], str(path), start)
    return features.astype(np.float16, copy=False)
