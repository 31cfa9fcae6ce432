"""Procedural textures: floors, walls, rugs, pictures, window views, doors. All are drawn by numpy from a generator.

Every function returns uint8 [128, 128, 3] sRGB; row 0 is the top (v = 1). Colours are sRGB floats in [0, 1].
"""

from __future__ import annotations

import colorsys

import numpy as np

SIZE = 128


def random_color(rng: np.random.Generator, saturation=(0.25, 0.85), value=(0.45, 0.95)) -> np.ndarray:
    """A random sRGB colour, float [3], hue uniform."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)))


def wood_color(rng: np.random.Generator) -> np.ndarray:
    """A random wood tone, sRGB float [3], from birch to walnut."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(0.05, 0.11), rng.uniform(0.35, 0.65), rng.uniform(0.4, 0.88)))


def _noise(rng: np.random.Generator, cells: tuple[int, int], octaves: int = 3) -> np.ndarray:
    """Smooth periodic value noise, float [SIZE, SIZE], roughly in [-1, 1]."""
    total = np.zeros((SIZE, SIZE))
    for octave in range(octaves):
        rows, columns = (min(c << octave, SIZE) for c in cells)
        grid = rng.uniform(-1, 1, (rows, columns))
        y, x = np.arange(SIZE) * rows / SIZE, np.arange(SIZE) * columns / SIZE
        iy, ix = y.astype(int), x.astype(int)
        fy, fx = ((f * f * (3 - 2 * f)) for f in (y - iy, x - ix))
        fy, fx = fy[:, None], fx[None]
        jy, jx = (iy + 1) % rows, (ix + 1) % columns
        top = grid[iy][:, ix] * (1 - fx) + grid[iy][:, jx] * fx
        bottom = grid[jy][:, ix] * (1 - fx) + grid[jy][:, jx] * fx
        total += (top * (1 - fy) + bottom * fy) / 2**octave
    return total / 1.75


