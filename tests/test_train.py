"""The trainer on a made-up stream: what a run leaves behind, and that it continues bit for bit."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import MODALITIES, TinyStream, tiny_config

from fm4m import checkpoint, evaluate, exit_codes, metrics, optim, sharding, step, train
from fm4m.checkpoint import CheckpointError
from fm4m.config import ConfigError
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

    config = tiny_config(log__pictures_every=10, optimizer__ema=0.5)
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
    assert again.step == 24 and again.losses["end"] == pytest.approx(result.losses["end"], rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, again.state, result.state)


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
    model, optimizer = train.make_model_config(config), optim.from_config(config, 10, 0, 0)
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


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    config = tiny_config(optimizer__blr=1e30, eval__baseline_batches=0)
    with pytest.raises(FloatingPointError, match=r"step 3: loss .*nan.*Lower optimizer.blr"):
        train.train(config, tmp_path, TinyStream())


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
    assert set(a) == set(b)
    return max(float(np.abs(a[k] - b[k]).max()) for k in a)


@pytest.mark.slow
def test_killed_runs_continue_bit_for_bit(tmp_path):
    options = ("checkpoint.every=2", "eval.baseline_batches=0")
    straight = finish(start(tmp_path / "a", tmp_path / "a.npz", *options), tmp_path / "a.npz")
    folder, rng = tmp_path / "b" / "checkpoints", np.random.default_rng(time.time_ns())

    def steps():
        return [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []

    def end_when(condition, delay, how):
        process = start(tmp_path / "b", tmp_path / "b.npz", *options, "pause=0.05")
        deadline = time.time() + TIMEOUT
        while not condition() and process.poll() is None and time.time() < deadline:
            time.sleep(0.0005)
        time.sleep(delay)
        assert process.poll() is None, (tmp_path / "b.npz.log").read_text()[-3000:]
        process.send_signal(how)
        return process.wait(timeout=TIMEOUT), max(steps(), default=0)

    # At a random moment after the first checkpoint, then while a checkpoint is being written.
    _, first = end_when(steps, rng.uniform(0, 0.4), signal.SIGKILL)
    _, second = end_when(
        lambda: max(steps()) > first and any("tmp" in p.name for p in folder.iterdir()), 0.0, signal.SIGKILL
    )
    # The notice of a preemption: saved after the step it is in.
    code, third = end_when(lambda: max(steps()) > second, 0.0, signal.SIGTERM)
    assert code == exit_codes.PREEMPTED and third > second
    assert f"stopped at step {third} of 24 (SIGTERM" in (tmp_path / "b.npz.log").read_text()
    resumed = finish(start(tmp_path / "b", tmp_path / "b.npz", *options), tmp_path / "b.npz")
    assert "continuing at step" in (tmp_path / "b.npz.log").read_text()
    for name, value in straight.items():
        assert value.tobytes() == resumed[name].tobytes(), name


@pytest.mark.slow
def test_two_processes_agree_with_one_and_one_continues_them(tmp_path):
    one = finish(start(tmp_path / "1", tmp_path / "1.npz"), tmp_path / "1.npz")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    outs = [tmp_path / f"2_{i}.npz" for i in range(2)]
    # Twelve steps on two processes of two devices, the rest on one process of one device.
    both = [
        start(
            tmp_path / "2", out, "train.stop_after=12", "log.pictures_every=6", devices=2, JAX_PROCESS_ID=str(i), **env
        )
        for i, out in enumerate(outs)
    ]
    assert [p.wait(timeout=TIMEOUT) for p in both] == [0, 0], pathlib.Path(f"{outs[0]}.log").read_text()[-3000:]
    text = pathlib.Path(f"{outs[1]}.log").read_text()
    assert "this process reads part 2 of 2" in text
    pictures = sorted(p.name for p in (tmp_path / "2" / "pictures").iterdir())
    assert pictures == ["00000006_norm.png", "00000012_norm.png"]
    rest = finish(start(tmp_path / "2", tmp_path / "2.npz"), tmp_path / "2.npz")
    assert "continuing at step 10" in (tmp_path / "2.npz.log").read_text()
    assert largest_difference(one, rest) < 2e-6


def test_losses_of_an_average_are_those_evaluated(run):
    workdir, result, _ = run
    config = tiny_config()
    model = train.make_model_config(config)
    mesh = sharding.make_mesh()
    evaluator = evaluate.Evaluator(model, VALIDATION, VALIDATION.masking, mesh, batch=8, method="blocked")
    average, _ = checkpoint.load_params(workdir, ema=True)
    got = evaluator(average)
    # Another batch size: the same masks and targets, since they depend on the sample's index alone.
    assert got == pytest.approx(result.losses["end"], rel=1e-5)
