"""What a run's folder holds, read so that nothing damaged or half-written in it stops the report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from fm4m import goodput

# Files that tell a run's folder from another.
MARKS = ("metrics.jsonl", "config.json", "goodput.json", "environment.json")
_PICTURE = re.compile(r"(\d+)_(.+)\.png")
_PARAMETER = re.compile(r"(\S+)\s+\(([\d, ]*)\)")
# Bytes of a report of one process that are shown.
_TEXT = 20_000


class ReportError(ValueError):
    """A folder that is no run's; the message is one sentence."""


@dataclasses.dataclass
class Run:
    """A run, as far as its files say.

    Attributes:
      name: of the folder; path: as given.
      config: config.json, nested; {} if there is none.
      rows: of metrics.jsonl by step: {"step", name: finite float}.
      attempts: of goodput.json; environments: of environment.json.
      losses: {"start", "frequency", "end"}: validation loss by modality.
      pictures: {name: [(step, path)]}, by step.
      parameters: {group: number of values}, largest first, and the table they were read from.
      skipped: rows of skipped.jsonl. damaged: names of set-aside checkpoints.
      reports: what processes reported at the end of a run, and processes: what they were last doing, by file name.
      earlier_configs: names of config-STEP.json files.
      problems: what could not be read, a sentence each.
    """

    name: str
    path: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    attempts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    environments: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    losses: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    pictures: dict[str, list[tuple[int, epath.Path]]] = dataclasses.field(default_factory=dict)
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)
    parameter_table: str = ""
    skipped: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    damaged: list[str] = dataclasses.field(default_factory=list)
    reports: dict[str, str] = dataclasses.field(default_factory=dict)
    processes: dict[str, str] = dataclasses.field(default_factory=dict)
    earlier_configs: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        """The newest step that any row or attempt knows of."""
        return int(max([0, *(r["step"] for r in self.rows), *(a["step"] for a in self.attempts[-1:])]))

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one metric."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    def modalities(self) -> list[str]:
        """Names of the modalities with any loss, in the order of their appearance."""
        names: dict[str, None] = {}
        for row in self.rows:
            for key in row:
                for prefix in ("train/loss/", "validation/loss/"):
                    if key.startswith(prefix):
                        names[key[len(prefix) :]] = None
        return list(names)

    def key(self, dotted: str) -> Any:
        """A value of the configuration; None where it is not there."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_run(folder: str | os.PathLike) -> Run:
    """Reads a run's folder, which may be one that is still being written. Raises ReportError if it is no run's."""
    path = epath.Path(folder)
    if not path.is_dir():
        raise ReportError(f"there is no folder {os.fspath(path)!r}")
    if not any((path / mark).exists() for mark in MARKS):
        raise ReportError(f"{os.fspath(path)!r} holds no run: it has none of {', '.join(MARKS)}")
    run = Run(name=path.resolve().name, path=os.fspath(path))
    run.config = _object(run, path / "config.json")
    run.rows = [row for row in (_numbers(row) for row in _lines(run, path / "metrics.jsonl")) if row]
    run.attempts = [a for a in goodput.read(path) if sum(a["seconds"].values()) > 0]
    if not run.attempts and _text(run, path / goodput.FILE, 1):
        run.problems.append(f"{goodput.FILE} cannot be read")
    environments = _object(run, path / "environment.json").get("attempts", [])
    run.environments = [e for e in environments if isinstance(e, dict)] if isinstance(environments, list) else []
    _losses(run, _object(run, path / "start.json"))
    for file in _listed(path / "pictures"):
        if match := _PICTURE.fullmatch(file.name):
            run.pictures.setdefault(match[2], []).append((int(match[1]), file))
    for found in run.pictures.values():
        found.sort(key=lambda item: item[0])
    run.parameter_table = _text(run, path / "parameters.txt", 1 << 20)
    for line in run.parameter_table.splitlines():
        if match := _PARAMETER.match(line):
            group = match[1].split("/")[0]
            size = math.prod(int(n) for n in re.findall(r"\d+", match[2]))
            run.parameters[group] = run.parameters.get(group, 0) + size
    run.parameters = dict(sorted(run.parameters.items(), key=lambda item: -item[1]))
    run.skipped = [row for row in _lines(run, path / "skipped.jsonl") if isinstance(row.get("step"), int)]
    for place in (path, path / "checkpoints"):
        run.damaged += [file.name for file in _listed(place) if file.name.startswith("damaged")]
    # Reports and stacks are text; what each process was last doing is JSON, and no fault.
    found = {f.name: _text(run, f, _TEXT) for f in _listed(path / "processes")}
    run.reports = {name: text for name, text in found.items() if name.endswith(".txt")}
    run.processes = {name: text for name, text in found.items() if name.endswith(".json")}
    run.earlier_configs = [f.name for f in _listed(path) if re.fullmatch(r"config-\d+(-\d+)?\.json", f.name)]
    return run


def _listed(folder: epath.Path) -> Sequence[epath.Path]:
    return sorted(folder.iterdir(), key=lambda p: p.name) if folder.is_dir() else []


def _text(run: Run, path: epath.Path, most: int) -> str:
    if not path.exists():
        return ""
    try:
        data = path.read_bytes()
    except OSError as error:
        run.problems.append(f"{path.name} cannot be read: {error.strerror or error}")
        return ""
    more = f"\n... {len(data) - most:,} more bytes" if len(data) > most else ""
    return data[:most].decode(errors="replace") + more


def _object(run: Run, path: epath.Path) -> dict[str, Any]:
    text = _text(run, path, 1 << 26)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        run.problems.append(f"{path.name} is no JSON: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _lines(run: Run, path: epath.Path) -> list[dict[str, Any]]:
    out, bad = [], []
    lines = _text(run, path, 1 << 30).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
            out.append(row)
        except (ValueError, RecursionError):
            if number < len(lines) or line.endswith("\n"):  # the last line may be half-written
                bad.append(number)
    if bad:
        run.problems.append(f"{path.name}: {len(bad)} lines cannot be read, the first is line {bad[0]}")
    return out


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    step = row.get("step")
    if not isinstance(step, int) or not 0 <= step < 2**53:
        return {}
    kept = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "step" and abs(v) < 1e300}
    return {"step": step} | {k: v for k, v in kept.items() if math.isfinite(v)}


def _losses(run: Run, start: dict[str, Any]) -> None:
    for column in ("start", "frequency"):
        if isinstance(values := start.get(column), dict):
            run.losses[column] = {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
    prefix = "validation/loss/"
    found = [row for row in run.rows if any(key.startswith(prefix) for key in row)]
    if found and found[-1]["step"] > 0:
        run.losses["end"] = {key[len(prefix) :]: v for key, v in found[-1].items() if key.startswith(prefix)}
