"""Procedural meshes: boxes, tessellated rectangles, bodies of revolution, and what rooms hold besides furniture."""

from __future__ import annotations

import numpy as np

from data_pipelines.rooms import textures
from data_pipelines.rooms.furniture import Mesh

_GAMMA = 2.2


def _mesh(corners, normals, uvs, material, colors, texture_list=(), texture=None, emission=None) -> Mesh:
    """Mesh from unshared corners float [T, 3, 3]; colours are sRGB."""
    corners = np.asarray(corners, np.float32)
    count = len(colors)
    stack = np.array(texture_list, np.uint8).reshape(-1, textures.SIZE, textures.SIZE, 3)
    return Mesh(
        vertices=corners.reshape(-1, 3),
        faces=np.arange(3 * len(corners), dtype=np.int32).reshape(-1, 3),
        normals=np.asarray(normals, np.float32),
        uvs=np.asarray(uvs, np.float32),
        material=np.asarray(material, np.int32),
        colors=np.asarray(colors, np.float32).reshape(-1, 3) ** _GAMMA,
        emission=np.zeros(count, np.float32) if emission is None else np.asarray(emission, np.float32),
        texture=np.full(count, -1, np.int32) if texture is None else np.asarray(texture, np.int32),
        textures=stack,
    )


def rectangle(origin, along_u, along_v, texture=None, color=(1, 1, 1), uv_size=(1.0, 1.0), emission=0.0) -> Mesh:
    """Two triangles from `origin` spanned by two edge vectors (metres); the normal is along_u x along_v."""
    origin, u, v = (np.asarray(x, np.float32) for x in (origin, along_u, along_v))
    quad = np.stack([origin, origin + u, origin + u + v, origin + v])
    uv = np.array([(0, 0), (uv_size[0], 0), uv_size, (0, uv_size[1])], np.float32)
    index = np.array([(0, 1, 2), (0, 2, 3)])
    normal = np.cross(u, v)
    normals = np.broadcast_to(normal / np.linalg.norm(normal), (2, 3, 3))
    has = texture is not None
    return _mesh(
        quad[index], normals, uv[index], [0, 0], [color], [texture] if has else [], [0 if has else -1], [emission]
    )


def box(size, color=(0.8, 0.8, 0.8), front=None, top=None, emission=0.0) -> Mesh:
    """Cuboid of `size` (x, y, z) on z = 0, centred; `front` textures the -y face, `top` the +z face.

    The texture covers its face once; `emission` makes the front glow.
    """
    x, y, z = size[0] / 2, size[1] / 2, size[2]
    # (origin, u, v) with u x v pointing outwards: front, back, left, right, top, bottom
    faces = [
        ((-x, -y, 0), (2 * x, 0, 0), (0, 0, z)),
        ((x, y, 0), (-2 * x, 0, 0), (0, 0, z)),
        ((-x, y, 0), (0, -2 * y, 0), (0, 0, z)),
        ((x, -y, 0), (0, 2 * y, 0), (0, 0, z)),
        ((-x, -y, z), (2 * x, 0, 0), (0, 2 * y, 0)),
        ((-x, y, 0), (2 * x, 0, 0), (0, -2 * y, 0)),
    ]
    parts = [rectangle(*face) for face in faces]
    pictures = [t for t in (front, top) if t is not None]
    material = np.zeros(12, np.int32)
    if front is not None:
        material[0:2] = 1
    if top is not None:
        material[8:10] = len(pictures)
    return _mesh(
        np.concatenate([p.vertices[p.faces] for p in parts]),
        np.concatenate([p.normals for p in parts]),
        np.concatenate([p.uvs for p in parts]),
        material,
        [color] + [(1, 1, 1)] * len(pictures),
        pictures,
        [-1, *range(len(pictures))],
        [0.0] + [emission] * len(pictures),
    )


def merge(meshes: list[Mesh], offsets: list[tuple[float, float, float]]) -> Mesh:
    """One mesh from several, each moved by its offset."""
    vertices, faces, material, texture = [], [], [], []
    v = m = t = 0
    for mesh, offset in zip(meshes, offsets, strict=True):
        vertices.append(mesh.vertices + np.asarray(offset, np.float32))
        faces.append(mesh.faces + v)
        material.append(mesh.material + m)
        texture.append(np.where(mesh.texture >= 0, mesh.texture + t, -1))
        v, m, t = v + len(mesh.vertices), m + len(mesh.colors), t + len(mesh.textures)
    stack = {
        k: np.concatenate([getattr(x, k) for x in meshes]) for k in ("normals", "uvs", "colors", "emission", "textures")
    }
    return Mesh(
        vertices=np.concatenate(vertices),
        faces=np.concatenate(faces).astype(np.int32),
        material=np.concatenate(material).astype(np.int32),
        texture=np.concatenate(texture).astype(np.int32),
        **stack,
    )


