"""The reference implementation's modality sets, and its masked batches in our packed form."""

from __future__ import annotations

import itertools

import numpy as np

from fm4m.batch import PackedBatch, Tokens
from fm4m.modalities import Modality, ModalitySet


def pack(inputs: dict, modalities: ModalitySet, order: list[str], num_encoder: int, num_decoder: int):
    """A PackedBatch of numpy arrays from a batch of the reference's masking.

    ``inputs[name]`` has ``tensor``, ``input_mask`` and ``target_mask`` (True: masked out); pixels are [B, C, H, W] and
    normalised already. ``order`` is the order of modalities on both sides.
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
        seen, asked = [], []
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
            if name not in modalities.outputs:
                continue
            first = modalities.output_offset[name]
            if m.kind == "sequence":
                limit = m.max_positions or m.max_tokens
                for p, (t, following) in enumerate(itertools.pairwise(target)):
                    if following == t + 1:
                        asked.append((first + ids[t], index, base + (p if p < limit else 0), 1, first + ids[t + 1]))
            else:
                asked += [(0, index, base + t, 1, first + ids[t]) for t in target]
        for array, rows in ((encoder, seen[:num_encoder]), (decoder, asked[:num_decoder])):
            if rows:
                array[:, b, : len(rows)] = np.array(rows).T
    sides = [Tokens(a[0], a[1], a[2], a[3].astype(bool)) for a in (encoder, decoder)]
    return PackedBatch(sides[0], sides[1], decoder[4], dense)


def mod7(vocab: dict[str, int] | None = None, names: tuple[str, ...] = (), **kwargs) -> ModalitySet:
    """The eight modalities of 4M-7 at their true or at other vocabulary sizes; ``names`` picks some of them."""
    sizes = {"caption": 30000, "det": 30000, "rgb@224": 0, "tok_clip@224": 8192, "tok_depth@224": 8192}
    sizes |= {"tok_normal@224": 8192, "tok_rgb@224": 16384, "tok_semseg@224": 4096, **(vocab or {})}
    out = []
    for name, size in sizes.items():
        if name in ("caption", "det"):
            out.append(Modality(name, "sequence", size, max_tokens=256))
        elif name == "rgb@224":
            out.append(Modality(name, "pixels", grid=(14, 14), patch_size=16, channels=3))
        else:
            out.append(Modality(name, "tokens", size, grid=(14, 14)))
    return ModalitySet(tuple(m for m in out if not names or m.name in names), **kwargs)


def mod21() -> ModalitySet:
    """The nineteen domains of 4M-21."""
    new = [Modality("t5_caption", "embedding", max_tokens=77, channels=4096)]
    for name, length in (("metadata", 40), ("color_palette", 23), ("sam_instance", 290)):
        new.append(Modality(name, "sequence", 30000, max_tokens=length))
    new.append(Modality("human_poses", "sequence", 30000, max_tokens=275, max_positions=263))
    for name in ("tok_canny_edge@224", "tok_sam_edge@224"):
        new.append(Modality(name, "tokens", 8192, grid=(14, 14)))
    for name in ("tok_dinov2@224", "tok_imagebind@224"):
        new.append(Modality(name, "tokens", 8192, grid=(16, 16)))
    for name in ("tok_dinov2_global", "tok_imagebind_global"):
        new.append(Modality(name, "tokens", 8192, grid=(4, 4), learned_positions=True))
    return ModalitySet((*mod7().modalities, *new))


def super_resolution() -> ModalitySet:
    """4M-7-SR: the eight at 224 pixels and six at 448 pixels in, the five token sets at 448 pixels out."""
    large = [Modality("rgb@448", "pixels", grid=(28, 28), patch_size=16, channels=3)]
    sizes = dict.fromkeys(("tok_depth@448", "tok_normal@448", "tok_clip@448"), 8192)
    sizes |= {"tok_rgb@448": 16384, "tok_semseg@448": 4096}
    large += [Modality(name, "tokens", size, grid=(28, 28)) for name, size in sizes.items()]
    return ModalitySet((*mod7().modalities, *large), outputs=tuple(sizes))
