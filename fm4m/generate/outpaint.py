"""Grows a picture beyond its side: its codes move, and the cells that come free are generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fm4m.generate.canvas import Canvas
from fm4m.generate.ensemble import as_targets
from fm4m.generate.generator import Target
from fm4m.generate.presets import base_name
from fm4m.generate.session import Session
from fm4m.modalities import ModalitySet

SIDES = ("left", "right", "top", "bottom")


def shift(modalities: ModalitySet, canvas: Canvas, name: str, side: str, cells: int) -> Canvas:
    """The canvas with one grid moved away from a side, and the cells that come free there open.

    Args:
      modalities: the model's.
      canvas: B samples.
      name: a given modality of codes.
      side: "left", "right", "top" or "bottom": where the picture grows.
      cells: rows or columns by which it moves; as many are lost on the other side.

    Raises:
      ValueError: another side, a modality that cannot move, or a number of cells that leaves nothing of the picture.
    """
    if side not in SIDES:
        raise ValueError(f"side {side!r} must be one of {', '.join(SIDES)}")
    if name not in canvas.ids or modalities[name].kind != "tokens":
        raise ValueError(f"{name!r} cannot be extended: expected a modality of codes that is given")
    grid = modalities[name].grid
    axis = 2 if side in ("left", "right") else 1
    if not 0 < cells < grid[axis - 1]:
        raise ValueError(f"{name!r} can move by 1 to {grid[axis - 1] - 1} cells to the {side}, not by {cells}")
    growing = slice(None, cells) if side in ("left", "top") else slice(-cells, None)
    step = cells if side in ("left", "top") else -cells
    free = (slice(None),) * axis + (growing,)

    def moved(x: Any) -> np.ndarray:
        rolled = np.roll(np.asarray(x).reshape(-1, *grid), step, axis)
        rolled[free] = 0
        return rolled.reshape(len(rolled), -1)

    return canvas.write(name, jnp.asarray(moved(canvas.ids[name])), jnp.asarray(moved(canvas.seen[name])))


@dataclasses.dataclass(frozen=True)
class Outpainted:
    """A grown picture.

    Attributes:
      canvas: the last window.
      pictures: by extended modality, one picture uint8 [H, W, 3] a sample, larger on the side than the model's.
    """

    canvas: Canvas
    pictures: dict[str, list[np.ndarray]]


def outpaint(
    session: Session,
    inputs: Mapping[str, Any] | Canvas,
    targets: Sequence[str | Target],
    side: str,
    *,
    share: float = 0.5,
    times: int = 1,
    keep: Sequence[str] = ("caption",),
    samples: int = 1,
    seed: int = 0,
) -> Outpainted:
    """Extends pictures by a share of their width or height, ``times`` times.

    Args:
      session: the model with its tokenizers.
      inputs: see `Session.read`, or a canvas, such as one that was just generated; has all targets as codes.
      targets: the grids to extend, by name or as targets; they are moved together and generated in this order.
      side: where the picture grows, see `shift`.
      share: of the picture that is new in one step; a whole number of cells of every target.
      times: steps.
      keep: other given modalities that stay true of the larger picture, such as a caption. All others (boxes, pixels)
        describe the old frame, and are left out.
      samples: results to draw, if ``inputs`` is no canvas.
      seed: of everything drawn; step t uses seed + t.

    Raises:
      ValueError: a target that is not given, or a share that is no whole number of its cells.
    """
    if times < 1:
        raise ValueError(f"times = {times} must be at least 1")
    canvas = inputs if isinstance(inputs, Canvas) else session.read(inputs, samples)
    plans = as_targets(session, targets, ())
    names = [plan.name for plan in plans]
    if not names:
        raise ValueError("nothing to extend: name at least one modality of codes")
    counts = {name: _cells(session, name, side, share) for name in names}
    stay = [n for n in canvas.seen if n in names or n in keep or base_name(n) in keep]
    canvas = Canvas(
        {n: canvas.ids[n] for n in stay if n in canvas.ids}, {n: canvas.seen[n] for n in stay}, canvas.dense
    )
    for name in names:
        if name not in canvas.ids:
            raise ValueError(f"{name!r} cannot be extended: expected a modality of codes that is given")
    pictures = {n: session.cells(canvas, n) for n in names if n in session.showers}
    for step in range(times):
        for name in names:
            canvas = shift(session.modalities, canvas, name, side, counts[name])
        canvas = session.generator(canvas, plans, seed=seed + step)
        for name in pictures:
            grown = zip(pictures[name], session.cells(canvas, name), strict=True)
            pictures[name] = [_joined(old, new, side, share) for old, new in grown]
    return Outpainted(canvas, pictures)


def _cells(session: Session, name: str, side: str, share: float) -> int:
    if side not in SIDES:
        raise ValueError(f"side {side!r} must be one of {', '.join(SIDES)}")
    grid = session.modalities[name].grid
    if not grid:
        raise ValueError(f"{name!r} cannot be extended: it is no grid of codes")
    length = grid[1] if side in ("left", "right") else grid[0]
    if not 0 < share < 1 or abs(share * length - round(share * length)) > 1e-6:
        raise ValueError(
            f"share = {share} must be between 0 and 1 and a whole number of the {length} cells of {name!r}"
        )
    return round(share * length)


def _joined(old: np.ndarray, new: np.ndarray, side: str, share: float) -> np.ndarray:
    """The old picture with the new strip of a window."""
    axis = 1 if side in ("left", "right") else 0
    width = round(new.shape[axis] * share)
    if side in ("left", "top"):
        return np.concatenate([np.take(new, range(width), axis), old], axis)
    return np.concatenate([old, np.take(new, range(new.shape[axis] - width, new.shape[axis]), axis)], axis)
