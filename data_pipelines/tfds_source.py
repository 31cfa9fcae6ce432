"""Any TFDS data set as a source: random access through ``tfds.data_source``, no tf.data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.sources import RandomAccessSource, Sample, Samples, function_identity, function_name


class TfdsSource(RandomAccessSource):
    """A TFDS data set stored as ArrayRecord.

    Args:
      name: TFDS name, with version where the run is to be repeatable: ``"my_set/config:1.0.0"``.
      function: turns TFDS's decoded sample (nested dict of numpy arrays) into {modality: array}; it must give the same
        arrays every time, because the place in the stream is all that a run remembers.
      splits: our split names to TFDS's (``{"validation": "train[90%:]"}``), or names that are the same on both sides.
      data_dir: TFDS's folder of prepared data sets; default TFDS's own. Nothing is downloaded.
      decoders: passed to TFDS, e.g. to skip the decoding of unused images.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[dict], Mapping[str, np.ndarray]],
        splits: Sequence[str] | Mapping[str, str] = ("train", "validation"),
        data_dir: str | os.PathLike | None = None,
        decoders: Mapping | None = None,
    ):
        self._split_of = dict(splits) if isinstance(splits, Mapping) else {s: s for s in splits}
        super().__init__(tuple(self._split_of))
        self._name, self._function, self._data_dir, self._decoders = name, function, data_dir, decoders
        self._builder: tfds.core.DatasetBuilder | None = None

    @property
    def builder(self) -> tfds.core.DatasetBuilder:
        """TFDS's builder of the prepared data set. Raises FileNotFoundError if it is not prepared."""
        if self._builder is None:
            builder = tfds.builder(self._name, data_dir=self._data_dir)
            if not builder.is_prepared():
                raise FileNotFoundError(
                    f"TFDS data set {self._name!r} is not in {builder.data_dir}: prepare it with "
                    f"`tfds build {self._name} --file_format=array_record`"
                )
            self._builder = builder
        return self._builder

    def open_split(self, split: str, modalities: Sequence[str]) -> Samples:
        try:
            source = self.builder.as_data_source(self._split_of[split], decoders=self._decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"TFDS data set {self._name!r} in {self.builder.data_dir} has no random access ({error}): prepare it "
                "with --file_format=array_record"
            ) from error
        return _Mapped(source, self._function, f"TFDS {self._name} {self._split_of[split]}")

    def describe(self, split: str, modalities: Sequence[str]) -> dict:
        info = self.builder.info
        chosen = info.splits[self._split_of[split]]
        return {
            "kind": "tfds",
            "name": info.full_name,
            "split": self._split_of[split],
            "records": chosen.num_examples,
            "bytes": sum(s.num_bytes for s in info.splits.values()),
            "map": function_name(self._function),
        }

    def identity(self) -> tuple:
        return self._name, str(self._data_dir), tuple(self._split_of.items()), function_identity(self._function)

    def num_input_examples(self, split: str) -> int:
        return self.builder.info.splits[self._split_of[split]].num_examples


class _Mapped:
    def __init__(self, source: Sequence[dict], function: Callable[[dict], Mapping[str, np.ndarray]], name: str):
        self._source, self._function, self._name = source, function, name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        return {name: np.asarray(array) for name, array in self._function(self._source[index]).items()}

    def where(self, index: int, modality: str) -> str:
        return f"{self._name}, sample {index}"
