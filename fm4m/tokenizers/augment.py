"""What happens to a batch on the device before the network sees it: random crops, mirroring, another size.

Arrays are in the stored form of `fm4m.tokenizers.preprocess`, [B, H, W(, C)]. Every row has its own key, so that its
crop does not depend on how many devices share the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fm4m.tokenizers import preprocess
from fm4m.tokenizers.config import VQConfig
from fm4m.transforms.crops import RATIO

# Class ids and masks have nothing between two values.
_NEAREST = ("semseg", "mask")


def random_flip(model: VQConfig, keys: jax.Array, batch: jax.Array) -> jax.Array:
    """Half of the rows mirrored left to right."""
    chosen = jax.vmap(jax.random.bernoulli)(keys).reshape(-1, *(1,) * (batch.ndim - 1))
    return jnp.where(chosen, preprocess.flip(model, batch), batch)


def random_crop(model: VQConfig, keys: jax.Array, batch: jax.Array, scale: tuple[float, float]) -> jax.Array:
    """A window of each row, enlarged to the row's own size.

    Area is uniform in ``scale`` and shape uniform in its logarithm (Szegedy et al. 2015, section 6), the sides clipped
    to those of the image.
    """
    height, width = batch.shape[1:3]

    def window(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        area, shape, top, left = jax.random.uniform(key, (4,))
        area = scale[0] + (scale[1] - scale[0]) * area
        root = jnp.exp(0.5 * (jnp.log(RATIO[0]) + (jnp.log(RATIO[1]) - jnp.log(RATIO[0])) * shape))
        h, w = jnp.minimum(jnp.sqrt(area) / root, 1.0) * height, jnp.minimum(jnp.sqrt(area) * root, 1.0) * width
        return jnp.stack([h / height, w / width]), jnp.stack([top * (height - h), left * (width - w)])

    def cut(key: jax.Array, x: jax.Array) -> jax.Array:
        share, corner = window(key)
        if model.domain in _NEAREST:
            rows, columns = (((jnp.arange(n) + 0.5) * s + c).astype(jnp.int32)
                             for n, s, c in zip((height, width), share, corner))  # fmt: skip
            return x[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
        return jax.image.scale_and_translate(
            x.astype(jnp.float32), x.shape, (0, 1), 1.0 / share, -corner / share, method="linear"
        )

    return _like(jax.vmap(cut)(keys, batch), batch)


def resize(model: VQConfig, batch: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The batch at another (height, width): bilinear, averaging where it shrinks; nearest for class ids and masks."""
    if model.domain == "vector" or batch.shape[1:3] == size:
        return batch
    shape = (batch.shape[0], *size, *batch.shape[3:])
    if model.domain in _NEAREST:
        return jax.image.resize(batch, shape, "nearest")
    return _like(jax.image.resize(batch.astype(jnp.float32), shape, "linear"), batch)


def _like(x: jax.Array, batch: jax.Array) -> jax.Array:
    if jnp.issubdtype(batch.dtype, jnp.integer):
        return jnp.clip(jnp.round(x), 0, jnp.iinfo(batch.dtype).max).astype(batch.dtype)
    return x.astype(batch.dtype)
