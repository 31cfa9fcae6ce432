"""One part of a preparation: consecutive samples, read, cropped, labelled, tokenised and written, in batches.

What a part contains depends on the plan and the part's number only, not on who makes it, when, or beside which others.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.samples import (
    VALIDATION,
    Labels,
    Record,
    in_validation,
    new_records,
    stored_record,
)
from data_pipelines.prepare.sources import Item, Source, note_word
from data_pipelines.prepare.steps import FAILED, Made, Step, make_step
from data_pipelines.prepare.writer import SAMPLES, PartWriter
from fm4m.config_file import ConfigError
from fm4m.modalities import Modality

MAIN = "source"
# A step that fails in its own code on every record of a part of at least this many is taken for a wrong configuration.
ALL_FAILED = 8

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive samples of a source (a new set), or of one file of a split of a finished set.

    Attributes:
      number: its place among all parts.
      origin: `MAIN` or `VALIDATION`, the source; or the split.
      start, stop: of the source's samples, or of the split's records.
    """

    number: int
    origin: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"part {self.number} ({self.origin}, {self.start} to {self.stop - 1})"


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that makes parts, so that any process can: it can be pickled.

    Attributes:
      out: the set's folder.
      work: folder of the parts.
      adding: whether modalities are added to a finished set; the parts are then its files.
      sources: by `Part.origin` for a new set; for a finished one by split.
      steps: options by name of the modality to make.
      split: of the main source; share: of it that goes to the validation split.
      crops: options of `samples.new_records`.
      seed, batch: as in the configuration.
    """

    out: pathlib.Path
    work: pathlib.Path
    adding: bool
    sources: Mapping[str, Source]
    steps: Mapping[str, Mapping[str, Any]]
    split: str
    share: float
    crops: Mapping[str, Any]
    seed: int
    batch: int

    def folder(self, part: Part) -> pathlib.Path:
        """Where a finished part lies."""
        return self.work / "parts" / f"{part.number:06d}"


class PartMaker:
    """Makes parts of a job, with tokenizers and labellers loaded once.

    Raises:
      ConfigError, ValueError, FileNotFoundError, ImportError: a step that cannot be made; nothing has been done yet.
    """

    def __init__(self, job: Job):
        self.job = job
        labels = Labels()
        self._steps: dict[str, Step] = {
            name: make_step(name, options, labels, job.seed) for name, options in job.steps.items()
        }
        for options in job.steps.values():
            if options.get("label"):
                labels.labeller(options["label"])
        self._index: dict[str, dict[str, int]] = {}

    @property
    def modalities(self) -> dict[str, Modality]:
        return {name: step.modality for name, step in self._steps.items()}

    def make(self, part: Part, progress: Progress = lambda samples, quarantined: None) -> dict:
        """Makes a part and puts it into its place. Returns what its part.json holds.

        Args:
          part: which.
          progress: called after every batch with what was read since the last call, in the unit of the part's start and
            stop, and the samples quarantined.

        Raises:
          OSError, RuntimeError: the disk is full (`writer.is_disk_full`).
          ConfigError: a step fails on every record.
        """
        with PartWriter(self.job.folder(part), list(self.modalities.values()), not self.job.adding) as writer:
            work = _Work(self._steps, writer, self.job, progress)
            for split, records in self._records(part, work):
                work.add(split, records)
            work.flush()
            work.check(part)
            modalities = {name: modality.to_dict() for name, modality in self.modalities.items()}
            return writer.finish({**work.counts.to_dict(), "modalities": modalities})

    def _records(self, part: Part, work: _Work) -> Iterator[tuple[str, list[Record]]]:
        return self._stored(part, work) if self.job.adding else self._new(part, work)

    def _new(self, part: Part, work: _Work) -> Iterator[tuple[str, list[Record]]]:
        source, job = self.job.sources[part.origin], self.job
        for index in range(part.start, part.stop):
            key = source.keys[index]
            try:
                item = _read(source, index)
                records = new_records(item, seed=job.seed, **job.crops)
            except Unusable as why:
                work.quarantine(key, part.origin, why)
                continue
            except ValueError as error:
                work.quarantine(key, part.origin, Unusable("crop_settings", f"{key}: {error}"))
                continue
            work.counts.notes.update(note_word(note) for note in item.notes)
            split = job.split if part.origin == MAIN else VALIDATION
            yield VALIDATION if part.origin == MAIN and in_validation(key, job.share) else split, records

    def _stored(self, part: Part, work: _Work) -> Iterator[tuple[str, list[Record]]]:
        source = self.job.sources[part.origin]
        if part.origin not in self._index:
            self._index[part.origin] = {key: i for i, key in enumerate(source.keys)}
        with (self.job.out / part.origin / SAMPLES).open() as file:
            lines = [json.loads(line) for line in itertools.islice(file, part.start, part.stop)]
        for key, group in itertools.groupby(lines, lambda line: line["sample"]):
            item, why, shared = None, None, {}
            try:
                if key not in self._index[part.origin]:
                    raise Unusable("sample_gone", f"{key}: the source no longer has this sample of the set")
                item = _read(source, self._index[part.origin][key])
            except Unusable as error:
                why = error
            yield part.origin, [stored_record(line, item, why, shared) for line in group]


def _read(source: Source, index: int) -> Item:
    try:
        return source.read(index)
    except (Unusable, KeyboardInterrupt):
        raise
    except Exception as error:
        # One sample must not end the work on all others, whatever a decoder throws; the report counts it.
        key = source.keys[index]
        raise Unusable("read_error", f"{key}: reading failed with {type(error).__name__}: {error}") from error


@dataclasses.dataclass
class Counts:
    """What happened: samples read, quarantined by reason, records without a modality by reason, notes."""

    read: int = 0
    quarantined: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    missing: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def to_dict(self) -> dict:
        """JSON-able form."""
        missing = {name: dict(sorted(counter.items())) for name, counter in sorted(self.missing.items()) if counter}
        return {
            "read": self.read,
            "quarantined": dict(sorted(self.quarantined.items())),
            "missing": missing,
            "notes": dict(sorted(self.notes.items())),
        }

    def add(self, other: Mapping[str, Any]) -> None:
        """Adds what `to_dict` of another part returned."""
        self.read += other["read"]
        self.quarantined.update(other["quarantined"])
        self.notes.update(other["notes"])
        for name, counter in other["missing"].items():
            self.missing.setdefault(name, collections.Counter()).update(counter)


class _Work:
    """Records of one part on their way through the steps, batch by batch and split by split."""

    def __init__(self, steps: Mapping[str, Step], writer: PartWriter, job: Job, progress: Progress):
        self._steps, self._writer, self._progress = steps, writer, progress
        # Parts of a finished set are counted in its records.
        self._size, self._by_record = job.batch, job.adding
        self._waiting: dict[str, list[Record]] = {}
        self._since = [0, 0]
        self._written = 0
        self._failures: dict[str, Unusable] = {}
        self.counts = Counts(missing={name: collections.Counter() for name in steps})

    def quarantine(self, key: str, origin: str, why: Unusable) -> None:
        """A sample that does not come into the set."""
        self.counts.read += 1
        self.counts.quarantined[why.reason] += 1
        entry = {"key": key, "reason": why.reason, "sentence": why.sentence, "origin": origin}
        self._writer.left_out(entry)
        self._since = [self._since[0] + 1, self._since[1] + 1]

    def add(self, split: str, records: list[Record]) -> None:
        """The records of one sample."""
        self.counts.read += 1
        self._since[0] += len(records) if self._by_record else 1
        for record in records:
            # Batches are cut per split by number of records, so that adding a modality later computes the same ones.
            waiting = self._waiting.setdefault(split, [])
            waiting.append(record)
            if len(waiting) == self._size:
                self._flush(split)
        # While a batch fills up, the command should see that something goes on.
        if self._since[0] >= self._size:
            self._report()

    def flush(self) -> None:
        """Makes what is still waiting."""
        for split in sorted(self._waiting):
            self._flush(split)
        self._report()

    def check(self, part: Part) -> None:
        """Raises ConfigError if a step's own code failed on every record."""
        for name, why in self._failures.items():
            if self._written >= ALL_FAILED and self.counts.missing[name][FAILED] == self._written:
                raise ConfigError(
                    f"modalities.{name}: its step failed on all {self._written} records of {part}, the last time with: "
                    f"{why.sentence}. Correct the configuration and run the command again"
                )

    def _flush(self, split: str) -> None:
        records = self._waiting.pop(split, [])
        if not records:
            return
        made = {name: step.run(records) for name, step in self._steps.items()}
        for i, record in enumerate(records):
            self._writer.add(split, record, {name: made[name][i].array for name in made})
            for name in made:
                self._count(name, record, split, made[name][i])
        self._written += len(records)
        self._report()

    def _count(self, name: str, record: Record, split: str, made: Made) -> None:
        self.counts.notes.update(made.notes)
        if made.why is None:
            return
        self.counts.missing[name][made.why.reason] += 1
        if made.why.reason == FAILED:
            self._failures[name] = made.why
        entry = {"key": record.key, "reason": made.why.reason, "sentence": made.why.sentence, "origin": split}
        self._writer.left_out({**entry, "modality": name})

    def _report(self) -> None:
        if any(self._since):
            samples, quarantined = self._since
            self._since = [0, 0]
            self._progress(samples, quarantined)
