"""The figures of `benchmarks.soak`: what its attempts come to."""

from __future__ import annotations

import collections
import os
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

# The seconds after an attempt's first steps fill caches and pools; what counts as growth comes after them.
WARM = 20.0
# Shorter stretches say nothing about growth.
SHORTEST = 30.0

Sample = tuple[float, int, int, int]


def growth(samples: Sequence[Sample], column: int, begin: float = 0.0) -> tuple[float, float, float] | None:
    """How a column of an attempt's samples grew once it was warm: (units an hour by a least-squares line, mean of the
    last quarter less that of the first, seconds). None for a stretch that is too short. ``begin``: the attempt's age at
    its first steps."""
    warm = [s for s in samples if s[0] >= begin + WARM]
    if len(warm) < 8 or warm[-1][0] - warm[0][0] < SHORTEST:
        return None
    seconds, values = (np.asarray([s[i] for s in warm], np.float64) for i in (0, column))
    quarter = len(warm) // 4
    slope = float(np.polyfit(seconds - seconds[0], values, 1)[0])
    return 3600 * slope, float(values[-quarter:].mean() - values[:quarter].mean()), float(seconds[-1] - seconds[0])


def over_attempts(attempts: Sequence[dict[str, Any]], column: int) -> dict[str, float] | None:
    """`growth` of all attempts that are long enough, weighted by their length, and the longest one's alone."""
    found = [g for a in attempts if (g := growth(a["samples"], column, a["restart_seconds"]))]
    if not found:
        return None
    whole = sum(g[2] for g in found)
    longest = max(found, key=lambda g: g[2])
    return {
        "attempts": len(found),
        "an_hour": sum(g[0] * g[2] for g in found) / whole,
        "last_less_first_quarter": sum(g[1] * g[2] for g in found) / whole,
        "longest_seconds": longest[2],
        "longest_an_hour": longest[0],
        "longest_last_less_first_quarter": longest[1],
    }


def report(attempts: Sequence[dict[str, Any]], run: str | os.PathLike) -> dict[str, Any]:
    """The figures of a soak, as plain JSON. ``attempts`` are those of `benchmarks.soak.soak`."""
    from fm4m import goodput

    # What an attempt left less where the next one began; the last attempt loses nothing. "left" is the newest step with
    # a line in metrics.jsonl, so steps since that line are not counted.
    lost = [max(b["left"] - b["first"], 0) for b in attempts[1:]]
    by_kind: dict[str, list[int]] = collections.defaultdict(list)
    for attempt, steps in zip(attempts, lost):
        by_kind[attempt["kind"]].append(steps)
    restarts = [a["restart_seconds"] for a in attempts[1:] if a["made"] > a["first"]]
    samples = [s for a in attempts for s in a["samples"]]
    wall = sum(a["seconds"] for a in attempts)
    return {
        "minutes": wall / 60,
        "attempts": len(attempts),
        "kinds": dict(collections.Counter(a["kind"] for a in attempts)),
        "frozen": sum(a["frozen"] > 0 for a in attempts),
        "damages": [a["damage"] for a in attempts if a.get("damage")],
        "refused_checkpoints": sum(a["refused"] for a in attempts),
        "failed": [a["error"] for a in attempts if "error" in a],
        "steps": attempts[-1]["made"],
        "steps_lost": {
            "all": sum(lost), "mean": statistics.mean(lost) if lost else 0.0, "largest": max(lost, default=0),
            "by_kind": {kind: {"mean": statistics.mean(n), "largest": max(n)} for kind, n in by_kind.items()},
        },
        "restart_seconds": {
            "median": statistics.median(restarts), "largest": max(restarts),
        } if restarts else None,
        "rss": over_attempts(attempts, 1),
        "handles": over_attempts(attempts, 2),
        "threads": over_attempts(attempts, 3),
        "largest": {"rss": max((s[1] for s in samples), default=0), "handles": max((s[2] for s in samples), default=0),
                    "threads": max((s[3] for s in samples), default=0)},
        "goodput": goodput.shares(goodput.read(run)),
    }  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    """The figures as lines of "name: value"."""
    lost, mega = figures["steps_lost"], 2**20
    rows = [("minutes", f"{figures['minutes']:.1f}"), ("attempts", f"{figures['attempts']}")]
    rows += [(kind, f"{count} times") for kind, count in sorted(figures["kinds"].items())]
    rows += [
        ("frozen for a while", f"{figures['frozen']} times"),
        ("damaged checkpoints refused", f"{figures['refused_checkpoints']} of {len(figures['damages'])} damaged"),
        ("steps that count", f"{figures['steps']}"),
        ("steps lost", f"{lost['all']} in all, {lost['mean']:.1f} a restart, {lost['largest']} at most"),
    ]
    rows += [(f"  after: {kind}", f"{n['mean']:.1f} a restart, {n['largest']} at most")
             for kind, n in sorted(lost["by_kind"].items())]  # fmt: skip
    if figures["restart_seconds"]:
        seconds = figures["restart_seconds"]
        rows.append(("start to first steps", f"{seconds['median']:.1f} s (median), {seconds['largest']:.1f} s at most"))
    for name, key, unit, size in (("resident memory", "rss", " MiB", mega), ("open files", "handles", "", 1),
                                  ("threads", "threads", "", 1)):  # fmt: skip
        most = f"at most {figures['largest'][key] / size:.0f}{unit}"
        if g := figures[key]:
            most += (f"; growth {g['an_hour'] / size:+.1f}{unit} an hour, last less first quarter "
                     f"{g['last_less_first_quarter'] / size:+.1f}{unit} (mean of {g['attempts']} attempts); in the "
                     f"longest, {g['longest_seconds']:.0f} s, {g['longest_an_hour'] / size:+.1f}{unit} an hour, "
                     f"{g['longest_last_less_first_quarter'] / size:+.1f}{unit}")  # fmt: skip
        rows.append((name, most))
    if any(figures["goodput"].values()):
        shares = sorted(figures["goodput"].items(), key=lambda item: -item[1])
        rows.append(("wall time", ", ".join(f"{cause} {share:.1%}" for cause, share in shares if share >= 0.001)))
    if "different" in figures:
        equal = f"equal bit for bit at step {figures['checked_step']}"
        rows.append(("an uninterrupted run", f"differs in {figures['different']}" if figures["different"] else equal))
    rows.append(("failures", f"{len(figures['failed'])}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
