"""The README must not drift from the files it shows and the commands it names."""

from __future__ import annotations

import importlib.util
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_is_the_file_that_another_test_runs():
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    example = (ROOT / "data_pipelines/mixtures/example_edges.py").read_text()
    assert shown == example
    assert len(example.splitlines()) <= 30


def test_commands_name_modules_and_configs_that_exist():
    modules = set(re.findall(r"python -m ([a-z_][\w.]*)", README))
    assert "fm4m.train" in modules and "data_pipelines.rooms.prepare" in modules
    for module in modules:
        assert importlib.util.find_spec(module), f"README: python -m {module} does not exist"
    for path in re.findall(r"--config=(\S+\.py)", README):
        assert (ROOT / path).is_file(), f"README: {path} does not exist"


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), f"README: {target} does not exist"


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
