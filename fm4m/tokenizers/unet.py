"""The patched UNet that denoises under the condition of a latent map (the reference implementation's `unet_patched`).

Pixels are unshuffled into cells, the latents repeated to the cells' resolution and concatenated to them, and a UNet of
residual blocks and self-attention (Dhariwal & Nichol 2021) puts out the cells of its prediction. One attention head.

Parameters: {"time": {"fc1", "fc2"}, "input": {"0": {"conv"}, "1": {"res"[, "attn"]} | {"down"}, ...},
"middle": {"res1", "attn", "res2"}, "output": {"0": {"res"[, "attn"][, "up"]}, ...}, "norm", "out"}. The numbers count
blocks in the order in which a picture passes them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fm4m.tokenizers import conv_layers as layers
from fm4m.tokenizers.diffusion_config import UNetConfig
from fm4m.tokenizers.vit import Params, linear

# Width of the time embedding over the finest level's.
TIME_MULT = 4


@dataclasses.dataclass(frozen=True)
class Block:
    """One numbered block: widths going in and out, and what it is made of.

    Attributes:
      kind: "conv" (the first), "res" or "down".
      attention: self-attention after the residual block.
      up: upsampling at the end.
    """

    kind: str
    fan_in: int
    fan_out: int
    attention: bool = False
    up: bool = False


def plan(config: UNetConfig, cell_channels: int) -> tuple[list[Block], list[Block], int]:
    """The input blocks, the output blocks and the width between them.

    ``cell_channels`` is the width of the first convolution's input: pixels of a cell and latents.
    """
    width = config.channels * config.channel_mult[0]
    inputs, skips = [Block("conv", cell_channels, width)], [width]
    for level, mult in enumerate(config.channel_mult):
        attention = 2**level in config.attention_downsamples
        for _ in range(config.res_blocks):
            inputs.append(Block("res", width, config.channels * mult, attention))
            width = config.channels * mult
            skips.append(width)
        if level < len(config.channel_mult) - 1:
            inputs.append(Block("down", width, width))
            skips.append(width)
    middle, outputs = width, []
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        attention = 2**level in config.attention_downsamples
        for i in range(config.res_blocks + 1):
            up = level > 0 and i == config.res_blocks
            outputs.append(Block("res", width + skips.pop(), config.channels * mult, attention, up))
            width = config.channels * mult
    return inputs, outputs, middle


def init(config: UNetConfig, channels: int, latent_dim: int, key: jax.Array) -> Params:
    """Random parameters, f32.

    The last convolution of every residual block, the output of every attention and the last convolution of all start at
    zero: an untrained network puts out zeros.

    Args:
      config: shape.
      channels: of the picture.
      latent_dim: width of the latents.
      key: of all draws.
    """
    time = TIME_MULT * config.channels
    pixels = channels * config.patch_size**2
    inputs, outputs, middle = plan(config, pixels + latent_dim)

    def attention(width: int) -> Params:
        return {
            "norm": layers.make_norm(width),
            "qkv": layers.make_linear(width, 3 * width),
            "proj": layers.make_linear(width, width, zero=True),
        }

    def block(b: Block) -> Params:
        if b.kind != "res":
            return {b.kind: layers.make_conv(b.fan_in, b.fan_out)}
        p = {"res": layers.make_residual(b.fan_in, b.fan_out, time)}
        if b.attention:
            p["attn"] = attention(b.fan_out)
        if b.up:
            p["up"] = layers.make_conv(b.fan_out, b.fan_out)
        return p

    leaves = {
        "time": layers.make_time_mlp(config.channels, time),
        "input": {str(i): block(b) for i, b in enumerate(inputs)},
        "middle": {
            "res1": layers.make_residual(middle, middle, time),
            "attn": attention(middle),
            "res2": layers.make_residual(middle, middle, time),
        },
        "output": {str(i): block(b) for i, b in enumerate(outputs)},
        "norm": layers.make_norm(outputs[-1].fan_out),
        "out": layers.make_conv(outputs[-1].fan_out, pixels, zero=True),
    }
    return layers.draw(leaves, key)


def _attention(p: Params, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    qkv = linear(p["qkv"], layers.group_norm(p["norm"], x)).reshape(b, h * w, 3, 1, c)
    y = layers.attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    return x + linear(p["proj"], y).reshape(b, h, w, c)


def apply(
    config: UNetConfig,
    params: Params,
    x: jax.Array,
    t: jax.Array,
    latents: jax.Array,
    condition_mask: jax.Array | None = None,
    key: jax.Array | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """The network's prediction for a noisy picture.

    Args:
      config: shape.
      params: see the module.
      x: [B, H, W, C], sides multiples of `config.stride`.
      t: [B], noise levels.
      latents: [B, h, w, D] of any resolution.
      condition_mask: bool [B, h, w], True where the network must do without the latent (it gets zeros).
      key: of dropout; none without it.
      dtype: of the computation.

    Returns:
      f32 [B, H, W, C].
    """
    if condition_mask is not None:
        latents = jnp.where(condition_mask[..., None], jnp.zeros_like(latents), latents)
    cells = layers.to_cells(x.astype(dtype), config.patch_size)
    y = jnp.concatenate([cells, layers.resize_nearest(latents.astype(dtype), cells.shape[1:3])], axis=-1)
    time = layers.time_mlp(params["time"], t, config.channels, dtype)
    count = 0

    def residual(p: Params, y: jax.Array) -> jax.Array:
        nonlocal count
        count += 1
        own = None if key is None else jax.random.fold_in(key, count)
        return layers.residual(p, y, time, config.dropout, own)

    def block(p: Params, y: jax.Array) -> jax.Array:
        if "conv" in p:
            return layers.conv(p["conv"], y)
        if "down" in p:
            return layers.downsample(p["down"], y)
        y = residual(p["res"], y)
        if "attn" in p:
            y = _attention(p["attn"], y)
        return layers.upsample(p["up"], y) if "up" in p else y

    skips = []
    for i in range(len(params["input"])):
        y = block(params["input"][str(i)], y)
        skips.append(y)
    y = residual(params["middle"]["res1"], y)
    y = residual(params["middle"]["res2"], _attention(params["middle"]["attn"], y))
    for i in range(len(params["output"])):
        y = block(params["output"][str(i)], jnp.concatenate([y, skips.pop()], axis=-1))
    y = layers.conv(params["out"], jax.nn.silu(layers.group_norm(params["norm"], y)))
    return layers.to_pixels(y, config.patch_size).astype(jnp.float32)
