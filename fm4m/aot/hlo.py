"""Reads the text of an optimized XLA module (HLO) into computations and instructions; plain Python, no JAX.

Only what a cost estimate needs is kept: names, opcodes, shapes with their memory space, operands, and the raw text of
attributes, which are looked up on demand.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_REFERENCE = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """An array type: element type, dimensions, and memory space (0: HBM; others are on the chip)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without the padding of tiles."""
        return math.prod(self.dims) * ITEM_BYTES[self.dtype]


@functools.lru_cache(maxsize=65536)
def parse_type(text: str) -> tuple[Array, ...]:
    """The arrays of a type, tuples flattened: ``"(f32[2]{0:S(1)}, s32[])"`` -> two arrays."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype in ITEM_BYTES:
            space = re.search(r"S\((\d+)\)", layout)
            arrays.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0))
    return tuple(arrays)


@dataclasses.dataclass(slots=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique within the module.
      opcode: such as ``"fusion"``.
      type: the text of its type.
      operands: names of the instructions (of the same computation) that it reads.
      arguments: the text between its parentheses: the value of a constant, the number of a parameter.
      attributes: everything after them, as text.
      root: whether its value is the computation's.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool = False

    @property
    def arrays(self) -> tuple[Array, ...]:
        return parse_type(self.type)

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names: ``calls``, ``body``, ``condition``, ``to_apply``."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        if match := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
            return [name.strip().lstrip("%") for name in match[1].split(",")]
        return [name for a in ("true_computation", "false_computation") if (name := self.called(a))]

    @property
    def op_name(self) -> str:
        """The path of JAX names that it comes from, "" if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def estimated_cycles(self) -> int | None:
        """XLA:TPU's own estimate, present after code generation only."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        # Unknown costs are the largest 64-bit integer.
        return int(match[1]) if match and int(match[1]) < 2**62 else None


@dataclasses.dataclass
class Computation:
    """Instructions in schedule order."""

    name: str
    instructions: list[Instruction]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users = collections.defaultdict(list)
        for i in self.instructions:
            for operand in dict.fromkeys(i.operands):
                users[operand].append(i)
        return users


@dataclasses.dataclass
class Module:
    """All computations by name; ``entry`` is the one that runs."""

    computations: dict[str, Computation]
    entry: Computation

    def inside(self, computation: str | None) -> Iterator[Instruction]:
        """The instructions of a computation and of everything that it calls by ``calls``."""
        if computation in self.computations:
            for i in self.computations[computation].instructions:
                yield i
                if i.opcode in ("fusion", "async-start"):
                    yield from self.inside(i.called("calls"))


def parse(text: str) -> Module:
    """Parses the text of a module. Raises ValueError if it has no entry computation."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line[:1] not in (" ", "\t", "}", "") and line.rstrip().endswith("{"):
            if header := _HEADER.match(line):
                current = Computation(header[2], [])
                computations[header[2]] = current
                entry = current if header[1] else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            current.instructions.append(_instruction(start, line[start.end() :]))
    if entry is None:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    return Module({k: c for k, c in computations.items() if c.instructions}, entry)


def _instruction(start: re.Match, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return Instruction(start[2], rest.strip().split("(")[0], kind, (), "", "", bool(start[1]))
    end = _closing(rest, opcode.end() - 1)
    arguments = rest[opcode.end() : end - 1]
    operands = tuple(_REFERENCE.findall(arguments))
    return Instruction(start[2], opcode[1], kind, operands, arguments, rest[end:], bool(start[1]))


def _closing(text: str, position: int) -> int:
    """Position after the parenthesis that closes the one at ``position``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, position):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)
