"""Does to small runs what can happen to big ones, and prints a table of what came of it.

    python -m benchmarks.faults --workdir=DIR [--only=WORD] [--out=FILE.md]

Every row is a run of `benchmarks.soak_run` (or, for files of data, of ``fm4m.train``) in a process of its own: what was
done to it, what it printed, its exit code, how long it took to end, and what the same command did afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 40
FLAGS = [
    "--config=benchmarks/soak_config.py", f"--config.train.total={STEPS} steps", "--config.optimizer.warmup=5 steps",
    "--config.checkpoint.every=10", "--config.eval.every=0", "--config.log.every=5",
    "--config.fault.timeout=15", "--config.fault.slow_timeout=240",
]  # fmt: skip
# Largest file that a process may write where no small disk can be made.
SMALL = 100_000


@dataclasses.dataclass
class Row:
    """One fault: what was done, what was printed, the exit code, seconds from the fault to the end, and what the same
    command did then."""

    fault: str
    said: str
    code: int
    seconds: float
    then: str = ""


class Bench:
    """Starts runs below a folder, which share a compilation cache."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.cache = f"--config.compilation_cache={folder / 'cache'}"

    def command(self, run: pathlib.Path, *flags: str) -> list[str]:
        return [sys.executable, "-m", "benchmarks.soak_run", *FLAGS, self.cache, *flags, f"--workdir={run}"]

    def start(self, command: list[str], log: pathlib.Path, fault: str = "", **more) -> subprocess.Popen:
        env = {**os.environ, "FM4M_FAULT": fault, **more.pop("env", {})}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=env, **more)

    def run(self, run: pathlib.Path, *flags: str, fault: str = "", **more) -> tuple[int, str, float]:
        """Exit code, what was printed, seconds."""
        # Not beside the run, which may be on the disk that is full.
        log, begun = self.folder / f"{' '.join(run.relative_to(self.folder).parts)}.log", time.monotonic()
        code = self.start(self.command(run, *flags), log, fault, **more).wait(900)
        return code, log.read_text(errors="replace"), time.monotonic() - begun

    def interrupted(self, name: str, how: int) -> tuple[pathlib.Path, Row]:
        """A run that got a signal after its second checkpoint."""
        run = self.folder / name
        log = run.with_suffix(".log")
        process = self.start(self.command(run), log, "slow@0.2")
        wait_for(lambda: (run / "checkpoints" / "20").exists(), process, log)
        process.send_signal(how)
        begun = time.monotonic()
        code = process.wait(300)
        said = sentence(log.read_text(), r"stopped at step.*") if how == signal.SIGTERM else ""
        return run, Row(name, said, code, time.monotonic() - begun)

    def again(self, run: pathlib.Path, *flags: str) -> str:
        """What the same command does, in words."""
        code, text, _ = self.run(run, *flags)
        begun = sentence(text, r"continuing at step \d+|starting from seed")
        return f"{begun}; exit code {code}" + ("" if code == 0 else f": {sentence(text, r'error: .*')}")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: pathlib.Path) -> None:
    """Returns when ``condition`` holds. Raises RuntimeError if the process ends before."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended by itself (code {process.returncode}):\n{log.read_text()[-3000:]}")
        time.sleep(0.02)


def sentence(text: str, pattern: str) -> str:
    """The first match of a pattern in what was printed."""
    found = re.search(pattern, text)
    return found.group().strip() if found else f"(nothing like {pattern!r})"


# ---- the faults


def killed(bench: Bench) -> list[Row]:
    run, row = bench.interrupted("killed (SIGKILL)", signal.SIGKILL)
    row.said = "nothing"
    return [dataclasses.replace(row, then=bench.again(run))]


def told(bench: Bench) -> list[Row]:
    run, row = bench.interrupted("told to stop (SIGTERM)", signal.SIGTERM)
    return [dataclasses.replace(row, then=bench.again(run))]


def damaged(bench: Bench) -> list[Row]:
    run, _ = bench.interrupted("damaged", signal.SIGKILL)
    rows = []
    for how in ("truncated", "emptied", "missing", "one bit flipped"):
        copy = bench.folder / f"file {how}"
        shutil.copytree(run, copy)
        newest = max((copy / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name) if p.name.isdigit() else -1)
        path = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes({"truncated": data[: len(data) // 2], "emptied": b""}.get(how, data))
        code, text, seconds = bench.run(copy)
        said = sentence(text, r"the checkpoint of step \d+ in .* is damaged.*")
        then = sentence(text, r"continuing at step \d+|starting from seed")
        rows.append(Row(f"newest checkpoint: largest file {how}", said, code, seconds, then))
    for part in ("params", "meta"):
        copy = bench.folder / f"all {part}"
        shutil.copytree(run, copy)
        for step in (copy / "checkpoints").glob("[0-9]*"):
            shutil.rmtree(step / part, ignore_errors=True)
        code, text, seconds = bench.run(copy)
        rows.append(Row(f"all checkpoints: {part} missing", sentence(text, r"error: .*"), code, seconds))
    return rows


def not_finite(bench: Bench) -> list[Row]:
    rows = []
    for fault, name in (("nan@15", "NaN in one batch"), ("nans@15", "NaN in all batches from one on")):
        code, text, seconds = bench.run(bench.folder / fault, fault=fault)
        pattern = r"error: .*" if code else r".*not finite.*"
        rows.append(Row(name, sentence(text, pattern), code, seconds))
    return rows


def data(bench: Bench) -> list[Row]:
    rows = []
    for fault, name in (("hang@15", "data source hangs at batch 15"), ("gone@15", "data source fails at batch 15")):
        run = bench.folder / fault
        code, text, seconds = bench.run(run, fault=fault)
        said = sentence(text, r"error: .*|process \d.*")
        rows.append(Row(name, said, code, seconds, bench.again(run)))
    return rows


def disk(bench: Bench) -> list[Row]:
    small, how = bench.folder / "small", "no file may grow over 100 kB (RLIMIT_FSIZE)"
    small.mkdir()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))  # noqa: E731
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode == 0:
        how, limit = "disk of 3 MB is full", None
    try:
        code, text, seconds = bench.run(small / "run", preexec_fn=limit)
        row = Row(how, sentence(text, r"error: .*"), code, seconds)
        if mounted.returncode == 0:
            subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        row.then = bench.again(small / "run")
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(small)], check=True)
    below = bench.folder / "file"
    below.write_text("")
    code, text, seconds = bench.run(below / "run")
    return [row, Row("run folder below a file", sentence(text, r"error: .*"), code, seconds)]


def two_processes(bench: Bench) -> list[Row]:
    rows = []
    for how, name in ((signal.SIGKILL, "one of two processes killed"), (signal.SIGSTOP, "one of two processes frozen")):
        run = bench.folder / name
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{s.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
        logs = [run.with_suffix(f".{i}.log") for i in range(2)]
        both = [bench.start(bench.command(run), log, "slow@0.2", env=env | {"JAX_PROCESS_ID": str(i)})
                for i, log in enumerate(logs)]  # fmt: skip
        wait_for(lambda: (run / "checkpoints" / "20").exists(), both[0], logs[0])  # noqa: B023
        both[1].send_signal(how)
        begun = time.monotonic()
        code = both[0].wait(900)
        seconds = time.monotonic() - begun
        both[1].kill()
        both[1].wait()
        said = sentence(logs[0].read_text(errors="replace"), r"process 1 .*")
        rows.append(Row(name, f"the other one: {said}", code, seconds, bench.again(run)))
    return rows


def records(bench: Bench) -> list[Row]:
    """With token files, through SeqIO and the loader."""
    folder = bench.folder / "data"
    folder.mkdir()
    (folder / "faulty.py").write_text(textwrap.dedent(MIXTURE.format(root=folder)))
    env = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-m", "faulty"], cwd=ROOT, env={**os.environ, **env}, check=True)
    flags = ["--config.data.mixture=faulty", "--config.data.modules=('faulty',)", "--config.eval.split=train",
             "--config.train.total=4000 steps", "--config.log.every=1"]  # fmt: skip
    path = next((folder / "train" / "fault_words").iterdir())
    whole, rows = path.read_bytes(), []
    for name in ("missing at the start", "cut short while training", "overwritten while training"):
        run = bench.folder / f"records {name}"
        command = [sys.executable, "-m", "fm4m.train", *bench.command(run, *flags)[3:]]
        log, begun = run.with_suffix(".log"), time.monotonic()
        if "start" in name:
            path.unlink()
        process = bench.start(command, log, env=env)
        if "while" in name:
            wait_for(lambda: (run / "checkpoints" / "10").exists(), process, log)  # noqa: B023
            begun = time.monotonic()
            with path.open("r+b") as file:
                if "cut" in name:
                    file.truncate(1000)
                else:
                    file.write(bytes(len(whole) // 2))
        code = process.wait(900)
        seconds = time.monotonic() - begun
        path.write_bytes(whole)
        said = sentence(log.read_text(errors="replace"), r"error: .*")
        rows.append(Row(f"file of records {name}", said, code, seconds))
    return rows


MIXTURE = """
    import numpy as np
    from data_pipelines import records, registry
    from data_pipelines.sources import TokenSource
    from fm4m.masking import Masking, MaskingComponent
    from fm4m.modalities import Modality

    ALL = [registry.add_modality(Modality("fault_depth", "tokens", vocab_size=64, grid=(4, 4))),
           registry.add_modality(Modality("fault_words", "sequence", vocab_size=600, max_tokens=24))]
    names = [m.name for m in ALL]
    registry.add_task("faulty_task", TokenSource("{root}", ("train",)), names)
    masking = Masking(24, 24, {{"*": (MaskingComponent(inputs=1.0, targets=1.0),)}})
    registry.add_mixture("faulty", [("faulty_task", 1.0)], masking)
    if __name__ == "__main__":
        rng = np.random.default_rng(0)
        for m in ALL:
            arrays = [rng.integers(300 if m.kind == "sequence" else 0, m.vocab_size, 16) for _ in range(512)]
            records.write_modality("{root}", "train", m, arrays, [str(i) for i in range(512)], overwrite=True)
"""

FAULTS = (killed, told, damaged, not_finite, data, disk, two_processes, records)


def markdown(rows: list[Row], folder: pathlib.Path) -> str:
    """The table."""
    clean = lambda text: text.replace(str(folder), "RUNS").replace("|", "\\|")  # noqa: E731
    lines = ["| Fault | What it printed | Exit code | Seconds to its end | The same command then |",
             "|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        lines.append(f"| {r.fault} | {clean(r.said)} | {r.code} | {r.seconds:.1f} | {clean(r.then)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="a new folder")
    parser.add_argument("--only", default="", help=f"part of one of: {', '.join(f.__name__ for f in FAULTS)}")
    parser.add_argument("--out", help="also write the table to this file")
    args = parser.parse_args(argv)
    folder = pathlib.Path(args.workdir).absolute()
    folder.mkdir(parents=True)
    bench, rows = Bench(folder), []
    for fault in FAULTS:
        if args.only in fault.__name__:
            new = fault(bench)
            rows += new
            print("\n".join(markdown(new, folder).splitlines()[2:]), flush=True)
    table = markdown(rows, folder)
    print(table)
    if args.out:
        pathlib.Path(args.out).write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