def revolve(profile: np.ndarray, color, segments: int = 20, emission: float = 0.0) -> Mesh:
    """Body of revolution around z; `profile` is float [n, 2] of (radius, height) in metres from bottom to top."""
    profile = np.asarray(profile, np.float64)
    angle = np.linspace(0, 2 * np.pi, segments + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], -1)
    points = np.concatenate(
        [profile[:, None, :1] * ring[None], np.broadcast_to(profile[:, None, 1:], (len(profile), segments + 1, 1))], -1
    )
    slope = np.diff(profile, axis=0)
    corners, normals = [], []
    for k, (radius, height) in enumerate(slope):
        normal = np.concatenate([ring * height, np.full((segments + 1, 1), -radius)], -1)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-12
        for s in range(segments):
            a, b, c, d = points[k, s], points[k, s + 1], points[k + 1, s + 1], points[k + 1, s]
            corners += [(a, b, c), (a, c, d)]
            na, nb = normal[s], normal[s + 1]
            normals += [(na, nb, nb), (na, nb, na)]
    count = len(corners)
    return _mesh(corners, normals, np.zeros((count, 3, 2)), np.zeros(count), [color], emission=[emission])


def vase(rng: np.random.Generator, color) -> Mesh:
    """A vase of random profile, 0.2 to 0.45 m high."""
    height, radius = rng.uniform(0.2, 0.45), rng.uniform(0.06, 0.12)
    t = np.linspace(0, 1, 9)
    shape = 0.55 + 0.45 * np.sin(t * np.pi * rng.uniform(0.8, 1.4) + rng.uniform(-0.3, 0.5))
    return revolve(np.stack([radius * np.maximum(shape, 0.25), t * height], -1), color)


def books(rng: np.random.Generator) -> Mesh:
    """A stack of two to five books."""
    parts, offsets, z = [], [], 0.0
    for _ in range(int(rng.integers(2, 6))):
        size = (rng.uniform(0.16, 0.24), rng.uniform(0.2, 0.3), rng.uniform(0.025, 0.06))
        parts.append(box(size, textures.random_color(rng, (0.4, 0.95))))
        offsets.append((rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02), z))
        z += size[2]
    return merge(parts, offsets)


def coffee_table(rng: np.random.Generator, color) -> Mesh:
    """A low table: a board on four legs, 0.6 to 1.1 m wide."""
    x, y, z, leg = rng.uniform(0.6, 1.1), rng.uniform(0.5, 0.7), rng.uniform(0.38, 0.48), rng.uniform(0.04, 0.07)
    legs = [(sx * (x - leg) / 2, sy * (y - leg) / 2, 0.0) for sx in (-1, 1) for sy in (-1, 1)]
    parts = [box((leg, leg, z - 0.04), color) for _ in legs] + [box((x, y, 0.04), color)]
    return merge(parts, [*legs, (0, 0, z - 0.04)])


def floor_lamp(rng: np.random.Generator, color) -> Mesh:
    """A standing lamp with a glowing shade, 1.4 to 1.7 m high."""
    height, radius = rng.uniform(1.4, 1.7), rng.uniform(0.15, 0.24)
    metal = np.full(3, rng.choice([0.15, 0.5, 0.75]))
    foot = revolve(np.array([(0.0, 0.0), (0.14, 0.0), (0.14, 0.03), (0.015, 0.04), (0.015, height - 0.1)]), metal, 12)
    shade = revolve(np.array([(radius, height - 0.32), (radius * rng.uniform(0.5, 1.0), height)]), color, 16, 0.55)
    return merge([foot, shade], [(0, 0, 0), (0, 0, 0)])


def pendant_lamp(rng: np.random.Generator, color) -> Mesh:
    """A hanging lamp, its top at z = 0.6 m."""
    radius = rng.uniform(0.15, 0.28)
    cord = revolve(np.array([(0.008, 0.22), (0.008, 0.6)]), (0.2, 0.2, 0.2), 6)
    shade = revolve(np.array([(radius, 0.0), (radius * rng.uniform(0.2, 0.9), 0.24), (0.01, 0.26)]), color, 16, 0.6)
    return merge([cord, shade], [(0, 0, 0), (0, 0, 0)])
