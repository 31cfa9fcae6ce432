"""Checkpoints: what comes back, what is refused, and that damage is noticed, reported and left out."""

from __future__ import annotations

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import describe, make_abstract, make_state, restore, run_in, save_two_steps

from fm4m import agreement, checkpoint, loading, stored_step
from fm4m.checkpoint import CheckpointError, DamagedError
from fm4m.sizes import ModelConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = checkpoint.Checkpoints(workdir, every=2, keep=2, keep_period=4)
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(make_state(), describe(step))
    checkpoints.save(make_state(), describe(10))
    checkpoints.wait()
    checkpoints.close()
    return workdir


def test_round_trip_and_policy(saved):
    checkpoints = checkpoint.Checkpoints(saved)
    assert checkpoints.latest() == 10
    assert sorted(int(p.name) for p in checkpoints.folder.iterdir()) == [4, 8, 10]
    meta = checkpoints.meta(10)
    assert meta == describe(10)
    assert meta["position"] == 160 and meta["versions"]["jax"] == jax.__version__
    state = make_state()
    got = checkpoints.restore(10, make_abstract(state))
    jax.tree.map(np.testing.assert_array_equal, got, {k: state[k] for k in got})
    checkpoints.close()


def test_due(tmp_path):
    made = checkpoint.Checkpoints(tmp_path / "run", every=5)
    assert made.due(10) and not made.due(11)
    assert not checkpoint.Checkpoints(tmp_path / "run", every=0).due(10)
    assert not (tmp_path / "run").exists()


def test_parameters_alone(saved):
    params, meta = checkpoint.load_params(saved)
    jax.tree.map(np.testing.assert_array_equal, params, make_state()["params"])
    assert meta["step"] == 10 and meta["model"]["dim"] == 16
    assert checkpoint.load_params(saved, 4)[1]["step"] == 4
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*; there are: 4, 8, 10"):
        checkpoint.load_params(saved, 5)
    with pytest.raises(CheckpointError, match=r"has no 'ema' \(optimizer.ema was 0\)"):
        checkpoint.load_params(saved, ema=True)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="there are: none"):
        checkpoint.load_params(tmp_path)


def test_another_model_names_the_parameter(saved):
    checkpoints = checkpoint.Checkpoints(saved)
    with pytest.raises(CheckpointError, match=r"params/decoder_norm/scale of shape \(8,\), but the model's is \(4,\)"):
        checkpoints.restore(10, make_abstract(make_state(4)))
    more = make_state()
    more["params"]["context_projection"] = {"kernel": jnp.zeros((8, 8))}
    with pytest.raises(
        CheckpointError, match=r"has no array params/context_projection/kernel \(expected shape \(8, 8\)\)"
    ):
        checkpoints.restore(10, make_abstract(more))
    less = make_state()
    del less["params"]["head"]
    with pytest.raises(
        CheckpointError, match=r"has an array params/head/tokens \(16, 8\) that the model does not have"
    ):
        checkpoints.restore(10, make_abstract(less))
    checkpoints.close()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"mixture": {"tasks": {"a": {"rate": 2.0}}}}, r"mixture.tasks.a.rate was 1.0, is 2.0 \(see data.mixture"),
        ({"mixture": {"tasks": {"b": {"rate": 1.0}}}}, "mixture.tasks.a was {'rate': 1.0}, is None"),
        ({"model": ModelConfig(32, 1, 1, 2)}, r"model.dim was 16, is 32 \(see model\)"),
    ],
)
def test_another_run_is_refused(changed, expected):
    checkpoint.check_same_run(describe(), describe(step=8, config={"train": {"total": "20 steps"}}), "runs/a")
    with pytest.raises(CheckpointError, match=expected) as error:
        checkpoint.check_same_run(describe(), describe(**changed), "runs/a")
    assert "another --workdir" in str(error.value)


