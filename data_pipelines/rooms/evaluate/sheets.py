"""Contact sheets for a reader: what was given, what came out, what is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.rooms.evaluate import words
from data_pipelines.rooms.evaluate.run import Generated, Runner
from data_pipelines.rooms.evaluate.settings import BOXES, CAPTION, DEPTH, NORMAL, RGB, SEMSEG
from data_pipelines.rooms.evaluate.truth import Rooms
from fm4m.generate.generator import Target
from fm4m.generate.session import Session, opened
from fm4m.pictures import draw_sheet
from fm4m.transforms import boxes as boxes_lib

NAMES = {DEPTH: "depth", NORMAL: "normals", SEMSEG: "semantic classes", RGB: "picture", BOXES: "boxes"}
COLOURS = ("red", "green", "blue")
# The part of a picture that is to be generated anew is shown as this grey.
OPEN = 128
# No change of colour is asked for: they have none, or are part of the room.
_NOT_CHANGED = ("window", "picture", "door", "rug", "potted plant", "food", "teddy bear", "sports ball")


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


def edit_sheet(session: Session, runner: Runner, plan: Target, rooms: Rooms, chosen: Sequence[int]) -> np.ndarray:
    """A line a room: the box of its largest thing opened and filled as three captions say. uint8 [H, W, 3]."""
    m, tokenizer = session.modalities[RGB], session.showers[RGB].tokenizer
    codes = tokenizer.encode(rooms.rgb[list(chosen)])
    things = [_largest(rooms.boxes[i]) for i in chosen]
    cells = np.stack([opened((t.xmin, t.ymin, t.xmax, t.ymax), m.grid).reshape(-1) for t in things])
    given = np.where(cells, -1, codes)
    text = session.showers[CAPTION].tokenizer
    said = [words.said(rooms.captions[i]) for i in chosen]
    made = []
    for colour in COLOURS:
        captions = [f"a {colour} {t.class_name} in a {s.room or 'room'}" for t, s in zip(things, said, strict=True)]
        inputs = {RGB: given, CAPTION: [text.encode(caption) for caption in captions]}
        made.append(runner(f"edit: {colour}", inputs, [plan]).arrays(RGB))
    rows, columns = m.grid
    side = rooms.rgb.shape[1] // rows, rooms.rgb.shape[2] // columns
    mask = np.kron(cells.reshape(-1, rows, columns), np.ones((1, *side))).astype(bool)[..., None]
    shown = tokenizer.decode(codes)
    asked = [f"a ... {t.class_name} in a {s.room or 'room'}" for t, s in zip(things, said, strict=True)]
    parts = (
        ("picture", rooms.rgb[list(chosen)]),
        ("its tokens", shown),
        ("given", np.where(mask, np.uint8(OPEN), shown)),
        ("given: caption", asked),
        *((f"... {colour} ...", pictures) for colour, pictures in zip(COLOURS, made, strict=True)),
    )
    sheet = [(title, [[cell] for cell in cells]) for title, cells in parts]
    return draw_sheet(sheet, ("",), "the grey part generated anew, as the caption says")


def _largest(boxes: Sequence[boxes_lib.Box]) -> boxes_lib.Box:
    things = [box for box in boxes if box.class_name not in _NOT_CHANGED]
    return max(things or boxes, key=lambda box: box.area)
