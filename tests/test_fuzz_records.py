"""Damaged token files and manifests: what is read is what was written, or one sentence names the file.

FM4M_FUZZ=100 tries a hundred times as many, and other ones on every run.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed_json, damaged, fuzz
from token_sets import GRID, TEXT, arrays, write_set

from data_pipelines import records
from data_pipelines.manifest import check_aligned, read_manifest

N, CHOSEN = 11, (GRID, TEXT)
NAMES = [m.name for m in CHOSEN]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    write_set(root, "train", N, CHOSEN, shards=2)
    return root


@pytest.fixture(scope="module")
def truth():
    return {m.name: arrays(m, N) for m in CHOSEN}


def sentence(error: BaseException, *names: str) -> None:
    """An error is one sentence or two that name a file."""
    text = str(error)
    assert any(name in text for name in names) and len(text) < 3000 and "Traceback" not in text, repr(error)


def read(root, truth) -> int:
    """Reads a split as a stream does; returns how many samples were as they should be. Nothing else may be read."""
    try:
        # What data_pipelines.sources.TokenSource does, without SeqIO, whose import takes longer than all of this.
        manifest = read_manifest(root, "train")
        samples = records.Joined({m.name: records.Records(root, "train", m, manifest) for m in CHOSEN})
        check_aligned(root / "train", manifest["modalities"], NAMES)
    except (ValueError, FileNotFoundError) as error:
        sentence(error, "manifest.json", ".arrayrecord", "train")
        return 0
    good = 0
    for i in range(len(samples)):
        try:
            sample = samples[i]
        except ValueError as error:
            sentence(error, ".arrayrecord, record")
            continue
        for name in NAMES:
            np.testing.assert_array_equal(sample[name], truth[name][i])
        good += 1
    return good


def checked(root) -> bool:
    """Whether the program that checks everything finds nothing wrong."""
    try:
        records.verify(root, "train")
    except (ValueError, FileNotFoundError) as error:
        sentence(error, "manifest.json", ".arrayrecord", "train")
        return False
    return True


def test_whole_files_pass(root, truth):
    assert read(root, truth) == N and checked(root)


@fuzz(60)
@given(data=st.data())
def test_record_files(data, root, truth):
    path = data.draw(st.sampled_from(sorted((root / "train").rglob("*.arrayrecord"))))
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged(whole, same_size=data.draw(st.integers(0, 3)) > 0)))
        read(root, truth)
        assert not checked(root) or path.read_bytes() == whole
    finally:
        path.write_bytes(whole)


def test_two_files_that_changed_places(root):
    """Both are whole files of this set, so that opening them cannot tell; the check does."""
    first, second = sorted((root / "train" / TEXT.name).iterdir())
    a, b = first.read_bytes(), second.read_bytes()
    try:
        first.write_bytes(b), second.write_bytes(a)
        assert not checked(root)
    finally:
        first.write_bytes(a), second.write_bytes(b)


@fuzz(100)
@given(data=st.data())
def test_manifests(data, root, truth):
    path = root / "train" / "manifest.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(changed_json(json.loads(whole))))
        read(root, truth)
        checked(root)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["../../other/t_grid/data-00000-of-00001.arrayrecord", "/etc/passwd", "", ".."])
def test_a_manifest_reaches_no_other_folder(root, name):
    path = root / "train" / "manifest.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    manifest["modalities"][GRID.name]["files"][0]["name"] = name
    try:
        path.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=rf"manifest.json is damaged .*{re.escape(name)}.* cannot be the name"):
            records.Records(root, "train", GRID)
        del manifest["modalities"][GRID.name]["files"][0]
        manifest["modalities"]["../../x"] = manifest["modalities"].pop(GRID.name)
        path.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"modality '\.\./\.\./x' is the entry of 't_grid'"):
            records.verify(root, "train")
    finally:
        path.write_bytes(whole)
