"""The configuration of a preparation: every key with its meaning, the steps that make modalities, and the flags.

A file in ``configs/prepare/`` calls `default`, sets keys and returns the result. ``c.modalities`` is the heart: a name
for every modality, and how it is made.

| make         | from                             | the modality (kind)            | must be given           |
|--------------|----------------------------------|--------------------------------|-------------------------|
| pixels       | the picture                      | the picture itself (pixels)    | size                    |
| codes        | the picture, a field or a label  | its tokenizer's codes (tokens) | tokenizer               |
| stored_codes | a field of codes, one row a crop | the codes as they are (tokens) | input, vocab_size, grid |
| caption      | captions                         | text (sequence)                |                         |
| boxes        | a field or a label of boxes      | text of boxes (sequence)       |                         |
| palette      | a field or a label of palettes   | text of colours (sequence)     |                         |
| metadata     | a field or a label of properties | text of numbers (sequence)     |                         |
| poses        | a field of people                | text of people (sequence)      |                         |
| embedding    | a field or a label of vectors    | the vectors (embedding)        | width, max_tokens       |

``input`` is a field of the source's samples (`data_pipelines.prepare.sources.Item`); ``label`` makes the input instead:
``dict(kind="canny", low=50)``, see `data_pipelines.prepare.labels`. All other options are in `STEPS`.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from fm4m import config_file
from fm4m.config_file import ConfigError, Section, requirements
from fm4m.modalities import unknown_name
from fm4m.transforms import crops

USAGE = (
    "usage: python -m data_pipelines.prepare --config=configs/prepare/NAME.py [--config.SECTION.KEY=VALUE ...] "
    "--out=DIR [--processes=N]"
)
REQUIRED = object()

_TEXT = {"tokenizer": "", "max_tokens": 256}
# Options of every step with their defaults.
STEPS: dict[str, dict[str, Any]] = {
    # size: edge of the picture, or (height, width). through: a tokenizer; the picture is what its codes decode to, as
    # if another model had generated it.
    "pixels": {"size": REQUIRED, "patch_size": 16, "input": "rgb", "through": ""},
    # tokenizer: a file that fm4m.tokenizers.io.load reads. size: of the crops that a label sees, if other than its.
    # shift: class ids are raised by one and void (255) becomes 0, as the reference's class maps need it. grid: how
    # codes that are not on the tokenizer's grid (memcodes) are arranged. learned_positions: None says yes for vectors.
    "codes": {"tokenizer": REQUIRED, "input": "rgb", "label": None, "size": 0, "shift": False, "grid": None,
              "learned_positions": None},
    "stored_codes": {"input": REQUIRED, "vocab_size": REQUIRED, "grid": REQUIRED, "learned_positions": False},
    # Crop row r of a sample takes caption r of its list, from the first again where it has fewer.
    "caption": {**_TEXT, "input": "caption"},
    # A label's boxes are found in the whole picture, then cropped. threshold: lowest score kept. min_visibility: share
    # of a box's area that must be in the crop. What does not fit into max_tokens is left out, smallest boxes first.
    "boxes": {**_TEXT, "input": "det", "label": None, "threshold": 0.6, "min_visibility": 0.0},
    # colors: 1 to 7, or 0 to draw it for every sample.
    "palette": {**_TEXT, "max_tokens": 23, "input": "", "label": {"kind": "palette"}, "colors": 0},
    # The order of the properties is drawn for every sample.
    "metadata": {**_TEXT, "max_tokens": 40, "input": "", "label": {"kind": "statistics"}},
    "poses": {**_TEXT, "max_tokens": 275, "input": "human_poses", "max_positions": 0},
    # size: edge of the crop that a label sees. Vectors are [n, width], n at most max_tokens; maps are laid out by row.
    "embedding": {"width": REQUIRED, "max_tokens": REQUIRED, "input": "", "label": None, "size": 0},
}  # fmt: skip
_TYPES = {"max_tokens": int, "vocab_size": int, "width": int, "patch_size": int, "colors": int}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line: configuration, target folder, worker processes, and the flags that were not this module's."""

    config: ml_collections.ConfigDict
    out: pathlib.Path
    processes: int
    rest: tuple[str, ...] = ()


