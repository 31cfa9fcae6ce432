"""Files and texts in, pictures and texts out; the command line."""

from __future__ import annotations

import pathlib
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

import fm4m
from fm4m import model
from fm4m.generate import __main__ as command
from fm4m.generate import presets, session
from fm4m.loading import LoadedModel
from fm4m.modalities import EOS_ID, Modality, ModalitySet

TOKENIZERS = pathlib.Path(__file__).parents[1] / "data_pipelines/rooms/tokenizers"
SET = ModalitySet(
    (
        Modality("rgb@64", "pixels", grid=(8, 8), patch_size=8, channels=3),
        Modality("tok_depth@64", "tokens", 128, (8, 8)),
        Modality("caption", "sequence", 4736, max_tokens=12),
        Modality("det", "sequence", 4736, max_tokens=12),
    )
)
CONFIG = model.model_config(
    "fm_tiny_6e_6d_swiglu_nobias", dim=32, encoder_depth=1, decoder_depth=1, num_heads=2, dtype="float32"
)
ENTRIES = (
    f"tok_depth@64=image:{TOKENIZERS}/depth.safetensors",
    f"caption=text:{TOKENIZERS}/text.json",
    f"det=boxes:{TOKENIZERS}/text.json",
)


@pytest.fixture(scope="module")
def loaded():
    params = model.init_params(CONFIG, SET, jax.random.key(0))
    return LoadedModel(CONFIG, SET, params, {"config": {"log": {"picture_tokenizers": ENTRIES}}})


@pytest.fixture(scope="module")
def opened(loaded):
    return session.Session(loaded)


@pytest.fixture
def photo(tmp_path):
    picture = np.zeros((50, 90, 3), np.uint8)
    picture[:, 20:70] = 200
    Image.fromarray(picture).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_names_may_lack_the_resolution_and_the_prefix(opened):
    assert opened.name_of("rgb", SET.inputs) == "rgb@64"
    assert opened.name_of("depth", SET.outputs) == "tok_depth@64"
    with pytest.raises(ValueError, match="no modality of this model named 'dept'.*tok_depth@64"):
        opened.name_of("dept", SET.outputs)


def test_what_is_read_is_what_was_given(opened, photo):
    given = {"rgb": str(photo), "caption": "a bed [S_1]", "depth": np.arange(64, dtype=np.int64)}
    canvas = opened.read(given, copies=2)
    picture = opened.cells(canvas, "rgb@64")[1]
    # The centred square is 50 wide and wholly inside the bright part.
    assert picture.shape == (64, 64, 3) and (picture == 200).all()
    assert opened.texts(canvas, "caption")[0].startswith("a bed")
    assert EOS_ID not in np.asarray(canvas.ids["caption"])[0]
    assert (np.asarray(canvas.ids["tok_depth@64"])[0] == np.arange(64)).all()
    closed = opened.read({"caption": "a bed"})
    assert EOS_ID in np.asarray(closed.ids["caption"])[0]
    # A depth map in the tokenizer's stored form becomes codes.
    depth = np.linspace(1, 3, 64 * 64, dtype=np.float32).reshape(64, 64)
    codes = np.asarray(opened.read({"depth": depth}).ids["tok_depth@64"])[0]
    assert (codes == opened.showers["tok_depth@64"].tokenizer.encode(depth[None])[0]).all()


def test_masks_and_boxes_open_the_cells_they_touch(opened):
    mask = np.zeros((64, 64), bool)
    mask[9, 40] = True
    assert np.argwhere(session.opened(mask, (8, 8))).tolist() == [[1, 5]]
    assert session.opened((0.0, 0.5, 0.25, 1.0), (8, 8)).sum() == 8
    canvas = opened.read({"depth": np.arange(64, dtype=np.int64)})
    changed = opened.open_cells(canvas, "tok_depth@64", mask)
    assert np.flatnonzero(~np.asarray(changed.seen["tok_depth@64"])[0]).tolist() == [13]


