"""A stream of random codes for any modality set: what timing needs where there is no data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fm4m.batch import RawBatch
from fm4m.masking import Masking
from fm4m.modalities import FIRST_SENTINEL_ID, NUM_SENTINELS, ModalitySet


class RandomStream:
    """`fm4m.stream.Stream` whose samples have every modality: full grids, texts of 4 tokens to their maximum.

    Args:
      modalities, masking, tasks: as in `fm4m.stream.Stream`.
      seed: sample i is a function of (seed, i).
    """

    def __init__(self, modalities: ModalitySet, masking: Masking, tasks: tuple[str, ...], seed: int = 0):
        self.name, self.split, self.seed, self.size = "random", "train", seed, 2**31
        self.modalities, self.masking, self.tasks = modalities, masking, tasks
        self.resolved = {"name": self.name, "tasks": list(tasks)}

    def batches(self, *, position: int, global_batch: int, shard: int = 0, shards: int = 1) -> Iterator[RawBatch]:
        if global_batch % shards:
            raise ValueError(f"batch {global_batch} is not divisible by {shards} shards")
        rows = global_batch // shards
        while True:
            yield self._batch(position + shard * rows + np.arange(rows))
            position += global_batch

    def _batch(self, positions: np.ndarray) -> RawBatch:
        ms, rows = self.modalities, len(positions)
        tokens = np.zeros((rows, ms.num_slots), np.uint16)
        length = np.zeros((rows, len(ms)), np.int16)
        dense = {}
        for name in ms.continuous:
            m = ms[name]
            shape = (*(side * m.patch_size for side in m.grid), m.channels) if m.grid else (m.max_tokens, m.channels)
            dense[name] = np.zeros((rows, *shape), np.uint8 if m.kind == "pixels" else np.float16)
        for row, position in enumerate(positions):
            rng = np.random.default_rng([self.seed, int(position)])
            for index, m in enumerate(ms.modalities):
                count = m.max_tokens if m.grid else int(rng.integers(min(4, m.max_tokens), m.max_tokens + 1))
                length[row, index] = count
                if m.discrete:
                    start = ms.slot_offset[m.name]
                    # Codes of a text lie above its special tokens and sentinels, which masking puts in.
                    least = FIRST_SENTINEL_ID + NUM_SENTINELS if m.kind == "sequence" else 0
                    tokens[row, start : start + count] = rng.integers(least, m.vocab_size, count)
                elif m.kind == "pixels":
                    dense[m.name][row] = rng.integers(0, 256, dense[m.name].shape[1:], np.uint8)
                else:
                    dense[m.name][row, :count] = rng.standard_normal((count, m.channels), np.float32)
        return RawBatch(tokens, length, (positions % len(self.tasks)).astype(np.uint8), dense)
