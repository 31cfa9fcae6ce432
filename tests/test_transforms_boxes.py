"""Boxes as text: equality with the reference implementation's strings, round trips, malformed text."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures import needs_fixtures
from hypothesis import given
from hypothesis import strategies as st
from transform_fixtures import garbage, quick, seeds, strings

from fm4m.tokenizers import text
from fm4m.transforms import boxes, crops, values
from fm4m.transforms.boxes import Box

WORD_CHARACTERS = "abcdefghijklmnopqrstuvwxyz"
names = st.one_of(st.sampled_from(text.COCO_CLASSES), st.text(WORD_CHARACTERS, min_size=1, max_size=8))


@st.composite
def box_strategy(draw) -> Box:
    xmin, xmax, ymin, ymax = (draw(st.integers(0, 999)) for _ in range(4))
    x, y = sorted((xmin, xmax)), sorted((ymin, ymax))
    score = draw(st.sampled_from((0.1, 0.59, 0.6, 0.9)))
    return Box(x[0] / 999, y[0] / 999, x[1] / 999, y[1] / 999, draw(names), score)


@needs_fixtures
def test_strings_equal_the_reference():
    exact = strings()
    instances = [Box(*i["boxes"], i["class_name"], i["score"]) for i in exact["detection_instances"]]
    for case in exact["detection"]:
        *rectangle, flip = (*case["crop_coords_top_left_h_w"], case["flip"])
        ours = boxes.to_text(
            instances,
            threshold=case["det_threshold"],
            window=crops.Crop(*rectangle).window(case["orig_size_h_w"]),
            mirrored=bool(flip),
            max_boxes=case["det_max_instances"],
            order=case["bbox_order"],
            bins=case["coord_bins"],
            min_visibility=case["min_visibility"],
        )
        assert ours == case["string"], case
    assert len(exact["detection"]) == 27
    assert boxes.to_text([]) == exact["detection_empty"]


@quick
@given(st.lists(box_strategy(), max_size=8), st.integers(2, 1000))
def test_round_trip_with_other_bins(instances, bins):
    written = boxes.to_text(instances, threshold=0.0, bins=bins)
    parsed, malformed = boxes.from_text(written, bins)
    assert malformed == 0
    expected = boxes.sort(b for b in instances if b.area > 0)
    assert [b.class_name for b in parsed] == [b.class_name for b in expected]
    for got, wanted in zip(parsed, expected):
        assert got.xmin == round(wanted.xmin * (bins - 1)) / (bins - 1)
        assert got.ymax == round(wanted.ymax * (bins - 1)) / (bins - 1)


@quick
@given(garbage)
def test_garbage_is_counted_not_raised(written):
    parsed, malformed = boxes.from_text(written)
    starts = sum(word.startswith("v0=") for word in written.split())
    assert len(parsed) <= starts
    assert (len(parsed) + malformed > 0) == bool(values.split(written))


def test_orders():
    instances = [
        Box(0.5, 0.5, 0.6, 0.6, "a", 0.7),
        Box(0.1, 0.1, 0.2, 0.2, "b", 0.6),
        Box(0.2, 0.2, 0.9, 0.9, "c", 0.65),
    ]

    def names(**options):
        return "".join(b.class_name for b in boxes.from_text(boxes.to_text(instances, **options)).boxes)

    assert names(order="dist_to_orig") == "bca"
    # The areas of a and b are equal but for rounding.
    assert names(order="area")[0] == "c"
    assert names(order="score") == "acb"
    assert names(order="random", random=[2, 0, 1]) == "cab"
    drawn = {names(order="random", random=np.random.default_rng(seed)) for seed in range(40)}
    assert len(drawn) == 6
    with pytest.raises(ValueError, match="not a permutation"):
        names(order="random", random=[0, 1])
    with pytest.raises(ValueError, match="takes a permutation"):
        names(order="random")
    with pytest.raises(ValueError, match="takes a permutation"):
        names(order="area", random=[0, 1, 2])
    with pytest.raises(ValueError, match="dist_to_orig, area"):
        names(order="size")


@quick
@given(st.lists(box_strategy(), max_size=6), seeds)
def test_visibility_only_removes(instances, seed):
    crop = crops.random_crop((300, 400), np.random.default_rng(seed), scale=(0.1, 0.6))
    window = crop.window((300, 400))
    kept = [boxes.crop(instances, window, share) for share in (0.0, 0.3, 1.0)]
    assert len(kept[0]) >= len(kept[1]) >= len(kept[2])
    for box in kept[2]:
        assert box in kept[0]


def test_visibility_is_the_share_left():
    half = [Box(0.0, 0.0, 1.0, 0.5, "a")]
    window = (0.0, 0.0, 0.5, 1.0)
    assert boxes.crop(half, window, 0.5) == [Box(0.0, 0.0, 1.0, 0.5, "a")]
    assert boxes.crop(half, window, 0.51) == []


@quick
@given(st.lists(box_strategy(), max_size=12))
def test_round_trip(instances):
    kept = [b for b in instances if b.score >= 0.6 and b.area > 0]
    parsed, malformed = boxes.from_text(boxes.to_text(instances))
    assert malformed == 0
    assert parsed == [Box(b.xmin, b.ymin, b.xmax, b.ymax, b.class_name) for b in boxes.sort(kept)]
    distances = [b.xmin**2 + b.ymin**2 for b in parsed]
    assert distances == sorted(distances)


@quick
@given(st.lists(box_strategy(), max_size=6), st.tuples(*[st.floats(0, 1) for _ in range(4)]))
def test_crops_stay_inside_and_flips_undo_themselves(instances, corners):
    left, right = sorted(corners[:2])
    top, bottom = sorted(corners[2:])
    if right - left < 1e-3 or bottom - top < 1e-3:
        return
    for box in boxes.crop(instances, (left, top, right, bottom)):
        assert 0 <= box.xmin < box.xmax <= 1
        assert 0 <= box.ymin < box.ymax <= 1
    for before, after in zip(instances, boxes.flip(boxes.flip(instances))):
        assert (after.xmin, after.xmax) == pytest.approx((before.xmin, before.xmax), abs=1e-12)


pieces = st.one_of(
    st.sampled_from(["v0=1", "v1=2", "v2=30", "v3=40", "v0=1000", "v9=1", "dog", "[EOS]", "[S_3]", "v1=", "="]), names
)


@quick
@given(st.lists(pieces, max_size=20), st.lists(box_strategy(), max_size=4))
def test_any_text_parses(junk, instances):
    """Junk before good boxes never costs more than itself."""
    good = [b for b in instances if b.score >= 0.6 and b.area > 0]
    parsed, malformed = boxes.from_text(" ".join([*junk, boxes.to_text(good)]))
    alone = boxes.from_text(" ".join(junk))
    assert malformed == alone.malformed
    assert len(parsed) == len(alone.boxes) + len(good)


@pytest.mark.parametrize(
    ("written", "count", "malformed"),
    [
        ("", 0, 0),
        ("[SOS] [EOS] [PAD]", 0, 0),
        ("v0=1 v1=2 v2=3 v3=4 teddy bear", 1, 0),
        ("v0=1 v1=2 v2=3 v3=4", 0, 1),
        ("v0=1 v1=2 v3=4 dog", 0, 1),
        ("v0=9 v1=2 v2=3 v3=4 dog", 0, 1),
        ("dog v0=1 v1=2 v2=3 v3=4 dog", 1, 1),
        ("v0=1 v1=2 v0=1 v1=2 v2=3 v3=4 dog v2=5", 0, 2),
        ("v0=1 v1=2 v2=3 v3=1000 dog", 0, 1),
    ],
)
def test_malformed_is_counted(written, count, malformed):
    parsed = boxes.from_text(written)
    assert (len(parsed.boxes), parsed.malformed) == (count, malformed)


def test_bins_beyond_the_last_are_malformed():
    assert boxes.from_text("v0=1 v1=2 v2=99 v3=9 dog", bins=100).boxes[0].xmax == 1.0
    assert boxes.from_text("v0=1 v1=2 v2=100 v3=9 dog", bins=100) == ([], 1)


def test_score_filter_cap_and_ties():
    instances = [Box(0.5, 0.5, 0.6, 0.6, "a", 0.7), Box(0.1, 0.1, 0.2, 0.2, "b", 0.6), Box(0, 0, 1, 1, "c", 0.5)]
    assert [b.class_name for b in boxes.from_text(boxes.to_text(instances)).boxes] == ["b", "a"]
    assert boxes.to_text(instances, max_boxes=1) == "v0=500 v1=500 v2=599 v3=599 a"  # 499.5 goes to the even 500
    assert boxes.to_text(instances, threshold=0.9) == ""


@pytest.mark.parametrize("name", ["", "  ", "a v0=3", "x [EOS]"])
def test_names_that_cannot_be_read_back_are_refused(name):
    with pytest.raises(ValueError, match="class name"):
        boxes.to_text([Box(0, 0, 1, 1, name)])


def test_empty_window_is_refused():
    with pytest.raises(ValueError, match="crop window"):
        boxes.crop([], (0.5, 0.0, 0.5, 1.0))


def test_ids_round_trip():
    caption = "side table trash can room with a red couch and two chairs on the left of it"
    tokenizer = text.train_wordpiece([caption] * 3, 4400, ("side table",))
    instances = [Box(0.25, 0.5, 0.75, 1.0, "dining table"), Box(0.0, 0.1, 0.2, 0.3, "side table")]
    ids = boxes.to_ids(instances, tokenizer)
    assert ids[-1] == text.EOS_ID
    assert len(ids) == 6 + 5 + 1
    parsed = boxes.from_ids([*ids, 204, 205], tokenizer)
    assert parsed.malformed == 0
    assert [b.class_name for b in parsed.boxes] == ["side table", "dining table"]
    assert boxes.to_ids(instances, tokenizer, eos=False, mirrored=True)[0] == text.value_id("v0", 250)
