"""Recipes: what stands in a living room, a bedroom, a kitchen, ..."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_pipelines.rooms import shapes
from data_pipelines.rooms.groups import SMALL_BY_THEME, Room, pick, stands_on_floor
from data_pipelines.rooms.library import ModelLibrary
from data_pipelines.rooms.scene import Scene
from data_pipelines.rooms.surfaces import room_light, room_shell

Rng = np.random.Generator

THEMES: tuple[str, ...] = tuple(SMALL_BY_THEME)
_THEME_WEIGHTS = np.array([0.24, 0.19, 0.16, 0.13, 0.09, 0.1, 0.06, 0.03])


def _living_room(room: Room) -> None:
    rng = room.rng
    room.openings(int(rng.integers(1, 3)), int(rng.uniform() < 0.6))
    room.seating()
    cabinet = room.stand("cabinet", "tv cabinet", chance=0.5)
    if cabinet is None:
        tv_host = room.stand("cabinet", chance=0.4)
        tv = pick(rng, room.models("tv"))
        if tv_host is not None and tv is not None:
            room.on_top(tv_host, room.piece(tv, recolor=0.0), 1.0)
    room.stand("bookcase", chance=0.7)
    room.stand("musical instrument", chance=0.35)
    room.stand("armchair", chance=0.4)
    room.stand("chair", "lounge chair", chance=0.25)
    room.plant(0.75)
    room.floor_lamp(0.6)
    room.hang("clock", chance=0.4)
    room.stand("radiator", chance=0.3)
    room.pictures(int(rng.integers(1, 4)))


def _bedroom(room: Room) -> None:
    rng = room.rng
    room.openings(int(rng.integers(1, 3)), int(rng.uniform() < 0.6))
    bed = room.model("bed", "bed", "bunk bed") or room.model("bed")
    host = None if bed is None else room.at_wall(room.piece(bed, recolor=0.75))
    if host is not None:
        room.decorate(host, int(rng.integers(0, 3)), ("teddy bear", "handbag", "book"))
        table = pick(rng, room.models("side table", ("nightstand",)))
        color = room.furniture_color()
        for side in (-1.0, 1.0):
            if rng.uniform() < 0.8:
                made = shapes.box((0.45, 0.4, rng.uniform(0.4, 0.55)), color)
                piece = (
                    room.made(made, "side table", "nightstand", top=True) if table is None else room.piece(table, color)
                )
                room.decorate(room.beside(host, piece, side), 1, ("lamp", "book", "vase", "potted plant"))
        room.rug_under(host, 0.5)
    room.stand("wardrobe", chance=0.7)
    room.stand("cabinet", "cupboard", "dressing table", "cabinet", chance=0.5)
    room.stand("bed", "crib", chance=0.15)
    if rng.uniform() < 0.35:
        room.workplace()
    room.stand("chair", chance=0.4)
    room.stand("toy", chance=0.3)
    room.plant(0.4)
    room.floor_lamp(0.3)
    room.stand("radiator", chance=0.3)
    room.pictures(int(rng.integers(1, 3)))


def _kitchen(room: Room) -> None:
    rng = room.rng
    room.kitchen_row()
    room.openings(1, int(rng.uniform() < 0.6))
    if rng.uniform() < 0.3:
        room.kitchen_row()
    if rng.uniform() < 0.7:
        room.dining()
    room.stand("refrigerator", chance=0.5)
    for _ in range(int(rng.integers(0, 3))):
        stool = room.model("stool")
        if stool is not None:
            room.in_middle(room.piece(stool), 0.6)
    room.stand("trash can", chance=0.3)
    room.hang("clock", chance=0.4)
    room.plant(0.3)
    room.pictures(int(rng.integers(0, 2)))


def _dining_room(room: Room) -> None:
    rng = room.rng
    room.openings(int(rng.integers(1, 3)), int(rng.uniform() < 0.6))
    room.dining()
    for _ in range(int(rng.integers(1, 3))):
        cabinets = [m for m in room.models("cabinet") if stands_on_floor(m) and m.entry.width > 0.5]
        model = pick(rng, cabinets)
        if model is not None:
            host = room.at_wall(room.piece(model))
            if host is not None and model.entry.height < 1.3:
                room.decorate(host, 2)
    room.stand("bookcase", chance=0.3)
    room.stand("musical instrument", chance=0.3)
    room.plant(0.7)
    room.hang("clock", chance=0.4)
    room.floor_lamp(0.3)
    room.pictures(int(rng.integers(1, 4)))


def _bathroom(room: Room) -> None:
    rng = room.rng
    room.openings(int(rng.uniform() < 0.7), int(rng.uniform() < 0.6))
    sinks = [m for m in room.models("sink") if m.entry.category == "Bathroom" and stands_on_floor(m)] or room.models(
        "sink"
    )
    sink = pick(rng, sinks)
    host = None if sink is None else room.at_wall(room.piece(sink, recolor=0.0))
    if host is not None:
        size = (rng.uniform(0.45, 0.7), 0.03, rng.uniform(0.5, 0.8))
        x, y, _ = room.instances[host].position
        wall = round(-room.instances[host].angle / (np.pi / 2)) % 4
        along = {0: x, 1: -y, 2: -x, 3: y}[wall]
        frame = room.made(shapes.box(size, (0.75, 0.85, 0.9)), "picture", "mirror")
        room.at_wall(frame, wall, z=1.15, along=along)
    room.stand("toilet", "toilet", chance=0.95)
    room.stand("toilet", "bidet", chance=0.4)
    room.stand("shower", chance=0.8)
    room.hang("toilet", "urinal", chance=0.2)
    room.hang("towel", chance=0.9)
    room.hang("towel", chance=0.4)
    room.stand("radiator", chance=0.5)
    room.stand("cabinet", "cupboard", "cabinet", "locker", chance=0.3)
    room.stand("trash can", chance=0.4)
    room.stand("stool", chance=0.3)
    room.plant(0.4)
    room.rug_under(None, 0.5)


def _office(room: Room) -> None:
    rng = room.rng
    room.openings(int(rng.integers(1, 3)), int(rng.uniform() < 0.6))
    for _ in range(int(rng.integers(1, 3))):
        room.workplace()
    room.stand("bookcase", chance=0.9)
    room.stand("bookcase", chance=0.4)
    room.stand("cabinet", "cupboard", "cabinet", "locker", chance=0.6)
    room.stand("armchair", chance=0.4)
    room.stand("couch", chance=0.2)
    room.stand("trash can", chance=0.5)
    room.stand("chair", chance=0.5)
    room.plant(0.7)
    room.floor_lamp(0.4)
    room.hang("clock", chance=0.4)
    room.rug_under(None, 0.3)
    room.pictures(int(rng.integers(1, 3)))


def _playroom(room: Room) -> None:
    rng = room.rng
    room.openings(int(rng.integers(1, 3)), int(rng.uniform() < 0.6))
    game = room.model("game table")
    if game is not None and rng.uniform() < 0.75:
        room.in_middle(room.piece(game, recolor=0.0), 0.3)
    else:
        room.rug_under(None, 0.9)
    room.stand("couch", chance=0.4)
    room.stand("bench", chance=0.4)
    host = room.stand("bookcase", chance=0.5)
    room.decorate(host, 1)
    room.stand("musical instrument", chance=0.5)
    for _ in range(int(rng.integers(1, 4))):
        toy = pick(
            rng, [m for c in ("toy", "teddy bear", "sports ball") for m in room.models(c) if m.entry.height > 0.15]
        )
        if toy is not None:
            room.in_middle(room.piece(toy), 0.75)
    room.stand("box", chance=0.5)
    room.stand("armchair", chance=0.4)
    room.plant(0.3)
    room.floor_lamp(0.4)
    room.pictures(int(rng.integers(1, 4)))


def _storage_room(room: Room) -> None:
    rng = room.rng
    room.openings(int(rng.uniform() < 0.6), 1)
    for _ in range(int(rng.integers(3, 7))):
        host = room.stand("box")
        room.decorate(host, int(rng.integers(0, 2)), ("box", "book", "vase", "sports ball"))
    room.stand("cabinet", "locker", "cupboard", "cabinet", chance=0.8)
    room.stand("bookcase", chance=0.8)
    room.stand("appliance", chance=0.5)
    room.stand("umbrella", chance=0.5)
    room.stand("chair", chance=0.5)
    room.stand("trash can", chance=0.6)
    room.stand("radiator", chance=0.4)


_RECIPES: dict[str, Callable[[Room], None]] = dict(
    zip(
        THEMES,
        (_living_room, _bedroom, _kitchen, _dining_room, _bathroom, _office, _playroom, _storage_room),
        strict=True,
    )
)


def random_room(rng: Rng, library: ModelLibrary) -> Scene:
    """A furnished room; every choice comes from `rng`, so the same state gives the same room."""
    theme = str(rng.choice(THEMES, p=_THEME_WEIGHTS))
    scale = 0.82 if theme in ("bathroom", "storage room") else 1.0
    size = (float(rng.uniform(3.1, 4.7) * scale), float(rng.uniform(3.1, 4.7) * scale), float(rng.uniform(2.4, 2.8)))
    room = Room(rng, library, size)
    room.theme = theme
    _RECIPES[theme](room)
    room.ceiling_lamp(0.6)
    shell, floor, wall = room_shell(rng, theme, size)
    return Scene(theme, size, shell, room.instances, room_light(rng, size), floor, wall)
