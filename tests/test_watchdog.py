"""Runs that do not go on: who is to blame, and that all processes end."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from fm4m import exit_codes, watchdog
from fm4m.watchdog import Limits, PeerError, State, Watchdog, find_culprit

HERE = pathlib.Path(__file__).resolve().parent
LIMITS = Limits(timeout=10, slow_timeout=100)


def state(process, phase, step, seconds):
    return State(process, f"host{process}", 100 + process, phase, step, 1000.0, 1000.0 + seconds)


@pytest.mark.parametrize(
    "states, silent, sentence",
    [
        # Not renewed: dead or frozen, whatever the others say.
        ([("fetch", 8, 3), ("fetch", 7, 1)], {1: 61}, r"process 1 of 2 \(host1\) is dead .* 61 s, .* step 7 \(fetch\)"),
        ([("fetch", 8, 3), None], {1: 61}, r"process 1 of 2 is dead or frozen: .* never wrote"),
        ([("fetch", 8, 3), ("data", 7, 1), ("data", 7, 1)], {1: 61, 2: 62}, "process 1 of 3 .*; process 2 of 3"),
        # The others have dispatched a step or two more, and wait for its values.
        ([("fetch", 8, 11), ("data", 7, 12)], {}, r"process 1 of 2 \(host1\) waits for its input .* step 7 for 12 s"),
        ([("fetch", 7, 11), ("data", 7, 11)], {}, "process 1 of 2 .* waits for its input"),
        ([("fetch", 7, 11), ("data", 7, 9)], {}, None),
        # Something slow has its own bound, which the impatient ones respect.
        ([("fetch", 8, 50), ("checkpoint", 7, 60)], {}, None),
        ([("barrier", 0, 50), ("compilation", 0, 60)], {}, None),
        ([("fetch", 8, 101), ("checkpoint", 7, 111)], {}, "process 1 of 2 .* at step 7 for 111 s in 'checkpoint'"),
        ([("barrier", 0, 50), ("compilation", 0, 111)], {}, "process 1 of 2 .* in 'compilation'"),
        # Nobody is behind.
        ([("fetch", 7, 11), ("fetch", 7, 12)], {}, "all 2 processes wait at step 7 .*devices hang"),
        ([("done", 9, 11), ("fetch", 7, 12)], {}, "process 1 of 2 .* waits at step 7"),
        ([("done", 9, 11), ("failed", 7, 12)], {}, None),
        # Alone.
        ([("data", 3, 11)], {}, "process 0 of 1 .* waits for its input"),
        ([("step", 3, 9)], {}, None),
    ],
)
def test_culprit(states, silent, sentence):
    given = [None if s is None else state(i, *s) for i, s in enumerate(states)]
    found = find_culprit(given, silent, LIMITS)
    assert (found is None) == (sentence is None)
    if sentence:
        assert re.search(sentence, found), found


class Ended(Exception):
    pass


def until(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.02)


def test_input_that_hangs_ends_a_single_process(tmp_path, caplog):
    codes = []
    with Watchdog(tmp_path, 2.0, 50.0, process=0, processes=1, end=codes.append):
        for _ in range(25):  # what goes on is left alone
            watchdog.mark("data", 5)
            time.sleep(0.1)
        assert not codes
        until(lambda: codes)
    assert codes == [exit_codes.HUNG] and "waits for its input (data) at step 5" in caplog.text
    folder = tmp_path / "processes"
    assert "waits for its input" in (folder / "report.txt").read_text()
    stacks = (folder / "0.stacks.txt").read_text()
    assert "test_input_that_hangs_ends_a_single_process" in stacks and "_watch_loop" in stacks
    assert json.loads((folder / "0.json").read_text())["phase"] == "done"


def test_phases_outside_the_loop_have_their_own_bound(tmp_path):
    codes = []
    with Watchdog(tmp_path, 1.0, 50.0, process=0, processes=1, end=codes.append):
        watchdog.mark("checkpoint", 5)
        time.sleep(2.0)
        assert not codes
    with Watchdog(tmp_path / "off", 0.0, 0.0, process=0, processes=1, end=codes.append):
        time.sleep(0.2)
    assert not codes and not (tmp_path / "off").exists()


def test_a_dead_process_is_named_and_old_files_are_not_believed(tmp_path, caplog):
    folder = tmp_path / "processes"
    folder.mkdir()
    (folder / "report.txt").write_text("process 0 of 2 was dead in the attempt before\n")
    (folder / "1.json").write_text(json.dumps(vars(state(1, "data", 17, 2.0))))
    codes = []
    with Watchdog(tmp_path, 2.0, 50.0, process=0, processes=2, end=codes.append):
        watchdog.mark("barrier", 0)
        until(lambda: codes)
    assert codes == [exit_codes.HUNG]
    assert "process 1 of 2 (host1) is dead or frozen" in caplog.text and "at step 17 (data)" in caplog.text


def test_what_was_read_at_an_earlier_halt_is_no_proof(tmp_path):
    """Process 1 goes on between two long validations of this one; its file is read at the halts only."""
    codes, other = [], tmp_path / "processes" / "1.json"
    with Watchdog(tmp_path, 1.0, 50.0, process=0, processes=2, end=codes.append) as dog:
        for step in range(3):
            watchdog.mark("validation", step)
            until(lambda: dog._looked > watchdog._now[2])
            moment = time.monotonic()
            while time.monotonic() < moment + dog.silence / 2:
                other.write_text(json.dumps(vars(state(1, "validation", step, time.monotonic()))))
                time.sleep(0.01)
            begin = time.monotonic()
            while time.monotonic() < begin + 1.5 * dog.silence:  # steps, during which nobody looks
                watchdog.mark("fetch", step)
                time.sleep(0.01)
                other.write_text(json.dumps(vars(state(1, "fetch", step, time.monotonic()))))
    assert not codes


def test_errors_are_told_to_the_others(tmp_path):
    with pytest.raises(KeyError), Watchdog(tmp_path, 1.0, 50.0, process=1, processes=2, own_errors=(KeyError,)):
        raise KeyError("a bug")
    text = (tmp_path / "processes" / "report.txt").read_text()
    assert text.startswith("process 1 of 2") and "failed: KeyError: 'a bug'" in text.splitlines()[0]
    # An error of the connection, because process 1 is dead.
    dead = pytest.raises(PeerError, match=r"process 1 of 2 .*is dead or frozen")
    with dead, Watchdog(tmp_path / "b", 1.0, 50.0, process=0, processes=2, end=lambda code: None):
        raise RuntimeError("Connection reset by peer")


# ---- two processes


def pair(folder, *arguments):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_COORDINATOR_ADDRESS": address, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    folder.mkdir()
    processes = []
    for i in range(2):
        with open(folder / f"log{i}", "w") as log:
            command = [sys.executable, str(HERE / "watched_pair.py"), str(folder), *arguments]
            processes.append(subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=log, stderr=log))
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("what", ["killed", "frozen", "fails"])
def test_two_processes_end_when_one_does_not_go_on(tmp_path, what):
    folder = tmp_path / what
    both = pair(folder, "20", *(["60"] if what == "fails" else []))
    try:
        until(lambda: "step 40" in (folder / "log0").read_text() or both[0].poll() is not None, 600)
        if what != "fails":
            both[1].send_signal(signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        begin = time.time()
        codes = {"killed": [76, -signal.SIGKILL], "fails": [76, 1], "frozen": [76]}[what]
        assert [p.wait(timeout=200) for p in both[: len(codes)]] == codes, (folder / "log0").read_text()[-3000:]
        assert time.time() - begin < 120
        words = "failed: KeyError: 'no such thing'" if what == "fails" else "is dead or frozen: nothing for"
        assert f"process 1 of 2 ({socket.gethostname()}) {words}" in (folder / "log0").read_text()
    finally:
        for process in both:
            process.kill()
