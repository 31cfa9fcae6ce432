"""The models a split may use: catalogue entries with their class, and the deterministic split by model."""

from __future__ import annotations

import collections
import dataclasses
import hashlib

from data_pipelines.rooms.classes import CLASSES, Label, label_model
from data_pipelines.rooms.furniture import Catalogue, Furniture, Mesh

VAL_SHARE = 0.2
_SALT = "rooms-2105"  # chosen so that val gets everyday pieces: a double bed, a sofa, a desk, a table, a toilet
MAX_TRIANGLES = 5000  # per model; finer meshes make no visible difference up to 224 pixels


@dataclasses.dataclass(frozen=True)
class Model:
    """A catalogue model that rooms use."""

    entry: Furniture
    label: Label

    @property
    def model_id(self) -> str:
        return self.entry.model_id


def usable_models(catalogue: Catalogue) -> list[Model]:
    """The entries of a catalogue that have a class and a sensible indoor size (at most 2.7 m)."""
    models = []
    for entry in catalogue.entries:
        label = label_model(entry.model_id, entry.name, entry.category)
        if label is not None and max(entry.width, entry.depth, entry.height) <= 2.7:
            models.append(Model(entry, label))
    return models


def split_models(catalogues: list[Catalogue], val_share: float = VAL_SHARE) -> dict[str, list[str]]:
    """Divide the models into {"train": ids, "val": ids}, stratified by class.

    Within a class the models are ordered by the salted SHA-256 of their id and the first ones go to val: a share of
    `val_share`, at least one where the class has two models or more, none where it has one. Catalogues are handled in
    the order given and never change what earlier ones decided, so the public-domain split stays the same when others
    are added. Both lists are sorted.
    """
    total: dict[str, int] = collections.Counter()
    chosen: dict[str, int] = collections.Counter()
    split: dict[str, list[str]] = {"train": [], "val": []}
    for catalogue in catalogues:
        by_class = collections.defaultdict(list)
        for model in usable_models(catalogue):
            by_class[model.label.class_name].append(model.model_id)
        for class_name, ids in by_class.items():
            total[class_name] += len(ids)
            wanted = max(1, round(val_share * total[class_name])) if total[class_name] >= 2 else 0
            count = max(0, min(wanted - chosen[class_name], len(ids)))
            chosen[class_name] += count
            ids = sorted(ids, key=lambda model_id: hashlib.sha256(f"{_SALT}:{model_id}".encode()).hexdigest())
            split["val"] += ids[:count]
            split["train"] += ids[count:]
    return {name: sorted(ids) for name, ids in split.items()}


class ModelLibrary:
    """Models of one split by class, meshes read on first use.

    Args:
      catalogues: as `open_catalogues` returns them (public-domain first; the order decides the split).
      split: "train" or "val".
    """

    def __init__(self, catalogues: list[Catalogue], split: str, max_triangles: int = MAX_TRIANGLES):
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', got {split!r}")
        allowed = set(split_models(catalogues)[split])
        self._catalogue_of: dict[str, Catalogue] = {}
        self._meshes: dict[str, Mesh] = {}
        self._max_triangles = max_triangles
        self.by_class: dict[str, list[Model]] = {name: [] for name in CLASSES}
        for catalogue in catalogues:
            for model in usable_models(catalogue):
                if model.model_id in allowed:
                    self.by_class[model.label.class_name].append(model)
                    self._catalogue_of[model.model_id] = catalogue
        if not self._catalogue_of:
            raise ValueError(f"the catalogues {[str(c.path) for c in catalogues]} hold no usable model for {split!r}")

    def mesh(self, model: Model) -> Mesh:
        """The simplified mesh of a model; ValueError naming file and model if it cannot be read."""
        if model.model_id not in self._meshes:
            catalogue = self._catalogue_of[model.model_id]
            self._meshes[model.model_id] = catalogue.load(model.entry, self._max_triangles)
        return self._meshes[model.model_id]
