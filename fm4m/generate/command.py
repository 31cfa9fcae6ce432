"""What the command lines that open a model share: its flags, ``NAME=VALUE`` arguments, and errors of one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fm4m.generate.session import Session


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser of ``python -m MODULE`` with the flags of `open_session`."""
    out = argparse.ArgumentParser(prog=f"python -m {module}", description=description, allow_abbrev=False)
    out.add_argument("--model", required=True, help="a run's folder, one of its steps, or weights that fm4m.load opens")
    out.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    out.add_argument("--tokenizer", action="append", metavar="NAME=KIND:FILE",
                     help="tokenizer of a modality (KIND image, text or boxes); default: the run's own")  # fmt: skip
    return out


def add_pairs(to: argparse.ArgumentParser, flag: str, metavar: str, about: str) -> None:
    """Adds a flag that takes one or more NAME=VALUE and may be repeated; see `pairs`."""
    to.add_argument(flag, nargs="+", action="extend", default=[], metavar=metavar, help=about)


def open_session(options: argparse.Namespace) -> Session:
    """The model that the flags name, with its tokenizers. Raises what `fm4m.load` and `Session` raise."""
    import fm4m

    return Session(fm4m.load(options.model, ema=options.ema), options.tokenizer)


def pairs(texts: Sequence[str], flag: str, form: str = "NAME=VALUE") -> dict[str, str]:
    """{"a": "b"} of "a=b". Raises ValueError naming the flag for another form, or a name that is given twice."""
    out: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"{flag}: {text!r} is not {form}")
        if name in out:
            raise ValueError(f"{flag}: {name} is given twice")
        out[name] = value
    return out


def exit_code(program: Callable[[], None]) -> int:
    """Runs a program: 0, or 2 with one sentence on standard error for what a user can mend."""
    try:
        program()
    except (ValueError, OSError, OverflowError, KeyError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    return 0
