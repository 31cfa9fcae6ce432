"""Reader of Sweet Home 3D furniture catalogues (.sh3f): a zip with a properties file and OBJ + MTL + texture models.

The zip is read directly. Meshes come out z-up, in metres, scaled to the catalogue's size, standing on z = 0 and centred
on x = y = 0, with the front towards -y. Models are material for pictures of 64 to 224 pixels, so heavy ones are
simplified by vertex clustering.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import pathlib
import posixpath
import re
import warnings
import zipfile

import numpy as np
from PIL import Image

from data_pipelines.rooms.obj import Material, Obj, parse_mtl, parse_obj

TEXTURE_SIZE = 128
PYRAMID_LEVELS = 6  # 128, 64, ..., 4 texels
_PROPERTIES = "PluginFurnitureCatalog.properties"
_CREASE_COSINE = 0.7  # faces meeting at less than about 45 degrees are shaded smoothly when the file has no normals
_MIN_OPACITY = 0.35  # glass and other nearly clear materials are left out: the renderer has no transparency
_GAMMA = 2.2


@dataclasses.dataclass
class Mesh:
    """Triangles with indexed positions and per-corner attributes.

    Attributes:
      vertices: float32 [V, 3], metres, z up.
      faces: int32 [T, 3], indices into vertices.
      normals: float32 [T, 3, 3], unit shading normals per corner.
      uvs: float32 [T, 3, 2], texture coordinates per corner, v up.
      material: int32 [T], indices into colors.
      colors: float32 [M, 3], linear diffuse colour (multiplied with the texture).
      emission: float32 [M], factor of the albedo that glows by itself.
      texture: int32 [M], index into textures or -1.
      textures: uint8 [K, 128, 128, 3], sRGB.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray
    material: np.ndarray
    colors: np.ndarray
    emission: np.ndarray
    texture: np.ndarray
    textures: np.ndarray

    @functools.cached_property
    def face_areas(self) -> np.ndarray:
        """float32 [T]: area of every triangle in square metres."""
        a, b, c = (self.vertices[self.faces[:, k]] for k in range(3))
        return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)

    @functools.cached_property
    def texel_density(self) -> np.ndarray:
        """float32 [T]: texels per metre at the finest level, at scale 1."""
        u, v = self.uvs[:, 1] - self.uvs[:, 0], self.uvs[:, 2] - self.uvs[:, 0]
        uv_area = 0.5 * np.abs(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])
        return (TEXTURE_SIZE * np.sqrt(uv_area / np.maximum(self.face_areas, 1e-9))).astype(np.float32)

    @functools.cached_property
    def pyramid(self) -> np.ndarray:
        """uint8 [K, texels, 3]: every texture at 128, 64, ..., 4 texels a side, averaged in linear light."""
        count, size = len(self.textures), TEXTURE_SIZE
        level = (self.textures.astype(np.float32) / 255) ** _GAMMA
        rows = [self.textures.reshape(count, size * size, 3)]
        for _ in range(1, PYRAMID_LEVELS):
            size //= 2
            level = level.reshape(count, size, 2, size, 2, 3).mean((2, 4))
            rows.append(np.round(255 * level ** (1 / _GAMMA)).astype(np.uint8).reshape(count, size * size, 3))
        return np.concatenate(rows, 1)

    @functools.cached_property
    def material_albedo(self) -> np.ndarray:
        """float32 [M, 3]: mean linear albedo of every material, texture included."""
        albedo = self.colors.copy()
        for index, texture in enumerate(self.texture):
            if texture >= 0:
                albedo[index] *= ((self.textures[texture] / 255.0) ** _GAMMA).mean((0, 1))
        return albedo

    @functools.cached_property
    def material_areas(self) -> np.ndarray:
        """float64 [M]: surface of every material in square metres."""
        return np.bincount(self.material, self.face_areas, minlength=len(self.colors))


@dataclasses.dataclass(frozen=True)
class Furniture:
    """One catalogue entry; lengths in metres, `drop_height` is where things may stand on it (None: nowhere)."""

    model_id: str
    name: str
    category: str
    width: float
    depth: float
    height: float
    elevation: float
    drop_height: float | None
    model_path: str
    rotation: tuple[float, ...] | None
    creator: str


