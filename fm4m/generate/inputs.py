"""Arrays to a canvas, with everything checked that a user can get wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.batch import patchify
from fm4m.generate.canvas import Canvas
from fm4m.modalities import Modality, ModalitySet, unknown_name


def make_canvas(modalities: ModalitySet, inputs: Mapping[str, Any]) -> Canvas:
    """A canvas from arrays.

    Args:
      modalities: the model's.
      inputs: by modality, for B samples each: codes of a grid, integers [B, cells] or [B, rows, columns], with -1 where
        a cell is to be generated; texts, a list of B lists of ids, in which sentinels stand for gaps; pixels, uint8
        [B, H, W, C]; embeddings, floats [B, n, width].

    Raises:
      ValueError: a modality that the model does not have, another shape, a code outside of the vocabulary, a text that
        is too long; names the modality.
    """
    if not inputs:
        raise ValueError("nothing is given: generation needs at least one input (a caption of '[S_1]' is one)")
    sizes = {name: len(value) for name, value in inputs.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"inputs have different numbers of samples: {sizes}")
    size, ids, seen, dense = next(iter(sizes.values())), {}, {}, {}
    for name, value in inputs.items():
        if name not in modalities.names or not {name} & {*modalities.inputs, *modalities.outputs}:
            raise ValueError(unknown_name(name, modalities.names, "modality of this model"))
        m = modalities[name]
        if m.kind == "sequence":
            ids[name], seen[name] = _texts(m, value)
        elif m.kind == "tokens":
            ids[name], seen[name] = _codes(m, np.asarray(value))
        else:
            dense[name], seen[name] = _vectors(m, np.asarray(value))
    for name in modalities.continuous:
        if name not in dense:
            shape = (size, modalities.continuous_count(name), modalities[name].patch_dim)
            dense[name] = jnp.zeros(shape, jnp.float32)
    return Canvas(ids, seen, dense)


def _texts(m: Modality, texts: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    ids, seen = np.zeros((len(texts), m.max_tokens), np.int32), np.zeros((len(texts), m.max_tokens), bool)
    for b, text in enumerate(texts):
        if len(text) > m.max_tokens:
            raise ValueError(f"input {m.name!r}, sample {b}: {len(text)} tokens, at most {m.max_tokens} fit")
        if any(not 0 <= t < m.vocab_size for t in text):
            raise ValueError(f"input {m.name!r}, sample {b}: ids must be from 0 to {m.vocab_size - 1}")
        ids[b, : len(text)], seen[b, : len(text)] = text, True
    return jnp.asarray(ids), jnp.asarray(seen)


def _codes(m: Modality, codes: np.ndarray) -> tuple[jax.Array, jax.Array]:
    if codes.shape[1:] not in ((m.max_tokens,), m.grid) or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"input {m.name!r}: expected integers [B, {m.max_tokens}] (a grid of {m.grid[0]} x {m.grid[1]}), got "
            f"{codes.dtype} {list(codes.shape)}"
        )
    codes = codes.reshape(len(codes), m.max_tokens)
    if codes.size and not -1 <= codes.min() <= codes.max() < m.vocab_size:
        raise ValueError(f"input {m.name!r}: codes must be from 0 to {m.vocab_size - 1}, or -1 for an open cell")
    return jnp.asarray(np.maximum(codes, 0), jnp.int32), jnp.asarray(codes >= 0)


def _vectors(m: Modality, array: np.ndarray) -> tuple[jax.Array, jax.Array]:
    if m.kind == "pixels":
        expected = (m.grid[0] * m.patch_size, m.grid[1] * m.patch_size, m.channels)
        if array.shape[1:] != expected or array.dtype != np.uint8:
            raise ValueError(
                f"input {m.name!r}: expected uint8 pixels [B, {', '.join(map(str, expected))}], got {array.dtype} "
                f"{list(array.shape)}; crop and resize first"
            )
        return patchify(jnp.asarray(array), m.patch_size), jnp.ones((len(array), m.max_tokens), bool)
    if array.ndim != 3 or array.shape[2] != m.channels or not 0 < array.shape[1] <= m.max_tokens:
        raise ValueError(
            f"input {m.name!r}: expected floats [B, 1..{m.max_tokens}, {m.channels}], got {array.dtype} "
            f"{list(array.shape)}"
        )
    padded = np.pad(array.astype(np.float32), ((0, 0), (0, m.max_tokens + 1 - array.shape[1]), (0, 0)))
    return jnp.asarray(padded), jnp.broadcast_to(jnp.arange(m.max_tokens) < array.shape[1], (len(array), m.max_tokens))
