"""Software renderer: z-buffer with near clipping, perspective-correct texturing, a lamp shadow map and SSAO.

Camera coordinates are x right, y down, z forward inside this module; the normals it returns are x right, y up, z
towards the camera. Needs numba.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

try:
    import numba
except ImportError as error:  # the packs can be read without it
    raise ImportError(
        "rendering rooms needs numba: `pip install numba`; reading packs (data_pipelines.rooms.pack) does not"
    ) from error

from data_pipelines.rooms.furniture import PYRAMID_LEVELS, TEXTURE_SIZE

_NEAR = 0.05  # metres
_LEVELS = PYRAMID_LEVELS
_LEVEL_START = np.array([sum((TEXTURE_SIZE >> k) ** 2 for k in range(level)) for level in range(_LEVELS)], np.int64)
_TO_LINEAR = (np.arange(256, dtype=np.float32) / 255) ** 2.2
SHADOW_SIZE = 384
SHADOW_FOCAL = SHADOW_SIZE / 2 / math.tan(math.radians(75))  # the lamp looks down with a field of view of 150 degrees


@dataclasses.dataclass
class Geometry:
    """World-space triangles of one scene, shared by all of its views.

    Attributes:
      vertices: float32 [V, 3] metres, z up. faces: int32 [T, 3].
      normals: float32 [T, 3, 3]. uvs: float32 [T, 3, 2]. material: int32 [T]. instance: int32 [T], 1-based object ids.
      colors: float32 [M, 3] linear. emission: float32 [M]. texture: int32 [M].
      pyramid: uint8 [K, texels, 3], see `Mesh.pyramid`.
      texel_density: float32 [T], texels per metre at the finest level.
      casts_shadow: bool [T].
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray
    material: np.ndarray
    instance: np.ndarray
    colors: np.ndarray
    emission: np.ndarray
    texture: np.ndarray
    pyramid: np.ndarray
    texel_density: np.ndarray
    casts_shadow: np.ndarray


@dataclasses.dataclass(frozen=True)
class Light:
    """Illumination: a point lamp with shadows, a directional fill light without, and a sky/ground ambient term.

    Colours are linear RGB factors; `fill_direction` points towards the light.
    """

    lamp_position: tuple[float, float, float]
    lamp_color: tuple[float, float, float]
    fill_direction: tuple[float, float, float]
    fill_color: tuple[float, float, float]
    ambient: float
    exposure: float  # mean linear luminance the picture is brought to


