"""What a name on the command line stands for: a mixture, a task, or a folder of token files."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.manifest import MANIFEST, check_aligned, read_manifest
from data_pipelines.records import Joined, Records
from fm4m.modalities import Modality

if TYPE_CHECKING:
    from data_pipelines.loader import MixtureStream

Sample = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the tokens of a modality lie, and what their manifest says they were made from."""

    folder: pathlib.Path
    made_from: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Opened:
    """One split, ready to look at.

    Attributes:
      name, split: for titles.
      modalities: what the samples may have.
      samples: every sample once, in stored order; random access.
      origins: of the modalities that come from token files.
      stream: of a mixture, what the trainer reads; None for anything without a masking recipe.
    """

    name: str
    split: str
    modalities: tuple[Modality, ...]
    samples: Sequence[Sample]
    origins: Mapping[str, Origin]
    stream: MixtureStream | None = None

    @property
    def in_training_order(self) -> bool:
        """Whether positions count along the endless, shuffled stream of training."""
        return self.stream is not None and self.stream.num_epochs is None

    def positions(self, count: int) -> list[int]:
        """Samples to look at: the first of training, where the order is random, else samples spread over the set."""
        return list(range(count)) if self.in_training_order else spread(len(self.samples), count)

    def at(self, position: int) -> Sample:
        """The sample at one of the `positions`."""
        return self.samples[position] if self.stream is None else self.stream.samples[position]


def spread(size: int, count: int) -> list[int]:
    """At most ``count`` different numbers of ``range(size)``, spread evenly."""
    count = min(size, count)
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def open_set(name: str, split: str, modules: Sequence[str] | None = None, seed: int = 0) -> Opened:
    """Opens a split of a mixture, a task or a folder.

    Args:
      name: a path (it has a slash, or holds ``split/manifest.json``), or a registered name.
      split: ``"train"``, ``"validation"``, ...
      modules: imported first; they register the name. None: those of the default configuration, for names only.
      seed: of the training run whose order and masks are wanted.

    Raises:
      KeyError: unknown name, naming the nearest. ImportError, FileNotFoundError, ValueError: naming what is missing or
      broken, and the remedy.
    """
    if modules is not None:
        _import(modules)
    if os.sep in name or pathlib.Path(name, split, MANIFEST).is_file():
        return _open_folder(pathlib.Path(name), split)
    if modules is None:
        from fm4m import config

        _import(config.default().data.modules)
    return _open_registered(name, split, seed)


def _import(modules: Sequence[str]) -> None:
    from data_pipelines.loader import import_mixture_modules  # SeqIO takes seconds to import; folders need none

    import_mixture_modules(modules)


def _open_folder(root: pathlib.Path, split: str) -> Opened:
    manifest = read_manifest(root, split)
    entries = manifest["modalities"]
    if not entries:
        raise ValueError(f"{root / split / MANIFEST} lists no modality: prepare the set again")
    modalities = tuple(Modality.from_dict(entries[name]["modality"]) for name in entries)
    check_aligned(root / split, entries, list(entries))
    joined = Joined({m.name: Records(root, split, m, manifest) for m in modalities})
    return Opened(root.resolve().name, split, modalities, joined, _origins(root, split, list(entries)))


def _open_registered(name: str, split: str, seed: int) -> Opened:
    import seqio

    from data_pipelines import loader, registry
    from fm4m import modalities as modalities_lib

    if name in seqio.TaskRegistry.names() and name not in seqio.MixtureRegistry.names():
        task = seqio.TaskRegistry.get(name)
        if not isinstance(task, registry.Task):
            raise ValueError(f"{name!r} is registered with SeqIO, but not by data_pipelines.registry.add_task")
        samples = task.stream(split, shuffle=False, num_epochs=1)
        modalities = tuple(modalities_lib.get(n) for n in task.modalities)
        return Opened(name, split, modalities, samples, _task_origins([task], split))
    mixture = registry.get_mixture(name)
    # Exactly what the trainer and its validation read.
    order = {"shuffle": True, "num_epochs": None} if split == "train" else {"shuffle": False, "num_epochs": 1}
    stream = loader.open_stream(name, split, seed=seed, **order)
    samples = mixture.stream(split, shuffle=False, num_epochs=1)
    tasks = [task for _, task in mixture.active(split)]
    return Opened(name, split, stream.modalities.modalities, samples, _task_origins(tasks, split), stream)


def _task_origins(tasks: Sequence, split: str) -> dict[str, Origin]:
    from data_pipelines.sources import TokenSource

    origins: dict[str, Origin] = {}
    for task in tasks:
        if isinstance(task.source, TokenSource):
            origins = _origins(task.source.root, split, task.modalities) | origins
    return origins


def _origins(root: pathlib.Path, split: str, names: Sequence[str]) -> dict[str, Origin]:
    entries = read_manifest(root, split)["modalities"]
    return {n: Origin(root / split, entries[n].get("made_from", {})) for n in names if n in entries}
