"""From a scene to samples: views, labels, boxes and captions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from data_pipelines.rooms.captions import Visible, caption
from data_pipelines.rooms.classes import CLASS_ID
from data_pipelines.rooms.library import ModelLibrary
from data_pipelines.rooms.rasterizer import Geometry, Labels, View, shadow_map
from data_pipelines.rooms.scene import Scene, assemble, random_camera
from data_pipelines.rooms.themes import random_room

MIN_AREA = 0.003  # share of the picture below which an object gets no box and no word: 12 pixels of 64 x 64
_VIEW_ATTEMPTS = 14
_SCENE_ATTEMPTS = 8


@dataclasses.dataclass
class _Wanted:
    """What makes a view worth keeping; relaxed when a room cannot offer it."""

    objects: int = 5
    shell_share: float = 0.72
    largest_share: float = 0.42
    near_depth: float = 0.7


def _acceptable(view: View, shell_count: int, wanted: _Wanted) -> bool:
    instance, depth = view.instances(), view.depth()
    if (instance == 0).any() or np.quantile(depth, 0.03) < wanted.near_depth:
        return False
    counts = np.bincount(instance.ravel()) / instance.size
    furniture = counts[shell_count + 1 :]
    shell = counts[: shell_count + 1].sum()
    enough = (furniture >= 2 * MIN_AREA).sum() >= wanted.objects
    return bool(enough and shell <= wanted.shell_share and furniture.max(initial=0) <= wanted.largest_share)


def _instances(labels: Labels, scene: Scene) -> tuple[list[dict[str, Any]], list[Visible]]:
    """Boxes of visible pixels, and what the caption needs, largest first."""
    shell = len(scene.shell)
    size = labels.instance.shape[0]
    boxes: list[tuple[float, dict[str, Any], Visible]] = []
    for index, item in enumerate(scene.instances):
        mask = labels.instance == shell + 1 + index
        area = float(mask.mean())
        if area < MIN_AREA:
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [float(v) / size for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
        color = np.median(labels.albedo[mask], axis=0).clip(0, 1) ** (1 / 2.2)
        record = {"boxes": box, "class_name": item.class_name, "score": 1.0}
        center = (box[0] + box[2]) / 2
        boxes.append((area, record, Visible(index, item.noun, item.class_name, color, area, center, item.support)))
    boxes.sort(key=lambda entry: -entry[0])
    return [record for _, record, _ in boxes], [visible for _, _, visible in boxes]


def make_sample(
    rgb: np.ndarray, labels: Labels, scene: Scene, scene_name: str, rng: np.random.Generator
) -> dict[str, Any]:
    """A sample: rgb u8 [H, W, 3], depth f32 [H, W] metres, normal u8 [H, W, 3], semseg u8 [H, W], instances, caption.

    normal = round(127.5 (n + 1)) with camera axes x right, y up, z towards the camera. `instances` is a list of
    {"boxes": [xmin, ymin, xmax, ymax] in [0, 1], "class_name", "score"}, largest first, from visible pixels; objects
    under MIN_AREA of the picture are left out. `models` are the catalogue ids of the scene.
    """
    table = np.array(
        [0] + [CLASS_ID[name] for _, name in scene.shell] + [CLASS_ID[item.class_name] for item in scene.instances],
        np.uint8,
    )
    instances, visible = _instances(labels, scene)
    furniture = [v for v in visible if v.class_name not in ("window", "door", "picture")]
    return {
        "rgb": rgb,
        "depth": labels.depth,
        "normal": np.round(127.5 * (labels.normals + 1)).clip(0, 255).astype(np.uint8),
        "semseg": table[labels.instance],
        "instances": instances,
        "caption": caption(rng, scene.theme, scene.floor, scene.wall, furniture or visible),
        "scene": scene_name,
        "models": sorted({item.model_id for item in scene.instances if item.model_id}),
    }


def _find_views(
    rng: np.random.Generator, scene: Scene, geometry: Geometry, count: int, resolution: int, wanted: _Wanted
) -> list[View]:
    views: list[View] = []
    probe = min(resolution, 64)
    for _ in range(_VIEW_ATTEMPTS * count):
        camera = random_camera(rng, scene)
        if _acceptable(View(geometry, camera, probe, supersample=1), len(scene.shell), wanted):
            views.append(View(geometry, camera, resolution))
            if len(views) == count:
                break
    return views


def render_scene(
    seed: tuple[int, ...], library: ModelLibrary, scene_name: str, views: int = 2, resolution: int = 64
) -> list[dict[str, Any]]:
    """Exactly `views` samples of one random room; the same seed gives the same samples.

    Rooms that offer too few good views are drawn again (with the next stream of the same seed).
    Raises RuntimeError if no room of this seed works, which says that the library is too poor.
    """
    for attempt in range(_SCENE_ATTEMPTS):
        rng = np.random.default_rng(np.random.SeedSequence([*seed, attempt]))
        scene = random_room(rng, library)
        geometry = assemble(scene)
        relaxed = attempt >= _SCENE_ATTEMPTS // 2
        wanted = _Wanted(2, 0.9, 0.7, 0.3) if relaxed else _Wanted()
        found = _find_views(rng, scene, geometry, views, resolution, wanted)
        if len(found) == views:
            shadow = shadow_map(geometry, scene.light)
            return [make_sample(*view.shade(scene.light, shadow), scene, scene_name, rng) for view in found]
    raise RuntimeError(
        f"scene {scene_name} (seed {seed}): no room with {views} good views in {_SCENE_ATTEMPTS} attempts"
    )
