"""How often the loops of the loss run, whose number of iterations depends on how many targets each modality has.

`fm4m.loss` gives every modality a fixed number of slots. What is left over goes through two loops for each size of
vocabulary: over the modalities that have whole blocks left, with a loop over the blocks inside, and over those that
have less than a block left. They are known by the products with a head [vocabulary, width] that they hold.
"""

from __future__ import annotations

import math
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
    expected: dict[int, np.ndarray] = {}
    for name, vocabulary in facts["vocabularies"].items():
        expected[vocabulary] = expected.get(vocabulary, 0.0) + left_over(facts, name)
    inside: dict[int, set[str]] = {}

    def trips(module: Module, loop: Instruction) -> float | None:
        vocabulary = _vocabulary(module, loop, set(expected))
        if vocabulary is None:
            return None
        if id(module) not in inside:
            inside[id(module)] = _inner_loops(module)
        has_blocks, blocks, has_rest = expected[vocabulary]
        if loop.name in inside[id(module)]:
            return blocks / has_blocks if has_blocks else 1.0
        holds_loop = any(i.opcode == "while" for _, i in _walk(module, loop.called("body")))
        return has_blocks if holds_loop else has_rest

    return trips


def left_over(facts: dict[str, Any], name: str) -> np.ndarray:
    """Float [3] for a modality: how likely it has whole blocks left over, how many on average, how likely a rest."""
    samples, slots, lengths = facts["rows_per_pass"], facts["loss"]["slots"].get(name, 0), facts["loss"]["lengths"]
    mean, deviation = facts["expected_targets"][name] * samples, facts["target_deviations"][name] * math.sqrt(samples)
    counts = np.maximum(np.random.default_rng(0).normal(mean, deviation, _DRAWS).round(), 0)
    left = np.maximum(counts - slots, 0)
    blocks = left // lengths[-1] if len(lengths) > 1 else np.ceil(left / lengths[-1])
    return np.array([(blocks > 0).mean(), blocks.mean(), (left > blocks * lengths[-1]).mean()])


def _vocabulary(module: Module, loop: Instruction, vocabularies: set[int]) -> int | None:
    """The rows of the head that a loop multiplies with."""
    for _, i in _walk(module, loop.called("body")):
        for size in i.arrays[0].dims if i.opcode in _PRODUCTS else ():
            if size in vocabularies:
                return size
    return None


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
