"""The reference implementation's modality sets, and its masked batches in our packed form."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from fm4m.batch import PackedBatch, Tokens
from fm4m.modalities import ModalitySet
from fm4m.modality_sets import MOD7


def pack(
    inputs: dict,
    modalities: ModalitySet,
    order: list[str],
    num_encoder: int,
    num_decoder: int,
    decoder_order: list[str] | None = None,
) -> PackedBatch:
    """A PackedBatch of numpy arrays from a batch of the reference's masking.

    ``inputs[name]`` has ``tensor``, ``input_mask`` and ``target_mask`` (True: masked out); pixels are [B, C, H, W] and
    normalised already. ``order`` is the order of modalities; ``decoder_order`` the decoder's, if it is another.
    """
    size = len(inputs[order[0]]["input_mask"])
    encoder = np.zeros((4, size, num_encoder), np.int32)
    decoder = np.zeros((5, size, num_decoder), np.int32)
    dense = {}
    for name in modalities.continuous:
        m, x = modalities[name], np.asarray(inputs[name]["tensor"], np.float32)
        if m.kind == "pixels":
            (rows, columns), p = m.grid, m.patch_size
            x = x.reshape(size, m.channels, rows, p, columns, p).transpose(0, 2, 4, 3, 5, 1)
            x = x.reshape(size, rows * columns, -1)
        else:
            x = np.pad(x, ((0, 0), (0, modalities.continuous_count(name) - x.shape[1]), (0, 0)))
        dense[name] = x
    for b in range(size):
        seen, asked = [], {name: [] for name in decoder_order or order}
        for name in order:
            m, index, base = modalities[name], modalities.index(name), modalities.position_offset[name]
            visible = np.flatnonzero(~inputs[name]["input_mask"][b])
            target = np.flatnonzero(~inputs[name]["target_mask"][b])
            ids = np.asarray(inputs[name]["tensor"][b]).reshape(-1).astype(np.int64) if m.discrete else None
            if name in modalities.inputs:
                position = np.arange(len(visible)) if m.kind in ("sequence", "embedding") else visible
                row = modalities.input_offset[name] + ids[visible] if m.discrete else visible
                first = 0 if m.discrete else modalities.continuous_offset[name]
                seen += [(first + r, index, base + p, 1) for r, p in zip(row, position)]
            if name not in modalities.outputs or name not in asked:
                continue
            first = modalities.output_offset[name]
            if m.kind == "sequence":
                limit = m.max_positions or m.max_tokens
                for p, (t, following) in enumerate(itertools.pairwise(target)):
                    if following == t + 1:
                        at = base + (p if p < limit else 0)
                        asked[name].append((first + ids[t], index, at, 1, first + ids[t + 1]))
            else:
                asked[name] += [(0, index, base + t, 1, first + ids[t]) for t in target]
        queries = list(itertools.chain.from_iterable(asked.values()))
        for array, rows in ((encoder, seen[:num_encoder]), (decoder, queries[:num_decoder])):
            if rows:
                array[:, b, : len(rows)] = np.array(rows).T
    sides = [Tokens(a[0], a[1], a[2], a[3].astype(bool)) for a in (encoder, decoder)]
    return PackedBatch(sides[0], sides[1], decoder[4], dense)


def mod7(vocab: dict[str, int] | None = None, names: tuple[str, ...] = (), **kwargs) -> ModalitySet:
    """The eight modalities of 4M-7 at their true or at other vocabulary sizes; ``names`` picks some of them."""
    out = [dataclasses.replace(m, vocab_size=(vocab or {}).get(m.name, m.vocab_size)) for m in MOD7.modalities]
    return ModalitySet(tuple(m for m in out if not names or m.name in names), **kwargs)
