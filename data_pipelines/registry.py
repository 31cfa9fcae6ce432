"""Modalities, tasks and mixtures by name. SeqIO's registries hold the definitions, Grain executes them.

A task is a source with the modalities it provides; a mixture is tasks with rates, and a masking recipe. Both live in
``seqio.TaskRegistry`` and ``seqio.MixtureRegistry``, so ``seqio.get_dataset`` and SeqIO's tools work with their names.
Their ``stream`` is a ``grain.MapDataset``: sample number -> sample, for any number, without state.
"""

from __future__ import annotations

import fractions
import functools
import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np
import seqio
import tensorflow as tf

from data_pipelines.manifest import dtype_of, problem, row_shape_of
from data_pipelines.sources import RandomAccessSource, Sample, Samples, function_identity, function_name
from fm4m import modalities as modalities_lib
from fm4m.errors import DataError
from fm4m.masking import Masking
from fm4m.modalities import Modality, ModalitySet
from fm4m.modalities import register as add_modality

__all__ = ["Mixture", "Task", "add_mixture", "add_modality", "add_task", "get_mixture"]

Preprocessor = Callable[[Sample], Sample]
Rate = float | int | Callable[[seqio.Task], float]

# Key of the task's index in a sample, beside the modalities.
TASK = "task"


class _Streamed:
    """What tasks and mixtures share: SeqIO's `get_dataset` over the same samples as the stream."""

    def get_dataset(
        self,
        sequence_length: Mapping[str, int] | None = None,
        split: str = "train",
        use_cached: bool = False,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = 1,
        trim_output_features: bool = True,
    ) -> tf.data.Dataset:
        """The stream as a ``tf.data.Dataset``; normally called by ``seqio.get_dataset``.

        Codes are int32, as SeqIO's converters want them; pixels uint8 [H, W, C]; embeddings float16 [n, width]. What a
        sample lacks has no rows. Shard h of H gets samples h, h + H, ... of the stream.

        Args:
          sequence_length: features longer than this are cut, unless ``trim_output_features`` is False.
          split, shuffle, num_epochs: as in `Task.stream` and `Mixture.stream`.
          use_cached: must be False: there is no offline cache, the files are the cache.
          seed: None is 0; the order is always reproducible.
        """
        if use_cached:
            raise ValueError(f"{self.name!r}: use_cached=True is not supported; the token files are already prepared")
        stream = self.stream(split, shuffle=shuffle, seed=seed or 0, num_epochs=num_epochs)
        if shard_info is not None:
            stream = stream[shard_info.index :: shard_info.num_shards]
        types = {name: feature.dtype for name, feature in self.output_features.items()}
        shapes = {name: [None, *row_shape_of(modalities_lib.get(name))] for name in self.output_features}
        lengths = dict(sequence_length or {}) if trim_output_features else {}

        def samples():
            for sample in stream.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=32)):
                yield {n: sample[n][: lengths.get(n)].astype(t.as_numpy_dtype) for n, t in types.items()}

        signature = {n: tf.TensorSpec(shapes[n], t) for n, t in types.items()}
        return tf.data.Dataset.from_generator(samples, output_signature=signature)


