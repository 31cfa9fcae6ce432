"""The reference implementation's state dict as views of our parameters; PyTorch matrices are (out, in), ours (in, out).

A key's tensor is made of one or more of our arrays along its first axis (q, k and v are packed there), each of them a
layer of a stack, some rows of a table, or the true columns of a padded matrix. `Layout` knows all keys of a model, with
their shapes, and copies in both directions; nothing else knows the other layout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from fm4m.modalities import ModalitySet, unknown_name
from fm4m.model import ModelConfig, init_params
from fm4m.positions import grid_positions, shared_unit, sincos_1d


@dataclasses.dataclass(frozen=True)
class Slot:
    """A view of one of our arrays: its path, an index into it, and whether the view is transposed."""

    path: tuple[str, ...]
    index: tuple[int | slice, ...] = ()
    transpose: bool = False


_BLOCKS = {  # the reference's name of a part of a layer -> ours
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
_HEAD_NORMS = {"q_norm": "query_norm", "k_norm": "key_norm"}
_LEAF = {"weight": "scale", "bias": "bias"}  # of a norm


class Layout:
    """The keys of a model in the reference implementation's naming.

    Args:
      config: the model.
      modalities: its modality set.

    Attributes:
      parameters: all keys of trained tensors, aliases of shared tensors included, in the order of a forward pass.
      buffers: keys of constants: fixed position tables, and the zero biases of norms that have none.
      twins: for every parameter that has another key too (shared modality embeddings, tied heads) that key.
      aliases: keys that share another key's memory and are left out of a file: left-out key -> stored key.
    """

    def __init__(self, config: ModelConfig, modalities: ModalitySet):
        self.config, self.modalities = config, modalities
        self._slots: dict[str, list[Slot]] = {}
        self._buffers: dict[str, tuple[int, ...]] = {}
        self._add_trunk()
        self._add_embeddings("encoder_embeddings", modalities.inputs)
        self._add_embeddings("decoder_embeddings", modalities.outputs)
        self.parameters, self.buffers = tuple(self._slots), tuple(self._buffers)
        places: dict[str, list[str]] = {}
        for key, slots in self._slots.items():
            places.setdefault(repr(slots), []).append(key)
        pairs = [keys for keys in places.values() if len(keys) == 2]
        self.twins = {a: b for pair in pairs for a, b in (pair, reversed(pair))}
        # The reference's own class unties heads before it stores them.
        self.aliases = {a: b for a, b in pairs if a.endswith(".mod_emb")}

    # ---- what the layout consists of

    def _add(self, key: str, *slots: Slot) -> None:
        self._slots[key] = list(slots)

    def _add_linear(self, prefix: str, *paths: tuple[str, ...], bias: bool, at: tuple = (), rows=None, columns=None):
        # `at` is the layer; rows and columns cut our (in, out) kernel down to its true size.
        cut = (slice(rows) if rows else slice(None), slice(columns) if columns else slice(None))
        self._add(f"{prefix}.weight", *(Slot((*path, "kernel"), (*at, *cut), transpose=True) for path in paths))
        if bias:
            self._add(f"{prefix}.bias", *(Slot((*path, "bias"), (*at, cut[1])) for path in paths))

    def _add_norm(self, prefix: str, path: tuple[str, ...], width: int, at: tuple = ()) -> None:
        self._add(f"{prefix}.weight", Slot((*path, "scale"), at))
        if self.config.norm_bias:
            self._add(f"{prefix}.bias", Slot((*path, "bias"), at))
        else:
            self._buffers[f"{prefix}.bias"] = (width,)

    def _add_trunk(self) -> None:
        c = self.config
        self._add("mask_token", Slot(("decoder_embedding", "mask_token")))
        if c.num_register_tokens:
            self._add("register_tokens", Slot(("encoder_embedding", "registers")))
        for side, depth in (("encoder", c.encoder_depth), ("decoder", c.decoder_depth)):
            for layer in range(depth):
                for part, ours in _BLOCKS[side].items():
                    prefix, path, at = f"{side}.{layer}.{part}", (side, ours), (layer,)
                    if "norm" in part:
                        self._add_norm(prefix, path, c.dim, at)
                    elif part == "mlp":
                        gated, h = c.gated_mlp, c.mlp_dim
                        add = functools.partial(self._add_linear, bias=c.mlp_bias, at=at)
                        add(f"{prefix}.fc1", (*path, "gate" if gated else "up"), columns=h)
                        add(f"{prefix}.fc2", (*path, "down"), rows=h)
                        if gated:
                            add(f"{prefix}.fc3", (*path, "up"), columns=h)
                    else:
                        for name in ("q", "kv", "proj") if part == "cross_attn" else ("qkv", "proj"):
                            bias = c.proj_bias if name == "proj" else c.qkv_bias
                            paths = [(*path, p) for p in _PACKED[name]]
                            self._add_linear(f"{prefix}.{name}", *paths, bias=bias, at=at)
                        for name, own in _HEAD_NORMS.items() if c.qk_norm else ():
                            self._add_norm(f"{prefix}.{name}", (*path, own), c.head_dim, at)
            self._add_norm(f"{side}_norm", (f"{side}_norm",), c.dim)
        self._add_linear("decoder_proj_context", ("context_projection",), bias=True)

    def _add_embeddings(self, side: str, names: tuple[str, ...]) -> None:
        c, s = self.config, self.modalities
        encoder = side == "encoder_embeddings"
        group = side.removesuffix("s")
        for name in names:
            m, i, prefix = s[name], s.index(name), f"{side}.{name}"
            shared = "encoder_embedding" if c.share_modality_embeddings else group
            self._add(f"{prefix}.mod_emb", Slot((shared, "modality"), (slice(i, i + 1),)))
            if m.learned_positions:
                start = s.position_offset[name] - (s.position_rows - s.learned_position_rows)
                self._add(f"{prefix}.pos_emb", Slot((group, "positions"), (slice(start, start + m.max_tokens),)))
            else:
                rows = m.max_tokens if m.grid else next(b.rows for b in s.position_blocks if b.kind == "1d")
                self._buffers[f"{prefix}.pos_emb"] = (1, rows, c.dim)
            if m.discrete:
                start = (s.input_offset if encoder else s.output_offset)[name]
                rows = (slice(start, start + m.vocab_size),)
                self._add(f"{prefix}.token_emb.weight", Slot((group, "tokens"), rows))
                if not encoder:
                    self._add(f"{prefix}.to_logits.weight", Slot((group if c.tied_heads else "head", "tokens"), rows))
            else:
                own = "proj" if m.kind == "pixels" else "emb_proj"
                self._add_linear(f"{prefix}.{own}", (group, "projections", name), bias=m.kind == "embedding")

    # ---- shapes

    @functools.cached_property
    def _abstract(self) -> Any:
        return jax.eval_shape(lambda k: init_params(self.config, self.modalities, k), jax.random.key(0))

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a key's tensor. Raises KeyError naming the nearest key."""
        if key in self._buffers:
            return self._buffers[key]
        parts = [_view_shape(_leaf(self._abstract, slot.path).shape, slot) for slot in self.slots(key)]
        shape = (sum(p[0] for p in parts), *parts[0][1:])
        if key == "mask_token" or key.endswith(".mod_emb"):
            return (1, 1, shape[-1])
        if key == "register_tokens" or key.endswith(".pos_emb"):
            return (1, *shape)
        return shape

    def slots(self, key: str) -> list[Slot]:
        """The views that a parameter's tensor is made of. Raises KeyError naming the nearest key."""
        if key not in self._slots:
            raise KeyError(unknown_name(key, self._slots, "parameter of this model in the reference implementation"))
        return self._slots[key]

    @functools.cached_property
    def size(self) -> int:
        """Elements of all tensors that a file stores."""
        return sum(math.prod(self.shape(key)) for key in self.stored)

    @property
    def stored(self) -> tuple[str, ...]:
        """All keys that a file holds, sorted: parameters and buffers without aliases."""
        return tuple(sorted((set(self.parameters) | set(self.buffers)) - set(self.aliases)))

    # ---- copying

    def buffer(self, key: str) -> np.ndarray:
        """A constant of the reference's state dict, float32: zeros for a norm's bias, else a position table."""
        shape = self._buffers[key]
        if not key.endswith(".pos_emb"):
            return np.zeros(shape, np.float32)
        m = self.modalities[key.split(".", 1)[1].removesuffix(".pos_emb")]
        c = self.config
        unit = shared_unit(self.modalities, c.grid_positions)
        table = grid_positions(m.grid, c.dim, c.grid_positions, unit) if m.grid else sincos_1d(shape[1], c.dim)
        return table[None].astype(np.float32)

    def get(self, params: Any, key: str) -> np.ndarray:
        """A parameter's tensor, contiguous, taken from a tree shaped like our parameters (or their moments)."""
        parts = []
        for slot in self.slots(key):
            # The whole array first: JAX would copy every slice of its own.
            view = np.asarray(_leaf(params, slot.path))[slot.index]
            parts.append(view.T if slot.transpose else view)
        tensor = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.ascontiguousarray(tensor).reshape(self.shape(key))

    def set(self, params: Any, key: str, tensor: np.ndarray) -> None:
        """Writes a parameter's tensor into a tree of numpy arrays.

        Raises ValueError naming the key for another shape.
        """
        if tuple(tensor.shape) != self.shape(key):
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, but this model's is {self.shape(key)}")
        slots = self.slots(key)
        for slot, part in zip(slots, np.split(tensor, len(slots)) if len(slots) > 1 else [tensor], strict=True):
            view = _leaf(params, slot.path)[slot.index]
            view[...] = (part.T if slot.transpose else part).reshape(view.shape)

    def zeros(self) -> Any:
        """Parameters of this model as numpy zeros, to be filled with `set`."""
        return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), self._abstract)


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _view_shape(shape: tuple[int, ...], slot: Slot) -> tuple[int, ...]:
    out = []
    for size, index in zip(shape, (*slot.index, *[slice(None)] * (len(shape) - len(slot.index))), strict=True):
        if isinstance(index, slice):
            out.append(len(range(size)[index]))
    return tuple(reversed(out)) if slot.transpose else tuple(out)
