"""The 4M model once more, as a plain float64 numpy forward pass to judge `fm4m.model` by.

Written from the description of the reference implementation alone and sharing nothing with `fm4m`: no import, no
data structure, no idea. Every sample is computed by itself, every modality in a loop, every visible token picked by its
index. It reads

- `state`: the reference's state dict as numpy arrays: (out, in) matrices, packed `qkv` and `kv`, buffers included;
- `config`: the reference's configuration (`dim`, `num_heads`, `act_layer`, `gated_mlp`, `qk_norm`, ...);
- `info`: per modality {"type": "img" | "seq" | "seq_emb", "max_length": int (sequences)};
- `batch`: per modality {"tensor", "input_mask", "target_mask"}, masks True where masked out, in the order in which the
  encoder concatenates modalities. Tensors: pixels (B, 3, H, W) already normalised, image tokens (B, h, w) or (B, n),
  sequences (B, L) ids, embeddings (B, L, W).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

State = dict[str, np.ndarray]
Batch = dict[str, dict[str, np.ndarray]]

MASKED_SCORE = -np.finfo(np.float32).max  # a finite fill: a row with every key masked is a uniform softmax
NO_MODALITY = -1  # modality id of padding and register slots


def sincos_1d(length: int, dim: int) -> np.ndarray:
    """(1, length, dim): [sin(p w), cos(p w)] with w_i = 10000^(-i / (dim / 2))."""
    omega = 10000.0 ** (-np.arange(dim // 2) / (dim / 2))
    angle = np.arange(length)[:, None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[None]


def sincos_2d(grid: int, dim: int) -> np.ndarray:
    """(1, grid * grid, dim): [sin, cos] of the row, then [sin, cos] of the column, a quarter of the channels each."""
    one_axis = sincos_1d(grid, dim // 2)[0]
    return np.stack([np.concatenate([one_axis[n // grid], one_axis[n % grid]]) for n in range(grid * grid)])[None]


def layer_norm(state: State, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return normed * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: State, name: str, x: np.ndarray) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def activation(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "SiLU":
        return x / (1 + np.exp(-x))
    assert kind == "GELU", kind
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mlp(state: State, name: str, config: dict[str, Any], x: np.ndarray) -> np.ndarray:
    hidden = activation(config["act_layer"], linear(state, f"{name}.fc1", x))
    if config["gated_mlp"]:
        hidden = hidden * linear(state, f"{name}.fc3", x)
    return linear(state, f"{name}.fc2", hidden)


def attend(state: State, name: str, config: dict[str, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray,
           may_not: np.ndarray) -> np.ndarray:  # fmt: skip
    """Attention of q (n, dim) over k, v (m, dim); `may_not` (n, m) is True where a query may not see a key."""
    heads, width = config["num_heads"], config["dim"] // config["num_heads"]
    outputs = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        q_head, k_head = q[:, columns], k[:, columns]
        if config["qk_norm"]:
            q_head = layer_norm(state, f"{name}.q_norm", q_head)
            k_head = layer_norm(state, f"{name}.k_norm", k_head)
        scores = np.where(may_not, MASKED_SCORE, q_head @ k_head.T * width**-0.5)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ v[:, columns])
    return linear(state, f"{name}.proj", np.concatenate(outputs, axis=1))


def self_attention(state: State, name: str, config: dict[str, Any], x: np.ndarray, may_not: np.ndarray) -> np.ndarray:
    q, k, v = np.split(linear(state, f"{name}.qkv", x), 3, axis=-1)
    return attend(state, name, config, q, k, v, may_not)


def cross_attention(state: State, name: str, config: dict[str, Any], x: np.ndarray, context: np.ndarray,
                    may_not: np.ndarray) -> np.ndarray:  # fmt: skip
    k, v = np.split(linear(state, f"{name}.kv", context), 2, axis=-1)
    return attend(state, name, config, linear(state, f"{name}.q", x), k, v, may_not)


def patches(image: np.ndarray, patch: int) -> np.ndarray:
    """(C, H, W) pixels -> (tokens, patch * patch * C), row by row, each patch flattened as (row, column, channel)."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    blocks = [image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].transpose(1, 2, 0).reshape(-1)
              for r in range(rows) for c in range(columns)]  # fmt: skip
    return np.stack(blocks)