class Catalogue:
    """An .sh3f file: `entries` lists its furniture, `load(entry)` reads a mesh.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is not a furniture catalogue, or one of its models cannot be read; the message names the
        file and the model.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such furniture catalogue. {HOW_TO_GET_CATALOGUES}")
        try:
            self._zip = zipfile.ZipFile(self.path)
            text = self._zip.read(_PROPERTIES).decode("latin-1")
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path}: no zip file, or truncated ({error}); expected an .sh3f catalogue") from None
        except KeyError:
            raise ValueError(f"{self.path}: has no member {_PROPERTIES}; expected an .sh3f catalogue") from None
        self._members = {name.lower(): name for name in self._zip.namelist()}
        self.properties, self.entries = self._parse(text)

    def _parse(self, text: str) -> tuple[dict[str, str], list[Furniture]]:
        general: dict[str, str] = {}
        items: dict[int, dict[str, str]] = collections.defaultdict(dict)
        for line in text.splitlines():
            match = re.match(r"([A-Za-z]+)(?:#(\d+))?\s*=\s*(.*)", line)
            if match and match[2]:
                items[int(match[2])][match[1]] = match[3].strip()
            elif match:
                general[match[1]] = match[3].strip()
        entries = []
        for number in sorted(items):
            item = items[number]
            try:
                drop = item.get("dropOnTopElevation")
                height = float(item["height"]) / 100
                drop_height = height if drop is None else float(drop) / 100
                rotation = tuple(float(x) for x in item["modelRotation"].split()) if "modelRotation" in item else None
                entries.append(
                    Furniture(
                        model_id=item.get("id", f"{self.path.stem}#{number}"),
                        name=item["name"],
                        category=item["category"],
                        width=float(item["width"]) / 100,
                        depth=float(item["depth"]) / 100,
                        height=height,
                        elevation=float(item.get("elevation", 0)) / 100,
                        drop_height=None if drop_height < 0 else drop_height,
                        model_path=item["model"].lstrip("/"),
                        rotation=rotation,
                        creator=item.get("creator", "unknown"),
                    )
                )
            except (KeyError, ValueError) as error:
                raise ValueError(f"{self.path}: {_PROPERTIES}, entry #{number}: missing or bad field {error}") from None
        if not entries:
            raise ValueError(f"{self.path}: {_PROPERTIES} lists no furniture")
        return general, entries

    @property
    def is_cc0(self) -> bool:
        """Whether the catalogue declares its models to be in the public domain."""
        return "public domain" in self.properties.get("license", "").lower()

    def load(self, entry: Furniture, max_triangles: int | None = None) -> Mesh:
        """Mesh of an entry, simplified to about `max_triangles` when given. Raises ValueError naming file and model."""
        where = f"{self.path}: model {entry.model_id} ({entry.model_path})"
        try:
            mesh = self._load(entry, where)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{where}: cannot be read as OBJ: {error}") from error
        return mesh if max_triangles is None else simplify(mesh, max_triangles)

    def _find(self, directory: str, name: str) -> str | None:
        name = name.replace("\\", "/")
        for candidate in (name, posixpath.basename(name), name.split()[-1]):
            found = self._members.get(posixpath.normpath(posixpath.join(directory, candidate)).lower())
            if found:
                return found
        return None

    def _load(self, entry: Furniture, where: str) -> Mesh:
        directory = posixpath.dirname(entry.model_path)
        lines = self._zip.read(entry.model_path).decode("latin-1").replace("\\\n", " ").splitlines()
        obj = parse_obj(lines)
        materials: dict[str, Material] = {}
        for library in obj.libraries:
            member = self._find(directory, library)
            if member is None:
                warnings.warn(f"{where}: material library {library!r} is missing, model stays grey", stacklevel=3)
            else:
                materials.update(parse_mtl(self._zip.read(member).decode("latin-1").splitlines()))
        textures: list[np.ndarray] = []
        seen: dict[str, int] = {}
        used = [materials.get(name, Material()) for name in obj.materials]
        texture = np.full(len(used), -1, np.int32)
        for index, material in enumerate(used):
            if not material.texture:
                continue
            member = self._find(directory, material.texture)
            if member is None:
                warnings.warn(f"{where}: texture {material.texture!r} is missing, using the plain colour", stacklevel=3)
                continue
            if member not in seen:
                image = Image.open(io.BytesIO(self._zip.read(member))).convert("RGB")
                seen[member] = len(textures)
                textures.append(np.asarray(image.resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.BOX)))
            texture[index] = seen[member]
        colors = np.array([m.color for m in used], np.float32).clip(0.02, 1.0) ** _GAMMA
        colors[texture >= 0] = 1.0
        opaque = np.array([m.opacity >= _MIN_OPACITY for m in used])[obj.face_material]
        if not len(opaque):
            raise ValueError("the model has no faces")
        if not opaque.any():
            opaque[:] = True  # a glass: better drawn opaque than not at all
        vertices, faces, normals = _to_metres(entry, obj, opaque)
        return Mesh(
            vertices=vertices,
            faces=faces,
            normals=normals,
            uvs=np.take(obj.uvs, np.maximum(obj.corners[opaque, :, 1], 0), axis=0),
            material=obj.face_material[opaque],
            colors=colors,
            emission=np.zeros(len(used), np.float32),
            texture=texture,
            textures=np.array(textures, np.uint8).reshape(-1, TEXTURE_SIZE, TEXTURE_SIZE, 3),
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-12)


def _smooth_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Corner normals [T, 3, 3]: area-weighted mean of the faces at the vertex that meet below the crease angle."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    weighted = np.cross(b - a, c - a)
    face = _unit(weighted)
    corner_vertex = faces.ravel()
    order = np.argsort(corner_vertex, kind="stable")
    count = np.bincount(corner_vertex, minlength=len(vertices))
    start = np.cumsum(count) - count
    # Every pair (corner, neighbouring corner at the same vertex), as two flat arrays.
    repeats = count[corner_vertex]
    left = np.repeat(np.arange(len(corner_vertex)), repeats)
    within = np.arange(len(left)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    right = order[start[corner_vertex[left]] + within]
    smooth = (face[left // 3] * face[right // 3]).sum(-1) > _CREASE_COSINE
    left, right = left[smooth], right[smooth] // 3
    total = [np.bincount(left, weighted[right, k], minlength=len(corner_vertex)) for k in range(3)]
    return _unit(np.stack(total, -1)).reshape(-1, 3, 3)


def _to_metres(entry: Furniture, obj: Obj, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z-up, catalogue size, foot centre at the origin. The box of all faces counts, glass included."""
    up = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)
    if entry.rotation:
        up = up @ np.array(entry.rotation, np.float32).reshape(3, 3)
    positions, normals = obj.positions @ up.T, obj.normals @ up.T
    used, faces = np.unique(obj.corners[:, :, 0], return_inverse=True)
    faces = faces.reshape(-1, 3).astype(np.int32)
    vertices = positions[used]
    low, high = vertices.min(0), vertices.max(0)
    scale = np.array([entry.width, entry.depth, entry.height], np.float32) / np.maximum(high - low, 1e-6)
    center = (low + high) / 2
    center[2] = low[2]
    vertices = ((vertices - center) * scale).astype(np.float32)
    computed = _smooth_normals(vertices, faces)
    stored = _unit(normals[np.maximum(obj.corners[:, :, 2], 0)] / scale)
    absent = (obj.corners[:, :, 2] < 0) | (np.linalg.norm(stored, axis=-1) < 0.5)
    corner_normals = np.where(absent[..., None], computed, stored).astype(np.float32)
    return vertices, faces[keep], corner_normals[keep]


