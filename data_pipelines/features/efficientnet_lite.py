"""EfficientNet-lite0 as pure functions on a flat dict of arrays.

EfficientNet (Tan and Le, 2019, table 1) in its "lite" variant: no squeeze-and-excitation, ReLU6 instead of swish,
stem and head of fixed width. Weights keep batch normalisation folded into each convolution (`fold_state_dict`), so
that inference is convolutions, additions and clips.

Two conventions of the published weights matter:

* pixels are ``(x - 127) / 128``;
* padding is TensorFlow's "SAME": a stride-2 convolution on an even size pads one pixel more at the bottom and right
  than at the top and left. With symmetric padding every stride-2 layer sees its input shifted by a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

IMAGE_SIZE = 256
STRIDE = 32
MAP_CHANNELS = 320
POOLED_CHANNELS = 1280
NUM_CLASSES = 1000

# (repeats, kernel, stride of the first repeat, expansion, output channels)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32
_BATCH_NORM_EPSILON = 1e-3
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


class Block(NamedTuple):
    """One inverted bottleneck: 1x1 expansion (absent when ``expansion`` is 1), depthwise, 1x1 projection."""

    kernel: int
    stride: int
    expansion: int
    inputs: int
    outputs: int

    @property
    def hidden(self) -> int:
        """Channels of the depthwise convolution."""
        return self.inputs * self.expansion


class Outputs(NamedTuple):
    """What the network gives for a batch of B images of S x S pixels.

    Attributes:
      features: float32 [B, S/32, S/32, 320], output of the last bottleneck (linear, so it has both signs).
      pooled: float32 [B, 1280], mean over positions of the head's ReLU6 output, in [0, 6].
      logits: float32 [B, 1000], ImageNet-1k classes in the usual (sorted WordNet id) order.
    """

    features: jax.Array
    pooled: jax.Array
    logits: jax.Array


def _blocks() -> tuple[Block, ...]:
    blocks, inputs = [], _STEM_CHANNELS
    for repeats, kernel, stride, expansion, outputs in _STAGES:
        for i in range(repeats):
            blocks.append(Block(kernel, stride if i == 0 else 1, expansion, inputs, outputs))
            inputs = outputs
    return tuple(blocks)


BLOCKS = _blocks()


def _conv_layers() -> list[tuple[str, str, str, tuple[int, int, int, int]]]:
    """(our name, convolution's name and norm's name in the state dict, shape OIHW) of every convolution."""
    layers = [("stem", "_conv_stem", "_bn0", (_STEM_CHANNELS, 3, 3, 3))]
    for i, block in enumerate(BLOCKS):
        ours, theirs = f"blocks_{i}", f"_blocks.{i}."
        if block.expansion != 1:
            expand = (block.hidden, block.inputs, 1, 1)
            layers.append((f"{ours}/expand", theirs + "_expand_conv", theirs + "_bn0", expand))
        depthwise = (block.hidden, 1, block.kernel, block.kernel)
        layers.append((f"{ours}/depthwise", theirs + "_depthwise_conv", theirs + "_bn1", depthwise))
        project = (block.outputs, block.hidden, 1, 1)
        layers.append((f"{ours}/project", theirs + "_project_conv", theirs + "_bn2", project))
    layers.append(("head", "_conv_head", "_bn1", (POOLED_CHANNELS, MAP_CHANNELS, 1, 1)))
    return layers


def state_dict_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the published (unfolded) weights under their PyTorch names; all are float32."""
    shapes: dict[str, tuple[int, ...]] = {}
    for _, conv, norm, shape in _conv_layers():
        shapes[f"{conv}.weight"] = shape
        for part in _NORM_PARTS:
            shapes[f"{norm}.{part}"] = shape[:1]
    shapes["_fc.weight"] = (NUM_CLASSES, POOLED_CHANNELS)
    shapes["_fc.bias"] = (NUM_CLASSES,)
    return shapes


