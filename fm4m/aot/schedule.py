"""Walks the optimized schedule of a step and adds up what every instruction costs.

The time of an instruction is XLA:TPU's own ``estimated_cycles``, with two corrections: what is no matrix product is
capped at the time its bytes need (XLA overestimates element-wise operations two to three times), and a product takes at
least as long as its bytes in HBM. Kernels (Pallas) have no estimate; `Costs.kernel_seconds` gives theirs. Loops count
as often as they run, branches of a conditional by their average. Collectives are counted apart. The module must have
been compiled to the end for a time; bytes, FLOPs and collectives are there before code generation.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable

from fm4m.aot import collectives, loops
from fm4m.aot.hlo import Computation, Instruction, Module

# Take no time of their own: names, and the far ends of asynchronous operations.
_FREE = {
    "get-tuple-element", "tuple", "parameter", "bitcast", "constant", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "send", "recv", "send-done", "recv-done", "domain",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_ASYNCHRONOUS = ("copy-start", "slice-start", "async-start")
_PRODUCTS = ("convolution", "dot")
# Their cost is not in the bytes, so XLA's estimate stands as it is.
_IRREGULAR = ("scatter", "sort")
# The named scopes of the step (`jax.named_scope`) whose time is told apart; of nested ones the innermost counts.
PARTS = ("masking", "embeddings", "encoder", "decoder", "loss", "optimizer")
OTHER = "other"


@dataclasses.dataclass
class Costs:
    """What the walk cannot know from the module.

    Attributes:
      machine: chips and links.
      kernel_seconds: (computation, custom call) -> seconds of one run of a kernel, or None if it is not known.
      loop_trips: (module, while instruction) -> expected iterations of a loop whose number depends on data.
    """

    machine: collectives.Machine
    kernel_seconds: Callable[[Computation, Instruction], float | None] = lambda c, i: None
    loop_trips: Callable[[Module, Instruction], float | None] = lambda m, i: None


@dataclasses.dataclass
class Schedule:
    """Totals of one step on one chip.

    Attributes:
      seconds: estimate of everything but collectives.
      product_seconds: the part of it in matrix products.
      kernel_seconds: the part of it in custom kernels.
      raw_seconds: the sum of XLA's estimates, without corrections and kernels.
      product_flops: FLOPs of the matrix products that the program runs, recomputation included; those of a kernel are
        what it declares.
      floor_seconds: sum over instructions of the larger of FLOPs and HBM bytes over the chip's peaks; needs no code
        generation.
      hbm_bytes: read and written.
      collectives: counts, bytes and seconds.
      loops: every loop: (name, iterations, whether they were expected instead of known).
      unknown: loops that depend on data and were counted once, and custom calls of unknown cost.
      parts: seconds by named scope (`PARTS`, `OTHER`): their sum is ``seconds``.
      heaviest: (seconds a step, executions, opcode, name, JAX name) of the costliest instructions.
    """

    collectives: collectives.Tally
    seconds: float = 0.0
    product_seconds: float = 0.0
    kernel_seconds: float = 0.0
    raw_seconds: float = 0.0
    product_flops: float = 0.0
    floor_seconds: float = 0.0
    hbm_bytes: float = 0.0
    loops: list[tuple[str, float, bool]] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)
    parts: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys((*PARTS, OTHER), 0.0))
    heaviest: list[tuple[float, float, str, str, str]] = dataclasses.field(default_factory=list)


def walk(module: Module, costs: Costs, heaviest: int = 20) -> Schedule:
    """Adds up one execution of the module's entry computation."""
    return _Walk(module, costs).run(heaviest)


