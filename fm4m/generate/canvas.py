"""What the encoder sees of some samples while modalities are generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from fm4m.batch import RawBatch, Tokens, patchify
from fm4m.modalities import FIRST_SENTINEL_ID, ModalitySet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Canvas:
    """The tokens of B samples that are given or were generated, modality by modality.

    Attributes:
      ids: int32 [B, max_tokens] for every discrete modality.
      seen: bool [B, max_tokens] for every modality: which of its tokens the encoder sees. Of sequences and embeddings
        that is a beginning.
      dense: float32 [B, continuous_count, patch_dim] for every continuous input of the model (`PackedBatch.dense`).
    """

    ids: dict[str, jax.Array]
    seen: dict[str, jax.Array]
    dense: dict[str, jax.Array]

    @property
    def size(self) -> int:
        """Number of samples."""
        return next(iter(self.seen.values())).shape[0]

    def write(self, name: str, ids: jax.Array, seen: jax.Array) -> Canvas:
        """The canvas with other tokens of one discrete modality."""
        return dataclasses.replace(self, ids={**self.ids, name: ids}, seen={**self.seen, name: seen})


def from_raw(raw: RawBatch, modalities: ModalitySet, inputs: Iterable[str]) -> Canvas:
    """The canvas of a batch in which every token of ``inputs`` is visible and nothing else exists."""
    ids, seen, dense, inputs = {}, {}, {}, tuple(inputs)
    for name in inputs:
        m, i = modalities[name], modalities.index(name)
        seen[name] = jnp.arange(m.max_tokens, dtype=jnp.int32) < raw.length[:, i : i + 1]
        if m.discrete:
            ids[name] = raw.tokens[:, modalities.slot_offset[name] :][:, : m.max_tokens].astype(jnp.int32)
    for name in modalities.continuous:
        m = modalities[name]
        if name in inputs and m.kind == "pixels":
            dense[name] = patchify(jnp.asarray(raw.dense[name]), m.patch_size)
        elif name in inputs:
            dense[name] = jnp.pad(jnp.asarray(raw.dense[name]).astype(jnp.float32), ((0, 0), (0, 1), (0, 0)))
        else:
            dense[name] = jnp.zeros((raw.size, modalities.continuous_count(name), m.patch_dim), jnp.float32)
    return Canvas(ids, seen, dense)


def encoder_tokens(canvas: Canvas, modalities: ModalitySet, size: int | None = None) -> Tokens:
    """The visible tokens, the valid ones first.

    Args:
      canvas: the samples.
      modalities: the model's modality set; what is no input of the model is left out.
      size: slots to keep; at least as many as any sample has visible tokens, else some are lost. None: all.

    Returns:
      Tokens [B, size].
    """
    names = [name for name in canvas.seen if name in modalities.inputs]
    rows, index, positions = [], [], []
    for name in names:
        m, shape = modalities[name], canvas.seen[name].shape
        cells = jnp.arange(m.max_tokens, dtype=jnp.int32)
        first = canvas.ids[name] + modalities.input_offset[name] if m.discrete else cells
        rows.append(jnp.broadcast_to(first if m.discrete else first + modalities.continuous_offset[name], shape))
        index.append(jnp.full(shape, modalities.index(name), jnp.int32))
        positions.append(jnp.broadcast_to(cells + modalities.position_offset[name], shape))
    seen = jnp.concatenate([canvas.seen[name] for name in names], 1)
    order = jnp.argsort(~seen, axis=1, stable=True)[:, :size]
    packed = [jnp.where(seen, jnp.concatenate(parts, 1), 0) for parts in (rows, index, positions)]
    return Tokens(*(jnp.take_along_axis(a, order, 1) for a in (*packed, seen)))


def without(canvas: Canvas, modalities: ModalitySet, hidden: Iterable[str]) -> Canvas:
    """The canvas with some modalities hidden, for the unconditional branch of guidance.

    A grid shows nothing, a sequence one gap (the first sentinel), an embedding one gap vector: that is how samples
    look in training whose modality is masked as a whole.
    """
    ids, seen, dense = dict(canvas.ids), dict(canvas.seen), dict(canvas.dense)
    for name in hidden:
        m = modalities[name]
        nothing = jnp.zeros_like(seen[name])
        seen[name] = nothing if m.grid else nothing.at[:, 0].set(True)
        if m.kind == "sequence":
            ids[name] = jnp.zeros_like(ids[name]).at[:, 0].set(FIRST_SENTINEL_ID)
        elif m.kind == "embedding":
            dense[name] = jnp.zeros_like(dense[name])
    return Canvas(ids, seen, dense)
