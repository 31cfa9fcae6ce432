"""Numbers with their errors, as a table on the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fm4m.generate import scores

# A number of some of the samples, which are given by their indices: int [n].
Statistic = Callable[[np.ndarray], float]

# What every number is compared with.
COLUMNS = {
    "model": "the model",
    "tokenizer": "the tokenizer's ceiling: the truth, encoded and decoded",
    "constant": "the best guess that looks at no input, from training rooms",
    "enlarged": "what was given, decoded and enlarged (bicubic)",
    "real": "another real sample: training pictures; of captions, that of the room's other view",
}


@dataclasses.dataclass(frozen=True)
class Number:
    """A value and its standard error, NaN where there is none."""

    value: float
    error: float = math.nan


@dataclasses.dataclass(frozen=True)
class Row:
    """One measure.

    Attributes:
      key: in results.json, such as "depth.abs_rel".
      title: in the table.
      better: "lower" or "higher".
      numbers: by column.
      digits: after the point.
    """

    key: str
    title: str
    better: str
    numbers: dict[str, Number]
    digits: int = 3


def mean(values: np.ndarray) -> Statistic:
    """The mean over samples of one value each."""
    return lambda chosen: float(values[chosen].mean())


def number(statistic: Statistic, scenes: Sequence[str]) -> Number:
    """A statistic of all samples with its error, by bootstrap over scenes: views of one room are not independent."""
    return Number(statistic(np.arange(len(scenes))), scores.bootstrap_error(statistic, scenes))


def render(title: str, rows: Sequence[Row]) -> str:
    """A table with aligned columns."""
    used = [c for c in COLUMNS if any(c in row.numbers for row in rows)]
    head = [title, "better", *used]
    lines = [[row.title, row.better, *(_text(row.numbers.get(c), row.digits) for c in used)] for row in rows]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(head), "-" * len(line(head).ljust(sum(widths) + 2 * len(widths) - 2)), *map(line, lines)])


def _text(number: Number | None, digits: int) -> str:
    if number is None:
        return "-"
    error = "" if math.isnan(number.error) else f" ± {number.error:.{digits}f}"
    return f"{number.value:.{digits}f}{error}"


def as_json(rows: Sequence[Row]) -> Mapping[str, Any]:
    """{key: {"better": ..., column: {"value": ..., "error": number or null}}}."""

    def plain(n: Number) -> dict[str, float | None]:
        return {"value": n.value, "error": None if math.isnan(n.error) else n.error}

    return {r.key: {"title": r.title, "better": r.better, **{c: plain(n) for c, n in r.numbers.items()}} for r in rows}
