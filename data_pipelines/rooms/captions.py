"""Template captions over what is visible: room, colours, sizes, left/right, on-top relations, floor and walls."""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Visible:
    """A visible object: caption noun, sRGB colour, share of the picture, horizontal centre in [0, 1], its support."""

    index: int
    noun: str
    class_name: str
    color: np.ndarray
    area: float
    center: float
    support: int | None


_UNCOLORED = {"potted plant", "window", "picture", "food", "teddy bear", "sports ball"}


def color_name(color: np.ndarray) -> str:
    """English name of an sRGB colour, float [3] in [0, 1]."""
    h, s, v = colorsys.rgb_to_hsv(*(float(np.clip(c, 0, 1)) for c in color))
    if v < 0.2:
        return "black"
    if s < 0.13:
        return "white" if v > 0.8 else "gray"
    hue = h * 360
    if 15 <= hue < 50 and (v < 0.68 or (s < 0.62 and v < 0.85)):
        return "brown"
    if 20 <= hue < 75 and s < 0.4 and v >= 0.68:
        return "beige"
    if hue < 14 or hue >= 346:
        return "pink" if s < 0.5 and v > 0.7 else "red"
    for limit, name in (
        (42, "orange"),
        (70, "yellow"),
        (165, "green"),
        (195, "turquoise"),
        (255, "blue"),
        (292, "purple"),
    ):
        if hue < limit:
            return name
    return "pink"


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _phrase(item: Visible, rng: np.random.Generator, article: bool = True) -> str:
    words = item.noun
    if item.class_name not in _UNCOLORED and rng.uniform() < 0.85:
        words = f"{color_name(item.color)} {words}"
    if item.area > 0.16 and rng.uniform() < 0.5:
        words = f"large {words}"
    elif item.area < 0.012 and rng.uniform() < 0.4:
        words = f"small {words}"
    if item.noun.endswith("books"):
        return words
    return _article(words) if article else words


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def caption(rng: np.random.Generator, theme: str, floor: str, wall: str, items: list[Visible]) -> str:
    """One sentence of at most about 25 words.

    Args:
      theme: such as "living room". floor, wall: such as "wooden floor", "blue walls".
      items: visible objects; empty gives a sentence about the empty room.
    """
    surface = f"with {wall}" if rng.uniform() < 0.5 else f"with {_article(floor)}"
    if not items:
        return f"an empty {theme} {surface}"
    ranked = sorted(items, key=lambda item: -item.area)
    unique: list[Visible] = []
    for item in ranked:
        if item.noun not in {u.noun for u in unique}:
            unique.append(item)
    inside = unique[: int(rng.integers(2, 5))]
    by_index = {item.index: item for item in items}
    stacked = [item for item in ranked if item.support in by_index]
    form = int(rng.integers(7))
    if form == 0 and stacked:
        top = stacked[int(rng.integers(min(2, len(stacked))))]
        host = by_index[top.support]
        return f"{_phrase(top, rng)} on {_phrase(host, rng)} in {_article(theme)} {surface}"
    if form in (1, 2) and len(inside) >= 2:
        a, b = inside[0], inside[1]
        if abs(a.center - b.center) > 0.12:
            side = "left" if a.center < b.center else "right"
            return f"{_phrase(a, rng)} to the {side} of {_phrase(b, rng)} in {_article(theme)} {surface}"
    if form == 3:
        sides = {
            "on the left": [i for i in inside if i.center < 0.4],
            "on the right": [i for i in inside if i.center > 0.6],
        }
        parts = [f"{_phrase(found[0], rng)} {where}" for where, found in sides.items() if found]
        if parts:
            return f"{_article(theme)} {surface}, {_join(parts)}"
    if form == 4:
        same = [i for i in items if i.noun == inside[0].noun]
        if len(same) >= 2 and not inside[0].noun.endswith("s"):
            number = {2: "two", 3: "three", 4: "four"}.get(len(same), "several")
            rest = [_phrase(i, rng) for i in inside[1:3]]
            things = " and ".join([f"{number} {_plural(inside[0].noun)}", *([_join(rest)] if rest else [])])
            return f"{things} in {_article(theme)} {surface}"
    if form == 5:
        return f"{_article(theme)} with {_join([_phrase(i, rng) for i in inside])}"
    return f"{_join([_phrase(i, rng) for i in inside])} in {_article(theme)} {surface}"


def _plural(noun: str) -> str:
    if noun.endswith("shelf"):
        return noun[:-1] + "ves"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
