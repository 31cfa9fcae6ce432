"""The decoder one token at a time, with the keys and values of what it has seen kept.

`fm4m.model.decode` computes all slots at once; `step` gives the same hidden state for the last of them. What a layer
needs of the context never changes, and of the sequence grows by one row a token, so a token costs one pass over the
weights instead of one over the whole prefix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fm4m import model as model_lib
from fm4m.attention import Visibility, all_valid, attention
from fm4m.batch import Tokens
from fm4m.layers import Attention, DecoderLayer, apply_module
from fm4m.modalities import ModalitySet

Params = dict[str, Any]


class LayerCache(NamedTuple):
    """Keys and values [B, N, D] of the context, and [B, T, D] of the sequence, of which a beginning is filled."""

    context_key: jax.Array
    context_value: jax.Array
    key: jax.Array
    value: jax.Array


class Cache(NamedTuple):
    """Of every layer, and which context slots are valid, bool [B, N]."""

    layers: tuple[LayerCache, ...]
    valid: jax.Array


def layers_of(params: Params, config: model_lib.ModelConfig) -> list[DecoderLayer]:
    """The decoder's layers as callable modules; made once, outside of the loop over tokens."""
    depth = jax.tree.leaves(params["decoder"])[0].shape[0]
    stacks = [jax.tree.map(lambda leaf, i=i: leaf[i], params["decoder"]) for i in range(depth)]
    return [apply_module(DecoderLayer, (config,), stack) for stack in stacks]


def start(
    params: Params, config: model_lib.ModelConfig, layers: list[DecoderLayer], encoded: model_lib.Encoded, length: int
) -> Cache:
    """An empty cache for sequences of up to ``length`` tokens."""
    context = model_lib.decoder_context(params, config, encoded)
    caches = []
    for layer in layers:
        key, value = layer.cross_attention.keys_values(layer.context_norm(context))
        empty = jnp.zeros((key.shape[0], length, key.shape[2]), key.dtype)
        caches.append(LayerCache(key, value, empty, empty))
    return Cache(tuple(caches), encoded.valid)


def step(
    params: Params,
    config: model_lib.ModelConfig,
    modalities: ModalitySet,
    layers: list[DecoderLayer],
    cache: Cache,
    tokens: Tokens,
    t: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Token number ``t`` of every sequence through the decoder.

    Args:
      params, config, modalities: the model; ``layers`` as `layers_of` gives them.
      cache: of the tokens before it.
      tokens: [B, 1].
      t: int32 scalar, 0 for the first.

    Returns:
      Hidden states [B, D] after the decoder's norm, and the cache with this token.
    """
    x = model_lib.decoder_input(params, config, modalities, tokens)
    cross, caches = all_valid(cache.valid, 1), []
    for layer, kept in zip(layers, cache.layers, strict=True):
        y = layer.self_attention_norm(x)
        key, value = layer.self_attention.keys_values(y)
        kept = kept._replace(
            key=jax.lax.dynamic_update_slice_in_dim(kept.key, key, t, 1),
            value=jax.lax.dynamic_update_slice_in_dim(kept.value, value, t, 1),
        )
        caches.append(kept)
        own = all_valid(jnp.broadcast_to(jnp.arange(kept.key.shape[1]) <= t, kept.key.shape[:2]), 1)
        x += _attend(layer.self_attention, y, kept.key, kept.value, own)
        y = layer.query_norm(x)
        x += _attend(layer.cross_attention, y, kept.context_key, kept.context_value, cross)
        x += layer.mlp(layer.mlp_norm(x))
    return model_lib.decoder_output(params, config, x)[:, 0], Cache(tuple(caches), cache.valid)


def _attend(module: Attention, x: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility) -> jax.Array:
    # Kernels are made for many queries; one query is a product with a vector.
    query = module.queries(x)
    heads = query.shape[-1] // module.head_dim
    return module.out(attention(query, key, value, visibility, heads, "einsum"), joins=True)
