"""The trainer's command line on random samples, so that it needs no files: ``python -m benchmarks.soak_run``.

Takes what ``python -m fm4m.train`` takes. FM4M_FAULT makes the data fail: ``nan@12`` puts NaNs into batch 12 (counted
from 1), ``nans@12`` into all from 12 on, ``hang@12`` never gives batch 12, ``gone@12`` cannot read it, and ``slow@0.1``
waits 0.1 seconds before each batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fm4m import configured, processes, train
from fm4m.batch import RawBatch
from fm4m.errors import DataError
from fm4m.masking import Masking, MaskingComponent
from fm4m.modalities import Modality, ModalitySet
from fm4m.synthetic import RandomStream

MODALITIES = ModalitySet(
    (
        Modality("image", "pixels", grid=(4, 4), patch_size=4, channels=3),
        Modality("depth", "tokens", vocab_size=512, grid=(4, 4)),
        Modality("words", "sequence", vocab_size=600, max_tokens=24),
        Modality("states", "embedding", max_tokens=6, channels=16),
    )
)
TASKS = ("random",)
MASKING = Masking(24, 24, {"*": (MaskingComponent(inputs=1.0, targets=1.0),)})
VALIDATION_SAMPLES = 128


class Samples(RandomStream):
    """A `RandomStream` that ends after ``size`` samples if it is given, and fails as FM4M_FAULT says."""

    def __init__(self, seed: int, size: int = 0, fault: str = ""):
        super().__init__(MODALITIES, MASKING, TASKS, seed)
        self._size = size
        self._fault, _, number = fault.partition("@")
        self._number = float(number or 0)

    def batches(
        self, *, position: int, global_batch: int, shard: int = 0, shards: int = 1
    ) -> Iterator[RawBatch]:
        """As `RandomStream.batches`. Raises DataError where FM4M_FAULT says so."""
        source = super().batches(position=position, global_batch=global_batch, shard=shard, shards=shards)
        fault = self._fault if jax.process_index() == jax.process_count() - 1 else ""
        while not self._size or position < self._size:
            raw, position = next(source), position + global_batch
            number = position // global_batch
            if fault == "slow":
                time.sleep(self._number)
            elif number == self._number or (fault == "nans" and number > self._number):
                if fault == "gone":
                    raise DataError(f"random samples, batch {number}: cannot be read, as FM4M_FAULT asks")
                while fault == "hang":
                    time.sleep(1)
                if fault in ("nan", "nans"):
                    raw.dense["states"][:] = np.nan
            yield raw


def inputs(config: Any) -> configured.Inputs:
    """Random samples, failing as FM4M_FAULT says, and no pictures."""
    stream = Samples(config.seed, fault=os.environ.get("FM4M_FAULT", ""))
    return stream, Samples(config.seed + 1, VALIDATION_SAMPLES), None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns one of `fm4m.exit_codes`."""
    return train.main(argv, inputs)


if __name__ == "__main__":
    processes.run(main)
