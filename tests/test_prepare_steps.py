"""The steps of a preparation: what becomes of pictures, maps, labels and lists, and what a failing record does."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from data_pipelines.prepare import samples, steps
from data_pipelines.prepare.config import step_options
from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.samples import Labels, Record, in_validation, new_records, stored_record
from data_pipelines.prepare.sources import Item
from fm4m.config_file import ConfigError
from fm4m.tokenizers import io
from fm4m.tokenizers.text import TextTokenizer
from fm4m.transforms import boxes, color_palette, human_poses, images, metadata
from fm4m.transforms.crops import Crop

TOKENIZERS = pathlib.Path(__file__).resolve().parents[1] / "data_pipelines" / "rooms" / "tokenizers"
TEXT = TextTokenizer.load(TOKENIZERS / "text.json")


class Means(Labels):
    """A label that is the mean of every picture; counts how many pictures it has seen."""

    seen = 0

    def labeller(self, options):
        return self

    def label(self, pictures, known):
        self.seen += len(pictures)
        assert len(pictures) == len(known) and all("key" in k for k in known)
        return np.stack([p.mean((0, 1)).astype(np.float32) for p in pictures])


def make(name="m", labels=None, **options):
    if "tokenizer" not in options and options["make"] in ("caption", "boxes", "palette", "metadata", "poses"):
        options["tokenizer"] = str(TOKENIZERS / "text.json")
    return steps.make_step(name, step_options(name, options), labels or Labels(), seed=0)


def record(crop=None, key="k", row=0, size=(64, 64), **fields) -> Record:
    fields.setdefault("rgb", np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
    return Record(key, key, row, crop or Crop(0, 0, 64, 64), size, fields, {}, {})


def text(step, *records):
    return [TEXT.decode(made.array) for made in step.run(records)]


def test_maps_are_cropped_and_mirrored_like_the_picture():
    rng = np.random.default_rng(1)
    crop = Crop(4, 8, 32, 32, True)
    normal = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    one = record(crop, normal=normal, depth=rng.random((64, 64)).astype(np.float32))
    np.testing.assert_array_equal(one.cut((16, 16)), images.rgb(one.fields["rgb"], crop, (16, 16)))
    np.testing.assert_array_equal(
        one.cut_map("depth", (32, 32), nearest=False), one.fields["depth"][4:36, 8:40][:, ::-1]
    )
    with pytest.raises(Unusable, match="'small' is of 8 x 8 pixels, the picture .* of 64 x 64"):
        record(small=np.zeros((8, 8), np.float32)).cut_map("small", (4, 4), nearest=False)
    with pytest.raises(Unusable, match="has no 'semseg'"):
        one.cut_map("semseg", (4, 4), nearest=True)


@pytest.mark.parametrize(("name", "mirrored"), [("normal", True), ("depth", False), ("semseg", True)])
def test_codes_are_those_of_the_tokenizer(name, mirrored):
    tokenizer = io.load(TOKENIZERS / f"{name}.safetensors")
    rng = np.random.default_rng(2)
    maps = {
        "rgb": rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
        "normal": rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
        "depth": rng.random((64, 64)).astype(np.float32),
        "semseg": rng.integers(0, 20, (64, 64)).astype(np.uint8),
    }
    step = make("codes", make="codes", tokenizer=str(TOKENIZERS / f"{name}.safetensors"), input=name)
    one = record(Crop(0, 0, 64, 64, mirrored), **maps)
    expected = maps[name][:, ::-1] if mirrored else maps[name]
    if name == "normal":
        expected = np.concatenate([255 - expected[..., :1], expected[..., 1:]], axis=-1)
    [made] = step.run([one])
    np.testing.assert_array_equal(made.array, tokenizer.encode(expected[None])[0])
    assert step.modality.grid == (8, 8) and step.modality.vocab_size == tokenizer.vocab_size


def test_pixels_may_be_those_that_a_tokenizer_gives_back():
    path = str(TOKENIZERS / "rgb.safetensors")
    step = make(make="pixels", size=64, patch_size=8, through=path)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    tokenizer = io.load(path)
    [made] = step.run([record(Crop(0, 0, 64, 64, False), rgb=picture)])
    np.testing.assert_array_equal(made.array, tokenizer.decode(tokenizer.encode(picture[None]))[0])
    with pytest.raises(ConfigError, match=r"is for rgb of \(64, 64\) pixels, expected rgb of \(32, 32\)"):
        make(make="pixels", size=32, patch_size=8, through=path)


def test_a_record_that_fails_takes_no_other_with_it():
    step = make(make="pixels", size=8, patch_size=4)
    good, bad, odd = record(key="a"), record(key="b"), record(key="c", rgb=np.zeros((4, 4, 3), np.uint8))
    bad.fields = {}
    bad.failures = {"rgb": Unusable("truncated", "b: ends early")}
    made = step.run([good, bad, odd, good])
    assert [m.array is None for m in made] == [False, True, True, False]
    assert made[1].why.reason == "truncated" and made[2].why.reason == "size"
    step = make(make="stored_codes", input="tok", vocab_size=4, grid=(1, 2))
    rows = ([[0, 3]], 0), ([[0, 4]], 0), ([[0, 1]], 1)
    made = step.run([record(tok=np.array(codes), row=row) for codes, row in rows])
    assert made[0].array.tolist() == [0, 3]
    assert made[1].why.reason == steps.FAILED and "token 4, outside the vocabulary" in made[1].why.sentence
    assert made[2].why.reason == "rows" and "no row 1" in made[2].why.sentence


def test_labels_are_made_once_for_a_crop_and_once_for_a_picture():
    labels = Means()
    label = {"kind": "means"}
    first = make(make="embedding", width=3, max_tokens=1, label=label, size=8, labels=labels)
    second = make(make="embedding", width=1, max_tokens=3, label=label, size=8, labels=labels)
    batch = [record(key="a"), record(key="b")]
    for step, shape in ((first, (1, 3)), (second, (3, 1))):
        for made in step.run(batch):
            assert made.array.shape == shape and made.array.dtype == np.float16
    assert labels.seen == 2
    shared = new_records(Item("k", {"rgb": batch[0].fields["rgb"]}), 3, 0)
    for one in shared:
        labels.of_whole(label, one)
    assert labels.seen == 3
    with pytest.raises(ConfigError, match=r"modalities\.m: set size"):
        make(make="embedding", width=3, max_tokens=1, label=label)


def test_embeddings_of_the_references_layout():
    step = make(make="embedding", width=2, max_tokens=3, input="t5")
    emb = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    stored = {"emb": emb, "mask_valid": np.array([[1, 1, 0], [1, 0, 0]])}
    made = step.run([record(t5=stored), record(t5=stored, row=1), record(t5=stored, row=2)])
    assert made[0].array.tolist() == [[0, 1], [2, 3]] and made[1].array.tolist() == [[6, 7]]
    assert made[2].why.reason == "rows"


def test_captions_go_with_their_crop_and_are_cut():
    step = make(make="caption", max_tokens=6)
    one = ["a red chair", "two blue tables in a room with a lamp"]
    assert text(step, record(caption=one)) == ["a red chair"]
    [made] = step.run([record(caption=one, row=1)])
    assert len(made.array) == 6 and made.array[-1] == 3 and made.notes == ("caption_cut",)
    assert text(step, record(caption=["alone"], row=3)) == ["alone"]
    assert step.run([record(caption=[])])[0].why.reason == steps.FAILED
    assert step.run([record()])[0].why.reason == "field_missing"


def test_boxes_are_cropped_mirrored_and_the_smallest_left_out():
    found = [
        {"boxes": [0.0, 0.0, 1.0, 1.0], "class_name": "dog", "score": 0.9},
        {"boxes": [0.5, 0.0, 1.0, 0.5], "class_name": "cat", "score": 0.7},
        {"boxes": [0.1, 0.1, 0.2, 0.2], "class_name": "bed", "score": 0.5},
    ]
    crop = Crop(0, 0, 64, 32, True)  # the left half, mirrored
    step = make(make="boxes", max_tokens=11)
    written = text(step, record(Crop(0, 0, 64, 64), det=found), record(crop, det=found), record(det=[]))
    assert [b.class_name for b in boxes.from_text(written[0]).boxes] == ["dog", "cat"]
    [dog] = boxes.from_text(written[1]).boxes
    assert (dog.xmin, dog.xmax) == (0.0, 1.0) and written[2] == ""
    [made] = make(make="boxes", max_tokens=6).run([record(det=found)])
    assert TEXT.decode(made.array).endswith("dog") and made.notes == ("boxes_left_out",)
    low = text(make(make="boxes", max_tokens=20, threshold=0.4), record(crop, det=found[2:]))[0]
    [bed] = boxes.from_text(low).boxes
    assert bed.xmin == pytest.approx(0.6, abs=2e-3) and bed.xmax == pytest.approx(0.8, abs=2e-3)


def test_texts_with_drawn_parts_depend_on_the_key_only():
    colors = [{str(n): [[n, 2 * i, 3 * i] for i in range(n)] for n in range(1, 8)}]
    palette = make(make="palette", input="palette")
    drawn = [text(palette, record(key=f"k{i}", palette=colors))[0] for i in range(8)]
    assert drawn == text(palette, *(record(key=f"k{i}", palette=colors) for i in range(8)))
    assert len({color_palette.from_text(words).palettes[0].__len__() for words in drawn}) > 1
    assert text(make(make="palette", input="palette", colors=2), record(palette=colors)) == [
        color_palette.to_text(colors[0]["2"])
    ]
    values = {"original_width": 640, "brightness": 100.0, "n_humans": 2}
    meta = make(make="metadata", input="meta")
    orders = {tuple(e.name for e in metadata.from_text(text(meta, record(key=f"k{i}", meta=values))[0]).entries)
              for i in range(8)}  # fmt: skip
    assert len(orders) > 1 and all(sorted(order) == sorted(values) for order in orders)


def test_statistics_and_palettes_are_of_the_whole_picture():
    red = np.zeros((32, 64, 3), np.uint8)
    red[..., 0] = 200
    one = Record("k", "k", 0, Crop(0, 16, 32, 32), (32, 64), {"rgb": red, "caption": ["two words"]}, {}, {})
    found = {e.name: e.bin for e in metadata.from_text(text(make(make="metadata"), one)[0]).entries}
    assert found["original_width"] == 2 and found["original_height"] == 1 and found["caption_n_words"] == 2
    assert color_palette.from_text(text(make(make="palette", colors=1), one)[0]).palettes == [[(200, 0, 0)]]


def test_people_are_cropped_and_nobody_is_none():
    person = {
        "bbox_xyxy": [[16, 16, 48, 48]],
        "pose_tokenized": [[1, 2, 3, 4, 5, 6, 7, 600]],
        "pred_smpl_params": {"global_orient": [np.eye(3).tolist()], "betas": [[0.0] * 10]},
        "pred_cam": [[0.5, 0.1, 5.0]],
    }
    step = make(make="poses", max_tokens=50)
    written = text(step, record(Crop(16, 16, 32, 32), human_poses=person), record(human_poses={}))
    [found] = human_poses.from_text(written[0]).people
    assert found.box == (0.0, 0.0, 1.0, 1.0) and found.pose[-1] == 600 and written[1] == "none"


def test_crops_come_from_the_source_or_from_the_key():
    picture = np.zeros((40, 60, 3), np.uint8)
    rows = new_records(Item("a", {"rgb": picture}), 3, 7)
    assert [r.key for r in rows] == ["a", "a#1", "a#2"] and rows[0].crop == Crop(0, 10, 40, 40)
    again = new_records(Item("a", {"rgb": picture}), 3, 7)
    assert [r.crop for r in rows] == [r.crop for r in again]
    assert rows[1].crop != new_records(Item("b", {"rgb": picture}), 3, 7)[1].crop
    assert rows[1].crop != new_records(Item("a", {"rgb": picture}), 3, 8)[1].crop
    stored = np.array([[0, 0, 20, 20, 0], [5, 5, 10, 10, 1]])
    rows = new_records(Item("a", {"crop_settings": stored}), 5, 7)
    assert [tuple(r.crop) for r in rows] == [(0, 0, 20, 20, 0), (5, 5, 10, 10, 1)] and rows[0].size is None
    assert new_records(Item("a", {"caption": ["x"]}), 2, 7)[0].window() == (0.0, 0.0, 1.0, 1.0)
    one = new_records(Item("a", {"rgb": picture}), 2, 7)[1]
    back = stored_record(one.listed(), Item("a", {"rgb": picture}), None, {})
    assert (back.key, back.crop, back.size, back.row) == (one.key, one.crop, one.size, 1)
    gone = stored_record(one.listed(), None, Unusable("sample_gone", "a: gone"), {})
    with pytest.raises(Unusable, match="a: gone"):
        gone.field("anything")


def test_the_validation_share_depends_on_the_key():
    keys = [f"key{i}" for i in range(2000)]
    chosen = {key for key in keys if in_validation(key, 0.1)}
    assert 150 < len(chosen) < 250 and chosen <= {key for key in keys if in_validation(key, 0.2)}
    assert not any(in_validation(key, 0.0) for key in keys)
    first, again, other = (samples.generator("a", n).random() for n in (1, 1, 2))
    assert first == again != other
