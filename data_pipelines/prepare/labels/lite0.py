"""EfficientNet-lite0 as a labeller: feature maps, pooled features or logits (see `data_pipelines.features`)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from data_pipelines.features import EfficientNetLite0
from data_pipelines.prepare.labels import Record
from data_pipelines.prepare.labels.pixels import check_images

# Domain of the label -> output of the network.
_OUTPUTS = {"features": "features", "vector": "pooled", "logits": "logits"}


class Lite0:
    """float32 [B, 8, 8, 320], [B, 1280] or [B, 1000].

    Attributes:
      name, domain, needs: see `Labeller`; the name has a digest of the weights.
    """

    needs = ()

    def __init__(self, output: str = "features", path: str | os.PathLike | None = None, batch_size: int = 16):
        """Loads the weights.

        Args:
          output: "features" (the last map), "vector" (pooled) or "logits" (of 1000 ImageNet classes).
          path: weights; None takes the installed package.
          batch_size: images a device call.

        Raises:
          FileNotFoundError: no weights; the message says how to install them.
          ValueError: another output, or a file with other weights.
        """
        if output not in _OUTPUTS:
            raise ValueError(f"output is {output!r}; EfficientNet-lite0 gives {', '.join(_OUTPUTS)}")
        self._network = EfficientNetLite0(path, batch_size)
        self.domain = output
        self.name = f"{self._network.name}-{output}"

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> np.ndarray:
        """uint8 [B, H, W, 3] -> the output's array."""
        return getattr(self._network.outputs(check_images(images)), _OUTPUTS[self.domain])
