"""What a caption of a room says, as sets of words that can be compared.

Captions are templates over noun phrases (`data_pipelines.rooms.captions`), so a caption falls apart at its commas and
joining words; a phrase without article, number, size and colour is the name of a thing, a surface or a room.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.rooms.themes import THEMES

# Not the "in" of "built-in wardrobe".
_JOINTS = re.compile(
    r",|(?<![\w-])(?:on the left|on the right|to the left of|to the right of|and|in|with|on)(?![\w-])"
)
_COUNTS = frozenset(("two", "three", "four", "several"))
_SIZES = frozenset(("empty", "large", "small"))
_COLOURS = frozenset(
    ("black", "white", "gray", "brown", "beige", "pink", "red", "orange", "yellow", "green", "turquoise", "blue")
    + ("purple",)
)
_LEADING = frozenset(("a", "an", "the")) | _COUNTS | _SIZES | _COLOURS
_SURFACES = frozenset(("walls", "wallpaper", "floor", "carpet"))
_FUNCTION_WORDS = frozenset(("a", "an", "the", "in", "on", "with", "and", "to", "of"))


class Said(NamedTuple):
    """Of one caption: all content words; the room, or None; the names of things; those of walls and floor."""

    words: frozenset[str]
    room: str | None
    things: frozenset[str]
    surfaces: frozenset[str]


def said(caption: str) -> Said:
    """What a caption says. Any text can be read; what is no caption has words all the same.

    >>> said("two blue chairs and a small lamp in a living room with brick walls").things == {"chair", "lamp"}
    True
    """
    # The text tokenizer sets spaces around hyphens.
    caption = re.sub(r"\s*-\s*", "-", caption.lower())
    room, things, surfaces = None, set(), set()
    for phrase in _JOINTS.split(caption):
        words = phrase.split()
        several = False
        while words and words[0] in _LEADING:
            several |= words.pop(0) in _COUNTS
        name = " ".join(words)
        if not name:
            continue
        if name in THEMES:
            room = room or name
        elif words[-1] in _SURFACES:
            surfaces.add(name)
        else:
            things.add(_singular(name) if several else name)
    words = frozenset(re.findall(r"[a-z0-9-]+", caption)) - _FUNCTION_WORDS
    return Said(words, room, frozenset(things), frozenset(surfaces))


def _singular(name: str) -> str:
    for ending, instead in (("ves", "f"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss"), ("s", "")):
        if name.endswith(ending):
            return name.removesuffix(ending) + instead
    return name


def f1(a: frozenset, b: frozenset) -> float:
    """Twice the common elements over the sizes of both sets; 1 for two empty ones."""
    return 2.0 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def compare(truth: Sequence[str], captions: Sequence[str]) -> dict[str, np.ndarray]:
    """float64 [N] each: F1 of content words, F1 of things, and whether the room is the same (1 or 0).

    A room that the truth names and the caption does not is wrong.
    """
    pairs = [(said(t), said(c)) for t, c in zip(truth, captions, strict=True)]
    return {
        "words": np.array([f1(t.words, c.words) for t, c in pairs]),
        "things": np.array([f1(t.things, c.things) for t, c in pairs]),
        "room": np.array([float(t.room == c.room) for t, c in pairs]),
    }


def typical(captions: Sequence[str]) -> str:
    """The caption whose content words have the highest mean F1 with those of all captions: the best constant one."""
    sets = [said(c).words for c in captions]
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    has = np.zeros((len(sets), len(vocabulary)), np.float32)
    for row, words in zip(has, sets, strict=True):
        row[[vocabulary[word] for word in words]] = 1
    size = has.sum(1)
    scores = 2 * has @ has.T / np.maximum(size[:, None] + size, 1)
    return captions[int(scores.mean(1).argmax())]
