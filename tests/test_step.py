from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import eight_devices
import pytest

HERE = pathlib.Path(__file__).resolve().parent


@pytest.mark.slow
def test_every_mesh_trains_as_one_device_does():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(HERE / "eight_devices.py")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == list(eight_devices.CASES)
