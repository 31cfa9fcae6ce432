"""What travels: the raw batch from host to device, and the packed batch, the only thing the model sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.modalities import ModalitySet
from fm4m.transforms.images import IMAGENET_MEAN, IMAGENET_STD


def _check(name: str, array: Any, dtype: Any, shape: tuple) -> None:
    # Transformations put placeholders (None, object(), avals) into pytrees; only things with a shape are checked.
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, expected {jnp.dtype(dtype).name}")
    if len(array.shape) != len(shape) or any(s is not None and s != a for s, a in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {shape} (None: any)")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RawBatch:
    """One batch as the host sends it: no masking, no randomness. 3 KB a sample for seven modalities at 224 pixels.

    Attributes:
      tokens: uint16 [B, S], the codes of all discrete modalities side by side (`ModalitySet.slot_offset`), 0 beyond the
        length.
      length: int16 [B, num modalities], tokens present of each modality; 0 where the modality is missing. A sample
        whose lengths are all 0 is padding: it has no inputs, no targets, and no weight in any mean.
      task: uint8 [B], index of the mixture's task, which chooses the masking recipe.
      dense: continuous modalities by name: uint8 [B, H, W, C] pixels, float16 [B, max_tokens, width] embeddings.
    """

    tokens: jax.Array
    length: jax.Array
    task: jax.Array
    dense: dict[str, jax.Array]

    def __post_init__(self):
        _check("RawBatch.tokens", self.tokens, jnp.uint16, (None, None))
        batch = getattr(self.tokens, "shape", (None,))[0]
        _check("RawBatch.length", self.length, jnp.int16, (batch, None))
        _check("RawBatch.task", self.task, jnp.uint8, (batch,))

    @property
    def size(self) -> int:
        return self.task.shape[0]


def abstract_batch(
    modalities: ModalitySet, global_batch: int, sharding: jax.sharding.Sharding
) -> tuple[RawBatch, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and sharding of a raw batch, and of its rows' positions in the stream (uint32 [B])."""

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((global_batch, *shape), dtype, sharding=sharding)

    dense = {}
    for name in modalities.continuous:
        m = modalities[name]
        if m.kind == "pixels":
            height, width = (side * m.patch_size for side in m.grid)
            dense[name] = rows(jnp.uint8, height, width, m.channels)
        else:
            dense[name] = rows(jnp.float16, m.max_tokens, m.channels)
    tokens, length = rows(jnp.uint16, modalities.num_slots), rows(jnp.int16, len(modalities))
    return RawBatch(tokens, length, rows(jnp.uint8), dense), rows(jnp.uint32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """One side of a packed batch; N slots a sample, the valid ones first.

    Attributes:
      row: int32 [B, N]. Row of this side's token table; for a continuous modality the index among the sample's
        projected vectors. Where the decoder shows its mask token (kind ``tokens``) the row is ignored and 0.
      modality: int32 [B, N], index into the modality set.
      position: int32 [B, N], row of the position table.
      valid: bool [B, N]. Invalid slots hold zeros, are never attended to and carry no loss.
    """

    row: jax.Array
    modality: jax.Array
    position: jax.Array
    valid: jax.Array

    def __post_init__(self):
        shape = getattr(self.row, "shape", (None, None))
        for field in ("row", "modality", "position"):
            _check(f"Tokens.{field}", getattr(self, field), jnp.int32, tuple(shape))
        _check("Tokens.valid", self.valid, jnp.bool_, tuple(shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """The model's input.

    In the decoder, tokens of one modality are contiguous and in order, so that "not later" is a comparison of slots.

    Attributes:
      encoder: the visible tokens, [B, N].
      decoder: the query tokens, [B, M].
      target: int32 [B, M], row of the output head to be predicted at each decoder slot; 0 where invalid.
      dense: the vectors of the continuous inputs by name, float32 [B, continuous_count, patch_dim].
    """

    encoder: Tokens
    decoder: Tokens
    target: jax.Array
    dense: dict[str, jax.Array]

    def __post_init__(self):
        shape = getattr(getattr(self.decoder, "row", None), "shape", (None, None))
        _check("PackedBatch.target", self.target, jnp.int32, tuple(shape))


def check_raw(raw: RawBatch, modalities: ModalitySet) -> None:
    """Checks a raw batch on the host against a modality set.

    Raises ValueError naming the modality for a wrong width, a length over the maximum, a missing continuous modality,
    or a token outside its vocabulary.
    """
    tokens, length = np.asarray(raw.tokens), np.asarray(raw.length)
    if tokens.shape[1] != modalities.num_slots or length.shape[1] != len(modalities):
        raise ValueError(
            f"raw batch has {tokens.shape[1]} slots and {length.shape[1]} lengths, but the modality set has "
            f"{modalities.num_slots} and {len(modalities)}: batch and model were built from different modality sets"
        )
    for i, m in enumerate(modalities.modalities):
        if length[:, i].min(initial=0) < 0 or length[:, i].max(initial=0) > m.max_tokens:
            longest = length[:, i].max()
            raise ValueError(f"modality {m.name!r}: a length of {longest} tokens, at most {m.max_tokens} are allowed")
        if m.discrete:
            codes = tokens[:, modalities.slot_offset[m.name] :][:, : m.max_tokens]
            if codes.max(initial=0) >= m.vocab_size:
                row = int(np.argmax((codes >= m.vocab_size).any(1)))
                raise ValueError(
                    f"modality {m.name!r}: token {codes.max()} in row {row} of the batch is outside the vocabulary "
                    f"0..{m.vocab_size - 1}"
                )
        elif m.name not in raw.dense:
            raise ValueError(f"modality {m.name!r}: the raw batch lacks its array; it has {sorted(raw.dense)}")


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """uint8 RGB [B, H, W, 3] to normalised patches float32 [B, (H/p)(W/p), p*p*3], flattened (row, column, channel)."""
    b, h, w, c = images.shape
    mean, std = (jnp.array(values, jnp.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    x = (images.astype(jnp.float32) / 255.0 - mean) / std
    # One axis a reshape: where shardings are types, JAX refuses to split or join several at once.
    x = x.reshape(b, h // patch_size, patch_size, w, c)
    x = x.reshape(b, h // patch_size, patch_size, w // patch_size, patch_size, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, -1, patch_size, patch_size, c)
    return x.reshape(b, -1, patch_size * patch_size * c)
