from __future__ import annotations

import csv
import gzip
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.prepare import arrays, captions
from data_pipelines.prepare.errors import Unusable


def unusable(function, *args, **options) -> Unusable:
    with pytest.raises(Unusable) as caught:
        function(*args, **options)
    return caught.value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_marks(encoding):
    rows, notes = captions.parse_text("  Ein Bär, 一只熊 🐻\n".encode(encoding), "a.txt")
    assert rows == ["Ein Bär, 一只熊 🐻"]
    assert (notes == ()) == (encoding == "utf-8")
    if notes:
        assert notes[0].startswith("encoding: utf-")


def test_wrong_encodings_name_the_byte():
    latin = "Ein Bär".encode("latin-1")
    error = unusable(captions.parse_text, latin, "a.txt")
    assert error.reason == "caption_encoding" and "byte 5 (0xe4) is not UTF-8" in str(error)
    rows, notes = captions.parse_text(latin, "a.txt", fallback="cp1252")
    assert rows == ["Ein Bär"] and notes == ("encoding: cp1252, as the bytes are not UTF-8",)
    # 0x81 is no character of cp1252; latin-1 takes every byte.
    error = unusable(captions.parse_text, b"a\x81b", "a.txt", fallback="cp1252")
    assert "byte 1 is not UTF-8, and byte 1 is not cp1252" in str(error)
    assert captions.parse_text(b"a\x81b", "a.txt", fallback="latin-1")[0] == ["a\x81b"]
    error = unusable(captions.parse_text, "a bear".encode("utf-16-le"), "a.txt", fallback="latin-1")
    assert error.reason == "caption_encoding" and "byte 1 is zero" in str(error)
    # The mark promises UTF-16, so a fallback would read nonsense.
    error = unusable(captions.parse_text, b"\xff\xfea\0\0\xd8", "a.txt", fallback="latin-1")
    assert "byte 4" in str(error) and "UTF-16-LE" in str(error)
    with pytest.raises(ValueError, match="expected one of"):
        captions.check_fallback("utf-7")


def test_empty_and_several():
    assert unusable(captions.parse_text, b" \r\n\t", "a.txt").reason == "caption_empty"
    assert unusable(captions.parse_text, b"", "a.txt", lines="each").reason == "caption_empty"
    assert unusable(captions.parse_text, b"\xef\xbb\xbf", "a.txt").reason == "caption_empty"
    assert unusable(captions.parse_json, b"[]", "a.json").reason == "caption_empty"
    assert captions.parse_text(b"one\r\n\r\ntwo\n", "a.txt", lines="each") == (
        ["one", "two"],
        ("empty_captions: 1 of 3",),
    )
    assert captions.parse_json(b'["one", "", "two"]', "a.json", aligned=True)[0] == ["one", "", "two"]
    assert captions.parse_text(b"one two\nthree", "a.txt")[0] == ["one two\nthree"]


@pytest.mark.parametrize(
    "value", ["x", ["x"], {"caption": "x"}, {"caption": ["x"]}, [{"caption": "x"}], {"captions": "x"}]
)
def test_shapes_of_json(value):
    data = json.dumps(value).encode()
    assert captions.parse_json(data, "a.json") == captions.parse_json(gzip.compress(data), "a.json.gz") == (["x"], ())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"3", "a number"),
        (b"null", "null"),
        (b"true", "a truth value"),
        (b'{"text": "x"}', "an object with the fields ['text']"),
        (b'["x", 3]', "in row 1 a number"),
        (b'[{"text": "x"}]', "in row 0 an object"),
        (b'[["x"]]', "in row 0 a list of 1"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (gzip.compress(b'"x"', mtime=0)[:-9], "damaged"),
    ],
)
def test_unexpected_json(data, found):
    error = unusable(captions.parse_json, data, "a.json")
    assert error.reason == "caption_shape" and found in str(error)
    assert captions.parse_text(b"A cat.\nUne chatte.\n", "a.txt", lines="first") == (["A cat."], ())
    with pytest.raises(ValueError, match="'last' must be one of 'whole', 'each', 'first'"):
        captions.check_lines("last")


