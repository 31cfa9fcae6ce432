"""Arrays as a data set stores them <-> what a tokenizer's network sees <-> pictures (4M, appendix on modalities).

| domain   | stored array                    | network input                 | network output -> array          |
|----------|---------------------------------|-------------------------------|----------------------------------|
| rgb      | uint8 [H,W,3]                   | [-1,1]                        | clip, uint8                      |
| depth    | float [H,W], metres (any unit)  | standardised per image        | as is: relative depth, see below |
| normal   | uint8 [H,W,3], 127.5 (n+1)      | [-1,1]                        | unit length, uint8               |
| semseg   | uint8 [H,W] class ids           | class ids                     | argmax of logits, uint8          |
| features | float [h,w,C]                   | standardised per channel      | undone, float32                  |
| vector   | float [C]                       | standardised per channel      | undone, float32                  |
| edges    | uint8 [H,W]                     | [-1,1]                        | clip, uint8                      |
| mask     | uint8 or bool [H,W], 0 is no    | -1 or 1                       | logit > 0, uint8 0 or 1          |

Depth is standardised with the mean and variance of each image's own values between its 10 % and 90 % quantiles, so
scale and shift of an image are not in its codes: what `decode` returns is *relative* depth (larger is farther, mean
about 0, spread about 1). Comparing with metres needs a scale and a shift per image
(`reconstruction.align_scale_shift`).

`stats` holds the arrays kept in the tokenizer's file beside the weights; only features and vectors have any: `mean`,
`std` f32 [C] and `pca` f32 [C, 3], the projection of standardised features to the three channels of a picture.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.tokenizers.config import VQConfig
from fm4m.transforms.images import standardise_depth

Stats = dict[str, np.ndarray]
STATS_SHAPES = {"mean": (), "std": (), "pca": (3,)}  # after the leading channel axis
# Near to far, dark red over yellow and green to dark blue: relative depth stays readable in a small picture.
_DEPTH_COLOURS = np.array(
    [[158, 1, 66], [244, 109, 67], [254, 224, 139], [171, 221, 164], [50, 136, 189], [60, 40, 110]], np.float32
)
_FLOATS = ("depth", "features", "vector")
# Domains whose network sees standardised values.
STANDARDISED = ("features", "vector")


class ArrayError(ValueError):
    """Arrays that a tokenizer cannot take, or that cannot be read."""


def check_array(config: VQConfig, array, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Returns a batch as a numpy array after checking it (host side, before any transfer).

    Args:
      config: of the tokenizer.
      array: a batch in the stored form.
      grid: rows and columns of codes that it should have; the configured ones if None.

    Raises:
      ArrayError: wrong shape, wrong dtype, class id out of range, or a value that is not finite; the message names
        the tokenizer and says what was expected.
    """
    array, shape = np.asarray(array), config.array_shape_of(grid or config.grid)
    if array.shape[1:] != shape or not array.ndim:
        raise ArrayError(
            f"tokenizer {config.name!r} expects arrays [batch, {', '.join(map(str, shape))}], "
            f"got {list(array.shape)}; crop and resize first"
        )
    if config.domain == "mask" and array.dtype == bool:
        array = array.astype(np.uint8)
    expected = "float" if config.domain in _FLOATS else "uint8"
    if not (array.dtype == np.uint8 if expected == "uint8" else np.issubdtype(array.dtype, np.floating)):
        raise ArrayError(f"tokenizer {config.name!r} expects {expected} arrays, got {array.dtype}")
    if config.domain == "semseg" and array.size and array.max() >= config.num_classes:
        raise ArrayError(
            f"tokenizer {config.name!r}: class id {array.max()} but only ids below {config.num_classes} exist"
        )
    if expected == "float" and not np.isfinite(array).all():
        raise ArrayError(f"tokenizer {config.name!r}: array holds values that are not finite")
    return array


def to_input(config: VQConfig, stats: Stats, array: jax.Array) -> jax.Array:
    """Stored batch to network input, jittable: f32 [B, H, W, C], [B, C] for vectors, int32 [B, H, W] ids for semseg."""
    if config.domain in ("rgb", "normal"):
        return array.astype(jnp.float32) / 127.5 - 1.0
    if config.domain == "depth":
        return standardise_depth(array.astype(jnp.float32), jnp)[..., None]
    if config.domain == "semseg":
        return array.astype(jnp.int32)
    if config.domain == "edges":
        return array.astype(jnp.float32)[..., None] / 127.5 - 1.0
    if config.domain == "mask":
        return jnp.where(array > 0, 1.0, -1.0)[..., None]
    return (array.astype(jnp.float32) - stats["mean"]) / stats["std"]


