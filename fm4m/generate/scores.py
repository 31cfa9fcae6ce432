"""How good generated modalities are: one number a sample where there is one, so that errors can be estimated.

Everything is NumPy on the host. Depth is compared in metres, normals and classes as tokenizers decode them; pictures as
feature vectors, of which this module does not ask where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fm4m.tokenizers import reconstruction
from fm4m.transforms.boxes import Box

# Depth within a factor of this of the truth counts as right (Eigen et al. 2014), normals within this angle (Fouhey et
# al. 2013), boxes that overlap at least this much (PASCAL VOC).
DEPTH_FACTOR = 1.25
NORMAL_DEGREES = 11.25
BOX_OVERLAP = 0.5


# ---- dense modalities


class DepthErrors(NamedTuple):
    """float64 [N] each: mean of |prediction - truth| / truth, and share of the pixels within `DEPTH_FACTOR`."""

    abs_rel: np.ndarray
    delta: np.ndarray


def depth_errors(truth: np.ndarray, prediction: np.ndarray) -> DepthErrors:
    """Errors of depth in metres, per image, over the pixels that have a depth (truth > 0).

    Align relative depth first: `reconstruction.align_scale_shift` (a scale and a shift per image by least squares, as
    is usual for relative depth) or one scale and shift for all images. A prediction of 0 or less is never within the
    factor.

    Args:
      truth, prediction: floats [N, H, W].

    Raises:
      ValueError: the shapes differ, or an image has no pixel with a depth.
    """
    t, p = _same_shape(truth, prediction)
    valid = t > 0
    count = valid.sum((1, 2))
    if not count.all():
        raise ValueError(f"true depth of image {int(count.argmin())} is 0 everywhere: nothing to compare with")
    t = np.where(valid, t, 1.0)
    factor = np.maximum(t, p) / np.maximum(np.minimum(t, p), 1e-9)
    within = (factor < DEPTH_FACTOR) & valid
    relative = np.where(valid, np.abs(p - t) / t, 0.0)
    return DepthErrors(relative.sum((1, 2)) / count, within.sum((1, 2)) / count)


def normal_errors(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean angle in degrees, share of the pixels under `NORMAL_DEGREES`) of each image, float64 [N].

    ``truth`` and ``prediction`` are normals stored as uint8 [N, H, W, 3]. Raises ValueError if the shapes differ.
    """
    _same_shape(truth, prediction)
    angles = reconstruction.angles(truth, prediction)
    return angles.mean((1, 2)), (angles < NORMAL_DEGREES).mean((1, 2))


