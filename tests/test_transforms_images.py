"""Pixels of a crop: equality with the reference implementation's pictures, padding, flips, inverses, errors."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures import needs_fixtures
from transform_fixtures import pictures, strings

from fm4m.transforms import crops, images
from fm4m.transforms.crops import Crop

WHOLE = Crop(0, 0, 4, 6)
HALF = (0.5, 0.5, 0.5)


def cases():
    for case in strings()["image_cases"]:
        crop = Crop(*case["crop_coords_top_left_h_w"], bool(case["flip"]))
        yield case["index"], crop, tuple(case["target_size"])


def channels_last(array: np.ndarray) -> np.ndarray:
    return array.transpose(1, 2, 0)


@needs_fixtures
def test_pixels_equal_the_reference():
    arrays = pictures()
    for i, crop, size in cases():
        for resample in images.FILTERS:
            ours = images.rgb(arrays["rgb_uint8"], crop, size, resample)
            np.testing.assert_array_equal(ours, arrays[f"rgb/resized_uint8_{resample}/{i}"])
        ours = images.rgb(arrays["rgb_uint8"], crop, size)
        np.testing.assert_allclose(images.normalise(ours), channels_last(arrays[f"rgb/imagenet/{i}"]), atol=1e-5)
        tokenizers = channels_last(arrays[f"rgb/minus1_1/{i}"])
        np.testing.assert_allclose(images.normalise(ours, HALF, HALF), tokenizers, atol=1e-5)


@needs_fixtures
def test_labels_equal_the_reference():
    arrays = pictures()
    for i, crop, size in cases():
        depth = images.depth(arrays["depth_uint16"], crop, size)
        np.testing.assert_allclose(depth, arrays[f"depth_raw/{i}"][0], atol=1e-6)
        np.testing.assert_allclose(images.standardise_depth(depth), arrays[f"depth_std/{i}"][0], atol=1e-5)
        normal = images.normal(arrays["normal_uint8"], crop, size)
        theirs = channels_last(arrays[f"normal/{i}"])
        np.testing.assert_allclose(images.normalise(normal, HALF, HALF), theirs, atol=1e-5)
        semseg = images.semseg(arrays["semseg_uint8"], crop, size)
        np.testing.assert_array_equal(semseg, arrays[f"semseg_shift/{i}"])
        # The mask of these cases: pixels whose class is not a multiple of three.
        valid = ((arrays["semseg_uint8"] % 3 != 0) * 255).astype(np.uint8)
        np.testing.assert_array_equal(images.mask(valid, crop, size), arrays[f"mask/{i}"][0])


def test_sizes_are_height_then_width():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert images.rgb(image, WHOLE, (2, 5)).shape == (2, 5, 3)
    np.testing.assert_array_equal(images.rgb(image, WHOLE, (4, 6), "nearest"), image)
    np.testing.assert_array_equal(images.rgb(image, WHOLE._replace(flip=True), (4, 6), "nearest"), image[:, ::-1])


def test_what_lies_outside_is_zero():
    ones = np.full((4, 6), 254, np.uint8)
    padded = images.semseg(ones, crops.pad_to_square((4, 6)), (6, 6))
    assert (padded[:4] == 255).all()
    assert (padded[4:] == 0).all()
    assert not images.mask(np.full((4, 6), 255, np.uint8), Crop(4, 0, 4, 6), (4, 6)).any()
    assert images.mask(np.full((4, 6), 255, np.uint8), Crop(-2, 0, 4, 6), (4, 6)).sum() == 12


def test_mirrored_normals_point_the_other_way():
    normal = np.zeros((4, 6, 3), np.uint8)
    normal[:, 0] = (200, 10, 90)
    mirrored = images.normal(normal, WHOLE._replace(flip=True), (4, 6), "nearest")
    assert (mirrored[:, -1] == (55, 10, 90)).all()
    back = images.normal(mirrored, WHOLE._replace(flip=True), (4, 6), "nearest")
    np.testing.assert_array_equal(back, normal)


def test_inverses():
    every = np.arange(256, dtype=np.uint8)
    colors = np.stack([every, every[::-1], every], axis=-1)
    np.testing.assert_array_equal(images.denormalise(images.normalise(colors)), colors)
    np.testing.assert_array_equal(images.denormalise(images.normalise(colors, HALF, HALF), HALF, HALF), colors)
    image = every.reshape(16, 16)
    shifted = images.semseg(image, Crop(0, 0, 16, 16), (16, 16))
    assert shifted.reshape(-1).tolist() == [*range(1, 256), 0]
    np.testing.assert_array_equal(images.unshift_semseg(shifted), image)


def test_standardised_depth_has_no_scale():
    depth = np.random.default_rng(0).uniform(1, 5, (20, 30))
    np.testing.assert_allclose(
        images.standardise_depth(depth), images.standardise_depth(7 * depth + 3), rtol=1e-4, atol=1e-4
    )


def test_errors():
    image = np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(ValueError, match=r"rgb: expected uint8 \[H, W, 3\], got float64 \[4, 6, 3\]"):
        images.rgb(image.astype(float), WHOLE, (4, 6))
    with pytest.raises(ValueError, match=r"depth: expected uint16 \[H, W\], got uint8"):
        images.depth(image[..., 0], WHOLE, (4, 6))
    with pytest.raises(ValueError, match="semseg: expected"):
        images.semseg(image, WHOLE, (4, 6))
    with pytest.raises(ValueError, match="no filter 'lanczos'"):
        images.rgb(image, WHOLE, (4, 6), "lanczos")
    with pytest.raises(ValueError, match="cannot resize"):
        images.crop_resize(np.zeros((4, 6, 4), np.uint8), WHOLE, (4, 6))
    for crop, size in ((WHOLE._replace(width=0), (4, 6)), (WHOLE, (0, 6))):
        with pytest.raises(ValueError, match="is empty"):
            images.rgb(image, crop, size)
    with pytest.raises(ValueError, match=r"0\.\.255, got 0\.\.256"):
        images.unshift_semseg(np.array([0, 256]))
