"""One input changes in steps: what is held stays, what is drawn does not depend on the step."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image
from test_generate_session import SET, loaded, opened  # noqa: F401  (fixtures)

import fm4m
from fm4m.generate import Target, probe
from fm4m.transforms import boxes

TEXT = "v0=0 v1=100 v2=300 v3=500 bed v0=400 v1=400 v2=999 v3=900 dining table"


def test_a_box_moves_and_stops_at_the_edge():
    moved = probe.moved_box(TEXT, 1, 0.2, -0.5)
    assert moved == "v0=200 v1=0 v2=500 v3=400 bed v0=400 v1=400 v2=999 v3=900 dining table"
    still = probe.moved_box(TEXT, 2, 0.3, 0.0)
    assert still == TEXT and boxes.from_text(still).malformed == 0
    with pytest.raises(ValueError, match="no box 3.*boxes 1 to 2"):
        probe.moved_box(TEXT, 3, 0.1, 0.1)


def test_words_and_classes_are_replaced_whole():
    assert probe.reworded("a bed in a bedroom", "bed", r"red\1") == r"a red\1 in a bedroom"
    with pytest.raises(ValueError, match="'be' is no word"):
        probe.reworded("a bed", "be", "x")
    classes = np.array([[1, 2], [2, 3]], np.uint8)
    assert probe.recoloured(classes, 2, 7).tolist() == [[1, 7], [7, 3]] and classes[0, 1] == 2
    with pytest.raises(ValueError, match="no class 9, only 1, 2, 3"):
        probe.recoloured(classes, 9, 1)
    with pytest.raises(ValueError, match="map of classes"):
        probe.recoloured(classes.astype(float), 1, 2)


def test_changes_of_the_command_line(tmp_path):
    caption, depth = SET["caption"], SET["tok_depth@64"]
    assert probe.changed(caption, "a bed", "bed > table") == "a table"
    assert probe.changed(SET["det"], TEXT, "1:+0.2,-0.5").startswith("v0=200 v1=0 v2=500 v3=400 bed")
    moved = probe.changed(SET["det"], TEXT, "1:+0.2,0")
    assert probe.changed(SET["det"], f"{TEXT} [S_1]", "1:0.2,0") == f"{moved} [S_1]"
    np.save(tmp_path / "map.npy", np.array([[1, 2]], np.uint8))
    Image.fromarray(np.array([[1, 2]], np.uint8)).save(tmp_path / "map.png")
    for name in ("map.npy", "map.png"):
        assert probe.changed(depth, str(tmp_path / name), "2>5").tolist() == [[1, 5]]
    for m, value, change, message in (
        (caption, "a bed", "bed", "neither OLD>NEW nor"),
        (depth, "x.npy", "two>5", "numbers from 0 to 255"),
        (depth, "x.npy", "2>5", "x.npy is not a map of classes"),
        (SET["det"], TEXT, "1:+0.1.2,0", "could not convert"),
    ):
        with pytest.raises(ValueError, match=message):
            probe.changed(m, value, change)


@pytest.fixture(scope="module")
def sensitive(loaded):  # noqa: F811
    # Larger weights: what the model sees shall matter.
    params = jax.tree.map(lambda x: 3.0 * x, loaded.params)
    return fm4m.generate.session.Session(type(loaded)(loaded.config, loaded.modalities, params, loaded.meta))


def test_the_same_value_gives_the_same_prediction_and_others_are_compared_with_it(sensitive):
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    target = Target("tok_depth@64", steps=1, temperature=1.0)
    values = ["a bed", "a bed", "a table and a red chair"]
    held = {"rgb": photo, "caption": "left out"}
    result = probe.probe(sensitive, held, "caption", values, [target], samples=2, seed=5)
    assert (result.varied, result.held, result.targets) == ("caption", ("rgb@64",), ("tok_depth@64",))
    first, same, other = (np.asarray(c.ids["tok_depth@64"]) for c in result.steps)
    assert (first == same).all()
    reaction = result.reaction("tok_depth@64")
    assert reaction[:2].tolist() == [0, 0] and reaction[2] == (first != other).mean() > 0
    assert result.reaction("caption")[2] > 0
    picture = probe.strip(sensitive, result, ["1", "2", "3"], "note")
    assert picture.dtype == np.uint8 and picture.ndim == 3
    with pytest.raises(ValueError, match="at least two values, got 1"):
        probe.probe(sensitive, held, "caption", ["a bed"], [target])
    with pytest.raises(ValueError, match="name at least one target"):
        probe.probe(sensitive, held, "caption", values, [])


def test_the_command_draws_a_strip(loaded, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.setattr(fm4m, "load", lambda path, ema: loaded)
    out = tmp_path / "deep" / "strip.png"
    flags = ["--model=x", "--inputs", "det=v0=0 v1=100 v2=300 v3=500 bed", f"--out={out}", "--targets=caption"]
    assert probe.main([*flags, "--vary", "det=1:+0.2,0|1:+0.4,0"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed and printed.count("%") == 2
    with Image.open(out) as picture:
        assert picture.width > 3 * 144
    for more, message in (
        (["--vary", "det=3:+0.2,0"], "there is no box 3"),
        (["--vary", "caption=a bed"], "at least two values"),
        (["--vary", "nothing=a|b"], "named 'nothing'"),
        (["--vary", "caption=a|b", "--samples=0"], "at least 1"),
        (["--vary", "caption=red>green|red>blue"], "is a change of what --inputs gives"),
        (["--vary", "det=1:0.1,0|1:x", f"--out={tmp_path}/strip"], "expected the name of a picture"),
        (["--vary", "caption=a|b", "--inputs", "rgb"], "not NAME=VALUE"),
    ):
        assert probe.main([*flags, *more]) == 2
        assert message in capsys.readouterr().err
