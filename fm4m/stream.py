"""What the trainer asks of a source of batches. `data_pipelines.loader` provides it; the core never imports that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from fm4m.batch import RawBatch
from fm4m.masking import Masking
from fm4m.modalities import ModalitySet


class Stream(Protocol):
    """One split of a mixture: a pure function from (seed, position) to samples.

    Attributes:
      name: the mixture's (or task's) name.
      split: ``"train"``, ``"validation"``, ...
      seed: the shuffle seed.
      size: samples in one pass over the split (of the mixture: the sum over its tasks).
      modalities: what the samples consist of.
      masking: the recipe that turns them into inputs and targets on the device.
      tasks: names of the mixture's tasks; ``RawBatch.task`` indexes them.
      resolved: JSON-able description of everything that gives a position its meaning (tasks, rates, files with lengths
        and hashes, layout, masking); a run refuses to resume on a different one.
    """

    name: str
    split: str
    seed: int
    size: int
    modalities: ModalitySet
    masking: Masking
    tasks: tuple[str, ...]
    resolved: dict

    def batches(self, *, position: int, global_batch: int, shard: int = 0, shards: int = 1) -> Iterator[RawBatch]:
        """Yields this shard's rows of the global batches that start at sample ``position`` of the stream.

        The global batch k holds the samples at ``position + k * global_batch + arange(global_batch)``; shard h of H
        gets rows ``[h * global_batch / H, (h + 1) * global_batch / H)`` of it, as numpy arrays, so neither contents nor
        order depend on the number of shards. A finite stream (one pass) pads its last batch with samples of length 0.

        Raises ValueError if ``global_batch`` is not divisible by ``shards``; while reading `fm4m.errors.DataError`.
        """
        ...
