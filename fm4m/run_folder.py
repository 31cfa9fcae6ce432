"""What a run's folder says about how the run was made: configuration, parameters, and the environment of each attempt.

  config.json        the configuration now in force
  config-STEP.json   the one before it, where an attempt continued at STEP with another
  parameters.txt     path, shape, layout and weight decay of every parameter
  environment.json   one entry an attempt: time, step, command, commit, versions, hosts, devices, environment variables
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

import fm4m
from fm4m import files, optim, sharding

log = logging.getLogger("fm4m")

ENVIRONMENT = "environment.json"
FORMAT = 1
# Variables that change what JAX, XLA or a TPU does. Others may hold passwords and are never written.
VARIABLES = re.compile(
    r"XLA_FLAGS|LIBTPU_INIT_ARGS|JAX_[A-Z0-9_]+|XLA_PYTHON_CLIENT_[A-Z_]+|TF_GPU_ALLOCATOR|CUDA_VISIBLE_DEVICES|"
    r"TPU_(ACCELERATOR_TYPE|CHIPS_PER_[A-Z_]+|HOST_BOUNDS|NAME|PROCESS_[A-Z_]+|TOPOLOGY|VISIBLE_[A-Z_]+|WORKER_[A-Z_]+)|"
    r"MEGASCALE_(COORDINATOR_ADDRESS|NUM_SLICES|SLICE_ID)|EPATH_USE_TF|FM4M_[A-Z_]+"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
_HOST_BYTES = 64


def write(workdir: str | os.PathLike, config: Any, params: Any, step: int) -> None:
    """Writes or extends the files above; every process of a run calls it, and process 0 writes.

    Args:
      workdir: folder of the run.
      config: from `fm4m.config`.
      params: tree of `jax.ShapeDtypeStruct` with shardings.
      step: the step that this attempt starts from.
    """
    hosts = host_names()
    if jax.process_index():
        return
    workdir = epath.Path(workdir)
    write_config(workdir, config.to_json_best_effort(indent=2) + "\n", step)
    files.write_whole(workdir / "parameters.txt", parameter_table(params))
    path = workdir / ENVIRONMENT
    attempts = [*read_environments(workdir), environment(step, hosts)]
    files.write_whole(path, json.dumps({"format": FORMAT, "attempts": attempts}, indent=1) + "\n")


def write_config(workdir: epath.Path, text: str, step: int) -> None:
    """Writes config.json; another one that is there stays as ``config-STEP.json``, and the log names what changed."""
    path = workdir / "config.json"
    if path.exists() and (old := path.read_text()) != text:
        kept, number = workdir / f"config-{step}.json", 1
        while kept.exists() and kept.read_text() != old:
            number += 1
            kept = workdir / f"config-{step}-{number}.json"
        files.write_whole(kept, old)
        log.info("the configuration is another from step %d on (before: %s): %s", step, kept, _changes(old, text))
    files.write_whole(path, text)


def environment(step: int, hosts: list[str]) -> dict[str, Any]:
    """What this attempt runs in; one JSON-able entry of environment.json."""
    devices = jax.devices()
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "folder": os.getcwd(),
        "fm4m": {"version": fm4m.__version__} | source_version(pathlib.Path(fm4m.__file__).parents[1]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "hosts": hosts,
        "processes": jax.process_count(),
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "variables": allowed_variables(os.environ),
    }


def allowed_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of `VARIABLES`, without any whose name speaks of a secret."""
    return {k: v for k, v in sorted(variables.items()) if VARIABLES.fullmatch(k) and not _SECRET.search(k)}


def source_version(root: pathlib.Path) -> dict[str, Any]:
    """{"commit", "changed": whether tracked files differ from it}; {} for a source that is no git checkout."""
    if not (root / ".git").exists():
        return {}
    # "status" may otherwise write the index, which belongs to whoever works in the checkout.
    git = ["git", "--no-optional-locks", "-C", str(root)]
    try:
        run = lambda *args: subprocess.run([*git, *args], capture_output=True, text=True, timeout=30, check=True)  # noqa: E731
        commit = run("rev-parse", "HEAD").stdout.strip()
        return {"commit": commit, "changed": bool(run("status", "--porcelain", "--untracked-files=no").stdout.strip())}
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return {"commit": None, "problem": said[0] if said else type(error).__name__}


def host_names() -> list[str]:
    """Name of the host of every process, in order. All processes call it."""
    own = np.zeros(_HOST_BYTES, np.uint8)
    name = socket.gethostname().encode()[:_HOST_BYTES]
    own[: len(name)] = list(name)
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import process_allgather

        sharding.wait_for_all("the folder of the run is described")
        own = process_allgather(own)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in own.reshape(-1, _HOST_BYTES)]


def read_environments(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of environment.json, oldest first; none if there is none. A damaged file is reported and left out."""
    path = epath.Path(workdir) / ENVIRONMENT
    if not path.exists():
        return []
    try:
        attempts = json.loads(path.read_text())["attempts"]
        if not all(isinstance(attempt, dict) for attempt in attempts):
            raise ValueError("an attempt is not an object")
        return list(attempts)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s cannot be read (%s): environments are listed anew from here", path, error)
        return []


def parameter_table(params: Any) -> str:
    """Text: path, shape, layout and weight decay of every parameter."""
    rows, decayed = [], jax.tree.leaves(optim.decay_mask(params))
    for (path, x), decay in zip(jax.tree_util.tree_leaves_with_path(params), decayed):
        rows.append((optim.path_name(path), str(x.shape), str(x.sharding.spec), "decayed" if decay else "not decayed"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() + "\n" for row in rows)


def _changes(old: str, new: str) -> str:
    try:
        before, after = (_flat(json.loads(text)) for text in (old, new))
    except ValueError:
        return "the old one was no JSON"
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    listed = [f"{key} {before.get(key)!r} -> {after.get(key)!r}" for key in changed[:5]]
    return ", ".join(listed) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}
