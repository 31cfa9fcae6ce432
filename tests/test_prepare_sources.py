from __future__ import annotations

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from prepare_files import ALL, folder, items, layout_a, picture, png, reasons, tars, write

from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.sources import Source, note_word, open_source

# ---- folder


def test_folder_with_captions_beside(tmp_path):
    write(
        tmp_path,
        {
            "b.png": png(1),
            "b.txt": "a bear",
            "a/c.JPG": png(2),
            "a/c.json": '["one", "two"]',
            "a/d.png": png(3),
            "e.png": png(4),
            "E.TXT": "an eagle",
            "f.png": png(5),
            "f.txt": b"B\xe4r",
            "g.png": png(6)[:60],
            "g.txt": "gone",
            "h.png": b"",
            "i": png(7),
            "i.png.txt": "nobody",
            "j.png": png(8),
            "j.png.txt": "jam",
            "j.json": '"jelly"',
            "k.txt": "a caption alone",
            "notes.md": "hello",
            "more.md": "hello",
            ".hidden/x.png": png(9),
            ".DS_Store": b"\0",
        },
    )
    source = folder(tmp_path)
    assert isinstance(source, Source)
    assert source.keys == ["a/c", "a/d", "b", "e", "f", "g", "h", "i", "j"]
    found = items(source)
    captions = {key: item.fields.get("caption") for key, item in found.items() if not isinstance(item, Unusable)}
    assert captions == {
        "a/c": ["one", "two"],
        "a/d": None,
        "b": ["a bear"],
        "e": ["an eagle"],
        "f": None,
        "i": None,
        "j": ["jelly"],
    }
    assert found["a/d"].failures["caption"].reason == found["i"].failures["caption"].reason == "caption_missing"
    assert found["f"].failures["caption"].reason == "caption_encoding"
    assert (found["g"].reason, found["h"].reason) == ("truncated", "zero_bytes")
    np.testing.assert_array_equal(found["a/c"].fields["rgb"], picture(2))
    assert [note_word(n) for n in found["a/c"].notes] == ["wrong_extension"]
    assert found["e"].notes == ("caption_case: E.TXT",) and found["j"].notes == ("other_captions: j.png.txt",)
    assert reasons(source) == {
        "k.txt": "orphan",
        "i.png.txt": "orphan",
        ".hidden": "hidden",
        ".DS_Store": "hidden",
        "more.md": "not_an_image",
    }
    assert any("and 1 more ending in .md" in p.sentence for p in source.problems)
    described = source.describe()
    assert json.loads(json.dumps(described)) == described == folder(tmp_path).describe()
    (tmp_path / "b.txt").write_text("a bear!")
    assert described != folder(tmp_path).describe()
    assert folder(tmp_path, encoding_fallback="cp1252").read(4).fields["caption"] == ["Bär"]
    assert folder(tmp_path, captions=None).read(0).failures == {}
    os.remove(tmp_path / "b.png")
    with pytest.raises(Unusable, match=r"b\.png: cannot be read"):
        source.read(2)


def test_names_that_collide_and_names_that_are_not_utf8(tmp_path):
    write(tmp_path, {"cat.png": png(1), "cat.jpg": png(2), "cat.txt": "both", "Dog.png": png(3), "dog.png": png(4)})
    raw = os.fsencode(tmp_path) + b"/b\xe4r"
    with open(raw + b".png", "wb") as file:
        file.write(png(5))
    with open(raw + b".txt", "w") as file:
        file.write("a bear")
    source = folder(tmp_path)
    assert source.keys == ["Dog", "b\\xe4r", "cat.jpg", "cat.png", "dog"]
    found = items(source)
    assert found["b\\xe4r"].fields["caption"] == ["a bear"]
    assert found["cat.jpg"].fields["caption"] == found["cat.png"].fields["caption"] == ["both"]
    assert found["Dog"].notes == ("case_duplicate: dog",) and found["dog"].notes == ("case_duplicate: Dog",)
    json.dumps([source.keys, source.problems, source.describe()]).encode()