def embed_inputs(state: State, config: dict[str, Any], info: dict[str, Any], modality: str,
                 sample: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Content and position + modality embedding, (visible, dim) each, of one sample's visible tokens of a modality."""
    name = f"encoder_embeddings.{modality}"
    visible = np.flatnonzero(~sample["input_mask"])
    if f"{name}.proj.weight" in state:
        patch = math.isqrt(state[f"{name}.proj.weight"].shape[1] // 3)
        content = linear(state, f"{name}.proj", patches(sample["tensor"], patch)[visible])
    elif f"{name}.emb_proj.weight" in state:
        content = linear(state, f"{name}.emb_proj", sample["tensor"][visible])
    else:
        content = state[f"{name}.token_emb.weight"][sample["tensor"].reshape(-1)[visible]]
    # Images keep the place on the grid; sequences count the visible tokens.
    positions = visible if info[modality]["type"] == "img" else np.arange(len(visible))
    return content, state[f"{name}.pos_emb"][0, positions] + state[f"{name}.mod_emb"][0]


def embed_targets(state: State, config: dict[str, Any], info: dict[str, Any], modality: str,
                  sample: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Decoder slots of one sample and modality: content, embedding, target id, compressed attention mask."""
    name = f"decoder_embeddings.{modality}"
    is_target = ~sample["target_mask"]
    ids = sample["tensor"].reshape(-1)
    pos_emb, mod_emb = state[f"{name}.pos_emb"][0], state[f"{name}.mod_emb"][0]
    if info[modality]["type"] == "img":
        slots = np.flatnonzero(is_target)
        content = np.repeat(state["mask_token"][0], len(slots), axis=0)
        compressed = np.zeros(len(slots), int)
        compressed[:1] = len(slots)
        return content, pos_emb[slots] + mod_emb, ids[slots], compressed
    positions = np.cumsum(is_target) - 1
    positions[positions >= info[modality]["max_length"]] = 0
    slots = np.array([t for t in range(len(ids) - 1) if is_target[t] and is_target[t + 1]], int)
    content = state[f"{name}.token_emb.weight"][ids[slots]]
    return content, pos_emb[positions[slots]] + mod_emb, ids[slots + 1], np.ones(len(slots), int)


def fill(pieces: list[np.ndarray], slots: int, padding: float = 0) -> np.ndarray:
    """Concatenates the modalities' rows, keeps the first `slots` and pads with `padding` to that many."""
    rows = np.concatenate(pieces)[:slots]
    return np.concatenate([rows, np.full((slots - len(rows), *rows.shape[1:]), padding, rows.dtype)])


def run_encoder(state: State, config: dict[str, Any], info: dict[str, Any], sample: dict[str, dict[str, np.ndarray]],
                slots: int) -> dict[str, np.ndarray]:  # fmt: skip
    """One sample through the encoder: out and emb (registers + slots, dim), mask (registers + slots,)."""
    modalities = [m for m in sample if f"encoder_embeddings.{m}.mod_emb" in state]
    embedded = [embed_inputs(state, config, info, m, sample[m]) for m in modalities]
    mask = fill([np.zeros(len(content), bool) for content, _ in embedded], slots, True)
    x = fill([content for content, _ in embedded], slots)
    emb = fill([e for _, e in embedded], slots)
    registers = config["num_register_tokens"]
    if registers:
        x = np.concatenate([state["register_tokens"][0], x])
        emb = np.concatenate([np.zeros((registers, config["dim"])), emb])
        mask = np.concatenate([np.zeros(registers, bool), mask])
    x = x + emb
    may_not = np.broadcast_to(mask, (len(x), len(x)))
    for i in range(config["encoder_depth"]):
        block = f"encoder.{i}"
        x = x + self_attention(state, f"{block}.attn", config, layer_norm(state, f"{block}.norm1", x), may_not)
        x = x + mlp(state, f"{block}.mlp", config, layer_norm(state, f"{block}.norm2", x))
    return {"out": layer_norm(state, "encoder_norm", x), "emb": emb, "mask": mask}


def decoder_may_not(config: dict[str, Any], compressed: np.ndarray, modality_ids: np.ndarray) -> np.ndarray:
    """(M, M), True where the query (row) may not see the key (column)."""
    slots = np.arange(len(compressed))
    if config["decoder_causal_mask"]:
        may_not = slots[None, :] > slots[:, None]
    else:
        may_not = slots[None, :] >= np.cumsum(compressed)[:, None]
    if config["decoder_sep_mask"]:
        may_not = may_not | (modality_ids[None, :] != modality_ids[:, None])
    return may_not


def run_decoder(state: State, config: dict[str, Any], info: dict[str, Any], sample: dict[str, dict[str, np.ndarray]],
                slots: int, order: list[str], encoded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # fmt: skip
    """One sample through the decoder. `modality` (M,) holds each slot's index in `order`, -1 at padding."""
    embedded = [embed_targets(state, config, info, m, sample[m]) for m in order]
    modality_ids = fill([np.full(len(e[0]), i) for i, e in enumerate(embedded)], slots, NO_MODALITY)
    may_not = decoder_may_not(config, fill([e[3] for e in embedded], slots), modality_ids)
    context = linear(state, "decoder_proj_context", encoded["out"]) + encoded["emb"]
    context_may_not = np.broadcast_to(encoded["mask"], (slots, len(context)))
    y = fill([e[0] for e in embedded], slots) + fill([e[1] for e in embedded], slots)
    for i in range(config["decoder_depth"]):
        block = f"decoder.{i}"
        y = y + self_attention(state, f"{block}.self_attn", config, layer_norm(state, f"{block}.norm1", y), may_not)
        query, keys = layer_norm(state, f"{block}.query_norm", y), layer_norm(state, f"{block}.context_norm", context)
        y = y + cross_attention(state, f"{block}.cross_attn", config, query, keys, context_may_not)
        y = y + mlp(state, f"{block}.mlp", config, layer_norm(state, f"{block}.norm2", y))
    targets = fill([e[2] for e in embedded], slots)
    out = layer_norm(state, "decoder_norm", y)
    return {"out": out, "modality": modality_ids, "target_ids": targets, "may_not": may_not}


def cross_entropy(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean over rows; 0 where there is no row."""
    if not len(ids):
        return 0.0
    shifted = logits - logits.max(-1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(ids)), ids]))


def forward(state: State, config: dict[str, Any], info: dict[str, Any], batch: Batch, num_encoder_tokens: int,
            num_decoder_tokens: int, decoder_order: list[str] | None = None) -> dict[str, Any]:  # fmt: skip
    """Runs the whole model.

    Returns:
      encoder: out, emb (B, registers + N, dim) and mask, True at padding.
      decoder: out (B, M, dim), modality (B, M) index in the decoder's order or -1, target_ids, may_not (B, M, M).
      logits: per modality (its valid positions in (sample, slot) order, vocabulary).
      losses, loss: mean cross-entropy of each decoder modality and their unweighted mean (the 'mod' loss).
    """
    state = {name: np.asarray(value, np.float64) for name, value in state.items()}
    order = decoder_order or [m for m in batch if f"decoder_embeddings.{m}.mod_emb" in state]
    encoded, decoded = [], []
    for b in range(len(next(iter(batch.values()))["tensor"])):
        sample = {m: {key: value[b] for key, value in arrays.items()} for m, arrays in batch.items()}
        encoded.append(run_encoder(state, config, info, sample, num_encoder_tokens))
        decoded.append(run_decoder(state, config, info, sample, num_decoder_tokens, order, encoded[-1]))
    encoder = {key: np.stack([e[key] for e in encoded]) for key in encoded[0]}
    decoder = {key: np.stack([d[key] for d in decoded]) for key in decoded[0]}
    own = {m: decoder["modality"] == i for i, m in enumerate(order)}
    logits = {m: linear(state, f"decoder_embeddings.{m}.to_logits", decoder["out"][own[m]]) for m in order}
    losses = {m: cross_entropy(logits[m], decoder["target_ids"][own[m]]) for m in order}
    loss = sum(losses.values()) / len(losses)
    return {"encoder": encoder, "decoder": decoder, "logits": logits, "losses": losses, "loss": loss}
