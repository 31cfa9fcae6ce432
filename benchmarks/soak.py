"""Trains for half an hour while the trainer is killed, told to stop and frozen, and its checkpoints are damaged.

    python -m benchmarks.soak --minutes=30 --workdir=runs/soak [--check] [--config=configs/NAME.py --config.KEY=VALUE]

The trainer runs as a child process with one command, again and again. Without --config it is `benchmarks.soak_run`,
which needs no files. The table at the end and ``soak.json`` say how many steps were made and lost, what restarts cost,
and how memory, file handles and threads grew. With --check the same number of steps is then trained without any
interruption, and the two train states must be equal, bit for bit. Exit code 0: all of it went well.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import soak_figures
from fm4m import exit_codes, goodput

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Seconds for a start and a compilation.
PATIENCE = 900
SMALL = ["--config=benchmarks/soak_config.py"]

# What happens to the trainer, and how often relative to each other.
KINDS = {"killed": 5, "told to stop": 2, "frozen": 2, "checkpoint damaged": 2}
# Ends that are no failure of the trainer: killed by us, or saved on demand.
EXPECTED = {"killed": (-signal.SIGKILL,), "told to stop": (exit_codes.PREEMPTED,),
            "checkpoint damaged": (-signal.SIGKILL,), "disk full": (exit_codes.FAILED, -signal.SIGKILL),
            "finished": (exit_codes.DONE,)}  # fmt: skip


class Trainer:
    """The command, and the process that runs it now.

    Attributes:
      samples: of the process: (seconds since its start, resident bytes, open files, threads).
      damaged: steps whose checkpoints were damaged.
    """

    def __init__(self, command: Sequence[str], run: pathlib.Path):
        self.command, self.run = list(command), run
        self.log = run.parent / "log.txt"
        self.samples: list[tuple[float, int, int, int]] = []
        self.damaged: set[str] = set()

    def start(self) -> None:
        """Starts an attempt; what it prints is appended to ``log.txt``."""
        self.samples, self.began = [], time.monotonic()
        self._written = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=ROOT)

    @property
    def age(self) -> float:
        return time.monotonic() - self.began

    def said(self) -> str:
        """What this attempt has printed."""
        with self.log.open("rb") as log:
            log.seek(self._written)
            return log.read().decode(errors="replace")

    def attempts(self) -> list[dict[str, Any]]:
        """What the trainer itself noted of its attempts; the present one is among them once it has made steps."""
        return goodput.read(self.run)

    def made(self) -> int:
        """The newest step with a line in ``metrics.jsonl``."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes()[-20_000:].splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines[1:] if line.endswith(b"\n")] or [b'{"step": 0}']
        return int(json.loads(whole[-1])["step"])

    def look(self) -> None:
        """Takes a sample of the process."""
        folder = pathlib.Path("/proc", str(self.process.pid))
        try:
            fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            handles = len(os.listdir(folder / "fd"))
            self.samples.append((self.age, int(fields["VmRSS"].split()[0]) * 1024, handles, int(fields["Threads"])))
        except (OSError, KeyError):  # it has just ended
            return

    def wait(self, until: float, condition: Callable[[], bool] = lambda: False) -> bool:
        """Samples once a second until a moment of the attempt's age, or a condition; whether it still runs."""
        while self.age < until and not condition():
            if self.process.poll() is not None:
                return False
            self.look()
            time.sleep(min(1.0, max(until - self.age, 0.01)))
        return self.process.poll() is None

    def end(self, how: int, patience: float = 300) -> int:
        """Sends a signal and returns the exit code; SIGKILL after ``patience`` seconds."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def damage(checkpoints: pathlib.Path, rng: random.Random, done: set[str]) -> str:
    """Damages one file of the newest checkpoint that is whole; returns in words what was done.

    ``done`` are the steps that were damaged before, and this one is added. The last whole checkpoint is left alone,
    since the trainer rightly refuses to begin again without one: then nothing is done, and "" returned.
    """
    names = (p.name for p in checkpoints.glob("*") if p.name.isdigit() and p.name not in done)
    steps = sorted(names, key=int)
    if len(steps) < 2:
        return ""
    done.add(steps[-1])
    files = sorted(p for p in (checkpoints / steps[-1]).rglob("*") if p.is_file() and p.stat().st_size)
    path, how = rng.choice(files), rng.choice(("truncated", "emptied", "deleted", "flipped a bit of"))
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "deleted":
        path.unlink()
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return f"{how} {path.relative_to(checkpoints)}"


def fill(folder: pathlib.Path) -> pathlib.Path:
    """Writes a file that takes all the space of a small disk; returns it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = 1 << 22
        while size >= 1:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 16
    return ballast


def begin(trainer: Trainer) -> dict[str, Any]:
    """Starts an attempt and returns after its first steps, or its end: where it began, and how long that took."""
    left, before = trainer.made(), len(trainer.attempts())
    trainer.start()

    def stepped() -> bool:
        attempts = trainer.attempts()
        return len(attempts) > before and attempts[-1]["step"] > attempts[-1]["first_step"]

    trainer.wait(PATIENCE, stepped)
    first = trainer.attempts()[-1]["first_step"] if stepped() else 0
    return {"left": left, "first": first, "restart_seconds": trainer.age}


