"""Crops, stored and drawn; captions that go with them."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures import needs_fixtures
from hypothesis import given
from hypothesis import strategies as st
from transform_fixtures import quick, seeds, strings

from fm4m.transforms import captions, crops
from fm4m.transforms.crops import Crop

sizes = st.tuples(st.integers(1, 700), st.integers(1, 700))


@needs_fixtures
def test_crops_equal_the_reference():
    cases = strings()["augmenters"]
    size = tuple(cases["center_crop"]["image_h_w"])
    assert [[*crops.center_crop(size)[:4]], False] == cases["center_crop"]["result"][:2]
    assert [[*crops.pad_to_square(size)[:4]], False] == cases["padding"]["result"][:2]
    stored = cases["pretokenized_no_aug"]
    row = stored["result"][4]
    crop = crops.stored_crop(stored["crop_settings"], row)
    assert [[*crop[:4]], int(crop.flip)] == stored["result"][:2]
    assert crop == crops.stored_crop(stored["crop_settings"])
    assert crops.stored_crop(stored["crop_settings"], 1) == (0, 0, 96, 96, False)


@quick
@given(sizes, seeds)
def test_random_crops_lie_in_the_image(size, seed):
    top, left, height, width, _ = crops.random_crop(size, np.random.default_rng(seed), scale=(0.2, 1.0))
    assert 0 <= top < top + height <= size[0]
    assert 0 <= left < left + width <= size[1]


def test_random_crops_keep_to_their_ranges():
    rng = np.random.default_rng(0)
    drawn = [crops.random_crop((500, 600), rng) for _ in range(400)]
    areas = np.array([c.height * c.width for c in drawn]) / 300000
    shapes = np.array([c.width / c.height for c in drawn])
    assert 0.79 < areas.min() < 0.82 and 0.9 < areas.max() < 1.001
    assert shapes.min() > 0.74 and shapes.max() < 1.34
    assert 150 < sum(c.flip for c in drawn) < 250
    # No square-ish crop of 80 % of the area fits into a strip: the middle one of the nearest shape is taken.
    assert crops.random_crop((100, 1000), rng)[:4] == (0, 433, 100, 133)
    assert crops.random_crop((1000, 100), rng)[:4] == (433, 0, 133, 100)
    never = [crops.random_crop((50, 50), rng, flip_probability=0.0).flip for _ in range(50)]
    assert not any(never)


@quick
@given(sizes, st.integers(1, 5), seeds)
def test_settings_round_trip(size, count, seed):
    settings = crops.draw_settings(size, count, np.random.default_rng(seed))
    assert settings.shape == (count, 5)
    assert crops.stored_crop(settings) == crops.center_crop(size)
    assert np.array_equal(settings, [crops.stored_crop(settings, row) for row in range(count)])
    assert np.array_equal(settings, crops.draw_settings(size, count, np.random.default_rng(seed)))


def test_windows():
    window = Crop(60, 100, 300, 200, True).window((480, 640))
    assert window == (100 / 640, 60 / 480, 300 / 640, 360 / 480)
    assert crops.relative((100 / 640, 60 / 480, 200 / 640, 360 / 480), window) == pytest.approx((0, 0, 0.5, 1))
    assert crops.pad_to_square((96, 128)).window((96, 128)) == (0, 0, 1, 128 / 96)


def test_errors():
    with pytest.raises(ValueError, match=r"\[crops, 5\]"):
        crops.stored_crop([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="float64"):
        crops.stored_crop([[1.0, 2, 3, 4, 0]])
    with pytest.raises(ValueError, match="row 0: .* is empty"):
        crops.stored_crop([[1, 2, 0, 4, 0]])
    with pytest.raises(ValueError, match="flip is not 0 or 1"):
        crops.stored_crop([[1, 2, 3, 4, 2]])
    for row in (1, -1):
        with pytest.raises(IndexError, match="have 1 rows"):
            crops.stored_crop([[1, 2, 3, 4, 0]], row)
    with pytest.raises(ValueError, match="cannot be cropped"):
        crops.center_crop((0, 5))
    with pytest.raises(ValueError, match="is empty"):
        Crop(0, 0, 0, 5).window((10, 10))
    with pytest.raises(ValueError, match="0 crops"):
        crops.draw_settings((5, 5), 0, np.random.default_rng(0))


def test_captions():
    several = ["a red couch", {"caption": "a chair"}, "a lamp"]
    assert captions.caption("one text", 5) == "one text"
    assert captions.caption({"caption": "one"}) == "one"
    assert [captions.caption(several, row) for row in range(3)] == ["a red couch", "a chair", "a lamp"]
    rng = np.random.default_rng(0)
    assert {captions.caption(several, rng) for _ in range(50)} == {"a red couch", "a chair", "a lamp"}
    for record, row in (([], 0), (several, 3), (several, -1), ([], rng)):
        with pytest.raises(ValueError, match="no caption for row"):
            captions.caption(record, row)
    for record in ({"text": "a"}, [3], {"caption": None}):
        with pytest.raises(ValueError, match="a caption is text"):
            captions.caption(record)
