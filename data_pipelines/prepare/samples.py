"""Records on their way: crops of a sample, and batches of them with what several steps share (crops, labels)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.sources import Item
from fm4m.transforms import crops, images
from fm4m.transforms.crops import Crop

VALIDATION = "validation"


def generator(*words: object) -> np.random.Generator:
    """Randomness that depends on the words only, so that no order of work and no other sample changes it."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def in_validation(key: str, share: float) -> bool:
    """Whether a sample belongs to the validation split that holds this share of all samples."""
    if not share:
        return False
    digest = hashlib.sha256(f"validation\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


@dataclasses.dataclass
class Record:
    """One crop of one sample: what becomes one record of every modality.

    Attributes:
      key: the sample's key, with ``#row`` behind it for all rows but the first.
      sample: the sample's key.
      row: of the crop settings.
      crop: in pixels of ``size``; None for a sample without a picture and without stored crops.
      size: (height, width) of the picture that the crop refers to; None without a picture.
      fields, failures: of the sample's item.
      shared: results for the whole sample, the same object for all its crops.
      done: results for this crop.
    """

    key: str
    sample: str
    row: int
    crop: Crop | None
    size: tuple[int, int] | None
    fields: Mapping[str, Any]
    failures: Mapping[str, Unusable]
    shared: dict
    done: dict = dataclasses.field(default_factory=dict)

    def field(self, name: str) -> Any:
        """A field of the sample. Raises Unusable, with the source's reason where it gave one."""
        if name in self.fields:
            return self.fields[name]
        raise self.failures.get(name) or Unusable("field_missing", f"{self.sample}: the sample has no {name!r}")

    def window(self) -> crops.Window:
        """The crop as a window of the picture, the whole of it for a sample without picture."""
        return (0.0, 0.0, 1.0, 1.0) if self.crop is None or self.size is None else self.crop.window(self.size)

    @property
    def mirrored(self) -> bool:
        return self.crop is not None and self.crop.flip

    def listed(self) -> dict:
        """What the set keeps of a record, so that modalities can be added later; the inverse of `stored`."""
        crop = None if self.crop is None else [int(x) for x in self.crop]
        size = None if self.size is None else list(self.size)
        return {"key": self.key, "sample": self.sample, "row": self.row, "crop": crop, "size": size}

    def cut(self, size: tuple[int, int]) -> np.ndarray:
        """The crop of the picture, uint8 [h, w, 3]. Raises Unusable if there is no picture."""
        if ("rgb", size) not in self.done:
            picture = self.field("rgb")
            self._check_size(picture, "rgb")
            self.done["rgb", size] = images.rgb(picture, self.crop, size)
        return self.done["rgb", size]

    def cut_map(self, name: str, size: tuple[int, int], *, nearest: bool) -> np.ndarray:
        """The crop of a map [H, W] or [H, W, 3] of the size of the picture, uint8, uint16 or float32."""
        array = np.asarray(self.field(name))
        self._check_size(array, name)
        resample = "nearest" if nearest else "bicubic"
        if array.dtype != np.float32:
            return images.crop_resize(array, self.crop, size, resample)
        from PIL import Image

        top, left, height, width, mirrored = self.crop
        cut = Image.fromarray(np.ascontiguousarray(array)).crop((left, top, left + width, top + height))
        resized = np.asarray(cut.resize((size[1], size[0]), Image.Resampling[resample.upper()]))
        return resized[:, ::-1] if mirrored else resized

    def _check_size(self, array: np.ndarray, name: str) -> None:
        if self.crop is None:
            raise Unusable("field_missing", f"{self.sample}: {name!r} cannot be cropped, for the sample has no picture")
        if self.size is not None and tuple(array.shape[:2]) != self.size:
            raise Unusable(
                "size", f"{self.sample}: {name!r} is of {array.shape[0]} x {array.shape[1]} pixels, the picture that "
                f"the crops were made for of {self.size[0]} x {self.size[1]}",
            )  # fmt: skip


def new_records(item: Item, count: int, seed: int, **options: Any) -> list[Record]:
    """The records of a sample: stored crops if it brings any (at most ``count``), else drawn ones.

    Args:
      item: the sample.
      count: crops wanted.
      seed: of the drawn crops, with the key.
      options: of `fm4m.transforms.crops.random_crop`.
    """
    size = tuple(int(n) for n in item.fields["rgb"].shape[:2]) if "rgb" in item.fields else None
    if "crop_settings" in item.fields:
        settings = np.asarray(item.fields["crop_settings"])[:count]
        rows: list[Crop | None] = [crops.stored_crop(settings, row) for row in range(len(settings))]
    elif size is not None:
        settings = crops.draw_settings(size, count, generator("crops", seed, item.key), **options)
        rows = [crops.stored_crop(settings, row) for row in range(len(settings))]
    else:
        rows = [None]
    shared: dict = {}
    return [
        Record(f"{item.key}#{row}" if row else item.key, item.key, row, crop, size, item.fields, item.failures, shared)
        for row, crop in enumerate(rows)
    ]


def stored_record(listed: Mapping, item: Item | None, why: Unusable | None, shared: dict) -> Record:
    """A record of a finished set. ``why`` says what is wrong with the sample now, where there is no item."""
    crop = None if listed["crop"] is None else Crop(*listed["crop"][:4], bool(listed["crop"][4]))
    size = None if listed["size"] is None else tuple(listed["size"])
    fields = item.fields if item else {}
    failures = item.failures if item else _Always(why)
    return Record(listed["key"], listed["sample"], listed["row"], crop, size, fields, failures, shared)


class _Always(dict):
    """Failures of a sample that cannot be read at all: the same for every field."""

    def __init__(self, why: Unusable):
        super().__init__()
        self._why = why

    def get(self, name: str, default: Any = None) -> Any:
        return self._why


class Labels:
    """Labels of records, made once for each sample or crop whatever number of steps want them."""

    def __init__(self):
        self._made: dict[str, Any] = {}

    def labeller(self, options: Mapping[str, Any]) -> Any:
        """The labeller that the options describe, made at its first use in this process."""
        from data_pipelines.prepare import labels

        name = json.dumps(options, sort_keys=True)
        if name not in self._made:
            self._made[name] = labels.make(**options)
        return self._made[name]

    def of_crops(self, options: Mapping[str, Any], records: Sequence[Record], size: tuple[int, int]) -> list:
        """Labels of the records' crops, resized to ``size`` before."""
        memo = "label", json.dumps(options, sort_keys=True), size
        todo = [record for record in records if memo not in record.done]
        if todo:
            pictures = np.stack([record.cut(size) for record in todo])
            found = self.labeller(options).label(pictures, [self._known(record) for record in todo])
            for record, label in zip(todo, found, strict=True):
                record.done[memo] = label
        return [record.done[memo] for record in records]

    def of_whole(self, options: Mapping[str, Any], record: Record) -> Any:
        """The label of the record's whole picture, one for all its crops."""
        memo = "label", json.dumps(options, sort_keys=True)
        if memo not in record.shared:
            picture = record.field("rgb")
            record.shared[memo] = self.labeller(options).label(picture[None], [self._known(record)])[0]
        return record.shared[memo]

    @staticmethod
    def _known(record: Record) -> dict:
        return {"key": record.sample, **record.fields}
