"""Layers that the denoising networks share, as plain functions over nested dicts; pictures are [B, H, W, C].

Convolution kernels are [height, width, in, out], linear kernels [in, out]. Layers compute in the dtype of their input
and cast their parameters to it; normalisations and softmax compute in float32 whatever that is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.tokenizers.diffusion_config import GROUPS
from fm4m.tokenizers.vit import Params, linear

GROUP_NORM_EPS = 1e-5


# ---- parameters


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter to be made: its shape, and either the bound of a uniform distribution around 0 or a constant."""

    shape: tuple[int, ...]
    bound: float = 0.0
    constant: float = 0.0


def draw(leaves: Any, key: jax.Array) -> Params:
    """Turns a tree of `Leaf` into f32 arrays.

    All numbers come from one draw: a network has hundreds of parameters, and a program that draws each by itself takes
    minutes to compile.
    """
    flat, structure = jax.tree.flatten(leaves)
    sizes = [math.prod(leaf.shape) if leaf.bound else 0 for leaf in flat]
    numbers = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
    arrays, start = [], 0
    for leaf, size in zip(flat, sizes, strict=True):
        if leaf.bound:
            arrays.append(leaf.bound * jax.lax.slice(numbers, (start,), (start + size,)).reshape(leaf.shape))
        else:
            arrays.append(jnp.full(leaf.shape, leaf.constant, jnp.float32))
        start += size
    return jax.tree.unflatten(structure, arrays)


def _uniform(kernel: tuple[int, ...], fan_out: int, inputs: int, zero: bool = False) -> Params:
    """Kernel and bias within 1/sqrt(inputs of one output) (PyTorch's default), or zero."""
    bound = 0.0 if zero else inputs**-0.5
    return {"kernel": Leaf(kernel, bound), "bias": Leaf((fan_out,), bound)}


def make_conv(fan_in: int, fan_out: int, size: int = 3, zero: bool = False) -> Params:
    """The leaves of `conv` with a kernel of size x size."""
    return _uniform((size, size, fan_in, fan_out), fan_out, fan_in * size * size, zero)


def make_linear(fan_in: int, fan_out: int, zero: bool = False) -> Params:
    """The leaves of a linear layer."""
    return _uniform((fan_in, fan_out), fan_out, fan_in, zero)


def make_from_cells(fan_in: int, channels: int, patch: int) -> Params:
    """The leaves of `from_cells`; PyTorch counts a transposed convolution's outputs as its inputs."""
    return _uniform((fan_in, channels, patch, patch), channels, channels * patch**2)


