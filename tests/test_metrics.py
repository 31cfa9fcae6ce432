from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from fm4m import metrics


def test_rows_events_and_pictures(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, {"train/loss": np.float32(2.5), "train/loss/depth": math.nan})
    writer.text("config", "text")
    writer.pictures(1, {"rgb from depth": np.zeros((4, 6, 3), np.uint8)})
    with pytest.raises(ValueError, match="picture 'bad' is float64"):
        writer.pictures(1, {"bad": np.zeros((4, 6, 3))})
    writer.close()
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5, "train/loss/depth": None}]
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["00000001_rgb_from_depth.png"]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_resume_drops_later_rows_and_a_cut_line(tmp_path):
    lines = [json.dumps({"step": s, "x": s}) + "\n" for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "x"')
    writer = metrics.MetricWriter(tmp_path, tensorboard=False, step=2)
    writer.write(3, {"x": 30})
    writer.close()
    assert [r["x"] for r in metrics.read_metrics(tmp_path)] == [1, 2, 30]


def test_inactive_writer_and_missing_tensorboard(tmp_path, monkeypatch, caplog):
    silent = metrics.MetricWriter(tmp_path / "a", active=False)
    silent.write(1, {"x": 1})
    silent.pictures(1, {"p": np.zeros((1, 1, 3), np.uint8)})
    silent.close()
    assert not (tmp_path / "a").exists()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    writer = metrics.MetricWriter(tmp_path / "b")
    writer.write(1, {"x": 1})
    writer.close()
    assert "tensorboardX is not installed" in caplog.text
    assert len(metrics.read_metrics(tmp_path / "b")) == 1


def test_table():
    table = metrics.loss_table({"start": {"depth": 2.0, "caption": 4.0}, "end": {"depth": 1.0, "caption": math.nan}})
    lines = table.splitlines()
    assert lines[0].split() == ["modality", "start", "end"]
    assert lines[2].split() == ["depth", "2.0000", "1.0000"]
    assert lines[3].split() == ["caption", "4.0000", "-"]
    assert lines[-1].split() == ["mean", "3.0000", "1.0000"]
