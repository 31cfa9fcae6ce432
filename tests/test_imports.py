"""The core must start fast and never pull in TensorFlow or SeqIO, not even through a submodule."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

import fm4m

CORE = pathlib.Path(fm4m.__file__).parent
# Modules that only data_pipelines may import.
FORBIDDEN = ("tensorflow", "seqio", "grain", "data_pipelines", "torch", "pickle5")


def test_no_core_module_imports_the_data_stack():
    names = [
        ".".join(("fm4m", *p.relative_to(CORE).with_suffix("").parts)).removesuffix(".__init__")
        for p in sorted(CORE.rglob("*.py"))
        if p.name != "__main__.py"
    ]
    assert "fm4m.train" in names
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"bad = [m for m in {FORBIDDEN!r} if m in sys.modules]\n"
        "sys.exit(f'the core imports {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_flax_stays_in_model_files():
    allowed = {"layers.py", "model.py", "vqvae_model.py"}
    users = {p.name for p in CORE.rglob("*.py") if _imports_flax(p)}
    assert users <= allowed, f"flax is imported in {sorted(users - allowed)}"


def _imports_flax(path: pathlib.Path) -> bool:
    lines = (line.strip() for line in path.read_text().splitlines())
    return any(line.startswith(("import flax", "from flax")) for line in lines)


@pytest.mark.slow
def test_a_step_is_timed_with_nothing_but_the_core():
    """benchmarks.step on a machine that has jax, flax, optax, orbax and ml_collections only."""
    absent = ("safetensors", "tokenizers", "PIL", "tensorboardX", "tqdm", "scipy", *FORBIDDEN)
    code = (
        "import sys\n"
        f"for name in {absent!r}: sys.modules[name] = None\n"
        "from benchmarks import step\n"
        "sys.exit(step.main(sys.argv[1:]))"
    )
    size = {"dim": 64, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 1, "dtype": "float32"}
    flags = [f"--config.model.{k}={v}" for k, v in size.items()]
    flags += ["--config.train.global_batch=2", "--config.data.num_inputs=16", "--config.data.num_targets=16"]
    config = CORE.parent / "configs" / "4m_ti.py"
    command = [sys.executable, "-c", code, f"--config={config}", *flags, "--steps=1", "--rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CORE.parent)
    assert done.returncode == 0, done.stderr
    assert "the plain form takes" in done.stdout
