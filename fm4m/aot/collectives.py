"""Collective operations of a compiled module: kinds, device groups, bytes, and the time that links need for them."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from fm4m.aot.chips import Chip
from fm4m.aot.hlo import Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device is: its slice, and its chip's coordinates in the slice."""

    slice: int
    coordinates: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of a mesh, in its order, and the rings between them.

    Attributes:
      chip: what each can do.
      places: of every device.
      shape: chips along each dimension of a slice.
      wrap: which dimensions are rings.
    """

    chip: Chip
    places: tuple[Place, ...]
    shape: tuple[int, ...]
    wrap: tuple[bool, ...]

    @property
    def slices(self) -> int:
        return len({p.slice for p in self.places})

    def links(self, group: Sequence[int]) -> int:
        """One-directional links that a chip of the group can send over at once, inside a slice: two for each dimension
        that the group spans as a whole ring, one for each that it spans otherwise."""
        places = [self.places[i] for i in group]
        places = [p for p in places if p.slice == places[0].slice]
        links = 0
        for dim, (size, wrap) in enumerate(zip(self.shape, self.wrap)):
            extent = len({p.coordinates[dim] for p in places})
            links += (2 if wrap and extent == size else 1) if extent > 1 else 0
        return max(links, 1)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective instruction.

    Attributes:
      kind: one of `KINDS`.
      asynchronous: whether it is started and awaited by separate instructions, so that others run meanwhile.
      bytes: the whole array on each device: what an all-gather makes, a reduce-scatter or all-reduce takes.
      group: devices of the first group (numbers in the mesh's order).
      network: ``"ICI"``, or ``"DCN"`` between slices.
    """

    kind: str
    asynchronous: bool
    bytes: int
    group: tuple[int, ...]
    network: str

    def sent(self) -> float:
        """Bytes that every device sends in a ring algorithm over the group."""
        n = max(len(self.group), 1)
        once = self.bytes * (n - 1) / n
        return {"all-reduce": 2 * once, "collective-permute": float(self.bytes)}.get(self.kind, once)

    def seconds(self, machine: Machine) -> float:
        """Bytes sent over the links (or the network) that the group has; latencies are not counted."""
        if self.network == "DCN":
            return self.sent() / machine.chip.dcn_rate
        return self.sent() / (machine.links(self.group) * machine.chip.ici_rate)


def find(module: Module, instruction: Instruction, machine: Machine) -> Collective | None:
    """The collective that an instruction is or starts; None for all others, and for those that await one."""
    i, opcode = instruction, instruction.opcode
    if opcode == "send" and "megascale" in i.attributes:
        return _between_slices(i, machine)
    if opcode.endswith(("-done", "-update")):
        return None
    for kind in KINDS:
        if opcode in (kind, f"{kind}-start"):
            return _collective(i, kind, opcode != kind, machine)
    if opcode not in ("fusion", "async-start") or "kind=kLoop" in i.attributes:
        return None
    inner = {c.opcode: c for c in module.inside(i.called("calls"))}
    found = next(((kind, inner[kind]) for kind in KINDS if kind in inner), None)
    if found is None:
        return None
    if opcode == "async-start" or "async-collective-start" in i.name:
        return _collective(found[1], found[0], True, machine)
    if "async-collective-done" in i.name or "async_collective_fusion" in (i.called("calls") or ""):
        return None  # a product that runs while the collective does, or its end
    if found[0] == "all-reduce" and "dynamic-slice" in inner:
        # XLA:TPU's reduce-scatter when the partitioner made it.
        return _collective(found[1], "reduce-scatter", False, machine)
    return _collective(found[1], found[0], False, machine)


def _collective(i: Instruction, kind: str, asynchronous: bool, machine: Machine) -> Collective:
    count = len(machine.places)
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.attributes)
        group = next(((int(a), int(b)) for a, b in pairs if a != b), (0,))
    else:
        group = first_group(i.attributes, count)
    size, n = i.bytes, len(group)
    if i.opcode in ("all-gather-start", "reduce-scatter-start"):
        size = size * n // (n + 1)  # the type holds operands and results, of which one is n times the other
    elif i.opcode == "collective-permute-start":
        size = i.arrays[0].bytes
    elif i.opcode == "reduce-scatter":
        size *= n
    crosses = len({machine.places[d].slice for d in group if d < count}) > 1
    return Collective(kind, asynchronous, size, group, "DCN" if crosses else "ICI")


