"""A new modality and a mixture. Files: ``python -m data_pipelines.mixtures.example_edges``; train with this module in
``data.modules`` and ``data.mixture="rooms_edges"``. Prepare the rooms first."""

import numpy as np

from data_pipelines import records, registry
from data_pipelines.mixtures import rooms
from data_pipelines.sources import TokenSource
from fm4m.masking import Masking, MaskingComponent
from fm4m.modalities import Modality

EDGES = registry.add_modality(Modality("edges@64", "tokens", vocab_size=8 * 8, grid=(8, 8)))
registry.add_task("rooms_edges_64", TokenSource(rooms.ROOT), ["rgb@64", "caption", "edges@64"])
masking = Masking(96, 96, {"rooms_64": rooms.MASKING.components("*"), "*": (MaskingComponent(0.5, {"edges@64": 0.5}),)})
registry.add_mixture("rooms_edges", [("rooms_64", 3.0), ("rooms_edges_64", 1.0)], masking)


def edge_codes(image):  # uint8 [64, 64, 3] -> [64]: strength and direction of the mean gradient of every 8x8 patch
    dy, dx = (g.reshape(8, 8, 8, 8).mean(axis=(1, 3)) for g in np.gradient(image.mean(axis=2)))
    strength = np.clip(np.log2(1 + np.hypot(dx, dy)) * 2, 0, 7).astype(int)
    return (strength * 8 + np.floor((np.arctan2(dy, dx) / np.pi + 1) * 4).astype(int) % 8).reshape(-1)


if __name__ == "__main__":
    for split in ("train", "validation"):
        records.derive_modality(rooms.ROOT, split, EDGES, edge_codes, reads=["rgb@64"], overwrite=True)
