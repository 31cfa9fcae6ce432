"""People as text: equality with the reference implementation's strings, crops, round trips, malformed text."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from fixtures import needs_fixtures
from hypothesis import given
from hypothesis import strategies as st
from transform_fixtures import garbage, quick, seeds, strings

from fm4m.transforms import crops, human_poses, values
from fm4m.transforms.human_poses import Person


def numbers(count: int, low: float, high: float):
    return st.lists(st.floats(low, high), min_size=count, max_size=count).map(tuple)


people = st.builds(
    Person,
    box=st.tuples(*[st.floats(0, 1)] * 4).map(lambda c: (min(c[::2]), min(c[1::2]), max(c[::2]), max(c[1::2]))),
    pose=st.lists(st.integers(0, 1023), min_size=8, max_size=8).map(tuple),
    orientation=numbers(9, -1, 1),
    camera=numbers(3, -1, 19),
    betas=numbers(10, -3, 3),
)
PERSON = Person((0.1, 0.2, 0.3, 0.4), tuple(range(508, 516)), (0.0,) * 9, (-1.0, 9.0, 19.0), (0.5,) * 10)


@needs_fixtures
def test_strings_equal_the_reference():
    exact = strings()
    assert tuple(exact["human_poses"][0]["block_order"]) == tuple(name for name, *_ in human_poses.BLOCKS)
    for case in exact["human_poses"]:
        found = human_poses.from_record(case["input"], case["orig_size_h_w"])
        assert len(found) == len(case["permutations"])
        window = crops.Crop(*case["crop_coords_top_left_h_w"]).window(case["orig_size_h_w"])
        kept = human_poses.crop(found, window)
        assert human_poses.to_text(kept, case["permutations"][: len(kept)]) == case["string"]
    assert human_poses.to_text(human_poses.from_record({}, (480, 640))) == exact["human_poses_empty"]


@quick
@given(st.lists(people, max_size=3), seeds)
def test_round_trip(someone, seed):
    written = human_poses.to_text(someone, np.random.default_rng(seed))
    parsed, malformed = human_poses.from_text(written)
    assert malformed == 0
    assert [p.pose for p in parsed] == [p.pose for p in someone]
    for got, wanted in zip(parsed, someone):
        # Half a bin each.
        np.testing.assert_allclose(got.box, wanted.box, atol=0.5 / 999 + 1e-9)
        np.testing.assert_allclose(got.orientation, wanted.orientation, atol=0.5 / 499.5 + 1e-9)
        np.testing.assert_allclose(got.camera, wanted.camera, atol=0.5 / 49.95 + 1e-9)
        np.testing.assert_allclose(got.betas, wanted.betas, atol=0.5 / 166.5 + 1e-9)
    # What was read is written the same, whatever the order of its blocks.
    assert human_poses.to_text(parsed, np.random.default_rng(seed)) == written
    assert len(written.split()) == (39 * len(someone) or 1)


def test_every_order_of_blocks():
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        written = human_poses.to_text([PERSON], [order])
        names = [word for word in written.split() if word in ("pose", "global", "camera", "shape")]
        assert names == [human_poses.BLOCKS[i][0] for i in order]
        assert human_poses.from_text(written).people[0].pose == PERSON.pose
    drawn = {human_poses.to_text([PERSON], np.random.default_rng(seed)) for seed in range(200)}
    assert len(drawn) == 24


def test_numbers_out_of_range_go_to_the_end_bins():
    wild = dataclasses.replace(PERSON, betas=(-9.0, 9.0) + (0.0,) * 8, camera=(-5.0, 0.0, 50.0))
    words = human_poses.to_text([wild]).split()
    assert all(values.parse(word) for word in words if "=" in word)
    shape, camera = words.index("shape"), words.index("camera")
    assert words[shape + 1 : shape + 3] == ["v0=0", "v0=999"]
    assert words[camera + 1 :: 2][:2] == ["v0=0", "v0=999"]
    with pytest.raises(ValueError, match="beta nan"):
        human_poses.to_text([dataclasses.replace(PERSON, betas=(float("nan"),) * 10)])


@pytest.mark.parametrize(
    ("window", "box"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.3, 0.4)),
        ((0.2, 0.0, 0.4, 1.0), (0.0, 0.2, 0.5, 0.4)),
        ((0.31, 0.0, 1.0, 1.0), None),
        ((0.0, 0.5, 1.0, 1.0), None),
        ((0.0, 0.0, 0.05, 1.0), None),
    ],
)
def test_crops(window, box):
    kept = human_poses.crop([PERSON], window)
    if box is None:
        assert kept == []
    else:
        assert kept[0].box == pytest.approx(box)
        assert dataclasses.replace(kept[0], box=PERSON.box) == PERSON


@quick
@given(garbage)
def test_garbage_is_counted_not_raised(written):
    parsed, malformed = human_poses.from_text(written)
    assert parsed == []
    words = values.split(written)
    assert (malformed > 0) == bool(words and words != ["none"])


@quick
@given(st.integers(0, 38), st.sampled_from(["v3=7", "none", "human", "pose", "[EOS]", "v0=12 v0=13"]))
def test_one_wrong_word_costs_one_person(place, wrong):
    words = human_poses.to_text([PERSON]).split()
    words[place] = wrong
    parsed, malformed = human_poses.from_text(" ".join(words) + " " + human_poses.to_text([PERSON]))
    if wrong == "human":
        assert (len(parsed), malformed) in ((1, 1), (1, 2), (2, 0))
    else:
        assert (len(parsed), malformed) == (1, 1)


def test_every_block_comes_once():
    words = human_poses.to_text([PERSON]).split()
    camera = words.index("camera")
    assert human_poses.from_text(" ".join(words[:camera] + words[camera + 4 :])) == ([], 1)
    assert human_poses.from_text(" ".join(words + words[camera : camera + 4])) == ([], 1)


def test_nobody():
    assert human_poses.to_text([]) == "none"
    assert human_poses.from_text("none [EOS]") == ([], 0)
    assert human_poses.from_text("") == ([], 0)
    assert human_poses.from_text("none none") == ([], 1)


RECORD = {
    "bbox_xyxy": [[64, 48, 128, 96]],
    "pred_smpl_params": {"global_orient": [[[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]], "betas": [[0.0] * 10]},
    "pose_tokenized": [[1, 2, 3, 4, 5, 6, 7, 1023]],
    "pred_cam": [[0.0, 1.0, 2.0]],
}


def test_records():
    (person,) = human_poses.from_record(RECORD, (480, 640))
    assert person.box == (0.1, 0.1, 0.2, 0.2)
    assert person.orientation == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    for key in ("bbox_xyxy", "pose_tokenized", "pred_cam"):
        with pytest.raises(ValueError, match=f"no '{key}'"):
            human_poses.from_record({k: v for k, v in RECORD.items() if k != key}, (480, 640))
    broken = copy.deepcopy(RECORD)
    broken["pred_smpl_params"]["betas"] = [[0.0] * 9]
    with pytest.raises(ValueError, match=r"betas' has shape \[1, 9\], expected \[1, 10\]"):
        human_poses.from_record(broken, (480, 640))


def test_errors():
    with pytest.raises(ValueError, match="code 1024"):
        dataclasses.replace(PERSON, pose=(1024,) * 8)
    with pytest.raises(ValueError, match="camera has 2 numbers, expected 3"):
        dataclasses.replace(PERSON, camera=(0.0, 0.0))
    with pytest.raises(ValueError, match="2 orders of blocks for 1 people"):
        human_poses.to_text([PERSON], [[0, 1, 2, 3]] * 2)
    with pytest.raises(ValueError, match="not a permutation"):
        human_poses.to_text([PERSON], [[0, 1, 2, 2]])
    with pytest.raises(ValueError, match="crop window"):
        human_poses.crop([], (0.5, 0.0, 0.5, 1.0))
