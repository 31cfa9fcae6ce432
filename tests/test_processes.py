"""Which processes belong to a run: what JAX is told on TPUs, on other machines, and what the launchers say."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from fm4m import exit_codes, processes
from fm4m.config_file import ConfigError

HERE = pathlib.Path(__file__).resolve().parent
GIVEN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture
def start(monkeypatch):
    """Calls `processes.start` with a JAX that finds so many processes; returns how it was initialized."""

    def call(given, *, tpu=False, found=1, error=None):
        calls = []

        def initialize(*args, **kwargs):
            calls.append((args, kwargs))
            if error:
                raise error

        for name in processes.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(processes, "on_tpu", lambda: tpu)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(calls) and not error)
        monkeypatch.setattr(jax, "process_count", lambda: found)
        processes.start(120, 50)
        return calls

    return call


def test_one_process_is_not_joined_with_anything(start):
    assert start({}) == []


def test_the_three_variables(start):
    [(args, kwargs)] = start(GIVEN, found=4)
    assert args == ("10.0.0.2:8476", 4, 3)
    assert kwargs["heartbeat_timeout_seconds"] == 50 and kwargs["initialization_timeout"] > 120
    # Slurm's or MPI's variables do not mix in.
    assert kwargs["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES without JAX_PROCESS_ID"),
        # A machine of a TPU job whose chips are gone: the launcher says only how many machines there are.
        ({"JAX_PROCESS_ID": "", "JAX_COORDINATOR_ADDRESS": ""}, "this machine's JAX finds no TPU"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "must be HOST:PORT"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 of JAX_NUM_PROCESSES=4"),
        ({"JAX_NUM_PROCESSES": "four"}, "must be whole numbers"),
    ],
)
def test_wrong_variables_are_a_sentence(start, change, message):
    with pytest.raises(ConfigError, match=message):
        start(GIVEN | change)


def test_on_tpus_jax_finds_the_processes_and_the_launcher_only_counts(start):
    # Address and numbers of a launcher may differ from those of the chips, and are not passed on.
    for given in ({}, {"JAX_NUM_PROCESSES": "4"}, GIVEN):
        [(args, kwargs)] = start(given, tpu=True, found=4)
        assert args == () and set(kwargs) == {"initialization_timeout", "heartbeat_timeout_seconds"}
    with pytest.raises(ConfigError, match=r"8 processes were started .* JAX finds 4: a machine is missing"):
        start({"JAX_NUM_PROCESSES": "8"}, tpu=True, found=4)


def test_tpus_outside_google_cloud_are_alone(start):
    unknown = ValueError("coordinator_address should be defined.")
    assert len(start({}, tpu=True, error=unknown)) == 1
    with pytest.raises(ConfigError, match="chips of 2 machines, but could not join"):
        start({}, tpu=True, found=2, error=unknown)
    with pytest.raises(ConfigError, match="could not ask Google's metadata server .*: no route"):
        start({}, tpu=True, error=ConnectionError("no route"))


def test_jax_says_by_its_platforms_that_there_are_tpus(monkeypatch):
    assert not processes.on_tpu()
    monkeypatch.setattr(type(jax.config), "jax_platforms", property(lambda _: "tpu,cpu"), raising=False)
    assert processes.on_tpu()


def test_others_that_never_come_are_a_sentence_with_the_address(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    program = "from fm4m import processes; processes.start(1.5, 20)"
    command, env = [sys.executable, "-c", program], env | {"JAX_PROCESS_ID": "1"}
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == exit_codes.HUNG
    assert f"process 1 of 2 ({socket.gethostname()}) waited 2 s for the others at {address}; nothing" in done.stderr


def test_a_process_that_failed_does_not_wait_for_the_others(monkeypatch, capsys):
    left = []

    def fail():
        raise KeyError("x")

    def leave(code):
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for program in (lambda: exit_codes.FAILED, fail, lambda: exit_codes.PREEMPTED):
        with pytest.raises(SystemExit):
            processes.run(program)
    assert left == [exit_codes.FAILED, exit_codes.FAILED] and "KeyError: 'x'" in capsys.readouterr().err
    # Alone, an error is Python's own affair.
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    with pytest.raises(KeyError):
        processes.run(fail)
