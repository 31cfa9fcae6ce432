"""The shipped rooms packs, and reading and writing of pack files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from data_pipelines.rooms.classes import CLASS_ID, CLASSES, STRUCTURE, label_model, palette
from data_pipelines.rooms.pack import DEPTH_STEP, SHIPPED, RoomsPack, open_packs, write_pack

COUNTS = {"train": 1024, "val": 128}


@pytest.fixture(scope="module")
def packs() -> dict[str, RoomsPack]:
    return {split: RoomsPack(SHIPPED / f"rooms_{split}.zip") for split in COUNTS}


@pytest.fixture(scope="module")
def some(packs) -> list[dict]:
    return [packs["train"][i] for i in range(0, 1024, 16)] + [packs["val"][i] for i in range(0, 128, 4)]


def small_sample(size: int = 8, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "rgb": np.full((size, size, 3), 100, np.uint8),
        "depth": rng.uniform(0.5, 9, (size, size)).astype(np.float32),
        "normal": rng.integers(0, 256, (size, size, 3), np.uint8),
        "semseg": rng.integers(0, len(CLASSES), (size, size), np.uint8),
        "instances": [{"boxes": [0.0, 0.25, 0.5, 1.0], "class_name": "chair", "score": 1.0}],
        "caption": "a red chair",
        "scene": "train-0-000000",
        "models": ["catalogue#chair"],
    }


@pytest.mark.parametrize("split", COUNTS)
def test_shipped_index(packs, split):
    pack = packs[split]
    assert len(pack) == COUNTS[split] == len(set(pack.keys))
    assert pack.resolution == 64
    assert pack.classes == CLASSES
    np.testing.assert_array_equal(pack.palette, palette())
    assert pack.info["split"] == split
    assert pack.info["license"] == "CC0-1.0"
    assert f"--split={split}" in pack.info["generator"]["command"]


def test_shipped_packs_are_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 7_000_000


def test_split_is_by_model_and_scene(packs):
    listed = json.loads((SHIPPED / "split.json").read_text())
    used, scenes = {}, {}
    for split, pack in packs.items():
        metas = [pack.meta(i) for i in range(len(pack))]
        used[split] = {model for meta in metas for model in meta["models"]}
        scenes[split] = {meta["scene"] for meta in metas}
        assert used[split] <= set(listed[split])
    assert not set(listed["train"]) & set(listed["val"])
    assert not scenes["train"] & scenes["val"]
    assert len(used["train"]) > 70 and len(used["val"]) > 20
    assert all(model.startswith("Blend Swap CC-0#") for model in used["train"] | used["val"])
    by_class: dict[str, list[str]] = {}
    for model, class_name in listed["class_of"].items():
        by_class.setdefault(class_name, []).append(model)
    for class_name, models in by_class.items():
        assert bool(set(models) & set(listed["val"])) == (len(models) >= 2), class_name


def test_shapes_and_types(some):
    for sample in some:
        assert sample["rgb"].shape == sample["normal"].shape == (64, 64, 3)
        assert sample["depth"].shape == sample["semseg"].shape == (64, 64)
        assert sample["rgb"].dtype == sample["normal"].dtype == sample["semseg"].dtype == np.uint8
        assert sample["depth"].dtype == np.float32
        assert sample["depth"].min() > 0.1 and sample["depth"].max() < 9
        assert sample["semseg"].max() < len(CLASSES) and sample["semseg"].min() > 0


def test_pictures_are_well_lit_and_varied(some):
    means = np.array([sample["rgb"].mean() for sample in some])
    assert 90 < means.mean() < 190 and means.min() > 60
    assert np.mean([sample["rgb"].std() for sample in some]) > 35
    assert len({sample["caption"] for sample in some}) > 0.9 * len(some)


def test_normals_are_unit_and_face_the_camera(some):
    for sample in some:
        normal = sample["normal"].astype(np.float64) / 127.5 - 1
        np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, atol=0.02)
        v, u = (np.mgrid[:64, :64] + 0.5) / 32 - 1
        tangent = np.tan(np.radians(82) / 2)
        ray = np.stack([u * tangent, -v * tangent, -np.ones_like(u)], -1)  # the widest view the generator uses
        assert ((normal * ray).sum(-1) < 0.35).all()


def test_floors_and_ceilings_agree_with_their_normals(some):
    """The floor's normal is one direction per picture, up; the ceiling's is the opposite one."""
    both = 0
    for sample in some:
        normal = sample["normal"].astype(np.float64) / 127.5 - 1
        floor, ceiling = (normal[sample["semseg"] == CLASS_ID[name]] for name in ("floor", "ceiling"))
        if len(floor):
            up = np.median(floor, axis=0)
            assert up[1] > 0.5 and abs(up[0]) < 0.02  # the camera never rolls
            assert (floor @ up > 0.99).all()
            if len(ceiling):
                assert (ceiling @ up < -0.98).all()
                both += 1
    assert both > 5


def test_depth_of_the_floor_is_a_plane(some):
    """1 / z-depth of a plane is an affine function of the pixel."""
    checked = 0
    for sample in some:
        y, x = np.nonzero(sample["semseg"] == CLASS_ID["floor"])
        if len(y) < 100:
            continue
        a = np.stack([x, y, np.ones_like(x)], -1).astype(np.float64)
        inverse = 1 / sample["depth"][y, x].astype(np.float64)
        residual = a @ np.linalg.lstsq(a, inverse, rcond=None)[0] - inverse
        # Stored depth is a multiple of 4 mm, that is half a step in 1/z of 0.002 / z^2.
        assert (np.abs(residual) <= 1.5 * DEPTH_STEP / 2000 * inverse**2 + 1e-3).all()
        checked += 1
    assert checked > 20


def test_boxes_match_the_labels(some):
    for sample in some:
        assert sample["instances"], sample["key"]
        for instance in sample["instances"]:
            assert instance["class_name"] in CLASS_ID and instance["class_name"] not in STRUCTURE
            assert instance["score"] == 1.0
            xmin, ymin, xmax, ymax = instance["boxes"]
            assert 0 <= xmin < xmax <= 1 and 0 <= ymin < ymax <= 1
            left, top, right, bottom = (round(v * 64) for v in instance["boxes"])
            inside = sample["semseg"][top:bottom, left:right] == CLASS_ID[instance["class_name"]]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_captions_are_short_sentences_about_the_room(packs):
    captions = [packs["train"].meta(i)["caption"] for i in range(1024)]
    assert max(len(caption.split()) for caption in captions) <= 26
    assert all(any(theme in caption for theme in ("room", "kitchen", "office")) for caption in captions)
    assert sum(" left of " in caption or " right of " in caption for caption in captions) > 100
    assert sum(" on a" in caption for caption in captions) > 50
    assert not any("a office" in caption or "  " in caption for caption in captions)


def test_round_trip(tmp_path):
    samples = [small_sample(seed=i) for i in range(3)]
    path = tmp_path / "p.zip"
    assert write_pack(path, copy.deepcopy(samples), split="train", license="CC0-1.0", generator={"seed": 5}) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["p.zip"]
    pack = open_packs(tmp_path / "*.zip")[0]
    assert pack.info["generator"] == {"seed": 5} and pack.info["split"] == "train"
    for wanted, found in zip(samples, copy.copy(pack), strict=True):
        for name in ("normal", "semseg"):
            np.testing.assert_array_equal(found[name], wanted[name])
        np.testing.assert_allclose(found["depth"], wanted["depth"], atol=DEPTH_STEP / 2000 + 1e-5)
        np.testing.assert_allclose(found["rgb"].astype(int), wanted["rgb"], atol=3)
        for name in ("instances", "caption", "scene", "models"):
            assert found[name] == wanted[name]
    again = tmp_path / "q.zip"
    write_pack(again, samples, split="train", license="CC0-1.0", generator={"seed": 5})
    assert again.read_bytes() == path.read_bytes()


def test_indexing(packs):
    assert packs["val"][-1]["key"] == packs["val"].keys[-1]
    with pytest.raises(IndexError, match="sample 128 of 128"):
        packs["val"][128]


def test_write_refuses_bad_samples(tmp_path):
    far = small_sample() | {"depth": np.full((8, 8), 70.0, np.float32)}
    with pytest.raises(ValueError, match=r"train-0-000000.*65\.535"):
        write_pack(tmp_path / "p.zip", [far], split="train", license="CC0")
    with pytest.raises(ValueError, match=r"sample 000001 is 4x4, expected 8x8"):
        write_pack(tmp_path / "p.zip", [small_sample(), small_sample(4)], split="train", license="CC0")
    with pytest.raises(ValueError, match="no samples"):
        write_pack(tmp_path / "p.zip", [], split="train", license="CC0")
    assert not list(tmp_path.iterdir())


def test_bad_files_are_named(tmp_path):
    good = tmp_path / "good.zip"
    write_pack(good, [small_sample()], split="train", license="CC0")
    with pytest.raises(FileNotFoundError, match=r"none\.zip: no such rooms pack"):
        RoomsPack(tmp_path / "none.zip")
    with pytest.raises(FileNotFoundError, match=r"x\*\.zip: no rooms pack"):
        open_packs(tmp_path / "x*.zip")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(good.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut\.zip: not a zip file, or truncated"):
        RoomsPack(cut)
    foreign = tmp_path / "foreign.zip"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match=r"foreign\.zip: member index\.json is missing"):
        RoomsPack(foreign)
    with zipfile.ZipFile(foreign, "a") as archive:
        archive.writestr("index.json", '{"format": "other"}')
    with pytest.raises(ValueError, match=r"foreign\.zip: index\.json lacks"):
        RoomsPack(foreign)


def test_damaged_member_is_named(tmp_path):
    path = tmp_path / "p.zip"
    write_pack(path, [small_sample()], split="train", license="CC0")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("000000/normal.webp")
    raw = bytearray(path.read_bytes())
    raw[info.header_offset + 80] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"p\.zip: member 000000/normal\.webp is damaged"):
        RoomsPack(path)[0]


def test_reading_needs_no_renderer():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from data_pipelines.rooms.pack import RoomsPack, SHIPPED\n"
        "RoomsPack(SHIPPED / 'rooms_val.zip')[0]\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'jax', 'tensorflow', 'seqio', 'scipy', 'tqdm'}))"
    )
    root = SHIPPED.parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_classes():
    assert CLASSES[:4] == ("void", "wall", "floor", "ceiling") and len(set(CLASSES)) == len(CLASSES) <= 48
    colors = palette()
    assert len({tuple(color) for color in colors}) == len(CLASSES)
    assert label_model("x", "Winchester sofa", "Living room").class_name == "couch"
    assert label_model("x", "Stool", "Kitchen").class_name == "stool"
    assert label_model("x", "Cuckoo clock", "Miscellaneous").class_name == "clock"
    assert label_model("x", "Fork lift", "Vehicles") is None
    assert label_model("Blend Swap CC-0#armchair", "Armchair", "Office").class_name == "chair"
