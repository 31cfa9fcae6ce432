"""Many instances of one picture, where one text of SAM instances has room for a few only.

The text modality ``sam_instance`` tells which instances lie under some points (`fm4m.transforms.sam_instances`). The
reference implementation draws 16 such texts and joins them, every instance as often as it was told; here each is
counted once, with its votes. Instead of the points that the model comes up with, the points can be given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.generate import presets, scores
from fm4m.generate.generator import Target
from fm4m.generate.session import Session
from fm4m.transforms import sam_instances, values
from fm4m.transforms.boxes import Box
from fm4m.transforms.sam_instances import SIZE, Found

# Texts drawn by the reference implementation, which are generated at once.
SAMPLES = 16
# Instances whose boxes overlap at least this much are one and the same.
SAME = 0.8


class Told(NamedTuple):
    """An instance, as the first text tells it, and in how many texts it is."""

    instance: Found
    votes: int


@dataclasses.dataclass(frozen=True)
class Instances:
    """What several texts tell about a picture.

    Attributes:
      told: instances, those with most votes first.
      empty: query points (x, y) under which a text says that there is none.
      malformed: stretches of the texts that are neither a point nor an instance.
    """

    told: tuple[Told, ...]
    empty: tuple[tuple[int, int], ...]
    malformed: int


def dense_instances(
    session: Session,
    inputs: Mapping[str, Any],
    *,
    points: np.ndarray | None = None,
    samples: int = SAMPLES,
    target: Target | None = None,
    seed: int = 0,
) -> Instances:
    """Draws several texts of instances from the same inputs, and joins what they tell.

    Args:
      session: a model with ``sam_instance`` among its outputs, and its text tokenizer.
      inputs: see `Session.read`; without ``sam_instance``.
      points: integers [n, 2] as (x, y), pixels of the picture at `sam_instances.SIZE`, such as `sam_instances
        .grid_points` gives: n texts that begin with one of them each. None: the model chooses points.
      samples: texts at a time, and in all where no points are given.
      target: how a text is generated; default the presets' way, but at a temperature of 1 where the model chooses,
        since equal texts tell nothing new.
      seed: of everything drawn.

    Raises:
      ValueError: another model, a point outside of the picture, no samples; see also `Session.read`.
    """
    name = session.name_of("sam_instance", session.modalities.outputs)
    if samples < 1:
        raise ValueError(f"samples = {samples} must be at least 1")
    given = session.read(inputs, 1)
    if target is None:
        target = presets.target(session.modalities, name, list(given.seen))
        target = target if points is not None else dataclasses.replace(target, temperature=1.0)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), given)
    if points is None:
        return join(session.texts(session.generator(repeated, [target], seed=seed), name))
    prompts, texts = _prompts(session, name, points), []
    for first in range(0, len(prompts), samples):
        # The last batch is filled up, so that one program is compiled.
        part = [prompts[min(first + i, len(prompts) - 1)] for i in range(samples)]
        ids = np.zeros((samples, session.modalities[name].max_tokens), np.int32)
        for row, prompt in zip(ids, part, strict=True):
            row[: len(prompt)] = prompt
        seen = np.arange(ids.shape[1]) < np.array([len(prompt) for prompt in part])[:, None]
        canvas = repeated.write(name, jnp.asarray(ids), jnp.asarray(seen))
        made = session.texts(session.generator(canvas, [target], seed=seed + first), name)
        texts += made[: len(prompts) - first]
    return join(texts)


def _prompts(session: Session, name: str, points: np.ndarray) -> list[list[int]]:
    """The beginnings of texts, as ids."""
    points, (height, width) = np.asarray(points), SIZE
    if points.ndim != 2 or points.shape[1:] != (2,) or not np.issubdtype(points.dtype, np.integer) or not len(points):
        raise ValueError(f"points: expected integers [n, 2], got {points.dtype} {list(points.shape)}")
    if (points < 0).any() or (points >= (width, height)).any():
        raise ValueError(f"points: expected pixels (x, y) of a picture {width} wide and {height} high")
    texts = (f"{sam_instances.POINT} {values.word(0, y)} {values.word(1, x)} [S_1]" for x, y in points.tolist())
    return [session.ids(session.modalities[name], text) for text in texts]


def join(texts: Sequence[str]) -> Instances:
    """What texts tell: each instance once, with the number of texts that tell it."""
    told: list[list] = []
    empty: dict[tuple[int, int], None] = {}
    malformed = 0
    for text in texts:
        parsed = sam_instances.from_text(text)
        malformed += parsed.malformed
        voted: set[int] = set()
        for query in parsed.queries:
            if not query.instances:
                empty[query.x, query.y] = None
            for found in query.instances:
                number = next((i for i, (other, _) in enumerate(told) if _overlap(other, found) >= SAME), len(told))
                if number == len(told):
                    told.append([found, 0])
                if number not in voted:
                    voted.add(number)
                    told[number][1] += 1
    ranked = sorted((Told(*each) for each in told), key=lambda each: -each.votes)
    return Instances(tuple(ranked), tuple(empty), malformed)


def _overlap(one: Found, other: Found) -> float:
    return scores.overlap(Box(*one.box, "one"), Box(*other.box, "other"))


def masks(found: Sequence[Found], tokenizer: Any) -> np.ndarray:
    """Masks of instances, drawn into their boxes: bool [n, height, width] of a picture of `sam_instances.SIZE`.

    Args:
      found: instances.
      tokenizer: of masks, as `fm4m.tokenizers.io.load` gives it (domain "mask"), with as many codes as an instance has.

    Raises:
      ValueError: a tokenizer of another domain or with another number of codes.
    """
    config = tokenizer.config
    cells = config.grid[0] * config.grid[1]
    if config.domain != "mask" or cells != sam_instances.NUM_CODES:
        raise ValueError(
            f"tokenizer {config.name!r} has domain {config.domain!r} and {cells} codes, expected 'mask' and "
            f"{sam_instances.NUM_CODES}"
        )
    out = np.zeros((len(found), *SIZE), bool)
    if not found:
        return out
    decoded = np.asarray(tokenizer.decode(np.array([f.codes for f in found], np.int32))).reshape(
        len(found), *config.image_size
    )
    for mask, shape, each in zip(out, decoded, found, strict=True):
        xmin, ymin, xmax, ymax = (int(v) for v in each.box)
        rows, columns = np.arange(ymin, min(ymax, SIZE[0])), np.arange(xmin, min(xmax, SIZE[1]))
        if len(rows) and len(columns):
            y = (rows - ymin) * shape.shape[0] // (ymax - ymin)
            x = (columns - xmin) * shape.shape[1] // (xmax - xmin)
            mask[np.ix_(rows, columns)] = shape[np.ix_(y, x)] > 0
    return out
