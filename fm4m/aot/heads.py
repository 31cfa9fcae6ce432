"""How often the loops of the loss run, whose number of iterations depends on how many targets each modality has.

`fm4m.loss` gives every modality a fixed number of slots. What is left over goes through loops for each size of
vocabulary, one for each block length: over the modalities that have blocks of the longest left, with a loop over those
blocks inside, and over the modalities that have one block of a shorter length left. They are known by the products with
a head [vocabulary, width] that they hold; a shorter length also by the rows of those products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fm4m.aot import loops
from fm4m.aot.hlo import Instruction, Module

_PRODUCTS = ("convolution", "dot")
_DRAWS = 4096


def loop_trips(facts: dict[str, Any]) -> Callable[[Module, Instruction], float | None]:
    """The function that `fm4m.aot.schedule.Costs` asks for the expected iterations of a loop; None if not the loss's.

    The targets of a modality on a device are taken to be normal, with mean and deviation from the masking recipe.
    """
    expected: dict[int, LeftOver] = {}
    for name, vocabulary in facts["vocabularies"].items():
        expected.setdefault(vocabulary, LeftOver()).add(facts, name)
    inside: dict[int, set[str]] = {}

    def trips(module: Module, loop: Instruction) -> float | None:
        vocabulary = _vocabulary(module, loop, set(expected))
        if vocabulary is None:
            return None
        if id(module) not in inside:
            inside[id(module)] = _inner_loops(module)
        left = expected[vocabulary]
        if loop.name in inside[id(module)]:
            return left.blocks / left.has_blocks if left.has_blocks else 1.0
        if any(i.opcode == "while" for _, i in _walk(module, loop.called("body"))):
            return left.has_blocks
        rows = _sizes(module, loop)
        return next((share for length, share in left.has_shorter.items() if length in rows), left.has_blocks)

    return trips


@dataclasses.dataclass
class LeftOver:
    """Expected numbers of modalities (of one vocabulary size) that have blocks left, and of blocks of the longest."""

    has_blocks: float = 0.0
    blocks: float = 0.0
    has_shorter: dict[int, float] = dataclasses.field(default_factory=dict)

    def add(self, facts: dict[str, Any], name: str) -> None:
        """Adds a modality of a program's `fm4m.aot.build.Program.facts`."""
        samples, slots, lengths = facts["rows_per_pass"], facts["loss"]["slots"].get(name, 0), facts["loss"]["lengths"]
        mean, deviation = facts["expected_targets"][name] * samples, facts["target_deviations"][name] * samples**0.5
        counts = np.maximum(np.random.default_rng(0).normal(mean, deviation, _DRAWS).round(), 0)
        units = np.ceil(np.maximum(counts - slots, 0) / lengths[0])
        blocks = units // (lengths[-1] // lengths[0])
        self.has_blocks += float((blocks > 0).mean())
        self.blocks += float(blocks.mean())
        for length in lengths[:-1]:
            share = float((units // (length // lengths[0]) % 2).mean())
            self.has_shorter[length] = self.has_shorter.get(length, 0.0) + share


def _vocabulary(module: Module, loop: Instruction, vocabularies: set[int]) -> int | None:
    """The rows of the head that a loop multiplies with."""
    return next((size for size in _sizes(module, loop) if size in vocabularies), None)


def _sizes(module: Module, loop: Instruction) -> list[int]:
    """All dimensions of the products in a loop."""
    products = (i for _, i in _walk(module, loop.called("body")) if i.opcode in _PRODUCTS)
    return [size for i in products for size in i.arrays[0].dims]


def _inner_loops(module: Module) -> set[str]:
    """Names of the loops within loops that depend on data."""
    return {
        inner.name
        for where, loop in _walk(module, module.entry.name)
        if loop.opcode == "while" and loops.trip_count(module, module.computations[where], loop) is None
        for _, inner in _walk(module, loop.called("body"))
        if inner.opcode == "while"
    }


def _walk(module: Module, computation: str | None) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction), through everything that is called."""
    if computation not in module.computations:
        return
    for i in module.computations[computation].instructions:
        yield computation, i
        if i.opcode == "conditional":
            called = i.branches
        elif i.opcode in ("while", "fusion", "call", "async-start"):
            called = [i.called("body") or i.called("calls") or i.called("to_apply")]
        else:
            continue
        for name in called:
            yield from _walk(module, name)
