"""The z-buffer renderer on scenes whose depth, normals and labels are known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("numba", reason="the rooms renderer needs numba, which is not installed")

from data_pipelines.rooms import shapes
from data_pipelines.rooms.classes import CLASS_ID
from data_pipelines.rooms.furniture import Mesh
from data_pipelines.rooms.rasterizer import Camera, Light, View, shadow_map
from data_pipelines.rooms.render import make_sample
from data_pipelines.rooms.scene import Instance, Scene, assemble, tint

LIGHT = Light((0.0, 0.0, 3.0), (2.0, 2.0, 2.0), (0.0, -1.0, 0.3), (0.2, 0.2, 0.2), 0.4, 0.4)
FRONT = Camera((0.0, -3.0, 0.5), (0.0, 0.0, 0.5), 60.0)
FOCAL = 32 / math.tan(math.radians(30))  # of 64 pixels at 60 degrees


def scene_of(*items: tuple[Mesh, str, tuple[float, float, float]], shell=()) -> Scene:
    instances = [Instance(mesh, name, name, position, 0.0) for mesh, name, position in items]
    return Scene("office", (8.0, 8.0, 3.0), list(shell), instances, LIGHT, "wooden floor", "blue walls")


def render(scene: Scene, camera: Camera = FRONT, resolution: int = 64):
    geometry = assemble(scene)
    return View(geometry, camera, resolution).shade(LIGHT, shadow_map(geometry, LIGHT))


def rays(camera: Camera, resolution: int = 64) -> np.ndarray:
    """World directions [res, res, 3] with unit z-depth."""
    y, x = np.mgrid[:resolution, :resolution] + 0.5
    scale = math.tan(math.radians(camera.field_of_view) / 2) / (resolution / 2)
    local = np.stack([(x - resolution / 2) * scale, (y - resolution / 2) * scale, np.ones_like(x)], -1)
    return local @ camera.rotation()


def test_cube_from_the_front():
    rgb, labels = render(scene_of((shapes.box((1, 1, 1), (1, 0, 0)), "box", (0, 0, 0))))
    # The front face is 2.5 m away, half a metre is 11.08 pixels: the centres of pixels 21 to 42 are inside.
    assert pytest.approx(11.085, abs=1e-3) == FOCAL * 0.5 / 2.5
    wanted = np.zeros((64, 64), np.int32)
    wanted[21:43, 21:43] = 1
    np.testing.assert_array_equal(labels.instance, wanted)
    np.testing.assert_allclose(labels.depth, 2.5 * wanted, atol=1e-5)
    np.testing.assert_allclose(labels.normals[wanted == 1], np.broadcast_to([0, 0, 1], (22 * 22, 3)), atol=1e-6)
    np.testing.assert_allclose(labels.albedo[32, 32], [1, 0, 0], atol=1e-6)
    red, green, blue = rgb[32, 32]
    assert red > 100 and green == blue == 0 and (rgb[:10] == 0).all()


def test_cube_from_a_corner_matches_ray_casting():
    camera = Camera((2.0, -2.4, 1.9), (0.1, 0.0, 0.4), 50.0)
    _, labels = render(scene_of((shapes.box((1, 1, 1)), "box", (0, 0, 0))), camera)
    direction, origin = rays(camera), np.array(camera.position)
    low, high = np.array([-0.5, -0.5, 0]), np.array([0.5, 0.5, 1])
    t = np.sort(np.stack([(low - origin) / direction, (high - origin) / direction]), axis=0)
    near, far = t[0].max(-1), t[1].min(-1)
    hit = near < far
    assert ((labels.instance == 1) == hit).mean() > 0.999  # edges through a pixel centre may go either way
    both = hit & (labels.instance == 1)
    np.testing.assert_allclose(labels.depth[both], near[both], atol=1e-4)
    axis = t[0].argmax(-1)
    world = np.eye(3)[axis] * np.where(np.take_along_axis(direction, axis[..., None], -1) > 0, -1, 1)
    wanted = world @ (camera.rotation() * [[1], [-1], [-1]]).T
    np.testing.assert_allclose(labels.normals[both], wanted[both], atol=1e-5)


def test_floor_reaches_behind_the_camera():
    """A floor of two triangles that pass through the near plane is cut, not dropped."""
    floor = shapes.rectangle((-50, -50, 0), (100, 0, 0), (0, 100, 0))
    camera = Camera((0.0, 0.0, 1.5), (0.3, 1.0, 1.0), 80.0)
    _, labels = render(scene_of(shell=[(floor, "floor")]), camera)
    down = -rays(camera)[..., 2]
    seen = down > 1.5 / 40
    assert (labels.instance[seen] == 1).all() and (labels.instance[down < 0] == 0).all()
    np.testing.assert_allclose(labels.depth[seen], 1.5 / down[seen], rtol=1e-4)
    up = camera.rotation() @ [0, 0, 1] * [1, -1, -1]
    np.testing.assert_allclose(labels.normals[seen], np.broadcast_to(up, (seen.sum(), 3)), atol=1e-5)


def test_texture_is_perspective_correct():
    """The middle of the texture lies where the middle of the slanted wall is seen, not in the middle of the picture."""
    texture = np.zeros((128, 128, 3), np.uint8)
    texture[:, 64:] = 255
    wall = shapes.rectangle((-1, 0, -2), (2, 3, 0), (0, 0, 5), texture)
    camera = Camera((0.0, -1.5, 0.5), (0.0, 0.0, 0.5), 90.0)
    _, labels = render(scene_of(shell=[(wall, "wall")]), camera)
    row = labels.albedo[32, :, 0]
    # The wall's middle (0, 1.5) is straight ahead, its left end (-1, 0) at -1/1.5 and its right end (1, 3) at 1/4.5.
    assert row[:31].max() < 0.05 and row[33:39].min() > 0.95
    assert (labels.instance[32] > 0).sum() == pytest.approx(32 * (1 / 1.5 + 1 / 4.5), abs=1.5)


def test_nearer_object_wins_in_any_order():
    near, far = (shapes.box((0.4, 0.2, 1)), "chair", (0, -1, 0)), (shapes.box((2, 0.2, 1)), "couch", (0, 1, 0))
    for items in ((near, far), (far, near)):
        _, labels = render(scene_of(*items))
        names = [name for _, name, _ in items]
        assert names[labels.instance[32, 32] - 1] == "chair"
        assert names[labels.instance[32, 22] - 1] == "couch"


def test_lamp_casts_a_shadow():
    floor = shapes.rectangle((-4, -4, 0), (8, 0, 0), (0, 8, 0))
    camera = Camera((0.0, -3.5, 2.0), (0.0, 0.0, 0.0), 70.0)
    table = shapes.box((1.2, 1.2, 0.05))
    shaded, labels = render(scene_of((table, "dining table", (0, 0, 0.9)), shell=[(floor, "floor")]), camera)
    x = np.where(labels.instance == 1, (rays(camera) * labels.depth[..., None] + camera.position)[..., 0], 9)
    y = np.where(labels.instance == 1, (rays(camera) * labels.depth[..., None] + camera.position)[..., 1], 9)
    under = (np.abs(x) < 0.4) & (np.abs(y) < 0.5)
    beside = (np.abs(x) > 1.4) & (np.abs(x) < 2) & (np.abs(y) < 0.5)
    assert under.sum() > 10 and beside.sum() > 10
    assert shaded[under].mean() < 0.88 * shaded[beside].mean()


def test_sample_from_labels():
    floor = shapes.rectangle((-4, -4, 0), (8, 0, 0), (0, 8, 0))
    scene = scene_of(
        (shapes.box((1, 1, 1), (0, 0, 0.8)), "couch", (0, 0, 0)),
        (shapes.box((0.01, 0.01, 0.01)), "cup", (1, 0, 0)),
        shell=[(floor, "floor")],
    )
    scene.instances[0].model_id = "t#couch"
    rgb, labels = render(scene)
    sample = make_sample(rgb, labels, scene, "train-0-000001", np.random.default_rng(0))
    assert [i["class_name"] for i in sample["instances"]] == ["couch"]  # the cup is far below the smallest area
    assert sample["instances"][0]["boxes"] == [21 / 64, 21 / 64, 43 / 64, 43 / 64]
    assert sample["semseg"][32, 32] == CLASS_ID["couch"] and sample["semseg"][60, 32] == CLASS_ID["floor"]
    assert sample["semseg"][2, 32] == CLASS_ID["void"]
    assert sample["normal"][32, 32].tolist() == [128, 128, 255]
    assert sample["models"] == ["t#couch"] and "couch" in sample["caption"]


def test_tint_moves_the_mean_of_a_texture():
    texture = np.full((128, 128, 3), 60, np.uint8)
    texture[::2] = 120
    mesh = shapes.rectangle((0, 0, 0), (1, 0, 0), (0, 0, 1), texture)
    colors = tint(mesh, np.array([0.5, 0.3, 0.4]))
    mean = ((texture / 255.0) ** 2.2).mean((0, 1))
    np.testing.assert_allclose(colors[0] * mean, np.array([0.5, 0.3, 0.4]) ** 2.2, rtol=1e-4)


def test_refusals():
    geometry = assemble(scene_of((shapes.box((1, 1, 1)), "box", (0, 0, 0))))
    with pytest.raises(ValueError, match="supersample must be odd, got 2"):
        View(geometry, FRONT, 64, supersample=2)
    with pytest.raises(ValueError, match="straight up or down"):
        View(geometry, Camera((0, 0, 3), (0, 0, 0), 60), 64)
