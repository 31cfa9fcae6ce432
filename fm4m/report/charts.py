"""Curves as inline SVG. Values under the pointer are shown by the page's script, from the ``data-chart`` attribute."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Sequence

# More points than this are averaged in equal groups: more than the width of a curve in pixels shows nothing.
MOST_POINTS = 800
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 24


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: points (step, value) by step, a CSS colour, and "line", "dashed", "dots" or "level" (one value)."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    kind: str = "line"


def chart(
    title: str,
    series: Sequence[Series],
    *,
    width: int = 360,
    height: int = 190,
    note: str = "",
    legend: bool = True,
    axis: str = "",
) -> str:
    """A figure with all series that have points; "" if none has.

    The value axis fits the values; with ``axis="zero"`` it starts at 0, with "log" it is logarithmic where positive
    values span two decades.
    """
    series = [dataclasses.replace(s, points=thin(s.points)) for s in series if s.points]
    if not series:
        return ""
    drawn = [s for s in series if s.kind != "level"] or series
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    logarithmic = axis == "log" and min(ys) > 0 and max(ys) / min(ys) > 100
    turn = math.log10 if logarithmic else float
    low, high = turn(min(ys)), turn(max(ys))
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    from_zero = low >= 0 and not logarithmic and (axis == "zero" or low - room < 0)
    y0, y1 = 0.0 if from_zero else low - room, high + room

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT),
            height - BOTTOM - (turn(y) - y0) / (y1 - y0) * (height - TOP - BOTTOM),
        )

    parts = []
    for value in _log_ticks(y0, y1) if logarithmic else ticks(y0, y1, max(3, height // 45)):
        _, y = at(x0, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(x0, x1, max(3, width // 110)):
        x, _ = at(value, ys[0])
        parts.append(f'<text x="{x:.1f}" y="{height - 7}" text-anchor="middle">{number(value)}</text>')
    base = height - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>')
    parts += [_drawn(s, at, width) for s in series]
    parts.append(f'<line class="cross" y1="{TOP}" y2="{base}" visibility="hidden"/>')
    listed = [{"n": s.name, "c": s.colour, "k": s.kind, "p": [[x, _short(y)] for x, y in s.points]} for s in series]
    data = {"x": [x0, x1], "px": [LEFT, width - RIGHT], "series": listed}
    # One entry a colour: a run's lines and dots share it.
    keys = "".join(
        f'<span class="key"><i class="{s.kind}" style="--c:{s.colour}"></i>{html.escape(s.name)}</span>'
        for s in reversed({s.colour: s for s in series[::-1]}.values())
    )
    shown = f'<span class="legend">{keys}</span>' if legend and len(series) > 1 else ""
    note = f'<span class="note">{html.escape(note)}</span>' if note else ""
    attribute = html.escape(json.dumps(data, separators=(",", ":")), quote=True)
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(title)}</b>{note}{shown}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title, quote=True)}" '
        f'data-chart="{attribute}">{"".join(parts)}</svg></figure>'
    )


def _drawn(series: Series, at, width: int) -> str:
    style = f'style="--c:{series.colour}"'
    if series.kind == "level":
        y = at(0, series.points[-1][1])[1]
        return f'<line class="level" {style} x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    places = [at(x, y) for x, y in series.points]
    out = ""
    if len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out = f'<polyline class="{series.kind}" {style} points="{path}"/>'
    if series.kind == "dots" or len(places) == 1:
        out += "".join(f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)
    return out


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: means of equal groups, at the last step of each."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round values within a range."""
    span = (high - low) / max(count, 1)
    unit = 10.0 ** math.floor(math.log10(span))
    size = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= span * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [round(i * size, 12) + 0.0 for i in range(first, math.floor(high / size + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    every = max(1, len(decades) // 5)
    return [10.0**i for i in decades if i % every == 0]


def number(value: float) -> str:
    """A value in few characters: 0.25, 12.5k, 3e-05."""
    size = abs(value)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale and not (unit == "k" and size < 1e4):
            return f"{value / scale:.4g}{unit}"
    if size and size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.4g}"


def _short(value: float) -> float:
    return float(f"{value:.5g}")
