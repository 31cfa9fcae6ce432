"""What a modality is, and how several of them share the model's tables.

Everything that turns "token 17 of modality depth" into a row of a table is in this file: the one embedding table of the
encoder, the one table of the decoder (which is also the output head when heads are tied), the one table of position
embeddings, and the slots of the raw batch. No other file adds offsets.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping

import numpy as np

KINDS = ("tokens", "sequence", "pixels", "embedding")

# The special ids that every sequence modality shares (4M's WordPiece layout): [PAD] [UNK] [SOS] [EOS], then the
# sentinels [S_0]..[S_199]. Span masking numbers its spans from [S_1].
PAD_ID, UNK_ID, SOS_ID, EOS_ID = 0, 1, 2, 3
FIRST_SENTINEL_ID = 5
NUM_SENTINELS = 199

# The reference implementation always builds 512 rows of one-dimensional positions, whatever the maximal length.
SEQUENCE_POSITIONS = 512

# A TPU lane tile is 128 wide; a table whose rows are a multiple of it shards and tiles without remainders.
ROW_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class Modality:
    """One modality.

    Attributes:
      name: unique name, e.g. ``"tok_depth@224"``.
      kind: ``"tokens"``: an unordered set of codes on a grid. ``"sequence"``: ordered, text-like, with the special ids
        above. ``"pixels"``: continuous image patches, encoder only. ``"embedding"``: continuous vectors in order (such
        as the states of a text encoder), encoder only.
      vocab_size: number of codes (``tokens``, ``sequence``); at most 65,536 because raw batches are uint16.
      grid: (rows, columns) of ``tokens`` and ``pixels``.
      max_tokens: the longest ``sequence`` or ``embedding``; for grids it follows from ``grid``.
      patch_size: edge of a patch in pixels (``pixels``).
      channels: image channels (``pixels``) or the width of a vector (``embedding``).
      learned_positions: ``tokens`` only; positions are learned rather than sine-cosine (4M-21's global features).
      max_positions: ``sequence`` only; a decoder token at this position or later gets position 0, as in the reference
        implementation (it matters for human poses, 263 of 275). 0 means ``max_tokens``.
    """

    name: str
    kind: str
    vocab_size: int = 0
    grid: tuple[int, int] | None = None
    max_tokens: int = 0
    patch_size: int = 0
    channels: int = 0
    learned_positions: bool = False
    max_positions: int = 0

    def __post_init__(self):
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(f"modality {self.name!r} of kind {self.kind!r}: {what}")

        if self.kind not in KINDS:
            raise ValueError(f"modality {self.name!r}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.kind in ("tokens", "pixels"):
            need(self.grid is not None and min(self.grid) > 0, "needs grid=(rows, columns)")
            object.__setattr__(self, "grid", tuple(int(g) for g in self.grid))
            cells = self.grid[0] * self.grid[1]
            need(self.max_tokens in (0, cells), f"max_tokens {self.max_tokens} contradicts grid {self.grid}")
            object.__setattr__(self, "max_tokens", cells)
        else:
            need(self.grid is None, "has no grid; give max_tokens")
            need(0 < self.max_tokens <= SEQUENCE_POSITIONS, f"needs max_tokens in 1..{SEQUENCE_POSITIONS}")
        if self.kind in ("tokens", "sequence"):
            need(0 < self.vocab_size <= 65536, f"needs vocab_size in 1..65536, got {self.vocab_size}")
        else:
            need(self.vocab_size == 0, "is continuous and has no vocab_size")
            need(self.channels > 0, "needs channels")
        need((self.patch_size > 0) == (self.kind == "pixels"), "patch_size is for kind 'pixels', and needed there")
        need(not self.learned_positions or self.kind == "tokens", "learned_positions belongs to kind 'tokens'")

    @property
    def discrete(self) -> bool:
        """Whether samples are codes (kinds ``tokens`` and ``sequence``), so that the raw batch has slots for them."""
        return self.kind in ("tokens", "sequence")

    @property
    def patch_dim(self) -> int:
        """Width of one continuous vector: flattened (row, column, channel) patch, or the embedding's own width."""
        return self.patch_size**2 * self.channels if self.kind == "pixels" else self.channels

    def to_dict(self) -> dict:
        """A JSON-able dict of the fields that differ from their default."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        out = {k: v for k, v in fields.items() if v != defaults[k]}
        if self.grid is not None:
            out["grid"] = list(self.grid)
            del out["max_tokens"]
        return out

    @classmethod
    def from_dict(cls, fields: Mapping) -> Modality:
        """Inverse of `to_dict`. Raises ValueError for an unknown, missing or mistyped field."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"a modality is described by an object, not by {fields!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        name, fields = fields.get("name"), dict(fields)
        for key, value in fields.items():
            if key not in known:
                raise ValueError(f"modality {name!r}: unknown field {key!r}; known: {', '.join(known)}")
            kind = {"name": str, "kind": str, "learned_positions": bool}.get(key, int)
            pair = key == "grid" and isinstance(value, (list, tuple)) and [type(n) for n in value] == [int, int]
            if type(value) is not kind and not pair and not (key == "grid" and value is None):
                raise ValueError(f"modality {name!r}: {key} = {value!r} is of the wrong type")
        for key in ("name", "kind"):
            if key not in fields:
                raise ValueError(f"modality {name!r}: field {key!r} is missing")
        if fields.get("grid") is not None:
            fields["grid"] = tuple(fields["grid"])
        return cls(**fields)


def round_up(n: int, multiple: int = ROW_MULTIPLE) -> int:
    """The smallest multiple of ``multiple`` that is at least ``n``."""
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class PositionBlock:
    """Consecutive rows of the position table: ``kind`` is ``"1d"``, ``"2d"`` (with ``grid``) or ``"learned"``."""

    kind: str
    offset: int
    rows: int
    grid: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class ModalitySet:
    """The modalities of one model, laid out side by side.

    Attributes:
      modalities: in a fixed order; a modality's index in it is its index on the device.
      inputs: names of the modalities that the encoder can see; default all.
      outputs: names of the modalities that the decoder can predict; default all discrete ones.
    """

    modalities: tuple[Modality, ...]
    inputs: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "modalities", tuple(self.modalities))
        names = [m.name for m in self.modalities]
        if not names:
            raise ValueError("a modality set needs at least one modality")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"modality {name!r} occurs twice in one set")
        inputs = tuple(names if self.inputs is None else self.inputs)
        outputs = tuple([m.name for m in self.modalities if m.discrete] if self.outputs is None else self.outputs)
        for side, chosen in (("inputs", inputs), ("outputs", outputs)):
            for name in chosen:
                if name not in names:
                    raise KeyError(unknown_name(name, names, f"modality for the {side} in this modality set"))
        for name in outputs:
            if not self[name].discrete:
                raise ValueError(f"modality {name!r} of kind {self[name].kind!r} cannot be an output: it has no codes")
        object.__setattr__(self, "inputs", tuple(n for n in names if n in inputs))
        object.__setattr__(self, "outputs", tuple(n for n in names if n in outputs))

    def __getitem__(self, name: str) -> Modality:
        return self.modalities[self.index(name)]

    def __len__(self) -> int:
        return len(self.modalities)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.modalities)

    def index(self, name: str) -> int:
        """Index of a modality on the device. Raises KeyError naming the nearest known name."""
        if name not in self.names:
            raise KeyError(unknown_name(name, self.names, "modality in this modality set"))
        return self.names.index(name)

    # ---- slots of the raw batch: the codes of all discrete modalities side by side, no padding between them

    @functools.cached_property
    def slot_offset(self) -> dict[str, int]:
        """First slot in ``tokens[B, S]`` of every discrete modality."""
        return _offsets({m.name: m.max_tokens for m in self.modalities if m.discrete})[0]

    @functools.cached_property
    def num_slots(self) -> int:
        """S, the width of the raw batch's ``tokens``."""
        return _offsets({m.name: m.max_tokens for m in self.modalities if m.discrete})[1]

    # ---- rows of the two token tables

    @functools.cached_property
    def input_offset(self) -> dict[str, int]:
        """First row in the encoder's embedding table of every discrete input."""
        return _offsets({n: round_up(self[n].vocab_size) for n in self.inputs if self[n].discrete})[0]

    @functools.cached_property
    def input_rows(self) -> int:
        """Rows of the encoder's embedding table (every modality rounded up to a multiple of 128)."""
        return _offsets({n: round_up(self[n].vocab_size) for n in self.inputs if self[n].discrete})[1]

    @functools.cached_property
    def output_offset(self) -> dict[str, int]:
        """First row of every output in the decoder's embedding table and in the output head."""
        return _offsets({n: round_up(self[n].vocab_size) for n in self.outputs})[0]

    @functools.cached_property
    def output_rows(self) -> int:
        """Rows of the decoder's embedding table and of the output head."""
        return _offsets({n: round_up(self[n].vocab_size) for n in self.outputs})[1]

    # ---- continuous inputs: their projected vectors are laid side by side as [B, continuous_rows, dim]

    @functools.cached_property
    def continuous(self) -> tuple[str, ...]:
        """Names of the continuous inputs (pixels, embeddings)."""
        return tuple(n for n in self.inputs if not self[n].discrete)

    @functools.cached_property
    def continuous_offset(self) -> dict[str, int]:
        """First index of every continuous input among the projected vectors of a sample."""
        return _offsets({n: self.continuous_count(n) for n in self.continuous})[0]

    @functools.cached_property
    def continuous_rows(self) -> int:
        return _offsets({n: self.continuous_count(n) for n in self.continuous})[1]

    def continuous_count(self, name: str) -> int:
        """Vectors a sample of a continuous modality. An embedding has one more, all zero: what a masked span shows."""
        return self[name].max_tokens + (self[name].kind == "embedding")

    # ---- rows of the position table

    @functools.cached_property
    def position_blocks(self) -> tuple[PositionBlock, ...]:
        """The blocks of the position table: one for all sequences, one a grid shape, then the learned ones."""
        blocks, offset = [], 0
        if any(m.kind in ("sequence", "embedding") for m in self.modalities):
            blocks.append(PositionBlock("1d", 0, SEQUENCE_POSITIONS))
            offset = SEQUENCE_POSITIONS
        for grid in dict.fromkeys(m.grid for m in self.modalities if m.grid and not m.learned_positions):
            blocks.append(PositionBlock("2d", offset, grid[0] * grid[1], grid))
            offset += grid[0] * grid[1]
        for m in self.modalities:
            if m.learned_positions:
                blocks.append(PositionBlock("learned", offset, m.max_tokens, m.grid))
                offset += m.max_tokens
        return tuple(blocks)

    @functools.cached_property
    def position_offset(self) -> dict[str, int]:
        """First row in the position table of every modality."""
        out, learned = {}, [b for b in self.position_blocks if b.kind == "learned"]
        for m in self.modalities:
            if m.learned_positions:
                out[m.name] = learned.pop(0).offset
            elif m.grid:
                out[m.name] = next(b.offset for b in self.position_blocks if b.kind == "2d" and b.grid == m.grid)
            else:
                out[m.name] = 0
        return out

    @functools.cached_property
    def position_rows(self) -> int:
        return self.position_blocks[-1].offset + self.position_blocks[-1].rows

    @functools.cached_property
    def learned_position_rows(self) -> int:
        """How many rows at the end of the position table are parameters (of each side of the model)."""
        return sum(b.rows for b in self.position_blocks if b.kind == "learned")

    # ---- per-modality constants for the device, indexed by modality index

    @functools.cached_property
    def is_sequence(self) -> np.ndarray:
        """bool [num modalities]: whether a decoder token sees only earlier tokens of its modality."""
        return np.array([m.kind == "sequence" for m in self.modalities])

    @functools.cached_property
    def is_continuous(self) -> np.ndarray:
        """bool [num modalities]."""
        return np.array([not m.discrete for m in self.modalities])

    @functools.cached_property
    def output_ranges(self) -> np.ndarray:
        """int32 [num modalities, 2]: first and one-past-last true row of the head; (0, 0) if not an output."""
        ranges = np.zeros((len(self.modalities), 2), np.int32)
        for name, start in self.output_offset.items():
            ranges[self.index(name)] = start, start + self[name].vocab_size
        return ranges

    def to_dict(self) -> dict:
        """JSON-able form, stored beside checkpoints so that a position in a stream keeps its meaning."""
        return {
            "modalities": [m.to_dict() for m in self.modalities],
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
        }

    @classmethod
    def from_dict(cls, fields: Mapping) -> ModalitySet:
        """Inverse of `to_dict`. Raises ValueError for anything else."""
        lists = [fields.get(key) for key in ("modalities", "inputs", "outputs")] if isinstance(fields, Mapping) else [0]
        if not all(isinstance(entries, (list, tuple)) for entries in lists):
            raise ValueError("a modality set is described by the lists 'modalities', 'inputs' and 'outputs'")
        modalities = tuple(Modality.from_dict(m) for m in fields["modalities"])
        try:
            return cls(modalities, tuple(map(str, fields["inputs"])), tuple(map(str, fields["outputs"])))
        except KeyError as error:
            raise ValueError(error.args[0]) from None


def _offsets(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    out, total = {}, 0
    for name, size in sizes.items():
        out[name] = total
        total += size
    return out, total


def unknown_name(name: str, known: Iterable[str], what: str) -> str:
    """The sentence for an unknown name: what it was meant to be, the nearest known name, and all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"there is no {what} named {name!r}.{hint} Known: {', '.join(known) or 'none'}"


_REGISTRY: dict[str, Modality] = {}


def register(modality: Modality) -> Modality:
    """Makes a modality known by name to tasks and mixtures.

    Registering an equal modality twice is allowed (a module may be imported under two names); a different one under a
    known name raises ValueError.
    """
    if _REGISTRY.get(modality.name, modality) != modality:
        raise ValueError(f"modality {modality.name!r} is registered already, differently: {_REGISTRY[modality.name]}")
    _REGISTRY[modality.name] = modality
    return modality


def get(name: str) -> Modality:
    """The registered modality of that name. Raises KeyError naming the nearest known name."""
    if name not in _REGISTRY:
        raise KeyError(unknown_name(name, _REGISTRY, "registered modality"))
    return _REGISTRY[name]
