"""Labellers that need no network: edges, palettes, statistics, boxes of COCO files; and the door to all of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipelines.prepare import labels
from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.labels import canny, palette, pixels, statistics
from fm4m.transforms import boxes, color_palette, metadata


def picture(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: a bright disc on a ramp, a thin line, noise."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([3 * x, 2 * y, x + y], axis=-1) + np.random.default_rng(seed).integers(0, 9, (height, width, 3))
    image[(x - 20) ** 2 + (y - 12) ** 2 < 50] += 120
    image[5] = 20
    return np.clip(image, 0, 255).astype(np.uint8)


# ---- the door


def test_make_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"the kind named 'cany'\. Did you mean 'canny'\? Known: canny, centernet"):
        labels.make("cany")
    with pytest.raises(ValueError, match=r"option of 'canny' labellers named 'hig'\. Did you mean 'high'\?"):
        labels.make("canny", hig=3)
    with pytest.raises(ValueError, match="kind 'coco' needs the option 'path'"):
        labels.make("coco")


@pytest.mark.parametrize(
    ("kind", "domain"), [("canny", "edges"), ("palette", "color_palette"), ("statistics", "metadata")]
)
def test_labellers_without_weights(kind, domain):
    labeller = labels.make(kind)
    assert isinstance(labeller, labels.Labeller) and labeller.domain == domain and labeller.name
    images = np.stack([picture(seed=0), picture(seed=1), picture(seed=2)])
    found = labeller.label(images)
    assert len(found) == 3
    alone = labeller.label(images[1:2])[0]
    assert np.array_equal(found[1], alone) if isinstance(alone, np.ndarray) else found[1] == alone
    if not isinstance(alone, np.ndarray):
        assert json.loads(json.dumps(alone)) == alone
    for wrong in (images.astype(np.float32), images[0], images[:0]):
        with pytest.raises(ValueError, match=r"expected uint8 \[B, H, W, 3\], not empty"):
            labeller.label(wrong)


# ---- edges


# cv2.Canny of OpenCV 5.0.0: options, then a row of 24 pixels in six hexadecimal digits, a bit a pixel.
GOLDEN_CANNY = [
    (
        dict(),
        "004144 006938 0008a3 009a24 019303 0708c0 3c060f 640c70 211927 226110 "
        "1e5367 7091d8 51bb13 412640 7b4893 120b20 025a80 d6b42e 14a552 15e557",
    ),
    (
        dict(low=50, high=150, blur=5),
        "020000 010800 016fff 011000 021000 0e12d0 38071f 240c70 02d987 066338 "
        "0c4667 1898cc 119310 112624 1364d8 224924 227a87 2494ba 24b54a 24a552",
    ),
    (
        dict(low=60, high=240, blur=3, grey=False, euclidean=True),
        "014080 014080 0141bf 014300 074600 3c381f e0e0f0 071703 38983c c321c0 "
        "1ede07 6082b8 812328 11664a 112495 112d06 21084b a26841 224a22 226a22",
    ),
]


@pytest.mark.parametrize(("options", "rows"), GOLDEN_CANNY)
def test_canny_gives_what_opencv_gives(options, rows):
    y, x = np.mgrid[:20, :24]
    image = np.stack([(x * x + 3 * y) % 97 * 2, (x * y) % 89 * 2, (y * y + 5 * x) % 83 * 3], axis=-1).astype(np.uint8)
    found = canny.Canny(**options).label(image[None])[0]
    assert [np.packbits(row > 0).tobytes().hex() for row in found] == rows.split()


def test_canny_finds_a_step_and_follows_weak_edges():
    image = np.zeros((1, 60, 12, 3), np.uint8)
    # A step of 200 levels that fades to 30: length 120 there, between the thresholds.
    image[:, :, 6:] = np.maximum(200 - 4 * np.arange(60), 30)[:, None, None]
    edges = canny.Canny(100, 200).label(image)[0]
    assert edges.dtype == np.uint8 and set(edges.max(axis=1)) == {255} and not edges[:, [0, 1, 2, 3, 4, 7, 8]].any()
    weak = np.minimum(image, 30)
    assert not canny.Canny(100, 200).label(weak).any() and canny.Canny(100, 110).label(weak).any()
    assert not canny.Canny(2000, 3000, blur=5).label(image).any()
    with pytest.raises(ValueError, match="0 <= low <= high"):
        canny.Canny(200, 100)
    with pytest.raises(ValueError, match="blur is 4"):
        canny.Canny(blur=4)


# ---- palettes


def test_palette_of_flat_areas_is_exact():
    image = np.zeros((1, 10, 10, 3), np.uint8)
    image[:, :6], image[:, 6:9], image[:, 9:] = (200, 30, 20), (10, 90, 220), (250, 250, 240)
    (record,) = palette.Palette().label(image)
    assert record[0]["3"] == [[200, 30, 20], [10, 90, 220], [250, 250, 240]]
    assert record[0]["5"] == record[0]["3"] + record[0]["3"][:2]  # three colours are all there are
    assert [len(record[0][str(n)]) for n in range(1, 8)] == list(range(1, 8))


def test_palettes_can_be_written_as_text():
    (record,) = palette.Palette().label(picture()[None])
    for count in range(1, 8):
        colors = color_palette.choose(record, count)
        assert color_palette.from_text(color_palette.to_text(colors)).palettes == [colors]
    assert len(set(map(tuple, record[0]["7"]))) == 7


def test_lab_of_known_colours():
    lab = palette.to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    np.testing.assert_allclose(lab, [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]], atol=0.02)


# ---- statistics


def test_measures_of_pixels():
    flat = statistics.of_pixels(np.full((4, 4, 3), 100, np.uint8))
    assert flat == {"colorfulness": 0, "brightness": 100, "contrast": 0, "saturation": 0, "entropy": 0}
    halves = np.zeros((4, 4, 3), np.uint8)
    halves[:2] = 255
    found = statistics.of_pixels(halves)
    assert found["contrast"] == 127.5 and found["entropy"] == 1 and found["colorfulness"] == 0
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    found = statistics.of_pixels(red)
    # rg = 255, yb = 127.5 everywhere: no spread, 0.3 times their length.
    assert found["saturation"] == 255 and found["colorfulness"] == pytest.approx(0.3 * np.hypot(255, 127.5))


@pytest.mark.parametrize(
    ("caption", "counts"),
    [
        ("A cat. On a mat!", (16, 5, 2)),
        ("a red kangaroo", (14, 3, 1)),
        ("Wait... what?!", (14, 2, 2)),
        ("", (0, 0, 0)),
        (" . ", (3, 1, 0)),
    ],
)
def test_counts_of_captions(caption, counts):
    assert tuple(statistics.of_caption(caption).values()) == counts


def test_statistics_take_what_the_record_has():
    height, width = 24, 32
    normal = np.zeros((height, width, 3), np.uint8)
    normal[:, :16], normal[:, 16:] = (128, 128, 255), (255, 128, 128)
    depth = np.full((height, width), 2.0, np.float32)
    depth[:, 16:], depth[0, 0] = 3.0, 0.0
    semseg = np.full((height, width), 7, np.uint8)
    semseg[:12], semseg[0] = 3, 255
    det = [
        {"boxes": [0, 0, 0.5, 0.5], "class_name": name, "score": score}
        for name, score in [("person", 0.9), ("person", 0.7), ("dog", 0.8), ("person", 0.5)]
    ]
    record = {"key": "a", "rgb": np.zeros((480, 640, 3), np.uint8), "caption": ["A dog and two people.", "x"]}
    labeller = statistics.Statistics(walkable_classes=[7], object_classes=[3, 9])
    images = picture(height, width)[None]
    (plain,) = labeller.label(images)
    assert set(plain) == set(metadata.NAMES[:2] + metadata.NAMES[9:14]) and plain["original_width"] == 32
    (found,) = labeller.label(images, [record | {"normal": normal, "depth": depth, "semseg": semseg, "det": det}])
    assert set(metadata.NAMES) - set(found) == {"n_sam_instances", "watermark_score", "aesthetic_score"}
    assert (found["original_width"], found["original_height"]) == (640, 480)
    assert (found["n_humans"], found["n_coco_instances"], found["coco_instance_diversity"]) == (2, 3, 2)
    assert found["walkability"] == 0.5 and found["objectness"] == 11 / 24 and found["semantic_diversity"] == 2
    assert found["geometric_complexity"] == pytest.approx(1 - np.sqrt(0.5), abs=0.01)
    assert found["occlusion_score"] == 1 / 32  # one column of jumps; the pixel without depth makes none
    entries = metadata.from_text(metadata.to_text(found))
    assert entries.malformed == 0 and [e.name for e in entries.entries] == list(found)
    assert labeller.label(images, [{"caption": [], "det": []}])[0]["n_humans"] == 0


def test_statistics_can_ask_a_detector(tmp_path):
    path = coco_file(tmp_path)
    labeller = labels.make("statistics", boxes={"kind": "coco", "path": path})
    assert labeller.name == "statistics-coco-instances"
    images = np.stack([picture()] * 2)
    found = labeller.label(images, [{"key": "x/000009"}, {"key": "other", "det": []}])
    assert [f["n_coco_instances"] for f in found] == [2, 0] and found[0]["n_humans"] == 1
    with pytest.raises(ValueError, match="makes edges, not boxes"):
        labels.make("statistics", boxes={"kind": "canny"})
    with pytest.raises(ValueError, match=r"class ids are integers in 0\.\.254"):
        statistics.Statistics(object_classes=[255])


# ---- COCO files


def coco_file(folder, **changes):
    data = {
        "images": [
            {"id": 9, "file_name": "val/000009.jpg", "width": 200, "height": 100},
            {"id": 12, "file_name": "val/000012.jpg", "width": 50, "height": 50},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "annotations": [
            {"image_id": 9, "category_id": 90, "bbox": [20, 10, 40, 30], "iscrowd": 0},
            {"image_id": 9, "category_id": 1, "bbox": [150, 50, 100, 100]},
            {"image_id": 9, "category_id": 1, "bbox": [0, 0, 200, 100], "iscrowd": 1},
            {"image_id": 9, "category_id": 1, "bbox": [300, 0, 10, 10]},
        ],
    } | changes
    path = folder / "instances.json"
    path.write_text(json.dumps(data))
    return path


IMAGE = picture()[None]


def test_boxes_of_a_coco_file(tmp_path):
    labeller = labels.make("coco", path=coco_file(tmp_path))
    (found,) = labeller.label(IMAGE, [{"key": "photos/000009"}])
    assert found == [
        {"boxes": [0.1, 0.1, 0.3, 0.4], "class_name": "toothbrush", "score": 1.0},
        {"boxes": [0.75, 0.5, 1.0, 1.0], "class_name": "person", "score": 1.0},
    ]
    text = boxes.to_text(boxes.Box(*f["boxes"], f["class_name"], f["score"]) for f in found)
    assert text == "v0=100 v1=100 v2=300 v3=400 toothbrush v0=749 v1=500 v2=999 v3=999 person"
    assert labeller.label(IMAGE, [{"key": "000012"}]) == [[]] and labeller.counts == {"crowd": 1, "outside": 1}
    assert labeller.label(IMAGE, [{"key": "unknown"}]) == [[]] and labeller.counts["missing"] == 1
    with pytest.raises(ValueError, match="needs one record for each of 1 pictures, got none"):
        labeller.label(IMAGE)
    with pytest.raises(ValueError, match="needs 'key' of every picture; record 0 has rgb"):
        labeller.label(IMAGE, [{"rgb": 0}])


def test_options_of_coco_files(tmp_path):
    path = coco_file(tmp_path)
    for match, key in [("stem", "000009.jpg"), ("file_name", "val/000009.jpg"), ("id", "00009"), ("id", "9")]:
        assert len(labels.make("coco", path=path, match=match).label(IMAGE, [{"key": key}])[0]) == 2
    assert len(labels.make("coco", path=path, crowd="keep").label(IMAGE, [{"key": "000009"}])[0]) == 3
    with pytest.raises(Unusable, match="no image has the file_name of picture '000009'") as error:
        labels.make("coco", path=path, match="file_name", missing="error").label(IMAGE, [{"key": "000009"}])
    assert error.value.reason == "detections"
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": 12, "category_id": 1, "bbox": [0, 0, 25, 50], "score": 0.25}]))
    labeller = labels.make("coco", path=path, results=results)
    found = labeller.label(np.concatenate([IMAGE, IMAGE]), [{"key": "000009"}, {"key": "000012"}])
    assert found == [[], [{"boxes": [0, 0, 0.5, 1], "class_name": "person", "score": 0.25}]]


def test_wrong_coco_files_are_named(tmp_path):
    def refused(message, **changes):
        options = {k: changes.pop(k) for k in ("match", "crowd") if k in changes}
        with pytest.raises(ValueError, match=message):
            labels.make("coco", path=coco_file(tmp_path, **changes), **options)

    refused("match is 'name'; it is one of stem", match="name")
    refused("crowd is 'yes'", crowd="yes")
    refused("expected an object with the lists images, categories, annotations", annotations=None)
    refused("an image or category lacks 'file_name'", images=[{"id": 1}])
    refused("an image has no size", images=[{"id": 9, "file_name": "a", "width": 0, "height": 4}])
    refused("annotation 0 needs the image_id", annotations=[{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]}])
    twice = [{"id": i, "file_name": f"{i}/a.jpg", "width": 1, "height": 1} for i in (9, 12)]
    refused("1 images share a stem, 'a' for one; use match='file_name' or 'id'", images=twice)
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file"):
        labels.make("coco", path=tmp_path / "absent.json")
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="not JSON, or only part of it"):
        labels.make("coco", path=tmp_path / "half.json")


# ---- what the networks share


def test_fit_and_unfit():
    images = np.stack([picture(24, 48)])
    boxed, placed = pixels.fit(images, (32, 32), True, "bilinear")
    assert boxed.shape == (1, 32, 32, 3) and placed == (8, 0, 16, 32) and (boxed[0, :8] == 114).all()
    stretched, placed_all = pixels.fit(images, (32, 32), False, "bilinear")
    assert placed_all == (0, 0, 32, 32) and stretched.shape == boxed.shape
    maps = boxed[..., 0].astype(np.float32)
    back = pixels.unfit(maps, placed, (32, 32), (24, 48), "bilinear")
    assert back.shape == (1, 24, 48) and np.abs(back - images[..., 0]).mean() < 12
    half = pixels.unfit(maps[:, ::2, ::2], placed, (32, 32), (24, 48), "nearest")
    assert half.shape == (1, 24, 48) and half.min() < 60  # none of the border's 114 alone
    many = pixels.resize(np.dstack([maps[0]] * 5)[None], (8, 9), "bilinear")
    assert many.shape == (1, 8, 9, 5) and np.array_equal(many[..., 0], many[..., 4])
    same, _ = pixels.fit(images, (24, 48), True, "bilinear")
    assert same is images


def test_boxes_are_clipped_and_suppressed():
    assert pixels.box((-0.5, 0.2, 0.5, 2), "cat", 0.5)["boxes"] == [0, 0.2, 0.5, 1]
    assert pixels.box((1.1, 0, 1.2, 1), "cat", 0.5) is None
    assert pixels.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    a, b, c = (pixels.box((0, 0, x, 1), "cat", s) for x, s in ((0.5, 0.4), (0.45, 0.9), (1, 0.3)))
    other = pixels.box((0, 0, 0.5, 1), "dog", 0.2)
    assert pixels.suppress([a, b, c, other], 0.5) == [b, c, other]
    assert pixels.suppress([a, b, c, other], 0.5, across=0.8) == [b, c] and pixels.suppress([a, b], 1.0) == [b, a]
    assert [len(pixels.pad_batch(np.zeros((n, 1, 1, 3)), 8)) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert len(pixels.pad_batch(np.zeros((5, 1, 1, 3)), 6)) == 6