class Task(_Streamed, seqio.Task):
    """A SeqIO task whose samples can be read in any order. Made by `add_task`.

    Attributes:
      modalities: names of the modalities that the task's samples may have.
    """

    def __init__(self, name: str, source: RandomAccessSource, modalities: Sequence[str], preprocessors=(), **kwargs):
        kwargs.setdefault("output_features", {n: _feature(modalities_lib.get(n)) for n in modalities})
        super().__init__(name, source=source, preprocessors=tuple(preprocessors), shuffle_buffer_size=None, **kwargs)
        self.modalities = tuple(modalities)

    def identity(self) -> tuple:
        """What makes two definitions the same; compared when a name is registered again."""
        functions = tuple(function_identity(p) for p in self.preprocessors)
        return type(self.source).__qualname__, self.source.identity(), self.modalities, functions

    def within(self, modalities: Sequence[str]) -> Task:
        """This task with the features of a whole mixture; it has empty arrays for what it does not provide."""
        features = {n: _feature(modalities_lib.get(n)) for n in modalities}
        return Task(self.name, self.source, self.modalities, self.preprocessors, output_features=features)

    def stream(
        self, split: str, *, shuffle: bool = True, seed: int = 0, num_epochs: int | None = None
    ) -> grain.MapDataset:
        """Sample number -> {modality: array}, with an entry for every output feature.

        Every pass contains every sample once. With ``shuffle``, each pass has its own order, which depends on the seed
        and the task's name only. ``num_epochs=None`` goes on for ever.

        Raises:
          ValueError: unknown split; and on reading, an array that does not fit its modality, naming its place.
        """
        samples = self.source.open(split, self.modalities)
        if len(samples) == 0:
            raise ValueError(f"task {self.name!r}: split {split!r} has no samples")
        stream = grain.MapDataset.source(_Checked(self.name, samples, self.preprocessors, tuple(self.output_features)))
        if shuffle:
            # Grain adds the epoch to the seed: nearby seeds would share orders, and tasks over the same files would
            # march in step. A hash avoids both.
            name_and_seed = hashlib.sha256(f"{seed} {self.name}".encode()).digest()
            stream = stream.shuffle(seed=int.from_bytes(name_and_seed[:4], "little"))
        return stream.repeat(num_epochs)

    def size(self, split: str) -> int:
        """Samples in one pass."""
        return len(self.source.open(split, self.modalities))

    def describe(self, split: str) -> dict:
        """JSON-able description of everything that decides which samples the task has."""
        return {
            "name": self.name,
            "modalities": list(self.modalities),
            "preprocessors": [function_name(p) for p in self.preprocessors],
            "source": self.source.describe(split, self.modalities),
        }


class _Checked:
    """Samples of a task after preprocessing, checked, with empty arrays for absent modalities."""

    def __init__(self, task: str, samples: Samples, preprocessors: Sequence[Preprocessor], names: Sequence[str]):
        self._task, self._samples, self._preprocessors = task, samples, preprocessors
        self._absent = {m: np.zeros((0, *row_shape_of(m)), dtype_of(m)) for m in map(modalities_lib.get, names)}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        for preprocessor in self._preprocessors:
            sample = preprocessor(sample)
        out = {}
        for modality, absent in self._absent.items():
            array = np.asarray(sample.get(modality.name, absent))
            if fault := problem(array, modality):
                raise DataError(
                    f"task {self._task!r}, modality {modality.name!r}: {self._samples.where(index, modality.name)} "
                    f"{fault}. Write the modality again, or correct what makes it"
                )
            out[modality.name] = array.astype(absent.dtype, copy=False)
        return out


