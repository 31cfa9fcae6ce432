"""What the tests of fm4m.aot share: a small machine, and the walk over the text of a module."""

from __future__ import annotations

from fm4m.aot import collectives, hlo, schedule
from fm4m.aot.chips import CHIPS


def machine(shape=(2, 2, 1), slices=1, wrap=False):
    """TPU v4 chips in the order of their coordinates."""
    x, y, z = shape
    places = tuple(
        collectives.Place(s, (i, j, k)) for s in range(slices) for i in range(x) for j in range(y) for k in range(z)
    )
    return collectives.Machine(CHIPS["v4"], places, shape, (wrap,) * 3)


def walk(text, **costs):
    """The schedule of a module's text, on four chips unless ``machine`` says otherwise."""
    return schedule.walk(hlo.parse(text), schedule.Costs(costs.pop("machine", machine()), **costs))
