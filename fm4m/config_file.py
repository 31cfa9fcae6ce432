"""Reading a configuration: the file that makes it, flags that change keys of it, and errors that name the key.

The same for every kind of configuration: of a run (`fm4m.config`), of a tokenizer's training
(`fm4m.tokenizers.train_config`), of a data set's preparation. A file's ``get_config()`` calls the kind's ``default()``,
sets keys and returns it. The result is locked: a key that does not exist is an error that names the nearest one, on the
command line as well as in the file.
"""

from __future__ import annotations

import math
import pathlib
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from fm4m import modalities as modalities_lib


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence that names the key."""


class Section(ml_collections.ConfigDict):
    """A ConfigDict whose unknown keys are named together with the nearest known ones."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and self.is_locked and name not in self:
            raise AttributeError(modalities_lib.unknown_name(name, self.keys(), "configuration key"))
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            raise AttributeError(modalities_lib.unknown_name(name, self.keys(), "configuration key")) from None


Default = Callable[[], Section]


def load(path: str, default: Default) -> Section:
    """The configuration that ``get_config()`` of a file returns; ``FILE.py:TEXT`` passes TEXT to it.

    Raises ConfigError naming the file, and the line where one is to blame; also for a configuration that ``default``
    has not made, such as that of a tokenizer's training where one of a run is expected.
    """
    name, *argument = path.split(":", 1)
    if not pathlib.Path(name).is_file():
        raise ConfigError(f"there is no configuration file {name!r}")
    try:
        module = runpy.run_path(name)
        config = module["get_config"](*argument)
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
        missing = isinstance(error, KeyError) and error.args == ("get_config",) and not lines
        what = "it has no function get_config()" if missing else _plain(error)
        raise ConfigError(f"{name}{f', line {lines[-1]}' if lines else ''}: {what}") from error
    if not isinstance(config, Section) or set(config) != set(default()):
        raise ConfigError(f"{name}: get_config() must return the configuration that {default.__module__}.default() "
                          "gave it")  # fmt: skip
    return config


def from_flags(
    args: Sequence[str], usage: str, default: Default, validate: Callable[[Section], None], others: Sequence[str] = ()
) -> tuple[Section, dict[str, str | None]]:
    """Reads ``--config=FILE``, ``--config.SECTION.KEY=VALUE`` ..., and ``--NAME=TEXT`` of other names.

    Args:
      args: the arguments behind the program's name.
      usage: ends the message of a missing or unknown flag.
      default: makes the kind of configuration that the file must return.
      validate: raises ConfigError for values that cannot be.
      others: names of the flags that are not the configuration's.

    Returns:
      The validated configuration, and the text of each of the others; None for one that is not given.

    Raises:
      ConfigError: in one sentence; an unknown key comes with the nearest known one.
    """
    files = [match[1] for arg in args if (match := re.match(r"--?config=(.*)", arg, re.S))]
    if not files or not files[-1]:
        raise ConfigError(f"--config is missing; {usage}")
    config = load(files[-1], default)
    known = leaves(config)
    # ml_collections reports an unknown key late and at length; look for it first.
    for arg in args:
        if (match := re.match(r"--?(?:no)?config\.([^=]*)", arg)) and match[1] not in known:
            section = [key for key in known if key.split(".")[0] == match[1].split(".")[0]]
            raise ConfigError(modalities_lib.unknown_name(match[1], section or known, "configuration key"))
    argv = ["fm4m", *(arg for arg in args if not re.match(r"--?config=", arg))]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    for name in others:
        flags.DEFINE_string(name, None, name, flag_values=values)
    try:
        rest = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        raise ConfigError(_wrong_type(config, str(error))) from None
    except flags.Error as error:
        raise ConfigError(f"{error}; {usage}") from None
    if rest:
        raise ConfigError(f"{rest[0]!r} is not a flag; {usage}")
    validate(config)
    return config, {name: values[name].value for name in others}


def requirements(c: Section) -> Callable[[bool, str, str], None]:
    """``need(ok, key, what)``, which raises a ConfigError of the key, its value and what is allowed unless ``ok``."""

    def need(ok: bool, key: str, what: str) -> None:
        if not ok:
            given = repr(leaf(c, key))
            raise ConfigError(f"{key} = {given if len(given) <= 200 else given[:200] + '...'}: {what}")

    return need


# Whole numbers, counts of steps among them, are 32 bits wide on devices.
LARGEST = 2**31 - 1


def check_numbers(c: Section) -> None:
    """Raises ConfigError for a number that is not finite, or a whole one that is larger than `LARGEST`."""
    need = requirements(c)
    for key in leaves(c):
        value = leaf(c, key)
        need(not isinstance(value, float) or math.isfinite(value), key, "must be a finite number")
        need(not isinstance(value, int) or abs(value) <= LARGEST, key, f"must be {LARGEST} at most")


def leaves(config: Section, prefix: str = "") -> list[str]:
    """Every key as "section.key", in order."""
    out = []
    for key in config:
        # A placeholder's value is None, so only its type can tell a section from a key.
        value = config[key]
        out += leaves(value, f"{prefix}{key}.") if isinstance(value, Section) else [prefix + key]
    return out


def leaf(config: Section, key: str) -> Any:
    """The value of "section.key"."""
    for part in key.split("."):
        config = config[part]
    return config


def _plain(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return str(text).strip() or type(error).__name__


def _wrong_type(config: Section, message: str) -> str:
    # absl says "flag --config.a.b=x: invalid literal for int() with base 10: 'x'".
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.S)
    if not match:
        return message
    section, _, name = match[1].rpartition(".")
    expected = (leaf(config, section) if section else config).get_type(name)
    given = match[2] if len(match[2]) <= 100 else match[2][:100] + "..."
    return f"{match[1]} = {given!r}: expected a value of type {expected.__name__}"
