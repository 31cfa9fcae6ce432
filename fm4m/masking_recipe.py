"""Masking recipes: what a mixture's tasks show the encoder and ask of the decoder. Plain data, checked before use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from fm4m.modalities import FIRST_SENTINEL_ID, NUM_SENTINELS, ModalitySet, unknown_name

KEEP_SCHEMES = ("random", "all", "binary")
ANY_TASK = "*"


class FrozenMapping(Mapping):
    """A mapping that cannot change and has a hash, so that a recipe can be a static argument of ``jax.jit``."""

    def __init__(self, items: Mapping):
        self._items = dict(items)
        self._hash = hash(frozenset(self._items.items()))

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(self._items)


def _fields_of(cls: type, fields: Mapping, what: str) -> dict:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise ValueError(unknown_name(key, known, f"field of {what}"))
    return dict(fields)


@dataclasses.dataclass(frozen=True)
class MaskingComponent:
    """One Dirichlet distribution over inputs and one over targets; a recipe mixes several.

    Attributes:
      inputs: Dirichlet concentration of every modality on the encoder's side; a modality not named has 0, which
        means never. A float stands for that concentration for every input of the modality set.
      targets: the same on the decoder's side.
      keep: how the probability of keeping a token of a ``sequence`` or ``embedding`` is drawn: ``"random"`` uniform in
        0..1, ``"all"`` always 1, ``"binary"`` 0 or 1 with equal chance. By modality (not named: random), or for all.
      weight: probability of this component relative to the others of its task.
    """

    inputs: Mapping[str, float] | float
    targets: Mapping[str, float] | float
    keep: Mapping[str, str] | str = "random"
    weight: float = 1.0

    def __post_init__(self):
        for side in ("inputs", "targets"):
            value = getattr(self, side)
            if isinstance(value, Mapping):
                object.__setattr__(self, side, FrozenMapping({k: float(v) for k, v in value.items()}))
            else:
                object.__setattr__(self, side, float(value))
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", FrozenMapping(self.keep))
        object.__setattr__(self, "weight", float(self.weight))

    def concentration(self, side: str, modalities: ModalitySet) -> dict[str, float]:
        """The concentration of every modality of the set; ``side`` is ``"inputs"`` or ``"targets"``."""
        value = getattr(self, side)
        if isinstance(value, Mapping):
            return {name: value.get(name, 0.0) for name in modalities.names}
        allowed = modalities.inputs if side == "inputs" else modalities.outputs
        return {name: value if name in allowed else 0.0 for name in modalities.names}

    def keep_scheme(self, name: str) -> str:
        """The keep scheme of a sequence or embedding modality."""
        return self.keep.get(name, "random") if isinstance(self.keep, Mapping) else self.keep

    def to_dict(self) -> dict:
        """JSON-able form."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, fields: Mapping) -> MaskingComponent:
        """Inverse of `to_dict`. Raises ValueError for an unknown field."""
        return cls(**_fields_of(cls, fields, "a masking component"))


def _range(value: Any, name: str) -> int | tuple[int, int]:
    low, high = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    ints = all(isinstance(v, int) and not isinstance(v, bool) for v in (low, high))
    if not ints or not 0 <= low <= high or high < 1:
        raise ValueError(f"{name}={value!r}: give a number of tokens >= 1, or an inclusive range (least, most)")
    return (low, high) if isinstance(value, (tuple, list)) else low


