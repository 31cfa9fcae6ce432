"""What a run writes about itself: metrics.jsonl, TensorBoard events, pictures, a progress bar and the final table."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pathlib
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from fm4m import files, flops, goodput, metric_files
from fm4m.masking import Masking
from fm4m.modalities import ModalitySet

log = logging.getLogger("fm4m")


class MetricWriter:
    """Writes metrics of a run to ``<workdir>/metrics.jsonl`` (one JSON object a line) and to whatever else is chosen.

    Args:
      workdir: folder of the run, local or in an object store (see `fm4m.metric_files`).
      active: whether this process writes; one process of a run does, the others call the same methods in vain.
      tensorboard: write event files under ``<workdir>/tensorboard`` too; without tensorboardX a warning says so.
      step: the step the run starts from; lines of later steps, which a preempted run left behind, are dropped.
      wandb: project of Weights & Biases; "" for none.
      config: the configuration as a dict, for Weights & Biases.

    Raises ConfigError if ``wandb`` names a project and no run of it can be begun.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        active: bool = True,
        tensorboard: bool = True,
        step: int = 0,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self._workdir = epath.Path(workdir)
        self._rows = self._events = self._wandb = None
        if not active:
            return
        self._rows = metric_files.Rows(self._workdir / "metrics.jsonl", step)
        if tensorboard:
            try:
                self._events = metric_files.Events(self._workdir, step)
            except ImportError:
                log.warning(
                    "No TensorBoard files: tensorboardX is not installed (or set --config.log.tensorboard=False)"
                )
        if wandb:
            self._wandb = metric_files.WeightsAndBiases(wandb, self._workdir, config or {})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row: numbers by name, such as ``"train/loss/caption"``. One that is not finite is stored as null."""
        if self._rows is None:
            return
        plain = {k: float(v) for k, v in values.items()}
        self._rows.add({"step": step} | {k: v if math.isfinite(v) else None for k, v in plain.items()})
        for sink in (self._events, self._wandb):
            if sink is not None:
                sink.scalars(step, plain)

    def text(self, name: str, text: str) -> None:
        """A text for TensorBoard's text tab, such as the configuration."""
        if self._events is not None:
            self._events.text(name, text)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> list[epath.Path]:
        """Saves uint8 [height, width, 3] pictures as ``<workdir>/pictures/<step>_<name>.png`` and in TensorBoard.

        Returns the files written. Raises ValueError naming the picture if it is something else.
        """
        if self._rows is None:
            return []
        from PIL import Image

        paths = []
        for name, picture in pictures.items():
            picture = np.asarray(picture)
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"picture {name!r} is {picture.dtype} {picture.shape}, expected uint8 [height, width, 3]"
                )
            safe = "".join(c if c.isalnum() or c in "-_.@" else "_" for c in name)
            paths.append(self._workdir / "pictures" / f"{step:08d}_{safe}.png")
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "PNG")
            files.write_whole(paths[-1], encoded.getvalue())
            for sink in (self._events, self._wandb):
                if sink is not None:
                    sink.picture(step, f"pictures/{name}", picture)
        return paths

    def close(self) -> None:
        """Writes what is not written yet."""
        for sink in (self._rows, self._events, self._wandb):
            if sink is not None:
                sink.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl. A last line cut short by a killed process is left out."""
    return metric_files.read_rows(epath.Path(workdir) / "metrics.jsonl")


def device_memory() -> dict[str, float]:
    """GiB of this process's first device: in use now, and the most there was. On CPUs the memory of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        names = {"bytes_in_use": "memory/in_use_gib", "peak_bytes_in_use": "memory/peak_gib"}
        return {name: stats[key] / 2**30 for key, name in names.items() if key in stats}
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    out = {"memory/peak_gib": usage / 2**30}
    with contextlib.suppress(OSError):  # other systems than Linux say the peak only
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
        out = {"memory/in_use_gib": used, "memory/peak_gib": max(used, usage / 2**30)}
    return out


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
    """Sums the values of the steps between two lines of metrics, and the time they took: steps and waits for input."""

    def __init__(
        self,
        model: Any,
        modalities: ModalitySet,
        masking: Masking,
        batch: int,
        peak: float,
        clock: goodput.Clock,
    ):
        self._model, self._modalities, self._batch, self._peak = model, modalities, batch, peak
        self._masking, self._slots = masking, (masking.input_range[1], masking.target_range[1])
        self._values: list[dict[str, np.ndarray]] = []
        self._clock, self._before = clock, clock.read()

    def add(self, values: dict[str, np.ndarray]) -> None:
        self._values.append(values)

    def close(self) -> dict[str, float]:
        """The row of metrics, and a new window. Skipped steps count for everything but loss and gradient norm."""
        now = self._clock.read()
        steps, waits = (now[cause] - self._before[cause] for cause in ("step", "data"))
        seconds = max(steps + waits, 1e-9)
        values, count = self._values, len(self._values)
        kept = [v for v in values if not v["skipped"]]
        counts = np.sum([v["counts"] for v in values], axis=0, dtype=np.float64)
        # Of no step at all, nan.
        mean = lambda name: np.mean([v[name] for v in kept]) if kept else np.nan  # noqa: E731
        of = {n: self._modalities.index(n) for n in self._modalities.outputs}
        samples = self._batch * count
        work = flops.step_flops(self._model, self._modalities, self._masking, samples, counts)
        row = {"train/loss": mean("loss")}
        if kept:
            sums, own = (np.sum([v[k] for v in kept], axis=0, dtype=np.float64) for k in ("sums", "counts"))
            row |= {f"train/loss/{n}": sums[i] / own[i] for n, i in of.items() if own[i]}
        row |= {f"train/targets_per_sample/{n}": counts[i] / samples for n, i in of.items()}
        row |= {
            "train/skipped": count - len(kept),
            "optimizer/lr": values[-1]["lr"],
            "optimizer/grad_norm": mean("grad_norm"),
            "data/filled_inputs": np.mean([v["inputs"] for v in values]),
            "data/filled_targets": np.mean([v["targets"] for v in values]),
            "speed/samples_per_s": samples / seconds,
            "speed/tokens_per_s": samples * sum(self._slots) / seconds,
            "speed/step_s": seconds / count,
            "speed/input_wait_s": waits / count,
            "speed/mfu": work / seconds / self._peak,
        }
        self._values, self._before = [], now
        return {k: float(v) for k, v in row.items()}
