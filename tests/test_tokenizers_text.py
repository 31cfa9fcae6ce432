"""Text tokenizer: 4M's layout, training, encoding, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fm4m.tokenizers import text

SENTENCE = (
    "living room with a red couch two chairs and dining table carpet is blue tv on the wall wooden floor bright window "
    "bookcase armchair lamp corner behind kitchen bathroom bedroom sink mirror plant in front of large small grey"
)
VOCAB_SIZE = 4480


def captions() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(SENTENCE.split(), 8)) + "." for _ in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> text.TextTokenizer:
    return text.train_wordpiece(captions(), VOCAB_SIZE, ("side table", "trash can"))


def test_layout(tokenizer):
    fixed = text.fixed_tokens()
    assert len(fixed) == len(set(fixed)) == text.PIECE_OFFSET == 4284
    assert (text.PAD_ID, text.EOS_ID, text.FIRST_SENTINEL_ID) == (0, 3, 5)
    assert tokenizer.vocab_size == VOCAB_SIZE
    for id_, token in enumerate(fixed):
        assert tokenizer.encode(token, eos=False) == [id_], token
    assert tokenizer.encode("[S_1] v2=7 dining table !", eos=False) == [5, 2211, 4264, 4284]
    assert text.value_id("v2", 7) == 2211
    with pytest.raises(ValueError, match="no token v4=0"):
        text.value_id("v4", 0)


def test_encode_decode(tokenizer):
    ids = tokenizer.encode("A red COUCH, two chairs.")
    assert ids[-1] == text.EOS_ID
    assert tokenizer.decode(ids) == "a red couch, two chairs."
    assert tokenizer.encode("a red couch", eos=False) + [3] == tokenizer.encode("a red couch")
    assert tokenizer.encode_batch(["a red couch", "tv"]) == [tokenizer.encode("a red couch"), tokenizer.encode("tv")]
    assert tokenizer.encode("") == [text.EOS_ID]


def test_class_names_are_whole_words(tokenizer):
    car = text.COCO_OFFSET + text.COCO_CLASSES.index("car")
    assert tokenizer.encode("car", eos=False) == [car]
    assert tokenizer.encode("Dining Table", eos=False) == [text.COCO_OFFSET + text.COCO_CLASSES.index("dining table")]
    assert tokenizer.decode(tokenizer.encode("carpet oscar")) == "carpet oscar"
    assert len(tokenizer.encode("side table", eos=False)) == 2


def test_any_ascii_text_has_no_unknown(tokenizer):
    sentence = "Sphinx of black quartz, judge my vow! 0123456789 (~@#$%^&*_+={}[]|;:'<>?/)"
    assert text.UNK_ID not in tokenizer.encode(sentence)
    assert text.UNK_ID in tokenizer.encode("a 漢 b")


def test_decode_stops_at_eos_and_drops_control(tokenizer):
    ids = [5, *tokenizer.encode("red couch", eos=False), 0, 3, *tokenizer.encode("tv", eos=False)]
    assert tokenizer.decode(ids) == "red couch"
    assert tokenizer.decode(ids, keep_control=True) == "[S_1] red couch [PAD] [EOS] tv"
    with pytest.raises(ValueError, match=f"id {VOCAB_SIZE} is outside 0..{VOCAB_SIZE - 1}"):
        tokenizer.decode([VOCAB_SIZE])


def test_training_is_deterministic_and_file_round_trips(tokenizer, tmp_path):
    again = text.train_wordpiece(captions(), VOCAB_SIZE, ("side table", "trash can"))
    tokenizer.save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    loaded = text.TextTokenizer.load(tmp_path / "a.json")
    for caption in captions()[:20]:
        assert loaded.encode(caption) == tokenizer.encode(caption)
    assert len(list(tmp_path.iterdir())) == 2


def test_pieces_by_hand():
    # "ab" 5 + "abc" 3: a##b 8, then ab##c 3; x##y and y##x tie and go by alphabet.
    counts = {"ab": 5, "abc": 3, "xy": 2, "yx": 2, "aaa": 1}
    assert text.learn_pieces(counts, 4) == ["ab", "abc", "xy", "yx"]
    assert text.learn_pieces(counts, 100) == ["ab", "abc", "xy", "yx", "##aa", "aaa"]


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="too small: the fixed tokens alone are"):
        text.train_wordpiece(["a"], 4284)
    with pytest.raises(ValueError, match=r"cannot be filled: the captions give only \d+ tokens"):
        text.train_wordpiece(["a red couch"], 6000)


def test_other_layouts_are_refused(tokenizer, tmp_path):
    path = tmp_path / "t.json"
    with pytest.raises(FileNotFoundError, match=r"t\.json"):
        text.TextTokenizer.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"t\.json is not the JSON of a text tokenizer"):
        text.TextTokenizer.load(path)
    path.write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"t\.json is not the JSON of a text tokenizer"):
        text.TextTokenizer.load(path)

    tokenizer.save(path)
    data = json.loads(path.read_text())

    def swapped(a: str, b: str) -> str:
        copy = json.loads(json.dumps(data))
        vocabulary = copy["model"]["vocab"]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        for entry in copy["added_tokens"]:
            entry["id"] = vocabulary[entry["content"]]
        copy["added_tokens"].sort(key=lambda entry: entry["id"])
        return json.dumps(copy)

    path.write_text(swapped("v0=3", "v1=3"))
    with pytest.raises(ValueError, match=r"t\.json: id 207 is 'v1=3', 4M's layout has 'v0=3' there"):
        text.TextTokenizer.load(path)

    broken = json.loads(json.dumps(data))
    broken["added_tokens"] = [entry for entry in broken["added_tokens"] if entry["content"] != "dining table"]
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="'dining table' is not read as the one token"):
        text.TextTokenizer.load(path)
