"""Groups of pieces that belong together: a couch with its table, a table with chairs, a row of kitchen cabinets."""

from __future__ import annotations

import numpy as np

from data_pipelines.rooms import shapes, textures
from data_pipelines.rooms.library import Model
from data_pipelines.rooms.scene import Piece, RoomBuilder

Rng = np.random.Generator


def pick(rng: Rng, models: list[Model]) -> Model | None:
    return models[int(rng.integers(len(models)))] if models else None


def stands_on_floor(model: Model) -> bool:
    entry = model.entry
    return entry.elevation < 0.15 and max(entry.width, entry.depth, entry.height) >= 0.45


def is_small(model: Model) -> bool:
    entry = model.entry
    return entry.elevation < 0.15 and 0.08 <= max(entry.width, entry.depth, entry.height) <= 0.66


SMALL_BY_THEME: dict[str, tuple[str, ...]] = {
    "living room": ("potted plant", "vase", "book", "lamp", "appliance:speaker", "cup", "clock", "toy"),
    "bedroom": ("lamp", "book", "teddy bear", "vase", "potted plant", "handbag", "appliance:fan", "toy"),
    "kitchen": ("appliance", "bottle", "potted plant", "food", "cup", "vase", "microwave"),
    "dining room": ("vase", "potted plant", "cup", "food", "bottle", "lamp", "book"),
    "bathroom": ("bottle", "potted plant", "vase", "towel"),
    "office": ("laptop", "book", "lamp", "potted plant", "appliance:fan", "cup", "box:briefcase", "vase"),
    "playroom": ("teddy bear", "toy", "sports ball", "book", "vase", "potted plant", "lamp"),
    "storage room": ("box", "book", "sports ball", "toy", "vase", "bottle", "appliance"),
}