def test_json_that_no_file_can_hold(monkeypatch):
    assert unusable(captions.parse_json, rb'"\ud800"', "a.json").reason == "caption_encoding"
    monkeypatch.setattr(captions, "MAX_JSON_BYTES", 1000)
    error = unusable(captions.parse_json, gzip.compress(b'"' + b"x" * 5000 + b'"'), "a.json.gz")
    assert "more than 1000 bytes" in str(error)


def table(text: str | bytes, **options) -> captions.Table:
    data = text if isinstance(text, bytes) else text.encode()
    return captions.parse_csv(data, "c.csv", key_column="image", caption_column="caption", **options)


def test_csv():
    found = table(
        "id,image,caption\r\n"
        '1,a.jpg,"He said ""no"", twice"\r\n'
        '2,b.jpg,"two\r\nlines"\r\n'
        "3,a.jpg,again\r\n"
        "4,a.jpg,again\r\n"
        "\r\n"
        "5,c.jpg,one, two\r\n"
        "6,,nobody\r\n"
        "7,d.jpg, \r\n"
        "8,e.jpg,the end"
    )
    assert found.rows == {
        "a.jpg": ['He said "no", twice', "again"],
        "b.jpg": ["two\r\nlines"],
        "e.jpg": ["the end"],
    }
    assert {key: error.reason for key, error in found.failed.items()} == {"d.jpg": "caption_empty"}
    assert [(p.key, p.reason) for p in found.problems] == [("c.csv, line 8", "csv_row"), ("c.csv, line 9", "csv_row")]
    assert found.notes["a.jpg"] == ("duplicate_rows",)


def test_csv_goes_on_after_damage():
    found = table('image,caption\na,"never closed\nb,two\nc,"three"\nd,"4" four\ne,five\n')
    assert found.rows == {"b": ["two"], "c": ["three"], "e": ["five"]}
    assert [(p.key, p.reason) for p in found.problems] == [("c.csv, line 2", "csv_row"), ("c.csv, line 5", "csv_row")]
    # A quote that is never closed, with nothing after it that looks wrong, up to csv's limit on a cell.
    found = table('image,caption\na,"open\n' + "".join(f"k{i},row {i}\n" for i in range(30_000)))
    assert len(found.rows) == 30_000 and len(found.problems) == 1


def test_csv_encodings():
    mixed = b"image,caption\na,B\xe4r\nb,caf\xc3\xa9\n"
    found = table(mixed)
    assert found.rows == {"b": ["café"]} and found.failed["a"].reason == "caption_encoding"
    assert "c.csv, line 2: byte 1" in str(found.failed["a"])
    assert table(mixed, fallback="cp1252").rows == {"a": ["Bär"], "b": ["café"]}
    for encoding in ("utf-8-sig", "utf-16"):
        assert table("image,caption\na,é\n".encode(encoding)).rows == {"a": ["é"]}
    assert table("image\tcaption\ra\tone, two\r", delimiter="\t").rows == {"a": ["one, two"]}
    with pytest.raises(ValueError, match="0 columns named 'image'; its columns are \\['file', 'caption'\\]"):
        table("file,caption\na,b\n")
    with pytest.raises(ValueError, match="is empty"):
        table("")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(TEXT.filter(str.strip), TEXT), max_size=8))
def test_csv_reads_what_csv_writes(rows):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["image", "caption"])
    writer.writerows(rows)
    found = table(buffer.getvalue())
    wanted: dict[str, list[str]] = {}
    for key, text in rows:
        texts = wanted.setdefault(key.strip(), [])
        text = text.strip().strip("\ufeff").strip()
        if text and text != "\ufffd" and text not in texts:
            texts.append(text)
    if not any("\ufffd" in text or "\ufeff" in key for key, text in rows):
        assert found.rows == {key: texts for key, texts in wanted.items() if texts}
        assert set(found.rows) | set(found.failed) == set(wanted)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), lines=st.booleans(), fallback=st.sampled_from([None, "cp1252", "latin-1"]))
def test_any_bytes_are_captions_or_unusable(data, lines, fallback):
    for parse, options in ((captions.parse_text, {"lines": lines}), (captions.parse_json, {})):
        for form in (data, json.dumps(data.decode("latin-1")).encode(), gzip.compress(data)[: len(data)]):
            try:
                rows, _ = parse(form, "a", fallback=fallback, **options)
            except Unusable as error:
                assert error.sentence.startswith("a: ")
            else:
                assert rows and all(isinstance(row, str) and row == row.strip() and row.encode() for row in rows)
    found = table(b"image,caption\n" + data, fallback=fallback)
    assert all(key and texts and all(texts) for key, texts in found.rows.items())


