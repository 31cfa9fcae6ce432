"""`tiny_run` whose training step is traced and compiled once for all runs, and afterwards read from a file.

The persistent compilation cache spares compiling, but not tracing and lowering, which are most of a tiny run's start.
FM4M_STEP names the file, which only this test's own processes write and read.
"""

from __future__ import annotations

import os
import pathlib
import pickle

import jax
import tiny_run
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from fm4m import step as step_lib
from fm4m import train  # noqa: F401  imported once, before the processes of the runs are forked

_compile_step = step_lib.compile_step


def compile_once(step, abstract, ready):
    path = pathlib.Path(os.environ["FM4M_STEP"])
    if path.exists():
        return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
    # What came out of the persistent cache cannot be written again.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    compiled = _compile_step(step, abstract, ready)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    path.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    return compiled


def main():
    step_lib.compile_step = compile_once
    return tiny_run.main()
