"""A configuration for the tests of fm4m.aot: pixels, one grid and one text, which compile in half of 4M-7's time."""

from __future__ import annotations

from fm4m import recipes
from fm4m.masking import Masking, MaskingComponent
from fm4m.modalities import Modality, ModalitySet
from fm4m.modality_sets import released

MODALITIES = ModalitySet(
    (released("rgb@224"), released("tok_depth@224"), Modality("caption", "sequence", 30000, max_tokens=64))
)


def masking() -> Masking:
    return Masking(64, 64, {"*": (MaskingComponent(inputs=0.5, targets=0.5),)})


def get_config():
    recipes.RELEASED["tiny"] = MODALITIES, masking
    c = recipes.mod7_pretraining("fm_tiny_6e_6d_swiglu_nobias")
    c.data.mixture = "tiny"
    c.data.num_inputs = c.data.num_targets = 64
    c.model.encoder_depth = c.model.decoder_depth = 1
    c.train.global_batch = 32
    return c
