"""Small token files for the tests of the input pipeline: one modality of every kind, contents that tell the sample."""

from __future__ import annotations

import numpy as np

from data_pipelines import records
from fm4m import modalities
from fm4m.masking import Masking, MaskingComponent
from fm4m.modalities import Modality

GRID = modalities.register(Modality("t_grid", "tokens", vocab_size=4096, grid=(2, 3)))
EXTRA = modalities.register(Modality("t_extra", "tokens", vocab_size=16, grid=(2, 2)))
TEXT = modalities.register(Modality("t_text", "sequence", vocab_size=300, max_tokens=8))
PIXELS = modalities.register(Modality("t_pixels", "pixels", grid=(2, 3), patch_size=4, channels=3))
STATES = modalities.register(Modality("t_states", "embedding", max_tokens=5, channels=7))
ALL = (GRID, TEXT, PIXELS, STATES)

MASKING = Masking(8, 8, tasks={"*": (MaskingComponent(1.0, 1.0),)})


def arrays(modality: Modality, n: int, seed: int = 0) -> list[np.ndarray]:
    """Sample i's array; the grid's first token is i, to tell samples apart. Every 7th text is missing."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        if modality.kind == "tokens":
            array = rng.integers(0, modality.vocab_size, modality.max_tokens)
            array[0] = i % modality.vocab_size
        elif modality.kind == "sequence":
            array = rng.integers(0, modality.vocab_size, 0 if i % 7 == 6 else 1 + i % modality.max_tokens)
        elif modality.kind == "pixels":
            array = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8)
        else:
            array = rng.normal(size=(1 + i % 5, 7)).astype(np.float16)
        out.append(array)
    return out


def keys(n: int, prefix: str = "k") -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def write_set(root, split: str, n: int, chosen=ALL, shards: int = 3, seed: int = 0) -> None:
    for modality in chosen:
        records.write_modality(root, split, modality, arrays(modality, n, seed), keys(n), shards=shards)
