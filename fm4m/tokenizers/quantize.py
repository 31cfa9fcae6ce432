"""Latents to codes and back: one door for all quantizers, as pure functions. Everything is float32.

| quantizer | codebook                                              | learnt by                          |
|-----------|-------------------------------------------------------|------------------------------------|
| cosine    | {"embed" f32 [V, D], "cluster_size" f32 [V]}          | moving averages of unit vectors    |
| euclidean | the same, and {"embed_avg" f32 [V, D]}                | moving averages, Laplace smoothing |
| memcodes  | {}; params["quantizer"], see `memcodes`               | gradients                          |
| fsq       | {}; see `fsq`                                         | nothing to learn                   |

The rules are those of the reference implementation (moving averages as in van den Oord et al. 2017, "Neural Discrete
Representation Learning", appendix A.1). Rows of a cosine codebook are moving averages of unit vectors, so they are a
little shorter than 1. The stored rows are what the decoder sees, in training and in decoding; they are never normalised
again on the way out.

Latents are [..., D] and codes [...] (memcodes: [..., num_codebooks]).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fm4m.tokenizers import fsq, memcodes
from fm4m.tokenizers.config import VQConfig

Codebook = dict[str, jax.Array]
Params = dict[str, object]

DECAY = 0.99
# Laplace smoothing of the use of Euclidean codes.
SMOOTHING = 1e-5
POLICIES = ("batch_random", "linde_buzo_gray")
# Scores are computed for so many codes at a time: 64 images of 196 tokens against 16,384 codes would take 822 MB.
BLOCK = 2048
_SPLIT_NOISE = 1e-10


def unit(x: jax.Array) -> jax.Array:
    """Divides by the L2 norm over the last axis (norm clipped at 1e-12)."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def has_codebook(config: VQConfig) -> bool:
    """Whether codes are moving averages, which `update` moves and `restart_dead` and `kmeans_init` replace."""
    return config.quantizer in ("cosine", "euclidean")


def init(config: VQConfig, key: jax.Array) -> Codebook:
    """Random codes with no use counted yet: unit vectors, or Kaiming-uniform ones (Euclidean); {} without codebook."""
    shape = config.codebook_size, config.latent_dim
    if config.quantizer == "cosine":
        return {"embed": unit(jax.random.normal(key, shape)), "cluster_size": jnp.zeros(shape[:1])}
    if config.quantizer == "euclidean":
        limit = (6.0 / config.latent_dim) ** 0.5
        embed = jax.random.uniform(key, shape, minval=-limit, maxval=limit)
        return {"embed": embed, "cluster_size": jnp.zeros(shape[:1]), "embed_avg": jnp.copy(embed)}
    return {}


