"""The evaluation of generation on rooms: what captions say, guesses without an input, the whole command."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import fm4m
from data_pipelines.rooms.evaluate import __main__ as command
from data_pipelines.rooms.evaluate import from_caption, from_rgb, larger, settings, table, truth, words
from data_pipelines.rooms.modalities import MODALITIES
from data_pipelines.rooms.pack import SHIPPED, RoomsPack
from fm4m import modalities as modalities_lib
from fm4m import model
from fm4m.loading import LoadedModel
from fm4m.modalities import Modality, ModalitySet
from fm4m.tokenizers import io
from fm4m.tokenizers.tokenizer import Tokenizer

TOKENIZERS = pathlib.Path(truth.__file__).parents[1] / "tokenizers"
SET = ModalitySet(tuple(modalities_lib.get(name) for name in MODALITIES if name != settings.FEATURES))
CONFIG = model.model_config(
    "fm_tiny_6e_6d_swiglu_nobias", dim=32, encoder_depth=1, decoder_depth=1, num_heads=2, dtype="float32"
)
ENTRIES = tuple(
    f"tok_{name}@64=image:{TOKENIZERS}/{name}.safetensors" for name in ("rgb", "depth", "normal", "semseg")
) + (f"caption=text:{TOKENIZERS}/text.json", f"det=boxes:{TOKENIZERS}/text.json")


def untrained(modalities=SET, entries=ENTRIES):
    params = model.init_params(CONFIG, modalities, jax.random.key(0))
    return LoadedModel(CONFIG, modalities, params, {"config": {"log": {"picture_tokenizers": entries}}})


# ---- captions


@pytest.mark.parametrize(
    ("caption", "room", "things", "surfaces"),
    [
        ("two blue chairs and a small lamp in a living room with brick walls",
         "living room", {"chair", "lamp"}, {"brick walls"}),
        ("an office with blue walls, a brown desk on the left and a window on the right",
         "office", {"desk", "window"}, {"walls"}),
        ("a white built-in wardrobe to the left of a large bed in a bedroom with a carpet",
         "bedroom", {"built-in wardrobe", "bed"}, {"carpet"}),
        ("a built - in wardrobe in a bedroom with two - tone walls",
         "bedroom", {"built-in wardrobe"}, {"two-tone walls"}),
        ("three shelves and purple books in an office", "office", {"shelf", "books"}, set()),
        ("an empty kitchen with a tiled floor", "kitchen", set(), {"tiled floor"}),
        ("a vase on a table in a dining room", "dining room", {"vase", "table"}, set()),
        ("", None, set(), set()),
    ],
)  # fmt: skip
def test_what_a_caption_says(caption, room, things, surfaces):
    said = words.said(caption)
    assert (said.room, said.things, said.surfaces) == (room, things, surfaces)


def test_every_shipped_caption_names_its_room_and_something():
    pack = RoomsPack(SHIPPED / "rooms_val.zip")
    said = [words.said(pack.meta(i)["caption"]) for i in range(len(pack))]
    assert all(s.room for s in said)
    assert all(s.things or "empty" in s.words for s in said)


def test_captions_are_compared_as_sets():
    found = words.compare(
        ["a red bed in a bedroom", "a red bed in a bedroom", "a red bed in a bedroom"],
        ["a red bed in a bedroom", "a bed, a red bed and a bed in a kitchen", "a couch"],
    )
    assert found["words"] == pytest.approx([1.0, 2 * 2 / (3 + 3), 0.0])
    assert found["things"] == pytest.approx([1.0, 1.0, 0.0]) and found["room"] == pytest.approx([1.0, 0.0, 0.0])


def test_the_typical_caption_shares_most_words_with_all():
    captions = ["a red bed in a bedroom", "a bed in a bedroom", "a bed in a bedroom with a carpet", "a sink"]
    means = [np.mean([words.f1(words.said(a).words, words.said(b).words) for b in captions]) for a in captions]
    assert words.typical(captions) == captions[int(np.argmax(means))] == "a bed in a bedroom"


# ---- the truth


@pytest.fixture(scope="module")
def rooms():
    return truth.load_rooms(SHIPPED / "rooms_val.zip", 128)


def test_the_truth_and_its_constant_guess(rooms):
    assert len(rooms) == 128 and rooms.index == list(range(128))
    others = rooms.other_views()
    assert all(i != j and rooms.scenes[i] == rooms.scenes[j] for i, j in enumerate(others))
    few = truth.load_rooms(SHIPPED / "rooms_val.zip", 2)
    assert few.index == [32, 96] and few.other_views() is None
    assert (few.rgb == rooms.rgb[[32, 96]]).all() and few.captions == [rooms.captions[32], rooms.captions[96]]
    guess = truth.constant_guess(rooms)
    assert guess.depth == pytest.approx(rooms.depth.mean(0), rel=1e-4)
    middle = rooms.semseg[:, 32, 32]
    assert guess.semseg[32, 32] == np.bincount(middle).argmax()
    names = {box.class_name for image in rooms.boxes for box in image}
    assert {box.class_name for box in guess.boxes} <= names and all(0 <= box.score <= 1 for box in guess.boxes)


def test_the_truth_is_perfect_by_every_measure(rooms):
    parts = [
        from_rgb.depth(rooms, 3 * rooms.depth - 1, rooms.depth), from_rgb.normals(rooms, rooms.normal),
        from_rgb.classes(rooms, rooms.semseg), from_rgb.boxes(rooms, rooms.boxes),
        from_rgb.captions(rooms, rooms.captions),
    ]  # fmt: skip
    everything = np.arange(len(rooms))
    for key, statistic in {k: s for part in parts for k, s in part.items()}.items():
        best = 0.0 if from_rgb.TITLES[key][1] == "lower" else 1.0
        assert statistic(everything) == pytest.approx(best, abs=1e-5), key
    assert from_caption.shown(rooms, rooms.semseg)(everything) > 0.8
    features = rooms.rgb[:, ::16, ::16].reshape(128, -1).astype(float)
    same = from_caption.Features(features, features, features, features, features, np.zeros_like(features))
    retrieval = {row.key: row.numbers for row in from_caption.retrieval_rows(same, rooms.scenes)}
    assert retrieval["retrieval.first"]["model"].value == 1.0
    assert retrieval["retrieval.first"]["constant"].value == pytest.approx(1 / 128)
    frechet = {row.key: row.numbers for row in from_caption.frechet_rows(same, rooms.scenes)}
    assert frechet["frechet.true"]["model"].value == pytest.approx(0.0, abs=1e-6)
    assert frechet["frechet.true"]["constant"].value > 1.0


def test_a_table_is_aligned_and_json_has_no_nan():
    rows = [
        table.Row("a", "first", "lower", {"model": table.Number(0.5, 0.01), "real": table.Number(12.25)}),
        table.Row("b", "the second", "higher", {"model": table.Number(3.0, 0.1)}, digits=1),
    ]
    text = table.render("title", rows).splitlines()
    assert text[0].split() == ["title", "better", "model", "real"] and set(text[1]) == {"-"}
    assert text[2].split() == ["first", "lower", "0.500", "±", "0.010", "12.250"]
    assert text[3].endswith("3.0 ± 0.1       -")
    assert table.as_json(rows)["a"]["real"] == {"value": 12.25, "error": None}


# ---- the command


def quick(monkeypatch, loaded):
    monkeypatch.setattr(fm4m, "load", lambda path, ema: loaded)
    # The network's 256 x 256 pixels are not what is tested here.
    monkeypatch.setattr(from_caption, "lite0", lambda: lambda x: x[:, ::16, ::16].reshape(len(x), -1).astype(float))


@pytest.mark.parametrize(
    ("flags", "modalities", "message"),
    [
        (["--samples=0"], SET, "--samples is 0, expected at least 1"),
        (["--data=nowhere"], SET, "nowhere/rooms_val.zip: no such rooms pack"),
        (["--set", "rgb.depth"], SET, "'rgb.depth' is not EXPERIMENT.TARGET.KEY=VALUE"),
        (["--set", "rgb.depth=2"], SET, "--set rgb.depth: expected EXPERIMENT.TARGET.KEY, beginning with one of"),
        (["--set", "rgb.dept.steps=2"], SET, "--set rgb.dept.steps: expected"),
        (["--set", "rgb.depth.stepz=2"], SET, "there is no setting 'stepz'"),
        ([], ModalitySet(tuple(m for m in SET.modalities if m.name != "tok_normal@64")),
         "no output tok_normal@64, which this evaluation needs"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_sentence(flags, modalities, message, monkeypatch, capsys, tmp_path):
    quick(monkeypatch, untrained(modalities, tuple(e for e in ENTRIES if e.partition("=")[0] in modalities.names)))
    assert command.main(["--model=x", f"--out={tmp_path}", "--samples=1", "--train-samples=1", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error


@pytest.mark.slow
def test_the_whole_command_with_an_untrained_model(monkeypatch, capsys, tmp_path):
    quick(monkeypatch, untrained())
    one_step = [f"caption.{name}.steps=1" for name in ("depth", "normal", "semseg", "rgb")]
    flags = ["--samples=4", "--train-samples=8", "--batch=4", "--set", *one_step, "caption.det.max_tokens=8"]
    assert command.main(["--model=x", f"--out={tmp_path}", *flags]) == 0
    told = capsys.readouterr().out
    assert "from RGB" in told and "from a caption" in told and "caption  to tok_rgb@64     roar, 1 step" in told
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["from_rgb"]) == set(from_rgb.TITLES)
    depth = results["from_rgb"]["depth.abs_rel"]
    assert depth["tokenizer"]["value"] < 0.1 < depth["model"]["value"]
    assert results["from_rgb"]["boxes.ap50"]["tokenizer"]["value"] == 1.0
    assert results["from_caption"]["retrieval.first"]["constant"]["value"] == 0.25
    assert results["samples"] == 4 and results["settings"]["caption"]["tok_rgb@64"].startswith("roar, 1 step")
    for name in ("from_rgb", "from_caption", "edits"):
        sheet = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert 1000 <= sheet.shape[1] <= 1400 and sheet.std() > 10


@pytest.fixture
def enlarging(monkeypatch, tmp_path):
    """An untrained super-resolution model, a tokenizer of 128 pixels with the weights of 64, and enlarged rooms."""
    small = io.load(TOKENIZERS / "rgb.safetensors")
    io.save(tmp_path / "rgb128.safetensors", Tokenizer(
        dataclasses.replace(small.config, image_size=(128, 128)), small.params, small.codebook, small.stats
    ))  # fmt: skip
    entries = (f"{larger.LARGE}=image:{tmp_path}/rgb128.safetensors",)
    modalities = ModalitySet(
        (modalities_lib.get(larger.SMALL), Modality(larger.LARGE, "tokens", 1024, (16, 16))), outputs=(larger.LARGE,)
    )
    quick(monkeypatch, untrained(modalities, entries))
    load = truth.load_rooms

    def enlarged(path, count):
        rooms = load(path, count)
        return dataclasses.replace(rooms, rgb=rooms.rgb.repeat(2, 1).repeat(2, 2))

    monkeypatch.setattr(truth, "load_rooms", enlarged)
    return ["--model=x", f"--data={SHIPPED}", f"--out={tmp_path}", "--samples=4", "--train-samples=8", "--batch=4"]


def test_a_super_resolution_model_is_measured(enlarging, capsys, tmp_path):
    assert larger.main([*enlarging, "--set", "steps=2"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    psnr = {column: n["value"] for column, n in results["larger"]["psnr"].items() if isinstance(n, dict)}
    assert psnr["model"] < psnr["enlarged"] and 15 < psnr["enlarged"] < 30 and psnr["tokenizer"] > 15
    assert np.asarray(Image.open(tmp_path / "larger.png")).std() > 10
    assert "PSNR in dB" in capsys.readouterr().out
    bad = ((["--set", "stepz=2"], "no setting 'stepz'"), (["--data=nowhere"], "no such rooms pack"))
    for flags, message in bad:
        assert larger.main([*enlarging, *flags]) == 2
        assert message in capsys.readouterr().err
