"""A tokenizer's diffusion decoder: code rows condition a network that turns noise into the picture (DiVAE).

Functions take a tokenizer's configuration (`fm4m.tokenizers.config.VQConfig`, of which `diffusion`, `channels`,
`latent_dim`, `cell_size` and `grid` count here) and its parameters, of which they use "decoder". Rows are the
quantised latents [B, h * w, latent_dim] in row-major order, without a projection in between (the reference
implementation's `DiVAE`). Pictures are [B, H, W, C] in network range: -1..1 for what is displayed, standardised depth.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from fm4m.tokenizers import diffusion, unet, uvit
from fm4m.tokenizers.diffusion_config import DiffusionConfig
from fm4m.tokenizers.vit import Params


def _diffusion(config: Any) -> DiffusionConfig:
    if config.diffusion is None:
        raise ValueError(f"tokenizer {config.name!r} has no diffusion decoder; its decoder is deterministic")
    return config.diffusion


def _latent_map(config: Any, rows: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
    grid = tuple(grid or config.grid)
    if rows.ndim != 3 or rows.shape[1] != math.prod(grid) or rows.shape[2] != config.latent_dim:
        wanted = (math.prod(grid), config.latent_dim)
        raise ValueError(
            f"tokenizer {config.name!r}: code rows of shape {rows.shape} are not [B, {wanted[0]}, {wanted[1]}], the "
            f"rows of a {grid[0]} x {grid[1]} grid; give the grid that they belong to"
        )
    return rows.reshape(rows.shape[0], *grid, rows.shape[2])


def output_size(config: Any, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width in pixels of the picture decoded from a grid of codes (the configuration's if None)."""
    rows, columns = grid or config.grid
    return rows * config.cell_size, columns * config.cell_size


def init_decoder(config: Any, key: jax.Array) -> Params:
    """Random parameters of the denoising network, f32: what stands under "decoder" in a tokenizer's parameters."""
    network = _diffusion(config).network
    module = unet if _diffusion(config).kind == "unet" else uvit
    return module.init(network, config.channels, config.latent_dim, key)


def denoise(
    config: Any,
    params: Params,
    rows: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    grid: tuple[int, int] | None = None,
    condition_mask: jax.Array | None = None,
    original_size: jax.Array | None = None,
    key: jax.Array | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """One evaluation of the network.

    Args:
      config: static.
      params: parameters, with "decoder".
      rows: [B, h * w, latent_dim].
      x_t: [B, H, W, C], the noisy picture.
      t: int [B], its noise levels, 0..steps-1.
      grid: (h, w) of the rows; the configuration's if None.
      condition_mask: bool [B, h * w], True where the network must do without the row.
      original_size: f32 [B, 2], height and width of the picture before it was resized, for a UViT with
        `resolution_embedding`, which is told none if None.
      key: of dropout; none without it.
      dtype: of the computation.

    Returns:
      f32 [B, H, W, C]: picture, noise or velocity, as `config.diffusion.prediction` says.

    Raises:
      ValueError: rows do not fit the grid, or the picture's sides are no multiples of the network's stride.
    """
    network = _diffusion(config).network
    latents = _latent_map(config, rows, grid)
    if x_t.shape[1] % network.stride or x_t.shape[2] % network.stride:
        raise ValueError(
            f"tokenizer {config.name!r}: the diffusion decoder needs sides that are multiples of {network.stride} "
            f"pixels, but the picture is {x_t.shape[1]} x {x_t.shape[2]}"
        )
    mask = None if condition_mask is None else condition_mask.reshape(latents.shape[:3])
    args = (network, params["decoder"], x_t, t, latents, mask)
    if _diffusion(config).kind == "unet":
        return unet.apply(*args, key=key, dtype=dtype)
    return uvit.apply(*args, original_size=original_size, key=key, dtype=dtype)


def loss_at(
    config: Any,
    params: Params,
    rows: jax.Array,
    x: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    **kwargs: Any,
) -> jax.Array:
    """The training loss at given noise levels t int [B] and noise [B, H, W, C]; ``kwargs`` as for `denoise`."""
    settings = _diffusion(config)
    x = x.astype(jnp.float32)
    output = denoise(config, params, rows, diffusion.q_sample(settings, x, noise, t), t, **kwargs)
    return diffusion.distance(settings.loss, output, diffusion.target(settings, x, noise, t))


def loss(
    config: Any,
    params: Params,
    rows: jax.Array,
    x: jax.Array,
    key: jax.Array,
    grid: tuple[int, int] | None = None,
    **kwargs: Any,
) -> jax.Array:
    """The training loss: every picture at a uniformly drawn noise level, all levels weighing the same.

    Args:
      config: static.
      params: parameters, with "decoder".
      rows: [B, h * w, latent_dim]; gradients flow into them.
      x: [B, H, W, C], the clean pictures.
      key: of levels, noise and dropout.
      grid: (h, w) of the rows; the configuration's if None.
      **kwargs: condition_mask, original_size and dtype of `denoise`.

    Returns:
      f32 scalar.
    """
    level_key, noise_key, dropout_key = jax.random.split(key, 3)
    t = jax.random.randint(level_key, (x.shape[0],), 0, _diffusion(config).steps)
    noise = jax.random.normal(noise_key, x.shape)
    return loss_at(config, params, rows, x, t, noise, grid=grid, key=dropout_key, **kwargs)


def decode(
    config: Any,
    params: Params,
    rows: jax.Array,
    key: jax.Array,
    grid: tuple[int, int] | None = None,
    steps: int | None = None,
    x_start: jax.Array | None = None,
    **kwargs: Any,
) -> jax.Array:
    """Samples pictures from code rows.

    Args:
      config: static.
      params: parameters, with "decoder".
      rows: [B, h * w, latent_dim].
      key: of all noise; the same key gives the same pictures.
      grid: (h, w) of the rows; the configuration's if None.
      steps: static, evaluations of the network; the configuration's `sampling_steps` if None.
      x_start: f32 [B, H, W, C], the first noise if it should not be drawn.
      **kwargs: condition_mask, original_size and dtype of `denoise`.

    Returns:
      f32 [B, H, W, C] of `output_size`, in network range and not clipped beyond what the configuration says.
    """
    shape = (rows.shape[0], *output_size(config, grid), config.channels)
    if x_start is not None and x_start.shape != shape:
        raise ValueError(f"tokenizer {config.name!r}: x_start has shape {x_start.shape}, the pictures have {shape}")

    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        return denoise(config, params, rows, x, t, grid=grid, **kwargs)

    return diffusion.sample(_diffusion(config), network, shape, key, steps, x_start)
