"""The trainer on a made-up stream: what a run leaves behind, and that it continues bit for bit."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import MODALITIES, TinyStream, tiny_config

from fm4m import (
    checkpoint,
    evaluate,
    exit_codes,
    goodput,
    metrics,
    optim,
    plan,
    run_folder,
    sharding,
    step,
    train,
    watchdog,
)
from fm4m.checkpoint import CheckpointError
from fm4m.config_file import ConfigError
from fm4m.masking import mask_batch

# Seconds for one child process, which needs ten on an idle machine and took three hundred on one with a load of ten.
TIMEOUT = 900
HERE = pathlib.Path(__file__).resolve().parent
VALIDATION = TinyStream(split="validation", size=40, finite=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One whole run: (workdir, result, pictures asked for)."""
    workdir, asked = tmp_path_factory.mktemp("run"), []

    def pictures(params, at):
        asked.append(at)
        return {"sheet": np.zeros((4, 4, 3), np.uint8)}

    config = tiny_config(log__pictures_every=10, log__profile="7:2", optimizer__ema=0.5)
    return workdir, train.train(config, workdir, TinyStream(), VALIDATION, pictures), asked


def test_what_a_run_leaves_behind(run):
    workdir, result, asked = run
    rows = metrics.read_metrics(workdir)
    assert [r["step"] for r in rows] == [0, 6, 12, 18, 24, 24]
    steps = [r for r in rows if "train/loss" in r]
    names = ["train/loss/colour", "train/loss/words", "speed/samples_per_s", "speed/tokens_per_s", "speed/mfu"]
    names += ["optimizer/lr", "optimizer/grad_norm", "data/filled_inputs", "data/filled_targets"]
    assert set(names) <= set(steps[0])
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 0.3
    assert 0.5 < steps[0]["data/filled_inputs"] <= 1
    assert asked == [10, 20, 24] and len(list((workdir / "pictures").iterdir())) == 3
    assert set(result.losses) == {"start", "end", "frequency"}
    assert all(result.losses["end"][n] < result.losses["start"][n] for n in ("colour", "words"))
    assert json.loads((workdir / "config.json").read_text())["train"]["total"] == "24 steps"
    assert "decoder_embedding/mask_token" in (workdir / "parameters.txt").read_text()
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [15, 20, 24]
    (attempt,) = goodput.read(workdir)
    assert (attempt["first_step"], attempt["step"], attempt["ended"]) == (0, 24, "done")
    spent = {cause for cause, seconds in attempt["seconds"].items() if seconds}
    assert spent >= set(goodput.CAUSES) - {"restore", "data"}
    shares = [sum(v for k, v in row.items() if k.startswith("goodput/")) for row in steps]
    assert shares == pytest.approx([1.0] * 4) and 0 < steps[0]["goodput/step"] < 1
    assert steps[0]["speed/input_wait_s"] >= 0 and steps[0]["memory/peak_gib"] > 0.01
    assert list((workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))


def test_checkpoint_holds_parameters_average_and_description(run):
    workdir, result, _ = run
    params, meta = checkpoint.load_params(workdir)
    jax.tree.map(np.testing.assert_array_equal, params, result.state["params"])
    average, _ = checkpoint.load_params(workdir, ema=True)
    assert not np.array_equal(average["decoder_norm"]["scale"], params["decoder_norm"]["scale"])
    assert meta["position"] == 24 * 16 and meta["mixture"]["stream"]["name"] == "tiny"
    assert meta["mixture"]["masking"]["num_inputs"] == 10


def test_a_finished_run_validates_again_and_changes_nothing(run):
    workdir, result, _ = run
    # How the model is run is no part of what the run is.
    config = tiny_config(optimizer__ema=0.5, model__remat="full", model__scan_group=0)
    again = train.train(config, workdir, TinyStream(), VALIDATION)
    # The other configuration is kept beside the old one, and looking again is no attempt to train.
    assert json.loads((workdir / "config-24.json").read_text())["model"]["remat"] is None
    assert len(goodput.read(workdir)) == 1 and len(run_folder.read_environments(workdir)) == 2
    assert again.step == 24 and again.losses["end"] == pytest.approx(result.losses["end"], rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, again.state, result.state)


