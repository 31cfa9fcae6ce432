"""The encoder-decoder of 4M: configuration, parameters, forward pass.

Parameters are one nested dict of float32 arrays with stable names, and the model is plain functions of it; layers are
stacked along a leading axis. The functions that run the model take an optional ``at_use``: a function of a stack's name
and the parameters of one of its layers (without the layer axis) that is called where the layer is run, inside the
scanned and rematerialised body. It is where split weights are gathered; all other parameters are given whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.attention import Visibility, all_valid
from fm4m.batch import PackedBatch, Tokens
from fm4m.collectives import take_rows
from fm4m.layers import (
    ALIGNED_CONTEXT,
    REMAT_POLICIES,
    DecoderLayer,
    EncoderLayer,
    LayerNorm,
    Linear,
    apply_module,
    init_module,
)
from fm4m.modalities import ModalitySet
from fm4m.positions import fixed_position_table
from fm4m.sizes import SIZES, ModelConfig, model_config

__all__ = [
    "SIZES",
    "Encoded",
    "ModelConfig",
    "decode",
    "encode",
    "forward",
    "head_table",
    "init_params",
    "model_config",
    "param_counts",
]

EMBEDDING_STD = 0.02

Params = dict[str, Any]
AtUse = Callable[[str, Params], Params]


# ---- parameters


def init_params(config: ModelConfig, modalities: ModalitySet, key: jax.Array) -> Params:
    """A nested dict of float32 parameters, initialised as the reference implementation does.

    Linear weights are Xavier uniform, embeddings N(0, 0.02), biases 0, norms 1. A tied token table counts as a linear
    weight: Xavier uniform with bound sqrt(6 / (V + D)) for each modality's V. Padding rows of tables are 0. What a
    tensor is drawn from depends on its name (and a table's rows on the modality's name), not on the other tensors.

    Groups: ``encoder_embedding`` (tokens [input_rows, D], modality [num modalities, D], positions [learned rows, D],
    projections by modality, registers [R, D]), ``encoder`` (stacked layers), ``encoder_norm``, ``context_projection``,
    ``decoder_embedding`` (tokens [output_rows, D], mask_token [D], modality and positions as above), ``decoder``,
    ``decoder_norm``, ``head`` (tokens [output_rows, D], unless tied). What a configuration does not need is absent.

    Raises ValueError if nothing can be predicted.
    """
    if not modalities.outputs:
        raise ValueError("the modality set has no outputs: the decoder would have nothing to predict")
    dim = config.dim

    def key_of(*names: str) -> jax.Array:
        return jax.random.fold_in(key, np.uint32(zlib.crc32("/".join(names).encode())))

    def normal(name: str, *shape: int) -> jax.Array:
        return EMBEDDING_STD * jax.random.normal(key_of(name), shape, jnp.float32)

    def table(name: str, offsets: dict[str, int], rows: int, xavier: bool) -> jax.Array:
        parts, ends = [], [*offsets.values(), rows]
        for (modality, start), end in zip(offsets.items(), ends[1:], strict=True):
            shape = (modalities[modality].vocab_size, dim)
            k = key_of(name, modality)
            if xavier:
                bound = math.sqrt(6 / sum(shape))
                drawn = jax.random.uniform(k, shape, jnp.float32, -bound, bound)
            else:
                drawn = EMBEDDING_STD * jax.random.normal(k, shape, jnp.float32)
            parts.append(jnp.pad(drawn, ((0, end - start - shape[0]), (0, 0))))
        return jnp.concatenate(parts)

    def layers(name: str, kind: type, depth: int) -> Params:
        return jax.vmap(functools.partial(init_module, kind, (config,)))(jax.random.split(key_of(name), depth))

    encoder, decoder = {}, {"mask_token": normal("mask_token", dim)}
    if modalities.input_rows:
        encoder["tokens"] = table("encoder_tokens", modalities.input_offset, modalities.input_rows, False)
    decoder["tokens"] = table("decoder_tokens", modalities.output_offset, modalities.output_rows, config.tied_heads)
    encoder["modality"] = normal("encoder_modality", len(modalities), dim)
    if not config.share_modality_embeddings:
        decoder["modality"] = normal("decoder_modality", len(modalities), dim)
    if modalities.learned_position_rows:
        encoder["positions"] = normal("encoder_positions", modalities.learned_position_rows, dim)
        decoder["positions"] = normal("decoder_positions", modalities.learned_position_rows, dim)
    if modalities.continuous:
        encoder["projections"] = {
            name: init_module(Linear, _projection_args(config, modalities, name), key_of("projections", name))
            for name in modalities.continuous
        }
    if config.num_register_tokens:
        encoder["registers"] = normal("registers", config.num_register_tokens, dim)
    context = init_module(Linear, _context_args(config), key_of("context_projection"))
    if config.attention_init == "aligned":
        # The decoder then looks for positions first, which the context holds beside the projected content.
        context["kernel"] = ALIGNED_CONTEXT * context["kernel"]
    params = {
        "encoder_embedding": encoder,
        "encoder": layers("encoder", EncoderLayer, config.encoder_depth),
        "encoder_norm": init_module(LayerNorm, _norm_args(config), key_of("encoder_norm")),
        "context_projection": context,
        "decoder_embedding": decoder,
        "decoder": layers("decoder", DecoderLayer, config.decoder_depth),
        "decoder_norm": init_module(LayerNorm, _norm_args(config), key_of("decoder_norm")),
    }
    if not config.tied_heads:
        params["head"] = {"tokens": table("head", modalities.output_offset, modalities.output_rows, True)}
    return params


def _norm_args(config: ModelConfig) -> tuple:
    return config.dim, config.norm_bias


def _context_args(config: ModelConfig) -> tuple:
    return config.dim, config.dim, True


def _projection_args(config: ModelConfig, modalities: ModalitySet, name: str) -> tuple:
    return modalities[name].patch_dim, config.dim, modalities[name].kind == "embedding"


def param_counts(config: ModelConfig, modalities: ModalitySet) -> dict[str, int]:
    """Numbers of parameters, from shapes alone, without the padding rows of tables and rows that nothing uses.

    The columns that ``mlp_multiple`` adds are not counted either. Keys: ``encoder`` (layers and norm), ``decoder``
    (layers, norm, context projection, mask token), ``trunk`` (both: what 4M's papers call the size of the model),
    ``embeddings`` (tables, projections, registers, heads), ``total``.
    """
    config = dataclasses.replace(config, mlp_multiple=1)
    shapes = jax.eval_shape(lambda k: init_params(config, modalities, k), jax.random.key(0))

    def size(*path: str) -> int:
        tree = shapes
        for name in path:
            tree = tree.get(name, {})
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    outputs, inputs, dim = set(modalities.outputs), set(modalities.inputs), config.dim
    encoder = size("encoder") + size("encoder_norm")
    decoder = size("decoder") + size("decoder_norm") + size("context_projection") + dim
    tables = sum(modalities[n].vocab_size for n in inputs)
    tables += (1 if config.tied_heads else 2) * sum(modalities[n].vocab_size for n in outputs)
    modality = len(inputs | outputs) if config.share_modality_embeddings else len(inputs) + len(outputs)
    learned = [m for m in modalities.modalities if m.learned_positions]
    positions = sum(m.max_tokens * ((m.name in inputs) + (m.name in outputs)) for m in learned)
    embeddings = dim * (tables + modality + positions)
    embeddings += size("encoder_embedding", "projections") + size("encoder_embedding", "registers")
    counts = {"encoder": encoder, "decoder": decoder, "trunk": encoder + decoder, "embeddings": embeddings}
    return {**counts, "total": counts["trunk"] + embeddings}


def head_table(params: Params, config: ModelConfig) -> jax.Array:
    """float32 [output_rows, D]: the output head, whose rows `PackedBatch.target` counts."""
    return params["decoder_embedding" if config.tied_heads else "head"]["tokens"]


# ---- forward


class Encoded(NamedTuple):
    """What the decoder needs of the encoder.

    Attributes:
      hidden: [B, R + N, D], after the encoder's norm; R register tokens come first.
      embedding: [B, R + N, D], position plus modality embedding; 0 for registers and invalid slots.
      valid: bool [B, R + N].
    """

    hidden: jax.Array
    embedding: jax.Array
    valid: jax.Array


@jax.named_scope("encoder")
def encode(
    params: Params,
    config: ModelConfig,
    modalities: ModalitySet,
    tokens: Tokens,
    dense: dict[str, jax.Array],
    at_use: AtUse | None = None,
) -> Encoded:
    """Runs the encoder on the visible tokens.

    Args:
      params: see `init_params`.
      config: the configuration the parameters were made for.
      modalities: the modality set the parameters were made for.
      tokens: the visible tokens, [B, N].
      dense: vectors of the continuous inputs by name, [B, continuous_count, patch_dim].
      at_use: see the module's docstring.
    """
    group = params["encoder_embedding"]
    content, dtype = None, jnp.dtype(config.dtype)
    if modalities.input_rows:
        content = take_rows(group["tokens"], tokens.row).astype(dtype)
    if modalities.continuous:
        projected = []
        for name in modalities.continuous:
            projection = apply_module(Linear, _projection_args(config, modalities, name), group["projections"][name])
            projected.append(projection(dense[name].astype(dtype)))
        vectors = jax.vmap(take_rows)(jnp.concatenate(projected, 1), tokens.row)
        continuous = _by_modality(modalities.is_continuous, tokens)
        content = vectors if content is None else jnp.where(continuous, vectors, content)
    embedding = _embedding(group, group["modality"], config, modalities, tokens)
    content = _zero_invalid(content, tokens)
    x, valid = content + embedding, tokens.valid
    if config.num_register_tokens:
        count, slots = group["registers"].shape[0], x.shape[1]
        x = jnp.pad(x, ((0, 0), (count, 0), (0, 0))) + jnp.pad(group["registers"], ((0, slots), (0, 0))).astype(dtype)
        embedding = jnp.pad(embedding, ((0, 0), (count, 0), (0, 0)))
        valid = jnp.pad(valid, ((0, 0), (count, 0)), constant_values=True)
    x = _run_layers("encoder", EncoderLayer, params["encoder"], config, at_use, x, all_valid(valid, valid.shape[1]))
    hidden = apply_module(LayerNorm, _norm_args(config), params["encoder_norm"])(x)
    return Encoded(hidden, embedding, valid)


@jax.named_scope("decoder")
def decode(
    params: Params,
    config: ModelConfig,
    modalities: ModalitySet,
    encoded: Encoded,
    tokens: Tokens,
    at_use: AtUse | None = None,
    own: Visibility | None = None,
    kind: type[DecoderLayer] = DecoderLayer,
) -> jax.Array:
    """Runs the decoder on the query tokens [B, M]; returns hidden states [B, M, D] after the decoder's norm.

    Every slot sees everything the encoder saw, and of the decoder what ``own`` says, by default `decoder_visibility`.
    ``kind`` runs a layer with the parameters of a `DecoderLayer`.
    """
    context = decoder_context(params, config, encoded)
    x = decoder_input(params, config, modalities, tokens)
    own = decoder_visibility(config, modalities, tokens) if own is None else own
    cross = all_valid(encoded.valid, x.shape[1])
    x = _run_layers("decoder", kind, params["decoder"], config, at_use, x, context, own, cross)
    return decoder_output(params, config, x)


def decoder_context(params: Params, config: ModelConfig, encoded: Encoded) -> jax.Array:
    """[B, N, D]: the projected encoder output plus the position and modality embedding once more."""
    return apply_module(Linear, _context_args(config), params["context_projection"])(encoded.hidden) + encoded.embedding


def decoder_input(params: Params, config: ModelConfig, modalities: ModalitySet, tokens: Tokens) -> jax.Array:
    """[B, M, D]: what the first layer of the decoder gets; a token of a sequence, or the mask token of a grid."""
    group, dtype = params["decoder_embedding"], jnp.dtype(config.dtype)
    modality_table = (params["encoder_embedding"] if config.share_modality_embeddings else group)["modality"]
    sequence = _by_modality(modalities.is_sequence, tokens)
    content = take_rows(group["tokens"], tokens.row).astype(dtype)
    content = jnp.where(sequence, content, group["mask_token"].astype(dtype))
    return _zero_invalid(content, tokens) + _embedding(group, modality_table, config, modalities, tokens)


def decoder_output(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
    """The decoder's last norm."""
    return apply_module(LayerNorm, _norm_args(config), params["decoder_norm"])(x)


def own_logits(params: Params, config: ModelConfig, modalities: ModalitySet, name: str, hidden: jax.Array) -> jax.Array:
    """float32 [..., vocabulary] of one modality's head for decoder states [..., D]."""
    start, stop = modalities.output_ranges[modalities.index(name)]
    return jnp.dot(hidden, head_table(params, config)[start:stop].T.astype(hidden.dtype)).astype(jnp.float32)


def decoder_visibility(config: ModelConfig, modalities: ModalitySet, tokens: Tokens) -> Visibility:
    """Which valid decoder slots each slot sees.

    A sequence's token sees its modality's tokens that are not later, a grid's token all of its modality. Without
    ``decoder_sep_mask`` both also see the modalities that come before their own in the batch; with
    ``decoder_causal_mask`` nothing sees a later slot.
    """
    slot = jnp.broadcast_to(jnp.arange(tokens.row.shape[1], dtype=jnp.int32), tokens.row.shape)
    group = tokens.modality if config.decoder_sep_mask else jnp.zeros_like(tokens.modality)
    limit = slot
    if not config.decoder_causal_mask:
        # Tokens of a modality are contiguous, so "not later, or of its own modality" is "up to its modality's last".
        own = (tokens.modality[..., None] == jnp.arange(len(modalities))) & tokens.valid[..., None]
        last = jnp.where(own, slot[..., None], -1).max(1)
        last = jnp.take_along_axis(last, tokens.modality, axis=1)
        limit = jnp.where(_by_modality(modalities.is_sequence, tokens)[..., 0], slot, last)
    return Visibility(group, limit, jnp.where(tokens.valid, group, -1), slot)


def forward(
    params: Params, config: ModelConfig, modalities: ModalitySet, batch: PackedBatch, at_use: AtUse | None = None
) -> jax.Array:
    """Hidden states [B, M, D] of the decoder slots in the configuration's dtype; the head makes them logits."""
    encoded = encode(params, config, modalities, batch.encoder, batch.dense, at_use)
    return decode(params, config, modalities, encoded, batch.decoder, at_use)


def _by_modality(flags: np.ndarray, tokens: Tokens) -> jax.Array:
    """bool [B, N, 1]: the flag of each token's modality."""
    return jnp.asarray(flags)[tokens.modality][..., None]


def _zero_invalid(x: jax.Array, tokens: Tokens) -> jax.Array:
    return jnp.where(tokens.valid[..., None], x, jnp.zeros((), x.dtype))


def _embedding(
    group: Params, modality_table: jax.Array, config: ModelConfig, modalities: ModalitySet, tokens: Tokens
) -> jax.Array:
    """Position plus modality embedding [B, N, D] in the compute dtype, 0 at invalid slots."""
    fixed = fixed_position_table(modalities, config.dim, config.grid_positions)
    learned = group.get("positions")
    if not len(fixed):
        position = take_rows(learned, tokens.position)
    else:
        position = jnp.asarray(fixed).at[tokens.position].get(mode="clip")
        if learned is not None:
            is_learned = (tokens.position >= len(fixed))[..., None]
            position = jnp.where(is_learned, take_rows(learned, tokens.position - len(fixed)), position)
    embedding = position + take_rows(modality_table, tokens.modality)
    return _zero_invalid(embedding.astype(config.dtype), tokens)


def _run_layers(
    name: str,
    kind: type,
    stack: Params,
    config: ModelConfig,
    at_use: AtUse | None,
    x: jax.Array,
    *rest: jax.Array | Visibility,
) -> jax.Array:
    depth = jax.tree.leaves(stack)[0].shape[0]
    group = config.scan_group or depth

    def layer(x: jax.Array, params: Params, rest: tuple) -> jax.Array:
        if at_use is not None:
            params = at_use(name, params)
        return apply_module(kind, (config,), params)(x, *rest)

    if config.remat != "none":
        # Inside a scan the loop itself keeps the recomputation apart; only unrolled layers need the costlier barrier.
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=group == depth)

    def some_layers(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        for i in range(group):
            x = layer(x, jax.tree.map(lambda leaf: leaf[i], params), rest)  # noqa: B023 (used at once)
        return x, None

    if group == depth:
        return some_layers(x, stack)[0]
    # Reshaped by hand: `scan(unroll=group)` would stack what the layers of a group keep, which is one more copy.
    groups = jax.tree.map(lambda leaf: leaf.reshape(depth // group, group, *leaf.shape[1:]), stack)
    return jax.lax.scan(some_layers, x, groups)[0]
