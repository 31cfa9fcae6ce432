"""Where samples to prepare come from: one protocol for folders, tar shards, TFDS data sets and rooms packs.

    source = open_source({"kind": "folder", "path": "photos", "captions": "photos/captions.csv"})
    for index in range(len(source.keys)):
        item = source.read(index)
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from data_pipelines.prepare.errors import Problem, Unusable

# Modules are imported when a kind is used: only the TFDS source needs TensorFlow Datasets.
_KINDS = {
    "folder": ("data_pipelines.prepare.source_folder", "FolderSource"),
    "tars": ("data_pipelines.prepare.source_tars", "TarSource"),
    "tfds": ("data_pipelines.prepare.source_tfds", "TfdsImageSource"),
    "rooms": ("data_pipelines.prepare.source_rooms", "RoomsSource"),
}


@dataclasses.dataclass(frozen=True)
class Item:
    """One sample as a source has it.

    Attributes:
      key: the sample's key, UTF-8 text, unique in its source.
      fields: ``rgb`` uint8 [H, W, 3]; ``caption`` list of str; exact labels where the source has them: ``depth``
        float32 [H, W] in metres, ``normal`` uint8 [H, W, 3], ``semseg`` uint8 [H, W], ``det`` list of ``{"boxes":
        [xmin, ymin, xmax, ymax] in [0, 1], "class_name": str, "score": float}``; ``crop_settings`` int64 [n, 5] (top,
        left, height, width, flip) and ``tok_*`` integer arrays of a set that is tokenised already; other arrays or
        JSON by name.
      notes: what was done to the sample to make it usable, as "word" or "word: detail"; count by `note_word`.
      failures: field -> why this sample lacks it although the source has the field. The other fields are good.
    """

    key: str
    fields: dict[str, Any]
    notes: tuple[str, ...] = ()
    failures: dict[str, Unusable] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """Samples with random access. Can be pickled and used after a fork; holds no open files between reads.

    Attributes:
      keys: keys of the samples, unique, in the source's order, the same at every opening of unchanged data.
      problems: what was found while listing and is no sample: files, rows and members that take no part, samples
        without what is required, and, one a tar and field, how many samples lack a field. What concerns one of ``keys``
        comes with `read`, as a note, a failure or Unusable.
      fields: names of all fields that a sample may have, so that a modality which wants another is refused before any
        work is done; None if that is not known.
    """

    keys: Sequence[str]
    problems: Sequence[Problem]
    fields: Sequence[str] | None

    def read(self, index: int) -> Item:
        """Sample ``index``. Raises Unusable if its image (or what `required` names) cannot be used."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON for a manifest: kind, options, number of samples, hash of the keys, problems by reason.

        Equal for equal data and options; sizes of files are part of it, so a source that changed is seen.
        """
        ...


def open_source(config: Mapping[str, Any]) -> Source:
    """The source that a configuration describes: ``{"kind": "folder" | "tars" | "tfds" | "rooms", **options}``.

    The options of a kind are the arguments of its class: `source_folder.FolderSource`, `source_tars.TarSource`,
    `source_tfds.TfdsImageSource`, `source_rooms.RoomsSource`.

    Raises:
      ValueError: unknown kind or option, a missing option, or no sample at all.
      FileNotFoundError: the place does not exist.
    """
    options = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kind = options.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"source kind {kind!r} is unknown{_suggest(kind, _KINDS)}. Known kinds: {', '.join(_KINDS)}")
    module, name = _KINDS[kind]
    made_by = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(made_by).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(
                f"a source of kind {kind!r} has no option {option!r}{_suggest(option, parameters)}. "
                f"Its options: {', '.join(parameters)}"
            )
    lacking = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    if lacking:
        raise ValueError(f"a source of kind {kind!r} needs the option {lacking[0]!r}")
    source = made_by(**options)
    if not source.keys:
        found = " ".join(p.sentence for p in source.problems[:3]) or "Nothing was found."
        raise ValueError(f"the source {config} has no samples. {found}")
    return source


def note_word(note: str) -> str:
    """The word to count a note by: ``first_frame`` of ``first_frame: of 12 frames``."""
    return note.partition(":")[0]


def describe(
    kind: str, options: Mapping[str, Any], keys: Sequence[str], problems: Iterable[Problem], **more: Any
) -> dict[str, Any]:
    """What `Source.describe` returns: equal for equal data and options, whatever folder the data is in."""
    reasons: dict[str, int] = {}
    for problem in problems:
        reasons[problem.reason] = reasons.get(problem.reason, 0) + 1
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode() + b"\0")
    return {
        "kind": kind,
        "options": dict(options),
        "samples": len(keys),
        "keys": digest.hexdigest(),
        "problems": dict(sorted(reasons.items())),
        **more,
    }


def _suggest(word: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
