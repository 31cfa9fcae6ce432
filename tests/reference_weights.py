"""How the reference implementation's state dict maps onto our parameters: every key, in both directions.

A key's tensor is PyTorch's (out, in), possibly packed (q, k, v in one). `key_slots` says which of our parameters it is
made of; nothing else in the tests knows the other layout.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from fm4m.modalities import ModalitySet
from fm4m.model import ModelConfig, init_params


@dataclasses.dataclass(frozen=True)
class Slot:
    """One of our parameters: its path, the layer of a stack or the rows of a table, and whether it is transposed."""

    path: tuple[str, ...]
    index: int | slice | None = None
    transpose: bool = False


_BLOCKS = {  # reference name of a part of a layer -> ours
    "encoder": {"norm1": "attention_norm", "attn": "attention", "norm2": "mlp_norm", "mlp": "mlp"},
    "decoder": {
        "norm1": "self_attention_norm",
        "self_attn": "self_attention",
        "query_norm": "query_norm",
        "context_norm": "context_norm",
        "cross_attn": "cross_attention",
        "norm2": "mlp_norm",
        "mlp": "mlp",
    },
}
_PACKED = {"qkv": ("query", "key", "value"), "q": ("query",), "kv": ("key", "value"), "proj": ("out",)}


def reference_keys(config: ModelConfig, modalities: ModalitySet) -> list[str]:
    """All parameters (no buffers) of the reference's state dict, in its naming; aliases of shared tensors included."""
    keys = ["mask_token", *(["register_tokens"] if config.num_register_tokens else [])]
    for side, names in (("encoder_embeddings", modalities.inputs), ("decoder_embeddings", modalities.outputs)):
        for name in names:
            m = modalities[name]
            keys.append(f"{side}.{name}.mod_emb")
            keys += [f"{side}.{name}.pos_emb"] if m.learned_positions else []
            keys += [f"{side}.{name}.token_emb.weight"] if m.discrete else []
            keys += [f"{side}.{name}.to_logits.weight"] if side.startswith("decoder") else []
            keys += [f"{side}.{name}.proj.weight"] if m.kind == "pixels" else []
            keys += [f"{side}.{name}.emb_proj.{w}" for w in ("weight", "bias")] if m.kind == "embedding" else []

    def with_bias(name: str, bias: bool) -> list[str]:
        return [f"{name}.weight"] + ([f"{name}.bias"] if bias else [])

    for side, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        for i in range(depth):
            for part in _BLOCKS[side]:
                prefix = f"{side}.{i}.{part}"
                if "norm" in part:
                    keys += with_bias(prefix, config.norm_bias)
                elif part == "mlp":
                    for name in ("fc1", "fc2", *(["fc3"] if config.gated_mlp else [])):
                        keys += with_bias(f"{prefix}.{name}", config.mlp_bias)
                else:
                    for name in ("q", "kv") if part == "cross_attn" else ("qkv",):
                        keys += with_bias(f"{prefix}.{name}", config.qkv_bias)
                    keys += with_bias(f"{prefix}.proj", config.proj_bias)
                    for name in ("q_norm", "k_norm") if config.qk_norm else ():
                        keys += with_bias(f"{prefix}.{name}", config.norm_bias)
        keys += with_bias(f"{side}_norm", config.norm_bias)
    return [*keys, "decoder_proj_context.weight", "decoder_proj_context.bias"]


def key_slots(key: str, config: ModelConfig, modalities: ModalitySet) -> list[Slot]:
    """Our parameters that a reference parameter holds, along its first axis. Raises KeyError for an unknown key."""
    head, _, rest = key.partition(".")
    leaf = key.rpartition(".")[2]
    if key == "mask_token":
        return [Slot(("decoder_embedding", "mask_token"))]
    if key == "register_tokens":
        return [Slot(("encoder_embedding", "registers"))]
    if head in ("encoder_norm", "decoder_norm"):
        return [Slot((head, {"weight": "scale"}.get(leaf, leaf)))]
    if head == "decoder_proj_context":
        return [_linear(("context_projection",), leaf)]
    if head in ("encoder_embeddings", "decoder_embeddings"):
        return [_embedding_slot(head, rest, config, modalities)]
    if head in _BLOCKS:
        layer, part, *names = rest.split(".")
        path = (head, _BLOCKS[head][part])
        if "norm" in part:
            slots = [Slot((*path, {"weight": "scale"}.get(leaf, leaf)))]
        elif names[0] in ("q_norm", "k_norm"):
            norm = {"q_norm": "query_norm", "k_norm": "key_norm"}[names[0]]
            slots = [Slot((*path, norm, {"weight": "scale"}.get(leaf, leaf)))]
        elif part == "mlp":
            ours = {"fc1": "gate" if config.gated_mlp else "up", "fc2": "down", "fc3": "up"}[names[0]]
            slots = [_linear((*path, ours), leaf)]
        else:
            slots = [_linear((*path, name), leaf) for name in _PACKED[names[0]]]
        return [dataclasses.replace(slot, index=int(layer)) for slot in slots]
    raise KeyError(f"no parameter of the reference implementation is named {key!r}")