def test_links_loops_and_devices(tmp_path):
    root = write(tmp_path / "set", {"b/x.png": png(1), "y.png": png(2)})
    elsewhere = write(tmp_path / "elsewhere", {"z.png": png(3)})
    (root / "a_link").symlink_to(root / "b")
    (root / "b" / "up").symlink_to("..")
    (root / "c").symlink_to(elsewhere)
    (root / "w.png").symlink_to(root / "y.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "self.png").symlink_to("self.png")
    os.mkfifo(root / "pipe.png")
    source = folder(root)
    assert source.keys == ["b/x", "c/z", "w", "y"]
    assert reasons(source) == {
        "a_link": "duplicate_folder",
        "b/up": "symlink_loop",
        "gone.png": "dangling_link",
        "self.png": "symlink_loop",
        "pipe.png": "not_a_file",
    }


def test_folder_with_a_table(tmp_path):
    write(
        tmp_path,
        {
            "a.png": png(1),
            "sub/b.png": png(2),
            "sub/c.png": png(3),
            "D.png": png(4),
            "e.png": png(5),
            "e.txt": "beside",
            "cafe\u0301.png": png(6),
            "captions.csv": "image,caption\na.png,one\na.png,two\nsub/b,stem\nc.png,name\nd.PNG,case\n"
            "caf\u00e9.png,accent\nzzz.png,nobody\n.\\sub\\b.png,windows\n",
        },
    )
    source = folder(tmp_path, captions="captions.csv")
    found = {key: item.fields.get("caption") for key, item in items(source).items()}
    assert found == {
        "D": ["case"],
        "a": ["one", "two"],
        "cafe\u0301": ["accent"],
        "e": None,
        "sub/b": ["stem", "windows"],
        "sub/c": ["name"],
    }
    assert reasons(source) == {"captions.csv: zzz.png": "orphan", "e.txt": "not_an_image"}
    assert source.read(source.keys.index("e")).failures["caption"].reason == "caption_missing"
    with pytest.raises(FileNotFoundError, match="no such table"):
        folder(tmp_path, captions="other.csv")


def test_wrong_configurations(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'folder'"):
        open_source({"kind": "foldr"})
    with pytest.raises(ValueError, match=r"no option 'caption' \(did you mean 'captions'"):
        folder(tmp_path, caption="x")
    with pytest.raises(ValueError, match="needs the option 'path'"):
        open_source({"kind": "tars"})
    with pytest.raises(FileNotFoundError, match="no folder"):
        folder(tmp_path / "nowhere")
    write(tmp_path, {"readme.md": "x"})
    with pytest.raises(ValueError, match=r"has no samples. readme.md: not a picture"):
        folder(tmp_path)


# ---- all kinds


def _read_all(source: Source) -> list[int]:
    return [int(source.read(i).fields["rgb"].sum()) for i in range(len(source.keys))]


def test_sources_work_in_other_processes(tmp_path):
    layout_a(tmp_path / "t")
    write(tmp_path / "f", {"a.png": png(1), "b.png": png(2)})
    for source in (tars(tmp_path / "t" / ALL / "s-{0..1}.tar"), folder(tmp_path / "f"), open_source({"kind": "rooms"})):
        source.keys = source.keys[:5]
        here = _read_all(source)
        assert _read_all(pickle.loads(pickle.dumps(source))) == here
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(_read_all, [source] * 2) == [here] * 2


# ---- rooms


def test_rooms(tmp_path):
    source = open_source({"kind": "rooms"})
    item = source.read(3)
    assert item.key == "rooms_train/000003" and len(source.keys) == source.describe()["samples"] > 100
    assert set(item.fields) == {"rgb", "depth", "normal", "semseg", "det", "caption"} and not item.failures
    assert item.fields["depth"].dtype == np.float32 and 0.1 < np.median(item.fields["depth"]) < 20
    assert item.fields["caption"][0] and item.fields["det"][0].keys() == {"boxes", "class_name", "score"}
    write(tmp_path, {"broken.zip": b"PK\3\4" + bytes(100)})
    with pytest.raises(ValueError, match=r"has no samples.*broken.zip: not a zip file"):
        open_source({"kind": "rooms", "path": str(tmp_path / "*.zip")})
