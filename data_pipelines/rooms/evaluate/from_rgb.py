"""What the model makes of a picture alone, against the exact truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.rooms.evaluate import words
from data_pipelines.rooms.evaluate.run import Runner
from data_pipelines.rooms.evaluate.settings import BOXES, CAPTION, DEPTH, NORMAL, PIXELS, SEMSEG
from data_pipelines.rooms.evaluate.table import Row, Statistic, mean, number
from data_pipelines.rooms.evaluate.truth import Constant, Rooms
from data_pipelines.rooms.prepare import texts
from fm4m.generate import scores
from fm4m.generate.generator import Target
from fm4m.generate.session import Session
from fm4m.tokenizers import reconstruction
from fm4m.transforms import boxes as boxes_lib

# Of each measure: its title, which direction is better, digits after the point.
TITLES = {
    "depth.abs_rel": ("depth: AbsRel, scale and shift fitted to each image", "lower", 3),
    "depth.delta": ("depth: delta < 1.25, scale and shift fitted to each image", "higher", 3),
    "depth.abs_rel_metric": ("depth: AbsRel, one scale and shift for all images", "lower", 3),
    "depth.delta_metric": ("depth: delta < 1.25, one scale and shift for all images", "higher", 3),
    "normal.angle": ("normals: mean angle in degrees", "lower", 1),
    "normal.within": ("normals: share under 11.25 degrees", "higher", 3),
    "semseg.miou": ("semantic classes: mIoU", "higher", 3),
    "semseg.accuracy": ("semantic classes: share of pixels right", "higher", 3),
    "boxes.ap50": ("boxes: AP50, mean over classes", "higher", 3),
    "boxes.ap50_pooled": ("boxes: AP50, all classes in one curve", "higher", 3),
    "caption.words": ("caption: F1 of content words", "higher", 3),
    "caption.things": ("caption: F1 of things named", "higher", 3),
    "caption.room": ("caption: share of rooms named right", "higher", 3),
}
# Training rooms from which one scale and shift of relative depth is estimated.
FIT_ROOMS = 256


def fit_metres(session: Session, train: Rooms) -> tuple[float, float]:
    """(scale, shift) that map the tokenizer's relative depth to metres best on training rooms, by least squares."""
    depth = train.depth[:FIT_ROOMS]
    tokenizer = session.showers[DEPTH].tokenizer
    scale, shift = np.polyfit(tokenizer.decode(tokenizer.encode(depth)).ravel(), depth.ravel(), 1)
    return float(scale), float(shift)


# ---- measures: what is predicted against what is true


def depth(rooms: Rooms, aligned: np.ndarray, metres: np.ndarray) -> dict[str, Statistic]:
    """Of relative or metric depth ``aligned`` that is fitted to each image, and of ``metres`` as they are."""
    fitted = scores.depth_errors(rooms.depth, reconstruction.align_scale_shift(rooms.depth, aligned))
    plain = scores.depth_errors(rooms.depth, metres)
    return {
        "depth.abs_rel": mean(fitted.abs_rel),
        "depth.delta": mean(fitted.delta),
        "depth.abs_rel_metric": mean(plain.abs_rel),
        "depth.delta_metric": mean(plain.delta),
    }


def normals(rooms: Rooms, found: np.ndarray) -> dict[str, Statistic]:
    """Of normals uint8 [N, H, W, 3]."""
    angle, within = scores.normal_errors(rooms.normal, found)
    return {"normal.angle": mean(angle), "normal.within": mean(within)}


def classes(rooms: Rooms, found: np.ndarray) -> dict[str, Statistic]:
    """Of class ids uint8 [N, H, W]; mIoU over the classes that the true pictures show, all pixels counted together."""
    number_of = len(rooms.classes)
    counts = np.stack([reconstruction.confusion(t, p, number_of) for t, p in zip(rooms.semseg, found, strict=True)])
    right = (rooms.semseg == found).mean((1, 2))
    return {"semseg.miou": lambda i: reconstruction.mean_iou(counts[i].sum(0)), "semseg.accuracy": mean(right)}


