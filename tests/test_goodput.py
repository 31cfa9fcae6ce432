from __future__ import annotations

import json
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm4m import goodput


class Time:
    """A clock that is told what time it is. Powers of two add without rounding."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Device:
    """A device that was idle for a given time of the last wait."""

    def __init__(self, idle):
        self._idle = idle

    def idle(self, begin, end):
        return self._idle


def test_every_moment_has_one_cause():
    time = Time()
    clock = goodput.Clock(age=4.0, now=time)
    time.now = 1.0
    with clock("compile"):
        time.now = 3.0
    with clock("step"):
        time.now = 10.0
        with clock("validation"):  # what is inside another cause is not counted twice
            time.now = 12.0
            with clock("compile"):
                time.now = 12.5
        time.now = 13.0
        with clock.waiting(Device(idle=0.5)):  # two seconds, of which a running step hides one and a half
            time.now = 15.0
        with pytest.raises(ZeroDivisionError), clock("checkpoint"):
            time.now = 16.0
            raise ZeroDivisionError
        with clock.waiting(Device(idle=0.0)):
            time.now = 17.0
    time.now = 18.0
    seconds = clock.read()
    expected = {"start": 6.0, "compile": 2.5, "validation": 2.0, "data": 0.5, "checkpoint": 1.0, "step": 10.0}
    assert seconds == dict.fromkeys(goodput.CAUSES, 0.0) | expected
    assert sum(seconds.values()) == 4.0 + 18.0
    with pytest.raises(KeyError), clock("lunch"):
        pass


def test_the_last_step_hides_a_wait_until_it_is_finished():
    class Value:
        def __init__(self):
            self.ready = threading.Event()

        def block_until_ready(self):
            self.ready.wait()
            raise RuntimeError("the loop reports it")

    time, seen = Time(), threading.Event()
    time.now = 1.0
    step = goodput.LastStep(now=lambda: (seen.set(), time.now)[1])
    seen.clear()
    assert step.idle(2.0, 5.0) == 3.0  # nothing was sent yet
    value = Value()
    step.follow(value)
    assert step.idle(2.0, 5.0) == 0.0
    time.now = 4.0
    value.ready.set()
    assert seen.wait(30)
    while step._done < 1:
        pass
    assert step.idle(2.0, 5.0) == 1.0 and step.idle(4.5, 5.0) == 0.5
    step.close()
    step._thread.join(30)
    assert not step._thread.is_alive()


def attempt(workdir, wall, first, last, *, steps, other=2.0, ended=None):
    """One attempt of ``other`` seconds of start and ``steps`` seconds of steps; ``ended`` None for a killed one."""
    time = Time()
    clock = goodput.Clock(now=time)
    time.now = other
    record = goodput.Record(workdir, clock, first, now=lambda: wall + time.now)
    with clock("step"):
        time.now += steps
        row = record.row(last)
    if ended is not None:
        record.write(last, ended)
    return row


def test_attempts_add_up_with_restarts_and_lost_work(tmp_path):
    assert goodput.read(tmp_path) == []
    attempt(tmp_path, 1000.0, 0, 100, steps=200.0)  # killed after 202 s; steps 81 to 100 are lost
    attempt(tmp_path, 1210.0, 80, 90, steps=20.0)  # killed before it saved anything: lost too
    row = attempt(tmp_path, 1240.0, 80, 160, steps=160.0, ended="done")
    attempts = goodput.read(tmp_path)
    assert [a["ended"] for a in attempts] == ["", "", "done"]
    assert goodput.lost_steps(attempts) == [20, 10, 0]
    seconds = goodput.totals(attempts)
    expected = {"start": 6.0, "step": 160.0 + 160.0, "lost": 40.0 + 20.0, "restart": 8.0 + 8.0}
    assert seconds == dict.fromkeys((*goodput.CAUSES, *goodput.BETWEEN), 0.0) | expected
    assert sum(seconds.values()) == goodput.end(attempts[-1]) - attempts[0]["start"] == 402.0
    assert row["goodput/step"] == 320 / 402 and sum(row.values()) == pytest.approx(1.0, abs=1e-12)
    line = goodput.describe(attempts)
    assert line == "goodput 79.6% of 6.7 min: step 79.6%, lost 14.9%, restart 4.0%, start 1.5%, in 3 attempts"
    # A completed run that is made longer a day later was not down for a day.
    attempt(tmp_path, 90_000.0, 160, 170, steps=20.0)
    assert goodput.totals(goodput.read(tmp_path))["restart"] == 16.0
    assert not list(tmp_path.glob("*.partial"))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e9), st.integers(0, 50), st.integers(0, 50),
            st.lists(st.floats(0, 1e6), min_size=len(goodput.CAUSES), max_size=len(goodput.CAUSES)),
            st.sampled_from(["", "done"]),
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_shares_sum_to_one(drawn):
    attempts = [
        {"start": start, "first_step": first, "step": first + made, "seconds": dict(zip(goodput.CAUSES, seconds)),
         "ended": ended}
        for start, first, made, seconds, ended in drawn
    ]  # fmt: skip
    shares = goodput.shares(attempts)
    whole = sum(goodput.totals(attempts).values())
    assert math.isclose(sum(shares.values()), 1.0 if whole else 0.0, abs_tol=1e-9)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares.values())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"attempts": [{}]}', '{"attempts": [{"start": 0, "first_step": 0, "step": NaN, "seconds": {}}]}',
     '{"attempts": [{"start": 0, "first_step": 0, "step": 1, "seconds": {"lunch": 1}}]}', '{"attempts": 5}'],
)  # fmt: skip
def test_a_damaged_file_is_reported_and_replaced(tmp_path, caplog, text):
    (tmp_path / goodput.FILE).write_text(text)
    attempt(tmp_path, 0.0, 0, 3, steps=1.0)
    assert "cannot be read" in caplog.text
    assert len(json.loads((tmp_path / goodput.FILE).read_text())["attempts"]) == 1


def test_the_age_of_this_process():
    assert 0 < goodput.process_age() < 86400


def test_a_run_does_not_end_for_its_bookkeeping(tmp_path, monkeypatch, caplog):
    def full(path, data):
        raise OSError(28, "No space left on device")

    record = goodput.Record(tmp_path, goodput.Clock(age=0.0), 0)
    monkeypatch.setattr(goodput.files, "write_whole", full)
    assert record.row(1).keys() >= {f"goodput/{cause}" for cause in goodput.CAUSES}
    assert "goodput.json cannot be written" in caplog.text