class Room(RoomBuilder):
    """The builder plus the groups that the recipes share."""

    theme = ""

    def model(self, class_name: str, *nouns: str) -> Model | None:
        return pick(self.rng, [m for m in self.models(class_name, nouns or None) if stands_on_floor(m)])

    def stand(self, class_name: str, *nouns: str, chance: float = 1.0, wall: int | None = None) -> int | None:
        """A model of a class on the floor with its back to a wall."""
        model = self.model(class_name, *nouns)
        if model is None or self.rng.uniform() > chance:
            return None
        return self.at_wall(self.piece(model), wall)

    def hang(self, class_name: str, *nouns: str, chance: float = 1.0) -> int | None:
        """A wall-mounted model at its catalogue elevation."""
        models = [m for m in self.models(class_name, nouns or None) if 0.15 <= m.entry.elevation < 1.6]
        model = pick(self.rng, models)
        return None if model is None or self.rng.uniform() > chance else self.at_wall(self.piece(model))

    def small(self, kind: str) -> Piece | None:
        """A small piece of a kind from the theme table ("class" or "class:noun"), or None."""
        class_name, _, noun = kind.partition(":")
        rng = self.rng
        if class_name == "vase" and (rng.uniform() < 0.7 or not self.models("vase")):
            return self.made(shapes.vase(rng, textures.random_color(rng, (0.3, 0.95))), "vase", "vase")
        if class_name == "book":
            return self.made(shapes.books(rng), "book", "books")
        model = pick(rng, [m for m in self.models(class_name, (noun,) if noun else None) if is_small(m)])
        return None if model is None else self.piece(model)

    def decorate(self, host: int | None, count: int, kinds: tuple[str, ...] | None = None) -> None:
        """Up to `count` small things of the theme on a host."""
        kinds = kinds or SMALL_BY_THEME[self.theme]
        for _ in range(count if host is not None else 0):
            piece = self.small(kinds[int(self.rng.integers(len(kinds)))])
            if piece is not None:
                self.on_top(host, piece)

    def plant(self, chance: float) -> None:
        models = [m for m in self.models("potted plant") if m.entry.height > 0.5]
        model = pick(self.rng, models)
        if model is not None and self.rng.uniform() < chance:
            self.in_corner(self.piece(model, recolor=0.0))

    def floor_lamp(self, chance: float) -> None:
        if self.rng.uniform() < chance:
            color = textures.random_color(self.rng, (0.05, 0.7), (0.8, 1.0))
            self.in_corner(self.made(shapes.floor_lamp(self.rng, color), "lamp", "floor lamp"))

    def ceiling_lamp(self, chance: float) -> None:
        models = [
            m for m in self.models("lamp") + self.models("appliance", ("ceiling fan",)) if m.entry.elevation > 1.6
        ]
        model = pick(self.rng, models)
        if self.rng.uniform() > chance:
            return
        if model is not None and self.rng.uniform() < 0.5:
            piece = self.piece(model, recolor=0.3)
        else:
            color = textures.random_color(self.rng, (0.0, 0.8), (0.85, 1.0))
            piece = self.made(shapes.pendant_lamp(self.rng, color), "lamp", "ceiling lamp")
        piece.casts_shadow = False
        self.put(piece, 0.0, 0.0, self.size[2] - piece.size[2], 0.0)

    def rug_under(self, host: int | None, chance: float) -> None:
        """A rug around a host or in the middle; laid before collisions matter, it is 1 cm thin."""
        if self.rng.uniform() > chance:
            return
        width, depth = self.rng.uniform(1.4, 2.4), self.rng.uniform(1.1, 1.8)
        x, y = (0.0, 0.0) if host is None else self.instances[host].position[:2]
        x, y = (
            float(np.clip(v, -s / 2 + w / 2, s / 2 - w / 2))
            for v, s, w in ((x, self.size[0], width), (y, self.size[1], depth))
        )
        colors = [textures.random_color(self.rng) for _ in range(3)]
        texture = textures.rug(self.rng, colors)
        piece = self.made(shapes.box((width, depth, 0.012), colors[1], top=texture), "rug", "rug")
        piece.size = (width, depth, 0.0)  # furniture stands on it
        if abs(x) + width / 2 <= self.size[0] / 2 and abs(y) + depth / 2 <= self.size[1] / 2:
            self.put(piece, x, y, 0.001, 0.0)

    def openings(self, windows: int, doors: int = 1) -> None:
        """Doors and windows; the space in front of a door stays free."""
        rng = self.rng
        for _ in range(doors):
            size = (rng.uniform(0.8, 0.95), 0.06, rng.uniform(1.95, 2.1))
            painted = rng.uniform() < 0.5
            color = textures.random_color(rng, (0.0, 0.7), (0.5, 0.95)) if painted else textures.wood_color(rng)
            piece = self.made(shapes.box(size, color, front=textures.door(rng, color)), "door", "door")
            index = self.at_wall(piece, z=0.0)
            if index is not None:
                low, high = self._boxes[index]
                grow = np.array([0.0 if s > 0.5 else 0.55 for s in (high - low)[:2]] + [0.0])
                self.reserve(low - grow, high + grow)
        for _ in range(windows):
            size = (rng.uniform(0.8, 1.8), 0.07, rng.uniform(0.9, 1.3))
            texture = textures.window_view(rng)
            piece = self.made(shapes.box(size, (0.93, 0.93, 0.93), front=texture, emission=0.9), "window", "window")
            self.at_wall(piece, z=rng.uniform(0.85, 1.0))

    def pictures(self, count: int) -> None:
        for _ in range(count):
            size = (self.rng.uniform(0.4, 1.0), 0.03, self.rng.uniform(0.4, 0.75))
            frame = (
                np.full(3, self.rng.choice([0.1, 0.95])) if self.rng.uniform() < 0.5 else textures.wood_color(self.rng)
            )
            inside = shapes.box((size[0] - 0.07, 0.01, size[2] - 0.07), frame, front=textures.painting(self.rng))
            mesh = shapes.merge([shapes.box(size, frame), inside], [(0, 0, 0), (0, -0.021, 0.035)])
            self.at_wall(self.made(mesh, "picture", "picture"), z=self.rng.uniform(1.15, 1.45))

    def seating(self) -> int | None:
        """A couch with a coffee table in front, an armchair beside."""
        rng = self.rng
        couch = self.model("couch") or self.model("armchair")
        if couch is None:
            return None
        color = textures.random_color(rng, (0.3, 0.9), (0.4, 0.95)) if rng.uniform() < 0.7 else None
        host = self.at_wall(self.piece(couch, color, recolor=0.0))
        if host is None:
            return None
        self.rug_under(host, 0.45)
        table = pick(rng, self.models("side table", ("coffee table",)))
        if table is not None and rng.uniform() < 0.6:
            piece = self.piece(table)
        else:
            piece = self.made(shapes.coffee_table(rng, self.furniture_color()), "side table", "coffee table", top=True)
        low = self.in_front(host, piece, rng.uniform(0.25, 0.45), facing=True, shift=rng.uniform(-0.2, 0.2))
        self.decorate(low, int(rng.integers(1, 3)))
        self.decorate(host, int(rng.integers(0, 2)), ("teddy bear", "handbag", "book"))
        for side in rng.permutation([-1.0, 1.0])[: int(rng.integers(0, 3))]:
            chair = self.model("armchair")
            if chair is not None:
                self.beside(host, self.piece(chair, color if rng.uniform() < 0.5 else None), side, 0.12)
        return host

    def furniture_color(self) -> np.ndarray:
        if self.rng.uniform() < 0.6:
            return textures.wood_color(self.rng)
        return textures.random_color(self.rng, (0.0, 0.8), (0.3, 0.95))

    def dining(self) -> int | None:
        """A table with chairs around it."""
        rng = self.rng
        table = self.model("dining table")
        if table is None:
            return None
        host = self.in_middle(self.piece(table), 0.35)
        chair = pick(rng, [m for m in self.models("chair", ("chair",)) if m.entry.height < 1.3])
        if host is None:
            return None
        self.rug_under(host, 0.3)
        if chair is not None:
            color = textures.random_color(rng, (0.4, 0.95), (0.4, 0.95)) if rng.uniform() < 0.6 else None
            self.around(host, chair, int(rng.integers(2, 7)), color)
        self.decorate(host, int(rng.integers(1, 4)))
        return host

    def workplace(self) -> int | None:
        """A desk with a chair in front and things on it."""
        host = self.stand("desk")
        chair = pick(self.rng, self.models("chair", ("chair",)))
        if host is not None and chair is not None:
            self.in_front(host, self.piece(chair), self.rng.uniform(-0.15, 0.15), facing=True)
        self.decorate(host, int(self.rng.integers(1, 4)))
        return host

    def kitchen_row(self) -> None:
        """Modules side by side along one wall with upper cabinets above."""
        rng = self.rng
        wall = int(rng.integers(4))
        groups = ("cabinet", "cabinet", "oven", "refrigerator", "sink", "cabinet")
        color = (
            textures.wood_color(rng) if rng.uniform() < 0.4 else textures.random_color(rng, (0.05, 0.7), (0.55, 0.95))
        )
        length = self.wall_length(wall)
        along = -length / 2 + 0.6 * rng.uniform(0.2, 1.0)
        order = [groups[i] for i in rng.permutation(len(groups))] + ["cabinet", "oven", "cabinet"]
        for name in order:
            models = [
                m
                for m in self.models(name)
                if m.entry.elevation < 0.15 and m.entry.category == "Kitchen" and m.entry.height > 0.5
            ]
            model = pick(rng, models)
            if model is None:
                continue
            piece = self.piece(model, color if name in ("cabinet", "sink") else None, recolor=0.2)
            if along + piece.size[0] > length / 2:
                continue
            index = self.at_wall(piece, wall, along=along + piece.size[0] / 2)
            if index is not None and piece.size[2] < 1.3:
                self._tops[index] = piece.size[2] if name == "cabinet" else None
                self.decorate(index, int(rng.integers(0, 2)))
                uppers = [m for m in self.models("cabinet") if m.entry.elevation > 1.2]
                upper = pick(rng, uppers)
                if upper is not None and rng.uniform() < 0.75:
                    self.at_wall(self.piece(upper, color), wall, along=along + piece.size[0] / 2)
            along += piece.size[0] + 0.005
