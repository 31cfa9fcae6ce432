from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import sys
import time
import types

import fake_remote
import numpy as np
import pytest

from fm4m import metric_files, metrics
from fm4m.config_file import ConfigError


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


def test_an_object_store_gets_whole_files_at_intervals(tmp_path, monkeypatch):
    store = fake_remote.install(monkeypatch, tmp_path)
    now = [0.0]
    monkeypatch.setattr(metric_files.Interval.__init__, "__defaults__", (lambda: now[0],))
    monkeypatch.setattr(metric_files.Rows.__init__, "__defaults__", (lambda: now[0],))
    monkeypatch.setattr(metric_files.Events.__init__, "__defaults__", (lambda: now[0],))
    writer = metrics.MetricWriter("gs://bucket/run")
    for step in range(1, 100):
        now[0] = step * 2.0
        writer.write(step, {"x": step})
        if step == 70:  # 140 s: what a killed process leaves behind
            assert [r["x"] for r in metrics.read_metrics("gs://bucket/run")] == list(range(1, 61))
    paths = writer.pictures(99, {"p": np.zeros((4, 6, 3), np.uint8)})
    writer.close()
    assert len(metrics.read_metrics("gs://bucket/run")) == 99
    assert store.writes.count("metrics.jsonl") == 4  # at 60, 120 and 180 s, and at the end
    assert paths[0].exists() and str(paths[0]) == "gs://bucket/run/pictures/00000099_p.png"
    (events,) = (tmp_path / "bucket/run/tensorboard").iterdir()
    assert "tfevents" in events.name and events.stat().st_size > 99 * 20
    resumed = metrics.MetricWriter("gs://bucket/run", tensorboard=False, step=50)
    resumed.write(51, {"x": -51})
    resumed.close()
    assert [r["x"] for r in metrics.read_metrics("gs://bucket/run")][-2:] == [50, -51]


def test_a_slow_object_store_is_written_to_less_often():
    now = [0.0]
    interval = metric_files.Interval(lambda: now[0])
    now[0] = 60.0
    assert interval.due()
    with interval.copying():
        now[0] = 63.0
    now[0] = 362.0
    assert not interval.due()
    now[0] = 363.0
    assert interval.due()


class Wandb(types.ModuleType):
    """The part of the package that is used, which only remembers."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.__spec__ = [], importlib.machinery.ModuleSpec("wandb", None)
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.Image = lambda picture: picture.shape

    def init(self, **options):
        self.calls.append(("init", options))
        if options["project"] == "closed":
            raise self.errors.Error("api_key not configured")
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: self.calls.append((name, args))


def test_weights_and_biases_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 5):
        writer = metrics.MetricWriter(tmp_path, tensorboard=False, step=step, wandb="rooms", config={"seed": 1})
        writer.write(step + 1, {"x": 1.0, "y": math.nan})
        writer.pictures(step + 1, {"p": np.zeros((4, 6, 3), np.uint8)})
        writer.close()
    first, second = (options for name, options in fake.calls if name == "init")
    assert first == second and first["project"] == "rooms" and first["resume"] == "allow"
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == first["id"] and len(first["id"]) == 12
    rows = [args[0] for name, args in fake.calls if name == "log"]
    assert [r["step"] for r in rows] == [1, 1, 6, 6] and rows[1]["pictures/p"] == (4, 6, 3)
    other = metrics.MetricWriter(tmp_path / "other", tensorboard=False, wandb="rooms")
    other.close()
    assert fake.calls[-1][0] == "finish"
    assert [o for n, o in fake.calls if n == "init"][-1]["id"] != first["id"]
    with pytest.raises(ConfigError, match="log.wandb = 'closed': api_key not configured .*WANDB_MODE=offline"):
        metrics.MetricWriter(tmp_path / "closed", tensorboard=False, wandb="closed")


def test_weights_and_biases_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log.wandb = 'p': the package wandb is not .*; pip install '\.\[wandb\]'"):
        metrics.MetricWriter(tmp_path, tensorboard=False, wandb="p")
    metric_files.require_wandb("")


def test_the_real_package_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = metrics.MetricWriter(tmp_path, tensorboard=False, wandb="rooms", config={"seed": 1})
    writer.write(3, {"train/loss": 2.0})
    writer.pictures(3, {"p": np.zeros((4, 6, 3), np.uint8)})
    writer.close()
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    (written,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    end = time.monotonic() + 60  # its own process writes the file, soon after the run is closed
    while b"train/loss" not in written.read_bytes() and time.monotonic() < end:
        time.sleep(0.05)
    assert b"train/loss" in written.read_bytes()


def test_memory_of_the_process():
    found = metrics.device_memory()
    assert 0.01 < found["memory/in_use_gib"] <= found["memory/peak_gib"] < 1000