def test_pictures_maps_and_masks_of_one_photo_show_the_same_part_of_it(opened):
    """Of a picture that is no square the model sees the centre; the marked columns are the first of it."""
    marked = np.zeros((64, 128), bool)
    marked[:, 32:40] = True
    canvas = opened.read({"rgb": np.repeat(255 * marked[..., None].astype(np.uint8), 3, 2), "depth": 1.0 + marked})
    assert (opened.cells(canvas, "rgb@64")[0][:, :8] == 255).all()
    centred = opened.read({"depth": (1.0 + marked)[:, 32:96]})
    assert (np.asarray(canvas.ids["tok_depth@64"]) == np.asarray(centred.ids["tok_depth@64"])).all()
    assert np.flatnonzero(session.opened(marked, (8, 8)).any(0)).tolist() == [0]


def damaged_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    data[second : second + 4] = b"\0\1\2\3"
    path.write_bytes(data)


def test_damaged_and_enormous_pictures_are_refused_in_a_sentence(opened, monkeypatch, tmp_path):
    damaged_png(tmp_path / "a.png")
    for read in (lambda p: opened.read({"rgb": str(p)}), lambda p: session.read_mask(str(p))):
        with pytest.raises(ValueError, match=r"a\.png is not a picture that can be read"):
            read(tmp_path / "a.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"b\.png is not a picture that can be read \(Image size"):
        session.read_mask(str(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.read({"rgb": "nowhere.png"}), "no file nowhere.png"),
        (lambda s: s.read({"caption": "a bed " * 9}), "tokens, at most 12 fit"),
        (lambda s: s.read({"caption": 3}), "expected a text"),
        (lambda s: s.read({"rgb": np.zeros((64, 64), np.uint8)}), r"expected a picture uint8 \[H, W, 3\]"),
        (lambda s: session.opened(np.zeros((8, 8)), (8, 8)), "mask is empty"),
        (lambda s: session.opened((0.5, 0.5, 0.4, 1.0), (8, 8)), "must be xmin"),
        (lambda s: session.read_mask("1,2"), "neither a mask"),
        (lambda s: session.read_mask(__file__), "test_generate_session.py is not a picture that can be read"),
        (lambda s: s.read({"depth": np.zeros(7, np.float32)}), r"'tok_depth@64': expected an array \[height, width"),
        (lambda s: s.read({"rgb": np.zeros((64, 64, 3))}), r"input 'rgb@64': expected a picture uint8"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(opened, call, message):
    with pytest.raises(ValueError, match=message):
        call(opened)


def test_the_demonstrations_settings_follow_what_is_given():
    with_image = presets.target(SET, "tok_depth@64", ["rgb@64"])
    without = presets.target(SET, "tok_depth@64", ["caption"])
    assert (with_image.steps, with_image.temperature, with_image.guidance) == (1, 0.01, 2.0)
    assert (without.steps, without.temperature_schedule) == (8, "onex:0.5:0.5")
    assert presets.changed(without, {"top_k": "0.1"}).top_k == 0.1
    assert presets.in_order(["det", "caption", "tok_rgb@64", "tok_depth@64"]) == [
        "tok_depth@64", "tok_rgb@64", "caption", "det",
    ]  # fmt: skip


def test_the_command_writes_what_it_says(loaded, photo, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fm4m, "load", lambda path, ema: loaded)
    out = tmp_path / "out"
    flags = ["--model=x", "--inputs", f"rgb={photo}", "--samples=2", f"--out={out}", "--set", "depth.steps=2"]
    assert command.main([*flags, "--targets=depth,caption"]) == 0
    printed = capsys.readouterr().out
    names = {p.name for p in out.iterdir()}
    assert {"sheet.png", "codes.npz", "tok_depth@64-0.png", "tok_depth@64-1.png", "caption-1.txt"} <= names
    assert printed.count("caption: ") == 2 and f"wrote {out / 'sheet.png'}" in printed
    with np.load(out / "codes.npz") as codes:
        assert codes["tok_depth@64"].shape == (2, 64) and (codes["tok_depth@64"] >= 0).all()


def test_a_second_model_goes_on(loaded, monkeypatch, capsys, tmp_path):
    """A chain of two models: depth from a caption, then larger depth from both, which only the second one knows."""
    larger = ModalitySet((SET["caption"], SET["tok_depth@64"], Modality("tok_depth@128", "tokens", 128, (16, 16))))
    second = LoadedModel(CONFIG, larger, model.init_params(CONFIG, larger, jax.random.key(1)), {})
    monkeypatch.setattr(fm4m, "load", lambda path, ema: second if path == "second" else loaded)
    flags = ["--inputs", "caption=a bed", "--samples=2", "--set", "steps=2", f"--out={tmp_path / 'one'}"]
    assert command.main(["--model=first", "--targets=depth,det", *flags]) == 0
    first, two = tmp_path / "one" / "codes.npz", tmp_path / "two"
    again = ["--model=second", f"--codes={first}", "--set", "steps=2"]
    assert command.main([*again, "--targets=tok_depth@128", f"--out={two}", "--samples=2"]) == 0
    before, after = session.read_codes(first), session.read_codes(two / "codes.npz")
    assert set(after) == {"caption", "tok_depth@64", "tok_depth@128"}
    assert (after["tok_depth@128"] >= 0).all() and after["tok_depth@128"].shape == (4, 256)
    for name in ("caption", "tok_depth@64"):
        assert (after[name] == np.repeat(before[name], 2, axis=0)).all()
    (tmp_path / "no.npz").write_bytes(b"PK no")
    np.save(tmp_path / "no.npy", np.zeros((2, 64), np.int32))
    for file, message in ((first.with_name("nowhere"), "no file"), (tmp_path / "no.npz", "not a file of codes"),
                          (tmp_path / "no.npy", "not a file of codes")):  # fmt: skip
        assert command.main(["--model=second", f"--codes={file}"]) == 2
        assert message in capsys.readouterr().err
    assert command.main([*again, "--inputs", f"tok_depth@64={tmp_path}/x.npy"]) == 2
    assert "'tok_depth@64' is given twice" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "no.zip", "w") as archive:
        archive.writestr("caption.txt", "a bed")
    assert command.main(["--model=second", f"--codes={tmp_path / 'no.zip'}"]) == 2
    assert "expected integers [samples, tokens]" in capsys.readouterr().err
    np.savez(tmp_path / "no.npz", **{"tok_rgb@64": np.zeros((2, 64), np.int32)})
    assert command.main(["--model=second", f"--codes={tmp_path / 'no.npz'}"]) == 2
    assert "--codes has tok_rgb@64; this model's inputs: caption" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--inputs are missing; this model's inputs: rgb@64"),
        (["--inputs", "rgb"], "'rgb' is not NAME=VALUE"),
        (["--inputs", "caption=a bed", "--targets=dpeth"], "Did you mean"),
        (["--inputs", "caption=a bed", "--set", "stepz=2"], "there is no setting 'stepz'"),
        (["--inputs", "caption=a bed", "--set", "steps=two"], "'two' is no int"),
        (["--inputs", "caption=a bed", "--samples=0"], "at least 1"),
        (["--inputs", "depth=depth.png"], "there is no file depth.png"),
        (["--inputs", f"depth={__file__}"], "expected a .npy array of depth (floats) or of codes"),
        (["--inputs", "caption=a bed", "--inputs", "caption=a desk"], "--inputs: caption is given twice"),
        (["--inputs", "caption=a bed", "--targets=depth", "--set", "det.top_p=1"], "det is not generated; targets"),
        (["--inputs", "caption=a bed", f"--out={__file__}"], "File exists"),
    ],
)
def test_the_command_refuses_in_one_sentence(loaded, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(fm4m, "load", lambda path, ema: loaded)
    assert command.main(["--model=x", *flags]) == 2
    assert message in capsys.readouterr().err
