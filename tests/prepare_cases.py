"""Sources and configurations for the tests of the preparation: made-up pictures, no files, some of them unusable."""

from __future__ import annotations

import os
import pathlib
import time

import numpy as np

from data_pipelines.prepare import config as config_lib
from data_pipelines.prepare.errors import Problem, Unusable
from data_pipelines.prepare.sources import Item, describe

COLOURS = ("red", "green", "blue")


class MadeUp:
    """Pictures of one colour with some texture and a caption. Every eleventh is unusable, every seventh has none.

    Args:
      count: samples.
      pause: seconds that reading one takes.
      dies: file that is there once a worker has died on sample 5; "" for a source that kills nobody. A file named
        "always" never comes to be there.
    """

    def __init__(self, count: int = 40, pause: float = 0.0, dies: str = "", prefix: str = "s"):
        self.keys = [f"{prefix}{i:03d}" for i in range(count)]
        self.problems = [Problem("stray.txt", "no_picture", "stray.txt: a caption file without a picture beside it.")]
        self.fields = ("rgb", "depth", "caption", "det", "tok_x")  # no sample has the last
        self._pause, self._dies = pause, dies

    def describe(self) -> dict:
        return describe("made_up", {}, self.keys, self.problems)

    def read(self, index: int) -> Item:
        time.sleep(self._pause)
        key = self.keys[index]
        if index == 5 and self._dies and not os.path.exists(self._dies):
            if not self._dies.endswith("always"):
                pathlib.Path(self._dies).touch()
            os.kill(os.getpid(), 9)
        if index % 11 == 10:
            raise Unusable("truncated", f"{key}: the file ends too early")
        rng = np.random.default_rng(index)
        picture = rng.integers(0, 60, (24 + index % 5, 40, 3)).astype(np.uint8)
        picture[..., index % 3] += 150
        fields = {"rgb": picture, "depth": picture[..., 0].astype(np.float32)}
        failures = {}
        if index % 7 == 6:
            failures["caption"] = Unusable("caption_encoding", f"{key}: the caption is not text")
        else:
            fields["caption"] = [f"a {COLOURS[index % 3]} picture", f"number {index}"]
        boxes = [{"boxes": [0.1, 0.2, 0.5, 0.8], "class_name": "dog", "score": 0.9}]
        fields["det"] = boxes * (index % 3)
        return Item(key, fields, ("rotated: by 90 degrees",) if index % 9 == 0 else (), failures)


class Other(MadeUp):
    """The same keys with another content, of which one is gone and one unusable."""

    def read(self, index: int) -> Item:
        if index == 1:
            raise Unusable("corrupt", f"{self.keys[index]}: no longer readable")
        return Item(self.keys[index], {"tok_edge": np.arange(4, dtype=np.int16)[None] + index})


def configuration(**changes):
    """A configuration with a pixel modality, captions and boxes: ``crops__count=2`` sets ``crops.count``."""
    c = config_lib.default()
    c.name = "made_up"
    c.source = {"kind": "folder", "path": "not used"}
    c.batch, c.part_samples = 4, 8
    c.modalities = {
        "rgb@8": {"make": "pixels", "size": 8, "patch_size": 4},
        "caption": {"make": "caption", "max_tokens": 16},
        "det": {"make": "boxes", "max_tokens": 11},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = c
        for part in path:
            section = section[part]
        section[last] = value
    config_lib.validate(c)
    return c


def contents(root: pathlib.Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
