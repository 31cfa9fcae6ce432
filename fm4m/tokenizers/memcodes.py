"""Memory codes: a latent is cut into slices, and each attends to one code of its own codebook (the reference
implementation's quantizer of global features and poses, after NWT, Chen et al. 2021).

    keys, values = codes @ to_k, codes @ to_v        logits = slice d^-1/2 . keys        row = value of one code

Codes and both maps are ordinary parameters that gradients train: {"codes": f32 [heads, V, d], "to_k", "to_v": f32
[heads, d, d]}. In training the code is drawn by a Gumbel softmax at temperature 1, whose gradient replaces that of the
choice (Jang et al. 2017); otherwise it is the largest logit. There is no commitment loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fm4m.tokenizers.vit import Params


def init(key: jax.Array, heads: int, size: int, dim: int) -> Params:
    """Unit-normal codes, and maps whose output is as large as their input (uniform up to dim^-1/2, as PyTorch's)."""
    keys = jax.random.split(key, 3)
    limit = dim**-0.5
    maps = [jax.random.uniform(k, (heads, dim, dim), minval=-limit, maxval=limit) for k in keys[1:]]
    return {"codes": jax.random.normal(keys[0], (heads, size, dim)), "to_k": maps[0], "to_v": maps[1]}


def _map(codes: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("hnd,hdc->hnc", codes, kernel, precision="highest")


def logits(p: Params, latents: jax.Array) -> jax.Array:
    """f32 [..., heads * d] -> f32 [..., heads, V]."""
    heads, _, dim = p["codes"].shape
    queries = latents.astype(jnp.float32).reshape(*latents.shape[:-1], heads, dim) * dim**-0.5
    return jnp.einsum("...hd,hnd->...hn", queries, _map(p["codes"], p["to_k"]), precision="highest")


def codes(p: Params, latents: jax.Array) -> jax.Array:
    """The code of each slice: f32 [..., heads * d] -> int32 [..., heads]."""
    return jnp.argmax(logits(p, latents), axis=-1).astype(jnp.int32)


def rows(p: Params, codes: jax.Array) -> jax.Array:
    """Values of codes: int [..., heads] -> f32 [..., heads * d]."""
    values = _map(p["codes"], p["to_v"])
    picked = values[jnp.arange(values.shape[0]), codes]
    return picked.reshape(*codes.shape[:-1], -1)


def quantize(p: Params, latents: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(rows f32 [..., heads * d], codes int32 [..., heads]); gradients are those of the softmax.

    With a key the logits get Gumbel noise, as in training; without one the largest wins.
    """
    scores = logits(p, latents)
    if key is not None:
        scores = scores + jax.random.gumbel(key, scores.shape)
    soft = jax.nn.softmax(scores, axis=-1)
    chosen = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    hard = jax.nn.one_hot(chosen, scores.shape[-1], dtype=soft.dtype)
    attention = soft + jax.lax.stop_gradient(hard - soft)
    values = _map(p["codes"], p["to_v"])
    out = jnp.einsum("...hn,hnd->...hd", attention, values, precision="highest")
    return out.reshape(latents.shape), chosen
