"""The process that compiles one step: `fm4m.aot.compiler` starts it, reads its files, and may end it early.

    python -m fm4m.aot.worker FOLDER

FOLDER holds ``request.json``: {"arguments": the configuration's flags, "topology", "slices"}. It writes ``facts.json``
before it compiles; then ``module.txt``, the optimized module; and last ``result.json``, with times, memory, or what
went wrong. XLA dumps its own files into FOLDER/dump as it goes.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import Any

from fm4m.aot import topology as topology_lib


def main(folder: pathlib.Path) -> None:
    """Compiles what FOLDER/request.json asks for."""
    from fm4m import config as config_lib
    from fm4m.files import complete_file

    try:
        result = compile_request(folder, json.loads((folder / "request.json").read_text()))
    except config_lib.ConfigError as error:
        result = {"config_error": str(error)}
    with complete_file(folder / "result.json") as path:
        path.write_text(json.dumps(result))


def compile_request(folder: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    """Compiles a step; returns what goes into ``result.json``. Raises ConfigError."""
    import jax

    from fm4m import config as config_lib
    from fm4m import step as step_lib
    from fm4m.aot import build
    from fm4m.files import complete_file

    topology = topology_lib.parse(request["topology"], request["slices"])
    topology_lib.require_libtpu()
    config = config_lib.from_flags(request["arguments"], "")
    program = build.build(config, topology)
    start = time.perf_counter()
    lowered = program.step.lower(*program.arguments)
    with complete_file(folder / "facts.json") as path:
        path.write_text(json.dumps({**program.facts, "trace_seconds": time.perf_counter() - start}))
    options = {"xla_dump_to": str(folder / "dump"), "xla_dump_hlo_as_text": True}
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options={**step_lib.compiler_options("tpu"), **options})
    except jax.errors.JaxRuntimeError as error:
        return {"compile_error": str(error), "compile_seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    (folder / "module.txt").write_text(compiled.as_text())
    used = compiled.memory_analysis()
    memory = {k: int(getattr(used, k)) for k in dir(used) if k.endswith("_in_bytes") and "host" not in k}
    return {"compile_seconds": seconds, "memory": memory}


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
