"""Any TFDS image data set as a source, through ``tfds.data_source``: random access, no tf.data, nothing downloaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.prepare import arrays, captions, images
from data_pipelines.prepare.errors import Problem, Unusable
from data_pipelines.prepare.sources import Item, describe


class TfdsImageSource:
    """Samples of a prepared TFDS data set, decoded here so that a damaged picture costs itself only.

    A feature is named by its path: ``image``, ``captions/text``. Keys are ``<name>/<split>/<index>`` or, with ``key``,
    the value of a feature.

    Args:
      name: TFDS name, with version where the run is to be repeatable.
      split: TFDS split, slices allowed (``train[:90%]``). data_dir: folder of the prepared sets; default TFDS's own.
      image: feature with the picture.
      caption: feature with a text or several; None if there is none.
      label: a ClassLabel feature whose name becomes the caption, put into ``label_caption`` (``a photo of {}``).
      boxes: a sequence feature with ``bbox`` and ``label`` (ClassLabel or text): becomes ``det``.
      others: our field -> feature of an exact label, such as ``{"semseg": "segmentation_mask"}``; depth in metres or,
        if integer, in steps of ``depth_unit``.
      key: a text or integer feature whose values are unique.
      encoding_fallback: as of `FolderSource`. max_pixels: as `images.decode_image`.

    Raises:
      FileNotFoundError: the set is not prepared. ValueError: not stored as ArrayRecord, or a feature it does not have.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        data_dir: str | os.PathLike | None = None,
        image: str = "image",
        caption: str | None = None,
        label: str | None = None,
        label_caption: str = "{}",
        boxes: str | None = None,
        others: Mapping[str, str] | None = None,
        key: str | None = None,
        depth_unit: float = 0.001,
        encoding_fallback: str | None = None,
        max_pixels: int = images.MAX_PIXELS,
    ):
        captions.check_fallback(encoding_fallback)
        images.check_max_pixels(max_pixels)
        if caption and label:
            raise ValueError(f"TFDS {name!r}: captions come from the feature {caption!r} or from {label!r}, not both")
        if "{}" not in label_caption:
            raise ValueError(f"label_caption is {label_caption!r}: expected a text with {{}} where the name goes")
        self._image, self._caption, self._label, self._boxes = image, caption, label, boxes
        self._others, self._key, self._unit = dict(others or {}), key, depth_unit
        self._label_caption, self._fallback, self._max_pixels = label_caption, encoding_fallback, max_pixels
        self._place = name, split, None if data_dir is None else os.fspath(data_dir)
        self._open()
        self.problems: list[Problem] = []
        self.fields = None
        self._rows: list[int] = list(range(len(self._samples)))
        self.keys: list[str] = [f"{self._info.name}/{split}/{i:08d}" for i in self._rows]
        if key:
            self._name_by_feature(key)

    def _open(self) -> None:
        self._owner = os.getpid()
        name, split, data_dir = self._place
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            raise FileNotFoundError(
                f"TFDS data set {name!r} is not in {builder.data_dir}: prepare it with "
                f"`tfds build {name} --file_format=array_record`"
            )
        self._info = builder.info
        features = builder.info.features
        for role, path in self._features().items():
            if _feature(features, path) is None:
                raise ValueError(f"TFDS {name!r} has no feature {path!r} (for {role}); its features are {features}")
        classes = _feature(features, self._label) if self._label else None
        if self._label and not isinstance(classes, tfds.features.ClassLabel):
            raise ValueError(f"TFDS {name!r}: the feature {self._label!r} is no ClassLabel; give it as caption=")
        self._class_names = classes.names if classes else []
        self._box_names: list[str] = []
        if self._boxes:
            inner = _feature(features, f"{self._boxes}/label")
            self._box_names = inner.names if isinstance(inner, tfds.features.ClassLabel) else []
        pictures = [p for p in (self._image, *self._others.values()) if _is_image(_feature(features, p))]
        if self._image not in pictures:
            raise ValueError(f"TFDS {name!r}: the feature {self._image!r} is no picture; its features are {features}")
        decoders: dict[str, Any] = {}
        for path in pictures:
            _set(decoders, path, tfds.decode.SkipDecoding())
        try:
            self._samples = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"TFDS data set {name!r} in {builder.data_dir} has no random access ({error}): prepare it with "
                "--file_format=array_record"
            ) from error

    def _features(self) -> dict[str, str]:
        named = {"image": self._image, "caption": self._caption, "label": self._label, "key": self._key}
        if self._boxes:
            named |= {"boxes": f"{self._boxes}/bbox", "names of boxes": f"{self._boxes}/label"}
        return {role: path for role, path in {**named, **self._others}.items() if path}

    def _name_by_feature(self, key: str) -> None:
        keys: dict[str, int] = {}
        for i in self._rows:
            try:
                value = _value(self._samples[i], key)
                text = captions.decode_text(value, f"sample {i}")[0] if isinstance(value, bytes) else str(value)
            except Exception as error:  # a damaged record
                self.problems.append(Problem(self.keys[i], "corrupt", f"{self.keys[i]}: cannot be read ({error})."))
                continue
            if text in keys:
                sentence = f"{self.keys[i]}: its key {text!r} is that of sample {keys[text]} already; left out."
                self.problems.append(Problem(self.keys[i], "duplicate_key", sentence))
            else:
                keys[text] = i
        self.keys, self._rows = list(keys), list(keys.values())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_samples", "_info")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, index: int) -> Item:
        """A sample. Raises Unusable if its record or its picture cannot be used."""
        key = self.keys[index]
        if self._owner != os.getpid():  # a forked process must not share the place in the files
            self._open()
        try:
            sample = self._samples[self._rows[index]]
            picture = _value(sample, self._image)
        except Exception as error:  # TFDS and its record reader raise various types
            raise Unusable("corrupt", f"{key}: the record cannot be read ({str(error)[:200]})") from error
        suffix = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg"}
        name = key + next((s for magic, s in suffix.items() if picture.startswith(magic)), "")
        rgb, notes = images.decode_image(picture, name, max_pixels=self._max_pixels)
        notes = tuple(note for note in notes if not note.startswith("wrong_extension"))  # records have no names
        fields: dict[str, Any] = {"rgb": rgb}
        failures: dict[str, Unusable] = {}
        wanted = {"caption": self._read_caption, "det": self._read_boxes}
        wanted = {f: w for f, w in wanted.items() if (f == "det" and self._boxes) or (f == "caption" and self._texts)}
        wanted |= dict.fromkeys(self._others, self._read_other)
        for field, read in wanted.items():
            try:
                fields[field], more = read(sample, field, key)
                notes += more
            except Unusable as error:
                failures[field] = error
        return Item(key, fields, notes, failures)

    @property
    def _texts(self) -> bool:
        return bool(self._caption or self._label)

    def _read_caption(self, sample: dict, field: str, key: str) -> tuple[list[str], tuple[str, ...]]:
        if self._label:
            number = int(_value(sample, self._label))
            if not 0 <= number < len(self._class_names):  # -1 where a test split hides its labels
                raise Unusable("caption_missing", f"{key}: the label is {number}, which is no class")
            text = self._class_names[number].replace("_", " ")
            return captions.clean([self._label_caption.replace("{}", text)], key)
        values = np.atleast_1d(np.asarray(_value(sample, self._caption), object)).tolist()
        texts, notes = [], ()
        for value in values:
            value = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
            text, more = captions.decode_text(value, key, fallback=self._fallback)
            texts.append(text)
            notes += more
        if not texts:
            raise Unusable("caption_missing", f"{key}: the sample has no caption")
        texts, more = captions.clean(texts, key)
        return texts, tuple(dict.fromkeys(notes + more))

    def _read_boxes(self, sample: dict, field: str, key: str) -> tuple[list[dict], tuple[str, ...]]:
        boxes, labels = _value(sample, f"{self._boxes}/bbox"), _value(sample, f"{self._boxes}/label")
        found = []
        for (ymin, xmin, ymax, xmax), label in zip(np.asarray(boxes).reshape(-1, 4).tolist(), labels):
            if isinstance(label, bytes):
                name = label.decode("utf-8", "replace")
            else:
                name = self._box_names[int(label)] if 0 <= int(label) < len(self._box_names) else str(label)
            found.append({"boxes": [xmin, ymin, xmax, ymax], "class_name": name, "score": 1.0})
        return arrays.detections(found, key), ()

    def _read_other(self, sample: dict, field: str, key: str) -> tuple[Any, tuple[str, ...]]:
        value = _value(sample, self._others[field])
        if isinstance(value, bytes):
            value = images.decode_label(value, key, max_pixels=self._max_pixels)
        value = np.asarray(value)
        if value.ndim == 3 and value.shape[2] == 1:
            value = value[..., 0]
        return (arrays.depth(value, key, self._unit) if field == "depth" else value), ()

    def describe(self) -> dict[str, Any]:
        """As `sources.Source.describe`."""
        options = {
            "name": self._info.full_name,
            "split": self._place[1],
            "features": self._features(),
            "label_caption": self._label_caption,
            "encoding_fallback": self._fallback,
            "max_pixels": self._max_pixels,
        }
        size = sum(split.num_bytes for split in self._info.splits.values())
        return describe("tfds", options, self.keys, self.problems, bytes=size)


def _feature(features: Any, path: str) -> Any:
    """The feature at a path, through sequences; None if there is none."""
    for part in path.split("/"):
        while isinstance(features, tfds.features.Sequence):
            features = features.feature
        if not isinstance(features, Mapping | tfds.features.FeaturesDict) or part not in features:
            return None
        features = features[part]
    return features


def _is_image(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image)


def _set(tree: dict, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _value(sample: Any, path: str) -> Any:
    """The value of a feature. Sequences of dicts come as a dict of arrays or as a list of dicts."""
    for part in path.split("/"):
        sample = [each[part] for each in sample] if isinstance(sample, list | tuple) else sample[part]
    return sample
