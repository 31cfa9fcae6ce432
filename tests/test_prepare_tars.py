from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_files import ALL, items, layout_a, npy, picture, png, reasons, tars, write, write_tar

from data_pipelines.prepare import patterns
from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.tar_index import index_tar, split_name

# ---- patterns


def test_patterns(tmp_path):
    assert patterns.expand_braces("a{08..10}b{x,y}") == ["a08bx", "a08by", "a09bx", "a09by", "a10bx", "a10by"]
    assert patterns.expand_braces("{a,b{1..2}}{3..1..2}") == ["a3", "a1", "b13", "b11", "b23", "b21"]
    assert patterns.shards("r/[rgb, tok_{a,b}@224]/s-{0..1}.tar") == [
        (f"r/\0/s-{i}.tar", {m: f"r/{m}/s-{i}.tar" for m in ("rgb", "tok_a@224", "tok_b@224")}) for i in (0, 1)
    ]
    write(tmp_path, {"rgb/b.tar": b"", "rgb/a.tar": b"", "cap/b.tar": b""})
    assert patterns.shards(f"{tmp_path}/[rgb,cap]/*.tar") == [
        (f"{tmp_path}/\0/a.tar", {"rgb": f"{tmp_path}/rgb/a.tar"}),
        (f"{tmp_path}/\0/b.tar", {"rgb": f"{tmp_path}/rgb/b.tar", "cap": f"{tmp_path}/cap/b.tar"}),
    ]
    for wrong in ("{a", "a}", "}{", "{a}", "{}", "[a", "a]", "][", "[a][b]", "[a,a]", "[a,../b]", "[]", "{0..9999999}"):
        with pytest.raises(ValueError, match="pattern"):
            patterns.shards(wrong)


PART = st.recursive(
    st.text("ab/.-", max_size=3).map(lambda t: (t, [t])),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(
            lambda parts: ("{" + ",".join(p for p, _ in parts) + "}", [t for _, texts in parts for t in texts])
        ),
        st.tuples(inner, inner).map(lambda two: (two[0][0] + two[1][0], [a + b for a in two[0][1] for b in two[1][1]])),
    ),
    max_leaves=6,
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(part=PART, first=st.integers(0, 120), count=st.integers(0, 30), width=st.integers(1, 5))
def test_braces_expand_to_what_they_were_made_from(part, first, count, width):
    pattern, texts = part
    numbers = [f"{n:0{width}d}" for n in range(first, first + count + 1)]
    padded = f"{{{numbers[0]}..{numbers[-1]}}}"
    expanded = patterns.expand_braces(pattern + padded)
    if (numbers[0].startswith("0") and width > 1) or len(numbers[0]) == len(numbers[-1]):
        assert expanded == [text + number for text in texts for number in numbers]
    assert len(expanded) == len(texts) * len(numbers)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(pattern=st.text("{}[],.0123a", max_size=12))
def test_any_pattern_expands_or_is_refused(pattern):
    try:
        found = patterns.shards(pattern)
    except ValueError as error:
        assert "pattern" in str(error)
    else:
        assert found and not any(set("{}[]") & set(path) for _, tars in found for path in tars.values())


# ---- tars


def test_one_tar_per_modality(tmp_path):
    layout_a(tmp_path)
    source = tars(tmp_path / ALL / "s-{0..1}.tar")
    assert source.keys == [f"k{k}" for k in range(6)] and source.problems == []
    item = source.read(4)
    np.testing.assert_array_equal(item.fields["rgb"], picture(4))
    # Rows of captions belong to rows of crops, so the empty one keeps its place.
    assert item.fields["caption"] == ["c4", ""] and item.notes == ("empty_captions: 1 of 2",)
    assert item.fields["tok_depth"].tolist() == [[4] * 9] * 2
    assert item.fields["crop_settings"].tolist() == [[0, 1, 4, 4, 0], [0, 0, 3, 3, 1]]
    assert item.fields["det"] == [{"boxes": [0, 0, 0.5, 1], "class_name": "cat", "score": 0.5}]
    assert source.describe() == tars(tmp_path / ALL / "*.tar").describe()
    some = tars(tmp_path / ALL / "s-{0..1}.tar", fields=["rgb"], names={"det": None})
    assert set(some.read(0).fields) == {"rgb"}
    assert set(tars(tmp_path / "[rgb,det]/s-0.tar", names={"det": "boxes"}).read(0).fields) == {"rgb", "boxes"}
    with pytest.raises(ValueError, match="no tar has the required field 'rgb'; there are \\['det'\\]"):
        tars(tmp_path / "[det]/s-0.tar")
    with pytest.raises(FileNotFoundError, match=r"none of these tars exists \(.*s-7.tar and 1 more\)"):
        tars(tmp_path / "[rgb,det]/s-7.tar")


