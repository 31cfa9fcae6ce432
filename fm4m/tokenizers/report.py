"""What a tokenizer's training says about itself: metrics between two lines of a log, numbers and pictures."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from fm4m.tokenizers import quantize, reconstruction
from fm4m.tokenizers.tokenizer import Tokenizer

SHEET_COLUMNS = 8
# Pictures smaller than this are enlarged.
SHEET_SIDE = 128


class Window:
    """Sums the values of the steps between two lines of metrics, and the time they took without pauses."""

    def __init__(self, batch: int):
        self._batch, self._values = batch, []
        self._start, self._paused, self._since = time.perf_counter(), 0.0, 0.0

    def add(self, values: dict[str, np.ndarray]) -> None:
        """One step's metrics, on the host."""
        self._values.append(values)

    def pause(self) -> None:
        """Time from here to `resume` does not count."""
        self._since = time.perf_counter()

    def resume(self) -> None:
        """Ends a pause."""
        self._paused += time.perf_counter() - self._since

    def close(self) -> dict[str, float]:
        """The row of metrics, and a new window. Codes are counted over all steps of it that had any."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        values, count = self._values, len(self._values)
        means = ("loss", "reconstruction", "commitment", "perceptual")
        row = {f"train/{n}": np.mean([v[n] for v in values]) for n in means if n in values[0]}
        if counts := [v["counts"] for v in values if "counts" in v]:
            use, perplexity = quantize.usage(np.sum(counts, axis=0, dtype=np.float64))
            row |= {"codebook/use": use, "codebook/perplexity": perplexity}
        row |= {
            "optimizer/lr": values[-1]["lr"],
            "optimizer/grad_norm": np.mean([v["grad_norm"] for v in values]),
            "speed/arrays_per_s": self._batch * count / seconds,
            "speed/step_s": seconds / count,
        }
        self._values, self._start, self._paused = [], time.perf_counter(), 0.0
        return {k: float(v) for k, v in row.items()}


def evaluate(tokenizer: Tokenizer, arrays: np.ndarray) -> dict[str, float]:
    """Reconstruction numbers of the domain, codebook use (share) and perplexity on held-out arrays [N, ...]."""
    codes = tokenizer.encode(arrays)
    numbers = reconstruction.measure(tokenizer.config, tokenizer.stats, arrays, tokenizer.decode(codes))
    # The codes of one cell, one of each codebook, stand beside each other.
    book, books = np.arange(codes.shape[1]) % tokenizer.config.num_codebooks, tokenizer.config.num_codebooks
    counts = np.bincount((codes + book * tokenizer.vocab_size).ravel(), minlength=books * tokenizer.vocab_size)
    used, perplexity = quantize.usage(counts)
    return numbers | {"codebook_use": float(used), "perplexity": float(perplexity)}


def picture_sheet(tokenizer: Tokenizer, arrays: np.ndarray) -> np.ndarray:
    """Inputs above their reconstructions, two bands of eight, uint8 [rows, columns, 3]."""
    arrays = arrays[: 2 * SHEET_COLUMNS]
    top, bottom = tokenizer.to_picture(arrays), tokenizer.to_picture(tokenizer.decode(tokenizer.encode(arrays)))
    scale = -(-SHEET_SIDE // top.shape[1])
    bands = []
    for start in range(0, len(arrays), SHEET_COLUMNS):
        for pictures in (top, bottom):
            row: Any = np.concatenate(list(pictures[start : start + SHEET_COLUMNS]), axis=1)
            row = np.pad(row, ((0, 0), (0, SHEET_COLUMNS * top.shape[2] - row.shape[1]), (0, 0)))
            bands.append(row.repeat(scale, axis=0).repeat(scale, axis=1))
    return np.concatenate(bands)
