"""SAM instances as text: points in outlines, equality with the reference implementation's string, malformed text."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures import needs_fixtures
from hypothesis import given
from hypothesis import strategies as st
from transform_fixtures import garbage, quick, seeds, strings

from fm4m.transforms import sam_instances, values
from fm4m.transforms.sam_instances import Found, Instance, Query

SQUARE = np.array([[0, 0], [10, 0], [10, 10], [0, 10]])
CODES = tuple(range(504, 520))


def instance(left: int, top: int, edge: int, codes=CODES) -> Instance:
    return Instance(SQUARE / 10 * edge + (left, top), (left, top, left + edge, top + edge), codes)


@pytest.fixture(scope="module")
def reference():
    case = strings()["sam_instance"]
    found = sam_instances.from_arrays(case["polygons"], case["bbox_ymin_xmin_ymax_xmax"], case["token_ids"])
    return case, found


@needs_fixtures
def test_grid_and_outlines_equal_the_reference(reference):
    case, found = reference
    points = sam_instances.grid_points(case["points_per_side"], (case["image_size"],) * 2)
    assert points.tolist() == case["query_points_x_y"]
    for x, y in points:
        under = [list(i.codes) for i in sam_instances.under(found, (x, y))]
        assert under == case["instances_per_query_point"][f"{x},{y}"]


@needs_fixtures
def test_string_equals_the_reference(reference):
    case, found = reference
    written = case["one_shuffled_string"]
    parsed, malformed = sam_instances.from_text(written, num_codes=3)
    assert malformed == 0
    points = case["query_points_x_y"]
    order = [points.index([q.x, q.y]) for q in parsed]
    assert sam_instances.to_text(found, points, order) == written


@quick
@given(st.lists(st.tuples(*[st.integers(0, 30)] * 2), min_size=3, max_size=8), seeds)
def test_inside_agrees_with_angles(corners, seed):
    """Even-odd by crossings against the parity of edges that a ray in an odd direction meets."""
    polygon = np.array(corners, float)
    # No corner and no edge is at such a place.
    point = np.random.default_rng(seed).uniform(0, 30, 2)
    direction = np.array([1.0, 0.7310585])
    meets = 0
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0)):
        system = np.stack([direction, a - b], axis=1)
        if np.linalg.det(system) != 0:
            along, share = np.linalg.solve(system, a - point)
            meets += along > 0 and 0 <= share < 1
    assert sam_instances.inside(polygon, point) == bool(meets % 2)


def test_the_border_is_inside():
    for point in ((0, 0), (10, 10), (5, 0), (0, 5), (10, 3), (5, 10)):
        assert sam_instances.inside(SQUARE, point)
    for point in ((-1, 0), (11, 10), (5, -1), (5, 11), (11, 5), (-1, 5), (20, 0)):
        assert not sam_instances.inside(SQUARE, point)
    notched = [[0, 0], [10, 0], [5, 5], [10, 10], [0, 10]]
    assert sam_instances.inside(notched, (4, 5))
    assert not sam_instances.inside(notched, (8, 5))
    assert sam_instances.inside(notched, (5, 5))
    assert sam_instances.inside([[3, 3]], (3, 3))
    assert not sam_instances.inside([[3, 3]], (4, 3))


@quick
@given(seeds)
def test_round_trip(seed):
    rng = np.random.default_rng(seed)
    found = [
        instance(*(int(v) for v in rng.integers(0, 120, 2)), int(rng.integers(5, 100)), rng.integers(0, 1024, 16))
        for _ in range(rng.integers(0, 6))
    ]
    points = sam_instances.random_points(rng)
    written = sam_instances.to_text(found, points, rng, rng)
    parsed, malformed = sam_instances.from_text(written)
    assert malformed == 0
    assert {(q.x, q.y) for q in parsed} == {(x, y) for x, y in points.tolist()}
    for query in parsed:
        expected = [Found(i.box, tuple(int(c) for c in i.codes)) for i in sam_instances.under(found, query[:2])]
        assert sorted(query.instances) == sorted(expected)


def test_orders_and_equal_points():
    found = [instance(0, 0, 50), instance(10, 10, 50), instance(90, 90, 9)]
    points = [(20, 30), (95, 95), (20, 30)]
    plain = sam_instances.from_text(sam_instances.to_text(found, points)).queries
    assert [(q.x, q.y, [i.box[0] for i in q.instances]) for q in plain] == [(20, 30, [0, 10]), (95, 95, [90])]
    other = sam_instances.from_text(sam_instances.to_text(found, points, [1, 0], [2, 1, 0])).queries
    assert [(q.x, q.y, [i.box[0] for i in q.instances]) for q in other] == [(95, 95, [90]), (20, 30, [10, 0])]
    drawn = {sam_instances.to_text(found, points, rng, rng) for rng in map(np.random.default_rng, range(60))}
    assert len(drawn) == 4


def test_random_points_cover_the_crop():
    points = sam_instances.random_points(np.random.default_rng(0), 5000, (20, 40))
    assert points.shape == (5000, 2)
    assert points.min(0).tolist() == [0, 0]
    assert points.max(0).tolist() == [39, 19]
    assert sam_instances.random_points(np.random.default_rng(0)).shape == (7, 2)
    assert sam_instances.grid_points().shape == (49, 2)
    assert sam_instances.grid_points(1, (20, 40)).tolist() == [[20, 10]]


@quick
@given(garbage)
def test_garbage_is_counted_not_raised(written):
    parsed, malformed = sam_instances.from_text(written)
    assert (len(parsed) + malformed > 0) == bool(values.split(written))


GOOD = "polygon v0=1 v1=2 v2=3 v3=4 v0=7"


@pytest.mark.parametrize(
    ("written", "instances", "malformed"),
    [
        ("", [], 0),
        ("point v0=1 v1=2 none", [0], 0),
        ("point v0=1 v1=2", [], 1),
        (f"point v0=1 v1=2 {GOOD} {GOOD} point v0=1 v1=2 none [EOS]", [2, 0], 0),
        (f"{GOOD} point v0=1 v1=2 {GOOD}", [1], 1),
        (f"point v0=1 v1=2 {GOOD} v0=7", [0], 1),
        (f"point v0=1 v1=2 {GOOD} polygon v0=1", [1], 1),
        (f"point v0=1 v1=2 none {GOOD}", [], 2),
        (f"point v1=1 v0=2 {GOOD}", [], 2),
        ("point v0=1 v1=2 polygon v0=9 v1=2 v2=3 v3=4 v0=7", [0], 1),
        ("point v0=1 v1=2 polygon v0=1 v1=2 v2=3 v3=4 v0=512", [0], 1),
        ("none", [], 1),
    ],
)
def test_malformed_is_counted(written, instances, malformed):
    parsed = sam_instances.from_text(written, num_codes=1)
    assert [len(q.instances) for q in parsed.queries] == instances
    assert parsed.malformed == malformed


def test_points_are_written_row_first():
    written = sam_instances.to_text([instance(0, 0, 50, (1,))], [(20, 30)])
    assert written == "point v0=30 v1=20 polygon v0=0 v1=0 v2=50 v3=50 v0=1"
    assert sam_instances.from_text(written, 1) == ([Query(20, 30, [Found((0, 0, 50, 50), (1,))])], 0)


def test_errors():
    with pytest.raises(ValueError, match="1 outlines, 2 boxes"):
        sam_instances.from_arrays([SQUARE], [[0, 0, 1, 1]] * 2, [CODES])
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        sam_instances.from_arrays([SQUARE[:, 0]], [[0, 0, 1, 1]], [CODES])
    with pytest.raises(ValueError, match="v2=1200"):
        sam_instances.to_text([instance(0, 0, 1200)], [(5, 5)])
    with pytest.raises(ValueError, match="code -1"):
        sam_instances.to_text([instance(0, 0, 20, (-1,))], [(5, 5)])
    with pytest.raises(ValueError, match="query points is not a permutation"):
        sam_instances.to_text([], [(5, 5), (5, 5)], [0, 1])
