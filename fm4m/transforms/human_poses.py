"""People as text: box, body pose, orientation, camera and body shape (4M-21, appendix on modalities).

One person is 39 tokens: "human", the four words of the box, and four blocks in an order drawn for every use:

    pose v0= x 8      codes of the body pose's tokenizer (v1 from code 512 on)
    global v0= x 9    orientation, a rotation matrix row by row, entries in -1..1
    camera v0= x 3    the camera's parameters, in -1..19
    shape v0= x 10    SMPL's betas, in -3..3

An image without people is "none". Parameters are those of HMR 2.0 (Goel et al. 2023) for the body model SMPL (Loper et
al. 2015). Crops move and clip the boxes; pose, orientation and camera stay as they are, and nothing is ever mirrored,
as in the reference implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fm4m.transforms import crops, values

NONE = "none"
PERSON = "human"
# Block, field of Person, numbers, bins (None: codes); a permutation of blocks refers to this order.
BLOCKS = (
    ("pose", "pose", 8, None),
    ("global", "orientation", 9, values.Bins(499.5, 499.5, what="orientation")),
    ("camera", "camera", 3, values.Bins(49.95, 49.95, what="camera parameter")),
    ("shape", "betas", 10, values.Bins(166.5, 499.5, what="beta")),
)
_BLOCK = {name: (field, count, bins) for name, field, count, bins in BLOCKS}
_COORDINATE = values.coordinate_bins()


@dataclasses.dataclass(frozen=True)
class Person:
    """One person.

    Attributes:
      box: (xmin, ymin, xmax, ymax) relative to the image, x to the right, y down.
      pose: 8 codes in 0..1023.
      orientation: 9 entries of the global rotation matrix, row by row, in -1..1.
      camera: 3 parameters in -1..19.
      betas: 10 shape parameters in -3..3.

    Raises:
      ValueError: another number of entries, or a code out of range.
    """

    box: tuple[float, float, float, float]
    pose: tuple[int, ...]
    orientation: tuple[float, ...]
    camera: tuple[float, ...]
    betas: tuple[float, ...]

    def __post_init__(self):
        for field, count in (("box", 4), *((field, count) for _, field, count, _ in BLOCKS)):
            if len(getattr(self, field)) != count:
                raise ValueError(f"a person's {field} has {len(getattr(self, field))} numbers, expected {count}")
        values.code_words(self.pose)


class Parsed(NamedTuple):
    """People of a text, in its order, and how many stretches of it were not a person."""

    people: list[Person]
    malformed: int


def from_record(record: Mapping, size: tuple[int, int]) -> list[Person]:
    """People of a record as HMR 2.0's demo writes them, with `pose_tokenized` added.

    Args:
      record: bbox_xyxy [n, 4] in pixels, pred_smpl_params.global_orient [n, (1,) 3, 3], pred_smpl_params.betas [n, 10],
        pose_tokenized [n, 8], pred_cam [n, 3], as nested lists; empty if nobody is in the image.
      size: (height, width) of the image in pixels.

    Raises:
      ValueError: a missing key, another shape, or a code out of range.
    """
    if not record:
        return []
    smpl = record.get("pred_smpl_params", {})
    found = {
        "bbox_xyxy": record.get("bbox_xyxy"),
        "pose_tokenized": record.get("pose_tokenized"),
        "pred_smpl_params.global_orient": smpl.get("global_orient"),
        "pred_cam": record.get("pred_cam"),
        "pred_smpl_params.betas": smpl.get("betas"),
    }
    counts = (4, *(count for _, _, count, _ in BLOCKS))
    height, width = size
    arrays = []
    for (key, array), count in zip(found.items(), counts, strict=True):
        if array is None:
            raise ValueError(f"human poses: the record has no {key!r}; it has {sorted(record)}")
        array = np.asarray(array)
        people = len(arrays[0]) if arrays else len(array)
        if array.size != people * count:
            raise ValueError(f"human poses: {key!r} has shape {list(array.shape)}, expected [{people}, {count}]")
        arrays.append(array.reshape(people, count))
    boxes = arrays[0] / np.array([width, height, width, height])
    return [
        Person(tuple(box), tuple(int(c) for c in pose), tuple(orientation), tuple(camera), tuple(betas))
        for box, pose, orientation, camera, betas in zip(boxes.tolist(), *(a.tolist() for a in arrays[1:]))
    ]


def crop(people: Iterable[Person], window: crops.Window = (0.0, 0.0, 1.0, 1.0)) -> list[Person]:
    """People with boxes in the coordinates of a crop, clipped to it; those wholly outside are dropped.

    Args:
      people: boxes relative to the full image.
      window: (xmin, ymin, xmax, ymax) of the crop relative to the full image, see `crops.Crop.window`.

    Raises:
      ValueError: an empty window.
    """
    crops.check_window(window)
    kept = []
    for person in people:
        box = crops.relative(person.box, window)
        if all(max(box[axis::2]) >= 0 and min(box[axis::2]) <= 1 for axis in (0, 1)):
            kept.append(dataclasses.replace(person, box=tuple(crops.clip(x) for x in box)))
    return kept


def to_text(people: Sequence[Person], orders: Sequence[Sequence[int]] | np.random.Generator | None = None) -> str:
    """People as text; "none" for nobody.

    Numbers outside a block's range are put into its end bins: the reference implementation clips only the camera, and
    betas beyond 3 become words that are not in its vocabulary.

    Args:
      people: boxes relative to the crop (`crop`).
      orders: of the four blocks, one permutation of `BLOCKS` a person; None for the order of `BLOCKS`, or a generator.

    Returns:
      The text. After people it ends with a space, which no tokenizer sees, so that texts are equal to the reference's.

    Raises:
      ValueError: a number that is not finite, another number of orders than of people, or one that is no permutation.
    """
    if not people:
        return NONE
    if orders is None or isinstance(orders, np.random.Generator):
        orders = [orders] * len(people)
    if len(orders) != len(people):
        raise ValueError(f"{len(orders)} orders of blocks for {len(people)} people; give one a person")
    return "".join(_person_text(person, order) + " " for person, order in zip(people, orders))


def _person_text(person: Person, order: values.Order) -> str:
    written = [PERSON, *values.corners(_COORDINATE.bin(x) for x in person.box)]
    for name, field, _, bins in values.arrange(BLOCKS, order, "blocks of a person"):
        numbers = getattr(person, field)
        written.append(name)
        written += values.code_words(numbers) if bins is None else values.words(0, (bins.bin(x) for x in numbers))
    return " ".join(written)


def from_text(written: str) -> Parsed:
    """People of a text written by `to_text` or by a model, with bin centres for numbers; never raises.

    The text is cut before every "human". A stretch is a person if a box and each of the four blocks once, in any order,
    follow. "none" alone is nobody; every other stretch counts as malformed.
    """
    words = values.split(written)
    if words == [NONE]:
        return Parsed([], 0)
    people, malformed = [], 0
    for stretch in values.stretches(words, lambda word: word == PERSON):
        person = _parse_person(stretch)
        if person is None:
            malformed += 1
        else:
            people.append(person)
    return Parsed(people, malformed)


def _parse_person(words: Sequence[str]) -> Person | None:
    box = values.read_corners(words[1:5])
    if words[0] != PERSON or box is None:
        return None
    fields = {}
    for block in values.stretches(words[5:], lambda word: word in _BLOCK):
        if block[0] not in _BLOCK:
            return None
        field, count, bins = _BLOCK[block[0]]
        numbers = values.read_codes(block[1:]) if bins is None else values.numbers(block[1:], 0)
        if numbers is None or len(numbers) != count or field in fields:
            return None
        fields[field] = tuple(numbers if bins is None else (bins.value(n) for n in numbers))
    if set(fields) != {field for field, _, _ in _BLOCK.values()}:
        return None
    return Person(box=tuple(_COORDINATE.value(n) for n in box), **fields)
