"""Random configurations: each one runs, or is refused in one sentence that names the key.

FM4M_FUZZ=100 tries a hundred times as many, and other ones on every run.
"""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzz
from tiny_run import TinyStream

from fm4m import config as config_lib
from fm4m import config_file, train

KEYS = config_file.leaves(config_lib.default())
NUMBERS = ("0", "-1", "1", "2", "3", "7", "16", "1000", "1.5", "0.999", "1e-9", "1e9", "1e30", "1e400", "-0.0", "nan",
           "inf", "-inf", "1_000", "0x10", "2147483648", "999999999999", "9223372036854775808", "9" * 40,
           "9" * 5000)  # fmt: skip
WORDS = ("", " ", "None", "True", "no", "[]", "()", "{}", "('a',)", "(1, 2)", "'", '"', "\\", "\n", "\x00", "é", "=",
         "a=b", "__import__('os')", "../../x")  # fmt: skip
NAMES = ("float32", "einsum", "full", "cosine", "constant", "rsqrt", "token", "mod", "silu", "dense", "fourier",
         "aligned", "cudnn", "pallas", "fm_base_12e_12d_gelu")  # fmt: skip
TUPLES = ("('caption=11',)", "('colour=nan',)", "('words=-3',)", "('words=',)", "('=1',)", "('words=5', 'words=6')")
LENGTHS = st.builds(
    "{}{}{}".format,
    st.sampled_from(("0", "1", "24", "0.5", "1e3", "-3", "1_0", "", "9" * 40, "9" * 400, "nan")),
    st.sampled_from(("", "", "K", "B", "T", "k", "X")),
    st.sampled_from((" steps", " samples", " tokens", " step", "steps", " epochs", "", " steps ")),
)
VALUES = st.one_of(*map(st.sampled_from, (NUMBERS, WORDS, NAMES, TUPLES)), LENGTHS, st.text(max_size=8))


def values_of(key):
    """Mostly of the key's own type."""
    section, name = key.rsplit(".", 1) if "." in key else ("", key)
    kind = (config_lib.default()[section] if section else config_lib.default()).get_type(name)
    own = {
        int: st.sampled_from([n for n in NUMBERS if "." not in n and "e" not in n]),
        float: st.sampled_from(NUMBERS),
        bool: st.sampled_from(("true", "false")),
        tuple: st.sampled_from(TUPLES),
        str: LENGTHS if key.endswith(("total", "warmup", "cooldown")) else st.sampled_from(NAMES),
    }[kind]
    return st.one_of(own, own, own, VALUES)


@st.composite
def near_misses(draw):
    """A key with one letter dropped, doubled or changed, or parts of it dropped or joined."""
    key = draw(st.sampled_from(KEYS))
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from(("", key[at] * 2, ".", "-", "X", "é", "[", "\n")))
    return draw(st.sampled_from((key[:at] + letter + key[at + 1 :], key.split(".")[0], key + ".x", key.upper(), "")))


@st.composite
def flags(draw):
    """``--config.KEY=VALUE``, which now and then lacks a part."""
    if draw(st.integers(0, 5)) == 0:
        forms = ("--config.{}={}", "--noconfig.{}", "--config.{}", "-config.{}={}", "--{}={}", "{}")
        form = draw(st.sampled_from(forms))
        return form.format(draw(near_misses()), draw(VALUES))
    key = draw(st.sampled_from(KEYS))
    return f"--config.{key}={draw(values_of(key))}"


class Started(Exception):
    """The run would now look at its checkpoints."""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The configuration of the tiny run, as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    folder = pathlib.Path(__file__).resolve().parent
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(folder)!r})\nfrom tiny_run import tiny_config\nget_config = tiny_config\n"
    )
    return str(path)


def attempt(argv, capsys):
    """Whether a command line gets as far as its checkpoints. Everything else must be one sentence and exit code 2."""
    capsys.readouterr()
    try:
        config, workdir = config_lib.from_command_line(["train", *argv])
    except SystemExit as stop:
        text = capsys.readouterr().err
        assert stop.code == 2 and text.startswith("error: ") and len(text) < 2000, text
        return None
    try:
        train.train(config, workdir, TinyStream())
    except config_lib.ConfigError as error:
        assert any(key in str(error) for key in ("model", "mesh", *KEYS)), error
    except Started:
        return config
    return None


@pytest.fixture(scope="module")
def stopped():
    def start(*_, **__):
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.checkpoint, "Checkpoints", start)
        yield


@fuzz(60)
@given(given=st.lists(flags(), min_size=1, max_size=3))
def test_flags(given, file, stopped, capsys):
    attempt([f"--config={file}", *given, "--workdir=/nowhere"], capsys)
