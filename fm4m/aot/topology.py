"""Slice types by the names that users know, as topologies of the real TPU compiler, without a TPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from fm4m.aot.chips import CHIPS, Chip
from fm4m.config_file import ConfigError
from fm4m.modalities import unknown_name

# Shapes of slices. Three-dimensional ones are tori from 4 x 4 x 4 up, whose wrap-around links the compiler must be told
# of: without them it lowers all-gathers to all-reduces of twice the traffic.
_CUBES = (
    (1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 4, 12), (4, 8, 8), (4, 8, 12),
    (8, 8, 8), (8, 8, 12), (8, 8, 16), (8, 12, 16), (8, 16, 16), (12, 16, 16), (16, 16, 16),
)  # fmt: skip
_PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SHAPES = {"v4": _CUBES, "v5p": (*_CUBES, (16, 16, 24)), "v5e": _PLANES, "v6e": _PLANES}
_ALIASES = {"v5litepod": "v5e"}

# What libtpu reads when it is loaded. Without the first a second process fails on a lock file; without the second it
# waits for a metadata server that is not there.
LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
}

_LIBTPU_MISSING = "compiling for a TPU needs libtpu, the TPU compiler: pip install '.[aot]'"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice type, and how many slices of it.

    Attributes:
      name: what users call it: ``v4-128``.
      chip: its chip.
      shape: chips along each dimension of one slice.
      slices: slices that are joined by the data-center network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def chips_per_host(self) -> int:
        """Chips of one TPU VM: 4, or all of a smaller slice; the 2 x 4 of v5e-8 and v6e-8 are one machine of 8.

        (Google's pages "TPU v5e" and "TPU v6e": v5litepod-8 is ct5lp-hightpu-8t.)
        """
        return 8 if self.shape == (2, 4) else self.chips_per_node

    @property
    def chips_per_node(self) -> int:
        """Chips of one node of GKE. A pool of 2 x 4 can be one node of 8, too; those that xpk makes are two of 4."""
        return min(4, math.prod(self.shape))

    @property
    def hosts_per_slice(self) -> int:
        return math.prod(self.shape) // self.chips_per_host

    @property
    def hosts(self) -> int:
        return self.hosts_per_slice * self.slices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which dimensions are rings."""
        if len(self.shape) == 3:
            return (min(self.shape) >= 4,) * 3
        return tuple(size == 16 for size in self.shape)

    def describe(self) -> str:
        shape = "x".join(map(str, self.shape))
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{slices}{self.name} ({shape}): {self.chips} chips, {self.hosts} hosts"


def names() -> list[str]:
    """All slice types."""
    return [_name(kind, shape) for kind, shapes in _SHAPES.items() for shape in shapes]


def _name(kind: str, shape: tuple[int, ...]) -> str:
    # v4 and v5p count TensorCores, two a chip; v5e and v6e chips.
    return f"{kind}-{math.prod(shape) * (2 if len(shape) == 3 else 1)}"


def parse(name: str, slices: int = 1) -> Topology:
    """The slice type of that name (``v4-128``, ``v5litepod-64``). Raises ConfigError naming the nearest that exist."""
    kind, _, size = name.strip().lower().partition("-")
    kind = _ALIASES.get(kind, kind)
    for shape in _SHAPES.get(kind, ()):
        if f"{kind}-{size}" == _name(kind, shape):
            return Topology(_name(kind, shape), CHIPS[kind], shape, slices)
    if kind in _SHAPES and re.fullmatch(r"\d+", size):
        counts = sorted(int(_name(kind, shape).split("-")[1]) for shape in _SHAPES[kind])
        below, above = [c for c in counts if c < int(size)][-1:], [c for c in counts if c > int(size)][:1]
        near = " and ".join(f"{kind}-{c}" for c in below + above)
        unit = "TensorCores, two a chip" if len(_SHAPES[kind][0]) == 3 else "chips"
        raise ConfigError(f"--topology: there is no {name}; the number counts {unit}; the nearest: {near}")
    raise ConfigError(f"--topology: {unknown_name(name, names(), 'slice type')}")


def require_libtpu() -> None:
    """Raises ConfigError with the command to install it if libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(_LIBTPU_MISSING)


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology, one a chip, as `jax.sharding.Mesh` takes them; they cannot run anything.

    Raises ConfigError if libtpu is missing or does not know the shape.
    """
    require_libtpu()
    from jax.experimental import topologies

    for key, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    bounds = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}
    options: dict[str, Any] = {"chips_per_host_bounds": bounds[topology.chips_per_host]}
    if len(topology.shape) == 3:
        # One device a chip, as on the machines themselves; the default of v4 is one a core.
        options["chip_config_name"] = "megacore"
    if any(topology.wrap):
        options["wrap"] = (*topology.wrap, False)[:3]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    shape = "x".join(map(str, topology.shape))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.chip.kind}:{shape}", **options
        ).devices
    except Exception as error:  # JaxRuntimeError; libtpu's own words are kept
        raise ConfigError(f"--topology: libtpu cannot make {topology.describe()}: {error}") from error
    if len(found) != topology.chips:
        raise ConfigError(f"--topology: libtpu makes {len(found)} devices of {topology.describe()}")
    return list(found)
