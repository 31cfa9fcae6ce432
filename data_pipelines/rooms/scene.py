"""Random rooms: a layout engine that places models and procedural pieces without collisions.

Room coordinates: metres, z up, the floor is z = 0, the middle of the floor is the origin. Walls are numbered 0 north
(+y), 1 east (+x), 2 south, 3 west.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from data_pipelines.rooms import textures
from data_pipelines.rooms.furniture import Mesh
from data_pipelines.rooms.library import Model, ModelLibrary
from data_pipelines.rooms.rasterizer import Camera, Geometry, Light

_GAP = 0.02  # metres left between pieces and to the wall
_FABRIC = {"couch", "armchair", "chair", "bed", "stool", "towel", "handbag", "umbrella", "bench"}
_PAINTED = {"trash can", "box", "appliance", "lamp", "vase", "cup", "bottle", "toy", "cabinet", "wardrobe"}
_WOOD = {"cabinet", "wardrobe", "bookcase", "side table", "desk", "dining table", "musical instrument", "bench"}


@dataclasses.dataclass
class Instance:
    """One placed piece: its mesh turned by `angle` about z, scaled, then moved to `position` (foot centre)."""

    mesh: Mesh
    class_name: str
    noun: str
    position: tuple[float, float, float]
    angle: float
    scale: float = 1.0
    colors: np.ndarray | None = None  # float32 [M, 3] linear, replaces mesh.colors
    model_id: str | None = None
    support: int | None = None  # index of the instance it stands on
    casts_shadow: bool = True


@dataclasses.dataclass
class Scene:
    """A furnished room. `shell` holds (mesh, class name) of floor, ceiling and walls."""

    theme: str
    size: tuple[float, float, float]
    shell: list[tuple[Mesh, str]]
    instances: list[Instance]
    light: Light
    floor: str
    wall: str


@dataclasses.dataclass
class Piece:
    """Something to be placed: a model or a procedural mesh; lengths after scaling."""

    mesh: Mesh
    class_name: str
    noun: str
    size: tuple[float, float, float]
    scale: float = 1.0
    elevation: float = 0.0
    drop_height: float | None = None
    colors: np.ndarray | None = None
    model_id: str | None = None
    casts_shadow: bool = True


def tint(mesh: Mesh, color: np.ndarray) -> np.ndarray:
    """Material colours [M, 3] with the dominant material, and those that look like it, turned to sRGB `color`.

    A texture keeps its pattern: only its mean is moved.
    """
    target = np.asarray(color, np.float32) ** 2.2
    albedo = mesh.material_albedo
    main = int(np.argmax(mesh.material_areas))
    alike = np.linalg.norm(albedo - albedo[main], axis=1) < 0.08
    colors = mesh.colors.copy()
    factor = target / np.maximum(albedo, 0.02)
    colors[alike] = np.where(mesh.texture[alike, None] >= 0, np.minimum(factor[alike], 4.0), target)
    return colors


class RoomBuilder:
    """Places pieces in an empty room; the recipes in `themes` call its methods.

    Args:
      rng: every random choice comes from it, so the same state gives the same room.
      library: models of one split.
      size: width (x), depth (y), height of the room in metres.
    """

    def __init__(self, rng: np.random.Generator, library: ModelLibrary, size: tuple[float, float, float]):
        self.rng, self.library, self.size = rng, library, size
        self.instances: list[Instance] = []
        self._boxes: list[np.ndarray] = []  # [2, 3] low and high corner, one per instance
        self._tops: list[float | None] = []
        self._reserved: list[np.ndarray] = []

    def models(self, class_name: str, nouns: tuple[str, ...] | None = None) -> list[Model]:
        """Models of a class, only those with one of `nouns` if given."""
        return [m for m in self.library.by_class[class_name] if nouns is None or m.label.noun in nouns]

    def piece(self, model: Model, color: np.ndarray | None = None, recolor: float = 0.65) -> Piece:
        """A model at a slightly random size; in `color` if given, else with probability `recolor` in a random one."""
        rng, entry, name = self.rng, model.entry, model.label.class_name
        scale = rng.uniform(0.93, 1.07)
        mesh = self.library.mesh(model)
        colors = None
        if color is not None:
            colors = tint(mesh, color)
        elif rng.uniform() < recolor:
            if name in _WOOD and rng.uniform() < 0.55:
                colors = tint(mesh, textures.wood_color(rng))
            elif name in _FABRIC or name in _PAINTED or (name in _WOOD and rng.uniform() < 0.6):
                colors = tint(mesh, textures.random_color(rng, (0.3, 0.85), (0.4, 0.95)))
        drop = None if entry.drop_height is None else entry.drop_height * scale
        size = (entry.width * scale, entry.depth * scale, entry.height * scale)
        noun = model.label.noun
        return Piece(mesh, name, noun, size, scale, entry.elevation, drop, colors, model.model_id)

    def made(self, mesh: Mesh, class_name: str, noun: str, elevation: float = 0.0, top: bool = False) -> Piece:
        """A procedural mesh as a piece; `top` says whether things may stand on it."""
        low, high = mesh.vertices.min(0), mesh.vertices.max(0)
        size = tuple(float(x) for x in high - low)
        glows = bool(mesh.emission.any())
        return Piece(mesh, class_name, noun, size, 1.0, elevation, size[2] if top else None, casts_shadow=not glows)

    def wall_length(self, wall: int) -> float:
        """Length of a wall in metres."""
        return self.size[0] if wall % 2 == 0 else self.size[1]

    def _box(self, size, x: float, y: float, z: float, angle: float) -> np.ndarray:
        c, s = abs(math.cos(angle)), abs(math.sin(angle))
        w, d = size[0] * c + size[1] * s, size[0] * s + size[1] * c
        return np.array([(x - w / 2, y - d / 2, z), (x + w / 2, y + d / 2, z + size[2])])

    def _free(self, box: np.ndarray, ignore: int | None = None) -> bool:
        half = np.array([self.size[0] / 2, self.size[1] / 2])
        if (box[0, :2] < -half - 1e-6).any() or (box[1, :2] > half + 1e-6).any() or box[1, 2] > self.size[2] + 1e-6:
            return False
        others = [b for i, b in enumerate(self._boxes) if i != ignore] + self._reserved
        return not any(((box[0] < b[1] - 1e-3) & (box[1] > b[0] + 1e-3)).all() for b in others)

    def put(
        self,
        piece: Piece,
        x: float,
        y: float,
        z: float,
        angle: float,
        support: int | None = None,
        may_touch: int | None = None,
    ) -> int | None:
        """Place a piece if nothing but its support (or `may_touch`) is in the way; its index, or None."""
        box = self._box(piece.size, x, y, z, angle)
        if not self._free(box, support if may_touch is None else may_touch):
            return None
        self.instances.append(
            Instance(
                piece.mesh,
                piece.class_name,
                piece.noun,
                (x, y, z),
                angle,
                piece.scale,
                piece.colors,
                piece.model_id,
                support,
                piece.casts_shadow,
            )
        )
        self._boxes.append(box)
        self._tops.append(None if piece.drop_height is None else z + piece.drop_height)
        return len(self.instances) - 1

    def reserve(self, low: tuple[float, float, float], high: tuple[float, float, float]) -> None:
        """Keep a volume free, such as the swing of a door."""
        self._reserved.append(np.array([low, high], np.float64))

    def wall_frame(self, wall: int, along: float, out: float) -> tuple[float, float, float]:
        """(x, y, angle) of a piece whose centre is `out` metres in front of a wall, its back to the wall."""
        distance = self.size[1 - wall % 2] / 2 - out
        x, y = [(along, distance), (distance, -along), (-along, -distance), (-distance, along)][wall]
        return x, y, -wall * math.pi / 2

    def at_wall(
        self, piece: Piece, wall: int | None = None, z: float | None = None, along: float | None = None
    ) -> int | None:
        """Put a piece with its back to a wall (a random one by default), trying several places."""
        for _ in range(12):
            k = int(self.rng.integers(4)) if wall is None else wall
            reach = (self.wall_length(k) - piece.size[0]) / 2 - _GAP
            if reach < 0:
                continue
            s = self.rng.uniform(-reach, reach) if along is None else along
            x, y, angle = self.wall_frame(k, s, piece.size[1] / 2 + _GAP)
            index = self.put(piece, x, y, piece.elevation if z is None else z, angle)
            if index is not None:
                return index
            if along is not None and wall is not None:
                return None
        return None

    def in_corner(self, piece: Piece) -> int | None:
        """Put a piece into one of the four corners."""
        for corner in self.rng.permutation(4):
            sx, sy = (1, -1)[corner % 2], (1, -1)[corner // 2]
            x = sx * (self.size[0] / 2 - piece.size[0] / 2 - 0.08)
            y = sy * (self.size[1] / 2 - piece.size[1] / 2 - 0.08)
            index = self.put(piece, x, y, piece.elevation, 0.0)
            if index is not None:
                return index
        return None

    def in_middle(self, piece: Piece, spread: float = 0.5) -> int | None:
        """Put a piece somewhere in the inner part of the room."""
        for _ in range(12):
            x, y = (self.rng.uniform(-spread, spread) * s / 2 for s in self.size[:2])
            turn = self.rng.integers(4) * math.pi / 2
            index = self.put(piece, x, y, piece.elevation, turn)
            if index is not None:
                return index
        return None

    def beside(self, host: int, piece: Piece, side: float, gap: float = 0.06) -> int | None:
        """Put a piece next to a host that stands at a wall, on its left (-1) or right (+1), back to the same wall."""
        instance = self.instances[host]
        wall = round(-instance.angle / (math.pi / 2)) % 4
        x, y, _ = instance.position
        along = {0: x, 1: -y, 2: -x, 3: y}[wall]
        box = self._boxes[host]
        width = (box[1] - box[0])[0 if wall % 2 == 0 else 1]
        return self.at_wall(piece, wall, along=along + side * (width / 2 + gap + piece.size[0] / 2))

    def in_front(self, host: int, piece: Piece, distance: float, facing: bool, shift: float = 0.0) -> int | None:
        """Put a piece in front (-y side) of a host; `facing` turns it towards the host, else it looks the same way."""
        instance, box = self.instances[host], self._boxes[host]
        c, s = math.cos(instance.angle), math.sin(instance.angle)
        depth = abs(s) * (box[1] - box[0])[0] + abs(c) * (box[1] - box[0])[1]
        reach = depth / 2 + distance + piece.size[1] / 2
        x = instance.position[0] + s * reach + c * shift
        y = instance.position[1] - c * reach + s * shift
        return self.put(piece, x, y, piece.elevation, instance.angle + (math.pi if facing else 0.0))

    def on_top(self, host: int, piece: Piece, inner: float = 0.75) -> int | None:
        """Stand a piece on a host that has a top; random place and turn."""
        top = self._tops[host]
        if top is None:
            return None
        box = self._boxes[host]
        for _ in range(6):
            angle = self.rng.uniform(-0.6, 0.6)
            own = self._box(piece.size, 0, 0, 0, angle)
            slack = ((box[1] - box[0])[:2] * inner - (own[1] - own[0])[:2]) / 2
            if (slack < 0).any():
                return None
            middle = (box[0] + box[1])[:2] / 2
            x, y = middle + self.rng.uniform(-1, 1, 2) * slack
            index = self.put(piece, x, y, top + 0.002, angle, host)
            if index is not None:
                return index
        return None

    def around(self, host: int, model: Model, count: int, color: np.ndarray | None) -> None:
        """Chairs around a table, facing it, pushed a little under it."""
        box = self._boxes[host]
        width, depth = (box[1] - box[0])[:2]
        middle = (box[0] + box[1])[:2] / 2
        seats = []
        for side in range(4):
            along, across = (width, depth) if side % 2 == 0 else (depth, width)
            seats += [(side, s, across) for s in ((-along / 4, along / 4) if along > 1.5 else (0.0,))]
        for seat in self.rng.permutation(len(seats))[:count]:
            side, shift, across = seats[seat]
            piece = self.piece(model, color, recolor=0.0)
            out = across / 2 + piece.size[1] * self.rng.uniform(0.5, 0.8)
            dx, dy = [(shift, out), (out, shift), (shift, -out), (-out, shift)][side]
            wall = (0, 1, 2, 3)[side]
            angle = -wall * math.pi / 2 + self.rng.uniform(-0.2, 0.2)
            x, y = middle + (dx, dy)
            # The seat may slide under the table top, so the table itself is no obstacle.
            self.put(piece, x, y, 0.0, angle, may_touch=host)


def assemble(scene: Scene) -> Geometry:
    """World-space triangles of a scene. Instance ids: 1.. for the shell parts, then the instances, in order."""
    parts = [(mesh, mesh.vertices, mesh.normals, mesh.colors, 1.0, False) for mesh, _ in scene.shell]
    for item in scene.instances:
        c, s = math.cos(item.angle), math.sin(item.angle)
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)
        vertices = (item.mesh.vertices * item.scale) @ turn.T + np.asarray(item.position, np.float32)
        colors = item.mesh.colors if item.colors is None else item.colors
        parts.append((item.mesh, vertices, item.mesh.normals @ turn.T, colors, item.scale, item.casts_shadow))
    columns: dict[str, list[np.ndarray]] = {field.name: [] for field in dataclasses.fields(Geometry)}
    vertex = material = texture = 0
    for index, (mesh, vertices, normals, colors, scale, casts_shadow) in enumerate(parts):
        count = len(mesh.faces)
        columns["vertices"].append(vertices.astype(np.float32))
        columns["faces"].append(mesh.faces + vertex)
        columns["normals"].append(normals.astype(np.float32))
        columns["uvs"].append(mesh.uvs)
        columns["material"].append(mesh.material + material)
        columns["instance"].append(np.full(count, index + 1, np.int32))
        columns["colors"].append(colors.astype(np.float32))
        columns["emission"].append(mesh.emission)
        columns["texture"].append(np.where(mesh.texture >= 0, mesh.texture + texture, -1).astype(np.int32))
        columns["pyramid"].append(mesh.pyramid)
        columns["texel_density"].append(mesh.texel_density / np.float32(scale))
        columns["casts_shadow"].append(np.full(count, casts_shadow, np.bool_))
        vertex, material, texture = vertex + len(vertices), material + len(colors), texture + len(mesh.textures)
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    joined["faces"] = joined["faces"].astype(np.int32)
    joined["material"] = joined["material"].astype(np.int32)
    return Geometry(**joined)


def random_camera(rng: np.random.Generator, scene: Scene) -> Camera:
    """A level camera near the edge of the room at eye height, looking at a random piece of furniture or the middle."""
    width, depth, height = scene.size
    side = int(rng.integers(4))
    along, out = rng.uniform(-0.42, 0.42), rng.uniform(0.36, 0.46)
    x, y = [(along, out), (out, along), (along, -out), (-out, along)][side]
    position = (x * width, y * depth, rng.uniform(0.9, min(1.75, height - 0.5)))
    large = [i for i in scene.instances if i.support is None and i.position[2] < 0.3 and i.class_name != "rug"]
    target = np.array([0.0, 0.0, rng.uniform(0.6, 1.0)])
    if large and rng.uniform() < 0.75:
        item = large[int(rng.integers(len(large)))]
        top = float(item.mesh.vertices[:, 2].max())
        focus = np.array([item.position[0], item.position[1], item.position[2] + min(0.55 * top, 0.9)])
        target = target + rng.uniform(0.4, 0.9) * (focus - target)
    if math.dist(position[:2], target[:2]) < 0.5:
        target[:2] = -0.3 * np.array(position[:2])
    return Camera(position, tuple(float(v) for v in target), float(rng.uniform(58, 82)))
