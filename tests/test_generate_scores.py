"""Every score against numbers worked out by hand and against a second, plain implementation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm4m.generate import scores
from fm4m.tokenizers import reconstruction
from fm4m.transforms.boxes import Box

EXAMPLES = settings(max_examples=40, derandomize=True, deadline=None)


# ---- depth and normals


def test_depth_errors_by_hand():
    truth = np.array([[[1.0, 2.0], [4.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    found = np.array([[[1.2, 1.0], [4.0, 9.0]], [[1.0, 1.0], [1.0, -1.0]]])
    errors = scores.depth_errors(truth, found)
    # The pixel without a depth does not count; 2 m for 1 m is off by half, and outside of a factor of 1.25.
    assert errors.abs_rel == pytest.approx([(0.2 + 0.5 + 0.0) / 3, 2.0 / 4])
    assert errors.delta == pytest.approx([2 / 3, 3 / 4])


def test_depth_within_the_factor_is_symmetric():
    near, far = np.full((1, 2, 2), 1.0), np.full((1, 2, 2), 1.2499)
    assert scores.depth_errors(near, far).delta[0] == scores.depth_errors(far, near).delta[0] == 1.0
    assert scores.depth_errors(near, np.full((1, 2, 2), 1.2501)).delta[0] == 0.0


@EXAMPLES
@given(st.integers(0, 10**6), st.floats(0.1, 9.0), st.floats(-5.0, 5.0))
def test_aligned_depth_ignores_scale_and_shift(seed, scale, shift):
    truth = np.random.default_rng(seed).uniform(1.0, 5.0, (3, 4, 5))
    errors = scores.depth_errors(truth, reconstruction.align_scale_shift(truth, truth * scale + shift))
    assert errors.abs_rel == pytest.approx([0.0] * 3, abs=1e-9) and (errors.delta == 1.0).all()


def test_depth_that_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match="image 1 is 0 everywhere"):
        scores.depth_errors(np.stack([np.ones((2, 2)), np.zeros((2, 2))]), np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="must have one shape"):
        scores.depth_errors(np.ones((2, 2, 2)), np.ones((2, 2, 3)))


def _stored(vector):
    return np.round((np.asarray(vector, float) / np.linalg.norm(vector) + 1) * 127.5).astype(np.uint8)


def test_normal_errors_by_hand():
    towards, up = _stored([0, 0, 1]), _stored([0, 1, 0])
    tilted = _stored([0, math.sin(math.radians(10)), math.cos(math.radians(10))])
    truth = np.stack([np.stack([np.stack([towards, towards]), np.stack([towards, towards])])])
    found = np.stack([np.stack([np.stack([towards, tilted]), np.stack([up, up])])])
    angle, within = scores.normal_errors(truth, found)
    assert angle == pytest.approx([(0 + 10 + 90 + 90) / 4], abs=0.3)
    assert within == pytest.approx([0.5])
    assert scores.normal_errors(truth, truth)[1] == pytest.approx([1.0])


# ---- boxes


def _box(x0, y0, x1, y1, name="bed", score=1.0):
    return Box(x0, y0, x1, y1, name, score)


LEFT, RIGHT = _box(0.0, 0.0, 0.5, 1.0), _box(0.6, 0.0, 1.0, 1.0)


def test_overlap_by_hand():
    assert scores.overlap(_box(0, 0, 0.2, 0.2), _box(0.1, 0, 0.3, 0.2)) == pytest.approx(1 / 3)
    assert scores.overlap(LEFT, RIGHT) == 0.0
    assert scores.overlap(_box(0.5, 0.5, 0.5, 0.5), _box(0.5, 0.5, 0.5, 0.5)) == 0.0


def test_a_second_box_for_one_object_is_wrong():
    once = scores.match_boxes([LEFT, RIGHT], [LEFT])
    twice = scores.match_boxes([LEFT, RIGHT], [LEFT, _box(0.0, 0.0, 0.49, 1.0)])
    assert once.hit.tolist() == [True] and twice.hit.tolist() == [True, False]
    # Equal scores: precision times recall.
    assert scores.mean_average_precision([once]) == pytest.approx(0.5)
    assert scores.mean_average_precision([twice]) == pytest.approx(0.25)
    # Of two equal boxes, that with the higher score is the right one, and the other one's mistake costs nothing then.
    ranked = scores.match_boxes([LEFT], [_box(0.0, 0.0, 0.5, 1.0, score=0.2), _box(0.0, 0.0, 0.5, 1.0, score=0.9)])
    assert ranked.hit.tolist() == [False, True]
    assert scores.mean_average_precision([ranked]) == 1.0


def test_boxes_need_the_class_and_half_of_the_area():
    other = scores.match_boxes([LEFT], [_box(0.0, 0.0, 0.5, 1.0, "couch")])
    assert not other.hit.any() and scores.mean_average_precision([other]) == 0.0
    half = _box(0.0, 0.0, 0.25, 1.0)
    assert scores.match_boxes([LEFT], [half]).hit.all()
    assert not scores.match_boxes([LEFT], [_box(0.0, 0.0, 0.24, 1.0)]).hit.any()


def test_classes_weigh_the_same_unless_they_are_pooled():
    images = [
        scores.match_boxes([LEFT, RIGHT], [LEFT, RIGHT]),
        scores.match_boxes([_box(0, 0, 1, 1, "rug")], []),
    ]
    assert scores.mean_average_precision(images) == pytest.approx(0.5)
    assert scores.mean_average_precision(images, classes=False) == pytest.approx(2 / 3)


def test_average_precision_by_hand():
    # Precision 1, 1/2, 2/3 at recall 1/4, 1/4, 2/4; the best from recall 1/4 on is 2/3.
    value = scores.average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), 4)
    assert value == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    assert scores.average_precision(np.zeros(0), np.zeros(0, bool), 3) == 0.0


def _plain_average_precision(score, hit, truths):
    """Precision and recall at every threshold, then the integral of the best precision at a recall or a larger one."""
    points = []
    for threshold in sorted(set(score)):
        chosen = [h for s, h in zip(score, hit) if s >= threshold]
        points.append((sum(chosen) / truths, sum(chosen) / len(chosen)))
    total, before = 0.0, 0.0
    for recall in sorted({r for r, _ in points}):
        total += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return total


@EXAMPLES
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.5, 0.9]), st.booleans()), max_size=12), st.integers(0, 4))
def test_average_precision_equals_the_plain_one_in_any_order(found, missed):
    score, hit = [s for s, _ in found], [h for _, h in found]
    truths = max(sum(hit) + missed, 1)
    expected = _plain_average_precision(score, hit, truths)
    assert scores.average_precision(np.array(score), np.array(hit, bool), truths) == pytest.approx(expected)
    turned = scores.average_precision(np.array(score[::-1]), np.array(hit[::-1], bool), truths)
    assert turned == pytest.approx(expected) and 0 <= expected <= 1 + 1e-12


@EXAMPLES
@given(st.integers(0, 10**6))
def test_the_true_boxes_are_perfect_and_more_boxes_never_help(seed):
    rng = np.random.default_rng(seed)
    truth = [_box(x, 0.0, x + 0.05, 1.0, str(rng.choice(["bed", "rug"]))) for x in np.arange(0, 0.9, 0.2)]
    perfect = scores.match_boxes(truth, truth)
    assert perfect.hit.all() and scores.mean_average_precision([perfect]) == 1.0
    noisy = scores.match_boxes(truth, [*truth, _box(0.7, 0.7, 0.8, 0.71)])
    assert scores.mean_average_precision([noisy]) <= 1.0 and noisy.hit.sum() == len(truth)


def test_no_true_box_at_all_is_an_error():
    with pytest.raises(ValueError, match="no image has a true box"):
        scores.mean_average_precision([scores.match_boxes([], [LEFT])])


# ---- sets


def test_retrieval_by_hand():
    found = scores.retrieval(np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]]))
    assert found.rank == pytest.approx([1.0, 1.5, 3.0])
    assert found.first == pytest.approx([1.0, 0.5, 0.0])
    assert found.five == pytest.approx([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"\[N, N\]"):
        scores.retrieval(np.zeros((2, 3)))


def test_a_constant_retrieves_by_chance():
    found = scores.retrieval(np.zeros((128, 128)))
    assert found.first.mean() == pytest.approx(1 / 128) and found.five.mean() == pytest.approx(5 / 128)
    assert np.median(found.rank) == 64.5


@EXAMPLES
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_retrieval_equals_the_mean_over_all_orders_of_ties(seed, size):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, 3, (size, size)).astype(float)
    found = scores.retrieval(similarity)
    ranks = np.zeros((size, 0))
    for order in itertools.permutations(range(size)):
        # A stable sort of a permuted gallery: ties in the order of the permutation.
        place = [sorted(order, key=lambda j, i=i: -similarity[i, j]).index(i) + 1 for i in range(size)]
        ranks = np.concatenate([ranks, np.array(place)[:, None]], 1)
    assert found.rank == pytest.approx(ranks.mean(1))
    assert found.first == pytest.approx((ranks <= 1).mean(1)) and found.five == pytest.approx((ranks <= 5).mean(1))


def test_cosine_similarity():
    a = np.array([[1.0, 0.0], [0.0, 0.0]])
    assert scores.cosine_similarity(a, np.array([[2.0, 2.0]])) == pytest.approx(np.array([[2**-0.5], [0.0]]))


def test_frechet_distance_by_hand():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # mean 0, covariance 1
    assert scores.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert scores.frechet_distance(x, x + [3.0, 0.0, 4.0]) == pytest.approx(25.0)
    # Axis by axis, covariances that share their axes differ by the difference of the standard deviations, squared.
    assert scores.frechet_distance(x, x * [2.0, 1.0, 0.5]) == pytest.approx(1.0 + 0.0 + 0.25)
    assert scores.frechet_distance(x[:1], x) == pytest.approx((x[0] ** 2).sum() + 3.0)
    with pytest.raises(ValueError, match="two sets of vectors"):
        scores.frechet_distance(x, x[:, :2])


@EXAMPLES
@given(st.integers(0, 10**6))
def test_frechet_distance_equals_the_plain_one_and_turns_with_the_axes(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(12, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(9, 4)) + 1
    # The trace of the root of a product is the sum of the roots of its eigenvalues.
    roots = np.sqrt(np.clip(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real, 0, None)).sum()
    plain = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * roots
    assert scores.frechet_distance(a, b) == pytest.approx(plain, rel=1e-6, abs=1e-6)
    assert scores.frechet_distance(b, a) == pytest.approx(plain, rel=1e-6, abs=1e-6)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert scores.frechet_distance(a @ turn, b @ turn) == pytest.approx(plain, rel=1e-6, abs=1e-6)


def test_principal_axes_are_those_of_largest_variance():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 3)) * [1.0, 10.0, 0.1] + 5
    mean, axes = scores.principal_axes(x, 2)
    assert np.abs(axes.T @ axes - np.eye(2)).max() < 1e-9
    assert abs(axes[1, 0]) > 0.99 and abs(axes[0, 1]) > 0.99 and mean == pytest.approx(x.mean(0))
    with pytest.raises(ValueError, match="4 axes cannot be had"):
        scores.principal_axes(x, 4)


# ---- errors


def test_the_bootstrap_error_of_a_mean_is_the_standard_error():
    values = np.random.default_rng(2).normal(size=400)
    error = scores.bootstrap_error(lambda i: values[i].mean(), range(400), draws=400)
    assert error == pytest.approx(values.std() / 20, rel=0.15)


def test_samples_of_one_group_are_drawn_together():
    values = np.repeat(np.random.default_rng(3).normal(size=100), 4)
    alone = scores.bootstrap_error(lambda i: values[i].mean(), range(400))
    together = scores.bootstrap_error(lambda i: values[i].mean(), np.arange(400) // 4)
    assert together == pytest.approx(2 * alone, rel=0.25)
    assert math.isnan(scores.bootstrap_error(lambda i: 1.0, [0, 0, 0]))