def _same_shape(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t, p = np.asarray(truth, np.float64), np.asarray(prediction, np.float64)
    if t.shape != p.shape or not len(t):
        raise ValueError(f"truth {list(t.shape)} and prediction {list(p.shape)} must have one shape, and samples")
    return t, p


# ---- boxes


class Matches(NamedTuple):
    """Boxes of one image after matching.

    Attributes:
      class_name: of each found box.
      score: float64, of each.
      hit: bool, whether it is a true box.
      truths: number of true boxes by class.
    """

    class_name: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    truths: dict[str, int]


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 if both are empty."""
    width = min(a.xmax, b.xmax) - max(a.xmin, b.xmin)
    height = min(a.ymax, b.ymax) - max(a.ymin, b.ymin)
    common = max(width, 0.0) * max(height, 0.0)
    union = a.area + b.area - common
    return common / union if union > 0 else 0.0


def match_boxes(truth: Sequence[Box], found: Sequence[Box], threshold: float = BOX_OVERLAP) -> Matches:
    """Which found boxes are true ones (Everingham et al. 2010): same class, overlap at least ``threshold``.

    Found boxes choose in the order of their scores, of equal ones that with the largest overlap first; each takes the
    true box that it overlaps most and that is not taken. A second box for one object is therefore wrong.
    """
    overlaps = [[overlap(f, t) if f.class_name == t.class_name else 0.0 for t in truth] for f in found]
    order = sorted(range(len(found)), key=lambda i: (-found[i].score, -max(overlaps[i], default=0.0)))
    taken: set[int] = set()
    hit = np.zeros(len(found), bool)
    for i in order:
        free = [j for j in range(len(truth)) if j not in taken and overlaps[i][j] >= threshold]
        if free:
            taken.add(max(free, key=lambda j: overlaps[i][j]))
            hit[i] = True
    names = [t.class_name for t in truth]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    found_names = np.array([f.class_name for f in found], object)
    return Matches(found_names, np.array([f.score for f in found], float), hit, counts)


def average_precision(score: np.ndarray, hit: np.ndarray, truths: int) -> float:
    """Area under precision over recall, all-point interpolation (PASCAL VOC from 2010 on).

    Precision at a recall is the best one at this or a larger recall. Equal scores are one threshold, so that the order
    of boxes without a score does not matter: with all scores equal this is precision times recall.

    Args:
      score, hit: of all found boxes of a class, in any order.
      truths: true boxes of the class, at least 1.
    """
    if truths < 1:
        raise ValueError("average precision needs at least one true box")
    order = np.argsort(-np.asarray(score, np.float64), kind="stable")
    score, hits = np.asarray(score, np.float64)[order], np.cumsum(np.asarray(hit, bool)[order])
    last = np.flatnonzero(np.append(np.diff(score) != 0, True)) if len(score) else np.zeros(0, int)
    recall = np.concatenate([[0.0], hits[last] / truths])
    precision = hits[last] / (last + 1.0)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * best).sum())


def mean_average_precision(images: Iterable[Matches], *, classes: bool = True) -> float:
    """Mean of `average_precision` over the classes that have a true box in any of the images.

    ``classes=False`` pools the boxes of all classes in one curve: each box weighs the same, each class by its boxes.
    Raises ValueError if there is no true box at all.
    """
    images = list(images)
    truths: dict[str, int] = {}
    for image in images:
        for name, count in image.truths.items():
            truths[name] = truths.get(name, 0) + count
    if not truths:
        raise ValueError("no image has a true box")
    name, score, hit = (np.concatenate([image[i] for image in images]) for i in range(3))
    if not classes:
        return average_precision(score, hit, sum(truths.values()))
    chosen = {c: name == c for c in truths}
    return float(np.mean([average_precision(score[chosen[c]], hit[chosen[c]], n) for c, n in truths.items()]))


# ---- sets of feature vectors


class Retrieval(NamedTuple):
    """Of each query, float64 [N]: chance to be right at the first place, among the first five; place from 1."""

    first: np.ndarray
    five: np.ndarray
    rank: np.ndarray


def retrieval(similarity: np.ndarray) -> Retrieval:
    """Where query i finds gallery entry i in a square matrix of similarities [N, N].

    Equally similar entries come in random order: the chances are exact expectations, the rank is the middle one. A
    constant similarity thus gives 1/N, 5/N and (N + 1) / 2.

    Raises ValueError for a matrix of another form, or with a value that is not finite.
    """
    s = np.asarray(similarity, np.float64)
    if s.ndim != 2 or s.shape[0] != s.shape[1] or not len(s) or not np.isfinite(s).all():
        raise ValueError(f"similarities must be finite, [N, N], got {list(s.shape)}")
    own = np.diag(s)[:, None]
    better, equal = (s > own).sum(1), (s == own).sum(1)

    def among(k: int) -> np.ndarray:
        return np.clip((k - better) / equal, 0.0, 1.0)

    return Retrieval(among(1), among(5), better + (equal + 1) / 2.0)


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 [N, M] of two sets of vectors [N, D] and [M, D]; a vector of zeros is similar to nothing (0)."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (np.float64(a), np.float64(b)))
    # Equal vectors must be equally similar to the last bit for ties to be seen.
    return np.round(a @ b.T, 9)


def principal_axes(features: np.ndarray, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and the ``dims`` axes [D, dims] of largest variance of features [N, D], unit length, largest first."""
    x = np.asarray(features, np.float64)
    if not 1 <= dims <= min(x.shape):
        raise ValueError(f"{dims} axes cannot be had from {x.shape[0]} vectors of {x.shape[1]} numbers")
    mean = x.mean(0)
    return mean, np.linalg.svd(x - mean, full_matrices=False)[2][:dims].T


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of vectors [N, D] and [M, D] (Heusel et al. 2017).

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)``, covariances with N - 1 (of one vector: 0). It is
    biased upwards by about ``D^2 / N`` in units of a variance: reduce D first (see `principal_axes`), and compare only
    distances of equal N and M.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(f"expected two sets of vectors of one length, got {list(a.shape)} and {list(b.shape)}")
    ca, cb = _covariance(a), _covariance(b)
    root = _root(ca)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cb @ root), 0.0, None)).sum()
    return float(max(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2.0 * cross, 0.0))


def _covariance(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(0)
    return x.T @ x / max(len(x) - 1, 1)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


# ---- how sure the numbers are


def bootstrap_error(
    statistic: Callable[[np.ndarray], float], groups: Sequence, draws: int = 200, seed: int = 0
) -> float:
    """Standard error of a statistic of N samples: its standard deviation over samples drawn with replacement.

    Args:
      statistic: of the samples with these indices, int [n], which may repeat.
      groups: of each of the N samples, what it shares with others, such as the room that two pictures show. Whole
        groups are drawn, since their samples are not independent of each other.
      draws: how often.
      seed: of the draws.

    Returns:
      The error; NaN with fewer than two groups.
    """
    members: dict = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    parts, rng = [np.array(m) for m in members.values()], np.random.default_rng(seed)
    if len(parts) < 2:
        return float("nan")
    values = []
    for _ in range(draws):
        values.append(statistic(np.concatenate([parts[k] for k in rng.integers(len(parts), size=len(parts))])))
    return float(np.std(values, ddof=1))
