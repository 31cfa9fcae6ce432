"""Contact sheets for a reader: what was given, what came out, what is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.rooms.evaluate.run import Generated, Runner
from data_pipelines.rooms.evaluate.settings import BOXES, CAPTION, DEPTH, NORMAL, RGB, SEMSEG
from data_pipelines.rooms.evaluate.truth import Constant, Rooms
from fm4m.generate.generator import Target
from fm4m.generate.session import Session, opened
from fm4m.pictures import draw_sheet
from fm4m.transforms import boxes as boxes_lib

NAMES = {DEPTH: "depth", NORMAL: "normals", SEMSEG: "semantic classes", RGB: "picture", BOXES: "boxes"}
# What an edit puts in the place of the largest thing; the second where that is the first already.
OTHER = ("bed", "wardrobe")
EDITS = 3
# The part of a picture that is to be generated anew is shown as this grey.
OPEN = 128
# Part of the room rather than things in it.
_NOT_CHANGED = ("window", "picture", "door", "rug")


def picked(rooms: Rooms, count: int) -> list[int]:
    """Numbers of ``count`` samples, or of all if there are fewer, spread evenly."""
    count = min(count, len(rooms))
    return [int(len(rooms) * (i + 0.5) / count) for i in range(count)]


def rgb_sheet(session: Session, rooms: Rooms, found: Mapping[str, Any], chosen: Sequence[int], note: str) -> np.ndarray:
    """Two lines a room: what the model makes of its picture, and the truth. uint8 [H, W, 3]."""
    true = {DEPTH: rooms.depth, NORMAL: rooms.normal, SEMSEG: rooms.semseg}
    columns: list[tuple[str, list]] = [("given: picture", [[rooms.rgb[i], None] for i in chosen])]
    for name, truth in true.items():
        draw = session.showers[name].tokenizer.to_picture
        pairs = zip(draw(found[name][list(chosen)]), draw(truth[list(chosen)]), strict=True)
        columns.append((NAMES[name], [list(pair) for pair in pairs]))
    both = [[(rooms.rgb[i], found[BOXES][i]), (rooms.rgb[i], rooms.boxes[i])] for i in chosen]
    columns.append(("boxes", both))
    columns.append(("caption", [[found[CAPTION][i], rooms.captions[i]] for i in chosen]))
    return draw_sheet(columns, ("model", "truth"), note)


def caption_sheet(session: Session, rooms: Rooms, made: Generated, chosen: Sequence[int], note: str) -> np.ndarray:
    """A line a caption: everything generated from it, in the order of generation. uint8 [H, W, 3]."""
    columns: list[tuple[str, list]] = [("given: caption", [[rooms.captions[i]] for i in chosen])]
    under = made.arrays(RGB)
    for name in made.ids:
        if name == BOXES:
            found = [boxes_lib.from_text(text).boxes for text in made.texts(name)]
            columns.append((NAMES[name], [[(under[i], found[i])] for i in chosen]))
        else:
            pictures = session.showers[name].tokenizer.to_picture(made.arrays(name)[list(chosen)])
            columns.append((NAMES[name], [[picture] for picture in pictures]))
    columns.append(("a true picture", [[rooms.rgb[i]] for i in chosen]))
    return draw_sheet(columns, ("",), note)


def edit_sheet(
    session: Session, runner: Runner, plan: Target, rooms: Rooms, constant: Constant, chosen: Sequence[int], note: str
) -> np.ndarray:
    """A line a room: the box of its largest thing opened, and filled as three semantic maps say. uint8 [H, W, 3].

    The thing is left as it is, taken away (its pixels get the most frequent class of their place), or exchanged.
    """
    m, rgb, semseg = session.modalities[RGB], session.showers[RGB].tokenizer, session.showers[SEMSEG].tokenizer
    index, true = list(chosen), rooms.semseg[list(chosen)]
    things = [_largest(rooms.boxes[i]) for i in index]
    cells = np.stack([opened((t.xmin, t.ymin, t.xmax, t.ymax), m.grid).reshape(-1) for t in things])
    side = true.shape[1] // m.grid[0], true.shape[2] // m.grid[1]
    part = np.kron(cells.reshape(-1, *m.grid), np.ones((1, *side))).astype(bool)
    numbers = np.array([rooms.classes.index(t.class_name) for t in things])[:, None, None]
    thing = part & (true == numbers)
    other = [rooms.classes.index(OTHER[t.class_name == OTHER[0]]) for t in things]
    maps = {
        "as it is": true,
        "thing gone": np.where(thing, constant.semseg, true),
        "another instead": np.where(thing, np.array(other, np.uint8)[:, None, None], true),
    }
    codes = rgb.encode(rooms.rgb[index])
    given, shown = np.where(cells, -1, codes), np.where(part[..., None], np.uint8(OPEN), rgb.decode(codes))
    columns = [("picture", list(rooms.rgb[index])), ("given: tokens", list(shown))]
    for title, wanted in maps.items():
        made = runner(f"edit: {title}", {RGB: given, SEMSEG: semseg.encode(wanted)}, [plan]).arrays(RGB)
        columns += [(f"given: {title}", list(semseg.to_picture(wanted))), ("generated", list(made))]
    sheet = [(title, [[cell] for cell in cells]) for title, cells in columns]
    return draw_sheet(sheet, ("",), note)


def _largest(boxes: Sequence[boxes_lib.Box]) -> boxes_lib.Box:
    things = [box for box in boxes if box.class_name not in _NOT_CHANGED]
    return max(things or boxes, key=lambda box: box.area)