def default() -> ml_collections.ConfigDict:
    """A locked configuration with every key at its default value."""
    c = Section()
    # Name of the task and the mixture that the printed registration defines.
    c.name = "my_data"
    # Where the samples come from: dict(kind="folder", path=...), "tars", "tfds" or "rooms" with the options of
    # data_pipelines.prepare.sources. Any option can be set on the command line: --config.source.path=photos.
    c.source = {}
    # Split that the samples go to.
    c.split = "train"
    c.validation = Section()
    # Share of the samples that goes to the split "validation" instead, chosen by a hash of the key: it stays the same
    # when samples are added or removed.
    c.validation.share = 0.0
    # Or a source of its own for the validation split, written like `source`.
    c.validation.source = {}

    c.crops = Section()
    # Records made from one picture: the centred square, and count - 1 random crops, all shared by its modalities. A
    # source with stored crop settings brings its own; then this is the most that are taken.
    c.crops.count = 1
    # Ranges of a random crop's area and of width / height, and how often it is mirrored.
    c.crops.scale = crops.SCALE
    c.crops.ratio = crops.RATIO
    c.crops.flip = crops.FLIP_PROBABILITY
    # Seeds the crops and everything else that is drawn, together with a sample's key.
    c.seed = 0

    # Name -> dict(make=..., options), see the top of this file.
    c.modalities = {}
    c.text = Section()
    # The text tokenizer of steps that name none. "": one is trained from the set's captions and kept as OUT/text.json.
    c.text.tokenizer = ""
    # Ids of the trained tokenizer, 4,284 of them fixed; fewer if the captions do not give as many.
    c.text.vocab_size = 8192
    # Most samples whose captions it is trained on.
    c.text.samples = 20000

    # Samples handed to tokenizers and labels at once.
    c.batch = 32
    # Samples in a part: what one process does at a time, what a killed run loses, and one file of every modality.
    # 0: a 64th of the samples, at least 64 and at most 4,096.
    c.part_samples = 0
    # Modalities of a finished set that shall be made again, although they were made in another way.
    c.replace = ()
    # Allows to add modalities to a finished set from another source with the same keys.
    c.other_source = False
    return c.lock()


