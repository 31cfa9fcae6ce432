"""Vector-quantised autoencoders as functions over nested dicts of arrays (the reference implementation's `VQVAE`).

    array -> patches -> ViT or MLP -> 1x1 projection -> codes -> 1x1 projection -> ViT or MLP -> patches -> array

Semantic segmentation embeds class ids before the encoder and decodes to class logits. Without patch projection the
cells of a feature map are the tokens; a vector is one token. Networks are those of `fm4m.tokenizers.vit` and `.mlp`;
denoising decoders, which see the code rows as they are, are `fm4m.tokenizers.divae_model`.

Parameters: {"encoder": {"proj", "blocks", "norm_mlp", "post_mlp"}, "quant_proj", "post_quant_proj", "decoder":
{"blocks", "norm_mlp", "post_mlp", "out_proj", "out_conv"}, "cls_emb", "quantizer" (memcodes)}; MLPs are {"linear_in",
"blocks", "linear_out"}. The codebook of `fm4m.tokenizers.quantize` stands beside them, since no gradient reaches it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fm4m.tokenizers import memcodes, quantize
from fm4m.tokenizers.config import DIFFUSION_DECODERS, VQConfig
from fm4m.tokenizers.mlp import bottleneck_mlp, init_bottleneck_mlp
from fm4m.tokenizers.vit import (
    CONVNEXT_BLOCKS,
    convnext,
    init_convnext,
    init_linear,
    init_transformer,
    linear,
    patchify,
    transformer,
    unpatchify,
)  # fmt: skip

Params = dict[str, Any]


def encode_tokens(config: VQConfig, params: Params, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """What the encoder's network writes: [B, n, encoder_dim], before the projection to latents. See `encode`."""
    if config.domain == "semseg":
        # One-hot product instead of an index, whose gradient would be a scatter (one core of a CPU).
        x = jax.nn.one_hot(x, config.num_classes) @ params["cls_emb"]
    if config.domain == "vector":
        x = x[:, None, None]
    cell = config.cell_size
    if x.shape[1] % cell or x.shape[2] % cell or 0 in x.shape[1:3]:
        raise ValueError(
            f"tokenizer {config.name!r}: an array of {x.shape[1]}x{x.shape[2]} cannot be cut into patches of {cell}"
        )
    grid = x.shape[1] // cell, x.shape[2] // cell
    encoder, x = params["encoder"], patchify(x, cell).astype(dtype)
    if config.encoder == "mlp":
        return bottleneck_mlp(encoder, x)
    return transformer(encoder, linear(encoder["proj"], x), config.encoder_heads, grid, config.encoder_grid)


