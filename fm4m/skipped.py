"""Steps that were skipped because their loss or gradient was not finite: named, counted, and ended if they go on.

``<workdir>/skipped.jsonl`` holds a line for each: {"step", "position" (of the first sample in the stream), "positions"
(how many samples), "loss", "grad_norm", "modalities" (whose loss is not finite)}. JSON has no NaN: a number that is not
finite is the text "nan", "inf" or "-inf", which `float` reads.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from fm4m import metric_files
from fm4m.modalities import ModalitySet

log = logging.getLogger("fm4m")

NAME = "skipped.jsonl"


class SkippedSteps:
    """Looks at the values of every step of one attempt of a run, in order.

    How many were skipped in a row is counted from the attempt's first step: a run that is interrupted among them is
    ended by so many more.

    Args:
      config: the run's; ``train.max_skipped`` and ``train.global_batch`` count.
      modalities: the modality set.
      workdir: folder of the run.
      first: steps made before this attempt; lines of later ones in the file are dropped, as they are made again.
      position: the stream's position after them.
      active: whether this process logs and writes.
    """

    def __init__(
        self,
        config: Any,
        modalities: ModalitySet,
        workdir: str | os.PathLike,
        first: int,
        position: int,
        *,
        active: bool = True,
    ):
        self._most, self._batch = config.train.max_skipped, config.train.global_batch
        self._names, self._workdir, self._active = modalities.names, epath.Path(workdir), active
        self._first, self._position = first, position
        self.in_a_row = 0
        self._rows = None
        if active and (self._workdir / NAME).exists():
            self._rows = metric_files.Rows(self._workdir / NAME, first)

    def look(self, step: int, values: Mapping[str, np.ndarray], newest: Callable[[], int | None]) -> None:
        """Logs and stores a step if it was skipped.

        Args:
          step: its number; the run's first is 1.
          values: what the step returned, on the host.
          newest: gives the step of the newest checkpoint.

        Raises FloatingPointError if more than ``train.max_skipped`` in a row were.
        """
        if not values["skipped"]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        position = self._position + (step - 1 - self._first) * self._batch
        bad = [name for i, name in enumerate(self._names) if not np.isfinite(values["sums"][i])]
        what = f"loss {values['loss']}, gradient norm {values['grad_norm']}, not finite in: "
        what += ", ".join(bad) or "the gradient only"
        if self._active:
            log.warning("step %d is skipped: %s; samples %d to %d of the stream", step, what, position,
                        position + self._batch - 1)  # fmt: skip
            self._store({
                "step": step, "position": position, "positions": self._batch, "loss": number(values["loss"]),
                "grad_norm": number(values["grad_norm"]), "modalities": bad,
            })  # fmt: skip
        if self.in_a_row > self._most:
            begin = step - self.in_a_row + 1
            start = position - (self.in_a_row - 1) * self._batch
            which = f"step {step}: " if begin == step else f"steps {begin} to {step}, the last one: "
            saved = newest()
            raise FloatingPointError(
                f"{which}{what}; {self.in_a_row} in a row were skipped, and train.max_skipped = {self._most}. Samples "
                f"{start} to {position + self._batch - 1} of the stream; the newest checkpoint is "
                f"{'none' if saved is None else f'step {saved}'}. To look into the first: "
                f"python -m fm4m.replay --workdir={self._workdir} --step={begin}. If the data are sound, lower "
                "optimizer.blr, lengthen optimizer.warmup, or set optimizer.clip_norm"
            )

    def _store(self, row: Mapping[str, Any]) -> None:
        if self._rows is None:
            self._rows = metric_files.Rows(self._workdir / NAME, self._first)
        self._rows.add(row)

    def close(self) -> None:
        """Writes what is not written yet."""
        if self._rows is not None:
            self._rows.close()


def number(value: Any) -> float | str:
    """A number for JSON, as the module says."""
    value = float(value)
    return value if math.isfinite(value) else str(value)
