"""The steps that make modalities: records (crops of samples) to arrays as `data_pipelines.manifest` describes them.

Which options a step has is said in `data_pipelines.prepare.config`. Nothing here imports TensorFlow or SeqIO, so the
same steps run under Apache Beam.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.manifest import problem
from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.samples import Labels, Record, generator
from fm4m.config_file import ConfigError
from fm4m.modalities import Modality
from fm4m.transforms import boxes, captions, color_palette, human_poses, metadata

# Reason of a record that a step failed on without the source or a label having said why.
FAILED = "failed"


class Made(NamedTuple):
    """What a step made of one record: an array, or why there is none; and what was done to make it fit."""

    array: np.ndarray | None
    why: Unusable | None = None
    notes: tuple[str, ...] = ()


class Step(abc.ABC):
    """Makes one modality.

    Attributes:
      modality: what it makes.
    """

    modality: Modality

    def run(self, records: Sequence[Record]) -> list[Made]:
        """Every record's array. A record that fails has none; it takes no other with it."""
        try:
            return self._checked(self.arrays(records), records)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            if len(records) == 1:
                return [Made(None, _reason(error, records[0]))]
        half = len(records) // 2
        return self.run(records[:half]) + self.run(records[half:])

    @abc.abstractmethod
    def arrays(self, records: Sequence[Record]) -> list[np.ndarray | Made]:
        """One array a record. Raises if any record fails; `run` then finds out which."""

    def _checked(self, arrays: Sequence[np.ndarray | Made], records: Sequence[Record]) -> list[Made]:
        out = []
        for made, record in zip(arrays, records, strict=True):
            made = made if isinstance(made, Made) else Made(np.asarray(made))
            if fault := problem(made.array, self.modality):
                raise ValueError(f"{record.key}: the array made for modality {self.modality.name!r} {fault}")
            out.append(made)
        return out


def _reason(error: Exception, record: Record) -> Unusable:
    if isinstance(error, Unusable):
        return error
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return Unusable(FAILED, f"{record.key}: {type(error).__name__}: {text}")


def _pair(size: Any, name: str) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ConfigError(f"modalities.{name}: {size!r} is not an edge or (height, width)")
    return pair


class Pixels(Step):
    """The crop of the picture itself, or what a tokenizer makes of it."""

    def __init__(self, name: str, options: Mapping[str, Any]):
        self._size, patch, self._input = _pair(options["size"], name), options["patch_size"], options["input"]
        if any(edge % patch for edge in self._size):
            raise ConfigError(f"modalities.{name}: size {self._size} is not divisible by patch_size {patch}")
        grid = self._size[0] // patch, self._size[1] // patch
        self.modality = Modality(name, "pixels", grid=grid, patch_size=patch, channels=3)
        self._tokenizer = None
        if options["through"]:
            from fm4m.tokenizers import io

            self._tokenizer = io.load(options["through"])
            config = self._tokenizer.config
            if config.domain != "rgb" or config.image_size != self._size:
                raise ConfigError(
                    f"modalities.{name}: {options['through']} is for {config.domain} of {config.image_size} pixels, "
                    f"expected rgb of {self._size}"
                )

    def arrays(self, records: Sequence[Record]) -> list[np.ndarray]:
        if self._input == "rgb":
            cuts = [record.cut(self._size) for record in records]
        else:
            cuts = [record.cut_map(self._input, self._size, nearest=False) for record in records]
        if self._tokenizer is None:
            return cuts
        return list(np.asarray(self._tokenizer.decode(self._tokenizer.encode(np.stack(cuts)))))


