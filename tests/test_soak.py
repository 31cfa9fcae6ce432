"""The bookkeeping of the soak test: what its attempts come to, and what it does to checkpoints."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks import soak, soak_figures

MEGA = 2**20


def attempt(first, made, left, kind="killed", **more):
    samples = [(float(t), 100 * MEGA + int(t * MEGA / 60), 20, 15) for t in range(100)]
    return {"first": first, "made": made, "left": left, "kind": kind, "code": -9, "seconds": 100.0, "frozen": 0.0,
            "restart_seconds": 0.0, "refused": 0, "samples": samples} | more  # fmt: skip


def test_growth_of_a_line():
    samples = attempt(0, 0, 0)["samples"]
    an_hour, quarters, seconds = soak_figures.growth(samples, 1)
    # A MiB a minute; the warm part is 20 s to 99 s, the middles of its outer quarters 60 s apart.
    assert an_hour / MEGA == pytest.approx(60, rel=1e-3) and quarters / MEGA == pytest.approx(1.0, rel=0.02)
    assert seconds == 79 and soak_figures.growth(samples, 2)[:2] == pytest.approx((0, 0), abs=1e-9)
    assert soak_figures.growth(samples[:40], 1) is None


def test_figures_and_table(tmp_path):
    attempts = [
        attempt(0, 120, 0),
        attempt(100, 340, 120, kind="checkpoint damaged", damage="emptied 300/params/x", frozen=3.0),
        attempt(200, 200, 340, refused=1, samples=[]),
        attempt(200, 500, 200, kind="told to stop", code=75, restart_seconds=12.0),
    ]
    figures = soak_figures.report(attempts, tmp_path)
    assert figures["steps"] == 500 and figures["minutes"] == pytest.approx(400 / 60)
    assert figures["steps_lost"]["all"] == 20 + 140 + 0 and figures["steps_lost"]["largest"] == 140
    assert figures["steps_lost"]["by_kind"]["checkpoint damaged"] == {"mean": 140, "largest": 140}
    # An attempt that came to no step says nothing of what a restart takes.
    assert figures["restart_seconds"] == {"median": 6.0, "largest": 12.0}
    assert figures["rss"]["attempts"] == 3 and figures["rss"]["an_hour"] / MEGA == pytest.approx(60, rel=1e-3)
    text = soak_figures.table(figures | {"different": [], "checked_step": 500})
    for words in ("160 in all, 53.3 a restart, 140 at most", "1 of 1 damaged", "+60.0 MiB an hour",
                  "equal bit for bit at step 500", "failures                     0"):  # fmt: skip
        assert words in text, text
    json.dumps(figures)


def test_damage_is_to_the_newest_whole_checkpoint(tmp_path):
    content = bytes(range(200))
    for step in (100, 900, 1000):
        (tmp_path / str(step) / "params").mkdir(parents=True)
        (tmp_path / str(step) / "params" / "data").write_bytes(content)
    (tmp_path / "1100.partial").mkdir()
    seen, newest = set(), tmp_path / "1000" / "params" / "data"
    for seed in range(20):
        newest.write_bytes(content)
        seen.add(soak.damage(tmp_path, random.Random(seed), set()).split()[0])
        assert not newest.exists() or newest.read_bytes() != content
    assert seen == {"truncated", "emptied", "deleted", "flipped"}
    done = {"1000"}
    assert "900/params/data" in soak.damage(tmp_path, random.Random(0), done) and done == {"900", "1000"}
    # One is left.
    assert soak.damage(tmp_path, random.Random(0), done) == ""
    assert (tmp_path / "100" / "params" / "data").read_bytes() == content
