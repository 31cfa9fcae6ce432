from __future__ import annotations

import json
import os
import pathlib

import numpy as np
import pytest
from token_sets import ALL, EXTRA, GRID, PIXELS, TEXT, arrays, keys, write_set

from data_pipelines import manifest as manifest_lib
from data_pipelines import records
from fm4m.errors import DataError
from fm4m.modalities import Modality

N = 20


@pytest.fixture
def root(tmp_path):
    write_set(tmp_path, "train", N)
    return tmp_path


def edit_manifest(root, change):
    path = root / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["modalities"])
    path.write_text(json.dumps(manifest))


def files(root, name):
    return sorted((root / "train" / name).iterdir())


def snapshot(root):
    return {p: p.read_bytes() for p in sorted(pathlib.Path(root).rglob("*.arrayrecord"))}


def test_reads_back_what_was_written_for_every_kind(root):
    for modality in ALL:
        opened = records.Records(root, "train", modality)
        assert len(opened) == N
        for i, array in enumerate(arrays(modality, N)):
            np.testing.assert_array_equal(opened[i], array)
            assert opened[i].dtype == manifest_lib.dtype_of(modality)
    assert records.verify(root, "train") == {m.name: N for m in ALL}
    with pytest.raises(IndexError, match="sample 20 of 20"):
        records.Records(root, "train", GRID)[N]


def test_layout_of_the_folder(root):
    assert [p.name for p in files(root, "t_grid")] == [f"data-0000{i}-of-00003.arrayrecord" for i in range(3)]
    entry = manifest_lib.read_manifest(root, "train")["modalities"]["t_grid"]
    assert [f["records"] for f in entry["files"]] == [6, 7, 7]
    assert sorted(p.name for p in (root / "train").iterdir()) == ["manifest.json", *sorted(m.name for m in ALL)]


def test_adding_a_modality_does_not_touch_the_others(root):
    before = snapshot(root)
    records.write_modality(root, "train", EXTRA, arrays(EXTRA, N), keys(N), made_from={"tool": "x"})
    after = snapshot(root)
    assert {p: after[p] for p in before} == before
    assert len(after) == len(before) + 3, "the number of files follows the modalities that are there"
    assert manifest_lib.read_manifest(root, "train")["modalities"]["t_extra"]["made_from"] == {"tool": "x"}


def test_keys_must_be_those_of_the_set(root):
    swapped = keys(N)
    swapped[8], swapped[9] = swapped[9], swapped[8]
    with pytest.raises(ValueError, match=r"'t_extra' is not aligned with 't_grid': file 1 of 3 .* overwrite=True"):
        records.write_modality(root, "train", EXTRA, arrays(EXTRA, N), swapped)
    with pytest.raises(ValueError, match="not aligned"):
        records.write_modality(root, "train", EXTRA, arrays(EXTRA, N - 1), keys(N - 1))
    assert not (root / "train" / "t_extra").exists()


def test_refuses_to_overwrite_unless_told(root):
    with pytest.raises(ValueError, match=r"has modality 't_text' already; pass overwrite=True"):
        records.write_modality(root, "train", TEXT, arrays(TEXT, N, 1), keys(N))
    records.write_modality(root, "train", TEXT, arrays(TEXT, N, 1), keys(N), overwrite=True)
    np.testing.assert_array_equal(records.Records(root, "train", TEXT)[3], arrays(TEXT, N, 1)[3])
    records.verify(root, "train")


@pytest.mark.parametrize(
    ("modality", "bad", "message"),
    [
        (GRID, np.full(6, 4096), r"sample 2 \(key 'k2'\) has token 4096, outside the vocabulary 0..4095"),
        (GRID, np.array([0, 1, 2, 3, 4, -1]), "has token -1, outside"),
        (GRID, np.zeros(5, int), r"has 5 tokens, exactly 6 \(grid \(2, 3\)\) or none"),
        (GRID, np.zeros(6), "has dtype float64, expected uint16"),
        (GRID, np.zeros((2, 3), int), r"has shape \(2, 3\), expected \(6,\)"),
        (TEXT, np.zeros(9, int), "has 9 tokens, at most 8"),
        (PIXELS, np.zeros((8, 8, 3), np.uint8), r"has shape \(8, 8, 3\), expected \(8, 12, 3\)"),
        (PIXELS, np.zeros((4, 12, 3), np.uint8), "has 4 rows, exactly 8"),
        (PIXELS, np.zeros((8, 12, 3), np.int32), "has dtype int32, expected uint8"),
    ],
)
def test_writing_checks_every_array(tmp_path, modality, bad, message):
    samples = arrays(modality, 3)
    samples[2] = bad
    with pytest.raises(ValueError, match=message):
        records.write_modality(tmp_path, "train", modality, samples, keys(3))
    assert list((tmp_path / "train").iterdir()) == [], "nothing is left over"


