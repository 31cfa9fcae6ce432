"""A run that is killed again and again ends as one that was left alone, bit for bit."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest
from fork_runs import Runs

from fm4m import exit_codes, metrics

KILLS = 20
KINDS = ("training", "training", "writing", "writing", "starting")
# A death comes after two more checkpoints at most, and what is being written.
STEPS, EVERY = 180, 3
# Of the deaths, so many at least must leave a checkpoint half written.
WRITING = 5
TIMEOUT = 600
CONTINUING = re.compile(r"continuing at step (\d+), sample (\d+) of the stream")


class Run:
    """One run folder, its process, and what is known of it from outside."""

    def __init__(self, runs: Runs, folder: pathlib.Path, *options: str):
        self._runs, self.folder, self.out = runs, folder, folder.with_suffix(".npz")
        self.log = folder.with_suffix(".log")
        self._argv = [str(folder), str(self.out), f"train.total={STEPS} steps", "log.every=1", "eval.samples=16",
                      "eval.baseline_batches=0", *options]  # fmt: skip
        self.pid = 0

    def start(self, *options: str) -> None:
        self.pid = self._runs.start([*self._argv, *options], self.log)

    def wait(self) -> int:
        return self._runs.wait()

    def alive(self) -> bool:
        return pathlib.Path(f"/proc/{self.pid}").exists()

    def saved(self) -> int:
        """The newest whole checkpoint."""
        return max((int(name) for name in self._checkpoints() if name.isdigit()), default=0)

    def writing(self) -> list[str]:
        """What is in the folder of checkpoints and no whole one: it is being written, or was when the process died."""
        return [name for name in self._checkpoints() if not name.isdigit()]

    def _checkpoints(self) -> list[str]:
        try:
            return os.listdir(self.folder / "checkpoints")
        except FileNotFoundError:
            return []

    def rows(self) -> list[dict]:
        return [row for row in metrics.read_metrics(self.folder) if "train/loss" in row]

    def made(self) -> int:
        """The newest step that left a line."""
        return max((row["step"] for row in self.rows()), default=0) if (self.folder / "metrics.jsonl").exists() else 0

    def until(self, condition, patience: float = TIMEOUT) -> None:
        deadline = time.time() + patience
        while not condition() and self.alive() and time.time() < deadline:
            time.sleep(0.001)

    def kill(self, how: int = signal.SIGKILL) -> int:
        """The exit code."""
        assert self.alive(), self.log.read_text()[-3000:]
        os.kill(self.pid, how)
        return self.wait()

    def finish(self) -> dict[str, np.ndarray]:
        assert self.wait() == 0, self.log.read_text()[-3000:]
        with np.load(self.out) as arrays:
            return {k: arrays[k] for k in arrays.files}


def random_death(run: Run, rng: np.random.Generator, kind: str) -> bool:
    """Kills a run that has just been started; whether a checkpoint was then left half written."""
    first, old = run.saved(), set(run.writing())
    if kind == "starting":
        time.sleep(rng.uniform(0, 2.0))
    else:
        run.until(lambda: run.saved() > first)
        if kind == "writing":
            run.until(lambda: set(run.writing()) - old)
        time.sleep(rng.uniform(0, 0.02 if kind == "writing" else 0.15))
    whole = run.saved()
    assert run.kill() == -signal.SIGKILL, run.log.read_text()[-3000:]
    # What was whole before its death is whole afterwards. A write in the background may take as long as the steps to
    # the next one, which waits for it.
    assert run.saved() >= whole and run.made() - run.saved() <= 2 * EVERY
    return bool(run.writing())


@pytest.mark.slow
def test_random_deaths_change_nothing(tmp_path, capsys):
    seed = time.time_ns() % 2**32
    rng = np.random.default_rng(seed)
    compiled = str(tmp_path / "step")
    with Runs("killed_run", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", FM4M_STEP=compiled) as runs:
        straight = Run(runs, tmp_path / "straight", "checkpoint.every=0")
        straight.start()
        expected = straight.finish()
        run = Run(runs, tmp_path / "killed", f"checkpoint.every={EVERY}")
        half_written, continued = 0, []
        for death in range(KILLS):
            before = run.made(), run.saved()
            run.start("pause=0.01")
            kind = rng.choice(KINDS) if before[1] else "training"
            if KILLS - death <= 2 * (WRITING - half_written):
                kind = "writing"
            half_written += random_death(run, rng, kind)
            continued += [(*before, *map(int, found)) for found in CONTINUING.findall(run.log.read_text())]
        # The notice of a preemption: saved after the step it is in.
        run.start("pause=0.01")
        last = run.saved()
        run.until(lambda: run.saved() > last)
        assert run.kill(signal.SIGTERM) == exit_codes.PREEMPTED, run.log.read_text()[-3000:]
        told = run.saved()
        assert f"stopped at step {told} of {STEPS} (SIGTERM" in run.log.read_text()
        run.start("checkpoint.every=0")
        resumed = run.finish()
        assert CONTINUING.findall(run.log.read_text()) == [(str(told), str(16 * told))]
        seconds = runs.cpu_seconds()

    lost = [made - step for made, _, step, _ in continued]
    with capsys.disabled():
        print(f"\n{KILLS} deaths (seed {seed}), {half_written} of them while a checkpoint was written; {sum(lost)} of "
              f"{STEPS + sum(lost)} steps lost, {max(lost)} at most; {seconds / (KILLS + 3):.1f} s of CPU a "
              "start")  # fmt: skip
    assert half_written >= WRITING
    # Continued from the newest checkpoint that was whole, with the sample after those of its steps.
    assert all(step == saved and position == 16 * step for _, saved, step, position in continued)
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))
    for a, b in zip(straight.rows(), run.rows(), strict=True):
        assert all(a[key] == b[key] for key in a if key.startswith(("train/", "optimizer/", "data/"))), (a, b)
    assert set(resumed) == set(expected)
    for name, value in expected.items():
        assert value.tobytes() == resumed[name].tobytes(), name
