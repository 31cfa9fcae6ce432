"""What a run writes about itself: metrics.jsonl, TensorBoard events, pictures, a progress bar and the final table."""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fm4m import flops
from fm4m.masking import Masking
from fm4m.modalities import ModalitySet

log = logging.getLogger("fm4m")


class MetricWriter:
    """Writes metrics of a run to ``<workdir>/metrics.jsonl`` (one JSON object a line) and to TensorBoard event files.

    Args:
      workdir: folder of the run.
      active: whether this process writes; one process of a run does, the others call the same methods in vain.
      tensorboard: write event files under ``<workdir>/tensorboard`` too; without tensorboardX a warning says so.
      step: the step the run starts from; lines of later steps, which a preempted run left behind, are dropped.
    """

    def __init__(self, workdir: str | os.PathLike, *, active: bool = True, tensorboard: bool = True, step: int = 0):
        self._workdir = pathlib.Path(workdir)
        self._file = self._events = None
        if not active:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / "metrics.jsonl"
        if path.exists():
            kept = [json.dumps(row) for row in read_metrics(workdir) if row["step"] <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(path)
        self._file = path.open("a")
        if tensorboard:
            try:
                import tensorboardX
            except ImportError:
                log.warning(
                    "No TensorBoard files: tensorboardX is not installed (or set --config.log.tensorboard=False)"
                )
            else:
                # purge_step hides the events that a preempted run left behind.
                self._events = tensorboardX.SummaryWriter(
                    str(self._workdir / "tensorboard"), purge_step=step + 1 if step else None
                )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row: numbers by name, such as ``"train/loss/caption"``. One that is not finite is stored as null."""
        if self._file is None:
            return
        plain = {k: float(v) for k, v in values.items()}
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in plain.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in plain.items():
                self._events.add_scalar(name, value, step)

    def text(self, name: str, text: str) -> None:
        """A text for TensorBoard's text tab, such as the configuration."""
        if self._events is not None:
            self._events.add_text(name, text)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> list[pathlib.Path]:
        """Saves uint8 [height, width, 3] pictures as ``<workdir>/pictures/<step>_<name>.png`` and in TensorBoard.

        Returns the files written. Raises ValueError naming the picture if it is something else.
        """
        if self._file is None:
            return []
        from PIL import Image

        folder = self._workdir / "pictures"
        folder.mkdir(exist_ok=True)
        files = []
        for name, picture in pictures.items():
            picture = np.asarray(picture)
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"picture {name!r} is {picture.dtype} {picture.shape}, expected uint8 [height, width, 3]"
                )
            safe = "".join(c if c.isalnum() or c in "-_.@" else "_" for c in name)
            files.append(folder / f"{step:08d}_{safe}.png")
            Image.fromarray(picture).save(files[-1])
            if self._events is not None:
                self._events.add_image(f"pictures/{name}", picture, step, dataformats="HWC")
        return files

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl. A last line cut short by a killed process is left out."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


class Progress:
    """A tqdm bar where standard error is a terminal, else a plain line of the log at every `report`."""

    def __init__(self, total: int, start: int = 0, *, active: bool = True, bar: bool = True):
        self._active, self._total, self._bar = active, total, None
        if active and bar and sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif self._active:
            log.info("step %d/%d  %s", step, self._total, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def loss_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table as text: a line for each modality, a column for each kind of loss (nats a token), and the mean.

    Args:
      rows: column title -> {modality: loss}; NaN (no tokens of it) and missing entries show as "-" and are no part of
        the mean, so compare means only between columns that have the same lines.
    """
    names = list(dict.fromkeys(name for column in rows.values() for name in column))
    width = max([len("modality")] + [len(n) for n in names])
    widths = {title: max(len(title), 8) for title in rows}

    def line(name: str, cells: Mapping[str, str]) -> str:
        return name.ljust(width) + "".join("  " + cells[t].rjust(widths[t]) for t in rows)

    def show(value: float) -> str:
        return f"{value:.4f}" if math.isfinite(value) else "-"

    out = [line("modality", {t: t for t in rows})]
    out.append("-" * len(out[0]))
    out += [line(n, {t: show(column.get(n, math.nan)) for t, column in rows.items()}) for n in names]
    means = {t: mean_loss(column) for t, column in rows.items()}
    return "\n".join([*out, "-" * len(out[0]), line("mean", {t: show(v) for t, v in means.items()})])


def mean_loss(losses: Mapping[str, float]) -> float:
    """Mean over the modalities that have a loss; NaN if none has."""
    finite = [v for v in losses.values() if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


class Window:
    """Sums the values of the steps between two lines of metrics, and the time they took without pauses."""

    def __init__(self, model: Any, modalities: ModalitySet, masking: Masking, batch: int, peak: float):
        self._model, self._modalities, self._batch, self._peak = model, modalities, batch, peak
        self._masking, self._slots = masking, (masking.input_range[1], masking.target_range[1])
        self._values: list[dict[str, np.ndarray]] = []
        self._start, self._paused = time.perf_counter(), 0.0

    def add(self, values: dict[str, np.ndarray]) -> None:
        self._values.append(values)

    def pause(self) -> None:
        self._pause_start = time.perf_counter()

    def resume(self) -> None:
        self._paused += time.perf_counter() - self._pause_start

    def close(self) -> dict[str, float]:
        """The row of metrics, and a new window."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        values, count = self._values, len(self._values)
        sums, counts = (np.sum([v[k] for v in values], axis=0, dtype=np.float64) for k in ("sums", "counts"))
        of = {n: self._modalities.index(n) for n in self._modalities.outputs}
        samples = self._batch * count
        work = flops.step_flops(self._model, self._modalities, self._masking, samples, counts)
        row = {"train/loss": np.mean([v["loss"] for v in values])}
        row |= {f"train/loss/{n}": sums[i] / counts[i] for n, i in of.items() if counts[i]}
        row |= {f"train/targets_per_sample/{n}": counts[i] / samples for n, i in of.items()}
        row |= {
            "optimizer/lr": values[-1]["lr"],
            "optimizer/grad_norm": np.mean([v["grad_norm"] for v in values]),
            "data/filled_inputs": np.mean([v["inputs"] for v in values]),
            "data/filled_targets": np.mean([v["targets"] for v in values]),
            "speed/samples_per_s": samples / seconds,
            "speed/tokens_per_s": samples * sum(self._slots) / seconds,
            "speed/step_s": seconds / count,
            "speed/mfu": work / seconds / self._peak,
        }
        self._values, self._start, self._paused = [], time.perf_counter(), 0.0
        return {k: float(v) for k, v in row.items()}