def torment(trainer: Trainer, rng: random.Random, life: float, kinds: dict[str, int], deadline: float) -> dict:
    """Lets something happen to the trainer that `begin` started, and returns what is to be known of its end."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    left = max(deadline - time.monotonic(), 0.0)
    running = trainer.wait(trainer.age + min(rng.expovariate(1 / life), 5 * life, left))
    if running and time.monotonic() >= deadline:
        kind = "told to stop"
    frozen = 0.0
    if running and kind == "frozen":
        trainer.process.send_signal(signal.SIGSTOP)
        time.sleep(frozen := rng.uniform(2, 15))
        trainer.process.send_signal(signal.SIGCONT)
        running = trainer.wait(trainer.age + rng.uniform(1, life))
        kind = "killed"
    ballast = None
    if running and kind == "disk full":
        ballast = fill(trainer.run.parent)
        trainer.wait(trainer.age + 120)
    if trainer.process.poll() is not None and ballast is None:
        kind = "finished"  # or failed: the exit code tells
    code = trainer.end(signal.SIGTERM if kind == "told to stop" else signal.SIGKILL)
    if ballast is not None:
        ballast.unlink()
    said = trainer.said()
    entry = {"kind": kind, "code": code, "frozen": frozen, "made": trainer.made(), "seconds": trainer.age,
              "refused": len(set(re.findall(r"checkpoint of step (\d+) in \S+ is damaged", said))),
              "samples": trainer.samples}  # fmt: skip
    if code not in EXPECTED[kind]:
        entry["error"] = said[-1500:]
    if kind == "checkpoint damaged":
        entry["damage"] = damage(trainer.run / "checkpoints", rng, trainer.damaged)
        entry["kind"] = kind if entry["damage"] else "killed"
    return entry


def soak(trainer: Trainer, minutes: float, life: float, kinds: dict[str, int], rng: random.Random) -> list[dict]:
    """All attempts until the time is over or the run is done. Stops at the first that fails."""
    deadline, attempts = None, []
    while deadline is None or time.monotonic() < deadline:
        entry = begin(trainer)
        # The first compilation is not what is tested.
        deadline = deadline or time.monotonic() + 60 * minutes
        attempts.append(entry | torment(trainer, rng, life, kinds, deadline))
        print(f"{len(attempts):4d}  {in_words(attempts[-1])}", flush=True)
        if "error" in attempts[-1] or attempts[-1]["code"] == exit_codes.DONE:
            break
    return attempts


def in_words(attempt: dict[str, Any]) -> str:
    """What is to be known of an attempt, on a line."""
    aside = f" ({attempt['refused']} damaged checkpoints set aside)" if attempt["refused"] else ""
    stood = f", frozen for {attempt['frozen']:.0f} s before" if attempt["frozen"] else ""
    damaged = f" ({attempt['damage']})" if attempt.get("damage") else ""
    return (
        f"from step {attempt['first']} after {attempt['restart_seconds']:.0f} s{aside}; at step {attempt['made']} "
        f"{attempt['kind']}{stood}{damaged}, exit code {attempt['code']}"
    )


def newest(run: pathlib.Path) -> int:
    """The newest whole checkpoint of a run."""
    return max((int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def differences(one: pathlib.Path, other: pathlib.Path, step: int) -> list[str]:
    """The arrays of two runs' checkpoints of a step that are not equal bit for bit."""
    import jax
    import numpy as np

    from fm4m import checkpoint
    from fm4m.optim import path_name

    found = []
    for part in ("params", "opt_state", "ema"):
        if not (one / "checkpoints" / str(step) / part).exists():
            continue
        a, b = (checkpoint.load_part(run, step, part)[0] for run in (one, other))
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
            if np.asarray(x).tobytes() != np.asarray(y).tobytes():
                found.append(f"{part}/{path_name(path)}")
    return found


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workdir", required=True, help="a new folder; the run is in run/, the report in soak.json")
    parser.add_argument("--life", type=float, default=45, help="mean seconds from an attempt's first step to its end")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    parser.add_argument("--small-disk", help="an empty folder on a small disk: the run goes there, and it gets full")
    parser.add_argument("--check", action="store_true", help="compare with a run that was not interrupted")
    args, flags = parser.parse_known_args(argv)
    workdir = pathlib.Path(args.workdir).absolute()
    if (workdir / "run").exists():
        print(f"error: {workdir}/run exists already", file=sys.stderr)
        return 2
    workdir.mkdir(parents=True, exist_ok=True)
    module = "fm4m.train" if flags else "benchmarks.soak_run"
    base = [sys.executable, "-m", module, *(flags or SMALL)]
    if not any("config.compilation_cache=" in flag for flag in flags):
        base.append(f"--config.compilation_cache={workdir / 'cache'}")
    run = (pathlib.Path(args.small_disk).absolute() if args.small_disk else workdir) / "run"
    kinds = KINDS | ({"disk full": 2} if args.small_disk else {})
    trainer = Trainer([*base, f"--workdir={run}"], run)
    attempts = soak(trainer, args.minutes, args.life, kinds, random.Random(args.seed))

    report = soak_figures.report(attempts, run) | {"seed": args.seed, "command": trainer.command}
    if args.check and not report["failed"]:
        step = newest(run)
        print(f"training {step} steps without an interruption", flush=True)
        straight = workdir / "straight"
        flags = [f"--config.checkpoint.every={step}", f"--config.train.stop_after={step}"]
        with (workdir / "straight.txt").open("wb") as log:
            code = subprocess.run([*base, *flags, f"--workdir={straight}"], stdout=log, stderr=log, cwd=ROOT).returncode
        report |= {"checked_step": step, "different": ["it failed"] if code else differences(run, straight, step)}
    (workdir / "soak.json").write_text(json.dumps(report | {"attempts": attempts}, indent=1) + "\n")
    print(soak_figures.table(report))
    if not args.check:
        shutil.rmtree(workdir / "cache", ignore_errors=True)
    return int(bool(report["failed"] or report.get("different")))


if __name__ == "__main__":
    sys.exit(main())