@dataclasses.dataclass(frozen=True)
class Masking:
    """How a mixture's samples become inputs and targets.

    Attributes:
      num_inputs: tokens the encoder may see in a sample, or an inclusive range from which each sample draws its own.
        The packed encoder batch is as wide as the maximum.
      num_targets: the same for the decoder.
      tasks: components by task name; ``"*"`` is the recipe of every task that is not named.
      refill: whether tokens of the budget that a sample cannot use (a grid is smaller than its share, a text shorter)
        go to grids that have cells left. The reference implementation loses them.
    """

    num_inputs: int | tuple[int, int]
    num_targets: int | tuple[int, int]
    tasks: Mapping[str, tuple[MaskingComponent, ...]]
    refill: bool = False

    def __post_init__(self):
        object.__setattr__(self, "num_inputs", _range(self.num_inputs, "num_inputs"))
        object.__setattr__(self, "num_targets", _range(self.num_targets, "num_targets"))
        object.__setattr__(self, "tasks", FrozenMapping({k: tuple(v) for k, v in self.tasks.items()}))

    @property
    def input_range(self) -> tuple[int, int]:
        """Least and most tokens of the input budget; the most is N, the encoder's width."""
        return self.num_inputs if isinstance(self.num_inputs, tuple) else (self.num_inputs, self.num_inputs)

    @property
    def target_range(self) -> tuple[int, int]:
        """Least and most tokens of the target budget; the most is M, the decoder's width."""
        return self.num_targets if isinstance(self.num_targets, tuple) else (self.num_targets, self.num_targets)

    @property
    def most_tokens(self) -> int:
        """The larger of the encoder's and the decoder's width."""
        return max(self.input_range[1], self.target_range[1])

    def components(self, task: str) -> tuple[MaskingComponent, ...]:
        """The recipe of a task. Raises KeyError if the task is not named and there is no ``"*"``."""
        if task in self.tasks:
            return self.tasks[task]
        if ANY_TASK in self.tasks:
            return self.tasks[ANY_TASK]
        unknown = unknown_name(task, self.tasks, "task in the masking recipe")
        raise KeyError(f"{unknown} Add it, or {ANY_TASK!r} for the rest.")

    def to_dict(self) -> dict:
        """JSON-able form."""
        plain = lambda v: list(v) if isinstance(v, tuple) else v  # noqa: E731
        return {
            "num_inputs": plain(self.num_inputs),
            "num_targets": plain(self.num_targets),
            "tasks": {name: [c.to_dict() for c in parts] for name, parts in self.tasks.items()},
            "refill": self.refill,
        }

    @classmethod
    def from_dict(cls, fields: Mapping) -> Masking:
        """Inverse of `to_dict`. Raises ValueError for an unknown field."""
        fields = _fields_of(cls, fields, "a masking recipe")
        fields["tasks"] = {k: tuple(MaskingComponent.from_dict(c) for c in v) for k, v in fields["tasks"].items()}
        return cls(**fields)

    def validate(self, modalities: ModalitySet, task_names: tuple[str, ...]) -> None:
        """Checks the recipe against the modalities and the tasks it will be used with.

        Raises ValueError naming the task, the component and the modality.
        """
        for task in self.tasks:
            if task != ANY_TASK and task not in task_names:
                raise ValueError(unknown_name(task, task_names, "task (the masking recipe mentions one)"))
        for task in task_names:
            try:
                parts = self.components(task)
            except KeyError as error:
                raise ValueError(error.args[0]) from None
            if not parts:
                raise ValueError(f"masking of task {task!r}: needs at least one component")
            for i, part in enumerate(parts):
                _check_component(part, modalities, f"masking of task {task!r}, component {i}")
            if not sum(c.weight for c in parts) > 0:
                raise ValueError(f"masking of task {task!r}: the components' weights sum to 0")
        for m in modalities.modalities:
            # A text of n tokens has at most ceil(n / 2) spans, and one more sentinel closes the target.
            sentinels = min(NUM_SENTINELS, (m.max_tokens + 1) // 2 + 1)
            if m.kind == "sequence" and m.vocab_size < FIRST_SENTINEL_ID + sentinels:
                raise ValueError(
                    f"modality {m.name!r}: span masking of {m.max_tokens} tokens needs ids {FIRST_SENTINEL_ID}.."
                    f"{FIRST_SENTINEL_ID + sentinels - 1} for sentinels, but vocab_size is {m.vocab_size}"
                )


def _check_component(part: MaskingComponent, modalities: ModalitySet, where: str) -> None:
    if not (math.isfinite(part.weight) and part.weight >= 0):
        raise ValueError(f"{where}: weight {part.weight} is not a finite number >= 0")
    for side, allowed in (("inputs", modalities.inputs), ("targets", modalities.outputs)):
        value = getattr(part, side)
        for name, alpha in (value if isinstance(value, Mapping) else {"every modality": value}).items():
            if not (math.isfinite(alpha) and alpha >= 0):
                raise ValueError(f"{where}: concentration {alpha} of {name!r} in {side} is not a finite number >= 0")
            if not isinstance(value, Mapping) or (alpha == 0 and name in modalities.names):
                continue
            if name not in modalities.names:
                raise ValueError(f"{where}, {side}: " + unknown_name(name, modalities.names, "modality"))
            if name not in allowed:
                kind = modalities[name].kind
                why = f"is no {side[:-1]} of the modality set ({side[:-1]}s: {', '.join(allowed)})"
                if side == "targets" and kind in ("pixels", "embedding"):
                    why = f"is of kind {kind!r}, which cannot be predicted; use its tokenised form as the target"
                raise ValueError(f"{where}, {side}: modality {name!r} {why}")
    if not any(part.concentration("targets", modalities).values()):
        raise ValueError(f"{where}: no modality has a target concentration > 0, so there would be nothing to predict")
    for name, scheme in (part.keep if isinstance(part.keep, Mapping) else {None: part.keep}).items():
        if name is not None and name not in modalities.names:
            raise ValueError(f"{where}, keep: " + unknown_name(name, modalities.names, "modality"))
        if name is not None and modalities[name].kind not in ("sequence", "embedding"):
            raise ValueError(f"{where}, keep: {name!r} is a grid; keep is for kinds 'sequence' and 'embedding'")
        if scheme not in KEEP_SCHEMES:
            raise ValueError(f"{where}, keep: scheme {scheme!r} is not one of {', '.join(KEEP_SCHEMES)}")