def make_xavier(fan_in: int, fan_out: int, *lead: int, splits: int = 1) -> Params:
    """The leaves of a linear layer, or of a stack [*lead, ...] of them: Xavier-uniform kernels, zero biases.

    ``splits`` maps side by side (q, k and v) each get the bound of one.
    """
    bound = (6.0 / (fan_in + fan_out // splits)) ** 0.5
    return {"kernel": Leaf((*lead, fan_in, fan_out), bound), "bias": Leaf((*lead, fan_out))}


def make_norm(width: int, *lead: int) -> Params:
    """Scale one, bias zero."""
    return {"scale": Leaf((*lead, width), constant=1.0), "bias": Leaf((*lead, width))}


def make_residual(
    fan_in: int, fan_out: int, time: int, dense: Callable[[int, int], Params] = make_linear
) -> Params:
    """The leaves of `residual`. Its last convolution starts at zero, which makes the block its shortcut.

    ``dense`` makes the layer that the time embedding passes.
    """
    p = {
        "norm1": make_norm(fan_in),
        "conv1": make_conv(fan_in, fan_out),
        "time": dense(time, fan_out),
        "norm2": make_norm(fan_out),
        "conv2": make_conv(fan_out, fan_out, zero=True),
    }
    if fan_in != fan_out:
        p["shortcut"] = make_conv(fan_in, fan_out, size=1)
    return p


def make_time_mlp(features: int, width: int, dense: Callable[[int, int], Params] = make_linear) -> Params:
    """The leaves of `time_mlp`, both layers made by ``dense``."""
    return {"fc1": dense(features, width), "fc2": dense(width, width)}


# ---- layers


def conv(p: Params, x: jax.Array, stride: int = 1, padding: int | None = None) -> jax.Array:
    """Convolution of [B, H, W, C]; ``padding`` zeros on every side, half the kernel if None."""
    size = p["kernel"].shape[0]
    pad = size // 2 if padding is None else padding
    y = jax.lax.conv_general_dilated(
        x, p["kernel"].astype(x.dtype), (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p["bias"].astype(x.dtype)


def group_norm(p: Params, x: jax.Array) -> jax.Array:
    """Group normalisation of [B, ..., C] in float32: 32 groups, eps 1e-5; result in x's dtype."""
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, GROUPS, x.shape[-1] // GROUPS)
    mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
    variance = jnp.mean(jnp.square(grouped - mean), axis=(1, 3), keepdims=True)
    y = ((grouped - mean) * jax.lax.rsqrt(variance + GROUP_NORM_EPS)).reshape(x.shape)
    return (y * p["scale"].astype(jnp.float32) + p["bias"].astype(jnp.float32)).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements at ``rate`` and scales the others up; the identity without a key or a rate."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def time_features(t: jax.Array, width: int) -> jax.Array:
    """Numbers [B] as f32 [B, width]: cosines, then sines, of t / 10000^(i / (width/2))."""
    frequencies = np.exp(-math.log(10000.0) * np.arange(width // 2) / (width // 2)).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def time_mlp(p: Params, t: jax.Array, width: int, dtype: jnp.dtype) -> jax.Array:
    """Linear, SiLU, linear on `time_features` of that width: [B, 4 * width] in ``dtype``."""
    return linear(p["fc2"], jax.nn.silu(linear(p["fc1"], time_features(t, width).astype(dtype))))


def residual(p: Params, x: jax.Array, time: jax.Array, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """Residual block: norm, SiLU, 3x3 conv, + time, norm, SiLU, dropout, 3x3 conv (Ho et al. 2020, appendix B).

    ``time`` is the time embedding [B, T].
    """
    y = conv(p["conv1"], jax.nn.silu(group_norm(p["norm1"], x)))
    y = y + linear(p["time"], jax.nn.silu(time))[:, None, None]
    y = conv(p["conv2"], dropout(jax.nn.silu(group_norm(p["norm2"], y)), rate, key))
    return y + (conv(p["shortcut"], x) if "shortcut" in p else x)


def downsample(p: Params, x: jax.Array) -> jax.Array:
    """3x3 convolution with stride 2: half the resolution."""
    return conv(p, x, stride=2)


def upsample(p: Params, x: jax.Array) -> jax.Array:
    """Every cell twice along both axes, then a 3x3 convolution."""
    return conv(p, jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, hidden: jax.Array | None = None) -> jax.Array:
    """Attention of q [B, N, heads, D] to k, v [B, M, heads, D] with a float32 softmax; [B, N, heads * D].

    ``hidden`` bool [B, M] says what cannot be seen; where that is everything, all have the same weight (the reference
    implementation's masks too are a finite number).
    """
    # Either factor gets half of the scale, which keeps the products in range in bf16 and fp16.
    scale = q.shape[-1] ** -0.25
    logits = jnp.einsum("bnhd,bmhd->bhnm", q * scale, k * scale, preferred_element_type=jnp.float32)
    if hidden is not None:
        logits = jnp.where(hidden[:, None, None], jnp.finfo(jnp.float32).min, logits)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(*q.shape[:2], -1)


def to_cells(x: jax.Array, patch: int) -> jax.Array:
    """Pixel-unshuffle: [B, H, W, C] -> [B, H/p, W/p, C*p*p], channels in (channel, row, column) order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // patch, w // patch, c * patch * patch)


def to_pixels(x: jax.Array, patch: int) -> jax.Array:
    """Inverse of `to_cells`."""
    b, h, w, width = x.shape
    x = x.reshape(b, h, w, width // patch**2, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * patch, w * patch, width // patch**2)


def from_cells(p: Params, x: jax.Array) -> jax.Array:
    """Transposed convolution whose stride is its size: [B, h, w, D] -> [B, h*p, w*p, C].

    The kernel is [D, C, p, p], the bias [C].
    """
    kernel = p["kernel"].astype(x.dtype)
    return to_pixels(x @ kernel.reshape(x.shape[-1], -1), kernel.shape[-1]) + p["bias"].astype(x.dtype)


def resize_nearest(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[B, h, w, ...] -> [B, *grid, ...]: cell i of the result is cell floor(i * old / new) along each axis.

    The product is rounded to float32 as in PyTorch, which misses a whole number for some pairs of sizes (2 -> 82).
    """
    for axis, (old, new) in enumerate(zip(x.shape[1:3], grid, strict=True), start=1):
        if old != new:
            nearest = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
            x = jnp.take(x, np.minimum(nearest.astype(np.int32), old - 1), axis=axis)
    return x
