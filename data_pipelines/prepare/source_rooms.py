"""Rooms packs as a source: pictures with exact depth, normals, classes, boxes and captions."""

from __future__ import annotations

import collections
import glob
import os
import pathlib
from typing import Any

from data_pipelines.prepare.arrays import detections
from data_pipelines.prepare.errors import Problem, Unusable, printable
from data_pipelines.prepare.sources import Item, describe
from data_pipelines.rooms.pack import SHIPPED, RoomsPack


class RoomsSource:
    """Samples of packs, with keys ``<pack>/<key>``. Fields: rgb, depth, normal, semseg, det, caption.

    Args:
      path: glob pattern of pack files; the shipped training pack when left out.

    Raises:
      FileNotFoundError: no file matches. A damaged pack is a problem, its samples are left out.
    """

    def __init__(self, path: str | os.PathLike = SHIPPED / "rooms_train.zip"):
        paths = sorted(glob.glob(os.fspath(path)))
        if not paths:
            raise FileNotFoundError(f"{path}: no rooms pack matches this pattern")
        self.problems: list[Problem] = []
        self.fields = ("rgb", "depth", "normal", "semseg", "det", "caption")
        self._packs: list[RoomsPack] = []
        for each in paths:
            try:
                self._packs.append(RoomsPack(each))
            except (ValueError, OSError) as error:
                self.problems.append(Problem(printable(each), "corrupt", f"{error}."))
        stems = [pathlib.Path(pack.path).stem for pack in self._packs]
        counts = collections.Counter(stems)
        labels = [stem if counts[stem] == 1 else str(pack.path) for stem, pack in zip(stems, self._packs)]
        self.keys: list[str] = [f"{label}/{key}" for label, pack in zip(labels, self._packs) for key in pack.keys]
        self._places = [(p, i) for p, pack in enumerate(self._packs) for i in range(len(pack))]

    def read(self, index: int) -> Item:
        """A sample. Raises Unusable, reason ``corrupt``, where the pack is damaged."""
        pack, number = self._places[index]
        key = self.keys[index]
        try:
            sample = self._packs[pack][number]
        except (ValueError, OSError) as error:
            raise Unusable("corrupt", str(error)) from error
        fields: dict[str, Any] = {name: sample[name] for name in ("rgb", "depth", "normal", "semseg")}
        fields["det"] = detections(sample["instances"], key)
        if not sample["caption"].strip():
            return Item(key, fields, (), {"caption": Unusable("caption_empty", f"{key}: the caption is empty")})
        return Item(key, {**fields, "caption": [sample["caption"]]})

    def describe(self) -> dict[str, Any]:
        """As `sources.Source.describe`; with the packs' classes, in the order of their ids."""
        return describe(
            "rooms",
            {},
            self.keys,
            self.problems,
            classes=list(self._packs[0].classes) if self._packs else [],
            bytes=sum(os.path.getsize(pack.path) for pack in self._packs),
        )