def simplify(mesh: Mesh, max_triangles: int) -> Mesh:
    """Vertex clustering: vertices of one grid cell become their mean, until at most `max_triangles` are left.

    Corner normals and texture coordinates keep their values, so shading stays as fine as it was. (Rossignac and
    Borrel, Multi-resolution 3D approximations for rendering complex scenes, 1993.)
    """
    if len(mesh.faces) <= max_triangles:
        return mesh
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    cell = float((high - low).max()) / 256
    while True:
        grid = np.floor((mesh.vertices - low) / cell).astype(np.int64)
        key = (grid[:, 0] << 40) + (grid[:, 1] << 20) + grid[:, 2]
        _, group, count = np.unique(key, return_inverse=True, return_counts=True)
        faces = group.reshape(-1)[mesh.faces].astype(np.int32)
        distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
        candidates = np.flatnonzero(distinct)
        _, first = np.unique(np.sort(faces[candidates], axis=1), axis=0, return_index=True)
        keep = candidates[np.sort(first)]
        if len(keep) <= max_triangles:
            break
        cell *= 1.3
    means = [np.bincount(group.reshape(-1), mesh.vertices[:, k]) / count for k in range(3)]
    return dataclasses.replace(
        mesh,
        vertices=np.stack(means, -1).astype(np.float32),
        faces=faces[keep],
        normals=mesh.normals[keep],
        uvs=mesh.uvs[keep],
        material=mesh.material[keep],
    )


HOW_TO_GET_CATALOGUES = (
    "Install the catalogues with `apt-get install sweethome3d-furniture` (Debian, Ubuntu), or without root: "
    "`apt-get download sweethome3d-furniture && dpkg -x sweethome3d-furniture_*.deb DIR`, then pass "
    "--catalogue=DIR/usr/share/sweethome3d/furniture"
)
DEFAULT_CATALOGUE_DIRECTORY = pathlib.Path("/usr/share/sweethome3d/furniture")


def open_catalogues(paths: list[str] | None = None, license: str = "all") -> list[Catalogue]:
    """Open .sh3f files or directories of them (default: where Debian puts them), public-domain ones first.

    Args:
      paths: files or directories.
      license: "cc0" keeps only public-domain catalogues, "all" keeps every one.
    Raises:
      FileNotFoundError: no catalogue found; the message says how to get them.
    """
    if license not in ("cc0", "all"):
        raise ValueError(f"license must be 'cc0' or 'all', got {license!r}")
    files: list[pathlib.Path] = []
    for path in [pathlib.Path(p) for p in paths or [DEFAULT_CATALOGUE_DIRECTORY]]:
        files += sorted(path.glob("*.sh3f")) if path.is_dir() else [path]
    catalogues = [Catalogue(path) for path in files]
    catalogues = [c for c in catalogues if license == "all" or c.is_cc0]
    if not catalogues:
        where = paths or DEFAULT_CATALOGUE_DIRECTORY
        raise FileNotFoundError(f"no .sh3f catalogue of licence {license!r} under {where}. {HOW_TO_GET_CATALOGUES}")
    return sorted(catalogues, key=lambda c: (not c.is_cc0, c.path.name))
