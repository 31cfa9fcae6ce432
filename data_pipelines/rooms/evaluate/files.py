"""What an evaluation leaves behind."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fm4m.files import complete_file


def write(out: pathlib.Path, results: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
    """Writes results.json and NAME.png for each picture, uint8 [H, W, 3], whole or not at all; prints the paths."""
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        with complete_file(out / f"{name}.png") as beside:
            Image.fromarray(picture).save(beside, "PNG", optimize=True)
    with complete_file(out / "results.json") as beside:
        beside.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name in (*(f"{n}.png" for n in pictures), "results.json"):
        print(f"wrote {out / name}")