class Codes(Step):
    """Codes of a tokenizer, of the picture, of a field that is a map, or of a label."""

    def __init__(self, name: str, options: Mapping[str, Any], labels: Labels):
        from fm4m.tokenizers import io

        self._tokenizer = tokenizer = io.load(options["tokenizer"])
        self._config = config = tokenizer.config
        self._options, self._labels = options, labels
        cells = getattr(config, "num_tokens", math.prod(config.grid))
        grid = tuple(options["grid"] or config.grid)
        if math.prod(grid) != cells:
            root = math.isqrt(cells)
            if options["grid"] or root * root != cells:
                raise ConfigError(
                    f"modalities.{name}: {options['tokenizer']} gives {cells} codes; set grid=(rows, columns)"
                )
            grid = (root, root)
        learned = options["learned_positions"]
        learned = config.domain == "vector" if learned is None else learned
        self.modality = Modality(
            name, "tokens", vocab_size=tokenizer.vocab_size, grid=grid, learned_positions=learned
        )  # fmt: skip
        image = config.array_shape[:2] if len(config.array_shape) > 1 else ()
        self._size = _pair(options["size"], name) if options["size"] else image
        if options["label"] and not self._size:
            raise ConfigError(f"modalities.{name}: set size, the edge of the crops that the label sees")

    def arrays(self, records: Sequence[Record]) -> list[np.ndarray]:
        if self._options["label"]:
            found = self._labels.of_crops(self._options["label"], records, self._size)
            inputs = [self._fitted(np.asarray(label)) for label in found]
        else:
            inputs = [self._input(record) for record in records]
        codes = np.asarray(self._tokenizer.encode(np.stack(inputs)))
        return list(codes.reshape(len(records), -1))

    def _input(self, record: Record) -> np.ndarray:
        name, shape, domain = self._options["input"], self._config.array_shape, self._config.domain
        if domain in ("features", "vector"):
            return _row(record, name, len(shape)).astype(np.float32).reshape(shape)
        if name == "rgb":
            cut = record.cut(shape[:2])
        else:
            cut = record.cut_map(name, shape[:2], nearest=domain in ("semseg", "mask"))
        if domain == "normal" and record.mirrored:
            cut = np.concatenate([255 - cut[..., :1], cut[..., 1:]], axis=-1)
        return self._fitted(cut)

    def _fitted(self, array: np.ndarray) -> np.ndarray:
        shape, domain = self._config.array_shape, self._config.domain
        if domain == "semseg" and self._options["shift"]:
            array = array + np.uint8(1)  # 255 wraps around to 0
        if domain not in ("features", "vector") and array.ndim >= 2 and array.shape[:2] != shape[:2]:
            from data_pipelines.prepare.labels.pixels import resize

            array = resize(array[None], shape[:2], "nearest" if domain in ("semseg", "mask") else "bicubic")[0]
        if array.shape != shape and array.size != math.prod(shape):
            raise ValueError(
                f"tokenizer {self._config.name!r} takes arrays {list(shape)}, the input is {list(array.shape)}"
            )
        return array.reshape(shape)


def _row(record: Record, name: str, ndim: int) -> np.ndarray:
    """The crop's row of a field that has one row a crop; a field without such rows holds for the first crop only."""
    value = record.field(name)
    if isinstance(value, Mapping):
        # The reference implementation's text embeddings: emb [crops, n, width] and which of the n are words.
        emb, valid = np.asarray(value["emb"]), np.asarray(value["mask_valid"]).astype(bool)
        _check_row(record, name, len(emb))
        return emb[record.row][valid[record.row]]
    array = np.asarray(value)
    if array.ndim == ndim:
        array = array[None]
    if array.ndim != ndim + 1:
        raise Unusable("array", f"{record.key}: {name!r} has shape {array.shape}, expected {ndim} axes or rows of them")
    _check_row(record, name, len(array))
    return array[record.row]


def _check_row(record: Record, name: str, rows: int) -> None:
    if record.row >= rows:
        raise Unusable("rows", f"{record.key}: {name!r} has {rows} rows, one for each crop, and no row {record.row}")


class StoredCodes(Step):
    """Codes that the source holds already, one row for every row of its crop settings."""

    def __init__(self, name: str, options: Mapping[str, Any]):
        self._input = options["input"]
        self.modality = Modality(
            name, "tokens", vocab_size=options["vocab_size"], grid=_pair(options["grid"], name),
            learned_positions=bool(options["learned_positions"]),
        )  # fmt: skip

    def arrays(self, records: Sequence[Record]) -> list[np.ndarray]:
        return [_row(record, self._input, 1) for record in records]


class Embedding(Step):
    """Vectors of a label or of a field."""

    def __init__(self, name: str, options: Mapping[str, Any], labels: Labels):
        self._options, self._labels = options, labels
        self._size = _pair(options["size"], name) if options["size"] else None
        if options["label"] and not self._size:
            raise ConfigError(f"modalities.{name}: set size, the edge of the crops that the label sees")
        self.modality = Modality(name, "embedding", max_tokens=options["max_tokens"], channels=options["width"])

    def arrays(self, records: Sequence[Record]) -> list[np.ndarray]:
        if self._options["label"]:
            found = self._labels.of_crops(self._options["label"], records, self._size)
        else:
            found = [_row(record, self._options["input"], 2) for record in records]
        return [np.asarray(x, np.float16).reshape(-1, self.modality.channels) for x in found]


