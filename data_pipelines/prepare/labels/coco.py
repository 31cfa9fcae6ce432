"""Boxes out of COCO JSON files (cocodataset.org, "data format"): annotations by people, or results."""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.labels import Record
from data_pipelines.prepare.labels.pixels import box, check_images, check_records

MATCHES = ("stem", "file_name", "id")
MISSING = ("empty", "error")
CROWDS = ("drop", "keep")


class CocoBoxes:
    """Lists of boxes by the pictures' keys; [x, y, width, height] in pixels becomes corners relative to the picture.

    Boxes are those of the whole picture, whatever crop the images are.

    Attributes:
      name, domain, needs: see `Labeller`.
      counts: how often each of these happened: "missing" (a picture that the file does not list), "crowd" (a box
        of a crowd, dropped or kept), "outside" (a box with nothing inside the picture, dropped).
    """

    domain, needs = "det", ("key",)

    def __init__(
        self,
        path: str | os.PathLike,
        results: str | os.PathLike | None = None,
        match: str = "stem",
        missing: str = "empty",
        crowd: str = "drop",
        score: float = 1.0,
    ):
        """Reads the files.

        Args:
          path: a JSON object with "images", "categories" and "annotations".
          results: a JSON list of {"image_id", "category_id", "bbox", "score"} that replaces the annotations.
          match: what a picture's key is compared with: "stem", the file name without folders and last suffix;
            "file_name", as it stands in the file; "id", the number of the image (leading zeros do not matter).
          missing: what a picture gets that the file does not list: "empty", no boxes, or "error", no label: `Unusable`
            with the reason "detections". A listed picture without annotations has no boxes.
          crowd: "drop" or "keep" boxes around crowds ("iscrowd").
          score: of boxes that have none.

        Raises:
          FileNotFoundError: a file is not there.
          ValueError: not COCO's layout, an unknown option, two images with the same name, or an annotation of an
            image or category that the file does not define.
        """
        for what, value, known in (("match", match, MATCHES), ("missing", missing, MISSING), ("crowd", crowd, CROWDS)):
            if value not in known:
                raise ValueError(f"{what} is {value!r}; it is one of {', '.join(known)}")
        self.path = pathlib.Path(path)
        self.name = f"coco-{self.path.stem}" + (f"-{pathlib.Path(results).stem}" if results else "")
        self.counts: collections.Counter[str] = collections.Counter()
        self._match, self._missing = match, missing
        data = _read_json(self.path)
        parts = ("images", "categories") if results else ("images", "categories", "annotations")
        if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in parts):
            raise ValueError(f"{self.path}: not a COCO file: expected an object with the lists {', '.join(parts)}")
        source, annotations = self.path, data.get("annotations")
        if results:
            source, annotations = pathlib.Path(results), _read_json(pathlib.Path(results))
            if not isinstance(annotations, list):
                raise ValueError(f"{source}: not COCO results: expected a list of detections")
        self._boxes = self._collect(data, annotations, source, crowd, score)

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> list[list[dict]]:
        """Records with "key" -> B lists of {"boxes", "class_name", "score"}, in the file's order.

        Raises:
          Unusable: a picture is missing and the option `missing` is "error".
        """
        images = check_images(images)
        return [self._of(str(record["key"])) for record in check_records(records, len(images), self.needs, self.name)]

    def _of(self, key: str) -> list[dict]:
        found = self._boxes.get(self._name(key))
        if found is None:
            self.counts["missing"] += 1
            if self._missing == "error":
                raise Unusable("detections", f"{self.path}: no image has the {self._match} of picture {key!r}")
            return []
        return [dict(instance) for instance in found]

    def _name(self, name: str) -> str:
        if self._match == "file_name":
            return name
        stem = name.rpartition("/")[2]
        if "." in stem.lstrip("."):
            stem = stem.rpartition(".")[0]
        return (stem.lstrip("0") or "0") if self._match == "id" and stem.isdecimal() else stem

    def _collect(
        self, data: Mapping[str, Any], annotations: Sequence[Mapping], source: pathlib.Path, crowd: str, score: float
    ) -> dict[str, list[dict]]:
        try:
            categories = {c["id"]: str(c["name"]) for c in data["categories"]}
            images = {i["id"]: i for i in data["images"]}
            by_id = self._match == "id"
            names = {i: self._name(str(i if by_id else image["file_name"])) for i, image in images.items()}
            sizes = {i: (float(image["width"]), float(image["height"])) for i, image in images.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: an image or category lacks {error}, or it is no number") from error
        if any(not min(size) > 0 for size in sizes.values()):
            raise ValueError(f"{self.path}: an image has no size; boxes cannot be made relative to it")
        twice = [name for name, n in collections.Counter(names.values()).items() if n > 1]
        if twice or len(images) < len(data["images"]):
            raise ValueError(
                f"{self.path}: {len(twice) or 'some'} images share a {self._match}"
                + (f", {twice[0]!r} for one; use match='file_name' or 'id'" if twice else "")
            )
        boxes: dict[str, list[dict]] = {name: [] for name in names.values()}
        for n, annotation in enumerate(annotations):
            try:
                image, category = annotation["image_id"], categories[annotation["category_id"]]
                x, y, w, h = map(float, annotation["bbox"])
                (width, height), confidence = sizes[image], float(annotation.get("score", score))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{source}: annotation {n} needs the image_id and category_id of an image and a category of "
                    f"{self.path.name} and a bbox of four numbers: {error!r}"
                ) from error
            if annotation.get("iscrowd"):
                self.counts["crowd"] += 1
                if crowd == "drop":
                    continue
            instance = box((x / width, y / height, (x + w) / width, (y + h) / height), category, confidence)
            if instance is None:
                self.counts["outside"] += 1
            else:
                boxes[names[image]].append(instance)
        return boxes


def _read_json(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of detections")
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON, or only part of it: {error}") from error