class Mixture(_Streamed, seqio.Mixture):
    """A SeqIO mixture of such tasks, which may have different modalities. Made by `add_mixture`.

    Attributes:
      modalities: everything its tasks provide, in order of first mention, and what of it is input and output.
      masking: the recipe.
    """

    def __init__(
        self, name: str, tasks: Sequence[tuple[Task, Rate]], modalities: ModalitySet, masking: Masking, **kwargs
    ):
        super().__init__(name, [(task.within(modalities.names), rate) for task, rate in tasks], **kwargs)
        self.modalities, self.masking = modalities, masking

    def identity(self) -> tuple:
        """What makes two definitions the same; compared when a name is registered again."""
        rates = [(n, function_identity(r) if callable(r) else r) for n, r in self.rate_per_task_name.items()]
        return rates, [t.identity() for t in self.tasks], self.modalities, self.masking

    def active(self, split: str) -> list[tuple[int, Task]]:
        """The tasks that have this split, with their index among all tasks (sorted by name, as SeqIO does)."""
        tasks = [(i, task) for i, task in enumerate(self.tasks) if split in task.splits]
        if not tasks:
            splits = sorted({s for task in self.tasks for s in task.splits})
            raise ValueError(f"mixture {self.name!r}: " + modalities_lib.unknown_name(split, splits, "split"))
        return tasks

    def weights(self, split: str) -> list[int]:
        """The rates of the split's tasks as the smallest integers in the same proportion."""
        rates = [fractions.Fraction(repr(self.get_rate(task))) for _, task in self.active(split)]
        scale = math.lcm(*(r.denominator for r in rates))
        integers = [int(r * scale) for r in rates]
        return [i // math.gcd(*integers) for i in integers]

    def stream(
        self, split: str, *, shuffle: bool = True, seed: int = 0, num_epochs: int | None = None
    ) -> grain.MapDataset:
        """Sample number -> {modality: array} plus ``"task"``, the task's index.

        Without end (``num_epochs=None``) the tasks are interleaved by their rates: after any number of samples, the
        count of a task is off by less than the number of tasks, and after every multiple of ``sum(weights)`` samples it
        is exact. (``grain.MapDataset.mix`` would round the rates to 1% of the smallest.)

        A finite stream is for evaluation: it has every sample of every task ``num_epochs`` times, whatever the rates.
        """
        tasks = self.active(split)
        streams = [
            task.stream(split, shuffle=shuffle, seed=seed, num_epochs=num_epochs).map(functools.partial(_tag, i))
            for i, task in tasks
        ]
        if num_epochs is None:
            selection = _Proportional(self.weights(split), sys.maxsize)
        else:
            sizes = [len(s) for s in streams]
            selection = _Proportional(sizes, sum(sizes))
        return grain.MapDataset.select_from_datasets(streams, selection)

    def size(self, split: str) -> int:
        """Samples in one pass over all tasks."""
        return sum(task.size(split) for _, task in self.active(split))

    def describe(self, split: str) -> dict:
        """JSON-able description of everything that gives a position in the stream its meaning."""
        tasks = zip((t for _, t in self.active(split)), self.weights(split), strict=True)
        return {
            "mixture": self.name,
            "split": split,
            "tasks": [{**task.describe(split), "weight": weight} for task, weight in tasks],
            "task_names": [t.name for t in self.tasks],
            "modalities": self.modalities.to_dict(),
            "masking": self.masking.to_dict(),
        }


def _tag(task: int, sample: Sample) -> dict:
    return {**sample, TASK: task}


class _Proportional(grain.transforms.DatasetSelectionMap):
    """Interleaves streams in integer proportions, without state.

    Of the first k samples, k' = floor(k (W - w_0) / W) are not of stream 0, where W is the sum of the weights; of
    those, floor(k' (W - w_0 - w_1) / (W - w_0)) are not of stream 1, and so on. Sample k belongs to the stream whose
    count grows from k to k + 1. All counts are exact where k is a multiple of W.
    """

    def __init__(self, weights: Sequence[int], length: int):
        self._weights, self._length = tuple(weights), length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        now, after, left = index, index + 1, sum(self._weights)
        for stream, weight in enumerate(self._weights[:-1]):
            rest_now, rest_after = now * (left - weight) // left, after * (left - weight) // left
            if rest_now == rest_after:
                return stream, now - rest_now
            now, after, left = rest_now, rest_after, left - weight
        return len(self._weights) - 1, now


def _feature(modality: Modality) -> seqio.Feature:
    rank = 1 + len(row_shape_of(modality))
    if modality.discrete:
        vocabulary = seqio.PassThroughVocabulary(modality.vocab_size)
        return seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32, rank=rank)
    return seqio.ContinuousFeature(dtype=tf.as_dtype(dtype_of(modality)), rank=rank)


