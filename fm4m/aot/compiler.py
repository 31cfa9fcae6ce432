"""Compiles a step for a topology in a process of its own, to the end or only as far as memory and schedule are known.

Nearly all of XLA:TPU's time goes into code generation, which comes last: what a program needs and which collectives it
runs is known after about ten seconds, when XLA has dumped its optimized module and its memory report. The process is
then ended. A process of its own also keeps libtpu's messages and crashes apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fm4m.aot import hlo
from fm4m.aot.chips import GIB
from fm4m.aot.topology import Topology
from fm4m.config_file import ConfigError

_SUFFIXES = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
# Messages of libtpu when a program does not fit: "... required ... (75.07G) exceeds available HBM (30.75G)", and
# "Used 37.50G of 30.75G hbm".
_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", re.IGNORECASE),
)


class CompilerError(RuntimeError):
    """The compiler ended without a result; the message holds its own last words."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a compiled step.

    Attributes:
      facts: of the program (`fm4m.aot.build.Program.facts`), and ``trace_seconds``.
      fits: whether a chip has enough memory.
      hbm_bytes: what the program needs of it at its peak, arguments included (about, when it does not fit).
      hbm_limit: what the compiler lets it use.
      module: the optimized module; None when it does not fit.
      complete: whether code was generated, so that the module holds estimates of cycles.
      compile_seconds: of what was done.
      memory: the compiler's own memory statistics, if complete.
    """

    facts: dict[str, Any]
    fits: bool
    hbm_bytes: int
    hbm_limit: int
    module: hlo.Module | None
    complete: bool
    compile_seconds: float
    memory: dict[str, int]


def compile_step(arguments: Sequence[str], topology: Topology, *, fast: bool = False, keep: str = "") -> Compiled:
    """Compiles the step of a configuration.

    Args:
      arguments: the configuration's flags: ``--config=FILE``, ``--config.KEY=VALUE``.
      topology: what to compile for.
      fast: stop before code generation.
      keep: a folder for the text of the module and the memory report; "": none.

    Raises:
      ConfigError: the configuration cannot run there.
      CompilerError: anything else went wrong.
    """
    with tempfile.TemporaryDirectory(prefix="fm4m-aot-") as temporary:
        folder = pathlib.Path(temporary)
        request = {"arguments": list(arguments), "topology": topology.name, "slices": topology.slices}
        (folder / "request.json").write_text(json.dumps(request))
        with _worker(folder) as process:
            stopped = _wait(process, folder, fast)
        compiled = _read(folder, topology, stopped, process.returncode)
        if keep:
            _keep(folder, pathlib.Path(keep))
        return compiled


@contextlib.contextmanager
def _worker(folder: pathlib.Path) -> Iterator[subprocess.Popen]:
    """The compiling process, ended with the block whatever happens."""
    command = [sys.executable, "-m", "fm4m.aot.worker", str(folder)]
    # JAX itself computes nothing here; without this it would take the TPU of a machine that has one.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen, folder: pathlib.Path, fast: bool) -> float | None:
    """Waits for the end, or for the dumps if ``fast``: then the seconds that compiling took so far."""
    while process.poll() is None:
        time.sleep(0.1)
        if fast and (folder / "facts.json").exists() and _dumps_complete(folder):
            return time.time() - (folder / "facts.json").stat().st_mtime
    return None


def _dumps_complete(folder: pathlib.Path) -> bool:
    module, report = _dump(folder, "after_optimizations_after_buffer_assignment"), _dump(folder, "memory-usage-report")
    if module is None or report is None:
        return False
    with open(module, "rb") as file:
        file.seek(max(module.stat().st_size - 16, 0))
        ends = file.read().rstrip().endswith(b"}")
    # A computation in the middle also ends with a brace: the file must have stopped growing too.
    size = module.stat().st_size, report.stat().st_size
    time.sleep(0.3)
    return ends and min(size) > 0 and size == (module.stat().st_size, report.stat().st_size)


def _dump(folder: pathlib.Path, kind: str) -> pathlib.Path | None:
    return next(iter(sorted((folder / "dump").glob(f"*jit_step*{kind}.txt"))), None)


def _read(folder: pathlib.Path, topology: Topology, stopped: float | None, code: int) -> Compiled:
    result: dict[str, Any] = {}
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
    elif stopped is None:
        raise CompilerError(_last_words(folder, code))
    if "config_error" in result:
        raise ConfigError(result["config_error"])
    facts = json.loads((folder / "facts.json").read_text())
    seconds = result.get("compile_seconds", stopped)
    if "compile_error" in result:
        required, limit = too_large(result["compile_error"])
        if not required:
            raise CompilerError(f"the compiler says: {result['compile_error'].strip()}")
        return Compiled(facts, False, required, limit, None, False, seconds, {})
    text = folder / "module.txt"
    complete = text.exists()
    module = hlo.parse((text if complete else _dump(folder, "after_optimizations_after_buffer_assignment")).read_text())
    report = _dump(folder, "memory-usage-report")
    memory = result.get("memory", {})
    used = hbm_of_report(report.read_text()) if report else memory["peak_memory_in_bytes"]
    limit = topology.chip.hbm_bytes
    return Compiled(facts, used <= limit, used, limit, module, complete, seconds, memory)


def too_large(message: str) -> tuple[int, int]:
    """(bytes required, bytes available) from the message of a program that does not fit; zeros for any other."""
    for pattern in _TOO_LARGE:
        if match := pattern.search(message):
            required, r, available, a = match.groups()
            return int(float(required) * _SUFFIXES[r]), int(float(available) * _SUFFIXES[a])
    return 0, 0


def hbm_of_report(report: str) -> int:
    """Bytes of HBM at the peak, from XLA's memory report; other memory spaces are on the chip."""
    match = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", report)
    if match is None:
        raise CompilerError("XLA's memory report has no line for HBM; this libtpu writes another form")
    return int(match[1])


def _last_words(folder: pathlib.Path, code: int) -> str:
    lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
    if code == -signal.SIGKILL:
        return (
            "the compiler was killed, most likely because this machine's memory is full: large models unrolled need "
            "over 20 GiB of it. Compile groups of layers instead, for example --config.model.scan_group=4"
        )
    if code == 2 and lines:  # a sentence about a flag
        raise ConfigError(lines[-1].removeprefix("error: "))
    return "\n".join([f"the compiler ended with code {code}; its last lines:", *lines[-15:]])


def _keep(folder: pathlib.Path, where: pathlib.Path) -> None:
    where.mkdir(parents=True, exist_ok=True)
    text = folder / "module.txt"
    dumps = {"module.txt": text if text.exists() else _dump(folder, "after_optimizations_after_buffer_assignment"),
             "memory.txt": _dump(folder, "memory-usage-report"), "facts.json": folder / "facts.json"}  # fmt: skip
    for name, path in dumps.items():
        if path is not None and path.exists():
            (where / name).write_text(path.read_text())