def test_a_write_that_was_cut_short_is_not_seen(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    short = shutil.copytree(folder / "10", folder / "12.orbax-checkpoint-tmp")
    assert checkpoint.load_params(tmp_path / "run")[1]["step"] == 10
    # It may be the write of a run that goes on; only the next write of this folder's own run removes it.
    assert short.is_dir()
    with run_in(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() == 10
        checkpoints.save(make_state(), describe(14))
        checkpoints.wait()
    assert not short.exists() and stored_step.steps_in(checkpoints.folder)[-1] == 14


# ---- damage


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """(folder of a run with steps 2 and 4, their state)."""
    workdir = tmp_path_factory.mktemp("two")
    return workdir, save_two_steps(workdir)


def damages(data, rng):
    """{what is done to a file: its new contents, or None}."""
    half, place = len(data) // 2, int(rng.integers(len(data)))
    flipped = bytearray(data)
    flipped[place] ^= int(rng.integers(1, 256))
    return {"missing": None, "empty": b"", "truncated": data[:half], "zeroed": bytes(len(data)), "flipped": flipped}


def test_any_damage_is_skipped_or_harmless(two_steps, tmp_path, caplog, capfd):
    """Every file of the newest step in every way: either it is not used, or every byte that is restored is right."""
    source, state = two_steps
    newest, rng = source / "checkpoints" / "4", np.random.default_rng(0)
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    harmless, skipped = set(), set()
    for number, file in enumerate(files):
        ways = damages((newest / file).read_bytes(), rng)
        # Of the ways to lose a part, one after the other.
        for how in ("flipped", ("missing", "empty", "truncated", "zeroed")[number % 4]):
            data = ways[how]
            workdir = shutil.copytree(source, tmp_path / "run")
            damaged = workdir / "checkpoints" / "4" / file
            damaged.unlink() if data is None else damaged.write_bytes(data)
            step, same, aside = restore(workdir, state)
            assert same and (step, aside) in ((4, []), (2, ["damaged-4"])), (file, how, step)
            (harmless if step == 4 else skipped).add(str(file))
            shutil.rmtree(workdir)
    # What Orbax leaves behind from writing, and some of its own notes, are not read.
    unread = ("commit_success.txt", "_METADATA", "ocdbt.process_0", "_sharding", "array_metadatas")
    assert not [file for file in harmless if not any(word in file for word in unread)]
    assert {"meta/metadata", "params/manifest.ocdbt", "opt_state/manifest.ocdbt"} <= skipped
    assert any("opt_state/d/" in file for file in skipped)
    reasons = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    # Flipped bytes of compressed numbers are not noticed by those who read them.
    assert any("params/head/tokens have other values than were saved" in reason for reason in reasons)
    assert all("It is kept as" in reason and "going back to step 2" in reason for reason in reasons)
    assert all(len(reason) < 700 and "Traceback" not in reason for reason in reasons)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("lost", ["", "params", "opt_state", "meta", "params/d"])
def test_lost_folders(two_steps, tmp_path, lost):
    workdir = shutil.copytree(two_steps[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4" / lost)
    if not lost:
        (workdir / "checkpoints" / "4").mkdir()
    assert restore(workdir, two_steps[1]) == (2, True, ["damaged-4"])
    # The same number can be saved again, and be damaged again.
    with run_in(workdir) as checkpoints:
        checkpoints.save(two_steps[1], describe(4))
        checkpoints.wait()
    shutil.rmtree(workdir / "checkpoints" / "4" / "params")
    assert restore(workdir, two_steps[1]) == (2, True, ["damaged-4", "damaged-4-1"])


def flip(file, at=0.5):
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 0x40
    file.write_bytes(data)


def test_all_damaged_is_an_error_that_stays(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps[0], tmp_path / "run")
    for step in (2, 4):
        flip(workdir / "checkpoints" / str(step) / "meta" / "metadata")
    for _ in range(2):  # a second start must not begin at step 0
        with run_in(workdir) as checkpoints, pytest.raises(CheckpointError, match="every .* damaged: damaged-2, dam"):
            checkpoints.restore_newest(make_abstract(two_steps[1]))
    shutil.rmtree(checkpoints.folder)
    with run_in(workdir) as checkpoints:
        assert checkpoints.restore_newest(make_abstract(two_steps[1])) is None


def test_a_step_of_another_run_is_not_skipped(two_steps, tmp_path):
    def refuse(meta):
        checkpoint.check_same_run(meta, describe(seed=1), "runs/a")

    with run_in(two_steps[0]) as checkpoints:
        with pytest.raises(CheckpointError, match="seed was 0, is 1"):
            checkpoints.restore_newest(make_abstract(two_steps[1]), refuse)
        with pytest.raises(CheckpointError, match=r"decoder_norm/scale of shape \(64,\), but the model's is \(8,\)"):
            checkpoints.restore_newest(make_abstract(make_state()))
        other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), two_steps[1])
        with pytest.raises(CheckpointError, match=r"decoder_norm/scale as float32, but the model's is bfloat16"):
            checkpoints.restore_newest(make_abstract(other))
    assert stored_step.steps_in(checkpoints.folder) == [2, 4]


def test_readers_refuse_damage_and_name_the_others(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps[0], tmp_path / "run")
    (data,) = (p for p in (workdir / "checkpoints" / "4" / "params").rglob("d/*") if p.stat().st_size > 10_000)
    flip(data)
    with pytest.raises(DamagedError, match=r"params/head/tokens have other values than were saved. Other steps .* 2$"):
        checkpoint.load_params(workdir)
    assert checkpoint.load_part(workdir, 4, "opt_state")[1]["step"] == 4
    assert checkpoint.load_params(workdir, 2)[1]["step"] == 2
    assert stored_step.steps_in(stored_step.run_folder(workdir) / "checkpoints") == [2, 4]
    assert loading.run_of(workdir / "checkpoints" / "2")[1] == 2


def test_older_steps_are_read_without_fingerprints(two_steps, tmp_path, caplog):
    workdir = shutil.copytree(two_steps[0], tmp_path / "run")
    file = workdir / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["digest"], meta["arrays"]
    file.write_text(json.dumps(meta | {"format": 1}))
    with run_in(workdir) as checkpoints:
        _, meta = checkpoints.restore_newest(make_abstract(two_steps[1]))
        with pytest.raises(CheckpointError, match=r"of shape \(64,\), but the model's is \(8,\)"):
            checkpoints.restore(4, make_abstract(make_state()))
    assert meta["step"] == 4
    assert sum("saved without fingerprints" in r.getMessage() for r in caplog.records) == 1
    with pytest.raises(CheckpointError, match=r"has no 'ema' \(optimizer.ema was 0\)"):
        checkpoint.load_params(workdir, ema=True)
    file.write_text(json.dumps(meta | {"format": 9}))
    with pytest.raises(CheckpointError, match="has format 9; this version of fm4m reads 1 and 2"):
        checkpoint.load_params(workdir)


def test_paths_of_object_stores_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(stored_step.run_folder("gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"
    assert str(checkpoint.Checkpoints("gs://bucket/run").folder) == "gs://bucket/run/checkpoints"
    assert os.fspath(stored_step.run_folder("runs/a")) == str(tmp_path / "runs" / "a")


def test_processes_agree(monkeypatch):
    """What the others say; real ones are in test_checkpoint_processes.py."""

    def said(*others):
        monkeypatch.setattr(agreement.jax, "process_count", lambda: len(others))
        monkeypatch.setattr(agreement, "wait_for_all", lambda event: None)

        def gather(own):
            rows = [np.frombuffer(x.encode().ljust(agreement.MESSAGE_BYTES, b"\0"), np.uint8) for x in others]
            return np.stack([own if x == "own" else row for x, row in zip(others, rows)])

        monkeypatch.setattr(agreement.multihost_utils, "process_allgather", gather)

    def fail(kind):
        raise kind("here")

    said("0None", "own", "0None")
    assert agreement.all_or_none(lambda: 3, checkpoint.ERRORS) == 3
    with pytest.raises(DamagedError, match="process 1: here"):
        agreement.all_or_none(lambda: fail(DamagedError), checkpoint.ERRORS)
    said("1there", "own", "0None")
    with pytest.raises(DamagedError, match="process 0: there"):
        agreement.all_or_none(lambda: 3, checkpoint.ERRORS)
    with pytest.raises(CheckpointError, match="process 1: here") as error:
        agreement.all_or_none(lambda: fail(CheckpointError), checkpoint.ERRORS)
    assert error.type is CheckpointError