def test_keys_that_differ_between_tars_are_joined(tmp_path):
    """The reference pairs members one by one and drops the rest of a shard at the first difference."""
    write_tar(tmp_path / "rgb/s-0.tar", {f"k{k}.png": png(k) for k in (0, 1, 3, 4)})
    write_tar(tmp_path / "caption/s-0.tar", {f"k{k}.txt": f"c{k}" for k in (4, 2, 1)} | {"k9.txt": "later"})
    write_tar(tmp_path / "rgb/s-1.tar", {"k9.png": png(9)})
    source = tars(tmp_path / "[rgb,caption]/s-{0..1}.tar")
    assert source.keys == ["k0", "k1", "k3", "k4", "k9"]
    found = items(source)
    assert {k: i.fields.get("caption") for k, i in found.items()} == {
        "k0": None,
        "k1": ["c1"],
        "k3": None,
        "k4": ["c4"],
        "k9": ["later"],
    }
    assert found["k3"].failures["caption"].reason == "caption_missing"
    rgb, caption = f"{tmp_path}/rgb/s-0.tar", f"{tmp_path}/caption/s-1.tar"
    assert reasons(source) == {"k2": "field_missing", caption: "missing_file", f"{rgb} caption": "field_missing"}
    assert any("2 of its 4 samples have no caption (the first is 'k0')" in p.sentence for p in source.problems)


def test_keys_that_start_again_in_every_shard(tmp_path):
    for s in (0, 1):
        write_tar(tmp_path / f"rgb/s-{s}.tar", {"0.png": png(s), "1.png": png(2 + s)})
        write_tar(tmp_path / f"caption/s-{s}.tar", {"1.txt": f"one {s}", "0.txt": f"zero {s}"})
    source = tars(tmp_path / "[rgb,caption]/s-{0..1}.tar")
    assert source.keys == ["s-0/0", "s-0/1", "s-1/0", "s-1/1"]
    assert [source.read(i).fields["caption"] for i in range(4)] == [["zero 0"], ["one 0"], ["zero 1"], ["one 1"]]
    np.testing.assert_array_equal(source.read(3).fields["rgb"], picture(3))


def test_joint_tars(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {
            "d/x.rgb.png": png(1),
            "d/x.caption.txt": "one",
            "d/x.tok_depth.npy": npy(np.arange(4)),
            "d/y.jpg": png(2),
            "d/y.txt": "two",
            "d/y.json": '{"width": 6}',
            "d/z.jpg": png(3),
            "d/z.pkl": b"cos\nsystem\n(S'false'\ntR.",
        },
    )
    source = tars(tmp_path / "a.tar")
    assert source.keys == ["d/x", "d/y", "d/z"]
    x, y, z = items(source).values()
    assert x.fields["caption"] == ["one"] and x.fields["tok_depth"].tolist() == [0, 1, 2, 3]
    assert y.fields["caption"] == ["two"] and y.fields["json"] == {"width": 6}
    assert z.failures["pkl"].reason == "unsupported_member" and z.failures["caption"].reason == "caption_missing"
    # Without any .txt the .json holds the captions.
    write_tar(tmp_path / "b.tar", {"x.jpg": png(1), "x.json": '{"caption": "three", "width": 6}'})
    assert tars(tmp_path / "b.tar").read(0).fields["caption"] == ["three"]
    assert split_name("a.b/c.v1.json.gz", joint=False) == ("a.b/c.v1", "", ".json.gz")
    assert split_name("a.b/c.tok_x@224.NPY", joint=True) == ("a.b/c", "tok_x@224", ".npy")


