"""What one TPU chip can do: the numbers that estimates divide by."""

from __future__ import annotations

import dataclasses

from fm4m import flops

GIB = 2**30

# XLA:TPU overestimates element-wise operations on values that stay on the chip, so estimates cap them at this rate:
# 2.5 TB/s on v4, from VLIW bundle counts of its kernels, taken to grow with clock and cores on the others.
ON_CHIP_BYTES_PER_CYCLE = 1190
# Share of the peak that large element-wise operations reach in XLA's own estimates.
HBM_EFFICIENCY = 0.855


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip; rates in bytes per second are one-directional.

    Attributes:
      kind: the name in slice types such as v4-128.
      device_kind: what JAX calls it.
      clock: Hz at which XLA's ``estimated_cycles`` make large bfloat16 products as fast as the peak allows (v4: 93 % of
        it, v5p 90 %, v5e 88 %; v6e only 70 %, so that its estimates are pessimistic).
      cores: TensorCores a chip.
      hbm_bytes: what the compiler lets a program use, from the message of one that does not fit.
      hbm_rate: peak bytes per second of HBM (vendor's data sheet).
      ici_rate: bytes per second of one link in one direction, as achieved; a torus has two links a dimension.
      dcn_rate: bytes per second of the data-center network for one chip, its part of the host's.
    """

    kind: str
    device_kind: str
    clock: float
    cores: int
    hbm_bytes: int
    hbm_rate: float
    ici_rate: float
    dcn_rate: float

    @property
    def bf16_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return flops.chip_peak(self.device_kind)

    @property
    def hbm_effective(self) -> float:
        """Bytes per second that estimates use for HBM (v4: 1.05 TB/s)."""
        return HBM_EFFICIENCY * self.hbm_rate

    @property
    def on_chip_rate(self) -> float:
        """Bytes per second that estimates use for memory on the chip (v4: 2.5 TB/s)."""
        return ON_CHIP_BYTES_PER_CYCLE * self.clock * self.cores


CHIPS = {
    chip.kind: chip
    for chip in (
        Chip("v4", "TPU v4", 1.05e9, 2, int(30.75 * GIB), 1228.8e9, 45e9, 6.25e9),
        Chip("v5p", "TPU v5", 1.75e9, 2, int(95.74 * GIB), 2765e9, 90e9, 6.25e9),
        Chip("v5e", "TPU v5 lite", 1.5e9, 1, int(15.75 * GIB), 819e9, 45e9, 3.125e9),
        Chip("v6e", "TPU v6 lite", 1.75e9, 1, int(31.25 * GIB), 1640e9, 90e9, 12.5e9),
    )
}