def from_output(config: VQConfig, stats: Stats, output: jax.Array) -> jax.Array:
    """Network output f32 [B, H, W, out] to a batch in the stored form (depth: relative, f32). Jittable."""
    if config.domain in ("rgb", "edges"):
        image = jnp.round(jnp.clip(output * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
        return image if config.domain == "rgb" else image[..., 0]
    if config.domain == "mask":
        return (output[..., 0] > 0).astype(jnp.uint8)
    if config.domain == "normal":
        unit = output / jnp.maximum(jnp.linalg.norm(output, axis=-1, keepdims=True), 1e-6)
        return jnp.round((unit * 0.5 + 0.5) * 255.0).astype(jnp.uint8)
    if config.domain == "depth":
        return output[..., 0]
    if config.domain == "semseg":
        return jnp.argmax(output, axis=-1).astype(jnp.uint8)
    return output * stats["std"] + stats["mean"]


def flip(config: VQConfig, array: jax.Array) -> jax.Array:
    """Mirrors a stored batch left to right; normals also change the sign of x (uint8: 255 - value). Jittable.

    Raises ValueError for vectors, which have no left.
    """
    if config.domain == "vector":
        raise ValueError(f"tokenizer {config.name!r}: vectors cannot be mirrored; set flip to False")
    array = array[:, :, ::-1]
    if config.domain == "normal":
        return jnp.concatenate([255 - array[..., :1], array[..., 1:]], axis=-1)
    return array


def feature_stats(features: np.ndarray) -> Stats:
    """Mean, standard deviation and PCA projection of a feature set.

    Args:
      features: float [N, h, w, C] or [N, C].

    Returns:
      {"mean" f32 [C], "std" f32 [C], "pca" f32 [C, 3]}. The projection acts on standardised features and is scaled so
      that each of the three components has unit variance.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float32)
    mean, std = flat.mean(0), np.maximum(flat.std(0), 1e-6)
    z = (flat - mean) / std
    eigenvalues, vectors = np.linalg.eigh(z.T @ z / len(z))
    order = np.argsort(eigenvalues)[::-1][:3]
    vectors = vectors[:, order]
    # The sign of an eigenvector is arbitrary; fixing it keeps the colours the same from one machine to another.
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(len(order))])
    pca = vectors / np.sqrt(np.maximum(eigenvalues[order], 1e-6))
    pca = np.pad(pca, ((0, 0), (0, 3 - len(order))))  # fewer channels than colours
    return {"mean": mean, "std": std.astype(np.float32), "pca": pca.astype(np.float32)}


def default_palette(num_classes: int) -> np.ndarray:
    """Distinct colours uint8 [num_classes, 3] for tokenizers without a palette: hues a golden angle apart."""
    hue = np.arange(num_classes) * 0.61803398875 % 1.0
    wheel = np.clip(np.abs((hue[:, None] * 6.0 + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    value = np.where(np.arange(num_classes) % 2, 0.65, 0.95)[:, None]
    return np.round(255.0 * value * (0.25 + 0.75 * wheel)).astype(np.uint8)


def to_picture(config: VQConfig, stats: Stats, array) -> np.ndarray:
    """Stored batch (or one returned by decode), of any grid, to pictures uint8 [B, H, W, 3].

    Depth is stretched per image between its 2 % and 98 % quantiles (near red, far blue); features are projected to
    three principal components and clipped at two standard deviations; the numbers of a vector fill a square, row by
    row, grey by their standardised value.
    """
    array = np.asarray(array)
    array = check_array(config, array, config.grid_of(array.shape))
    if config.domain in ("edges", "mask"):
        grey = array if config.domain == "edges" else np.where(array > 0, 255, 0).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if config.domain in ("rgb", "normal"):
        return array
    if config.domain == "semseg":
        palette = np.array(config.palette, np.uint8) if config.palette else default_palette(config.num_classes)
        return palette[array]
    if config.domain == "depth":
        depth = array.astype(np.float32)
        low, high = np.quantile(depth, [0.02, 0.98], axis=(1, 2), keepdims=True)
        x = np.clip((depth - low) / np.maximum(high - low, 1e-6), 0.0, 1.0) * (len(_DEPTH_COLOURS) - 1)
        left = np.minimum(x.astype(np.int32), len(_DEPTH_COLOURS) - 2)
        weight = (x - left)[..., None]
        colours = _DEPTH_COLOURS[left] * (1.0 - weight) + _DEPTH_COLOURS[left + 1] * weight
        return np.round(colours).astype(np.uint8)
    z = (array.astype(np.float32) - stats["mean"]) / stats["std"]
    if config.domain == "features":
        return np.round(np.clip(z @ stats["pca"] / 4.0 + 0.5, 0.0, 1.0) * 255.0).astype(np.uint8)
    side = math.isqrt(config.channels - 1) + 1
    grey = np.round(np.clip(z / 4.0 + 0.5, 0.0, 1.0) * 255.0).astype(np.uint8)
    grey = np.pad(grey, ((0, 0), (0, side * side - config.channels)))
    return np.repeat(grey.reshape(-1, side, side, 1), 3, axis=-1)
