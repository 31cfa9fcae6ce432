"""Vision transformer blocks as functions over nested dicts: patches, positions for any grid, blocks, ConvNeXt output.

Pre-norm blocks with GELU and biases, LayerNorm eps 1e-6, fixed 2D sine-cosine positions, no final norm, then one
residual tanh MLP (ViT-VQGAN, Yu et al. 2022, section 3.2; the reference implementation's `vit_models`).

Linear kernels are [in, out]; patches are flattened in (channel, row, column) order on both ends. Blocks are stacked
along a leading axis and scanned. What comes in decides the type of the matrix products; norms and softmax are computed
in float32. Parameters stay float32 and are converted where they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.positions import grid_positions

LAYER_NORM_EPS = 1e-6
CONVNEXT_BLOCKS = 2
# ConvNeXt's layer scale starts near zero, so that an untrained head changes nothing (Liu et al. 2022, section A.1).
LAYER_SCALE_INIT = 1e-6
# PyTorch's bicubic kernel; Keys (1981) recommends -0.5, which is what `jax.image.resize` has.
CUBIC_A = -0.75

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


# ---- positions


def _cubic_weights(size: int, wanted: int) -> np.ndarray:
    """float64 [wanted, size]: each row interpolates one output among the inputs, half-pixel centres, edges repeated."""
    centre = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    left = np.floor(centre).astype(int)
    t = centre - left
    a = CUBIC_A
    near = lambda d: ((a + 2) * d - (a + 3)) * d * d + 1  # noqa: E731 (distance below 1)
    far = lambda d: ((a * d - 5 * a) * d + 8 * a) * d - 4 * a  # noqa: E731 (distance from 1 to 2)
    weights = np.zeros((wanted, size))
    for tap, weight in zip((-1, 0, 1, 2), (far(t + 1), near(t), near(1 - t), far(2 - t)), strict=True):
        np.add.at(weights, (np.arange(wanted), np.clip(left + tap, 0, size - 1)), weight)
    return weights


def resize_bicubic(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Resizes a table [h, w, D] to ``grid`` as PyTorch's ``interpolate(mode="bicubic", align_corners=False)`` does.

    Nothing is smoothed before shrinking. Computed in float64.
    """
    if table.shape[:2] == tuple(grid):
        return table
    rows, columns = (_cubic_weights(n, m) for n, m in zip(table.shape[:2], grid, strict=True))
    return np.einsum("ih,jw,hwd->ijd", rows, columns, table.astype(np.float64), optimize=True)


@functools.lru_cache(maxsize=32)
def positions(table_grid: tuple[int, int], grid: tuple[int, int], dim: int) -> np.ndarray:
    """float32 [h*w, dim]: the sine-cosine table made for ``table_grid``, resized to ``grid``."""
    table = resize_bicubic(grid_positions(table_grid, dim).reshape(*table_grid, dim), grid)
    table = table.reshape(-1, dim).astype(np.float32)
    table.setflags(write=False)
    return table


# ---- layers


def linear(p: Params, x: jax.Array) -> jax.Array:
    """x @ kernel + bias over the last axis, in the type of x."""
    kernel, bias = (p[name].astype(x.dtype) for name in ("kernel", "bias"))
    # As one matrix, because the weight gradient of a batched product takes 1.6 times as long on CPU.
    return (x.reshape(-1, x.shape[-1]) @ kernel + bias).reshape(*x.shape[:-1], -1)


