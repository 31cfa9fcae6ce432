"""A small modality set with every kind, and random packed batches for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.batch import PackedBatch, Tokens
from fm4m.modalities import Modality, ModalitySet

MODALITIES = ModalitySet(
    (
        Modality("pixels", "pixels", grid=(4, 4), patch_size=2, channels=3),
        Modality("depth", "tokens", 100, grid=(4, 4)),
        Modality("caption", "sequence", 300, max_tokens=20),
        Modality("states", "embedding", max_tokens=6, channels=10),
        Modality("global", "tokens", 128, grid=(2, 2), learned_positions=True),
        Modality("absent", "tokens", 70, grid=(4, 4)),
    )
)


def random_batch(seed: int, size: int, encoder: int, decoder: int, modalities: ModalitySet = MODALITIES) -> PackedBatch:
    """A PackedBatch of random tokens; 80 % of the slots are valid, and no target is of modality ``absent``."""
    rng = np.random.default_rng(seed)

    def side(slots: int, names: tuple[str, ...], offsets: dict[str, int]) -> tuple[Tokens, np.ndarray]:
        row, modality, position, target = np.zeros((4, size, slots), np.int32)
        valid = np.zeros((size, slots), bool)
        for b in range(size):
            chosen = sorted(rng.choice(names, round(0.8 * slots)), key=modalities.index)
            seen: dict[str, int] = {}
            for i, name in enumerate(chosen):
                m, count = modalities[name], seen.get(name, 0)
                seen[name] = count + 1
                modality[b, i] = modalities.index(name)
                position[b, i] = modalities.position_offset[name] + count % m.max_tokens
                choices = m.vocab_size if m.discrete else modalities.continuous_count(name)
                row[b, i] = offsets[name] + rng.integers(choices)
                if m.discrete:
                    target[b, i] = offsets[name] + rng.integers(choices)
            valid[b, : len(chosen)] = True
        return Tokens(*map(jnp.asarray, (row, modality, position, valid))), target

    inputs = {**modalities.input_offset, **modalities.continuous_offset}
    outputs = tuple(n for n in modalities.outputs if n != "absent")
    seen, _ = side(encoder, modalities.inputs, inputs)
    asked, target = side(decoder, outputs, modalities.output_offset)
    dense = {}
    for name in modalities.continuous:
        shape = (size, modalities.continuous_count(name), modalities[name].patch_dim)
        dense[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return PackedBatch(seen, asked, jnp.asarray(target), dense)


def without_tokens(batch: PackedBatch) -> PackedBatch:
    """The same shapes holding nothing but padding."""
    return jax.tree.map(jnp.zeros_like, batch)