@pytest.mark.parametrize(
    ("count", "message"), [(4, "only 4 samples for 5 keys"), (6, "more than 5 samples for 5 keys")]
)
def test_samples_and_keys_must_be_as_many(tmp_path, count, message):
    with pytest.raises(ValueError, match=message):
        records.write_modality(tmp_path, "train", GRID, iter(arrays(GRID, count)), keys(5))


def test_derive_computes_from_the_set(root):
    records.derive_modality(root, "train", EXTRA, lambda grid: grid[:4] % 16, reads=["t_grid"])
    for i in range(N):
        np.testing.assert_array_equal(records.Records(root, "train", EXTRA)[i], arrays(GRID, N)[i][:4] % 16)
    with pytest.raises(ValueError, match="Did you mean 't_text'"):
        records.derive_modality(root, "train", EXTRA, len, reads=["t_txt"], overwrite=True)


def test_truncated_file_is_an_error_on_opening(root):
    path = files(root, "t_grid")[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"t_grid/data-00001-of-00003.arrayrecord has 130972 bytes, .* 131072 .*write"):
        records.Records(root, "train", GRID)


def test_missing_and_foreign_files_are_errors_on_opening(root):
    path = files(root, "t_grid")[1]
    stranger = path.with_name("data-00003-of-00004.arrayrecord")
    stranger.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=f"{stranger} is not in the manifest"):
        records.Records(root, "train", GRID)
    stranger.unlink()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing: copy .* or write modality 't_grid' again"):
        records.Records(root, "train", GRID)


def test_wrong_record_count_is_an_error_on_opening(root):
    def change(entries):
        entries["t_grid"]["files"][2]["records"] = 8

    edit_manifest(root, change)
    with pytest.raises(ValueError, match="00002-of-00003.arrayrecord has 7 records, the manifest says 8"):
        records.Records(root, "train", GRID)


def test_verify_finds_changed_contents_and_leftovers(root):
    path = files(root, "t_grid")[0]
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="t_grid/data-00000-of-00003.arrayrecord: its contents have changed"):
        records.verify(root, "train")
    (root / "train" / ".t_extra.writing").mkdir()
    with pytest.raises(ValueError, match=r"\.t_extra\.writing is not in the manifest: delete it"):
        records.verify(root, "train")


def test_verify_finds_a_token_outside_the_vocabulary(root):
    def change(entries):
        entries["t_grid"]["modality"]["vocab_size"] = 10

    edit_manifest(root, change)
    place = r"data-00000-of-00003.arrayrecord, record 0: modality 't_grid' has token \d+, outside the vocabulary 0..9"
    with pytest.raises(ValueError, match=place):
        records.verify(root, "train")


def test_registration_must_agree_with_the_files(root):
    for changed in (
        Modality("t_grid", "tokens", vocab_size=4095, grid=(2, 3)),
        Modality("t_grid", "tokens", vocab_size=4096, grid=(3, 2)),
        Modality("t_text", "sequence", vocab_size=300, max_tokens=7),
    ):
        with pytest.raises(ValueError, match=f"modality {changed.name!r} is registered as .* correct the registration"):
            records.Records(root, "train", changed)
    # How pixels are cut into patches, and room for longer texts, are the model's business, not the files'.
    records.Records(root, "train", Modality("t_pixels", "pixels", grid=(4, 6), patch_size=2, channels=3))
    records.Records(root, "train", Modality("t_text", "sequence", vocab_size=300, max_tokens=100))
    with pytest.raises(ValueError, match="Did you mean 't_text'"):
        records.Records(root, "train", Modality("t_tex", "sequence", vocab_size=300, max_tokens=7))


def test_manifest_must_be_there_and_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest.json does not exist: .*write_modality"):
        manifest_lib.read_manifest(tmp_path, "train")
    write_set(tmp_path, "train", 2, [GRID], shards=1)
    path = tmp_path / "train" / "manifest.json"
    text = path.read_text()
    for broken, message in (
        (text[:50], "is not JSON"),
        ("[]", "is not a manifest"),
        (text.replace('"version": 1', '"version": 2'), "format version 2, this code reads 1"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            manifest_lib.read_manifest(tmp_path, "train")


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(tmp_path):
    """The reader has no error for what lies past the end of a file: it gives a record without bytes."""
    wide = Modality("t_wide", "tokens", vocab_size=4096, grid=(64, 64))
    codes = [np.full(4096, i) for i in range(40)]
    codes[20] = np.zeros(0, np.int64)
    records.write_modality(tmp_path, "train", wide, codes, keys(40))
    opened = records.Records(tmp_path, "train", wide)
    assert opened[0][0] == 0 and opened[20].shape == (0,)
    (file,) = files(tmp_path, "t_wide")
    size = file.stat().st_size
    os.truncate(file, 65536)
    with pytest.raises(DataError, match=f"{file}, record 39 cannot be read: .* 65536 bytes now, and had {size}"):
        opened[39]
    file.unlink()
    with pytest.raises(DataError, match=r"record 20 cannot be read .the file has vanished.*copy"):
        opened[20]