def plain(value: Any) -> Any:
    """A configuration (or part of one) as dicts, lists and numbers, as JSON has them."""
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {key: plain(value[key]) for key in value}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def step_options(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a modality's step, defaults included, checked; ``"make"`` is one of them.

    Raises ConfigError naming the modality and the option.
    """
    given = plain(entry) if isinstance(entry, ml_collections.ConfigDict | Mapping) else {}
    make = given.pop("make", None)
    if make not in STEPS:
        raise ConfigError(f"modalities.{name}: " + unknown_name(str(make), STEPS, "step (make=...)"))
    known = STEPS[make]
    for option in given:
        if option not in known:
            raise ConfigError(f"modalities.{name}: " + unknown_name(option, known, f"option of make={make!r}"))
    options = {**known, **given}
    for option, value in options.items():
        if value is REQUIRED:
            raise ConfigError(f"modalities.{name}: make={make!r} needs the option {option!r}")
        expected = _TYPES.get(option)
        if expected and (not isinstance(value, expected) or isinstance(value, bool)):
            raise ConfigError(f"modalities.{name}.{option} = {value!r}: expected a whole number")
    if given.get("input") and "label" not in given:
        options["label"] = None
    label = options.get("label")
    if label is not None and (not isinstance(label, dict) or "kind" not in label):
        raise ConfigError(f"modalities.{name}.label = {label!r}: write dict(kind=..., options), or leave it out")
    if "label" in options and not label and not options["input"]:
        raise ConfigError(f"modalities.{name}: make={make!r} needs an input (a field of the source) or a label")
    return {"make": make, **options}


def validate(c: ml_collections.ConfigDict) -> None:
    """Checks values that have the right type but no meaning. Raises ConfigError naming the key."""

    need = requirements(c)
    named = re.fullmatch(r"[A-Za-z_]\w*", c.name or "")
    need(bool(named), "name", "letters, digits and _ only; it is also the name of a Python module")
    need("kind" in c.source, "source", "needs kind='folder', 'tars', 'tfds' or 'rooms'")
    need(bool(re.fullmatch(r"\w[\w.-]*", c.split)), "split", "must be the name of a folder")
    need(0 <= c.validation.share < 1, "validation.share", "must be 0 or more and below 1")
    both = c.validation.share > 0 and bool(c.validation.source)
    need(not both, "validation.share", "must be 0 where validation.source is given")
    two = c.split == "validation" and (c.validation.share > 0 or bool(c.validation.source))
    need(not two, "split", "is the validation split already; give no validation.share or validation.source")
    need(c.crops.count >= 1, "crops.count", "must be at least 1, the centred square")
    for key in ("scale", "ratio"):
        low, high = c.crops[key]
        need(0 < low <= high, f"crops.{key}", "must be (lowest, highest), both above 0")
    need(c.crops.scale[1] <= 1, "crops.scale", "is a share of the picture's area, at most 1")
    need(0 <= c.crops.flip <= 1, "crops.flip", "must be in [0, 1]")
    need(c.text.vocab_size > 0 and c.text.samples > 0, "text", "vocab_size and samples must be at least 1")
    need(c.batch >= 1, "batch", "must be at least 1")
    need(c.part_samples >= 0, "part_samples", "must be 0 (chosen by the number of samples) or more")
    need(len(c.modalities) > 0, "modalities", "name at least one modality")
    for name in c.modalities:
        if not re.fullmatch(r"\w[\w.@+-]*", name):
            raise ConfigError(f"modalities: {name!r} cannot be the name of a folder")
        step_options(name, c.modalities[name])
    for name in c.replace:
        if name not in c.modalities:
            raise ConfigError("replace: " + unknown_name(name, c.modalities, "modality in this configuration"))


# ---- command line


def from_flags(args: Sequence[str], usage: str = USAGE, *, foreign: bool = False) -> Command:
    """Reads ``--config=FILE --config.KEY=VALUE ... --out=DIR [--processes=N]``.

    Args:
      args: the arguments behind the program's name.
      usage: ends the message of a missing or unknown flag.
      foreign: keep other flags, in `Command.rest`, instead of refusing them.

    Raises:
      ConfigError: in one sentence; an unknown key comes with the nearest known one.
    """
    values: dict[str, str] = {}
    settings: list[tuple[str, str]] = []
    rest: list[str] = []
    for arg in args:
        match = re.fullmatch(r"--?([\w.@+-]+)=(.*)", arg, re.S)
        name = match[1] if match else ""
        if name in ("config", "out", "processes"):
            values[name] = match[2]
        elif name.startswith("config."):
            settings.append((name.removeprefix("config."), match[2]))
        elif foreign:
            rest.append(arg)
        else:
            raise ConfigError(f"{arg!r} is not a flag; {usage}")
    for name in ("config", "out"):
        if not values.get(name):
            raise ConfigError(f"--{name} is missing; {usage}")
    if not re.fullmatch(r"[1-9]\d*", values.get("processes", "1")):
        raise ConfigError(f"--processes={values['processes']} is not a number of at least 1; {usage}")
    config = config_file.load(values["config"], default)
    for key, text in settings:
        set_key(config, key, text)
    validate(config)
    return Command(config, pathlib.Path(values["out"]).absolute(), int(values.get("processes", "1")), tuple(rest))


def set_key(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    """Sets ``"a.b.c"`` to a value written as text, in the type of the value that is there.

    Options of sources and modalities may be new; others must exist. Raises ConfigError naming the nearest key.
    """
    *path, last = key.split(".")
    section: Any = config
    for part in path:
        if not isinstance(section, ml_collections.ConfigDict) or part not in section:
            raise ConfigError(unknown_name(key, _leaves(config), "configuration key"))
        section = section[part]
    is_open = path[:1] in (["source"], ["modalities"]) or path[:2] == ["validation", "source"]
    if not isinstance(section, ml_collections.ConfigDict) or (last not in section and not (is_open and path)):
        raise ConfigError(unknown_name(key, _leaves(config), "configuration key"))
    known = section.get(last)
    with config.unlocked(), config.ignore_type():
        section[last] = _parse(key, text, known, strict=not is_open)


def _parse(key: str, text: str, known: Any, strict: bool) -> Any:
    if isinstance(known, str):
        return text
    if isinstance(known, bool):
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key} = {text!r}: expected True or False")
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(known, tuple) and not isinstance(value, tuple | list):
        value = (value,)
    numbers = {int: (int,), float: (int, float)}.get(type(known))
    if strict and numbers and (not isinstance(value, numbers) or isinstance(value, bool)):
        raise ConfigError(f"{key} = {text!r}: expected a value of type {type(known).__name__}")
    return float(value) if strict and isinstance(known, float) else value


def _leaves(config: Any, prefix: str = "") -> list[str]:
    out = []
    for key in config:
        value = config[key]
        inner = isinstance(value, ml_collections.ConfigDict) and len(value)
        out += _leaves(value, f"{prefix}{key}.") if inner else [prefix + key]
    return out