class _Walk:
    def __init__(self, module: Module, costs: Costs):
        self.module, self.costs, self.chip = module, costs, costs.machine.chip
        self.total = Schedule(collectives.Tally(costs.machine))
        self.rows: list[tuple[float, float, str, str, str]] = []

    def run(self, heaviest: int) -> Schedule:
        self.computation(self.module.entry, 1.0)
        self.total.heaviest = sorted(self.rows, reverse=True)[:heaviest]
        return self.total

    def computation(self, computation: Computation, times: float) -> None:
        for i in computation.instructions:
            if i.opcode == "while":
                self.loop(computation, i, times)
            elif i.opcode == "conditional":
                branches = i.branches
                for name in branches:
                    self.computation(self.module.computations[name], times / len(branches))
            elif i.opcode == "call":
                self.computation(self.module.computations[i.called("to_apply")], times)
            elif (collective := collectives.find(self.module, i, self.costs.machine)) is not None:
                self.total.collectives.add(collective, times)
            elif i.opcode not in _FREE and not i.opcode.endswith("-done") and "async-collective-done" not in i.name:
                self.instruction(computation, i, times)

    def loop(self, computation: Computation, i: Instruction, times: float) -> None:
        trips = loops.trip_count(self.module, computation, i)
        known = trips is not None
        if not known:
            trips = self.costs.loop_trips(self.module, i)
            if trips is None:
                trips = 1
                self.total.unknown.append(f"loop {i.name} ({i.op_name or 'no name'}), counted once")
        self.total.loops.append((i.name, trips, not known))
        self.computation(self.module.computations[i.called("body")], times * trips)

    def instruction(self, computation: Computation, i: Instruction, times: float) -> None:
        total, chip = self.total, self.chip
        inner = {c.opcode for c in self.module.inside(i.called("calls"))} if i.opcode == "fusion" else {i.opcode}
        hbm, on_chip = traffic(self.module, computation, i)
        product = not inner.isdisjoint(_PRODUCTS)
        flops = product_flops(self.module, computation, i) if product else _declared_flops(i)
        cycles = i.estimated_cycles
        by_hbm = hbm / chip.hbm_effective
        by_bytes = max(by_hbm, (hbm + on_chip) / chip.on_chip_rate)
        by_xla = (cycles or 0) / chip.clock
        kernel = None
        if i.opcode == "custom-call":
            kernel = self.costs.kernel_seconds(computation, i) if "tpu_custom_call" in i.attributes else None
            if kernel is None and "tpu_custom_call" in i.attributes:
                total.unknown.append(f"kernel {i.name} ({i.op_name})")
            seconds = kernel or 0.0
        elif i.opcode in _ASYNCHRONOUS:
            seconds = 0.0  # beside the arithmetic
        elif product:
            seconds = max(by_xla, by_hbm)
        elif cycles is None:
            seconds = by_hbm
        elif not inner.isdisjoint(_IRREGULAR):
            seconds = by_xla
        else:
            seconds = min(by_xla, by_bytes)
        total.seconds += times * seconds
        total.parts[part(i.op_name)] += times * seconds
        total.raw_seconds += times * by_xla
        total.hbm_bytes += times * hbm
        total.product_flops += times * flops
        total.product_seconds += times * seconds * product
        total.kernel_seconds += times * (kernel or 0.0)
        total.floor_seconds += times * max(flops / chip.bf16_flops, hbm / chip.hbm_rate, kernel or 0.0)
        self.rows.append((times * seconds, times, i.opcode, i.name, i.op_name))


def part(op_name: str) -> str:
    """The part of the step that an instruction belongs to, by its JAX name: jit(step)/transpose(jvp(loss))/mul -> loss.

    A fusion has the name of its root.
    """
    found = re.findall(rf"\b(?:{'|'.join(PARTS)})\b", op_name)
    return found[-1] if found else OTHER


# ---- bytes