@dataclasses.dataclass(frozen=True)
class Camera:
    """A level pinhole camera: position and target in metres, horizontal field of view in degrees, square picture."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    field_of_view: float

    def rotation(self) -> np.ndarray:
        """float32 [3, 3], rows = camera axes right, down, forward in world coordinates."""
        forward = np.asarray(self.target, np.float64) - np.asarray(self.position, np.float64)
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        length = np.linalg.norm(right)
        if length < 1e-6:
            raise ValueError(f"camera at {self.position} looks straight up or down at {self.target}")
        right /= length
        return np.stack([right, np.cross(forward, right), forward]).astype(np.float32)


@dataclasses.dataclass
class Labels:
    """Exact per-pixel geometry [res, res]: depth float32 metres (z-depth, 0 where nothing), normals float32 [.., 3],
    instance int32 (0 where nothing), albedo float32 [.., 3] linear."""

    depth: np.ndarray
    normals: np.ndarray
    instance: np.ndarray
    albedo: np.ndarray


@numba.njit(cache=True)
def _fill(x0, y0, z0, x1, y1, z1, x2, y2, z2, triangle, size, inverse_depth, index):
    """Rasterise one screen triangle; z are inverse depths, which are linear on the screen."""
    area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
    if abs(area) < 1e-9:
        return
    xa = max(0, math.floor(min(x0, x1, x2) - 0.5))
    xb = min(size - 1, math.ceil(max(x0, x1, x2) - 0.5))
    ya = max(0, math.floor(min(y0, y1, y2) - 0.5))
    yb = min(size - 1, math.ceil(max(y0, y1, y2) - 0.5))
    scale = 1.0 / area
    for y in range(ya, yb + 1):
        py = y + 0.5
        for x in range(xa, xb + 1):
            px = x + 0.5
            w1 = ((px - x0) * (y2 - y0) - (x2 - x0) * (py - y0)) * scale
            w2 = ((x1 - x0) * (py - y0) - (px - x0) * (y1 - y0)) * scale
            if w1 < -1e-6 or w2 < -1e-6 or w1 + w2 > 1.000001:
                continue
            z = z0 + w1 * (z1 - z0) + w2 * (z2 - z0)
            if z > inverse_depth[y, x]:
                inverse_depth[y, x] = z
                index[y, x] = triangle


@numba.njit(cache=True)
def _rasterize(points, faces, selected, focal, size, inverse_depth, index):
    """Z-buffer. points: float32 [V, 3] in camera space; writes 1/depth [size, size] and the triangle (-1: none)."""
    center = size / 2.0
    px = np.empty(4)
    py = np.empty(4)
    pz = np.empty(4)
    for t in range(faces.shape[0]):
        if not selected[t]:
            continue
        n = 0
        for k in range(3):
            a = points[faces[t, k]]
            b = points[faces[t, (k + 1) % 3]]
            if a[2] >= _NEAR:
                px[n] = focal * a[0] / a[2] + center
                py[n] = focal * a[1] / a[2] + center
                pz[n] = 1.0 / a[2]
                n += 1
            if (a[2] >= _NEAR) != (b[2] >= _NEAR):
                s = (_NEAR - a[2]) / (b[2] - a[2])
                px[n] = focal * (a[0] + s * (b[0] - a[0])) / _NEAR + center
                py[n] = focal * (a[1] + s * (b[1] - a[1])) / _NEAR + center
                pz[n] = 1.0 / _NEAR
                n += 1
        for k in range(1, n - 1):
            _fill(
                px[0], py[0], pz[0], px[k], py[k], pz[k], px[k + 1], py[k + 1], pz[k + 1],
                t, size, inverse_depth, index,
            )  # fmt: skip


@numba.njit(cache=True)
def _lamp_visibility(shadow, x, y, z, px, py, pz):
    """Share of the 7x7 shadow-map cells around the point that are lit; the lamp looks down from (px, py, pz)."""
    depth = pz - z
    if depth < 1e-3:
        return 1.0
    n = shadow.shape[0]
    u = int(SHADOW_FOCAL * (x - px) / depth + n / 2)
    v = int(SHADOW_FOCAL * (py - y) / depth + n / 2)
    lit = 0
    for b in range(v - 3, v + 4):
        for a in range(u - 3, u + 4):
            outside = a < 0 or b < 0 or a >= n or b >= n
            if outside or shadow[b, a] <= 0 or 1.0 / shadow[b, a] > depth - 0.04:
                lit += 1
    return lit / 49.0


@numba.njit(cache=True)
def _sample(pyramid, picture, level, u, v, to_linear, out):
    """Bilinear lookup in one level of the pyramid, wrapping; `out` is multiplied by the linear colour."""
    n = TEXTURE_SIZE >> level
    x = (u - math.floor(u)) * n - 0.5
    y = (1.0 - (v - math.floor(v))) * n - 0.5
    ix = math.floor(x)
    iy = math.floor(y)
    fx = x - ix
    fy = y - iy
    start = _LEVEL_START[level]
    i00 = start + (iy % n) * n + ix % n
    i01 = start + (iy % n) * n + (ix + 1) % n
    i10 = start + ((iy + 1) % n) * n + ix % n
    i11 = start + ((iy + 1) % n) * n + (ix + 1) % n
    for c in range(3):
        top = to_linear[pyramid[picture, i00, c]] * (1 - fx) + to_linear[pyramid[picture, i01, c]] * fx
        bottom = to_linear[pyramid[picture, i10, c]] * (1 - fx) + to_linear[pyramid[picture, i11, c]] * fx
        out[c] *= top * (1 - fy) + bottom * fy


@numba.njit(cache=True)
def _shade(
    points, vertices, faces, normals, uvs, material, instance, colors, emission, texture, pyramid, density,
    camera, rotation, focal, inverse_depth, index, shadow, lamp, lamp_color, fill, fill_color, ambient, to_linear,
    radiance, albedo, normal_map, instance_map,
):  # fmt: skip
    size = index.shape[0]
    color = np.empty(3)
    weight = np.empty(3)
    normal = np.empty(3)
    for y in range(size):
        for x in range(size):
            t = index[y, x]
            if t < 0:
                continue
            z = 1.0 / inverse_depth[y, x]
            cx = (x + 0.5 - size / 2.0) / focal * z
            cy = (y + 0.5 - size / 2.0) / focal * z
            # Barycentric weights of the hit point in the unclipped triangle.
            a = points[faces[t, 0]]
            b = points[faces[t, 1]]
            c = points[faces[t, 2]]
            e1x, e1y, e1z = b[0] - a[0], b[1] - a[1], b[2] - a[2]
            e2x, e2y, e2z = c[0] - a[0], c[1] - a[1], c[2] - a[2]
            qx, qy, qz = cx - a[0], cy - a[1], z - a[2]
            d11 = e1x * e1x + e1y * e1y + e1z * e1z
            d12 = e1x * e2x + e1y * e2y + e1z * e2z
            d22 = e2x * e2x + e2y * e2y + e2z * e2z
            q1 = qx * e1x + qy * e1y + qz * e1z
            q2 = qx * e2x + qy * e2y + qz * e2z
            scale = d11 * d22 - d12 * d12
            scale = 1.0 / scale if scale > 1e-20 else 0.0
            weight[1] = min(max((d22 * q1 - d12 * q2) * scale, 0.0), 1.0)
            weight[2] = min(max((d11 * q2 - d12 * q1) * scale, 0.0), 1.0 - weight[1])
            weight[0] = 1.0 - weight[1] - weight[2]
            wx = wy = wz = u = v = 0.0
            for k in range(3):
                wx += weight[k] * vertices[faces[t, k], 0]
                wy += weight[k] * vertices[faces[t, k], 1]
                wz += weight[k] * vertices[faces[t, k], 2]
                u += weight[k] * uvs[t, k, 0]
                v += weight[k] * uvs[t, k, 1]
            length = 0.0
            for i in range(3):
                normal[i] = weight[0] * normals[t, 0, i] + weight[1] * normals[t, 1, i] + weight[2] * normals[t, 2, i]
                length += normal[i] * normal[i]
            if length < 1e-12:
                normal[0] = camera[0] - wx
                normal[1] = camera[1] - wy
                normal[2] = camera[2] - wz
                length = normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]
            facing = normal[0] * (camera[0] - wx) + normal[1] * (camera[1] - wy) + normal[2] * (camera[2] - wz)
            length = (1.0 if facing >= 0 else -1.0) / math.sqrt(length)
            for i in range(3):
                normal[i] *= length
            m = material[t]
            for i in range(3):
                color[i] = colors[m, i]
            if texture[m] >= 0:
                cosine = max(abs(facing * length) / math.sqrt(cx * cx + cy * cy + z * z), 0.05)
                footprint = density[t] * z / focal / math.sqrt(cosine)
                level = 0
                while footprint > 1.5 and level < _LEVELS - 1:
                    footprint *= 0.5
                    level += 1
                _sample(pyramid, texture[m], level, u, v, to_linear, color)
            lx, ly, lz = lamp[0] - wx, lamp[1] - wy, lamp[2] - wz
            squared = lx * lx + ly * ly + lz * lz
            cosine = (lx * normal[0] + ly * normal[1] + lz * normal[2]) / math.sqrt(squared)
            direct = 0.0
            if cosine > 0:
                direct = cosine / (0.6 + 0.4 * squared) * _lamp_visibility(
                    shadow, wx + 0.02 * normal[0], wy + 0.02 * normal[1], wz + 0.02 * normal[2],
                    lamp[0], lamp[1], lamp[2],
                )  # fmt: skip
            side = max(fill[0] * normal[0] + fill[1] * normal[1] + fill[2] * normal[2], 0.0)
            sky = ambient * (0.8 + 0.2 * normal[2])
            for i in range(3):
                light = sky + direct * lamp_color[i] + side * fill_color[i]
                albedo[y, x, i] = color[i]
                radiance[y, x, i] = color[i] * (light + emission[m])
                row = rotation[i, 0] * normal[0] + rotation[i, 1] * normal[1] + rotation[i, 2] * normal[2]
                normal_map[y, x, i] = row if i == 0 else -row
            instance_map[y, x] = instance[t]


@numba.njit(cache=True)
def _occlude(inverse_depth, offsets, radiance):
    """Darken creases: screen-space ambient occlusion from pairs of opposite neighbours at a fixed set of offsets."""
    size = inverse_depth.shape[0]
    factor = np.ones((size, size))
    for y in range(size):
        for x in range(size):
            if inverse_depth[y, x] <= 0:
                continue
            z = 1.0 / inverse_depth[y, x]
            total = 0.0
            for k in range(offsets.shape[0]):
                ya = min(max(y + offsets[k, 0], 0), size - 1)
                xa = min(max(x + offsets[k, 1], 0), size - 1)
                yb = min(max(y - offsets[k, 0], 0), size - 1)
                xb = min(max(x - offsets[k, 1], 0), size - 1)
                if inverse_depth[ya, xa] <= 0 or inverse_depth[yb, xb] <= 0:
                    continue
                # On a plane 1/z is linear on the screen, so the gap to the neighbours' middle is exactly zero there.
                gap = z - 2.0 / (inverse_depth[ya, xa] + inverse_depth[yb, xb])
                if 0 < gap < 0.4:
                    total += min(gap * 10, 1.0)
            factor[y, x] = 1 - 0.55 * total / offsets.shape[0]
    for y in range(size):
        for x in range(size):
            for i in range(3):
                radiance[y, x, i] *= factor[y, x]


def shadow_map(geometry: Geometry, light: Light) -> np.ndarray:
    """Inverse depths seen from the lamp looking straight down, float32 [384, 384]."""
    relative = geometry.vertices - np.asarray(light.lamp_position, np.float32)
    points = relative * np.array([1, -1, -1], np.float32)
    inverse_depth = np.zeros((SHADOW_SIZE, SHADOW_SIZE), np.float32)
    index = np.full((SHADOW_SIZE, SHADOW_SIZE), -1, np.int32)
    _rasterize(points, geometry.faces, geometry.casts_shadow, SHADOW_FOCAL, SHADOW_SIZE, inverse_depth, index)
    return inverse_depth


def _occlusion_offsets(size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.round(rng.uniform(-0.08, 0.08, (16, 2)) * size).astype(np.int32)


class View:
    """One camera's rasterised picture, shaded on demand so that a bad view costs only its z-buffer.

    Args:
      resolution: pixels per side of the result.
      supersample: odd, so that one sub-pixel lies exactly in the middle of the pixel: labels are taken there, colours
        are averaged over all of them.
    """

    def __init__(self, geometry: Geometry, camera: Camera, resolution: int, supersample: int = 3):
        if supersample < 1 or supersample % 2 == 0:
            raise ValueError(f"supersample must be odd, got {supersample}")
        self._geometry, self._camera = geometry, camera
        self._resolution, self._supersample = resolution, supersample
        size = resolution * supersample
        self._rotation = camera.rotation()
        self._origin = np.asarray(camera.position, np.float32)
        self._points = ((geometry.vertices - self._origin) @ self._rotation.T).astype(np.float32)
        self._focal = size / 2 / math.tan(math.radians(camera.field_of_view) / 2)
        self._inverse_depth = np.zeros((size, size), np.float32)
        self._index = np.full((size, size), -1, np.int32)
        everything = np.ones(len(geometry.faces), np.bool_)
        _rasterize(self._points, geometry.faces, everything, self._focal, size, self._inverse_depth, self._index)

    def _centers(self, array: np.ndarray) -> np.ndarray:
        start = self._supersample // 2
        return array[start :: self._supersample, start :: self._supersample]

    def depth(self) -> np.ndarray:
        """z-depth in metres at pixel centres, float32 [res, res], 0 where nothing was hit."""
        inverse = self._centers(self._inverse_depth)
        return np.where(inverse > 0, 1 / np.maximum(inverse, 1e-9), 0).astype(np.float32)

    def instances(self) -> np.ndarray:
        """Instance ids at pixel centres, int32 [res, res], 0 where nothing was hit."""
        index = self._centers(self._index)
        return np.where(index >= 0, self._geometry.instance[index], 0).astype(np.int32)

    def shade(self, light: Light, shadow: np.ndarray) -> tuple[np.ndarray, Labels]:
        """rgb uint8 [res, res, 3] and the exact labels."""
        g, size, res = self._geometry, len(self._index), self._resolution
        radiance, albedo, normals = (np.zeros((size, size, 3), np.float32) for _ in range(3))
        instance = np.zeros((size, size), np.int32)
        vector = [np.asarray(x, np.float64) for x in (light.lamp_position, light.lamp_color)]
        fill = np.asarray(light.fill_direction, np.float64)
        fill = fill / np.linalg.norm(fill)
        _shade(
            self._points, g.vertices, g.faces, g.normals, g.uvs, g.material, g.instance, g.colors, g.emission,
            g.texture, g.pyramid, g.texel_density, self._origin, self._rotation, self._focal, self._inverse_depth,
            self._index, shadow, *vector, fill, np.asarray(light.fill_color, np.float64), light.ambient, _TO_LINEAR,
            radiance, albedo, normals, instance,
        )  # fmt: skip
        _occlude(self._inverse_depth, _occlusion_offsets(size), radiance)
        pooled = radiance.reshape(res, self._supersample, res, self._supersample, 3).mean((1, 3))
        labels = Labels(
            self.depth(), self._centers(normals).copy(), self._centers(instance).copy(), self._centers(albedo).copy()
        )
        return tone_map(pooled, light.exposure), labels


def tone_map(radiance: np.ndarray, exposure: float) -> np.ndarray:
    """Linear float [.., 3] -> sRGB uint8: bring the mean luminance to `exposure`, then roll off the highlights.

    The curve x (1 + x / w^2) / (1 + x) with white point w is Reinhard et al., Photographic tone reproduction, 2002,
    equation 4.
    """
    mean = float((radiance @ np.array([0.2126, 0.7152, 0.0722])).mean())
    x = radiance * (exposure / max(mean, 1e-6))
    x = x * (1 + x / 1.6**2) / (1 + x)
    return np.round(255 * np.clip(x, 0, 1) ** (1 / 2.2)).astype(np.uint8)