def add_task(
    name: str,
    source: RandomAccessSource,
    modalities: Sequence[str],
    preprocessors: Sequence[Preprocessor] = (),
) -> Task:
    """Registers a task with SeqIO.

    Args:
      name: letters, digits and ``_ . :``.
      source: e.g. `data_pipelines.sources.TokenSource`, `data_pipelines.tfds_source.TfdsSource`.
      modalities: names of the registered modalities (`add_modality`) that its samples may have.
      preprocessors: numpy functions from sample to sample, applied in order. They must give the same result every time:
        randomness belongs to the device (masking), where it depends on the position in the stream.

    Returns:
      The task. Registering an equal task again returns the first one.

    Raises:
      KeyError: unknown modality, naming the nearest. ValueError: another task has the name.
    """
    if TASK in modalities:
        raise ValueError(f"task {name!r}: a modality cannot be named {TASK!r}, samples carry the task's index under it")
    if not isinstance(source, RandomAccessSource):
        raise TypeError(
            f"task {name!r}: source is a {type(source).__name__}, expected a data_pipelines.sources.RandomAccessSource "
            "such as TokenSource or TfdsSource"
        )
    task = Task(name, source, modalities, preprocessors)
    return _add(seqio.TaskRegistry, task, "task")


def add_mixture(
    name: str,
    tasks: Sequence[tuple[str, Rate]],
    masking: Masking,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> Mixture:
    """Registers a mixture of tasks with SeqIO.

    Args:
      name: the name that configurations use.
      tasks: names of registered tasks with their rates: positive numbers whose proportions count, or functions of the
        task such as ``seqio.mixing_rate_num_examples``.
      masking: recipe for all tasks, or by task; see `fm4m.masking.Masking`.
      inputs, outputs: names of the modalities the encoder can see and the decoder can predict; default all, and all
        discrete ones.

    Returns:
      The mixture. Registering an equal mixture again returns the first one.

    Raises:
      KeyError: unknown task or modality, naming the nearest. ValueError: a recipe that does not fit, a rate that is not
      positive, or another mixture with the name.
    """
    chosen = []
    for task_name, rate in tasks:
        task = _get(seqio.TaskRegistry, task_name, f"task (mixture {name!r} wants one)")
        if not callable(rate) and not 0 < rate < math.inf:
            raise ValueError(f"mixture {name!r}: the rate of task {task_name!r} is {rate}, expected a positive number")
        if task in [t for t, _ in chosen]:
            raise ValueError(f"mixture {name!r}: task {task_name!r} occurs twice; add up its rates")
        chosen.append((task, rate))
    if not 0 < len(chosen) <= 256:
        raise ValueError(f"mixture {name!r}: needs 1 to 256 tasks (the task's index is uint8), got {len(chosen)}")
    names = dict.fromkeys(itertools.chain.from_iterable(task.modalities for task, _ in chosen))
    modalities = ModalitySet(tuple(modalities_lib.get(n) for n in names), _tuple(inputs), _tuple(outputs))
    masking.validate(modalities, tuple(sorted(task.name for task, _ in chosen)))
    return _add(seqio.MixtureRegistry, Mixture(name, chosen, modalities, masking), "mixture")


def get_mixture(name: str) -> Mixture:
    """The registered mixture of that name. Raises KeyError naming the nearest one, ValueError if it is a plain task."""
    if name not in seqio.MixtureRegistry.names() and name in seqio.TaskRegistry.names():
        raise ValueError(
            f"{name!r} is a task, which has no masking recipe: "
            f"add_mixture({name!r} or another name, [({name!r}, 1.0)], masking=...)"
        )
    return _get(seqio.MixtureRegistry, name, "mixture (is its module among data.modules?)")


def _tuple(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _get(registry: type, name: str, what: str):
    if name not in registry.names():
        raise KeyError(modalities_lib.unknown_name(name, registry.names(), what))
    found = registry.get(name)
    if not isinstance(found, _Streamed):
        raise ValueError(
            f"{name!r} is registered with SeqIO, but not by data_pipelines.registry: it has no random access"
        )
    return found


def _add(registry: type, provider: Task | Mixture, what: str):
    if provider.name in registry.names():
        known = registry.get(provider.name)
        if not isinstance(known, type(provider)) or known.identity() != provider.identity():
            raise ValueError(
                f"{what} {provider.name!r} is registered already, with another definition: choose another name, or "
                f"seqio.{registry.__name__}.remove({provider.name!r}) first"
            )
        return known
    registry.add_provider(provider.name, provider)
    return provider