def test_tars_with_strange_members(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, data: bytes = b"", **attributes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(data))

        add("dir", type=tarfile.DIRTYPE)
        add("./dir/a.png", png(1))
        add("/etc/b.png", png(2))
        add("../../c.png", png(3))
        add("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.png", type=tarfile.LNKTYPE, linkname="dir/a.png")
        add("null.png", type=tarfile.CHRTYPE)
        add("dir/._a.png", b"\0\5\x16\7")
        add("d" * 200 + ".png", png(4))
        add("b\udce4r.png", png(5))
        add("e.png", b"")
        add("f.png", png(6))
        add("f.png", png(7))
        add("F.png", png(8))
    source = tars(path)
    long = "d" * 200
    assert source.keys == ["dir/a", "etc/b", "c", long, "b\\xe4r", "e", "f", "F"]
    found = items(source)
    assert found["e"].reason == "zero_bytes"
    for key, seed in {"dir/a": 1, "etc/b": 2, "c": 3, long: 4, "b\\xe4r": 5, "f": 7, "F": 8}.items():
        np.testing.assert_array_equal(found[key].fields["rgb"], picture(seed))
    assert reasons(source) == {
        "link.png": "not_a_file",
        "hard.png": "not_a_file",
        "null.png": "not_a_file",
        "dir/._a.png": "hidden",
        "f": "duplicate_key",
    }
    assert os.listdir(tmp_path) == ["a.tar"]
    json.dumps([source.keys, source.problems]).encode()


def test_damaged_tars_cost_what_is_damaged(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", {f"k{k}.png": png(k) for k in range(5)}).read_bytes()
    third = 1024 * 3  # header and data of three members
    for name, data, keys, reason in (
        ("cut in data", whole[: third + 600], ["k0", "k1", "k2", "k3"], "truncated"),
        ("cut in header", whole[: third + 100], ["k0", "k1", "k2"], "truncated"),
        ("cut between", whole[:third], ["k0", "k1", "k2"], "truncated"),
        ("damaged header", whole[:third] + b"x" * 512 + whole[third + 512 :], ["k0", "k1", "k2"], "corrupt"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        source = tars(path)
        assert source.keys == keys, name
        assert [(p.key, p.reason) for p in source.problems] == [(str(path), reason)], name
        found = items(source)
        assert all(not isinstance(found[k], Unusable) for k in keys[:3])
        assert "k3" not in found or found["k3"].reason == "truncated"
    write(tmp_path, {"empty.tar": b"", "text.tar": b"hello" * 200, "z.tar": b"\x1f\x8b" + bytes(600)})
    for name, reason in (("empty", "truncated"), ("text", "corrupt"), ("z", "compressed_tar"), ("no", "missing_file")):
        members, (problem,) = index_tar(str(tmp_path / f"{name}.tar"), name)
        assert members == [] and problem.reason == reason
    assert index_tar(str(tmp_path / "whole.tar"), "whole")[1] == []
    with pytest.raises(ValueError, match=r"has no samples.*compressed with gzip"):
        tars(tmp_path / "z.tar")
    (tmp_path / "whole.tar").write_bytes(whole)
    source = tars(tmp_path / "{whole,empty,text}.tar")
    assert len(source.keys) == 5 and len(source.problems) == 2


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 3071), st.integers(0, 255)), max_size=5),
    cut=st.none() | st.integers(0, 10240),
)
def test_any_damage_to_a_tar_is_survived(tmp_path_factory, flips, cut):
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    data = bytearray(write_tar(path, {f"k{k}.png": png(k) for k in range(3)}).read_bytes())
    for at, value in flips:
        data[at] = value
    path.write_bytes(bytes(data[:cut]))
    members, problems = index_tar(str(path), "fuzzed")
    assert len(members) == 3 or problems
    try:
        source = tars(path)
    except ValueError as error:
        assert "has no samples" in str(error) or "required field" in str(error)
    else:
        items(source)


def test_failures_of_one_field_leave_the_others(tmp_path):
    layout_a(tmp_path, shards=1)
    write_tar(tmp_path / "caption/s-0.tar", {"k0.json": "{", "k1.txt": b"B\xe4r", "k2.json": '["a", "b"]'})
    write_tar(tmp_path / "tok_depth/s-0.tar", {f"k{k}.npy": npy(np.zeros((k, 9), np.int16)) for k in (1, 2)})
    found = items(tars(tmp_path / ALL / "s-0.tar"))
    failed = {key: {f: e.reason for f, e in item.failures.items()} for key, item in found.items()}
    assert failed == {
        "k0": {"caption": "caption_shape", "tok_depth": "field_missing"},
        "k1": {"caption": "caption_encoding", "tok_depth": "array"},
        "k2": {},
    }
    needed = items(tars(tmp_path / ALL / "s-0.tar", required=["rgb", "tok_depth"]))
    assert list(needed) == ["k1", "k2"] and needed["k1"].reason == "array"
