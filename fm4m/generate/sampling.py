"""Logits to tokens: guidance, temperature, top-k, top-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# Below this temperature the likeliest token is taken.
GREEDY = 1e-6


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which tokens may be drawn at all.

    Attributes:
      top_k: the likeliest ones only: their number, or below 1 their share of the vocabulary; 0 for all.
      top_p: the likeliest ones whose probabilities add up to at least this; 0 or 1 for all.
      tempered: filter the probabilities at the sampling temperature, as is usual; otherwise those at temperature 1, as
        the reference implementation does.
    """

    top_k: float = 0
    top_p: float = 0.0
    tempered: bool = False

    def __post_init__(self):
        if not (self.top_k >= 0 and (self.top_k < 1 or self.top_k == int(self.top_k))):
            raise ValueError(f"top_k = {self.top_k} must be a whole number, or a share between 0 and 1")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be from 0 to 1")


def keep(logits: jax.Array, chosen: Filter) -> jax.Array:
    """Logits float32 [..., V] with -inf for the tokens that the filter leaves out: first top-k, then top-p.

    Of tokens with equal logits at the edge of top-k all stay.
    """
    vocab = logits.shape[-1]
    if chosen.top_k:
        k = int(chosen.top_k) if chosen.top_k >= 1 else max(1, int(chosen.top_k * vocab))
        edge = jax.lax.top_k(logits, min(k, vocab))[0][..., -1:]
        logits = jnp.where(logits < edge, -jnp.inf, logits)
    if 0 < chosen.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked, -1), -1) - jax.nn.softmax(ranked, -1)
        # The token that crosses the limit stays, and with it the likeliest one always.
        edge = jnp.where(before <= chosen.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < edge, -jnp.inf, logits)
    return logits


def sample(
    keys: jax.Array, logits: jax.Array, temperature: jax.Array | float, chosen: Filter
) -> tuple[jax.Array, jax.Array]:
    """Draws a token at every position.

    Args:
      keys: one key a sample, [B]: what is drawn for a sample does not depend on its neighbours.
      logits: float32 [B, ..., V].
      temperature: scalar; below `GREEDY` the likeliest token is taken.
      chosen: the filter.

    Returns:
      Tokens int32 [B, ...] and their probabilities float32 [B, ...] under the distribution that they were drawn from;
      with a temperature of 0, under that of temperature 1.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    greedy = temperature < GREEDY
    scale = jnp.where(greedy, 1.0, temperature)
    scaled = keep(logits / scale, chosen) if chosen.tempered else keep(logits, chosen) / scale
    drawn = jax.vmap(lambda key, row: jax.random.categorical(key, row, axis=-1))(keys, scaled)
    tokens = jnp.where(greedy, jnp.argmax(logits, -1), drawn).astype(jnp.int32)
    chances = jnp.where(greedy, jax.nn.softmax(logits, -1), jax.nn.softmax(scaled, -1))
    return tokens, jnp.take_along_axis(chances, tokens[..., None], -1)[..., 0]


def guide(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Classifier-free guidance: ``l_0 + sum_i weights_i (l_i - l_0)`` (Ho and Salimans 2022; 4M, multi-guidance).

    ``logits`` [1 + C, ...]: without conditions, then with each; ``weights`` [C], which may be negative. With one branch
    alone nothing is combined.
    """
    if logits.shape[0] == 1:
        return logits[0]
    return logits[0] + jnp.tensordot(weights, logits[1:] - logits[:1], axes=1)
