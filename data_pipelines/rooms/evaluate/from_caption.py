"""What the model makes of a caption alone: does the picture show what the caption says, and does it look like a room?

Pictures are compared by the pooled features of EfficientNet-lite0, an ImageNet classifier: a stand-in for CLIP and
Inception features, so the distances compare with nothing outside of this evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.rooms.evaluate import words
from data_pipelines.rooms.evaluate.run import Generated, Runner
from data_pipelines.rooms.evaluate.settings import CAPTION, PIXELS, RGB, SEMSEG
from data_pipelines.rooms.evaluate.table import Number, Row, Statistic, mean, number
from data_pipelines.rooms.evaluate.truth import Constant, Rooms
from fm4m.generate import scores
from fm4m.generate.generator import Target
from fm4m.generate.session import Session

# Axes of the features that Frechet distances are taken in: with 128 pictures a side, the covariance of all 1,280 would
# be nothing but noise.
AXES = 64
# Random halves of the training pictures that are compared with the true ones, for what two real sets are apart.
REAL_DRAWS = 8
# A thing is shown if it covers this share of the semantic map: a cell and a quarter of 8 x 8 pixels.
SHOWN = 0.02

Extractor = Callable[[np.ndarray], np.ndarray]


def lite0() -> Extractor:
    """Pictures uint8 [N, H, W, 3] to features float32 [N, 1280].

    Raises FileNotFoundError without the weights; the message says how to install them.
    """
    from data_pipelines.features import EfficientNetLite0

    network = EfficientNetLite0()
    return lambda pictures: network.outputs(pictures).pooled


@dataclasses.dataclass(frozen=True)
class Features:
    """Features [., D] of what the tables compare. ``coded`` ones are of pictures that went through the tokenizer."""

    true: np.ndarray
    coded: np.ndarray
    train: np.ndarray
    train_coded: np.ndarray
    made: np.ndarray
    constant: np.ndarray


def evaluate(
    session: Session,
    runner: Runner,
    plans: Sequence[Target],
    read_back: Target,
    rooms: Rooms,
    train: Rooms,
    constant: Constant,
    extract: Extractor,
) -> tuple[list[Row], Generated]:
    """Generates a chain of targets from each caption, one of them RGB, and measures it.

    Args:
      plans: the chain.
      read_back: how a caption is generated from a picture, to see whether a generated one shows what was asked for.
      extract: features of pictures.

    Returns:
      The rows of the table, and what was generated.
    """
    text, tokenizer = session.showers[CAPTION].tokenizer, session.showers[RGB].tokenizer
    asked = [text.encode(caption) for caption in rooms.captions]
    made = runner("caption to everything", {CAPTION: asked}, plans)
    pictures = {"model": made.arrays(RGB), "tokenizer": tokenizer.decode(tokenizer.encode(rooms.rgb))}

    runner.bar.set_description("features of pictures")
    features = Features(
        true=extract(rooms.rgb),
        coded=extract(pictures["tokenizer"]),
        train=extract(train.rgb),
        train_coded=extract(tokenizer.decode(tokenizer.encode(train.rgb))),
        made=extract(pictures["model"]),
        constant=np.repeat(extract(constant.rgb[None]), len(rooms), axis=0),
    )
    said = {
        column: runner(f"{column}'s picture to caption", {PIXELS: picture}, [read_back]).texts(CAPTION)
        for column, picture in pictures.items()
    }
    said["constant"] = [constant.caption] * len(rooms)
    semseg = session.showers[SEMSEG].tokenizer
    maps = {
        "model": made.arrays(SEMSEG),
        "tokenizer": semseg.decode(semseg.encode(rooms.semseg)),
        "constant": np.repeat(constant.semseg[None], len(rooms), axis=0),
    }
    rows = retrieval_rows(features, rooms.scenes) + frechet_rows(features, rooms.scenes)
    return rows + agreement_rows(rooms, said, maps), made


# ---- rows


def retrieval_rows(features: Features, scenes: Sequence[str]) -> list[Row]:
    """Does the picture find the true one of its caption among all true ones? By cosine of centred features.

    Each side is centred on training pictures of its kind. Otherwise all that is found is the tokenizer's blur: on other
    rooms than the reported ones, 64 pictures through the tokenizer found their true ones at a median rank of 24 with
    one centre, and of 5 with two.
    """
    own, true = features.train_coded.mean(0), features.train.mean(0)
    columns = {}
    for column, queries in (("model", features.made), ("tokenizer", features.coded), ("constant", features.constant)):
        columns[column] = scores.retrieval(scores.cosine_similarity(queries - own, features.true - true))
    size = len(scenes)
    titles = (
        ("first", f"its caption's picture is found among {size}: R@1", "higher", 3, np.mean),
        ("five", f"its caption's picture is found among {size}: R@5", "higher", 3, np.mean),
        ("rank", f"its caption's picture is found among {size}: median rank", "lower", 1, np.median),
    )
    rows = []
    for key, title, better, digits, average in titles:
        values = {column: getattr(found, key) for column, found in columns.items()}
        numbers = {c: number(lambda i, v=v, a=average: float(a(v[i])), scenes) for c, v in values.items()}
        rows.append(Row(f"retrieval.{key}", title, better, numbers, digits))
    return rows


def frechet_rows(features: Features, scenes: Sequence[str]) -> list[Row]:
    """Frechet distances to the true pictures, and to what the tokenizer makes of them: what the model could reach."""
    compared = {"model": features.made, "tokenizer": features.coded, "constant": features.constant}
    title = "FD-lite0 to the true pictures"
    rows = [frechet_row("frechet.true", title, compared, features.true, features.train, scenes)]
    del compared["tokenizer"]  # the same pictures
    title = "FD-lite0 to them through the tokenizer"
    return [*rows, frechet_row("frechet.coded", title, compared, features.coded, features.train_coded, scenes)]


def frechet_row(
    key: str, title: str, compared: Mapping[str, np.ndarray], reference: np.ndarray, train: np.ndarray,
    scenes: Sequence[str],
) -> Row:  # fmt: skip
    """Distances of features [N, D] by column to those of reference pictures, in the main axes of training pictures.

    Raises ValueError if there are too few samples for a covariance.
    """
    axes = min(AXES, len(scenes) // 2, *train.shape)
    if not axes:
        raise ValueError(f"Frechet distances need at least 2 samples, got {len(scenes)}")
    centre, directions = scores.principal_axes(train, axes)
    target = (reference - centre) @ directions
    numbers = {c: number(_distance((x - centre) @ directions, target), scenes) for c, x in compared.items()}
    numbers["real"] = _real((train - centre) @ directions, target)
    return Row(key, f"{title}, {axes} axes", "lower", numbers, 1)


def _distance(a: np.ndarray, b: np.ndarray) -> Statistic:
    return lambda i: scores.frechet_distance(a[i], b[i])


def _real(train: np.ndarray, target: np.ndarray) -> Number:
    """Mean distance of random training pictures, as many as there are targets; the error is their spread."""
    rng, size = np.random.default_rng(0), min(len(train), len(target))
    drawn = [train[rng.choice(len(train), size, replace=False)] for _ in range(REAL_DRAWS)]
    values = [scores.frechet_distance(x, target) for x in drawn]
    return Number(float(np.mean(values)), float(np.std(values, ddof=1)))


def agreement_rows(rooms: Rooms, said: dict[str, list[str]], maps: dict[str, np.ndarray]) -> list[Row]:
    """Is what the caption names there: in the caption that the model reads off the picture, in the semantic map?"""
    back = {column: words.compare(rooms.captions, texts) for column, texts in said.items()}
    titles = {"words": "F1 of content words", "things": "F1 of things named", "room": "share of rooms named right"}
    rows = []
    for name, title in titles.items():
        numbers = {c: number(mean(v[name]), rooms.scenes) for c, v in back.items()}
        rows.append(Row(f"read_back.{name}", f"caption read off the picture: {title}", "higher", numbers))
    numbers = {}
    for column, found in maps.items():
        if statistic := shown(rooms, found):
            numbers[column] = number(statistic, rooms.scenes)
    return [*rows, Row("semseg.shown", "share of the classes named that the semantic map shows", "higher", numbers)]


def shown(rooms: Rooms, maps: np.ndarray) -> Statistic | None:
    """Of the things that captions call by the name of a class, the share that covers `SHOWN` of the semantic map.

    None if no caption names any.
    """
    named, right = np.zeros((2, len(rooms)))
    for b, caption in enumerate(rooms.captions):
        for thing in words.said(caption).things:
            if thing in rooms.classes:
                named[b] += 1
                right[b] += (maps[b] == rooms.classes.index(thing)).mean() >= SHOWN
    if not named.any():
        return None
    return lambda i: float(right[i].sum() / max(named[i].sum(), 1))