def layer_norm(p: Params, x: jax.Array, eps: float = LAYER_NORM_EPS) -> jax.Array:
    """LayerNorm over the last axis, computed in float32, returned in the type of x."""
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True)
    return ((y - mean) * jax.lax.rsqrt(variance + eps) * p["scale"] + p["bias"]).astype(x.dtype)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function."""
    # erf rather than erfc as in jax.nn.gelu: the same function, and cheaper on CPU.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _attention(p: Params, x: jax.Array, heads: int) -> jax.Array:
    b, n, d = x.shape
    q, k, v = jnp.moveaxis(linear(p["qkv"], x).reshape(b, n, 3, heads, d // heads), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * (d // heads) ** -0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    return linear(p["proj"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, d))


def _mlp(p: Params, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    return linear(p["fc2"], activation(linear(p["fc1"], x)))


def transformer(
    p: Params, x: jax.Array, heads: int, grid: tuple[int, int], table_grid: tuple[int, int]
) -> jax.Array:
    """Positions, blocks and the post-MLP (where there is one) on [B, h*w, D].

    Args:
      p: {"blocks", and with a post-MLP "norm_mlp", "post_mlp"}.
      x: tokens in row-major order; their type is that of the matrix products.
      heads: of the attention.
      grid: rows and columns of the tokens.
      table_grid: rows and columns for which the positions were made.

    Returns [B, h*w, D]: float32 with a post-MLP, which is computed so as in the reference implementation's encoder.
    """
    x = x + positions(table_grid, grid, x.shape[-1]).astype(x.dtype)

    def block(x, p):
        x = x + _attention(p["attn"], layer_norm(p["norm1"], x), heads)
        return x + _mlp(p["mlp"], layer_norm(p["norm2"], x), exact_gelu), None

    x, _ = jax.lax.scan(block, x, p["blocks"])
    if "post_mlp" in p:
        x = x.astype(jnp.float32)
        x = x + _mlp(p["post_mlp"], layer_norm(p["norm_mlp"], x), jnp.tanh)
    return x


def convnext(p: Params, x: jax.Array) -> jax.Array:
    """ConvNeXt block on [B, H, W, C]: 7x7 depthwise, LayerNorm, MLP, layer scale (Liu et al. 2022)."""
    y = jax.lax.conv_general_dilated(
        x, p["dwconv"]["kernel"].astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    ) + p["dwconv"]["bias"].astype(x.dtype)  # fmt: skip
    y = linear(p["pwconv2"], exact_gelu(linear(p["pwconv1"], layer_norm(p["norm"], y))))
    return x + p["gamma"].astype(x.dtype) * y


# ---- random parameters


def init_linear(key: jax.Array, fan_in: int, fan_out: int, layers: int | None = None) -> Params:
    """Xavier-uniform kernel and zero bias, f32; stacked ``layers`` times if given."""
    lead = () if layers is None else (layers,)
    limit = (6.0 / (fan_in + fan_out)) ** 0.5
    kernel = jax.random.uniform(key, (*lead, fan_in, fan_out), minval=-limit, maxval=limit)
    return {"kernel": kernel, "bias": jnp.zeros((*lead, fan_out))}


def init_norm(dim: int, layers: int | None = None) -> Params:
    """Scale one, bias zero, f32."""
    lead = () if layers is None else (layers,)
    return {"scale": jnp.ones((*lead, dim)), "bias": jnp.zeros((*lead, dim))}


def init_transformer(keys: Iterator[jax.Array], dim: int, depth: int, mlp_ratio: float, post_mlp: bool) -> Params:
    """Parameters of `transformer`; takes a new key for every kernel."""
    hidden = int(dim * mlp_ratio)
    # q, k and v are three square maps, so each gets the limit of a square map, not that of the wide product.
    qkv = [init_linear(next(keys), dim, dim, depth)["kernel"] for _ in range(3)]
    blocks = {
        "norm1": init_norm(dim, depth),
        "attn": {
            "qkv": {"kernel": jnp.concatenate(qkv, axis=-1), "bias": jnp.zeros((depth, 3 * dim))},
            "proj": init_linear(next(keys), dim, dim, depth),
        },
        "norm2": init_norm(dim, depth),
        "mlp": {"fc1": init_linear(next(keys), dim, hidden, depth), "fc2": init_linear(next(keys), hidden, dim, depth)},
    }
    if not post_mlp:
        return {"blocks": blocks}
    post = {"fc1": init_linear(next(keys), dim, hidden), "fc2": init_linear(next(keys), hidden, dim)}
    return {"blocks": blocks, "norm_mlp": init_norm(dim), "post_mlp": post}


def init_convnext(keys: Iterator[jax.Array], dim: int) -> Params:
    """Parameters of `convnext`."""
    limit = 1.0 / 7.0  # fan-in of a depthwise 7x7 kernel is 49
    kernel = jax.random.uniform(next(keys), (7, 7, 1, dim), minval=-limit, maxval=limit)
    return {
        "dwconv": {"kernel": kernel, "bias": jnp.zeros((dim,))},
        "norm": init_norm(dim),
        "pwconv1": init_linear(next(keys), dim, 4 * dim),
        "pwconv2": init_linear(next(keys), 4 * dim, dim),
        "gamma": jnp.full((dim,), LAYER_SCALE_INIT),
    }