def _to_u8(image: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _shade(color: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return color[None, None] * factor[..., None]


def plaster(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """One colour with faint noise."""
    return _to_u8(_shade(color, 1 + 0.03 * _noise(rng, (8, 8)) + 0.015 * rng.standard_normal((SIZE, SIZE))))


def planks(rng: np.random.Generator, color: np.ndarray, rows: int = 8) -> np.ndarray:
    """Wooden planks running along u."""
    y, x = np.mgrid[:SIZE, :SIZE]
    row = y * rows // SIZE
    joint = rng.integers(0, SIZE, rows)[row]
    plank = row * 2 + ((x - joint) % SIZE >= SIZE // 2)
    tone = rng.uniform(0.78, 1.15, 2 * rows)[plank]
    grain = _noise(rng, (64, 4), 2)
    gap = (y * rows % SIZE < rows) | ((x - joint) % (SIZE // 2) == 0)
    return _to_u8(_shade(color, tone * (1 + 0.1 * grain) * np.where(gap, 0.6, 1)))


def herringbone(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """Parquet: blocks of planks turned by a right angle in a checker pattern."""
    y, x = np.mgrid[:SIZE, :SIZE]
    block = (y // 32 + x // 32) % 2
    strip = np.where(block == 0, y // 8, x // 8)
    tone = rng.uniform(0.8, 1.15, (4, 4, 16))[y // 32, x // 32, strip % 16]
    gap = np.where(block == 0, y % 8, x % 8) == 0
    return _to_u8(_shade(color, tone * np.where(gap, 0.75, 1) * (1 + 0.04 * _noise(rng, (32, 32)))))


def tiles(rng: np.random.Generator, color: np.ndarray, second: np.ndarray | None = None, count: int = 4) -> np.ndarray:
    """Square tiles with grout; a second colour makes a checker."""
    y, x = np.mgrid[:SIZE, :SIZE]
    size = SIZE // count
    checker = ((y // size + x // size) % 2)[..., None]
    image = np.where(checker == 1, color if second is None else second, color)
    tone = rng.uniform(0.93, 1.05, (count, count))[y // size, x // size] + 0.03 * _noise(rng, (8, 8))
    grout = ((y % size < 1) | (x % size < 1))[..., None]
    return _to_u8(np.where(grout, image * 0.72, image * tone[..., None]))


def bricks(rng: np.random.Generator, color: np.ndarray, mortar: np.ndarray, rows: int = 16) -> np.ndarray:
    """Bricks in running bond; `rows` of them in the height of the texture."""
    y, x = np.mgrid[:SIZE, :SIZE]
    height = SIZE // rows
    row = y // height
    shifted = (x + (row % 2) * height) % SIZE
    tone = rng.uniform(0.75, 1.15, (rows, rows))[row, shifted // (2 * height) % rows]
    joint = ((y % height == 0) | (shifted % (2 * height) == 0))[..., None]
    return _to_u8(np.where(joint, mortar, _shade(color, tone + 0.06 * _noise(rng, (32, 32)))))


def stripes(rng: np.random.Generator, color: np.ndarray, second: np.ndarray, count: int = 8) -> np.ndarray:
    """Vertical stripes."""
    x = np.mgrid[:SIZE, :SIZE][1]
    image = np.where((x * 2 * count // SIZE % 2)[..., None] == 1, color, second)
    return _to_u8(image * (1 + 0.02 * _noise(rng, (16, 16)))[..., None])


def dots(rng: np.random.Generator, color: np.ndarray, second: np.ndarray, count: int = 4) -> np.ndarray:
    """Round dots on a hexagonal-looking grid."""
    y, x = np.mgrid[:SIZE, :SIZE]
    size = SIZE // count
    dx = (x + (y // size % 2) * (size // 2)) % size - size / 2
    inside = (dx**2 + (y % size - size / 2) ** 2 < (0.26 * size) ** 2)[..., None]
    return _to_u8(np.where(inside, second, color) * (1 + 0.02 * _noise(rng, (16, 16)))[..., None])


def two_tone(texture: np.ndarray, lower: np.ndarray, share: float) -> np.ndarray:
    """Paint the lower `share` of a wall texture in another colour, with a light rail on top."""
    image = texture.copy()
    start = SIZE - int(share * SIZE)
    image[start:] = _to_u8(lower[None, None])
    image[start : start + 2] = 235
    return image


def skirting(texture: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Add a skirting board along the lower edge (about 8 cm of a 2.6 m wall)."""
    image = texture.copy()
    image[-4:] = _to_u8(color[None, None])
    return image


def carpet(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """Fitted carpet: one colour with fine noise."""
    return _to_u8(_shade(color, 1 + 0.08 * rng.standard_normal((SIZE, SIZE)) + 0.04 * _noise(rng, (8, 8))))


def marble(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """Stone with veins."""
    veins = np.exp(-np.abs(_noise(rng, (4, 4), 4)) * 9)
    return _to_u8(_shade(color, 1 - 0.25 * veins + 0.04 * _noise(rng, (16, 16))))


def rug(rng: np.random.Generator, colors: list[np.ndarray]) -> np.ndarray:
    """A rug seen from above: nested borders, stripes or a medallion in three colours."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE * 2 - 1
    border = np.maximum(np.abs(x), np.abs(y))
    kind = rng.integers(4)
    if kind == 0:
        index = (border > 0.62).astype(int) + (border > 0.85)
    elif kind == 1:
        index = (np.floor((x + 1) * rng.integers(3, 7)) % 3).astype(int)
    elif kind == 2:
        index = ((np.abs(x) + np.abs(y)) % 0.66 > 0.33).astype(int)
        index[border > 0.85] = 2
    else:
        index = (np.hypot(x, y) < 0.55).astype(int) + (np.hypot(x, y) < 0.3)
        index[border > 0.86] = 1
    return _to_u8(np.stack(colors)[index] * (1 + 0.07 * rng.standard_normal((SIZE, SIZE, 1))))


def painting(rng: np.random.Generator) -> np.ndarray:
    """An abstract picture: a landscape, coloured fields, or discs."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE
    kind = rng.integers(3)
    colors = [random_color(rng, (0.3, 0.95), (0.4, 1.0)) for _ in range(5)]
    image = np.broadcast_to(colors[0], (SIZE, SIZE, 3)).copy()
    if kind == 0:
        image = (1 - y[..., None]) * colors[0] + y[..., None] * (0.5 + 0.5 * colors[0])
        for layer in range(3):
            ridge = 0.35 + 0.2 * layer + 0.08 * np.sin(x * rng.uniform(4, 14) + rng.uniform(0, 6))
            image = np.where((y > ridge)[..., None], colors[1 + layer] * (1 - 0.15 * layer), image)
    elif kind == 1:
        for k in range(4):
            x0, y0 = rng.uniform(0, 0.7, 2)
            w, h = rng.uniform(0.2, 0.6, 2)
            image = np.where(((x > x0) & (x < x0 + w) & (y > y0) & (y < y0 + h))[..., None], colors[1 + k], image)
    else:
        for k in range(4):
            cx, cy = rng.uniform(0.1, 0.9, 2)
            image = np.where((np.hypot(x - cx, y - cy) < rng.uniform(0.1, 0.32))[..., None], colors[1 + k], image)
    return _to_u8(image)


def window_view(rng: np.random.Generator) -> np.ndarray:
    """Sky, clouds and a strip of land, with a white window cross; drawn to glow."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE
    hue = rng.choice([0.57, 0.55, 0.08, 0.6], p=[0.5, 0.2, 0.15, 0.15])  # day, haze, evening, dusk
    top = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.35, 0.7), rng.uniform(0.8, 1.0)))
    low = np.array(colorsys.hsv_to_rgb(hue, 0.15, 1.0))
    image = top + (low - top) * y[..., None]
    cloud = np.clip(_noise(rng, (4, 2), 4) * 1.6, 0, 1)[..., None]
    image = image + (1 - image) * cloud
    land = np.array(colorsys.hsv_to_rgb(rng.uniform(0.2, 0.4), rng.uniform(0.4, 0.7), rng.uniform(0.4, 0.7)))
    hill = rng.uniform(0.6, 0.8) + 0.05 * np.sin(x * rng.uniform(4, 12) + rng.uniform(0, 6))
    image = np.where((y > hill)[..., None], land * (1 + 0.2 * _noise(rng, (16, 16)))[..., None], image)
    bars = (np.abs(x - 0.5) < 0.02) | (np.abs(y - rng.choice([0.35, 0.5])) < 0.02)
    frame = (np.minimum(x, 1 - x) < 0.045) | (np.minimum(y, 1 - y) < 0.045)
    return _to_u8(np.where((bars | frame)[..., None], 0.93, image))


def door(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """A panelled door with frame and knob."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE
    image = _shade(color, 1 + 0.04 * _noise(rng, (4, 32)))
    columns, rows = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    u, v = (x - 0.1) / 0.8 * columns % 1, (y - 0.07) / 0.88 * rows % 1
    inset = (x > 0.1) & (x < 0.9) & (y > 0.07) & (y < 0.95)
    edge = np.minimum(np.minimum(u, 1 - u) / columns, np.minimum(v, 1 - v) / rows)
    image = np.where((inset & (edge > 0.04) & (edge < 0.07))[..., None], image * 0.72, image)
    image = np.where(((x < 0.05) | (x > 0.95) | (y < 0.03))[..., None], 0.92, image)
    knob = np.hypot((x - 0.86) * 0.45, y - 0.52) < 0.017
    return _to_u8(np.where(knob[..., None], (0.85, 0.75, 0.4), image))
