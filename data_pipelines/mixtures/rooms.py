"""The built-in mixture: eight modalities of rendered rooms at 64 pixels, prepared by `data_pipelines.rooms.prepare`.

The token files are looked for in ``$FM4M_ROOMS``, by default ``data/rooms`` under the current folder. They are opened
with the first stream, not on import; a vocabulary or grid other than the registered one is then an error.
"""

from __future__ import annotations

from data_pipelines import registry
from data_pipelines.rooms.modalities import MODALITIES, ROOT
from data_pipelines.sources import TokenSource
from fm4m.masking import Masking, MaskingComponent

DENSE = ("tok_depth@64", "tok_normal@64", "tok_semseg@64")
PREPARE = f"python -m data_pipelines.rooms.prepare --out={ROOT}"

registry.add_task("rooms_64", TokenSource(ROOT, prepare=PREPARE), MODALITIES)

# The two components of the released 4M-7 models: everything from the image alone, and everything from everything
# (symmetric Dirichlet concentrations of 0.5: few modalities dominate a sample). Runs on so few samples are short, and
# every target counts: budgets are refilled, and from the image mostly its geometry and classes are asked, which is what
# the sample pictures show.
_TARGETS = {name: 0.5 for name in MODALITIES if name != "rgb@64"}
_FROM_IMAGE = {name: 2.0 if name in DENSE else 0.2 for name in _TARGETS}
MASKING = Masking(
    num_inputs=64,
    num_targets=192,
    tasks={
        "*": (MaskingComponent({"rgb@64": 1000.0}, _FROM_IMAGE, weight=3.0), MaskingComponent(0.5, _TARGETS)),
    },
    refill=True,
)

registry.add_mixture("rooms", [("rooms_64", 1.0)], masking=MASKING)