def encode(config: VQConfig, params: Params, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Network input to latents.

    Args:
      config: static shape.
      params: parameters (the codebook is not used).
      x: f32 [B, H, W, C], int [B, H, W] class ids for semseg, or f32 [B, C] for vectors (see `preprocess.to_input`).
        H and W may be any multiples of `config.cell_size`.
      dtype: of the matrix products up to the post-MLP; norms, post-MLP and projection are float32.

    Returns:
      f32 [B, h*w, latent_dim], row-major, of unit length if `config.norm_latents`.

    Raises ValueError for a size that patches do not cover.
    """
    latents = linear(params["quant_proj"], encode_tokens(config, params, x, dtype).astype(jnp.float32))
    return quantize.unit(latents) if config.norm_latents else latents


def decode(
    config: VQConfig, params: Params, rows: jax.Array, grid: tuple[int, int] | None = None, dtype: Any = jnp.float32
) -> jax.Array:
    """Code rows to network output, with a deterministic decoder.

    Args:
      config: static shape.
      params: parameters.
      rows: f32 [B, h*w, latent_dim].
      grid: rows and columns of codes; `config.grid` if None.
      dtype: of the matrix products.

    Returns:
      f32 [B, H, W, out_channels] (logits for semseg and mask), or [B, C] for vectors.

    Raises ValueError for a denoising decoder, which `divae_model.decode` runs.
    """
    if config.decoder in DIFFUSION_DECODERS:
        raise ValueError(f"tokenizer {config.name!r} decodes by diffusion: use divae_model.decode")
    decoder, grid = params["decoder"], tuple(grid or config.grid)
    x = linear(params["post_quant_proj"], rows.astype(dtype))
    if config.decoder == "mlp":
        x = unpatchify(bottleneck_mlp(decoder, x), config.cell_size, grid)
    else:
        x = transformer(decoder, x, config.decoder_heads, grid, config.decoder_grid)
        x = unpatchify(linear(decoder["out_proj"], x), config.cell_size, grid)
        for block in decoder.get("out_conv", {}).values():
            x = convnext(block, x)
    x = x.astype(jnp.float32)
    return x[:, 0, 0] if config.domain == "vector" else x


def forward(
    config: VQConfig, params: Params, codebook: quantize.Codebook, x: jax.Array, key: jax.Array | None = None,
    dtype: Any = jnp.float32,
):  # fmt: skip
    """Training pass of a deterministic decoder.

    Returns (output as `decode`'s, latents f32 [B, n, D], codes int32 [B, n(, num_codebooks)], commitment loss); `key`
    is for memcodes (see `quantize.quantize`).
    """
    latents = encode(config, params, x, dtype)
    rows, codes, commitment = quantize.quantize(config, params, codebook, latents, key)
    return decode(config, params, rows, config.grid_of(x.shape), dtype), latents, codes, commitment


def init(config: VQConfig, key: jax.Array) -> Params:
    """Random parameters: Xavier-uniform kernels, zero biases, unit-normal class embedding, f32."""
    keys = iter(jax.random.split(key, 64))

    def mlp(side: str, fan_in: int, fan_out: int) -> Params:
        dim, depth = getattr(config, f"{side}_dim"), getattr(config, f"{side}_depth")
        return init_bottleneck_mlp(keys, fan_in, fan_out, dim, depth, config.mlp_ratio)

    cells = config.cell_size**2
    if config.encoder == "mlp":
        params = {"encoder": mlp("encoder", config.in_channels, config.encoder_dim)}
    else:
        proj = init_linear(next(keys), config.in_channels * cells, config.encoder_dim)
        vit = init_transformer(keys, config.encoder_dim, config.encoder_depth, config.mlp_ratio, config.post_mlp)
        params = {"encoder": {"proj": proj, **vit}}
    params["quant_proj"] = init_linear(next(keys), config.encoder_dim, config.latent_dim)
    if config.decoder in DIFFUSION_DECODERS:
        from fm4m.tokenizers import divae_model

        params["decoder"] = divae_model.init_decoder(config, next(keys))
    else:
        params["post_quant_proj"] = init_linear(next(keys), config.latent_dim, config.decoder_dim)
        if config.decoder == "mlp":
            params["decoder"] = mlp("decoder", config.decoder_dim, config.out_channels)
        else:
            vit = init_transformer(keys, config.decoder_dim, config.decoder_depth, config.mlp_ratio, config.post_mlp)
            out_proj = init_linear(next(keys), config.decoder_dim, config.out_channels * cells)
            params["decoder"] = {**vit, "out_proj": out_proj}
    if config.out_conv:
        blocks = {str(i): init_convnext(keys, config.out_channels) for i in range(CONVNEXT_BLOCKS)}
        params["decoder"]["out_conv"] = blocks
    if config.domain == "semseg":
        params["cls_emb"] = jax.random.normal(next(keys), (config.num_classes, config.class_dim))
    if config.quantizer == "memcodes":
        width = config.latent_dim // config.num_codebooks
        params["quantizer"] = memcodes.init(next(keys), config.num_codebooks, config.codebook_size, width)
    return params


def init_with_codebook(config: VQConfig, key: jax.Array) -> tuple[Params, quantize.Codebook]:
    """Random parameters and a random codebook ({} where the quantizer has none)."""
    params_key, codebook_key = jax.random.split(key)
    return init(config, params_key), quantize.init(config, codebook_key)
