"""Bottleneck MLP on single vectors: the encoder and decoder of global features and poses.

    linear in -> blocks of x + fc2(GELU(fc1(LayerNorm(x)))) -> linear out    (Bachmann et al. 2023, "Scaling MLPs")

Every position of a map is treated alone. Blocks are stacked along a leading axis and scanned.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax

from fm4m.tokenizers.vit import Params, exact_gelu, init_linear, init_norm, layer_norm, linear

# PyTorch's default, which the reference implementation has here; its ViTs have 1e-6.
LAYER_NORM_EPS = 1e-5


def bottleneck_mlp(p: Params, x: jax.Array) -> jax.Array:
    """[..., in] -> [..., out] with p = {"linear_in", "blocks": {"norm", "fc1", "fc2"}, "linear_out"}."""

    def block(x, p):
        hidden = exact_gelu(linear(p["fc1"], layer_norm(p["norm"], x, LAYER_NORM_EPS)))
        return x + linear(p["fc2"], hidden), None

    x, _ = jax.lax.scan(block, linear(p["linear_in"], x), p["blocks"])
    return linear(p["linear_out"], x)


def init_bottleneck_mlp(
    keys: Iterator[jax.Array], fan_in: int, fan_out: int, dim: int, depth: int, mlp_ratio: float
) -> Params:
    """Parameters of `bottleneck_mlp`; takes a new key for every kernel."""
    hidden = int(dim * mlp_ratio)
    blocks = {
        "norm": init_norm(dim, depth),
        "fc1": init_linear(next(keys), dim, hidden, depth),
        "fc2": init_linear(next(keys), hidden, dim, depth),
    }
    ends = init_linear(next(keys), fan_in, dim), init_linear(next(keys), dim, fan_out)
    return {"linear_in": ends[0], "blocks": blocks, "linear_out": ends[1]}
