"""ViT VQ-VAE as plain functions over nested dicts of arrays (the reference implementation's `VQVAE`).

    image [B,H,W,C] -> patches -> ViT -> 1x1 projection -> codes [B,h*w] -> 1x1 projection -> ViT -> patches -> image

Pre-norm ViT blocks with GELU and biases, LayerNorm eps 1e-6, fixed 2D sine-cosine positions, no final norm, then one
residual tanh MLP. Semantic segmentation embeds class ids before the encoder and decodes to class logits. A feature
map has patch size 1, so its patch projection is a linear layer per cell.

Linear kernels are [in, out]; patches are flattened in (channel, row, column) order on both ends. Blocks of a ViT are
stacked along a leading axis and scanned.

Parameters: {"encoder": {"proj", "blocks", "norm_mlp", "post_mlp"}, "quant_proj", "post_quant_proj",
"decoder": {"blocks", "norm_mlp", "post_mlp", "out_proj", "out_conv"}, "cls_emb"}; the codebook of
`fm4m.tokenizers.quantize` stands beside them as "codebook", since no gradient reaches it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.positions import grid_positions
from fm4m.tokenizers import quantize
from fm4m.tokenizers.config import VQConfig

LAYER_NORM_EPS = 1e-6
CONVNEXT_BLOCKS = 2
# ConvNeXt's layer scale starts near zero, so that an untrained head changes nothing (Liu et al. 2022, section A.1).
LAYER_SCALE_INIT = 1e-6

Params = dict[str, Any]


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, (H/p)*(W/p), C*p*p]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(x: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """Inverse of `patchify`: [B, h*w, C*p*p] -> [B, h*p, w*p, C]."""
    b, _, width = x.shape
    c = width // patch**2
    x = x.reshape(b, *grid, c, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, grid[0] * patch, grid[1] * patch, c)


def linear(p: Params, x: jax.Array) -> jax.Array:
    """x @ kernel + bias over the last axis."""
    # As one matrix, because the weight gradient of a batched product takes 1.6 times as long on CPU.
    return (x.reshape(-1, x.shape[-1]) @ p["kernel"] + p["bias"]).reshape(*x.shape[:-1], -1)


def layer_norm(p: Params, x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, eps 1e-6."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + LAYER_NORM_EPS) * p["scale"] + p["bias"]


def _attention(p: Params, x: jax.Array, heads: int) -> jax.Array:
    b, n, d = x.shape
    q, k, v = jnp.moveaxis(linear(p["qkv"], x).reshape(b, n, 3, heads, d // heads), 2, 0)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * (d // heads) ** -0.5, axis=-1)
    return linear(p["proj"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, d))


def _mlp(p: Params, x: jax.Array, activation) -> jax.Array:
    return linear(p["fc2"], activation(linear(p["fc1"], x)))


def _exact_gelu(x: jax.Array) -> jax.Array:
    # erf rather than erfc as in jax.nn.gelu: the same function, and cheaper on CPU.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _vit(p: Params, x: jax.Array, heads: int, grid: tuple[int, int]) -> jax.Array:
    """Positions, blocks and the post-MLP (where there is one) on [B, h*w, D]."""
    x = x + grid_positions(grid, x.shape[-1]).astype(np.float32)

    def block(x, p):
        x = x + _attention(p["attn"], layer_norm(p["norm1"], x), heads)
        return x + _mlp(p["mlp"], layer_norm(p["norm2"], x), _exact_gelu), None

    x, _ = jax.lax.scan(block, x, p["blocks"])
    if "post_mlp" in p:
        x = x + _mlp(p["post_mlp"], layer_norm(p["norm_mlp"], x), jnp.tanh)
    return x


def _convnext(p: Params, x: jax.Array) -> jax.Array:
    """ConvNeXt block on [B, H, W, C]: 7x7 depthwise, LayerNorm, MLP, layer scale (Liu et al. 2022)."""
    y = jax.lax.conv_general_dilated(
        x, p["dwconv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    ) + p["dwconv"]["bias"]
    y = linear(p["pwconv2"], _exact_gelu(linear(p["pwconv1"], layer_norm(p["norm"], y))))
    return x + p["gamma"] * y


def encode(config: VQConfig, params: Params, x: jax.Array) -> jax.Array:
    """Network input to latents.

    Args:
      config: static shape.
      params: parameters (the codebook is not used).
      x: f32 [B, H, W, C], or int [B, H, W] class ids for semseg (see `preprocess.to_input`).

    Returns:
      f32 [B, h*w, latent_dim], of unit length if `config.norm_latents`.
    """
    if config.domain == "semseg":
        # One-hot product instead of an index, whose gradient would be a scatter (one core of a CPU).
        x = jax.nn.one_hot(x, config.num_classes) @ params["cls_emb"]
    encoder = params["encoder"]
    x = linear(encoder["proj"], patchify(x, config.patch_size))
    latents = linear(params["quant_proj"], _vit(encoder, x, config.encoder_heads, config.grid))
    return quantize.unit(latents) if config.norm_latents else latents


def decode(config: VQConfig, params: Params, quantised: jax.Array) -> jax.Array:
    """Code rows f32 [B, h*w, latent_dim] to network output f32 [B, H, W, out_channels] (logits for semseg)."""
    decoder = params["decoder"]
    x = _vit(decoder, linear(params["post_quant_proj"], quantised), config.decoder_heads, config.grid)
    x = unpatchify(linear(decoder["out_proj"], x), config.patch_size, config.grid)
    for block in decoder.get("out_conv", {}).values():
        x = _convnext(block, x)
    return x


def forward(config: VQConfig, params: Params, codebook: quantize.Codebook, x: jax.Array):
    """Training pass: (output f32 [B,H,W,out], latents f32 [B,h*w,D], codes int32 [B,h*w], commitment loss)."""
    latents = encode(config, params, x)
    quantised, codes, commitment = quantize.quantize(codebook, latents)
    return decode(config, params, quantised), latents, codes, commitment


def init(config: VQConfig, key: jax.Array) -> Params:
    """Random parameters: Xavier-uniform kernels, zero biases, unit-normal class embedding, f32."""
    keys = iter(jax.random.split(key, 64))

    def dense(fan_in: int, fan_out: int, layers: int | None = None) -> Params:
        lead = () if layers is None else (layers,)
        limit = (6.0 / (fan_in + fan_out)) ** 0.5
        kernel = jax.random.uniform(next(keys), (*lead, fan_in, fan_out), minval=-limit, maxval=limit)
        return {"kernel": kernel, "bias": jnp.zeros((*lead, fan_out))}

    def norm(dim: int, layers: int | None = None) -> Params:
        lead = () if layers is None else (layers,)
        return {"scale": jnp.ones((*lead, dim)), "bias": jnp.zeros((*lead, dim))}

    def vit(dim: int, depth: int) -> Params:
        hidden = int(dim * config.mlp_ratio)
        # q, k and v are three square maps, so each gets the limit of a square map, not that of the wide product.
        qkv = [dense(dim, dim, depth)["kernel"] for _ in range(3)]
        blocks = {
            "norm1": norm(dim, depth),
            "attn": {
                "qkv": {"kernel": jnp.concatenate(qkv, axis=-1), "bias": jnp.zeros((depth, 3 * dim))},
                "proj": dense(dim, dim, depth),
            },
            "norm2": norm(dim, depth),
            "mlp": {"fc1": dense(dim, hidden, depth), "fc2": dense(hidden, dim, depth)},
        }
        if not config.post_mlp:
            return {"blocks": blocks}
        post_mlp = {"fc1": dense(dim, hidden), "fc2": dense(hidden, dim)}
        return {"blocks": blocks, "norm_mlp": norm(dim), "post_mlp": post_mlp}

    def convnext(dim: int) -> Params:
        limit = 1.0 / 7.0  # fan-in of a depthwise 7x7 kernel is 49
        kernel = jax.random.uniform(next(keys), (7, 7, 1, dim), minval=-limit, maxval=limit)
        return {
            "dwconv": {"kernel": kernel, "bias": jnp.zeros((dim,))},
            "norm": norm(dim),
            "pwconv1": dense(dim, 4 * dim),
            "pwconv2": dense(4 * dim, dim),
            "gamma": jnp.full((dim,), LAYER_SCALE_INIT),
        }

    pixels = config.patch_size**2
    params = {
        "encoder": {
            "proj": dense(config.in_channels * pixels, config.encoder_dim),
            **vit(config.encoder_dim, config.encoder_depth),
        },
        "quant_proj": dense(config.encoder_dim, config.latent_dim),
        "post_quant_proj": dense(config.latent_dim, config.decoder_dim),
        "decoder": {
            **vit(config.decoder_dim, config.decoder_depth),
            "out_proj": dense(config.decoder_dim, config.out_channels * pixels),
        },
    }
    if config.out_conv:
        params["decoder"]["out_conv"] = {str(i): convnext(config.out_channels) for i in range(CONVNEXT_BLOCKS)}
    if config.domain == "semseg":
        params["cls_emb"] = jax.random.normal(next(keys), (config.num_classes, config.class_dim))
    return params


def init_with_codebook(config: VQConfig, key: jax.Array) -> tuple[Params, quantize.Codebook]:
    """Random parameters and a random codebook."""
    params_key, codebook_key = jax.random.split(key)
    return init(config, params_key), quantize.init_codebook(codebook_key, config.codebook_size, config.latent_dim)
