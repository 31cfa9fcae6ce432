"""Cosine codebook learnt by exponential moving average, as pure functions on {"embed", "cluster_size"}.

The rules are those of the reference implementation's image tokenizers (moving averages as in van den Oord et al. 2017,
"Neural Discrete Representation Learning", appendix A.1, over unit vectors). Everything is float32.

    codebook = {"embed": f32 [V, D], "cluster_size": f32 [V]}

Rows of `embed` are moving averages of unit vectors, so they are a little shorter than 1. The stored rows are what the
decoder sees, in training and in decoding; they are never normalised again on the way out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Codebook = dict[str, jax.Array]


def unit(x: jax.Array) -> jax.Array:
    """Divides by the L2 norm over the last axis (norm clipped at 1e-12)."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def init_codebook(key: jax.Array, size: int, dim: int) -> Codebook:
    """`size` random unit vectors of width `dim`, with no use counted yet."""
    return {"embed": unit(jax.random.normal(key, (size, dim))), "cluster_size": jnp.zeros((size,))}


def nearest(codebook: Codebook, latents: jax.Array) -> jax.Array:
    """Index of the code with the largest cosine to each latent: f32 [..., D] -> int32 [...]."""
    return jnp.argmax(unit(latents) @ unit(codebook["embed"]).T, axis=-1).astype(jnp.int32)


def lookup(codebook: Codebook, codes: jax.Array) -> jax.Array:
    """Stored rows of `codes`: int [...] -> f32 [..., D]."""
    return jnp.take(codebook["embed"], codes, axis=0)


def quantize(codebook: Codebook, latents: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantises with a straight-through gradient.

    Returns (quantised f32 [..., D] whose gradient is that of `latents`, codes int32 [...], commitment loss scalar:
    mean squared distance of the latents to their fixed codes).
    """
    latents = latents.astype(jnp.float32)
    codes = nearest(codebook, jax.lax.stop_gradient(latents))
    rows = jax.lax.stop_gradient(lookup(codebook, codes))
    commitment = jnp.mean(jnp.square(rows - latents))
    return latents + jax.lax.stop_gradient(rows - latents), codes, commitment


def update(codebook: Codebook, latents: jax.Array, codes: jax.Array, decay: float = 0.99) -> Codebook:
    """One moving-average step of the codebook towards the latents assigned to it.

    A used code moves to the direction of the sum of its unit latents; an unused one to its own direction.

    Args:
      codebook: the codebook that assigned `codes`.
      latents: f32 [N, D].
      codes: int32 [N].
      decay: weight of the old value, 0.99 in the reference implementation.
    """
    embed, cluster_size = codebook["embed"], codebook["cluster_size"]
    counts = jnp.zeros_like(cluster_size).at[codes].add(1.0)
    sums = jnp.zeros_like(embed).at[codes].add(unit(latents.astype(jnp.float32)))
    direction = jnp.where(counts[:, None] > 0, unit(sums), unit(embed))
    return {
        "embed": decay * embed + (1.0 - decay) * direction,
        "cluster_size": decay * cluster_size + (1.0 - decay) * counts,
    }


def restart_dead(key: jax.Array, codebook: Codebook, latents: jax.Array, threshold: jax.Array | float) -> Codebook:
    """Replaces codes with `cluster_size` below `threshold` by random unit latents of the batch (f32 [N, D]).

    `cluster_size` stays, so a restarted code remains a candidate until it is used, as in the reference implementation.
    """
    size = codebook["embed"].shape[0]
    # Without replacement where the batch has enough latents: two dead codes should not become the same vector.
    picks = jax.random.choice(key, latents.shape[0], (size,), replace=latents.shape[0] < size)
    dead = codebook["cluster_size"] < threshold
    return {**codebook, "embed": jnp.where(dead[:, None], unit(latents[picks].astype(jnp.float32)), codebook["embed"])}


def dead_threshold(tokens_per_batch: int, size: int, coefficient: float = 32.0) -> float:
    """`cluster_size` under which a code counts as dead: uniform use divided by `coefficient` (32 in 4M's configs)."""
    return tokens_per_batch / size / coefficient


def kmeans_init(
    key: jax.Array, latents: jax.Array, size: int, tokens_per_batch: int, iterations: int = 10
) -> Codebook:
    """Spherical k-means on latents f32 [N, D]; the data-dependent start that saves the first hundreds of steps.

    Random codes cover a sphere of which the latents occupy a small part, so that few would ever be chosen. Every code
    starts as a latent; clusters that run empty keep their vector. `cluster_size` is that of uniform use
    by training batches of `tokens_per_batch` latents, so that no code is restarted before it had a chance.
    """
    latents = unit(latents.astype(jnp.float32))
    count = latents.shape[0]
    start = latents[jax.random.choice(key, count, (size,), replace=count < size)]

    def step(_, embed):
        codes = jnp.argmax(latents @ embed.T, axis=-1)
        sums = jnp.zeros_like(embed).at[codes].add(latents)
        used = jnp.zeros((size,)).at[codes].add(1.0) > 0
        return jnp.where(used[:, None], unit(sums), embed)

    embed = jax.lax.fori_loop(0, iterations, step, start)
    return {"embed": embed, "cluster_size": jnp.full((size,), tokens_per_batch / size)}


def usage(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Share of codes used at least once, and perplexity exp(entropy) of the code distribution.

    Args:
      counts: [V], how often each code was chosen. Perplexity is V for uniform use, 1 for a collapsed codebook.
    """
    counts = jnp.asarray(counts, jnp.float32)
    p = counts / jnp.maximum(counts.sum(), 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0.0))
    return jnp.mean(counts > 0), jnp.exp(entropy)
