"""Schedules of generation."""

from __future__ import annotations

import json
import re

import pytest
from fixtures import FIXTURES, needs_fixtures

from fm4m.generate import schedules


def test_counts_add_up_and_match_the_published_examples():
    assert schedules.cosine_schedule(8, 784) == [30, 85, 127, 150, 150, 127, 85, 30]
    assert schedules.linear_schedule(25, 196) == [8] * 21 + [7] * 4
    assert schedules.linear_schedule(9, 4) == [1, 1, 1, 1]
    assert schedules.token_schedule("cosine", 8, 196, known=50) == [10, 38, 38, 32, 21, 7]


def test_onex_temperatures_match_the_published_example():
    counts = schedules.linear_schedule(49, 196)
    got = schedules.temperature_schedule("onex:0.5:0.5", 6.0, counts)
    assert got[:3] == pytest.approx([5.888, 4.688, 3.967], abs=5e-4) and got[-1] == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.token_schedule("square", 4, 16), "'square' is not one of cosine, linear"),
        (lambda: schedules.token_schedule("linear", 0, 16), "at least one step"),
        (lambda: schedules.token_schedule("linear", 4, 16, known=16), "nothing is left"),
        (lambda: schedules.temperature_schedule("onex:1", 1.0, [1]), "'onex:1' is not one of"),
        (lambda: schedules.temperature_schedule("constant", -1.0, [1]), "at least 0"),
    ],
)
def test_impossible_schedules_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", ["decreasing:0", "onex:0:0.5", "onex:0.5:0.5", "linear"])
def test_temperatures_are_never_negative_and_there_is_one_for_every_step(kind):
    for steps, tokens in ((24, 196), (16, 64), (65, 64), (20, 3)):
        counts = schedules.cosine_schedule(steps, tokens)
        found = schedules.temperature_schedule(kind, 3.0, counts)
        assert len(found) == len(counts) == steps and min(found) >= 0 and sum(counts) == tokens


@needs_fixtures
def test_schedules_equal_the_references():
    cases = json.loads((FIXTURES / "parity" / "gen_schedules.json").read_text())
    counts_of = lambda kind, steps, tokens: schedules.token_schedule(kind, int(steps), int(tokens))  # noqa: E731
    for kind in schedules.TOKEN_SCHEDULES:
        for case, expected in cases[f"{kind}_schedule"].items():
            assert counts_of(kind, *case.split(",")) == expected, (kind, case)
    for case, expected in cases["continue_schedule"].items():
        kind, steps, tokens, known = re.fullmatch(r"(\w+)\((\d+),(\d+)\), num_current=(\d+)", case).groups()
        assert schedules.token_schedule(kind, int(steps), int(tokens), int(known)) == expected, case
    kinds = {"linear_temp": "linear", "onex_temp": "onex:{min}:{power}", "decreasing_temp": "decreasing:{min}"}
    for group, kind in kinds.items():
        for case, expected in cases[f"{group}_schedule"].items():
            fields = dict(re.findall(r"(\w+)=([\d.]+)", case))
            counts = counts_of(*re.search(r"(\w+)\((\d+),(\d+)\)", case).groups())
            start = float(fields.get("temp", fields.get("max")))
            got = schedules.temperature_schedule(kind.format(**fields), start, counts)
            assert got == pytest.approx(expected, rel=0, abs=1e-12), (group, case)