def _between_slices(i: Instruction, machine: Machine) -> Collective | None:
    """A transfer that libtpu hands to the hosts: between slices, what a collective is made of."""
    match = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    kind = match[1].lower().replace("_", "-") if match else "collective-permute"
    size = max((a.bytes for a in i.arrays if a.dims), default=0)
    if kind not in KINDS:
        kind = "collective-permute"
    first = {p.slice: d for d, p in reversed(list(enumerate(machine.places)))}
    return Collective(kind, True, size, tuple(sorted(first.values())), "DCN")


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first of an instruction's replica groups; all devices if it names none.

    XLA writes them as ``{{0,1},{2,3}}``, as ``[2,2]<=[4]`` or ``[2,2]<=[2,2]T(1,0)`` (that many groups of that size,
    of the numbers 0.. in that shape, transposed), or as ``mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`` (groups
    along some axes; without device_ids of the numbers in order).

    Raises ValueError for anything else.
    """
    match = re.search(r"replica_groups=(\S.*)", attributes)
    if match is None or match[1].startswith("{}"):
        return tuple(range(devices))
    text = match[1]
    if group := re.match(r"\{\{([\d,]*)\}", text):
        return tuple(int(d) for d in group[1].split(","))
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = _iota(iota[3], iota[4])
        return tuple(int(d) for d in ids.reshape(int(iota[1]), int(iota[2]))[0])
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{([^}]*)\}", text):
        return _mesh_group(mesh[1], mesh[2], mesh[3])
    raise ValueError(f"cannot read the replica groups of a collective: {text[:120]}")


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    shape = [int(d) for d in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(d) for d in transpose.split(",")]) if transpose else ids).reshape(-1)


def _mesh_group(axes: str, device_ids: str | None, along: str) -> tuple[int, ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if device_ids and (iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)):
        ids = _iota(iota[1], iota[2])
    elif device_ids:
        ids = np.array([int(d) for d in re.findall(r"\d+", device_ids)])
    # A part of an axis is written 'a':(2)4: the 4 in the middle of a = 2 x 4 x the rest.
    parts = [(name, int(pre or 1), int(size) if size else None)
             for name, pre, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)]  # fmt: skip
    index = [np.zeros(1, int)] * len(sizes)
    for name, pre, size in parts:
        axis = list(sizes).index(name)
        size = size or sizes[name]
        step = sizes[name] // (pre * size)
        index[axis] = (index[axis][:, None] + np.arange(size) * step).reshape(-1)
    return tuple(int(d) for d in ids.reshape(list(sizes.values()))[np.ix_(*index)].reshape(-1))


class Tally:
    """Counts collectives, weighted by how often they run."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.rows: dict[tuple[str, bool, str, int], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])

    def add(self, c: Collective, executions: float) -> None:
        row = self.rows[c.kind, c.asynchronous, c.network, len(c.group)]
        seconds = c.seconds(self.machine) * executions
        for k, value in enumerate((1, executions, c.bytes * executions, seconds)):
            row[k] += value

    def table(self) -> list[dict]:
        """One row for each kind, asynchrony, network and group size: count, executed, bytes, seconds a step."""
        keys = ("kind", "asynchronous", "network", "group")
        fields = ("count", "executed", "bytes", "seconds")
        rows = [dict(zip(keys, key)) | dict(zip(fields, row)) for key, row in self.rows.items()]
        return sorted(rows, key=lambda row: -row["bytes"])

    def seconds(self, asynchronous: bool | None = None, network: str | None = None) -> float:
        """Seconds of those that are (or are not) asynchronous, and of one network."""
        return sum(
            row[3]
            for (_, is_asynchronous, over, _), row in self.rows.items()
            if asynchronous in (None, is_asynchronous) and network in (None, over)
        )

    def bytes(self, network: str) -> float:
        return sum(row[2] for key, row in self.rows.items() if key[2] == network)
