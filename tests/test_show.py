from __future__ import annotations

import hashlib
import json
import types

import numpy as np
import pytest
import seqio
from PIL import Image

from data_pipelines import records, registry
from data_pipelines.show import __main__ as show
from data_pipelines.show import decode, masks, opened, sheets, statistics
from data_pipelines.sources import TokenSource
from fm4m import modalities
from fm4m.masking import Masking, MaskingComponent
from fm4m.modalities import EOS_ID, FIRST_SENTINEL_ID, NUM_SENTINELS, Modality
from fm4m.pictures import Shower
from fm4m.tokenizers.text import TextTokenizer
from fm4m.transforms.boxes import Box, to_ids

TEXT = decode.SHIPPED / "text.json"
WORDS = TextTokenizer.load(TEXT)
RGB = modalities.register(Modality("show_rgb", "pixels", grid=(2, 2), patch_size=4, channels=3))
CODES = modalities.register(Modality("show_codes", "tokens", vocab_size=32, grid=(2, 3)))
CAPTION = modalities.register(Modality("show_caption", "sequence", vocab_size=WORDS.vocab_size, max_tokens=12))
BOXES = modalities.register(Modality("show_boxes", "sequence", vocab_size=WORDS.vocab_size, max_tokens=12))
ALL = (RGB, CODES, CAPTION, BOXES)
N = 12


