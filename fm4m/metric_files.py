"""Where metrics go: lines of JSON, TensorBoard events, Weights & Biases; in local folders and in object stores.

Object stores have neither appending nor renaming. There, rows are kept and their file is written whole again at
intervals; TensorBoard events are written to a local file that is copied at the same intervals. A process that is killed
loses what came after the last copy, at most `INTERVAL` seconds of it in most runs; the run itself continues from its
checkpoint and makes those rows again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from fm4m import config as config_lib
from fm4m import files

log = logging.getLogger("fm4m")

# Seconds between two copies to an object store; longer where a copy takes so long that it would hold the loop up.
INTERVAL = 60.0
# Largest share of the time that copies may take.
SHARE = 0.01


class Interval:
    """Says when a copy is due: every `INTERVAL` seconds, or 1 / `SHARE` times as long as the last one took."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now, self._next = now, now() + INTERVAL

    def due(self) -> bool:
        """Whether it is time."""
        return self._now() >= self._next

    @contextlib.contextmanager
    def copying(self) -> Any:
        """A context around a copy."""
        begin = self._now()
        yield
        end = self._now()
        self._next = end + max(INTERVAL, (end - begin) / SHARE)


class Rows:
    """``metrics.jsonl`` of a run: lines of later steps than ``step``, which a killed attempt left, are dropped."""

    def __init__(self, path: epath.Path, step: int, now: Callable[[], float] = time.monotonic):
        self._path, self._file = path, None
        rows = read_rows(path) if path.exists() else []
        self._lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
        if files.is_remote(path):
            self._interval, self._new = Interval(now), len(self._lines) < len(rows)
            return
        files.write_whole(path, "".join(self._lines))
        self._file, self._lines = path.open("a"), []

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends one row."""
        line = json.dumps(row) + "\n"
        if self._file is not None:
            with files.writing(self._path):
                self._file.write(line)
                self._file.flush()
            return
        self._lines.append(line)
        self._new = True
        if self._interval.due():
            self._copy()

    def close(self) -> None:
        """Writes what is not written yet."""
        if self._file is not None:
            self._file.close()
        elif self._new:
            self._copy()

    def _copy(self) -> None:
        with self._interval.copying():
            files.write_whole(self._path, "".join(self._lines))
        self._new = False


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file. A last line cut short by a killed process is left out."""
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


class Events:
    """TensorBoard events in ``<workdir>/tensorboard``, by tensorboardX (imported here; raises ImportError without it).

    In an object store pictures are left out, since the file is copied whole again and again; they lie in ``pictures/``.
    """

    def __init__(self, workdir: epath.Path, step: int, now: Callable[[], float] = time.monotonic):
        import tensorboardX

        self._target, self._local = workdir / "tensorboard", None
        folder = os.fspath(self._target)
        if files.is_remote(workdir):
            # tensorboardX's own writer for gs:// needs google-cloud-storage and uploads the file at every flush.
            self._local, self._interval = tempfile.TemporaryDirectory(), Interval(now)
            folder = self._local.name
        # purge_step hides the events that a preempted run left behind.
        self._writer = tensorboardX.SummaryWriter(folder, purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event a number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._local is not None and self._interval.due():
            self._copy()

    def text(self, name: str, text: str) -> None:
        """A text for the text tab."""
        self._writer.add_text(name, text)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A uint8 [height, width, 3] picture."""
        if self._local is None:
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is not written yet."""
        self._writer.close()
        if self._local is not None:
            self._copy()
            self._local.cleanup()

    def _copy(self) -> None:
        with self._interval.copying():
            self._writer.flush()
            for name in os.listdir(self._local.name):
                with open(os.path.join(self._local.name, name), "rb") as file:
                    files.write_whole(self._target / name, file.read())


def require_wandb(project: str) -> None:
    """Raises ConfigError if ``config.log.wandb`` names a project and the package wandb is not installed."""
    import importlib.util

    if project and importlib.util.find_spec("wandb") is None:
        raise config_lib.ConfigError(
            f"log.wandb = {project!r}: the package wandb is not installed; pip install '.[wandb]', or set log.wandb "
            "to ''"
        )


class WeightsAndBiases:
    """A run of Weights & Biases. Its id is kept in ``<workdir>/wandb.json``, so that a resumed run continues it.

    With WANDB_MODE=offline nothing is sent; ``wandb sync`` does it later.

    Raises ConfigError if the package is missing or a run cannot be begun (no login, no network).
    """

    def __init__(self, project: str, workdir: epath.Path, config: Mapping[str, Any]):
        require_wandb(project)
        import wandb

        path = workdir / "wandb.json"
        if path.exists():
            run_id = json.loads(path.read_text())["id"]
        else:
            run_id = uuid.uuid4().hex[:12]
            files.write_whole(path, json.dumps({"project": project, "id": run_id}) + "\n")
        self._local = tempfile.TemporaryDirectory() if files.is_remote(workdir) else None
        folder = self._local.name if self._local else os.fspath(workdir)
        try:
            self._run = wandb.init(
                project=project, id=run_id, name=workdir.name, resume="allow", dir=folder, config=dict(config)
            )
        except wandb.errors.Error as error:
            raise config_lib.ConfigError(
                f"log.wandb = {project!r}: {error} (log in with 'wandb login', set WANDB_MODE=offline, or set it to '')"
            ) from error
        # W&B's own step may not go back, which it does after a kill: the rows since the last checkpoint come again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._image = wandb.Image

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A uint8 [height, width, 3] picture."""
        self._run.log({"step": step, name: self._image(picture)})

    def close(self) -> None:
        """Ends the run; waits until everything is sent."""
        self._run.finish()
        if self._local is not None:
            self._local.cleanup()