def fold_state_dict(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Folds each batch normalisation into the convolution before it, and turns kernels to JAX's layout.

    With scale s = weight / sqrt(running_var + 1e-3), a convolution W followed by the normalisation is the convolution
    s W plus bias - running_mean s. Computed in float64, stored in float32.

    Args:
      state: arrays with the names and shapes of `state_dict_shapes`.

    Returns:
      ``"<layer>/kernel"`` float32 HWIO (``classifier``: [1280, 1000]) and ``"<layer>/bias"``.

    Raises:
      KeyError: a name is missing.
    """
    params = {}
    for ours, conv, norm, _ in _conv_layers():
        weight, bias, mean, variance = (np.asarray(state[f"{norm}.{part}"], np.float64) for part in _NORM_PARTS)
        scale = weight / np.sqrt(variance + _BATCH_NORM_EPSILON)
        kernel = np.asarray(state[f"{conv}.weight"], np.float64).transpose(2, 3, 1, 0) * scale
        params[f"{ours}/kernel"] = np.ascontiguousarray(kernel, np.float32)
        params[f"{ours}/bias"] = (bias - mean * scale).astype(np.float32)
    params["classifier/kernel"] = np.ascontiguousarray(np.asarray(state["_fc.weight"], np.float32).T)
    params["classifier/bias"] = np.asarray(state["_fc.bias"], np.float32)
    return params


def preprocess(images: jax.Array, size: int = IMAGE_SIZE) -> jax.Array:
    """Resizes to ``size`` x ``size`` and scales pixels as the weights expect.

    The resize is ``jax.image.resize(method="linear", antialias=True)``: bilinear with half-pixel centres when it
    enlarges (64 to 256), a triangle filter when it shrinks. It runs on the device, inside the same jit as the
    network.

    Args:
      images: uint8 [B, H, W, 3], RGB.
      size: edge in pixels, a multiple of 32.

    Returns:
      float32 [B, size, size, 3], ``(x - 127) / 128``.
    """
    x = images.astype(jnp.float32)
    if images.shape[1:3] != (size, size):
        x = jax.image.resize(x, (images.shape[0], size, size, 3), method="linear", antialias=True)
    return (x - 127.0) / 128.0


def _conv(params: Mapping[str, jax.Array], name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    # HIGHEST: features are cached and compared across machines, and the default would be bfloat16 on TPU, TF32 on GPU.
    y = lax.conv_general_dilated(
        x,
        params[f"{name}/kernel"],
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return y + params[f"{name}/bias"]


def _depthwise_conv(params: Mapping[str, jax.Array], name: str, x: jax.Array, stride: int) -> jax.Array:
    """Depthwise convolution, "SAME" padding, as a sum over the kernel's positions.

    XLA fuses the sum into one loop. On CPU that makes the whole network 8 times faster than a convolution with
    ``feature_group_count`` (0.024 against 0.19 s an image at 256 pixels on two cores).
    """
    kernel = params[f"{name}/kernel"]
    edge = kernel.shape[0]
    # Rows and columns from the first to the last that one kernel position reads.
    rows, columns = (((n - 1) // stride) * stride + 1 for n in x.shape[1:3])
    missing = [max(reach + edge - 1 - n, 0) for reach, n in zip((rows, columns), x.shape[1:3])]
    x = jnp.pad(x, [(0, 0), *((total // 2, total - total // 2) for total in missing), (0, 0)])
    y = params[f"{name}/bias"]
    for i in range(edge):
        for j in range(edge):
            y = y + kernel[i, j, 0] * x[:, i : i + rows : stride, j : j + columns : stride]
    return y


def forward(params: Mapping[str, jax.Array], x: jax.Array) -> Outputs:
    """The network.

    Args:
      params: from `fold_state_dict`.
      x: float32 [B, S, S, 3] from `preprocess`, S a multiple of 32 (the published weights were trained at 224).

    Returns:
      `Outputs`.

    Raises:
      ValueError: the shape of ``x`` is wrong.
    """
    if x.ndim != 4 or x.shape[3] != 3 or x.shape[1] % STRIDE or x.shape[2] % STRIDE or 0 in x.shape:
        raise ValueError(f"EfficientNet-lite0 takes images [B, H, W, 3] with H and W multiples of 32, not {x.shape}")
    x = jax.nn.relu6(_conv(params, "stem", x, stride=2))
    for i, block in enumerate(BLOCKS):
        y = x
        if block.expansion != 1:
            y = jax.nn.relu6(_conv(params, f"blocks_{i}/expand", y))
        y = jax.nn.relu6(_depthwise_conv(params, f"blocks_{i}/depthwise", y, block.stride))
        y = _conv(params, f"blocks_{i}/project", y)
        x = x + y if block.stride == 1 and block.inputs == block.outputs else y
    pooled = jax.nn.relu6(_conv(params, "head", x)).mean(axis=(1, 2))
    logits = jnp.dot(pooled, params["classifier/kernel"], precision=lax.Precision.HIGHEST) + params["classifier/bias"]
    return Outputs(x, pooled, logits)
