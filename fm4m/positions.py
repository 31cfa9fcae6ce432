"""Sine-cosine position embeddings, as constants (4M, section 3; the formulas of the reference implementation)."""

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


def sincos_1d(length: int, dim: int) -> np.ndarray:
    """float64 [length, dim] for positions 0..length-1."""
    return sincos(np.arange(length), dim)


def sincos_2d(grid: tuple[int, int], dim: int) -> np.ndarray:
    """float64 [rows * columns, dim] in row-major order: half of the width embeds the row, the other half the column.

    Raises ValueError if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sine-cosine embedding needs a width that is a multiple of 4, got {dim}")
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.concatenate([sincos(row, dim // 2), sincos(column, dim // 2)], axis=-1)


@functools.lru_cache(maxsize=16)
def fixed_position_table(modalities: ModalitySet, dim: int) -> np.ndarray:
    """float32 [position_rows - learned_position_rows, dim]: the constant part of a modality set's position table."""
    parts = [np.zeros((0, dim))]
    for block in modalities.position_blocks:
        if block.kind == "1d":
            parts.append(sincos_1d(block.rows, dim))
        elif block.kind == "2d":
            parts.append(sincos_2d(block.grid, dim))
    table = np.concatenate(parts).astype(np.float32)
    table.setflags(write=False)
    return table
