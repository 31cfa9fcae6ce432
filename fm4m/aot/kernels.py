"""The cost of the project's own kernels, which XLA does not estimate."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fm4m.aot.chips import Chip
from fm4m.aot.hlo import Computation, Instruction
from fm4m.aot.kernel_cost import LANES, KernelCostError

# Of `fm4m.aot.kernel_cost.attention_seconds`.
AttentionSeconds = Callable[..., dict[str, float]]


def kernel_seconds(
    facts: dict[str, Any], chip: Chip, cost: AttentionSeconds
) -> Callable[[Computation, Instruction], float | None]:
    """The function that `fm4m.aot.schedule.Costs` asks for the time of one run of a kernel; it knows attention's.

    They are called ``attention_forward`` and ``attention_backward``, and their first operands are query [samples,
    slots, width] and key. None for other kernels, and where the compiler does not say.
    """
    head_dim = facts["model"]["dim"] // facts["model"]["num_heads"]

    def seconds(computation: Computation, i: Instruction) -> float | None:
        match = re.search(r"attention_(forward|backward)", f"{i.op_name} {i.name}")
        if match is None:
            return None
        query, key = (computation.by_name[name].arrays[0] for name in i.operands[:2])
        (samples, queries, width), keys = query.dims, key.dims[1]
        dtype, blocks = {"bf16": "bfloat16"}.get(query.dtype, "float32"), -(-width // LANES)
        try:
            times = cost(queries, keys, head_dim, dtype, chip=chip.kind, samples=samples, lane_blocks=blocks)
        except KernelCostError:
            return None
        return samples * blocks * times[match[1]]

    return seconds
