"""Colour palettes as text: equality with the reference implementation's strings, round trips, malformed text."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures import needs_fixtures
from hypothesis import given
from hypothesis import strategies as st
from transform_fixtures import garbage, quick, strings

from fm4m.transforms import color_palette, values

palettes = st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=7)
RECORD = [{str(n): [[n, 10 * n, 30 * n]] * n for n in range(1, 8)}]


@needs_fixtures
def test_strings_equal_the_reference():
    case = strings()["color_palette"]
    for count, written in case["strings_by_n_colors"].items():
        colors = color_palette.choose(case["input"], int(count))
        assert color_palette.to_text(colors) == written
        assert color_palette.from_text(written) == ([colors], 0)
    assert len(case["strings_by_n_colors"]) == 7


@quick
@given(st.lists(palettes, max_size=3))
def test_round_trip(several):
    written = " ".join(map(color_palette.to_text, several))
    assert color_palette.from_text(written) == (several, 0)
    assert len(written.split()) == sum(1 + 3 * len(colors) for colors in several)


def test_channels_are_rounded():
    assert color_palette.to_text([(0.5, 1.5, 254.7)]) == "v1=1 v0=0 v0=2 v0=255"


@quick
@given(garbage)
def test_garbage_is_counted_not_raised(written):
    parsed, malformed = color_palette.from_text(written)
    words = values.split(written)
    assert (len(parsed) + malformed > 0) == bool(words)
    assert 4 * len(parsed) + malformed <= len(words)


@pytest.mark.parametrize(
    ("written", "count", "malformed"),
    [
        ("", 0, 0),
        ("v1=1 v0=1 v0=2 v0=3 [EOS]", 1, 0),
        ("v1=1 v0=1 v0=2 v0=256", 0, 1),
        ("v1=1 v0=1 v0=2", 0, 1),
        ("v1=2 v0=1 v0=2 v0=3", 0, 1),
        ("v1=0", 0, 1),
        ("v1=8" + " v0=1" * 24, 0, 1),
        ("v0=1 v0=2 v0=3 v1=1 v0=1 v0=2 v0=3", 1, 1),
        ("v1=1 v0=1 v2=2 v0=3", 0, 1),
    ],
)
def test_malformed_is_counted(written, count, malformed):
    parsed = color_palette.from_text(written)
    assert (len(parsed.palettes), parsed.malformed) == (count, malformed)


def test_sizes_are_drawn():
    rng = np.random.default_rng(0)
    assert {len(color_palette.choose(RECORD, rng)) for _ in range(100)} == set(range(1, 8))
    assert color_palette.choose(RECORD, 2) == [(2, 20, 60)] * 2


def test_errors():
    for count in (0, 8):
        with pytest.raises(ValueError, match=f"palette of {count} colours; 1 to 7"):
            color_palette.choose(RECORD, count)
        with pytest.raises(ValueError, match=f"palette of {count} colours; 1 to 7"):
            color_palette.to_text([(0, 0, 0)] * count)
    for record in ([], [{}], [{"3": [[1, 2, 3]]}]):
        with pytest.raises(ValueError, match="no palette of 3 colours"):
            color_palette.choose(record, 3)
    for color in ((256, 0, 0), (-1, 0, 0), (float("nan"), 0, 0)):
        with pytest.raises(ValueError, match="colour channel"):
            color_palette.to_text([color])
    with pytest.raises(ValueError, match="three channels"):
        color_palette.to_text([(1, 2)])