def boxes(rooms: Rooms, found: Sequence[Sequence[boxes_lib.Box]]) -> dict[str, Statistic]:
    """Of boxes. Generated ones have no score (all 1): their precision-recall curve is one point."""
    matches = [scores.match_boxes(t, f) for t, f in zip(rooms.boxes, found, strict=True)]
    return {
        "boxes.ap50": lambda i: scores.mean_average_precision([matches[k] for k in i]),
        "boxes.ap50_pooled": lambda i: scores.mean_average_precision([matches[k] for k in i], classes=False),
    }


def captions(rooms: Rooms, found: Sequence[str]) -> dict[str, Statistic]:
    """Of captions, see `words.compare`."""
    return {f"caption.{name}": mean(values) for name, values in words.compare(rooms.captions, found).items()}


# ---- the experiment


def evaluate(
    session: Session, runner: Runner, plans: Sequence[Target], rooms: Rooms, train: Rooms, constant: Constant
) -> tuple[list[Row], dict[str, Any]]:
    """Generates every target from the picture alone and measures it.

    Returns:
      The rows of the table, and what was generated: arrays in the stored form, lists of boxes, texts.
    """
    scale, shift = fit_metres(session, train)
    made = {p.name: runner(f"rgb to {p.name}", {PIXELS: rooms.rgb}, [p]) for p in plans}
    found: dict[str, Any] = {name: made[name].arrays(name) for name in (DEPTH, NORMAL, SEMSEG)}
    found[BOXES] = [boxes_lib.from_text(text).boxes for text in made[BOXES].texts(BOXES)]
    found[CAPTION] = made[CAPTION].texts(CAPTION)
    ceiling = ceilings(session, rooms)

    def everywhere(value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(value, (len(rooms), *value.shape))

    columns: dict[str, dict[str, Statistic]] = {}
    for column, values in (("model", found), ("tokenizer", ceiling)):
        relative = values[DEPTH]
        columns[column] = depth(rooms, relative, relative * scale + shift)
        columns[column] |= normals(rooms, values[NORMAL]) | classes(rooms, values[SEMSEG])
        columns[column] |= boxes(rooms, values[BOXES]) | captions(rooms, values[CAPTION])
    guess = everywhere(constant.depth)
    columns["constant"] = depth(rooms, guess, guess) | normals(rooms, everywhere(constant.normal))
    columns["constant"] |= classes(rooms, everywhere(constant.semseg)) | boxes(rooms, [constant.boxes] * len(rooms))
    columns["constant"] |= captions(rooms, [constant.caption] * len(rooms))
    if others := rooms.other_views():
        columns["real"] = captions(rooms, [rooms.captions[i] for i in others])
    return [_row(key, columns, rooms.scenes) for key in TITLES], found


def _row(key: str, columns: Mapping[str, Mapping[str, Statistic]], scenes: Sequence[str]) -> Row:
    title, better, digits = TITLES[key]
    return Row(key, title, better, {c: number(s[key], scenes) for c, s in columns.items() if key in s}, digits)


def ceilings(session: Session, rooms: Rooms) -> dict[str, Any]:
    """The truth through each tokenizer and back, as `evaluate` gives what was generated."""
    out: dict[str, Any] = {}
    for name, array in ((DEPTH, rooms.depth), (NORMAL, rooms.normal), (SEMSEG, rooms.semseg)):
        tokenizer = session.showers[name].tokenizer
        out[name] = tokenizer.decode(tokenizer.encode(array))
    for name in (CAPTION, BOXES):
        text = session.showers[name].tokenizer
        ids = texts(rooms.pack, name, text, session.modalities[name])
        out[name] = [text.decode(ids[i]) for i in rooms.index]
    out[BOXES] = [boxes_lib.from_text(written).boxes for written in out[BOXES]]
    return out