def traffic(module: Module, computation: Computation, i: Instruction) -> tuple[int, int]:
    """(bytes in HBM, bytes in memory on the chip) that one run of an instruction reads and writes.

    Of an operand that is only sliced, the slices count; of a result that is updated in place, the update.
    """
    sizes = [0, 0]

    def add(space: int, count: int) -> None:
        sizes[0 if space == 0 else 1] += count

    if i.opcode in _ASYNCHRONOUS:
        # Source and destination, of which one may be a slice of the other.
        moved = min(array.bytes for array in i.arrays[:2])
        for array in i.arrays[:2]:
            add(array.space, moved)
        return sizes[0], sizes[1]
    if i.opcode == "custom-call" and not i.operands:
        return 0, 0  # AllocateBuffer
    if i.opcode == "custom-call" and re.search(r'"(ConcatBitcast|ZeroCrop|AssumeGatherIndicesInBound)"', i.attributes):
        return 0, 0
    body = module.computations.get(i.called("calls") or "") if i.opcode == "fusion" else None
    for number, name in enumerate(i.operands):
        source = computation.by_name.get(name)
        if source is None or len(source.arrays) != 1:
            continue
        array, read = source.arrays[0], None
        if body is not None and number in body.parameters:
            read = _read(module, body, body.parameters[number].name)
        elif body is None and i.opcode in _SLICES and number == 0:
            read = i.bytes
        elif body is None and i.opcode == "dynamic-update-slice" and number == 0:
            read = 0
        add(array.space, array.bytes if read is None else min(read, array.bytes))
    for array, written in _written(computation, body, i):
        add(array.space, written)
    return sizes[0], sizes[1]


def _read(module: Module, body: Computation, name: str) -> int | None:
    """Bytes of a value that the computation reads, if it only takes slices of it; None: all of them."""
    if name == body.root.name:
        return None
    total = 0
    for user in body.users[name]:
        if user.opcode in _SLICES:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name and name not in user.operands[1:]:
            continue
        elif user.opcode == "bitcast":
            read = _read(module, body, user.name)
            if read is None:
                return None
            total += read
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")]
            for number, operand in enumerate(user.operands):
                if operand == name:
                    read = _read(module, inner, inner.parameters[number].name) if number in inner.parameters else None
                    if read is None:
                        return None
                    total += read
        else:
            return None
    return total


def _written(computation: Computation, body: Computation | None, i: Instruction):
    """(array, bytes written) of every result."""
    where, root = (body, body.root) if body is not None else (computation, i)
    roots = [where.by_name.get(name) for name in root.operands] if body and root.opcode == "tuple" else [root]
    if len(roots) != len(i.arrays):
        return [(array, array.bytes) for array in i.arrays]
    return [(array, min(array.bytes, _update(where, r))) for array, r in zip(i.arrays, roots)]


def _update(where: Computation, i: Instruction | None) -> int | float:
    while i is not None and i.opcode == "bitcast" and i.operands:
        i = where.by_name.get(i.operands[0])
    if i is not None and i.opcode == "dynamic-update-slice" and i.operands[1] in where.by_name:
        return where.by_name[i.operands[1]].bytes
    return math.inf


# ---- FLOPs


def product_flops(module: Module, computation: Computation, i: Instruction) -> float:
    """FLOPs of the matrix products in an instruction, fused ones included; XLA:TPU writes them as convolutions."""
    if i.opcode == "fusion":
        inner = module.computations[i.called("calls")]
        return sum(product_flops(module, inner, c) for c in inner.instructions if c.opcode in ("fusion", *_PRODUCTS))
    if i.opcode not in _PRODUCTS:
        return 0.0
    left, right = (computation.by_name[name].arrays[0].dims for name in i.operands[:2])
    out = math.prod(i.arrays[0].dims)
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        return 2.0 * out * math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->", i.attributes)
    depth = right[labels[2].index("i")]
    return 2.0 * out * depth * _taps(i.attributes)


def _declared_flops(i: Instruction) -> float:
    match = re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.attributes) if i.opcode == "custom-call" else None
    return float(match[1]) if match else 0.0


def _taps(attributes: str) -> int:
    """Positions of a convolution's window that meet the input for each output, over all window dimensions.

    A batch dimension becomes a window dimension of which one position only meets the (dilated or padded) input.
    """
    window = re.search(r"window=\{([^}]*)\}", attributes)
    if window is None:
        return 1
    fields = collections.defaultdict(list)
    for name, values in re.findall(r"(\w+)=([\d_x\-]+)", window[1]):
        fields[name] = values.split("x")
    taps = 1
    for k, size in enumerate(fields["size"]):
        dilated = [fields[f][k] for f in ("lhs_dilate", "stride") if fields[f]]
        padded = fields["pad"] and fields["pad"][k] != "0_0"
        if not padded and all(d in ("1", "0") for d in dilated):
            taps *= int(size)
    return taps
