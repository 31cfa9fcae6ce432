"""A tiny furniture catalogue, so that the renderer's tests need no Debian package."""

from __future__ import annotations

import io
import pathlib
import zipfile

import numpy as np
from PIL import Image

CUBE_CORNERS = [(x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)]
CUBE_QUADS = [(1, 3, 4, 2), (5, 6, 8, 7), (1, 2, 6, 5), (3, 7, 8, 4), (1, 5, 7, 3), (2, 4, 8, 6)]
CUBE_OBJ = (
    "mtllib m.mtl\n"
    + "".join(f"v {x} {y} {z}\n" for x, y, z in CUBE_CORNERS)
    + "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nusemtl paint\n"
    + "".join("f " + " ".join(f"{v}/{k + 1}" for k, v in enumerate(quad)) + "\n" for quad in CUBE_QUADS)
)
MODELS = [  # name, category, width, depth, height in cm
    ("Sofa", "Living room", 180, 80, 75),
    ("Armchair", "Living room", 80, 80, 80),
    ("Chair", "Living room", 45, 45, 85),
    ("Table", "Living room", 140, 80, 74),
    ("Bed", "Bedroom", 150, 200, 50),
    ("Wardrobe", "Bedroom", 120, 60, 200),
    ("Cupboard", "Bedroom", 90, 45, 120),
    ("Desk", "Office", 130, 60, 74),
    ("Bookcase", "Office", 80, 35, 180),
    ("Plant", "Living room", 50, 50, 100),
    ("Washbasin", "Bathroom", 55, 45, 90),
    ("Toilets unit", "Bathroom", 40, 65, 75),
    ("Crate", "Miscellaneous", 60, 60, 60),
    ("Refrigerator", "Kitchen", 70, 65, 170),
    ("Lower cabinet", "Kitchen", 60, 60, 88),
    ("Oven", "Kitchen", 60, 55, 60),
    ("Pool table", "Miscellaneous", 220, 120, 80),
]


def entry(number: int, **fields: object) -> str:
    """The lines of one catalogue entry."""
    return "".join(f"{name}#{number}={value}\n" for name, value in fields.items())


def write_catalogue(path: pathlib.Path, entries: str, members: dict[str, bytes | str]) -> pathlib.Path:
    """An .sh3f file with the given entries and model files."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "id=test\nlicense=Public domain\n" + entries)
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def cube_catalogue(path: pathlib.Path) -> pathlib.Path:
    """Every model of MODELS twice, as coloured boxes."""
    entries, members = "", {}
    picture = io.BytesIO()
    Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 200 + 50, np.ones((4, 4), np.uint8))).save(picture, "PNG")
    for number in range(1, 2 * len(MODELS) + 1):
        name, category, width, depth, height = MODELS[(number - 1) // 2]
        entries += entry(
            number,
            id=f"t#{name}{number}",
            name=name,
            category=category,
            model=f"/m{number}/c.obj",
            width=width,
            depth=depth,
            height=height,
            creator="nobody",
        )
        rgb = np.random.default_rng(number).uniform(0.2, 0.9, 3)
        texture = "map_Kd p.png\n" if number % 3 == 0 else ""
        members[f"m{number}/c.obj"] = CUBE_OBJ
        members[f"m{number}/m.mtl"] = f"newmtl paint\nKd {rgb[0]:.3f} {rgb[1]:.3f} {rgb[2]:.3f}\nd 1.0\n{texture}"
        members[f"m{number}/p.png"] = picture.getvalue()
    return write_catalogue(path, entries, members)
