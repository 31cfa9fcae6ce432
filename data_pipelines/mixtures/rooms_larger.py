"""Rooms for a super-resolution model: codes at 128 pixels from pictures of 64 (configs/prepare/rooms_larger.py).

The files are looked for in ``$FM4M_ROOMS_LARGER``, by default ``data/rooms_larger`` under the current folder.
"""

from __future__ import annotations

import os
import pathlib

from data_pipelines import registry
from data_pipelines.rooms import modalities as small
from data_pipelines.sources import TokenSource
from fm4m.masking import Masking, MaskingComponent
from fm4m.modalities import Modality

ROOT = pathlib.Path(os.environ.get("FM4M_ROOMS_LARGER", "data/rooms_larger")).absolute()
PREPARE = f"python -m data_pipelines.prepare --config=configs/prepare/rooms_larger.py --out={ROOT}"

LARGE = registry.add_modality(Modality("tok_rgb@128", "tokens", vocab_size=small.CODES["tok_rgb@64"], grid=(16, 16)))
INPUTS = ("rgb@64", "tok_rgb@128", "caption")

registry.add_task("rooms_larger_128", TokenSource(ROOT, prepare=PREPARE), INPUTS)

# As the released super-resolution models, it predicts the larger grid only, from what is smaller and from a part of
# itself, which is what it sees while it is decoded in several steps. It gets the smaller picture's pixels: from codes,
# each of which has a meaning to be learnt, a model of width 128 had learnt nothing after 400 steps.
_TARGETS = {LARGE.name: 1.0}
MASKING = Masking(
    num_inputs=96,
    num_targets=128,
    tasks={
        "*": (
            MaskingComponent({"rgb@64": 1.0}, _TARGETS),
            MaskingComponent({"rgb@64": 4.0, LARGE.name: 2.0, "caption": 0.5}, _TARGETS),
        ),
    },
    refill=True,
)

registry.add_mixture("rooms_larger", [("rooms_larger_128", 1.0)], masking=MASKING, outputs=(LARGE.name,))