class Text(Step):
    """What text steps share: a record's words, then ids, with [EOS], that fit.

    Args:
      write: record -> list of pieces of text in the order in which they may be dropped from the end (one piece: it is
        cut before its [EOS]).
    """

    def __init__(self, modality: Modality, tokenizer: Any, write: Callable[[Record], list[str]], note: str):
        self.modality, self._tokenizer, self._write, self._note = modality, tokenizer, write, note

    def arrays(self, records: Sequence[Record]) -> list[Made]:
        return [self._one(record) for record in records]

    def _one(self, record: Record) -> Made:
        pieces, limit, notes = self._write(record), self.modality.max_tokens, ()
        while len(ids := self._tokenizer.encode(" ".join(pieces))) > limit:
            notes = (self._note,)
            if len(pieces) <= 1:
                ids = [*ids[: limit - 1], ids[-1]]
                break
            pieces = pieces[:-1]
        return Made(np.array(ids, np.uint16), None, notes)


class Boxes(Text):
    """Boxes as text; those that do not fit are left out, smallest first."""

    def __init__(self, modality: Modality, tokenizer: Any, value: Callable[[Record], Any], options: Mapping[str, Any]):
        super().__init__(modality, tokenizer, lambda record: [], "boxes_left_out")
        self._value = value
        self._threshold, self._visible = options["threshold"], options["min_visibility"]

    def _one(self, record: Record) -> Made:
        found = [boxes.Box(*b["boxes"], b["class_name"], b.get("score", 1.0)) for b in self._value(record)]
        kept = boxes.crop(boxes.filter_score(found, self._threshold), record.window(), self._visible)
        kept = sorted(boxes.flip(kept) if record.mirrored else kept, key=lambda box: -box.area)
        notes: tuple[str, ...] = ()
        # The threshold was applied above; 0 lets everything through.
        while len(ids := boxes.to_ids(kept, self._tokenizer, threshold=0.0)) > self.modality.max_tokens:
            kept, notes = kept[:-1], (self._note,)
        return Made(np.array(ids, np.uint16), None, notes)


def _writer(make: str, name: str, options: Mapping[str, Any], value: Callable[[Record], Any], seed: int):
    """How a text step writes a record, as `Text` wants it."""

    def rng(record: Record) -> np.random.Generator:
        return generator(make, seed, name, record.key)

    def caption(record: Record) -> list[str]:
        texts = value(record)
        row = record.row % len(texts) if not isinstance(texts, str | Mapping) and len(texts) else 0
        return [captions.caption(texts, row)]

    def palette(record: Record) -> list[str]:
        return [color_palette.to_text(color_palette.choose(value(record), options["colors"] or rng(record)))]

    def properties(record: Record) -> list[str]:
        return metadata.chunks(value(record), rng(record))

    def poses(record: Record) -> list[str]:
        if record.size is None:
            raise Unusable("field_missing", f"{record.sample}: people need the size of the picture, which is missing")
        found = human_poses.crop(human_poses.from_record(value(record), record.size), record.window())
        return [human_poses.to_text(found, rng(record))]

    return {"caption": caption, "palette": palette, "metadata": properties, "poses": poses}[make]


def make_step(name: str, options: Mapping[str, Any], labels: Labels, seed: int) -> Step:
    """The step that `data_pipelines.prepare.config.step_options` describes; its text tokenizer is a file's path.

    Raises:
      ConfigError: options that do not fit together, or to the tokenizer.
      FileNotFoundError, ValueError: a tokenizer that cannot be loaded.
    """
    make = options["make"]
    if make == "pixels":
        return Pixels(name, options)
    if make == "codes":
        return Codes(name, options, labels)
    if make == "stored_codes":
        return StoredCodes(name, options)
    if make == "embedding":
        return Embedding(name, options, labels)
    tokenizer = _text_tokenizer(options["tokenizer"])
    modality = Modality(
        name, "sequence", vocab_size=tokenizer.vocab_size, max_tokens=options["max_tokens"],
        max_positions=options.get("max_positions", 0),
    )  # fmt: skip
    label = options.get("label")

    def value(record: Record) -> Any:
        return labels.of_whole(label, record) if label else record.field(options["input"])

    if make == "boxes":
        return Boxes(modality, tokenizer, value, options)
    return Text(modality, tokenizer, _writer(make, name, options, value, seed), f"{make}_cut")


@functools.cache
def _text_tokenizer(path: str) -> Any:
    from fm4m.tokenizers.text import TextTokenizer

    return TextTokenizer.load(path)
