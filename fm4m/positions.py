"""Position embeddings as constants: the reference implementation's sine-cosine tables, and others."""

from __future__ import annotations

import functools

import numpy as np

from fm4m.modalities import ModalitySet


def sincos(positions: np.ndarray, dim: int) -> np.ndarray:
    """float64 [..., dim] of one coordinate: sines, then cosines, of position / 10000^(i / (dim/2)).

    Raises ValueError if ``dim`` is odd.
    """
    if dim % 2:
        raise ValueError(f"a sine-cosine embedding needs an even width, got {dim}")
    omega = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    angle = np.asarray(positions, np.float64)[..., None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def fourier(positions: np.ndarray, dim: int) -> np.ndarray:
    """float64 [..., dim] of one coordinate: sines, then cosines, of dim/2 frequencies spread evenly up to half a cycle.

    The product of two embeddings is about 0 for any two different whole positions below dim/2, where most frequencies
    of `sincos` are so low that neighbours are almost the same vector (0.97 of the largest product at width 64). For
    positions a fraction d apart it is about sin(pi d) / (pi d) of the largest.

    Raises ValueError if ``dim`` is odd, or a position is dim/2 or more: embeddings would repeat.
    """
    if dim % 2 or np.max(positions, initial=0) >= dim // 2:
        raise ValueError(f"positions up to {np.max(positions, initial=0)} need an even width of more than twice that")
    omega = np.pi * (np.arange(dim // 2) + 0.5) / (dim // 2)
    angle = np.asarray(positions, np.float64)[..., None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


COORDINATES = {"sincos": sincos, "fourier": fourier}


def sincos_1d(length: int, dim: int) -> np.ndarray:
    """float64 [length, dim] for positions 0..length-1."""
    return sincos(np.arange(length), dim)


def grid_positions(
    grid: tuple[int, int], dim: int, kind: str = "sincos", unit: tuple[int, int] | None = None
) -> np.ndarray:
    """float64 [rows * columns, dim] in row-major order: half of the width embeds the row, the other half the column.

    Args:
      grid: rows and columns.
      dim: the width.
      kind: one of `COORDINATES`.
      unit: another grid over the same picture in whose cells positions are counted, from the centre of its first one;
        default ``grid`` itself.

    Raises ValueError if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sine-cosine embedding needs a width that is a multiple of 4, got {dim}")
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    if unit is not None:
        row, column = (((x + 0.5) * u / n - 0.5) for x, u, n in zip((row, column), unit, grid, strict=True))
    embed = COORDINATES[kind]
    return np.concatenate([embed(row, dim // 2), embed(column, dim // 2)], axis=-1)


def shared_unit(modalities: ModalitySet, kind: str) -> tuple[int, int] | None:
    """The ``unit`` of a modality set's grids: none for "sincos", as in the reference implementation.

    For "fourier" the smallest grid, so that the same place in a picture has about the same position in all of them, and
    cells of different grids can find each other.
    """
    grids = [block.grid for block in modalities.position_blocks if block.kind == "2d"]
    if kind == "sincos" or not grids:
        return None
    return min(rows for rows, _ in grids), min(columns for _, columns in grids)


@functools.lru_cache(maxsize=16)
def fixed_position_table(modalities: ModalitySet, dim: int, grids: str = "sincos") -> np.ndarray:
    """float32 [position_rows - learned_position_rows, dim]: the constant part of a modality set's position table.

    ``grids`` is the kind of `grid_positions`; sequences always have sine-cosine positions.
    """
    unit = shared_unit(modalities, grids)
    parts = [np.zeros((0, dim))]
    for block in modalities.position_blocks:
        if block.kind == "1d":
            parts.append(sincos_1d(block.rows, dim))
        elif block.kind == "2d":
            parts.append(grid_positions(block.grid, dim, grids, unit))
    table = np.concatenate(parts).astype(np.float32)
    table.setflags(write=False)
    return table