def _linear(path: tuple[str, ...], leaf: str) -> Slot:
    return Slot((*path, "kernel"), transpose=True) if leaf == "weight" else Slot((*path, "bias"))


def _embedding_slot(head: str, rest: str, config: ModelConfig, modalities: ModalitySet) -> Slot:
    # A modality's name may hold dots, so the known suffixes are cut off from the right.
    linear = ("emb_proj.weight", "emb_proj.bias", "proj.weight")
    suffixes = ("mod_emb", "pos_emb", "token_emb.weight", "to_logits.weight", *linear)
    suffix = next(s for s in suffixes if rest.endswith("." + s))
    name = rest[: -len(suffix) - 1]
    m, side = modalities[name], head.removesuffix("s")
    if suffix == "mod_emb":
        index = modalities.index(name)
        shared = "encoder_embedding" if config.share_modality_embeddings else side
        return Slot((shared, "modality"), slice(index, index + 1))
    if suffix == "pos_emb":
        start = modalities.position_offset[name] - (modalities.position_rows - modalities.learned_position_rows)
        return Slot((side, "positions"), slice(start, start + m.max_tokens))
    if suffix == "token_emb.weight" or suffix == "to_logits.weight":
        start = (modalities.input_offset if side == "encoder_embedding" else modalities.output_offset)[name]
        group = "head" if suffix == "to_logits.weight" and not config.tied_heads else side
        return Slot((group, "tokens"), slice(start, start + m.vocab_size))
    return _linear((side, "projections", name), suffix.rpartition(".")[2])


def is_buffer(key: str, config: ModelConfig, modalities: ModalitySet) -> bool:
    """Whether a key of a state dict is a constant there: fixed position tables, and biases of norms that have none."""
    if key.endswith(".pos_emb"):
        return not modalities[key.split(".", 1)[1].removesuffix(".pos_emb")].learned_positions
    return key.endswith(".bias") and "norm" in key.split(".")[-2] and not config.norm_bias


def to_params(state: dict[str, np.ndarray], config: ModelConfig, modalities: ModalitySet) -> dict:
    """Our parameters from a reference state dict. Raises KeyError unless every parameter of ours is given."""
    shapes = jax.eval_shape(lambda k: init_params(config, modalities, k), jax.random.key(0))
    params = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes)
    needed = reference_keys(config, modalities)
    for key in needed:
        if key not in state and not _alias_given(key, state, config):
            raise KeyError(f"the state dict lacks {key!r}")
    for key, tensor in state.items():
        if is_buffer(key, config, modalities):
            continue
        slots = key_slots(key, config, modalities)
        for slot, part in zip(slots, np.split(np.asarray(tensor), len(slots)), strict=True):
            leaf = _leaf(params, slot)
            leaf[...] = (part.T if slot.transpose else part).reshape(leaf.shape)
    return params


def from_params(params: dict, keys: list[str], config: ModelConfig, modalities: ModalitySet) -> dict[str, np.ndarray]:
    """Tensors of the reference's layout (matrices (out, in), vectors and tables flat) for these keys."""
    out = {}
    for key in keys:
        leaves = [(_leaf(params, slot), slot) for slot in key_slots(key, config, modalities)]
        out[key] = np.concatenate([np.asarray(leaf).T if slot.transpose else np.asarray(leaf) for leaf, slot in leaves])
    return out


def _alias_given(key: str, state: dict, config: ModelConfig) -> bool:
    if key.endswith(".mod_emb") and config.share_modality_embeddings:
        name = key.partition(".")[2]
        return f"encoder_embeddings.{name}" in state or f"decoder_embeddings.{name}" in state
    if key.startswith("decoder_embeddings.") and key.endswith(".weight") and config.tied_heads:
        stem = key.rsplit(".", 2)[0]
        return f"{stem}.to_logits.weight" in state or f"{stem}.token_emb.weight" in state
    return False


def _leaf(params: dict, slot: Slot):
    leaf = params
    for name in slot.path:
        leaf = leaf[name]
    return leaf if slot.index is None else leaf[slot.index]
