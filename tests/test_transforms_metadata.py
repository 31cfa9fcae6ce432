"""Metadata as text: equality with the reference implementation's chunks, bins and their inverse."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures import needs_fixtures
from hypothesis import given
from hypothesis import strategies as st
from transform_fixtures import garbage, quick, seeds, strings

from fm4m.transforms import metadata, values

records = st.dictionaries(st.sampled_from(metadata.NAMES), st.floats(-10, 40000), max_size=21)


@needs_fixtures
def test_chunks_equal_the_reference():
    for case in strings()["metadata"]:
        assert metadata.chunks(case["input"]) == case["chunks"]
        order = np.random.default_rng(0).permutation(len(case["chunks"]))
        assert metadata.chunks(case["input"], order) == [case["chunks"][i] for i in order]
    assert len(strings()["metadata"]) == 6
    assert tuple(strings()["metadata"][0]["input"]) == metadata.NAMES


@quick
@given(records, seeds)
def test_round_trip(record, seed):
    rng = np.random.default_rng(seed)
    parsed, malformed = metadata.from_text(metadata.to_text(record, rng))
    assert malformed == 0
    assert {e.name: e.bin for e in parsed} == {name: metadata.FIELDS[name].bin(x) for name, x in record.items()}
    assert len(parsed) == len(record)


def test_every_bin_has_a_middle_in_it():
    for name, field in metadata.FIELDS.items():
        for n in range(field.last + 1):
            assert field.bin(metadata.Entry(name, n).value) == n, (name, n)
        assert field.bin(-1e9) == 0
        assert field.bin(1e9) == field.last


def test_a_score_on_a_threshold_reaches_it():
    assert metadata.chunks({"watermark_score": 0.5, "aesthetic_score": 5.5}) == ["v1=19 v0=1", "v1=20 v0=2"]
    assert metadata.chunks({"watermark_score": 0.499, "aesthetic_score": 5.499}) == ["v1=19 v0=0", "v1=20 v0=1"]


def test_middles():
    assert metadata.Entry("original_width", 3).value == 111.5  # 96..127 pixels
    assert metadata.Entry("n_humans", 4).value == 4
    assert metadata.Entry("walkability", 0).value == pytest.approx(0.5 / 49)
    assert metadata.Entry("colorfulness", 49).value == 150
    assert metadata.Entry("aesthetic_score", 1).value == 5.0


@quick
@given(st.one_of(garbage, st.lists(st.builds("v{}={}".format, st.integers(0, 1), st.integers(0, 60))).map(" ".join)))
def test_garbage_is_counted_not_raised(written):
    parsed, malformed = metadata.from_text(written)
    words = values.split(written)
    assert (len(parsed) + malformed > 0) == bool(words)
    assert 2 * len(parsed) + malformed <= len(words)


@pytest.mark.parametrize(
    ("written", "count", "malformed"),
    [
        ("", 0, 0),
        ("v1=0 v0=5 v1=20 v0=2", 2, 0),
        ("v1=0 v0=5 v0=6", 0, 1),
        ("v1=21 v0=0", 0, 1),
        ("v1=20 v0=3", 0, 1),
        ("v1=9 v0=50 v1=9 v0=49", 1, 1),
        ("v0=3 v1=3 v0=3 v1=4", 1, 2),
        ("[S_1] v1=5 v0=2 [EOS]", 1, 0),
    ],
)
def test_malformed_is_counted(written, count, malformed):
    parsed = metadata.from_text(written)
    assert (len(parsed.entries), parsed.malformed) == (count, malformed)


def test_errors_name_the_property():
    with pytest.raises(KeyError, match="Did you mean 'brightness'"):
        metadata.chunks({"brightnes": 3})
    for bad in (float("nan"), float("inf"), "12", None):
        with pytest.raises(ValueError, match="metadata property 'contrast'"):
            metadata.chunks({"contrast": bad})
    with pytest.raises(ValueError, match="metadata properties is not a permutation"):
        metadata.chunks({"contrast": 1, "entropy": 2}, [0, 2])
