"""How an empty room looks: floor, walls, ceiling and light."""

from __future__ import annotations

import numpy as np

from data_pipelines.rooms import shapes, textures
from data_pipelines.rooms.captions import color_name
from data_pipelines.rooms.furniture import Mesh
from data_pipelines.rooms.rasterizer import Light

Rng = np.random.Generator


def _floor(rng: Rng, theme: str) -> tuple[str, np.ndarray, float]:
    """(description, texture, metres per repeat)."""
    wet = theme in ("bathroom", "kitchen")
    kind = rng.choice(["planks", "parquet", "tile", "checker", "carpet", "marble"], p=(
        [0.15, 0.05, 0.4, 0.25, 0.0, 0.15] if wet else [0.42, 0.13, 0.12, 0.08, 0.2, 0.05]
    ))  # fmt: skip
    if kind == "planks":
        return (
            "wooden floor",
            textures.planks(rng, textures.wood_color(rng), int(rng.choice([8, 16]))),
            rng.uniform(1.2, 1.8),
        )
    if kind == "parquet":
        return "parquet floor", textures.herringbone(rng, textures.wood_color(rng)), rng.uniform(1.4, 2.0)
    if kind == "carpet":
        return "carpet", textures.carpet(rng, textures.random_color(rng, (0.1, 0.6), (0.45, 0.85))), 1.5
    stone = textures.random_color(rng, (0.0, 0.35), (0.6, 0.95))
    if kind == "marble":
        return "stone floor", textures.marble(rng, stone), 2.0
    if kind == "tile":
        return "tiled floor", textures.tiles(rng, stone, None, 4), rng.uniform(1.2, 2.2)
    second = stone * rng.uniform(0.15, 0.7)
    return "checkered floor", textures.tiles(rng, stone, second, 4), rng.uniform(1.2, 2.2)


def _wall(rng: Rng, theme: str) -> tuple[str, np.ndarray]:
    """(description, texture covering the whole height of the wall)."""
    bright = textures.random_color(rng, (0.05, 0.55), (0.68, 0.98))
    other = textures.random_color(rng, (0.05, 0.5), (0.6, 0.95))
    shares = (
        [0.5, 0.1, 0.13, 0.12, 0.05, 0.1] if theme not in ("bathroom", "kitchen") else [0.35, 0.08, 0.07, 0.1, 0.4, 0.0]
    )
    kind = rng.choice(["plain", "brick", "stripes", "two-tone", "tile", "dots"], p=shares)
    if kind == "brick":
        red = np.array([rng.uniform(0.55, 0.8), rng.uniform(0.28, 0.42), rng.uniform(0.2, 0.32)])
        return "brick walls", textures.bricks(rng, red if rng.uniform() < 0.6 else bright, np.full(3, 0.78), 32)
    if kind == "tile":
        return "tiled walls", textures.tiles(rng, bright, None, 16)
    if kind == "stripes":
        texture, name = textures.stripes(rng, bright, other * 0.35 + 0.62, int(rng.integers(5, 9))), "striped wallpaper"
    elif kind == "dots":
        texture, name = textures.dots(rng, bright, other * 0.5 + 0.45, 8), "dotted wallpaper"
    elif kind == "two-tone":
        texture = textures.two_tone(textures.plaster(rng, bright), other * 0.8, rng.uniform(0.3, 0.45))
        name = "two-tone walls"
    else:
        texture, name = textures.plaster(rng, bright), f"{color_name(bright)} walls"
    return name, textures.skirting(texture, np.full(3, 0.95) if rng.uniform() < 0.7 else textures.wood_color(rng))


def room_shell(rng: Rng, theme: str, size: tuple[float, float, float]) -> tuple[list[tuple[Mesh, str]], str, str]:
    """Floor, ceiling and walls as (mesh, class), and the captions' words for floor and walls. Size in metres."""
    w, d, h = size[0] / 2, size[1] / 2, size[2]
    floor_name, floor, repeat = _floor(rng, theme)
    if rng.uniform() < 0.5:
        floor = np.ascontiguousarray(floor.swapaxes(0, 1))
    wall_name, wall = _wall(rng, theme)
    accent = _wall(rng, theme)[1] if rng.uniform() < 0.25 else wall
    uv = (size[0] / repeat, size[1] / repeat)
    ceiling = tuple(np.full(3, rng.uniform(0.88, 0.97)))
    shell = [(shapes.rectangle((-w, -d, 0), (2 * w, 0, 0), (0, 2 * d, 0), floor, uv_size=uv), "floor")]
    shell.append((shapes.rectangle((-w, d, h), (2 * w, 0, 0), (0, -2 * d, 0), color=ceiling), "ceiling"))
    corners = [(-w, d), (w, d), (w, -d), (-w, -d)]
    special = int(rng.integers(4))
    for k in range(4):
        (x0, y0), (x1, y1) = corners[k], corners[(k + 1) % 4]
        along = (x1 - x0, y1 - y0, 0)
        texture = accent if k == special else wall
        repeats = round(float(np.hypot(*along[:2])) / h * 2) / 2  # whole half-repeats keep patterns continuous
        shell.append((shapes.rectangle((x0, y0, 0), along, (0, 0, h), texture, uv_size=(repeats, 1)), "wall"))
    return shell, floor_name, wall_name


def room_light(rng: Rng, size: tuple[float, float, float]) -> Light:
    """A lamp near the middle of the ceiling, a fill light from one side, ambient light; random tints and strengths."""
    warm = np.array([1.0, rng.uniform(0.82, 1.0), rng.uniform(0.68, 1.0)])
    angle = rng.uniform(0, 2 * np.pi)
    fill = np.array([rng.uniform(0.88, 1.0), rng.uniform(0.93, 1.0), 1.0]) * rng.uniform(0.15, 0.55)
    x, y = rng.uniform(-0.28, 0.28, 2) * size[:2]
    return Light(
        lamp_position=(float(x), float(y), size[2] - 0.12),
        lamp_color=tuple(float(v) for v in warm * rng.uniform(1.3, 2.2)),
        fill_direction=(float(np.cos(angle)), float(np.sin(angle)), float(rng.uniform(0.2, 0.8))),
        fill_color=tuple(float(v) for v in fill),
        ambient=float(rng.uniform(0.42, 0.6)),
        exposure=float(rng.uniform(0.42, 0.62)),
    )
