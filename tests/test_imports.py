"""The core must start fast and never pull in TensorFlow or SeqIO, not even through a submodule."""

from __future__ import annotations

import pathlib
import subprocess
import sys

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
