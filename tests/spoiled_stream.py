"""The tiny stream with a feature vector for each sample, which is NaN at chosen positions of the stream."""

from __future__ import annotations

import dataclasses

import numpy as np
from tiny_run import MODALITIES, TinyStream

from fm4m.modalities import Modality, ModalitySet

FEATURE = Modality("feature", "embedding", max_tokens=4, channels=6)


class SpoiledStream(TinyStream):
    """``spoiled``: the positions whose feature is not a number."""

    def __init__(self, spoiled=(), **options):
        super().__init__(modalities=ModalitySet((*MODALITIES.modalities, FEATURE)), **options)
        self._spoiled = spoiled

    def _batch(self, positions):
        raw = super()._batch(positions)
        feature = np.random.default_rng(int(positions[0])).standard_normal((len(positions), 4, 6)).astype(np.float16)
        feature[np.isin(positions, self._spoiled)] = np.nan
        length = raw.length.copy()
        length[:, self.modalities.index("feature")] = 4
        return dataclasses.replace(raw, length=length, dense={**raw.dense, "feature": feature})
