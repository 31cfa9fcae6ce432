"""No module of the project can run what a data file says: no pickles, no eval, no shells. Read from the source text."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(p for part in ("fm4m", "data_pipelines", "launch") for p in (ROOT / part).rglob("*.py"))

MODULES = {"pickle", "_pickle", "cPickle", "pickle5", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml",
           "runpy", "code", "codeop", "imp", "torch"}  # fmt: skip
NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
# Readers that unpickle unless told not to; each call must say allow_pickle=False itself.
ARRAYS = {"load", "read_array"}
# A configuration is a Python file by design, and the only one that is run: the one that --config names.
MAY = {("runpy", "fm4m/config_file.py")}


def faults(text: str, file: str) -> list[str]:
    """What a module does that it may not, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            roots = {name.split(".")[0] for name in names}
            found += [f"{node.lineno}: imports {r}" for r in roots & MODULES if (r, file) not in MAY]
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            found.append(f"{node.lineno}: calls {node.func.id}")
        if keywords.get("shell") or keywords.get("allow_pickle"):
            found.append(f"{node.lineno}: {'shell' if keywords.get('shell') else 'allow_pickle'} is set")
        if isinstance(node.func, ast.Attribute):
            owner, name = ast.unparse(node.func.value), node.func.attr
            numpy = owner in ("np", "numpy", "np.lib.format", "numpy.lib.format")
            if numpy and name in ARRAYS and keywords.get("allow_pickle") is not False:
                found.append(f"{node.lineno}: {owner}.{name} without allow_pickle=False")
            if (owner, name) in {("os", "system"), ("os", "popen")}:
                found.append(f"{node.lineno}: calls {owner}.{name}")
    return found


def test_nothing_is_executed_from_data():
    assert len(FILES) > 100
    found = {str(p.relative_to(ROOT)): faults(p.read_text(), p.relative_to(ROOT).as_posix()) for p in FILES}
    assert not {file: what for file, what in found.items() if what}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from marshal import loads", "import torch.serialization", "eval('1')", "np.load(path)",
     "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "subprocess.run('ls', shell=True)",
     "os.system('ls')", "import runpy"],
)  # fmt: skip
def test_the_search_finds(line):
    assert faults(line, "fm4m/model.py") and not faults("np.load(path, allow_pickle=False)", "fm4m/model.py")
