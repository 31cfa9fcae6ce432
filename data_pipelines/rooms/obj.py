"""Parser of Wavefront OBJ and MTL text, as far as furniture catalogues use it."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Material:
    """What an MTL file says that the renderer uses: sRGB diffuse colour, opacity, texture file name ("" for none)."""

    color: tuple[float, float, float] = (0.7, 0.7, 0.7)
    opacity: float = 1.0
    texture: str = ""


@dataclasses.dataclass
class Obj:
    """Triangles of an OBJ file, as stored.

    Attributes:
      positions: float32 [V, 3], y up. uvs: float32 [n, 2] and normals: float32 [n, 3], at least one row each.
      corners: int32 [T, 3, 3], the position, uv and normal index of every corner, -1 where absent.
      face_material: int32 [T], indices into materials (names). libraries: MTL file names.
    """

    positions: np.ndarray
    uvs: np.ndarray
    normals: np.ndarray
    corners: np.ndarray
    face_material: np.ndarray
    materials: list[str]
    libraries: list[str]


def parse_mtl(lines: list[str]) -> dict[str, Material]:
    """Materials by name; ValueError where a number cannot be read."""
    materials: dict[str, Material] = {}
    current = Material()
    for line in lines:
        key, _, value = line.strip().partition(" ")
        value = value.strip()
        if key == "newmtl":
            current = materials.setdefault(value, Material())
        elif key == "Kd":
            current.color = tuple(float(x) for x in value.split()[:3])
        elif key == "d":
            current.opacity = float(value.split()[-1])
        elif key == "map_Kd":
            current.texture = value
    return materials


def _rows(lines: list[str], prefix: str, columns: int) -> np.ndarray:
    rows = [line.split()[1 : columns + 1] for line in lines if line.startswith(prefix)]
    return np.array(rows, np.float32).reshape(-1, columns) if rows else np.zeros((1, columns), np.float32)


def parse_obj(lines: list[str]) -> Obj:
    """Polygons become fans of triangles; ValueError or IndexError where a line cannot be read."""
    counts = [0, 0, 0]
    corners: list[tuple[int, int, int]] = []
    known: dict[str, tuple[int, int, int]] = {}
    face_material: list[int] = []
    materials: dict[str, int] = {}
    libraries: list[str] = []
    current = -1

    def corner(token: str) -> tuple[int, int, int]:
        found = known.get(token)
        if found is None:
            parts = (token.split("/") + ["", ""])[:3]
            values = [int(part) if part else 0 for part in parts]
            found = tuple(v - 1 if v >= 0 else counts[k] + v for k, v in enumerate(values))
            if "-" not in token:  # negative numbers count back from the current line
                known[token] = found
        return found

    for line in lines:
        if line.startswith("f "):
            if current < 0:
                current = materials.setdefault("", len(materials))
            polygon = [corner(token) for token in line.split()[1:]]
            for k in range(1, len(polygon) - 1):
                corners += (polygon[0], polygon[k], polygon[k + 1])
                face_material.append(current)
        elif line.startswith("v "):
            counts[0] += 1
        elif line.startswith("vt"):
            counts[1] += 1
        elif line.startswith("vn"):
            counts[2] += 1
        elif line.startswith("usemtl"):
            current = materials.setdefault(line[6:].strip(), len(materials))
        elif line.startswith("mtllib"):
            libraries.append(line[6:].strip())
    return Obj(
        positions=_rows(lines, "v ", 3),
        uvs=_rows(lines, "vt", 2),
        normals=_rows(lines, "vn", 3),
        corners=np.array(corners, np.int32).reshape(-1, 3, 3),
        face_material=np.array(face_material, np.int32),
        materials=list(materials),
        libraries=libraries,
    )
