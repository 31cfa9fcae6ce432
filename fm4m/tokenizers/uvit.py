"""The UViT: convolutional levels around a transformer that sees the condition (Hoogeboom et al. 2023, section 3).

Pixels are embedded by a strided convolution, go down through residual convolutional levels, are processed as tokens by
a transformer whose blocks are modulated by the noise level (adaLN, Peebles & Xie 2023), and come up again through
levels that see the features of the way down; a strided transposed convolution writes the pixels. The latents are added
to the tokens ("concat", as the reference implementation calls it), or attended to ("xattn").

Parameters: {"conv_in", "time", ["height", "width",] "down": {level: {"res": {...}[, "down"]}}, ["extra_down",
"extra_up",] "mid": {"proj_in", ["cond", "mask_token",] "blocks" | "first", "centre", "second", "proj_out"},
"up": {level: {"res": {...}[, "up"]}}, "norm", "out"}; "cond" and "mask_token" with "concat" only. Levels are numbered
in the order in which a picture passes them; blocks of the transformer are stacked along a leading axis and scanned.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fm4m.positions import grid_positions
from fm4m.tokenizers import conv_layers as layers
from fm4m.tokenizers.conv_layers import Leaf
from fm4m.tokenizers.diffusion_config import UViTConfig
from fm4m.tokenizers.vit import Params, exact_gelu, layer_norm, linear, positions

# Width of the time embedding over the finest level's.
TIME_MULT = 4
# PyTorch's default; the reference implementation's encoders have 1e-6.
LAYER_NORM_EPS = 1e-5


def stacks(config: UViTConfig) -> dict[str, int]:
    """Names and depths of the transformer's stacks of blocks, in the order in which tokens pass them.

    With long skips, blocks of "second" see those of "first" in reverse; the one in the centre sees none.
    """
    if not config.long_skip:
        return {"blocks": config.depth}
    half = config.depth // 2
    return {"first": half, "centre": 1, "second": half}


# ---- parameters


def _make_blocks(config: UViTConfig, time: int, latent_dim: int, depth: int, skip: bool) -> Params:
    dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
    parts = 2
    p = {
        "norm1": layers.make_norm(dim, depth),
        "qkv": layers.make_xavier(dim, 3 * dim, depth, splits=3),
        "proj": layers.make_xavier(dim, dim, depth),
        "norm2": layers.make_norm(dim, depth),
        "fc1": layers.make_xavier(dim, hidden, depth),
        "fc2": layers.make_xavier(hidden, dim, depth),
    }
    if config.conditioning == "xattn":
        parts = 3
        p |= {
            "norm_cross": layers.make_norm(dim, depth),
            "norm_context": layers.make_norm(latent_dim, depth),
            "cross_q": layers.make_xavier(dim, dim, depth),
            "cross_kv": layers.make_xavier(latent_dim, 2 * dim, depth, splits=2),
            "cross_proj": layers.make_xavier(dim, dim, depth),
        }
    p["modulation"] = layers.make_xavier(time, 2 * parts * dim, depth)
    p["gate"] = {"kernel": Leaf((depth, time, parts * dim)), "bias": Leaf((depth, parts * dim))}
    if skip:
        p["skip"] = layers.make_xavier(2 * dim, dim, depth)
    return p


def init(config: UViTConfig, channels: int, latent_dim: int, key: jax.Array) -> Params:
    """Random parameters, f32: Xavier-uniform linear layers with zero biases, PyTorch's default for convolutions.

    Gates start at zero, and so does the last convolution of every residual block: an untrained transformer passes its
    tokens through, an untrained block is its shortcut.

    Args:
      config: shape.
      channels: of the picture.
      latent_dim: width of the latents.
      key: of all draws.
    """
    widths = config.block_channels
    features, time = widths[0], TIME_MULT * widths[0]
    params: dict[str, Any] = {
        "conv_in": layers.make_conv(channels, widths[0], size=config.patch_size),
        "time": layers.make_time_mlp(features, time, layers.make_xavier),
    }
    if config.resolution_embedding:
        params |= {name: layers.make_time_mlp(features, time, layers.make_xavier) for name in ("height", "width")}

    skips, width, last = [widths[0]], widths[0], len(widths) - 1
    params["down"] = {}
    for level, out in enumerate(widths):
        res = {}
        for i in range(config.layers):
            res[str(i)] = layers.make_residual(width, out, time, layers.make_xavier)
            width = out
            skips.append(width)
        params["down"][str(level)] = {"res": res}
        if level < last:
            params["down"][str(level)]["down"] = layers.make_conv(width, width)
            skips.append(width)

    if config.extra_downsample:
        params |= {name: layers.make_conv(width, width) for name in ("extra_down", "extra_up")}
    params["mid"] = {
        "proj_in": layers.make_xavier(width, config.dim),
        "proj_out": layers.make_xavier(config.dim, width),
    }
    if config.conditioning == "concat":
        params["mid"] |= {"cond": layers.make_xavier(latent_dim, config.dim), "mask_token": Leaf((config.dim,))}
    for name, depth in stacks(config).items():
        params["mid"][name] = _make_blocks(config, time, latent_dim, depth, skip=name == "second")

    params["up"] = {}
    for level, out in enumerate(reversed(widths)):
        res = {}
        for i in range(config.layers + 1):
            res[str(i)] = layers.make_residual(width + skips.pop(), out, time, layers.make_xavier)
            width = out
        params["up"][str(level)] = {"res": res}
        if level < last:
            params["up"][str(level)]["up"] = layers.make_conv(width, width)
    params["norm"] = layers.make_norm(width)
    params["out"] = layers.make_from_cells(width, channels, config.patch_size)
    return layers.draw(params, key)


# ---- forward


def _heads(x: jax.Array, parts: int, heads: int) -> list[jax.Array]:
    b, n, width = x.shape
    split = x.reshape(b, n, parts, heads, width // (parts * heads))
    return [split[:, :, i] for i in range(parts)]


def _norm(p: Params, x: jax.Array) -> jax.Array:
    return layer_norm(p, x, LAYER_NORM_EPS)


def _block(
    config: UViTConfig, p: Params, x: jax.Array, time: jax.Array, context: jax.Array | None, hidden, key
) -> jax.Array:
    """One block on [B, N, dim]; ``time`` is SiLU of the time embedding.

    ``context`` [B, M, latent_dim] is what "xattn" attends to, but for what is ``hidden``, bool [B, M] or None. Every
    part (self-attention, cross-attention, MLP) has a shift and a scale of its own behind its norm, and a gate.
    """
    parts = 2 if context is None else 3
    modulation = jnp.split(linear(p["modulation"], time)[:, None], 2 * parts, axis=-1)
    gates = jnp.split(linear(p["gate"], time)[:, None], parts, axis=-1)
    keys = [None] * parts if key is None else list(jax.random.split(key, parts))

    def modulated(norm: str, part: int) -> jax.Array:
        shift, scale = modulation[2 * part], modulation[2 * part + 1]
        return _norm(p[norm], x) * (1 + scale) + shift

    def gated(y: jax.Array, part: int) -> jax.Array:
        return x + gates[part] * layers.dropout(y, config.dropout, keys[part])

    attended = layers.attend(*_heads(linear(p["qkv"], modulated("norm1", 0)), 3, config.heads))
    x = gated(linear(p["proj"], attended), 0)
    if context is not None:
        (q,) = _heads(linear(p["cross_q"], modulated("norm_cross", 1)), 1, config.heads)
        k, v = _heads(linear(p["cross_kv"], _norm(p["norm_context"], context)), 2, config.heads)
        x = gated(linear(p["cross_proj"], layers.attend(q, k, v, hidden)), 1)
    hidden = exact_gelu(linear(p["fc1"], modulated("norm2", parts - 1)))
    return gated(linear(p["fc2"], hidden), parts - 1)


def _positions(config: UViTConfig, grid: tuple[int, int]) -> jax.Array:
    """The sine-cosine table for a grid, f32 [h * w, dim]: resized bicubically, with "xattn" by nearest neighbours."""
    table = (config.position_grid, config.position_grid)
    if config.conditioning == "concat":
        return jnp.asarray(positions(table, grid, config.dim))
    whole = jnp.asarray(grid_positions(table, config.dim).reshape(1, *table, config.dim), jnp.float32)
    return layers.resize_nearest(whole, grid).reshape(-1, config.dim)


def transformer(
    config: UViTConfig, p: Params, x: jax.Array, time: jax.Array, latents: jax.Array, mask: jax.Array | None, key
) -> jax.Array:
    """The middle of the network: [B, h, w, C] -> [B, h, w, C] under the condition of latents [B, gh, gw, D].

    Args:
      config: shape.
      p: the parameters under "mid".
      x: features of the coarsest level.
      time: [B, T], the time embedding.
      latents: the condition.
      mask: bool [B, gh, gw], True where the learned token stands in for the latent or, with "xattn", the latent cannot
        be seen.
      key: of dropout; none without it.
    """
    b, h, w, c = x.shape
    y, context, hidden = linear(p["proj_in"], x.reshape(b, h * w, c)), None, None
    if config.conditioning == "concat":
        condition = linear(p["cond"], latents)
        if mask is not None:
            condition = jnp.where(mask[..., None], p["mask_token"].astype(x.dtype), condition)
        y = y + layers.resize_nearest(condition, (h, w)).reshape(b, h * w, -1)
    else:
        context = latents.reshape(b, -1, latents.shape[-1])
        hidden = None if mask is None else mask.reshape(b, -1)
    y = y + _positions(config, (h, w)).astype(x.dtype)
    time = jax.nn.silu(time)

    def step(y: jax.Array, row: Any) -> tuple[jax.Array, jax.Array]:
        blocks, own_key, skip = row
        if skip is not None:
            y = linear(blocks["skip"], jnp.concatenate([y, skip], axis=-1))
        y = _block(config, blocks, y, time, context, hidden, own_key)
        return y, y

    kept = None
    for number, (name, depth) in enumerate(stacks(config).items()):
        keys = None if key is None else jax.random.split(jax.random.fold_in(key, number), depth)
        skip = kept[::-1] if name == "second" else None
        y, outputs = jax.lax.scan(step, y, (p[name], keys, skip))
        kept = outputs if name == "first" else kept
    return linear(p["proj_out"], y).reshape(b, h, w, c)


def apply(
    config: UViTConfig,
    params: Params,
    x: jax.Array,
    t: jax.Array,
    latents: jax.Array,
    condition_mask: jax.Array | None = None,
    original_size: jax.Array | None = None,
    key: jax.Array | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """The network's prediction for a noisy picture.

    Args:
      config: shape.
      params: see the module.
      x: [B, H, W, C], sides multiples of `config.stride`.
      t: [B], noise levels.
      latents: [B, h, w, D] of any resolution; those that are added to tokens are resized to their grid by nearest
        neighbours.
      condition_mask: bool [B, h, w], True where the network must do without the latent: a learned token stands in for
        it, or it is not attended to. Of a picture whose latents all are masked, attention sees the mean.
      original_size: [B, 2], height and width of the picture before it was resized, for `config.resolution_embedding`;
        the network is told none if None.
      key: of dropout; none without it.
      dtype: of the computation.

    Returns:
      f32 [B, H, W, C].
    """
    features = config.block_channels[0]
    time = layers.time_mlp(params["time"], t, features, dtype)
    if config.resolution_embedding and original_size is not None:
        for axis, name in enumerate(("height", "width")):
            time = time + layers.time_mlp(params[name], original_size[:, axis], features, dtype)

    y = layers.conv(params["conv_in"], x.astype(dtype), stride=config.patch_size, padding=0)
    skips, levels = [y], len(config.block_channels)
    for level in range(levels):
        p = params["down"][str(level)]
        for i in range(config.layers):
            y = layers.residual(p["res"][str(i)], y, time)
            skips.append(y)
        if "down" in p:
            y = layers.downsample(p["down"], y)
            skips.append(y)
    if config.extra_downsample:
        y = layers.downsample(params["extra_down"], y)
    y = transformer(config, params["mid"], y, time, latents.astype(dtype), condition_mask, key)
    if config.extra_downsample:
        y = layers.upsample(params["extra_up"], y)
    for level in range(levels):
        p = params["up"][str(level)]
        for i in range(config.layers + 1):
            y = layers.residual(p["res"][str(i)], jnp.concatenate([y, skips.pop()], axis=-1), time)
        if "up" in p:
            y = layers.upsample(p["up"], y)
    y = layers.from_cells(params["out"], jax.nn.silu(layers.group_norm(params["norm"], y)))
    return y.astype(jnp.float32)
