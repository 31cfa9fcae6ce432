"""Finite scalar quantisation (Mentzer et al. 2023): every latent channel is rounded to one of a few values.

Channel i takes the L_i values (k - floor(L_i / 2)) / floor(L_i / 2), k = 0..L_i - 1; a code is the number whose digits
are the k of all channels, the first channel changing fastest. There is nothing to learn and nothing that can die.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Keeps the outermost values a little inside the range that tanh cannot reach (the paper's listing).
_MARGIN = 1e-3


def _digits(levels: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels, their halves and the place values, int32 [D] each."""
    levels = np.asarray(levels, np.int32)
    return levels, levels // 2, np.concatenate([[1], np.cumprod(levels[:-1])]).astype(np.int32)


def bound(levels: Sequence[int], latents: jax.Array) -> jax.Array:
    """Squashes latents [..., D] so that rounding gives one of L_i whole numbers, which start at -floor(L_i / 2)."""
    levels = np.asarray(levels)
    half = (levels - 1) * (1 - _MARGIN) / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    shift = np.tan(offset / half)
    half, offset, shift = (x.astype(np.float32) for x in (half, offset, shift))
    return jnp.tanh(latents.astype(jnp.float32) + shift) * half - offset


def codes(levels: Sequence[int], latents: jax.Array) -> jax.Array:
    """Nearest codes: f32 [..., D] -> int32 [...]."""
    _, half, places = _digits(levels)
    digits = jnp.round(bound(levels, latents)).astype(jnp.int32) + half
    return jnp.sum(digits * places, axis=-1, dtype=jnp.int32)


def rows(levels: Sequence[int], codes: jax.Array) -> jax.Array:
    """Vectors of codes: int [...] -> f32 [..., D] in [-1, 1]."""
    levels, half, places = _digits(levels)
    digits = jnp.asarray(codes, jnp.int32)[..., None] // places % levels
    return (digits - half).astype(jnp.float32) / half.astype(np.float32)


def codes_of_rows(levels: Sequence[int], rows: jax.Array) -> jax.Array:
    """Inverse of `rows`: f32 [..., D] -> int32 [...]."""
    _, half, places = _digits(levels)
    digits = jnp.round(rows * half.astype(np.float32)).astype(jnp.int32) + half
    return jnp.sum(digits * places, axis=-1, dtype=jnp.int32)


def quantize(levels: Sequence[int], latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rows f32 [..., D] whose gradient is that of the squashed latents, codes int32 [...])."""
    half = _digits(levels)[1].astype(np.float32)
    squashed = bound(levels, latents) / half
    chosen = codes(levels, latents)
    return squashed + jax.lax.stop_gradient(rows(levels, chosen) - squashed), chosen
