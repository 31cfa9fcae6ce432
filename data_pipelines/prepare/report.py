"""What a preparation tells: its progress, the sentences at its end, and the files of its report."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from data_pipelines.prepare.errors import Problem
from data_pipelines.prepare.parts import Counts
from data_pipelines.prepare.writer import QUARANTINE, write_line
from fm4m.files import complete_folder

REPORT = "report.json"
# Seconds between lines where the output is no terminal.
_QUIET = 15.0


class Progress:
    """Samples done, rate, time left and quarantined samples: one line that is written over, or a line now and then.

    Args:
      total: samples of the run.
      done: samples of parts that an earlier command finished; they do not count for the rate.
      quarantined: samples of these parts that were left out.
      unit: what is counted.
      file: where the lines go.
    """

    def __init__(
        self, total: int, done: int = 0, quarantined: int = 0, unit: str = "samples", file: TextIO | None = None
    ):
        self._total, self._before, self._now, self._quarantined, self._unit = total, done, 0, quarantined, unit
        self._file = file or sys.stderr
        self._start = self._last = time.monotonic()
        self._drawn = False

    def add(self, samples: int, quarantined: int) -> None:
        """Some more samples were read; a part that is made again takes its samples back (negative numbers)."""
        self._now += samples
        self._quarantined += quarantined
        interval = 0.2 if self._file.isatty() else _QUIET
        if time.monotonic() - self._last >= interval:
            self._last = time.monotonic()
            self._draw()

    def line(self) -> str:
        """The line as it is now."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        done, rate = self._before + self._now, self._now / seconds
        share = 100 * done // self._total if self._total else 100
        left = f", {_duration((self._total - done) / rate)} left" if rate > 0 and seconds > 1 else ""
        return (
            f"{done:,} of {self._total:,} {self._unit} ({share} %), {rate:,.1f}/s{left}, "
            f"{self._quarantined:,} quarantined"
        )

    def say(self, text: str) -> None:
        """Writes a sentence on a line of its own."""
        self._end_line()
        print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Draws the last line."""
        self._draw()
        self._end_line()

    def _draw(self) -> None:
        if self._file.isatty():
            print(f"\r{self.line():<100}", end="", file=self._file, flush=True)
            self._drawn = True
        else:
            print(self.line(), file=self._file, flush=True)

    def _end_line(self) -> None:
        if self._drawn:
            print(file=self._file)
            self._drawn = False


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def write_report(
    folder: pathlib.Path,
    parts: Sequence[tuple[pathlib.Path, Mapping]],
    problems: Mapping[str, Iterable[Problem]],
    about: Mapping[str, Any],
) -> dict:
    """Writes ``report.json`` (counts) and ``quarantine.jsonl`` (one line for everything left out, with its reason).

    A line has key, reason, sentence and origin, and ``modality`` if the sample is in the set and lacks only that.

    Args:
      folder: of the report; replaced if it exists.
      parts: folders of the parts with what their part.json hold, in order.
      problems: what the sources found while they were listed, by origin.
      about: more entries of report.json.

    Returns:
      What report.json holds.
    """
    counts, splits = Counts(), {}
    for _, part in parts:
        counts.add(part["counts"])
        for split, found in part["splits"].items():
            splits[split] = splits.get(split, 0) + found["records"]
    listed: dict[str, int] = {}
    shutil.rmtree(folder, ignore_errors=True)
    with complete_folder(folder) as beside:
        with (beside / QUARANTINE).open("w") as file:
            for origin, found in problems.items():
                for problem in found:
                    listed[problem.reason] = listed.get(problem.reason, 0) + 1
                    write_line(file, {**problem._asdict(), "origin": origin, "listing": True})
            for path, _ in parts:
                with (path / QUARANTINE).open() as part_file:
                    shutil.copyfileobj(part_file, file)
        report = {**about, **counts.to_dict(), "listing": dict(sorted(listed.items())), "records": splits}
        (beside / REPORT).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    return report


def summary(report: Mapping[str, Any], folder: pathlib.Path) -> str:
    """The report in a few lines."""
    records = ", ".join(f"{n:,} in {split}" for split, n in sorted(report["records"].items()))
    lines = [f"{report['read']:,} samples read; records: {records or 'none'}"]
    if report["quarantined"]:
        lines.append(f"quarantined: {sum(report['quarantined'].values()):,} ({_reasons(report['quarantined'])})")
    for name, reasons in report["missing"].items():
        lines.append(f"without {name}: {sum(reasons.values()):,} ({_reasons(reasons)})")
    for what, key in (("mended or noted", "notes"), ("found while listing", "listing")):
        if report[key]:
            lines.append(f"{what}: {_reasons(report[key])}")
    lines.append(f"report: {folder / REPORT}, {folder / QUARANTINE}")
    return "\n".join(lines)


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
