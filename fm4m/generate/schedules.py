"""How many tokens every decoding step writes, and at which temperature (the reference implementation's schedules).

All functions are plain Python on the host: schedules are static, so that a step's shapes are known when it is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TOKEN_SCHEDULES = ("cosine", "linear")
TEMPERATURE_SCHEDULES = ("constant", "linear", "decreasing:MIN", "onex:MIN:POWER")


def cosine_schedule(steps: int, tokens: int) -> list[int]:
    """Tokens of each step by a raised cosine: few, many, few. Some steps may write none.

    The last takes what rounding leaves, which can be less than none (24 steps of 196 tokens), as in the reference
    implementation; `Generator` never writes more than is open.

    ``round(tokens * (s_i - s_{i+1}))`` with ``s_i = (1 + cos(pi i / steps)) / 2``.
    """
    _check(steps, tokens)
    s = 0.5 * (1 + np.cos(np.pi * np.arange(steps + 1) / steps))
    counts = [round(float(c)) for c in tokens * (s[:-1] - s[1:])]
    counts[-1] = tokens - sum(counts[:-1])
    return counts


def linear_schedule(steps: int, tokens: int) -> list[int]:
    """Equal parts, the larger ones first; fewer steps than asked for where there are fewer tokens."""
    _check(steps, tokens)
    counts = np.diff(np.linspace(0, tokens, steps + 1, dtype=int))
    return [int(c) for c in sorted(counts, reverse=True) if c]


def token_schedule(kind: str, steps: int, tokens: int, known: int = 0) -> list[int]:
    """Tokens of each step, their sum being ``tokens - known``.

    Args:
      kind: "cosine" or "linear".
      steps: steps that an empty grid takes.
      tokens: cells of the grid.
      known: cells that are there already. The schedule is entered where that many would have been written, so that
        finishing half a grid takes half the steps.

    Raises:
      ValueError: another kind, no steps, or nothing to write.
    """
    if kind not in TOKEN_SCHEDULES:
        raise ValueError(f"token schedule {kind!r} is not one of {', '.join(TOKEN_SCHEDULES)}")
    if not 0 <= known < tokens:
        raise ValueError(f"{known} of {tokens} tokens are known: nothing is left to generate")
    counts = {"cosine": cosine_schedule, "linear": linear_schedule}[kind](steps, tokens)
    if not known:
        return counts
    done = np.cumsum(counts)
    first = int(np.searchsorted(done, known, side="right"))
    return [int(done[first]) - known, *counts[first + 1 :]]


def temperature_schedule(kind: str, temperature: float, counts: Sequence[int]) -> list[float]:
    """Temperature of each step for the token counts of a schedule.

    Args:
      kind: "constant"; "linear", falling to 0 with the share of tokens that are still to be written before the step;
        "decreasing:MIN", falling to MIN with the share that is left after it; "onex:MIN:POWER", like that and also like
        one over the step to the power.
      temperature: where it falls from.

    Raises:
      ValueError: another kind, or a temperature below 0.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} must be at least 0")
    total, counts = sum(counts), np.asarray(counts)
    done = np.cumsum(counts) / total
    if kind == "constant":
        return [float(temperature)] * len(counts)
    if kind == "linear":
        # Shifted by a step: the first one has the full temperature.
        left = np.concatenate([[1.0], 1 - done[:-1]])
        return [float(t) for t in np.maximum(temperature * left, 1e-9)]
    name, *numbers = kind.split(":")
    try:
        low, *power = map(float, numbers)
        if len(power) != {"decreasing": 0, "onex": 1}[name]:
            raise ValueError
    except (KeyError, ValueError):
        known = ", ".join(TEMPERATURE_SCHEDULES)
        raise ValueError(f"temperature schedule {kind!r} is not one of {known} (MIN and POWER: numbers)") from None
    if not power:
        return [float(t) for t in np.maximum(low + (temperature - low) * (1 - done), 0)]
    y = np.linspace(1, 100, total) ** -power[0]
    y = (y - y.min()) / max(y.max() - y.min(), 1e-30)
    # By step; where there are more steps than tokens, those beyond are at the end of the curve.
    y = y[np.minimum(np.arange(len(counts)), total - 1)]
    return [float(t) for t in np.maximum(low + (temperature - low) * y * (1 - done), 0)]


def _check(steps: int, tokens: int) -> None:
    if steps < 1 or tokens < 1:
        raise ValueError(f"a schedule needs at least one step and one token, got {steps} and {tokens}")
