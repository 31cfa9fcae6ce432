"""The words of numbers: what can be written, what is read, bins, orders."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transform_fixtures import garbage, quick, seeds

from fm4m.tokenizers import text
from fm4m.transforms import values


@quick
@given(st.integers(0, 3), st.integers(0, 999))
def test_words_are_those_of_the_vocabulary(kind, number):
    written = values.word(kind, number)
    assert values.parse(written) == (kind, number)
    assert text.fixed_tokens()[text.value_id(f"v{kind}", number)] == written


@pytest.mark.parametrize(("kind", "number"), [(4, 0), (-1, 0), (0, 1000), (0, -1), (0, 1.5), (0, float("nan"))])
def test_no_word_for_numbers_out_of_range(kind, number):
    with pytest.raises(ValueError, match="there is no word"):
        values.word(kind, number)


def test_other_words_are_not_values():
    for written in ("v4=1", "v0=1000", "v0=", "v0=-1", "v0=07", "v0=1.0", "V0=1", "xv0=1", "v0=1x", ""):
        assert values.parse(written) is None


@quick
@given(st.lists(st.integers(0, 1023), max_size=20))
def test_codes_round_trip(codes):
    written = values.code_words(codes)
    assert values.read_codes(written) == codes
    assert all(len(w.split()) == 1 for w in written)


def test_codes_are_split_in_the_middle():
    assert values.code_words([0, 511, 512, 1023]) == ["v0=0", "v0=511", "v1=0", "v1=511"]
    assert values.read_codes(["v0=512"]) is None
    assert values.read_codes(["v2=1"]) is None
    with pytest.raises(ValueError, match="code 1024"):
        values.code_words([1024])


@quick
@given(st.sampled_from([(999, 0), (499.5, 499.5), (49.95, 49.95), (166.5, 499.5)]), st.integers(0, 999))
def test_bin_centres_are_inverse(line, n):
    bins = values.Bins(*line)
    assert bins.bin(bins.value(n)) == n
    assert bins.bin(bins.value(n), clip=False) == n


def test_bins_clip_or_say_so():
    bins = values.Bins(166.5, 499.5, what="beta")
    assert (bins.bin(-4.0), bins.bin(4.0)) == (0, 999)
    with pytest.raises(ValueError, match=r"beta 4\.0 is outside -3\.\.3"):
        bins.bin(4.0, clip=False)
    with pytest.raises(ValueError, match="beta nan is not a finite"):
        bins.bin(float("nan"))
    assert values.coordinate_bins().bin(0.5) == 500  # 499.5 goes to the even 500
    assert values.coordinate_bins(100).bin(1.0) == 99
    for count in (1, 1001):
        with pytest.raises(ValueError, match="coordinate bins"):
            values.coordinate_bins(count)


@quick
@given(garbage)
def test_stretches_keep_every_word(written):
    words = values.split(written)
    cut = values.stretches(words, lambda word: word.startswith("v0="))
    assert [word for stretch in cut for word in stretch] == words
    assert all(stretch for stretch in cut)
    assert all(not word.startswith("v0=") for stretch in cut for word in stretch[1:])


def test_corners():
    assert values.read_corners(values.corners((1, 2, 3, 4))) == (1, 2, 3, 4)
    assert values.read_corners(["v0=1", "v1=2", "v2=0", "v3=4"]) is None
    assert values.read_corners(["v0=1", "v1=2", "v2=3"]) is None
    with pytest.raises(ValueError, match="zip"):
        values.corners((1, 2, 3))


@quick
@given(st.lists(st.integers(), max_size=8), seeds)
def test_orders(items, seed):
    assert values.arrange(items, None) == items
    drawn = values.arrange(items, np.random.default_rng(seed))
    assert sorted(drawn) == sorted(items)
    assert drawn == values.arrange(items, np.random.default_rng(seed))
    assert values.arrange(items, range(len(items))[::-1]) == items[::-1]


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1], [1, 2, 3]])
def test_orders_that_are_no_permutation(order):
    with pytest.raises(ValueError, match="of 3 words is not a permutation of 0..2"):
        values.arrange("abc", order, "words")


def test_nothing_heavy_is_imported():
    folder = pathlib.Path(values.__file__).parent
    modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    assert len(modules) == 9
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module('fm4m.transforms.' + name)\n"
        "print([m for m in ('jax', 'flax', 'PIL', 'tokenizers', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
