"""Starts runs from a process that has imported everything, so that one costs no import: `Runs`.

``python tests/fork_runs.py MODULE`` imports the module, reads a line of JSON {"argv", "log"} for each run, forks, and
in the new process calls the module's main with that ``sys.argv``. It answers with two lines: the process id, and the
exit code (minus the signal's number if one ended it).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import traceback

HERE = pathlib.Path(__file__).resolve().parent


class Runs:
    """A context. ``start`` starts a run, ``wait`` returns its exit code; one at a time.

    Args:
      module: whose ``main()`` a run calls; what it imports is shared by all runs.
      env: environment variables of all runs.
    """

    def __init__(self, module: str, **env: str):
        paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "fork_runs.py"), module], text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, **env},
        )  # fmt: skip

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, argv: list[str], log: pathlib.Path) -> int:
        """Starts a run whose output goes to ``log``; returns its process id."""
        self._server.stdin.write(json.dumps({"argv": argv, "log": str(log)}) + "\n")
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """The exit code of the run that was started last, minus the number of the signal that ended it."""
        return int(self._server.stdout.readline())

    def cpu_seconds(self) -> float:
        """Processor time of all runs that have ended."""
        fields = pathlib.Path(f"/proc/{self._server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def serve(module: str) -> None:
    """Answers until standard input ends."""
    import importlib

    main = importlib.import_module(module).main
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_run(main, request))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(main, request: dict) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    sys.argv = [sys.argv[1], *request["argv"]]
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


if __name__ == "__main__":
    serve(sys.argv[1])