def sha(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sample(i: int) -> dict[str, np.ndarray]:
    """Every third sample lacks its codes."""
    return {
        "show_rgb": np.full((8, 8, 3), 20 * i, np.uint8),
        "show_codes": np.arange(i, i + 6) % 32 if i % 3 else np.zeros(0, int),
        "show_caption": np.array(WORDS.encode(f"a red chair and {i} lamps")),
        "show_boxes": np.array(to_ids([Box(0.1, 0.2, 0.5, 0.25 + 0.05 * i, "chair")], WORDS)),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A set of both splits; the texts' tokenizer is known by its hash, the codes have none."""
    root = tmp_path_factory.mktemp("show") / "set"
    for split in ("train", "validation"):
        for m in ALL:
            made_from = {"tokenizer": sha(TEXT)} if m.kind == "sequence" else {}
            arrays = [sample(i)[m.name] for i in range(N)]
            records.write_modality(root, split, m, arrays, [str(i) for i in range(N)], made_from=made_from)
    return root


@pytest.fixture(scope="module")
def mixture(root):
    registry.add_task("show_task", TokenSource(root), [m.name for m in ALL])
    registry.add_mixture("show_mixture", [("show_task", 1.0)], Masking(8, 8, {"*": (MaskingComponent(1.0, 1.0),)}))
    yield "show_mixture"
    seqio.MixtureRegistry.remove("show_mixture")
    seqio.TaskRegistry.remove("show_task")


# ---- opening


@pytest.mark.parametrize(("size", "count"), [(10, 5), (10, 10), (3, 8), (1000, 7)])
def test_samples_are_spread_over_the_set(size, count):
    chosen = opened.spread(size, count)
    assert len(chosen) == min(size, count) and len(set(chosen)) == len(chosen)
    assert chosen == sorted(chosen) and chosen[0] >= 0 and chosen[-1] < size
    assert chosen[0] <= size / len(chosen) and chosen[-1] >= size - 1 - size / len(chosen)


def test_a_mixture_a_task_and_a_folder_have_the_same_samples(root, mixture):
    sets = [opened.open_set(name, "train", ()) for name in (mixture, "show_task", str(root))]
    assert [s.stream is not None for s in sets] == [True, False, False]
    for data in sets:
        assert len(data.samples) == N and {m.name for m in data.modalities} == {m.name for m in ALL}
        assert data.origins["show_caption"].made_from == {"tokenizer": sha(TEXT)}
        for i in (0, 7):
            for name, array in sample(i).items():
                np.testing.assert_array_equal(data.samples[i][name], array)
    assert sets[0].positions(3) == [0, 1, 2] and sets[0].at(0).keys() >= sample(0).keys(), "as training reads them"
    assert sets[1].positions(3) == [2, 6, 10]


# ---- tokenizers and decoding


def test_the_tokenizer_of_a_modality_is_found(tmp_path):
    depth = Modality("tok_depth@224", "tokens", vocab_size=8, grid=(2, 2))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("depth", "other", "stored")}
    for name, path in files.items():
        path.write_text(name)

    def find(folder=None, **made_from):
        return decode.find_tokenizer(depth, opened.Origin(tmp_path / "train", made_from), folder)

    assert find(tmp_path) == (files["depth"], "")
    assert find(tokenizer_file=str(files["stored"])) == (files["stored"], "")
    assert find(tokenizer_file="stored.safetensors") == (files["stored"], ""), "relative to the set"
    assert find(tmp_path, tokenizer=sha(files["other"])) == (files["other"], ""), "by its hash, whatever its name"
    moved = find(tmp_path, tokenizer_file=str(files["depth"]), tokenizer=sha(files["other"]))
    assert moved == (files["other"], ""), "the stored path holds another file by now"
    path, note = find(tmp_path, tokenizer="0" * 64)
    assert path == files["depth"] and "not the file that made the tokens" in note
    path, note = find(tokenizer_file="gone.safetensors")
    assert path is None and "gone.safetensors, which is not there" in note and "--tokenizers" in note


def test_boxes_are_told_from_other_texts():
    box = Box(0.1, 0.2, 0.5, 0.75, "chair")
    written = WORDS.decode(to_ids([box], WORDS))
    (first,), second = decode.boxes_of([written, ""])
    assert first.class_name == "chair" and second == []
    assert decode.boxes_as_text([first]) == "chair (10,20)-(50,75)"
    assert decode.boxes_of(["a chair", written]) is None
    assert decode.boxes_of(["", ""]) is None


def test_codes_without_a_usable_tokenizer_are_shown_as_colours():
    class Failing:
        num_tokens = 4

        def decode(self, codes, grid):
            assert codes.shape == (1, 6) and grid == (2, 3), "the modality's grid, where the tokenizer has another"
            raise ValueError("codes of another grid")

        def to_picture(self, array):
            raise AssertionError

    samples = [sample(1), sample(3)]
    shown = sheets.decode_samples(ALL, samples, {"show_codes": Shower("image", Failing())})
    assert shown.notes == ("show_codes: codes of another grid; its codes are shown",) and not shown.showers
    first, second = shown.pictures["show_codes"]
    assert first.shape == (2, 3, 3) and len(np.unique(first.reshape(-1, 3), axis=0)) == 6 and second is None
    assert shown.texts["show_caption"][0].split()[-1] == str(EOS_ID)


# ---- statistics


def constant(n: int, **arrays) -> list[dict]:
    return [{name: np.asarray(array) for name, array in arrays.items()} for _ in range(n)]


def test_statistics_count_what_is_there():
    caption = lambda n: np.arange(n) + 300  # noqa: E731
    samples = [
        {"show_codes": np.array([0, 0, 0, 1, 1, 1]), "show_caption": caption(4)},
        {"show_codes": np.array([0, 0, 0, 1, 1, 1]), "show_caption": caption(12)},
        {"show_codes": np.zeros(0, int), "show_caption": caption(8), "show_rgb": np.zeros((8, 8, 3), np.uint8)},
        {"show_codes": np.array([0, 0, 0, 1, 1, 1]), "show_caption": caption(4)},
    ]
    done = []
    result = statistics.count_samples((RGB, CODES, CAPTION), samples, done.append)
    assert result["counted"] == sum(done) == 4 and result["duplicate_samples"] == 0.25
    codes, text, rgb = (result["modalities"][m.name] for m in (CODES, CAPTION, RGB))
    assert (codes["samples"], codes["different_records"], codes["codes_seen"]) == (3, 1, 18)
    assert codes["duplicates"] == pytest.approx(2 / 3)
    assert codes["vocabulary_use"] == pytest.approx(2 / 32) and codes["perplexity"] == pytest.approx(2.0)
    assert (text["tokens_mean"], text["tokens_max"], text["full"], text["duplicates"]) == (7.0, 12, 0.25, 0.25)
    assert rgb["samples"] == 1 and rgb["tokens_max"] == 4 and rgb["perplexity"] is None


def test_every_fault_has_its_warning():
    full = np.arange(12) + 300
    result = statistics.count_samples(ALL, constant(40, show_codes=[1] * 6, show_caption=full))
    budgets = {"encoder": {"width": 8, "fill_mean": 0.59}, "decoder": {"width": 8, "fill_mean": 0.61}}
    found = "\n".join(statistics.warnings({**result, "masks": {"budgets": budgets}}))
    for words in (
        "show_rgb: missing in every one of the 40 samples",
        "show_codes: all 40 records are equal",
        "show_codes: only 3.1 % of the 32 codes are ever used",
        "show_caption: all 40 texts are equal",
        "show_caption: 100 % of the texts have max_tokens = 12 tokens",
        "98 % of the samples equal an earlier one",
        "encoder: only 59 % of the 8 slots are filled",
    ):
        assert words in found, words
    assert "decoder" not in found and "show_caption: only" not in found


def test_a_good_set_has_no_warnings_and_duplicates_have_a_limit():
    rng = np.random.default_rng(0)
    good = [{"show_codes": rng.integers(0, 32, 6), "show_caption": rng.integers(300, 900, 5)} for _ in range(100)]
    assert statistics.warnings(statistics.count_samples((CODES, CAPTION), good)) == []
    one_more = statistics.count_samples((CODES, CAPTION), [*good[:99], good[0]])
    assert statistics.warnings(one_more) == [], "1 % is not more than 1 %"
    two_more = statistics.warnings(statistics.count_samples((CODES, CAPTION), [*good[:98], *good[:2]]))
    assert len(two_more) == 3 and all("2 % of the" in w for w in two_more)


# ---- masks


def test_masks_are_those_of_training_and_belong_to_their_samples(mixture):
    data = opened.open_set(mixture, "train", (), seed=3)
    positions = list(range(8))
    drawn = masks.draw_masks(data.stream, positions)
    shuffled = masks.draw_masks(data.stream, [5, 0, 1, 2, 3, 4, 6, 7])
    assert_same(shuffled[0], drawn[5])
    # The trainer's own batch of these positions, masked with the trainer's key, has the same slots.
    raw = next(data.stream.batches(position=0, global_batch=8))
    key = masks.step.mask_key(3)
    arguments = data.stream.masking, data.stream.modalities, data.stream.tasks
    encoder, decoder = masks._masked(raw, key, np.arange(8, dtype=np.uint32), *arguments)
    seen = 0
    for i, mask in enumerate(drawn):
        assert (mask.position, mask.task, mask.widths) == (i, "show_task", (8, 8))
        assert mask.filled == (int(encoder["valid"][i].sum()), int(decoder["valid"][i].sum()))
        assert sum(map(len, mask.inputs.values())) == mask.filled[0]
        truth = data.at(i)
        for name in ("show_rgb", "show_codes"):
            cells = np.concatenate([getattr(mask, side).get(name, [0][:0]) for side in ("inputs", "targets")])
            assert len(set(cells)) == len(cells) and not (len(cells) and not len(truth[name]))
        at = np.asarray(decoder["target"][i])[np.asarray(decoder["valid"][i])]
        codes = at[at < 32] - data.stream.modalities.output_offset["show_codes"]
        targets = mask.targets.get("show_codes", np.zeros(0, int))
        np.testing.assert_array_equal(codes, truth["show_codes"][targets])
        for name in ("show_caption", "show_boxes"):
            for side in (mask.inputs, mask.targets):
                words = [w for w in side.get(name, ()) if not is_sentinel(w)]
                rest = iter(truth[name].tolist())
                assert all(word in rest for word in words), "in the order of the text"
                seen += len(words)
            if name in mask.targets:
                assert is_sentinel(mask.targets[name][0])
    assert seen > 8
    numbers = masks.count_masks(drawn, data.stream.modalities)
    fill = np.mean([m.filled[0] for m in drawn]) / 8
    assert numbers["budgets"]["encoder"]["fill_mean"] == pytest.approx(fill)
    for side in ("inputs", "targets"):
        assert sum(numbers["shares"][side].values()) == pytest.approx(1.0)
    assert numbers["shares"]["targets"]["show_rgb"] == 0.0


def is_sentinel(word) -> bool:
    return FIRST_SENTINEL_ID <= word < FIRST_SENTINEL_ID + NUM_SENTINELS


def assert_same(a: masks.SampleMask, b: masks.SampleMask) -> None:
    assert (a.position, a.filled) == (b.position, b.filled)
    for side in ("inputs", "targets"):
        assert getattr(a, side).keys() == getattr(b, side).keys()
        for name, tokens in getattr(a, side).items():
            np.testing.assert_array_equal(tokens, getattr(b, side)[name])


# ---- pictures


def test_cells_show_what_they_are():
    picture = np.zeros((8, 8, 3), np.uint8) + np.array([200, 40, 40], np.uint8)
    tile = sheets.paint_cells(picture, (2, 2), np.array([0]), np.array([3]))
    assert tile.shape == (sheets.TILE, sheets.TILE, 3)
    quarter, half = sheets.TILE // 4, sheets.TILE // 2
    assert tile[quarter, quarter].tolist() == [200, 40, 40], "an input is as it was"
    assert tile[0, quarter].tolist() == list(sheets.INPUT) == tile[half - 1, quarter].tolist(), "and has a frame"
    red, green, blue = tile[half + quarter, half + quarter].tolist()
    assert red > green > blue, "a target is orange"
    grey = tile[quarter, half + quarter]
    assert grey.max() == grey.min(), "the rest is grey"


def test_masked_text_has_sentinels_and_words():
    ids = [FIRST_SENTINEL_ID, *WORDS.encode("a red chair", eos=False), FIRST_SENTINEL_ID + 1]
    shower = types.SimpleNamespace(tokenizer=WORDS)
    assert sheets.segments(ids, shower) == [("S1", True), ("a", False), ("red", False), ("chair", False), ("S2", True)]
    assert sheets.segments([FIRST_SENTINEL_ID, 777], None) == [("S1", True), ("777", False)]


# ---- the command


def test_command_writes_pictures_and_numbers(root, mixture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(show, "MASKED", 8)  # a batch of the shape that is compiled already
    assert show.main([mixture, "--modules=", f"--out={tmp_path}", "--samples=8", "--limit=6"]) == 0
    printed = capsys.readouterr().out
    assert "show_caption" in printed and "of targets" in printed and "slots filled on average" in printed
    assert "note: show_codes: no tokenizer found (give --tokenizers=FOLDER), so its codes are shown" in printed
    numbers = json.loads((tmp_path / "statistics.json").read_text())
    assert (numbers["samples"], numbers["counted"], numbers["masks"]["samples"]) == (N, 6, 8)
    assert numbers["modalities"]["show_codes"]["samples"] == 4
    with Image.open(tmp_path / "samples.png") as samples, Image.open(tmp_path / "masks.png") as masked:
        assert samples.height > 8 * 144 and masked.height > 8 * sheets.TILE
        # The first sample of training: its picture is one grey, which the sheet shows where the layout says.
        grey = int(opened.open_set(mixture, "train", ()).at(0)["show_rgb"][0, 0, 0])
        assert np.asarray(samples)[100, 140].tolist() == [grey] * 3

    assert show.main([str(root), f"--out={tmp_path}", "--samples=2"]) == 0
    assert "no masks: they belong to a mixture" in capsys.readouterr().out
    assert not (tmp_path / "masks.png").exists(), "those of the mixture would be mistaken for this set's"


def test_command_says_what_is_wrong(root, tmp_path, capsys):
    assert show.main(["show_mixtur", "--modules="]) == 2
    assert "there is no mixture" in capsys.readouterr().err
    assert show.main([str(tmp_path / "nothing")]) == 2
    assert "not a folder of token files" in capsys.readouterr().err
    assert show.main([str(root), "--tokenizers=/no/such/folder"]) == 2
    assert "--tokenizers=/no/such/folder is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        show.main([str(root), "--samples=0"])
