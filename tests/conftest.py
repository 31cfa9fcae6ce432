"""Settings of the whole test suite: CPU, a compilation cache, and the order: slow tests last, where it can be."""

from __future__ import annotations

import collections
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile the same small programs again and again, in several processes; the folder is git-ignored.
_CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Without LLVM's optimisation a masking program compiles in 6 s instead of 30 on a busy machine, and without the fusion
# emitters (code by MLIR) a training step in 2.7 s of CPU time instead of 8.4; both run fast enough here.
_FLAGS = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*os.environ.get("XLA_FLAGS", "").split(), *_FLAGS]))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")


def pytest_configure(config):
    # Or pytest-xdist hands out the files with most tests first, and those of a single long test last.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    def slow(item) -> bool:
        return item.get_closest_marker("slow") is not None

    if "PYTEST_XDIST_WORKER" in os.environ:
        # Files go to processes whole: those with slow tests first, or one process works alone at the end.
        long = collections.Counter(item.path for item in items if slow(item))
        items.sort(key=lambda item: (-long[item.path], str(item.path), slow(item)))
    else:
        items.sort(key=slow)
