"""Steps that are skipped, and steps that are made again."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
from spoiled_stream import SpoiledStream
from tiny_run import TinyStream, tiny_config

from fm4m import checkpoint, configured, examine, exit_codes, goodput, metrics, plan, replay, sharding, train

SPOILED = 16 * 9 + 3  # a sample of step 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps with one skipped, of which the checkpoints 8 and 12 are left."""
    workdir = tmp_path_factory.mktemp("run")
    # The optimizer as in test_step, whose compiled step this shares.
    config = tiny_config(
        train__total="12 steps", optimizer__ema=0.9, optimizer__warmup="0 steps", checkpoint__every=4,
        checkpoint__keep=2, log__every=1,
    )  # fmt: skip
    stream = SpoiledStream(spoiled=(SPOILED,))
    return workdir, config, stream, train.train(config, workdir, stream)


@pytest.fixture(scope="module")
def report(run):
    """Of step 10, made on the run's folder, of which nothing may change."""
    workdir, _, stream, _ = run
    before = snapshot(workdir)
    out = replay.replay(replay.load_config(workdir, 10), workdir, stream, 10, samples=3)
    assert snapshot(workdir) == before
    return out


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in folder.rglob("*")}


def test_a_skipped_step_is_counted_and_not_averaged(run):
    workdir, _, _, result = run
    rows = metrics.read_metrics(workdir)
    assert [r["train/skipped"] for r in rows] == [0] * 9 + [1] + [0] * 2
    assert [r["step"] for r in rows if r["train/loss"] is None] == [10]
    assert rows[9]["train/targets_per_sample/words"] > 0 and "train/loss/words" not in rows[9]
    (line,) = [json.loads(text) for text in (workdir / "skipped.jsonl").read_text().splitlines()]
    assert {k: line[k] for k in ("step", "position", "positions")} == {"step": 10, "position": 144, "positions": 16}
    assert line["loss"] == "nan" and set(line["modalities"]) <= {"colour", "words"}
    assert result.step == 12 and all(np.isfinite(x).all() for x in jax.tree.leaves(result.state))


def test_a_window_averages_the_steps_that_were_not_skipped():
    stream, model = TinyStream(), plan.make_model_config(tiny_config())
    window = metrics.Window(model, stream.modalities, stream.masking, 16, 1e12, goodput.Clock())
    for loss, skipped in ((2.0, 0), (np.nan, 1), (4.0, 0)):
        values = {"loss": loss, "sums": np.array([0, loss * 5, loss * 10]), "counts": np.array([0, 5, 10])}
        window.add({**values, "skipped": skipped, "grad_norm": loss, "lr": 0.1, "inputs": 0.5, "targets": 0.5})
    row = window.close()
    assert (row["train/loss"], row["train/loss/words"], row["optimizer/grad_norm"]) == (3, 3, 3)
    assert row["train/skipped"] == 1 and row["train/targets_per_sample/words"] == 30 / 48


def test_the_configuration_of_a_run_and_of_an_earlier_attempt(run, tmp_path):
    workdir, config, _, _ = run
    assert replay.load_config(workdir, 3) == config
    for name, blr in (("config", 3.0), ("config-20", 2.0), ("config-4", 1.0)):
        stored = json.loads(config.to_json_best_effort()) | {"optimizer": {"blr": blr}}
        (tmp_path / f"{name}.json").write_text(json.dumps(stored))
    assert [replay.load_config(tmp_path, n).optimizer.blr for n in (4, 5, 20, 21)] == [1.0, 2.0, 2.0, 3.0]


def test_a_step_is_made_again_bit_for_bit(run, report):
    workdir, config, stream, _ = run
    assert (report["from_step"], report["positions"]) == (8, [144, 159])
    rows = metrics.read_metrics(workdir)
    assert report["logged"] == [{"step": 9, "run": rows[8]["train/loss"], "replay": rows[8]["train/loss"]}]
    # From the seed, where no checkpoint had been made yet.
    early = replay.replay(config, workdir, stream, 3, samples=16)
    assert early["from_step"] == 0 and len(early["logged"]) == 3 and not early["skipped"]
    assert early["loss"] == rows[2]["train/loss"]
    assert early["grad_norm"] == rows[2]["optimizer/grad_norm"]
    norm = math.sqrt(sum(group["gradient"] ** 2 for group in early["groups"].values()))
    assert norm == pytest.approx(early["grad_norm"], rel=1e-5)
    assert sum(sample["share"] for sample in early["samples"]) == pytest.approx(early["loss"], rel=1e-5)
    shares = [sample["share"] for sample in early["samples"]]
    assert shares == sorted(shares, reverse=True)
    assert "equal bit for bit to the 3 losses" in replay.as_text(early)


def test_what_is_not_finite_is_found(report):
    assert report["skipped"] and report["samples_not_finite"] == [SPOILED]
    assert report["samples"][0]["position"] == SPOILED
    assert report["samples"][0]["not_finite_from"] == "the encoder's embeddings"
    assert report["samples"][1]["not_finite_from"] is None
    assert not math.isfinite(report["groups"]["encoder_embedding projections feature"]["gradient"])
    text = replay.as_text(report)
    assert "step 10 (skipped): samples 144 to 159" in text and "not finite from the encoder's embeddings on" in text


def test_the_first_layer_that_is_not_finite_is_named(run):
    _, config, stream, result = run
    planned, params = plan.make(config, stream), result.state["params"]
    decoder = {**params["decoder"], "mlp_norm": {"scale": params["decoder"]["mlp_norm"]["scale"] * np.inf}}
    batch = next(sharding.device_batches(stream, planned.mesh, position=0, global_batch=16))
    found = examine.samples(planned, {**params, "decoder": decoder}, batch)
    assert not found.finite.any()
    assert {examine.parts(planned)[i] for i in found.broken} == {"decoder layer 0"}


def test_the_command_line_and_a_step_whose_checkpoint_is_gone(run, report, monkeypatch, capsys, tmp_path):
    workdir, _, stream, _ = run
    monkeypatch.setattr(configured, "streams", lambda config: (stream, None))
    assert replay.main([f"--workdir={workdir}", "--step=6"]) == exit_codes.CANNOT_START
    assert "error: step 6 cannot be replayed: no checkpoint before it" in (said := capsys.readouterr().err)
    assert "steps that can be: 1 to 4 and 9 to 12" in said and said.count("\n") == 1
    assert replay.main([f"--workdir={workdir}", "--step=13"]) == exit_codes.CANNOT_START
    assert "there is no step 13: those of this run are 1 to 12" in capsys.readouterr().err
    assert replay.main([f"--workdir={tmp_path}", "--step=1"]) == exit_codes.CANNOT_START
    assert "is no run folder: config.json cannot be read" in capsys.readouterr().err
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint of another run"):
        replay.replay(tiny_config(seed=3), workdir, stream, 10)
    monkeypatch.setattr(replay, "replay", lambda *given: report)
    assert replay.main([f"--workdir={workdir}", "--step=10", f"--out={tmp_path / 'r.json'}"]) == exit_codes.DONE
    assert capsys.readouterr().out == replay.as_text(report) + "\n"
    assert json.loads((tmp_path / "r.json").read_text())["samples"][0]["share"] == "nan"