def test_a_run_goes_back_over_damaged_checkpoints(run, tmp_path, caplog):
    source, result, _ = run
    workdir = shutil.copytree(source, tmp_path / "run")
    steps = workdir / "checkpoints"
    (steps / "24" / "meta" / "metadata").unlink()
    data = max((steps / "20" / "opt_state").rglob("d/*"), key=lambda p: p.stat().st_size)
    whole, third = data.read_bytes(), data.stat().st_size // 3
    data.write_bytes(whole[:third] + bytes(third) + whole[2 * third :])
    again = train.train(tiny_config(optimizer__ema=0.5), workdir, TinyStream())
    reports = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert [r.partition(" in ")[0] for r in reports] == ["the checkpoint of step 24", "the checkpoint of step 20"]
    assert sorted(p.name for p in steps.iterdir()) == ["15", "20", "24", "damaged-20", "damaged-24"]
    assert again.step == 24
    for ours, theirs in zip(jax.tree.leaves(again.state), jax.tree.leaves(result.state), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(workdir)[0], result.state["params"])


def test_another_mixture_model_or_seed_is_refused(run):
    workdir, _, _ = run
    with pytest.raises(CheckpointError, match=r"mixture.stream.tasks.tiny.rate was 1.0, is 2.0"):
        train.train(tiny_config(optimizer__ema=0.5), workdir, TinyStream(rate=2.0))
    with pytest.raises(CheckpointError, match=r"mixture.masking.num_inputs was 10, is 6"):
        train.train(tiny_config(data__num_inputs=6), workdir, TinyStream())
    with pytest.raises(CheckpointError, match="model.dim was 32, is 64"):
        train.train(tiny_config(model__dim=64), workdir, TinyStream())
    with pytest.raises(CheckpointError, match="seed was 0, is 3"):
        train.train(tiny_config(seed=3), workdir, TinyStream())


def test_the_baseline_is_the_smoothed_frequency_of_targets(run):
    _, result, _ = run
    stream, c = TinyStream(), tiny_config()
    mask = jax.jit(lambda k, raw, position: mask_batch(raw, stream.masking, MODALITIES, stream.tasks, k, position))

    def targets(source, key, batches):
        for i, raw in enumerate(source.batches(position=0, global_batch=16)):
            if i == batches:
                return
            packed = mask(key, raw, np.arange(16, dtype=np.uint32) + 16 * i)
            yield np.asarray(packed.target)[np.asarray(packed.decoder.valid)]

    seen = np.concatenate(list(targets(stream, step.mask_key(c.seed), c.eval.baseline_batches)))
    wanted = np.concatenate(list(targets(VALIDATION, jax.random.key(evaluate.MASK_SEED), 99)))
    for name in MODALITIES.outputs:
        start, stop = MODALITIES.output_ranges[MODALITIES.index(name)]
        counts = np.bincount(seen, minlength=MODALITIES.output_rows)[start:stop] + 1
        own = wanted[(wanted >= start) & (wanted < stop)] - start
        expected = -np.log(counts / counts.sum())[own].mean()
        assert result.losses["frequency"][name] == pytest.approx(expected, rel=1e-6)


def one_step(config, stream):
    mesh = sharding.make_mesh()
    model, optimizer = plan.make_model_config(config), optim.from_config(config, 10, 0, 0)
    make = step.make_step(config, model, stream.modalities, stream.masking, stream.tasks, optimizer, mesh)
    state = step.init_state(config, model, stream.modalities, optimizer)
    return make(
        state, *next(sharding.device_batches(stream, mesh, position=32, global_batch=config.train.global_batch))
    )


def test_accumulation_is_exact_under_masks():
    whole, parts = (one_step(tiny_config(train__accumulation=a, optimizer__eps=1.0), TinyStream()) for a in (1, 4))
    for name in ("loss", "sums", "counts", "grad_norm"):
        np.testing.assert_allclose(parts[1][name], whole[1][name], rtol=2e-6)
    # The first moment is the gradient times 1 - b1.
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s["opt_state"]["mu"])]) for s, _ in (whole, parts)]
    np.testing.assert_allclose(flat[0], flat[1], rtol=1e-4, atol=1e-7 * np.abs(flat[0]).max())


def test_steps_in_a_row_that_are_not_finite_stop_the_run_and_are_named(tmp_path):
    large = {"optimizer__blr": 1e30, "checkpoint__every": 2, "checkpoint__asynchronous": False}
    with pytest.raises(FloatingPointError, match=r"steps 3 to 5, .*nan.* 3 in a row .*lower optimizer.blr") as said:
        train.train(tiny_config(**large, train__max_skipped=2), tmp_path, TinyStream())
    for part in (" train.max_skipped = 2", "Samples 32 to 79", "newest checkpoint is step 2", "--step=3. "):
        assert part in str(said.value)
    # Step 2 made the parameters that step 4 may not put in place of those before.
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir()] == [2]
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(r["step"], r["position"], r["grad_norm"]) for r in rows] == [(s, 16 * s - 16, "nan") for s in (3, 4, 5)]
    # Again from step 2; the lines of what is made again are dropped.
    with pytest.raises(FloatingPointError, match=r"step 3: .* 1 in a row"):
        train.train(tiny_config(**large, train__max_skipped=0), tmp_path, TinyStream())
    assert (tmp_path / "skipped.jsonl").read_text().count("\n") == 1


