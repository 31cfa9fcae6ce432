"""What is written appears as a whole; a failure leaves what was there."""

from __future__ import annotations

import pytest

from fm4m import exit_codes, files, stored_step, train
from fm4m.files import complete_file, complete_folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "made" / "x.json"
    for text in ("one", "two"):
        with complete_file(path) as beside:
            beside.write_text(text)
            assert beside.suffix == ".json" and (not path.exists() or path.read_text() == "one")
        assert path.read_text() == text and names(path.parent) == ["x.json"]


def test_a_failed_file_leaves_the_old_one(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), complete_file(tmp_path / "x") as beside:
        beside.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_a_folder_takes_the_place_of_nothing_or_of_an_empty_one(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with complete_folder(tmp_path / name) as beside:
            (beside / "a").write_text("")
            assert not (tmp_path / name / "a").exists()
        assert names(tmp_path / name) == ["a"]
    with pytest.raises(FileExistsError, match="new exists already"), complete_folder(tmp_path / "new"):
        pass
    assert names(tmp_path) == ["empty", "new"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), complete_folder(tmp_path / "x") as beside:
        (beside / "a").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def test_errors_of_object_stores_are_told_from_those_of_their_data():
    def error(name, module="tensorflow.python.framework.errors_impl"):
        return type(name, (Exception,), {"__module__": module})("the store said no")

    assert files.of_object_store(error("UnavailableError")) and files.of_object_store(error("HttpError", "gcsfs.retry"))
    assert not files.of_object_store(error("DataLossError")) and not files.of_object_store(error("Error", "zipfile"))
    # A checkpoint is then tried again, and not taken for damaged.
    assert stored_step.about_storage(error("UnavailableError"))
    assert not stored_step.about_storage(error("DataLossError"))


def test_what_cannot_be_written_is_named_with_the_cure():
    message = r"m\.jsonl cannot be written: No space left.*same command then"
    with pytest.raises(files.StorageError, match=message), files.writing("m.jsonl"):
        raise OSError(28, "No space left on device")
    assert train.EXIT_CODES[files.StorageError] == exit_codes.FAILED
