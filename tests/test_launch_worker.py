"""The script on the machines with real processes, and the archive of a real git repository."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tarfile
import time

import pytest

from launch import source
from launch.gcloud import LaunchError, Result, Runner

SCRIPT = pathlib.Path(source.ROOT) / "launch" / "worker.sh"


@pytest.fixture
def machine(tmp_path):
    """Runs the script as worker 1 of a machine whose files are in a folder of their own."""
    environment = os.environ | {
        "FM4M_ROOT": str(tmp_path), "FM4M_WORKER": "1", "FM4M_SOURCE": str(tmp_path), "FM4M_PYTHON": sys.executable,
        "FM4M_STOP_SECONDS": "20",
    }  # fmt: skip

    def call(*argv: str) -> str:
        done = subprocess.run(["bash", str(SCRIPT), *argv], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


def start(machine, program: str, *facts: str) -> str:
    facts = facts or ("4", "c0ffee")
    return machine("start", "r1", *facts, "-S", "-c", program, "it's $HOME")


def until_ended(machine) -> str:
    for _ in range(100):
        if "running" not in (said := machine("status", "r1")):
            return said
        time.sleep(0.05)
    raise AssertionError(said)


def test_start_status_log_and_exit_code(machine):
    assert machine("status", "r1") == "fm4m-status 1 none -1"
    names = ("JAX_NUM_PROCESSES", "FM4M_GIT_COMMIT", "FM4M_RUN_NAME")
    program = f"import os, sys; print(sys.argv[1], *(os.environ[k] for k in {names})); sys.exit(7)"
    assert start(machine, program) == "fm4m-started 1"
    assert until_ended(machine) == "fm4m-status 1 exited 7"
    assert machine("log", "r1", "1") == "it's $HOME 4 c0ffee r1"
    assert machine("log", "r1", "12") == "4 c0ffee r1"


def test_jax_finds_the_other_machines_by_itself(machine, monkeypatch):
    """The launcher says how many there are, not which is which: see fm4m/processes.py."""
    start(machine, "import os; print(sorted(k for k in os.environ if k.startswith('JAX_')))")
    until_ended(machine)
    said = machine("log", "r1", "1")
    assert "JAX_NUM_PROCESSES" in said and "JAX_PROCESS_ID" not in said and "JAX_COORDINATOR" not in said


def test_stop_lets_the_trainer_save(machine):
    # As on a machine that shuts down, the shell around the trainer gets the signal, too.
    handler = "lambda *_: (os.kill(os.getppid(), 15), time.sleep(0.3), print('saved'), sys.exit(75))"
    save = f"import os, signal, sys, time; signal.signal(15, {handler}); print('up'); time.sleep(30)"
    start(machine, save)
    for _ in range(100):
        if machine("log", "r1", "1") == "up":
            break
        time.sleep(0.05)
    assert "running already" in start(machine, save)
    assert machine("stop", "r1") == "fm4m-stopped 1 75"
    assert machine("status", "r1") == "fm4m-status 1 stopped 75"
    assert machine("log", "r1", "1").endswith("saved")
    start(machine, "pass")
    assert until_ended(machine) == "fm4m-status 1 exited 0"


def test_killed_and_vanished(machine, tmp_path):
    start(machine, "import os; os.kill(os.getpid(), 9)")
    assert until_ended(machine) == "fm4m-status 1 exited 137"
    (tmp_path / "r1" / "exit").unlink()  # as a machine that went down with its trainer
    assert machine("status", "r1") == "fm4m-status 1 lost -1"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("FM4M_JOBS", str(tmp_path / "jobs"))
    root = tmp_path / "checkout"
    for name in source.NEEDED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("old\n")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    for key in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{key}_NAME", "n"), monkeypatch.setenv(f"GIT_{key}_EMAIL", "e")
    return root


def shipped(runner: Runner, root: pathlib.Path, commit: str) -> bytes:
    with tarfile.open(source.pack(runner, "r1", commit, root)) as tar:
        return tar.extractfile("fm4m/train.py").read()


def test_commit_is_shipped_and_a_dirty_tree_refused(checkout, capsys):
    runner = Runner()
    commit = source.resolve(runner, False, checkout)
    assert len(commit) == 40 and shipped(runner, checkout, commit) == b"old\n"
    (checkout / "fm4m/train.py").write_text("new\n")
    (checkout / "notes").write_text("x")
    with pytest.raises(LaunchError, match="not committed: fm4m/train.py, notes"):
        source.resolve(runner, False, checkout)
    dirty = source.resolve(runner, True, checkout)
    assert dirty != commit and shipped(runner, checkout, dirty) == b"new\n"
    assert "not shipped, because git does not know them: notes" in capsys.readouterr().out


def test_commit_without_the_launcher_is_refused(checkout):
    subprocess.run(["git", "-C", str(checkout), "rm", "-q", "--cached", "launch/worker.sh"], check=True)
    (checkout / "launch/worker.sh").unlink()
    subprocess.run(["git", "-C", str(checkout), "commit", "-q", "-m", "m"], check=True)
    with pytest.raises(LaunchError, match=r"has no launch/worker\.sh"):
        source.pack(Runner(), "r1", source.resolve(Runner(), False, checkout), checkout)


def test_programs_that_are_missing_or_hang():
    with pytest.raises(LaunchError, match="is not on PATH"):
        Runner().run(["no-such-program-here"])
    slow = Runner().run(["sleep", "5"], timeout=0.1)
    assert slow.kind == "timeout" and "no answer within" in slow.last_words()
    assert Result(255, "", "x").kind == "ssh" and Result(1, "", "").last_words() == "exit code 1, without a message"


def test_another_process_of_the_same_number_is_not_the_trainer(machine, tmp_path):
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "pid").write_text(f"{os.getpid()}\n")
    assert machine("status", "r1") == "fm4m-status 1 lost -1"
    assert machine("stop", "r1") == "fm4m-stopped 1 -1"