def _nearest(config: VQConfig, embed: jax.Array, latents: jax.Array) -> jax.Array:
    """Index of the row with the largest cosine to, or least distance from, each latent."""
    cosine = config.quantizer == "cosine"
    latents = unit(latents) if cosine else latents
    embed = unit(embed) if cosine else embed

    def best(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Full precision: the products of accelerators' fast modes are off by more than most codes' margins.
        scores = jnp.matmul(latents, rows.T, precision="highest")
        scores = scores if cosine else 2 * scores - jnp.sum(rows * rows, axis=-1)
        return jnp.max(scores, axis=-1), jnp.argmax(scores, axis=-1).astype(jnp.int32)

    size = embed.shape[0]
    if size <= BLOCK or size % BLOCK:
        return best(embed)[1]

    def step(found, block):
        start, rows = block
        score, code = best(rows)
        better = score > found[0]  # of equal codes the first, as in one piece
        return (jnp.where(better, score, found[0]), jnp.where(better, start + code, found[1])), None

    blocks = jnp.arange(0, size, BLOCK, dtype=jnp.int32), embed.reshape(-1, BLOCK, embed.shape[1])
    none = jnp.full(latents.shape[:-1], -jnp.inf), jnp.zeros(latents.shape[:-1], jnp.int32)
    return jax.lax.scan(step, none, blocks)[0][1]


def encode(config: VQConfig, params: Params, codebook: Codebook, latents: jax.Array) -> jax.Array:
    """Codes of latents: [..., D] -> int32 [...] (memcodes [..., num_codebooks])."""
    latents = latents.astype(jnp.float32)
    if config.quantizer == "memcodes":
        return memcodes.codes(params["quantizer"], latents)
    if config.quantizer == "fsq":
        return fsq.codes(config.fsq_levels, latents)
    return _nearest(config, codebook["embed"], latents)


def lookup(config: VQConfig, params: Params, codebook: Codebook, codes: jax.Array) -> jax.Array:
    """Rows of codes, as stored: int [...] (memcodes [..., num_codebooks]) -> f32 [..., D]."""
    if config.quantizer == "memcodes":
        return memcodes.rows(params["quantizer"], codes)
    if config.quantizer == "fsq":
        return fsq.rows(config.fsq_levels, codes)
    return jnp.take(codebook["embed"], codes, axis=0)


def quantize(
    config: VQConfig, params: Params, codebook: Codebook, latents: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantises with a straight-through gradient.

    Args:
      config: decides the quantizer.
      params, codebook: as made by `vqvae_model.init_with_codebook`.
      latents: [..., D].
      key: memcodes only: draws the codes, as in training; without it the largest logit is taken.

    Returns:
      (rows f32 [..., D], codes int32, commitment loss: mean squared distance of the latents to their fixed codes, a
      scalar; 0 for memcodes and FSQ, whose latents have nothing to commit to).
    """
    latents = latents.astype(jnp.float32)
    if config.quantizer == "memcodes":
        return *memcodes.quantize(params["quantizer"], latents, key), jnp.zeros(())
    if config.quantizer == "fsq":
        return *fsq.quantize(config.fsq_levels, latents), jnp.zeros(())
    codes = encode(config, params, codebook, jax.lax.stop_gradient(latents))
    rows = jax.lax.stop_gradient(lookup(config, params, codebook, codes))
    commitment = jnp.mean(jnp.square(rows - latents))
    return latents + jax.lax.stop_gradient(rows - latents), codes, commitment


def update(
    config: VQConfig, codebook: Codebook, latents: jax.Array, codes: jax.Array, axis_name: str | None = None,
    decay: float = DECAY,
) -> Codebook:  # fmt: skip
    """One moving-average step of the codebook towards the latents assigned to it; nothing for memcodes and FSQ.

    Cosine: a used code moves to the direction of the sum of its unit latents, an unused one to its own direction.
    Euclidean: a code is the average of its latents over the smoothed average of its use.

    Args:
      config: decides the quantizer.
      codebook: the codebook that assigned `codes`.
      latents: f32 [..., D].
      codes: int32 [...].
      axis_name: mapped axis of devices (shard_map) whose counts and sums are added up, so that all get the same
        codebook. Under plain jit over a sharded batch sums are over all devices anyway.
      decay: weight of the old value, 0.99 in the reference implementation.
    """
    if not has_codebook(config):
        return codebook
    cosine = config.quantizer == "cosine"
    embed, cluster_size = codebook["embed"], codebook["cluster_size"]
    latents = latents.reshape(-1, latents.shape[-1]).astype(jnp.float32)
    latents, codes = unit(latents) if cosine else latents, codes.reshape(-1)
    counts = jnp.zeros_like(cluster_size).at[codes].add(1.0)
    sums = jnp.zeros_like(embed).at[codes].add(latents)
    if axis_name is not None:
        counts, sums = jax.lax.psum((counts, sums), axis_name)
    new = {"cluster_size": decay * cluster_size + (1.0 - decay) * counts}
    if cosine:
        direction = jnp.where(counts[:, None] > 0, unit(sums), unit(embed))
        return new | {"embed": decay * embed + (1.0 - decay) * direction}
    new["embed_avg"] = decay * codebook["embed_avg"] + (1.0 - decay) * sums
    return new | {"embed": new["embed_avg"] / _smoothed(new["cluster_size"])[:, None]}


def _smoothed(cluster_size: jax.Array) -> jax.Array:
    total = jnp.sum(cluster_size)
    return (cluster_size + SMOOTHING) / (total + len(cluster_size) * SMOOTHING) * total


def restart_dead(
    config: VQConfig, key: jax.Array, codebook: Codebook, latents: jax.Array, threshold: jax.Array | float,
    axis_name: str | None = None, policy: str = "batch_random",
) -> Codebook:  # fmt: skip
    """Replaces codes with `cluster_size` below `threshold`; nothing for memcodes and FSQ.

    A cosine code keeps its `cluster_size`, so it remains a candidate until it is used, as in the reference
    implementation. A Euclidean one gets that of the threshold: its average would otherwise forget the new place.

    Args:
      config: decides the quantizer.
      key: the same on all devices.
      codebook: codes and their use.
      latents: f32 [..., D], the batch (of this device).
      threshold: see `dead_threshold`.
      axis_name: mapped axis of devices from whose latents the new codes are taken, alike on all of them.
      policy: "batch_random" puts dead codes on random latents of the batch, "linde_buzo_gray" beside the most used
        codes, which they split (Linde et al. 1980).
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    if not has_codebook(config):
        return codebook
    cosine = config.quantizer == "cosine"
    embed, cluster_size = codebook["embed"], codebook["cluster_size"]
    dead = cluster_size < threshold
    if policy == "linde_buzo_gray":
        # The i-th dead code takes the i-th most used one.
        order = jnp.argsort(cluster_size, descending=True)
        new = embed[order[jnp.maximum(jnp.cumsum(dead) - 1, 0)]]
        new = new + _SPLIT_NOISE * jax.random.normal(key, embed.shape)
    else:
        new = _random_rows(key, latents.reshape(-1, latents.shape[-1]).astype(jnp.float32), len(embed), axis_name)
    restarted = dict(codebook, embed=jnp.where(dead[:, None], unit(new) if cosine else new, embed))
    if not cosine:
        restarted["cluster_size"] = jnp.where(dead, threshold, cluster_size)
        average = restarted["embed"] * restarted["cluster_size"][:, None]
        restarted["embed_avg"] = jnp.where(dead[:, None], average, codebook["embed_avg"])
    return restarted


def _random_rows(key: jax.Array, rows: jax.Array, count: int, axis_name: str | None) -> jax.Array:
    """``count`` random rows, f32 [count, D]; with an axis, of all devices and alike on all of them."""
    own = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    # Without replacement where there are enough: two dead codes should not become the same vector.
    picked = rows[jax.random.choice(own, len(rows), (count,), replace=len(rows) < count)]
    if axis_name is None:
        return picked
    source = jax.random.randint(key, (count, 1), 0, jax.lax.axis_size(axis_name))
    return jax.lax.psum(jnp.where(source == jax.lax.axis_index(axis_name), picked, 0.0), axis_name)


def dead_threshold(tokens_per_batch: int, size: int, coefficient: float = 32.0) -> float:
    """`cluster_size` under which a code counts as dead: uniform use divided by `coefficient` (32 in 4M's configs)."""
    return tokens_per_batch / size / coefficient


def kmeans_init(
    config: VQConfig, key: jax.Array, latents: jax.Array, tokens_per_batch: int, iterations: int = 10
) -> Codebook:
    """k-means on latents f32 [..., D]; the data-dependent start that saves the first hundreds of steps.

    Random codes cover a space of which the latents occupy a small part, so that few would ever be chosen. Every code
    starts as a latent; clusters that run empty keep their vector. `cluster_size` is that of uniform use by training
    batches of `tokens_per_batch` latents, so that no code is restarted before it had a chance.

    Raises ValueError for memcodes and FSQ, which have no codes to place.
    """
    if not has_codebook(config):
        raise ValueError(f"tokenizer {config.name!r}: k-means cannot start quantizer {config.quantizer!r}")
    cosine, size = config.quantizer == "cosine", config.codebook_size
    latents = latents.reshape(-1, latents.shape[-1]).astype(jnp.float32)
    latents = unit(latents) if cosine else latents

    def step(_, embed):
        codes = _nearest(config, embed, latents)
        sums = jnp.zeros_like(embed).at[codes].add(latents)
        counts = jnp.zeros((size,)).at[codes].add(1.0)[:, None]
        means = unit(sums) if cosine else sums / jnp.maximum(counts, 1.0)
        return jnp.where(counts > 0, means, embed)

    embed = jax.lax.fori_loop(0, iterations, step, _random_rows(key, latents, size, None))
    codebook = {"embed": embed, "cluster_size": jnp.full((size,), tokens_per_batch / size)}
    return codebook if cosine else codebook | {"embed_avg": embed * (tokens_per_batch / size)}


def usage(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Share of codes used at least once, and perplexity exp(entropy) of the code distribution.

    Args:
      counts: [V], how often each code was chosen. Perplexity is V for uniform use, 1 for a collapsed codebook.
    """
    counts = jnp.asarray(counts, jnp.float32)
    p = counts / jnp.maximum(counts.sum(), 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0.0))
    return jnp.mean(counts > 0), jnp.exp(entropy)
