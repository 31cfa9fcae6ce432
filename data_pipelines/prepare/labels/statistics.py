"""Metadata of a picture that need no network (4M-21, appendix on modalities): counts and measures, as numbers.

| name                                 | from        | definition                                                   |
|--------------------------------------|-------------|--------------------------------------------------------------|
| original_width, _height              | the picture | pixels of the whole picture                                  |
| caption_n_chars, _words, _sentences  | caption     | of the first one; words between spaces; sentences up to .!?  |
| n_humans                             | boxes       | boxes of class "person" with enough score                    |
| n_coco_instances                     | boxes       | boxes with enough score                                      |
| coco_instance_diversity              | boxes       | different classes among them                                 |
| colorfulness                         | pixels      | Hasler and Suesstrunk (2003), equation 3                     |
| brightness, contrast                 | pixels      | mean and standard deviation of the luminance, in 0..255      |
| saturation                           | pixels      | mean saturation of HSV, in 0..255                            |
| entropy                              | pixels      | of the histogram of the luminance's 256 levels, in bits      |
| walkability, objectness              | class map   | share of pixels of the classes that the options name         |
| semantic_diversity                   | class map   | classes on at least 0.1 % of the pixels, void not counted    |
| geometric_complexity                 | normals     | 1 - length of the mean unit normal: 0 for one plane          |
| occlusion_score                      | depth       | share of pixels with a jump of 10 % to the right or below    |

The formulas of the pixels' properties and of the last four rows are this project's choice, made to fit the ranges of
`fm4m.transforms.metadata`. What a picture's record has no source for is left out. A record's labels must be of the
whole picture, as metadata are: no crop changes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.prepare.labels import Record, make
from data_pipelines.prepare.labels.canny import luminance
from data_pipelines.prepare.labels.pixels import check_images, check_records
from fm4m.transforms.boxes import SCORE_THRESHOLD
from fm4m.transforms.images import VOID

_PERSON = "person"
_SENTENCE = re.compile(r"[^.!?]*[^.!?\s][^.!?]*(?:[.!?]+|$)")
_SMALLEST_CLASS = 0.001
_DEPTH_STEP = 0.1


class Statistics:
    """Mappings of names of `fm4m.transforms.metadata.NAMES` to numbers.

    Looks at the records' "rgb" (for the original size), "caption", "det", "semseg", "normal" and "depth", where they
    are. Measures of pixels are of the images given.

    Attributes:
      name, domain, needs: see `Labeller`.
    """

    domain, needs = "metadata", ()

    def __init__(
        self,
        threshold: float = SCORE_THRESHOLD,
        walkable_classes: Sequence[int] = (),
        object_classes: Sequence[int] = (),
        boxes: Mapping[str, Any] | None = None,
    ):
        """Options.

        Args:
          threshold: lowest score of a box that counts.
          walkable_classes: ids of the class map for walkability; without any the property is left out.
          object_classes: the same for objectness.
          boxes: options of a labeller ("kind" and its own) that finds the boxes of pictures whose record has no "det".

        Raises:
          ValueError: a class id that a class map cannot hold, or a labeller of something else than boxes; and what
            `make` raises.
        """
        for what, ids in (("walkable_classes", walkable_classes), ("object_classes", object_classes)):
            if any(i != int(i) or not 0 <= i < VOID for i in ids):
                raise ValueError(f"{what} are {list(ids)}; class ids are integers in 0..{VOID - 1}")
        self.threshold, self.name = threshold, "statistics"
        self._detector = None if boxes is None else make(**boxes)
        if self._detector is not None:
            if self._detector.domain != "det":
                raise ValueError(f"labeller {self._detector.name} makes {self._detector.domain}, not boxes")
            self.name += f"-{self._detector.name}"
        self._shares = {"walkability": tuple(walkable_classes), "objectness": tuple(object_classes)}

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> list[dict[str, float]]:
        """uint8 [B, H, W, 3] and what is known of the pictures -> B mappings."""
        images = check_images(images)
        records = check_records(records, len(images), self.needs, self.name)
        if self._detector is not None:
            rows = [i for i, record in enumerate(records) if record.get("det") is None]
            boxes = self._detector.label(images[rows], [records[i] for i in rows]) if rows else []
            records = list(records)
            for i, found in zip(rows, boxes):
                records[i] = {**records[i], "det": found}
        return [self._one(image, record) for image, record in zip(images, records)]

    def _one(self, image: np.ndarray, record: Record) -> dict[str, float]:
        height, width = record.get("rgb", image).shape[:2]
        found: dict[str, float] = {"original_width": width, "original_height": height}
        if record.get("caption"):
            caption = record["caption"]
            found |= of_caption(caption if isinstance(caption, str) else caption[0])
        if record.get("det") is not None:
            found |= of_boxes(record["det"], self.threshold)
        found |= of_pixels(image)
        if record.get("semseg") is not None:
            found |= self._of_classes(np.asarray(record["semseg"]))
        if record.get("normal") is not None:
            found["geometric_complexity"] = geometric_complexity(record["normal"])
        if record.get("depth") is not None:
            found["occlusion_score"] = occlusion_score(record["depth"])
        return found

    def _of_classes(self, classes: np.ndarray) -> dict[str, float]:
        count = np.bincount(classes.ravel(), minlength=VOID + 1)
        share = count / classes.size
        found = {name: float(share[list(ids)].sum()) for name, ids in self._shares.items() if ids}
        return found | {"semantic_diversity": int((share[:VOID] >= _SMALLEST_CLASS).sum())}


def of_caption(caption: str) -> dict[str, int]:
    """Numbers of characters, words and sentences of a text; text after the last full stop is a sentence too."""
    return {
        "caption_n_chars": len(caption),
        "caption_n_words": len(caption.split()),
        "caption_n_sentences": len(_SENTENCE.findall(caption)),
    }


def of_boxes(instances: Sequence[Mapping], threshold: float = SCORE_THRESHOLD) -> dict[str, int]:
    """Numbers of people, instances and classes among boxes (dicts with "class_name" and "score")."""
    names = [instance["class_name"] for instance in instances if instance["score"] >= threshold]
    return {
        "n_humans": names.count(_PERSON),
        "n_coco_instances": len(names),
        "coco_instance_diversity": len(set(names)),
    }


def of_pixels(image: np.ndarray) -> dict[str, float]:
    """The measures of the pixels of a picture uint8 [H, W, 3]."""
    red, green, blue = (image[..., c].astype(np.float32) for c in range(3))
    first, second = red - green, (red + green) / 2 - blue
    spread, mean = np.hypot(first.std(), second.std()), np.hypot(first.mean(), second.mean())
    grey = luminance(image)
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    most, least = image.max(axis=2).astype(np.float32), image.min(axis=2).astype(np.float32)
    return {
        "colorfulness": float(spread + 0.3 * mean),
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "saturation": float(255 * ((most - least) / np.maximum(most, 1)).mean()),
        "entropy": float(-(share * np.log2(share)).sum()) + 0.0,
    }


def geometric_complexity(normal: np.ndarray) -> float:
    """1 - |mean unit normal| of a map uint8 [H, W, 3], 127.5 (n + 1): 0 for one plane, 0.5 for a half sphere."""
    n = np.asarray(normal, np.float64).reshape(-1, 3) / 127.5 - 1
    n /= np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-6)
    return float(max(1 - np.linalg.norm(n.mean(axis=0)), 0.0))


def occlusion_score(depth: np.ndarray, step: float = _DEPTH_STEP) -> float:
    """Share of the pixels of a depth map [H, W] that differ from the one right or below by `step` of the nearer one.

    Pixels without depth (0, negative or not finite) make no jump.
    """
    d = np.asarray(depth, np.float64)
    valid = np.isfinite(d) & (d > 0)
    d = np.where(valid, d, 1.0)
    jump = np.zeros(d.shape, bool)
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        jump[a] |= valid[a] & valid[b] & (np.abs(d[a] - d[b]) > step * np.minimum(d[a], d[b]))
    return float(jump.mean())
