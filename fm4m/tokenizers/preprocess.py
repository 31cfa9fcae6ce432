"""Arrays as a data set stores them <-> what a tokenizer's network sees <-> pictures (4M, appendix on modalities).

| domain   | stored array                    | network input                 | network output -> array          |
|----------|---------------------------------|-------------------------------|----------------------------------|
| rgb      | uint8 [H,W,3]                   | [-1,1]                        | clip, uint8                      |
| depth    | float [H,W], metres (any unit)  | standardised per image        | as is: relative depth, see below |
| normal   | uint8 [H,W,3], 127.5 (n+1)      | [-1,1]                        | unit length, uint8               |
| semseg   | uint8 [H,W] class ids           | class ids                     | argmax of logits, uint8          |
| features | float [h,w,C]                   | standardised per channel      | undone, float32                  |

Depth is standardised with the mean and variance of each image's own values between its 10 % and 90 % quantiles, so
scale and shift of an image are not in its codes: what `decode` returns is *relative* depth (larger is farther, mean
about 0, spread about 1). Comparing with metres needs a scale and a shift per image
(`reconstruction.align_scale_shift`).

`stats` holds the arrays kept in the tokenizer's file beside the weights; only features have any: `mean`, `std` f32 [C]
and `pca` f32 [C, 3], the projection of standardised features to the three channels of a picture.
"""

from __future__ import annotations

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
_DTYPES = {"rgb": "uint8", "normal": "uint8", "semseg": "uint8", "depth": "float", "features": "float"}


def check_array(config: VQConfig, array) -> np.ndarray:
    """Returns a batch as a numpy array after checking it (host side, before any transfer).

    Raises:
      ValueError: wrong shape, wrong dtype, class id out of range, or a value that is not finite; the message names
        the tokenizer and says what was expected.
    """
    array = np.asarray(array)
    if array.ndim != len(config.array_shape) + 1 or array.shape[1:] != config.array_shape:
        raise ValueError(
            f"tokenizer {config.name!r} expects arrays [batch, {', '.join(map(str, config.array_shape))}], "
            f"got {list(array.shape)}; crop and resize first"
        )
    expected = _DTYPES[config.domain]
    if not (array.dtype == np.uint8 if expected == "uint8" else np.issubdtype(array.dtype, np.floating)):
        raise ValueError(f"tokenizer {config.name!r} expects {expected} arrays, got {array.dtype}")
    if config.domain == "semseg" and array.size and array.max() >= config.num_classes:
        raise ValueError(
            f"tokenizer {config.name!r}: class id {array.max()} but only ids below {config.num_classes} exist"
        )
    if expected == "float" and not np.isfinite(array).all():
        raise ValueError(f"tokenizer {config.name!r}: array holds values that are not finite")
    return array


def to_input(config: VQConfig, stats: Stats, array: jax.Array) -> jax.Array:
    """Stored batch to network input: f32 [B, H, W, C], or int32 [B, H, W] class ids for semseg. Jittable."""
    if config.domain in ("rgb", "normal"):
        return array.astype(jnp.float32) / 127.5 - 1.0
    if config.domain == "depth":
        return standardise_depth(array.astype(jnp.float32), jnp)[..., None]
    if config.domain == "semseg":
        return array.astype(jnp.int32)
    return (array.astype(jnp.float32) - stats["mean"]) / stats["std"]


def from_output(config: VQConfig, stats: Stats, output: jax.Array) -> jax.Array:
    """Network output f32 [B, H, W, out] to a batch in the stored form (depth: relative, f32). Jittable."""
    if config.domain == "rgb":
        return jnp.round(jnp.clip(output * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
    if config.domain == "normal":
        unit = output / jnp.maximum(jnp.linalg.norm(output, axis=-1, keepdims=True), 1e-6)
        return jnp.round((unit * 0.5 + 0.5) * 255.0).astype(jnp.uint8)
    if config.domain == "depth":
        return output[..., 0]
    if config.domain == "semseg":
        return jnp.argmax(output, axis=-1).astype(jnp.uint8)
    return output * stats["std"] + stats["mean"]


def flip(config: VQConfig, array: jax.Array) -> jax.Array:
    """Mirrors a stored batch left to right; normals also change the sign of x (uint8: 255 - value). Jittable."""
    array = array[:, :, ::-1]
    if config.domain == "normal":
        return jnp.concatenate([255 - array[..., :1], array[..., 1:]], axis=-1)
    return array


def feature_stats(features: np.ndarray) -> Stats:
    """Mean, standard deviation and PCA projection of a feature set.

    Args:
      features: float [N, h, w, C].

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
    return {"mean": mean, "std": std.astype(np.float32), "pca": pca.astype(np.float32)}


def default_palette(num_classes: int) -> np.ndarray:
    """Distinct colours uint8 [num_classes, 3] for tokenizers without a palette: hues a golden angle apart."""
    hue = np.arange(num_classes) * 0.61803398875 % 1.0
    wheel = np.clip(np.abs((hue[:, None] * 6.0 + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    value = np.where(np.arange(num_classes) % 2, 0.65, 0.95)[:, None]
    return np.round(255.0 * value * (0.25 + 0.75 * wheel)).astype(np.uint8)


def to_picture(config: VQConfig, stats: Stats, array) -> np.ndarray:
    """Stored batch (or one returned by decode) to pictures uint8 [B, H, W, 3].

    Depth is stretched per image between its 2 % and 98 % quantiles (near red, far blue); features are projected to
    three principal components and clipped at two standard deviations.
    """
    array = check_array(config, array)
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
    return np.round(np.clip(z @ stats["pca"] / 4.0 + 0.5, 0.0, 1.0) * 255.0).astype(np.uint8)