def test_a_write_that_is_repeated_has_the_time_of_a_write(tmp_path, monkeypatch):
    """`Checkpoints.due` repeats writes that failed; the watchdog must not take that for a step that hangs."""
    phases, due = [], checkpoint.Checkpoints.due

    def watched(self, at):
        phases.append(watchdog._now[0])
        return due(self, at)

    monkeypatch.setattr(checkpoint.Checkpoints, "due", watched)
    train.train(tiny_config(train__stop_after=2), tmp_path, TinyStream())
    assert phases == ["checkpoint"] * 2


def test_batch_that_devices_or_passes_do_not_divide(tmp_path):
    with pytest.raises(ConfigError, match="must be divisible by train.accumulation"):
        train.train(tiny_config(train__accumulation=3), tmp_path, TinyStream())
    with pytest.raises(ConfigError, match="no registered model|there is no registered model named 'fm_huge'"):
        train.train(tiny_config(model__name="fm_huge"), tmp_path, TinyStream())
    with pytest.raises(ConfigError, match="longer than the whole run"):
        train.train(tiny_config(optimizer__warmup="1K steps"), tmp_path, TinyStream())


# ---- other processes


def start(workdir, out, *options, devices=1, **env):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths, **env}
    with open(f"{out}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / "tiny_run.py"), str(workdir), str(out), *options],
            env=env,
            stdout=log,
            stderr=log,
        )


def finish(process, out):
    assert process.wait(timeout=TIMEOUT) == 0, pathlib.Path(f"{out}.log").read_text()[-3000:]
    with np.load(out) as arrays:
        return {k: arrays[k] for k in arrays.files}


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.mark.slow
def test_two_processes_agree_with_one_and_one_continues_them(tmp_path, caplog):
    one = train.train(tiny_config(), tmp_path / "1", TinyStream(), VALIDATION)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    outs = [tmp_path / f"2_{i}.npz" for i in range(2)]
    # Some steps on two processes of two devices, until one of them hears that its machine goes; then one process.
    options = ("log.pictures_every=6", "pause=0.7")
    both = [
        start(tmp_path / "2", out, *options, devices=2, JAX_PROCESS_ID=str(i), **env) for i, out in enumerate(outs)
    ]
    deadline = time.time() + TIMEOUT
    while not (tmp_path / "2" / "checkpoints" / "10").exists() and both[0].poll() is None and time.time() < deadline:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    codes, logs = [p.wait(timeout=TIMEOUT) for p in both], [pathlib.Path(f"{out}.log").read_text() for out in outs]
    assert codes == [exit_codes.PREEMPTED] * 2, logs[0][-3000:]
    assert "this process reads part 2 of 2" in logs[1]
    stopped = [re.search(r"stopped at step (\d+) of 24 .SIGTERM; saved", text)[1] for text in logs]
    assert stopped[0] == stopped[1] == max((p.name for p in (tmp_path / "2" / "checkpoints").iterdir()), key=int)
    assert "00000006_norm.png" in [p.name for p in (tmp_path / "2" / "pictures").iterdir()]
    with caplog.at_level("INFO", "fm4m"):
        rest = train.train(tiny_config(), tmp_path / "2", TinyStream(), VALIDATION)
    assert f"continuing at step {stopped[0]}" in caplog.text
    assert largest_difference(one.state["params"], rest.state["params"]) < 2e-6


def test_losses_of_an_average_are_those_evaluated(run):
    workdir, result, _ = run
    config = tiny_config()
    model = plan.make_model_config(config)
    mesh = sharding.make_mesh()
    evaluator = evaluate.Evaluator(model, VALIDATION, VALIDATION.masking, mesh, batch=8, method="blocked")
    average, _ = checkpoint.load_params(workdir, ema=True)
    got = evaluator(average)
    # Another batch size: the same masks and targets, since they depend on the sample's index alone.
    assert got == pytest.approx(result.losses["end"], rel=1e-5)
