"""What a tokenizer is trained on: sources of arrays in the stored form of `fm4m.tokenizers.preprocess`, by text.

    rooms:PATTERN,...  packs of the built-in data set (paths or glob patterns), the domain's modality; for features,
                       what the built-in extractor makes of the pictures
    features:FILE.npy  feature maps [N, h, w, C] or vectors [N, C] made elsewhere, float16 or float32
    images:FOLDER      picture files below a folder, of any size, cut and resized while training

Which rows a step sees, and every crop, are functions of (seed, step) alone: a run that continues sees what it would
have seen, on any number of processes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import glob
import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from fm4m.tokenizers import preprocess
from fm4m.tokenizers.config import VQConfig
from fm4m.transforms import crops, images

log = logging.getLogger("fm4m")

KINDS = ("rooms", "features", "images")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What pictures of a folder can be; the others are numbers, which come as .npy.
PICTURE_DOMAINS = ("rgb", "normal", "depth", "semseg", "edges", "mask")
# Batches that are read while the devices work.
_AHEAD = 2
# A folder with more broken pictures in a row than this holds something else.
_BROKEN_IN_A_ROW = 32
_FILES_HASHED = 100_000


class Source(Protocol):
    """Arrays by number.

    Attributes:
      description: JSON-able; a run refuses to continue on a source with another one.
    """

    description: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, rngs: list[np.random.Generator] | None = None) -> np.ndarray:
        """Rows of those numbers, [n, *array_shape]; with one generator a row random crops, without centred ones."""
        ...


class Rows:
    """The rows of an array, in memory or in a mapped file. They are seen as they are: no crops.

    Raises ValueError for arrays that do not fit the tokenizer, those of a file where they are read.
    """

    def __init__(self, model: VQConfig, array: np.ndarray, description: dict[str, Any]):
        self._model, self._array = model, array
        digest = hashlib.sha256(self.read(np.arange(0, len(array), len(array) // 64 + 1)).tobytes()).hexdigest()[:16]
        self.description = description | {"count": len(array), "shape": list(array.shape[1:]), "digest": digest}

    def __len__(self) -> int:
        return len(self._array)

    def read(self, indices: np.ndarray, rngs: list[np.random.Generator] | None = None) -> np.ndarray:
        rows = self._array[indices]
        rows = rows.astype(np.float32) if rows.dtype == np.float16 else rows
        return preprocess.check_array(self._model, rows)


class PictureFolder:
    """Picture files below a folder, in the order of their names, each cut to a square or a random crop and resized.

    Colour pictures may be anything that `data_pipelines.prepare` can read. The others must be what they are stored as:
    normals uint8 RGB; depth 16-bit grey; class ids uint8 with void 255, which becomes 0, and the others one more; edges
    and masks uint8 grey. A picture that cannot be read is logged, and the next one in order takes its place.

    Args:
      folder: its folders are searched too.
      model: decides domain and size.
      scale: share of the area of random crops.

    Raises:
      FileNotFoundError: no folder, or no pictures in it.
      ValueError: a domain that pictures cannot be.
    """

    def __init__(self, folder: str | os.PathLike, model: VQConfig, scale: tuple[float, float] = crops.SCALE):
        if model.domain not in PICTURE_DOMAINS:
            raise ValueError(
                f"images:{folder} cannot train domain {model.domain!r}: pictures are {', '.join(PICTURE_DOMAINS)}"
            )
        self._folder, self._model, self._scale = pathlib.Path(folder), model, scale
        found = self._folder.rglob("*") if self._folder.is_dir() else ()
        self._files = sorted(p.relative_to(self._folder).as_posix() for p in found if p.suffix.lower() in PICTURES)
        if not self._files:
            raise FileNotFoundError(f"there are no pictures ({', '.join(PICTURES)}) in the folder {folder}")
        digest = hashlib.sha256("\n".join(self._files[:_FILES_HASHED]).encode()).hexdigest()[:16]
        self.description = {"images": model.domain, "count": len(self._files), "names": digest, "scale": list(scale)}
        self._broken: set[str] = set()
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "pictures")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: np.ndarray, rngs: list[np.random.Generator] | None = None) -> np.ndarray:
        rows = self._pool.map(self._row, indices.tolist(), rngs or [None] * len(indices))
        return np.stack(list(rows)).reshape(len(indices), *self._model.array_shape)

    def _row(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        for i in range(_BROKEN_IN_A_ROW):
            name = self._files[(index + i) % len(self)]
            try:
                picture = self._open(self._folder / name)
                size = picture.shape[:2]
                # Mirrored on the device, where all sources are.
                crop = crops.random_crop(size, rng, self._scale, flip_probability=0.0) if rng else None
                return self._cut(picture, crop or crops.center_crop(size))
            except (OSError, ValueError, SyntaxError) as error:
                if name not in self._broken:
                    log.warning("%s is left out: %s", self._folder / name, error)
                self._broken.add(name)
        raise preprocess.ArrayError(
            f"{_BROKEN_IN_A_ROW} pictures in a row of {self._folder} cannot be read, up to {name}; are these pictures "
            f"of domain {self._model.domain!r}?"
        )

    def _open(self, path: pathlib.Path) -> np.ndarray:
        if self._model.domain == "rgb":
            from data_pipelines.prepare.images import decode_image

            return decode_image(path.read_bytes(), str(path))[0]
        from PIL import Image

        picture = np.asarray(Image.open(path))
        return picture.astype(np.uint16) if picture.dtype == np.int32 else picture  # 16-bit grey, in older Pillows

    def _cut(self, picture: np.ndarray, crop: crops.Crop) -> np.ndarray:
        domain, size = self._model.domain, self._model.image_size
        if domain in ("edges", "mask"):
            return images.crop_resize(picture, crop, size, "bilinear" if domain == "edges" else "nearest")
        if domain == "semseg":
            return images.semseg(picture, crop, size).astype(np.uint8)
        return {"rgb": images.rgb, "normal": images.normal, "depth": images.depth}[domain](picture, crop, size)


def open_source(text: str, model: VQConfig, key: str, scale: tuple[float, float] = crops.SCALE) -> Source:
    """The source that a configuration names.

    Args:
      text: see the module's description.
      model: decides domain and size.
      key: the configuration key, for messages.
      scale: share of the area of random crops, for pictures of a folder.

    Raises:
      ValueError: an unknown kind, or arrays that do not fit the tokenizer.
      FileNotFoundError: nothing there.
    """
    kind, colon, place = text.partition(":")
    if not colon or kind not in KINDS or not place:
        raise ValueError(f"{key} = {text!r}: expected {', '.join(f'{k}:PATH' for k in KINDS)}")
    if kind == "images":
        return PictureFolder(place, model, scale)
    array = _map_npy(place) if kind == "features" else _read_rooms(place, model.domain)
    return Rows(model, array, {kind: model.domain})


def labels(text: str) -> dict[str, Any]:
    """num_classes, class_names and palette of the class ids of a source, as fields of VQConfig; {} if it says none."""
    kind, _, place = text.partition(":")
    if kind != "rooms":
        return {}
    pack = _packs(place)[0]
    return {"num_classes": len(pack.classes), "class_names": pack.classes, "palette": pack.palette}


def shape_of(text: str, domain: str) -> dict[str, Any]:
    """image_size and channels of what a file of features holds, as fields of VQConfig; {} for other sources."""
    kind, _, place = text.partition(":")
    if kind != "features":
        return {}
    shape = _map_npy(place).shape
    return {"channels": shape[-1]} | ({"image_size": shape[1:3]} if len(shape) == 4 else {})


def _paths(patterns: str) -> list[str]:
    """Files of comma-separated patterns; one that matches nothing stands for itself, so that opening it says so."""
    return [path for pattern in patterns.split(",") for path in sorted(glob.glob(pattern)) or [pattern]]


def _packs(patterns: str) -> list[Any]:
    from data_pipelines.rooms import pack

    return [pack.RoomsPack(path) for path in _paths(patterns)]


def _read_rooms(pattern: str, domain: str) -> np.ndarray:
    if domain == "features":
        from data_pipelines.features import load_features

        return np.concatenate([load_features(path) for path in _paths(pattern)]).astype(np.float32)
    packs = _packs(pattern)
    if domain not in ("rgb", "depth", "normal", "semseg"):
        raise ValueError(f"rooms:{pattern} has no modality for domain {domain!r}")
    return np.stack([pack[i][domain] for pack in packs for i in range(len(pack))])


def _map_npy(path: str) -> np.ndarray:
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no features file {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy array, or only part of one: {error}") from None
    if array.ndim not in (2, 4) or array.dtype not in (np.float16, np.float32) or not len(array):
        raise ValueError(f"{path}: {array.dtype} {array.shape}, expected float16 or float32 [N, h, w, C] or [N, C]")
    return array


# ---- batches


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def rows_of_step(seed: int, step: int, count: int, batch: int) -> np.ndarray:
    """Which rows step ``step`` (from 0) sees: every pass over the source is shuffled anew, its rest left out."""
    epoch, position = divmod(step, count // batch)
    return _order(seed, epoch, count)[position * batch : (position + 1) * batch]


def batches(
    source: Source, *, seed: int, first: int, last: int, batch: int, shard: int = 0, shards: int = 1,
    random_crops: bool = False,
) -> Iterator[np.ndarray]:
    """This process's rows of the batches of steps ``first`` .. ``last`` - 1, read ahead by a thread.

    Raises ValueError if the source has fewer rows than a batch.
    """
    if len(source) < batch:
        raise ValueError(f"{len(source)} arrays are fewer than train.global_batch = {batch}")
    own = slice(shard * (batch // shards), (shard + 1) * (batch // shards))

    def read(step: int) -> np.ndarray:
        indices = rows_of_step(seed, step, len(source), batch)[own]
        rows = range(batch)[own]
        rngs = [np.random.default_rng([seed, step, row, 1]) for row in rows] if random_crops else None
        return source.read(indices, rngs)

    with concurrent.futures.ThreadPoolExecutor(1, "batches") as pool:
        waiting: collections.deque = collections.deque()
        try:
            for step in range(first, last):
                waiting.append(pool.submit(read, step))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
