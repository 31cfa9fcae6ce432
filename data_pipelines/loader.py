"""From the name of a mixture to batches: the `fm4m.stream.Stream` that trainers read."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from data_pipelines import registry
from data_pipelines.manifest import dtype_of, row_count, row_shape_of
from data_pipelines.sources import Sample, digest
from fm4m.batch import RawBatch, check_raw
from fm4m.masking import Masking
from fm4m.modalities import ModalitySet

# Reading costs 0.2 to 0.3 ms of one core per sample (seven modalities, one file set each), and much of it holds
# Python's lock: four threads hide the latency of a disk, more only take turns.
THREADS = 4
# Batches made ahead of the one in use.
PREFETCH = 4


def import_mixture_modules(modules: Sequence[str]) -> None:
    """Imports the modules that register mixtures (``data.modules`` of a configuration).

    Raises ModuleNotFoundError naming the module and where it was looked for.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
            raise ModuleNotFoundError(
                f"there is no module {name!r} (named by data.modules): give the dotted name of a file that calls "
                "add_mixture, and start the program where it can be imported",
                name=error.name,
            ) from None


@dataclasses.dataclass(frozen=True)
class MixtureStream:
    """A split of a mixture as `fm4m.stream.Stream`; made by `open_stream`.

    Attributes:
      samples: the stream itself, sample number -> {modality: array, "task": index}.
      num_epochs: passes over the split; None goes on for ever.
      threads, prefetch: reader threads, and batches made ahead.
    """

    name: str
    split: str
    seed: int
    size: int
    modalities: ModalitySet
    masking: Masking
    tasks: tuple[str, ...]
    resolved: dict
    samples: grain.MapDataset
    num_epochs: int | None
    threads: int
    prefetch: int

    def batches(self, *, position: int, global_batch: int, shard: int = 0, shards: int = 1) -> Iterator[RawBatch]:
        """Yields this shard's rows of the global batches that start at sample ``position``; see `fm4m.stream.Stream`.

        Raises:
          ValueError: the batch does not divide, or there is no such shard. DataError: while reading, what is wrong with
            which record of which file.
        """
        if position < 0 or not 0 <= shard < shards or global_batch <= 0:
            raise ValueError(f"no batches of {global_batch} at position {position} for shard {shard} of {shards}")
        if global_batch % shards:
            raise ValueError(f"the global batch of {global_batch} samples is not divisible by {shards} shards")
        rows = _Rows(self.samples, position, global_batch, endless=self.num_epochs is None)
        # Batches are dealt out, not samples: the order of the rows of a global batch does not depend on `shards`.
        batches = grain.MapDataset.source(rows).batch(global_batch // shards, batch_fn=self._collate)[shard::shards]
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.prefetch)
        return self._read(batches.to_iter_dataset(options))

    def _read(self, batches: grain.IterDataset) -> Iterator[RawBatch]:
        for i, batch in enumerate(batches):
            if i == 0:
                # Every record was checked alone; this checks that samples and layout belong together.
                check_raw(batch, self.modalities)
            yield batch

    def _collate(self, samples: Sequence[Sample]) -> RawBatch:
        size, layout = len(samples), self.modalities
        tokens = np.zeros((size, layout.num_slots), np.uint16)
        length = np.zeros((size, len(layout)), np.int16)
        task = np.zeros(size, np.uint8)
        dense = {
            m.name: np.zeros((size, row_count(m), *row_shape_of(m)), dtype_of(m))
            for m in layout.modalities
            if not m.discrete
        }
        for row, sample in enumerate(samples):
            if not sample:
                continue
            task[row] = sample[registry.TASK]
            for i, m in enumerate(layout.modalities):
                array = sample[m.name]
                if m.discrete:
                    start = layout.slot_offset[m.name]
                    tokens[row, start : start + len(array)] = array
                else:
                    dense[m.name][row, : len(array)] = array
                # A picture has as many tokens as patches, whatever the number of its pixel rows.
                length[row, i] = len(array) if m.kind != "pixels" or not len(array) else m.max_tokens
        return RawBatch(tokens, length, task, dense)


class _Rows:
    """The samples of all global batches from a position on; empty ones fill up the last batch of a finite stream."""

    def __init__(self, samples: grain.MapDataset, position: int, global_batch: int, endless: bool):
        self._samples, self._position = samples, position
        # Grain divides lengths as floating-point numbers: sys.maxsize batches of one sample would be one too many.
        left = min(max(len(samples) - position, 0), 2**62)
        self._length = (left if endless else left + global_batch - 1) // global_batch * global_batch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        index += self._position
        return self._samples[index] if index < len(self._samples) else {}


def open_stream(
    name: str,
    split: str,
    *,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    threads: int = THREADS,
    prefetch: int = PREFETCH,
) -> MixtureStream:
    """Opens a split of a registered mixture and checks that its files are there and whole.

    Args:
      name: the mixture's name; import its module first (`import_mixture_modules`).
      split: ``"train"``, ``"validation"``, ...
      seed: of the order. The same seed must be given in all processes of a run.
      shuffle: False gives every task's samples in stored order.
      num_epochs: None for training: without end, tasks mixed by their rates. A number for evaluation: every sample of
        every task that often, whatever the rates; the last batch is filled up with samples of length 0.
      threads, prefetch: reader threads, and batches made ahead.

    Raises:
      KeyError: no such mixture, naming the nearest. FileNotFoundError, ValueError: naming the split, file or modality
      that is missing or broken, and the remedy.
    """
    mixture = registry.get_mixture(name)
    samples = mixture.stream(split, shuffle=shuffle, seed=seed, num_epochs=num_epochs)
    return MixtureStream(
        name=name,
        split=split,
        seed=seed,
        size=mixture.size(split),
        modalities=mixture.modalities,
        masking=mixture.masking,
        tasks=tuple(task.name for task in mixture.tasks),
        resolved={**mixture.describe(split), "seed": seed, "shuffle": shuffle, "num_epochs": num_epochs},
        samples=samples,
        num_epochs=num_epochs,
        threads=threads,
        prefetch=prefetch,
    )


def fingerprint(resolved: dict) -> str:
    """sha256 (hexadecimal) of the canonical JSON of `MixtureStream.resolved`: equal for equal streams."""
    return digest(resolved)
