"""The configuration of a preparation: flags, defaults of steps, and messages."""

from __future__ import annotations

import pathlib
import runpy

import pytest

from data_pipelines.prepare import config as config_lib
from fm4m.config_file import ConfigError

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs" / "prepare"
TEXT = """
from data_pipelines.prepare import config

def get_config():
    c = config.default()
    c.source = dict(kind="folder", path="photos")
    c.modalities = {
        "rgb@64": dict(make="pixels", size=64, patch_size=8),
        "caption": dict(make="caption"),
        "tok_edge": dict(make="codes", tokenizer="t", label=dict(kind="canny", low=50)),
    }
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(TEXT)
    return path


def read(file, *flags):
    return config_lib.from_flags([f"--config={file}", "--out=data", *flags])


def test_flags_set_keys_in_the_type_they_have(file):
    command = read(
        file, "--processes=3", "--config.source.path=7", "--config.source.captions=c.csv", "--config.crops.count=2",
        "--config.validation.share=0.5", "--config.modalities.rgb@64.size=(32, 48)", "--config.replace=caption",
        "--config.modalities.tok_edge.label.low=60", "--config.modalities.caption.max_tokens=12",
        "--config.other_source=true", "--config.crops.scale=(0.5, 1)",
    )  # fmt: skip
    c = command.config
    assert command.processes == 3 and command.out == pathlib.Path("data").absolute()
    assert c.source.to_dict() == {"kind": "folder", "path": "7", "captions": "c.csv"}
    assert c.crops.count == 2 and c.validation.share == 0.5 and c.replace == ("caption",) and c.other_source is True
    assert tuple(c.crops.scale) == (0.5, 1)
    options = config_lib.step_options("tok_edge", c.modalities["tok_edge"])
    assert options["label"] == {"kind": "canny", "low": 60} and options["input"] == "rgb"
    assert config_lib.step_options("caption", c.modalities.caption) == {
        "make": "caption", "tokenizer": "", "max_tokens": 12, "input": "caption",
    }  # fmt: skip
    assert config_lib.step_options("rgb@64", c.modalities["rgb@64"])["size"] == [32, 48]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.crop.count=2", "no configuration key named 'crop.count'. Did you mean 'crops.count'"),
        ("--config.crops.cuont=2", "Did you mean 'crops.count'"),
        ("--config.crops.count=two", "crops.count = 'two': expected a value of type int"),
        ("--config.crops.count=0", "crops.count = 0: must be at least 1"),
        ("--config.crops.scale=(0.5, 2)", "crops.scale.*at most 1"),
        ("--config.modalities.caption.max_token=3", "named 'max_token'. Did you mean 'max_tokens'"),
        ("--config.modalities.caption.max_tokens=x", "modalities.caption.max_tokens = 'x': expected a whole number"),
        ("--config.modalities.caption.make=captions", "named 'captions'. Did you mean 'caption'"),
        ("--config.modalities.capt.make=caption", "no configuration key named 'modalities.capt.make'"),
        ("--config.modalities.tok_edge.label=canny", r"tok_edge.label = 'canny': write dict\(kind="),
        ("--config.replace=captoin", "replace: .*Did you mean 'caption'"),
        ("--config.name=my-data", "name = 'my-data'.*name of a Python module"),
        ("--config.validation.share=1.0", "validation.share = 1.0"),
        ("--config.validation.source={'kind': 'folder'} --config.validation.share=0.1", "must be 0 where"),
        ("--processes=0", "--processes=0 is not a number of at least 1"),
        ("--proceses=2", "'--proceses=2' is not a flag; usage"),
        ("positional", "'positional' is not a flag"),
    ],
)
def test_wrong_flags_are_named(file, flag, message):
    with pytest.raises(ConfigError, match=message):
        read(file, *flag.split(" --")[:1], *(f"--{rest}" for rest in flag.split(" --")[1:]))


def test_missing_flags_and_foreign_files(file, tmp_path):
    with pytest.raises(ConfigError, match="--out is missing; usage"):
        config_lib.from_flags([f"--config={file}"])
    with pytest.raises(ConfigError, match="--config is missing; usage"):
        config_lib.from_flags(["--out=x"])
    with pytest.raises(ConfigError, match="no configuration file"):
        config_lib.from_flags(["--out=x", "--config=nowhere.py"])
    demo = CONFIGS.parent / "demo.py"
    with pytest.raises(ConfigError, match=r"demo.py: .* data_pipelines.prepare.config.default\(\) gave"):
        config_lib.from_flags(["--out=x", f"--config={demo}"])
    command = config_lib.from_flags(["--out=x", f"--config={file}", "--runner=Direct"], foreign=True)
    assert command.rest == ("--runner=Direct",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("c.sources = 3", "line 6: there is no configuration key named 'sources'. Did you mean 'source'"),
        ("c.crops.counts = 3", "line 6: .*Did you mean 'count'"),
    ],
)
def test_wrong_keys_in_a_file_are_named_with_their_line(tmp_path, change, message):
    (tmp_path / "c.py").write_text(TEXT.replace('c.source = dict(kind="folder", path="photos")', change))
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "c.py")


def test_labels_and_inputs_exclude_each_other_sensibly():
    def options(entry):
        return config_lib.step_options("m", entry)

    assert options({"make": "palette"})["label"] == {"kind": "palette"}
    assert options({"make": "palette", "input": "color_palette"})["label"] is None
    assert options({"make": "boxes", "label": {"kind": "coco", "path": "x"}})["label"]["kind"] == "coco"
    with pytest.raises(ConfigError, match="needs an input"):
        options({"make": "embedding", "width": 3, "max_tokens": 2})
    with pytest.raises(ConfigError, match="modalities.m: make='pixels' needs the option 'size'"):
        options({"make": "pixels"})
    with pytest.raises(ConfigError, match="modalities.m: there is no step"):
        options("pixels")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_the_examples_are_valid_and_short(path):
    config = runpy.run_path(str(path))["get_config"]()
    config_lib.validate(config)
    body = path.read_text().split('"""')[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 30
