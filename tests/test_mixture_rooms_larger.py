"""The mixture of the super-resolution recipe."""

from __future__ import annotations

import numpy as np
from masking_cases import make_raw, run

from data_pipelines import registry
from data_pipelines.mixtures import rooms_larger


def test_it_predicts_the_larger_grid_from_the_smaller_one_and_from_a_part_of_itself():
    mixture = registry.get_mixture("rooms_larger")
    modalities = mixture.modalities
    small, large = modalities.index("rgb@64"), modalities.index("tok_rgb@128")
    assert modalities.outputs == ("tok_rgb@128",) and set(modalities.inputs) == set(rooms_larger.INPUTS)
    packed = run(make_raw(modalities, 64, seed=0, missing=0.0), mixture.masking, modalities)
    asked, shown = packed.decoder, packed.encoder
    assert asked.valid.all() and (asked.modality == large).all() and asked.valid.shape == (64, 128)
    of_small = (shown.valid & (shown.modality == small)).sum(1)
    of_large = (shown.valid & (shown.modality == large)).sum(1)
    # Half of the samples show the smaller picture alone and whole.
    alone = np.asarray((of_small == 64) & (shown.valid.sum(1) == 64))
    assert 16 <= alone.sum() <= 48
    assert (of_small > 0).mean() > 0.9 and 0.2 < (of_large > 0).mean() < 0.8