# ---- other members


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_arrays():
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    np.testing.assert_array_equal(arrays.decode_npy(npy(array), "a.npy"), array)
    objects = npy(np.array([{"a": 1}], object), allow_pickle=True)
    assert "Python objects" in str(unusable(arrays.decode_npy, objects, "a.npy"))
    huge = npy(array).replace(b"(2, 3)", b"(2000000000000, 3)")[: len(npy(array))]
    assert unusable(arrays.decode_npy, huge, "a.npy").reason == "truncated"
    assert unusable(arrays.decode_npy, npy(array)[:-1], "a.npy").reason == "truncated"
    assert unusable(arrays.decode_npy, b"", "a.npy").reason == "array"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, emb=array, mask_valid=array > 1)
    found = arrays.decode_npz(buffer.getvalue(), "a.npz")
    assert sorted(found) == ["emb", "mask_valid"] and (found["emb"] == array).all()
    assert unusable(arrays.decode_npz, buffer.getvalue()[:50], "a.npz").reason == "array"


@settings(derandomize=True, max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 255)), max_size=4), cut=st.integers(0, 140))
def test_damaged_arrays_load_or_are_unusable(flips, cut):
    data = bytearray(npy(np.arange(6, dtype=np.int16)))
    for at, value in flips:
        if at < len(data):
            data[at] = value
    for form in (bytes(data), bytes(data[:cut])):
        try:
            assert isinstance(arrays.decode_npy(form, "a"), np.ndarray)
        except Unusable as error:
            assert error.sentence.startswith("a: ")


def test_fields_by_name_and_extension():
    crops = np.array([[0, 0, 4, 4, 0], [1, 1, 3, 3, 1]], np.int32)
    assert arrays.decode_field("crop_settings", ".npy", npy(crops), "a")[0].dtype == np.int64
    for bad in (crops[:, :4], crops.astype(float), -crops, crops[:0]):
        assert unusable(arrays.decode_field, "crop_settings", ".npy", npy(bad), "a").reason == "array"
    assert unusable(arrays.decode_field, "crop_settings", ".json", b"[1]", "a").reason == "array"
    assert unusable(arrays.decode_field, "tok_rgb", ".npy", npy(np.zeros(3)), "a").reason == "array"
    assert arrays.decode_field("tok_rgb", ".npy", npy(crops), "a")[0].shape == (2, 5)
    assert unusable(arrays.decode_field, "x", ".pkl", b"cos\nsystem\n", "a").reason == "unsupported_member"
    depth, _ = arrays.decode_field("depth", ".npy", npy(np.array([[1500]], np.uint16)), "a")
    assert depth.dtype == np.float32 and depth.tolist() == [[1.5]]
    assert unusable(arrays.decode_field, "depth", ".npy", npy(np.zeros((2, 2, 3))), "a").reason == "array"
    assert arrays.decode_field("metadata", ".json", b'{"a": 1}', "a")[0] == {"a": 1}
    assert unusable(arrays.decode_field, "metadata", ".json", b"{", "a").reason == "json"


def test_detections():
    box = {"boxes": [0.1, 0.2, 0.5, 1.0005], "class_name": "cat", "score": 0.7}
    found, _ = arrays.decode_field("det", ".json", json.dumps({"instances": [box]}).encode(), "a")
    assert found == [{"boxes": [0.1, 0.2, 0.5, 1.0], "class_name": "cat", "score": 0.7}]
    assert arrays.detections([], "a") == []
    wrong = [
        {"instances": 3},
        [3],
        [box | {"boxes": [0, 0, 1]}],
        [box | {"boxes": [0, 0, 640, 480]}],
        [box | {"boxes": [0.5, 0, 0.1, 1]}],
        [box | {"boxes": [0, 0, float("nan"), 1]}],
        [box | {"class_name": ""}],
        [box | {"score": "high"}],
    ]
    for value in wrong:
        assert unusable(arrays.detections, value, "a").reason == "detections"
