"""Files of a part, their adoption into a set, and the lines of progress."""

from __future__ import annotations

import errno
import io
import json

import numpy as np
import pytest

from data_pipelines import adopt, records
from data_pipelines.manifest import read_manifest
from data_pipelines.prepare import report, writer
from data_pipelines.prepare.errors import Problem
from data_pipelines.prepare.samples import Record
from data_pipelines.prepare.writer import PartWriter, read_part
from fm4m.modalities import Modality

TOKENS = Modality("tok", "tokens", vocab_size=9, grid=(1, 2))
WORDS = Modality("words", "sequence", vocab_size=300, max_tokens=5)


def record(key: str) -> Record:
    return Record(key, key, 0, None, None, {}, {}, {})


def write(folder, keys, split="train"):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with PartWriter(folder, [TOKENS, WORDS], True) as part:
        for i, key in enumerate(keys):
            part.add(split, record(key), {"tok": np.array([i, 1]), "words": None if i == 1 else np.arange(i + 1)})
        part.left_out({"key": "bad", "reason": "truncated", "sentence": "bad: ends early"})
        return part.finish({"read": len(keys)})


def finished(folders, modality, split="train"):
    found = [read_part(folder)["splits"][split] for folder in folders]
    files = [{**part["files"][modality.name], "records": part["records"], "keys": part["keys"]} for part in found]
    paths = [folder / split / f"{modality.name}.arrayrecord" for folder in folders]
    return adopt.Finished(modality, paths, files, max(f["longest"] for f in files), {"by": "test"})


def test_a_part_is_there_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "parts" / "000000"
    made = write(folder, ["a", "b", "c"])
    assert made == read_part(folder) and made["splits"]["train"]["files"]["words"]["empty"] == 1
    assert made["splits"]["train"]["files"]["words"]["longest"] == 3
    with pytest.raises(ZeroDivisionError), PartWriter(tmp_path / "parts" / "000001", [TOKENS], True) as part:
        part.add("train", record("a"), {"tok": np.array([0, 1])})
        raise ZeroDivisionError
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["000000"]
    assert read_part(tmp_path / "parts" / "000001") is None
    with (folder / "quarantine.jsonl").open("a") as file:
        file.write("x")
    assert read_part(folder) is None


def test_a_part_that_somebody_else_finished_first_is_accepted(tmp_path):
    folder = tmp_path / "parts" / "000000"
    first = write(folder, ["a", "b"])
    assert write(folder, ["a", "b"]) == first and [p.name for p in (tmp_path / "parts").iterdir()] == ["000000"]


def test_finished_files_become_a_set_and_stay_where_they_are(tmp_path):
    folders = [tmp_path / "parts" / name for name in ("000000", "000001")]
    write(folders[0], ["a", "b", "c"])
    write(folders[1], ["d"])
    lists = [folder / "train" / "samples.jsonl" for folder in folders]
    both = [finished(folders, m) for m in (TOKENS, WORDS)]
    for _ in range(2):  # it may be cut off and done again
        adopt.adopt_files(tmp_path, "train", both, samples=lists, samples_made_from={"seed": 1}, overwrite=True)
    assert records.verify(tmp_path, "train") == {"tok": 4, "words": 4}
    assert [s["key"] for s in records.read_samples(tmp_path, "train")] == ["a", "b", "c", "d"]
    words = records.Records(tmp_path, "train", WORDS)
    assert [words[i].tolist() for i in range(4)] == [[0], [], [0, 1, 2], [0]]
    manifest = read_manifest(tmp_path, "train")
    assert manifest["samples"]["made_from"] == {"seed": 1}
    assert manifest["modalities"]["tok"]["made_from"] == {"by": "test"}
    assert read_part(folders[0]) is not None
    with pytest.raises(ValueError, match="'tok' already"):
        adopt.adopt_files(tmp_path, "train", both)

    (tmp_path / "train" / "samples.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl is missing or has changed"):
        records.verify(tmp_path, "train")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path / "parts" / "0", ["a", "b"])
    write(tmp_path / "parts" / "1", ["a", "x"])
    tokens, words = finished([tmp_path / "parts/0"], TOKENS), finished([tmp_path / "parts/1"], WORDS)
    with pytest.raises(ValueError, match="'words' is not aligned with 'tok'"):
        adopt.adopt_files(tmp_path, "train", [tokens, words])
    assert [p.name for p in (tmp_path / "train").iterdir()] == []
    tokens.paths[0].write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes, not the"):
        adopt.adopt_files(tmp_path, "train", [tokens])


def test_which_errors_mean_a_full_disk():
    assert writer.is_disk_full(OSError(errno.ENOSPC, "x")) and writer.is_disk_full(OSError(errno.EDQUOT, "x"))
    assert writer.is_disk_full(RuntimeError("write() failed: No space left on device; writing /x"))
    assert not writer.is_disk_full(OSError(errno.ENOENT, "x")) and not writer.is_disk_full(RuntimeError("other"))


def test_progress_tells_rate_time_left_and_quarantine(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    progress = report.Progress(1000, done=200, quarantined=3, file=io.StringIO())
    clock[0] = 10.0
    progress.add(100, 2)
    # What an earlier command did does not count for the rate.
    assert progress.line() == "300 of 1,000 samples (30 %), 10.0/s, 70 s left, 5 quarantined".replace("70 s", "1 min")
    progress.add(-50, -2)
    assert "250 of 1,000" in progress.line() and "3 quarantined" in progress.line()


def test_the_report_keeps_every_line(tmp_path):
    folders = [tmp_path / "parts" / name for name in ("000000", "000001")]
    parts = []
    for i, folder in enumerate(folders):
        folder.parent.mkdir(exist_ok=True)
        with PartWriter(folder, [TOKENS], True) as part:
            part.left_out({"key": f"k{i}", "reason": "truncated", "sentence": "it ends early"})
            counts = {"read": 2, "quarantined": {"truncated": 1}, "missing": {"tok": {"rows": i}}, "notes": {"grey": 1}}
            parts.append((folder, part.finish(counts)))
    problems = {"source": [Problem("odd.txt", "no_picture", "odd.txt: no picture")]}
    found = report.write_report(tmp_path / "report", parts, problems, {"more": 1})
    lines = [json.loads(line) for line in (tmp_path / "report" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["odd.txt", "k0", "k1"]
    assert found["quarantined"] == {"truncated": 2} and found["missing"] == {"tok": {"rows": 1}} and found["more"] == 1
    text = report.summary(found, tmp_path / "report")
    assert "4 samples read" in text and "without tok: 1 (rows 1)" in text and "mended or noted: grey 2" in text
