"""What the trainer writes beside metrics and checkpoints: configuration, environment, profiles; also to gs://."""

from __future__ import annotations

import json
import os
import subprocess

import fake_remote
import jax
import jax.numpy as jnp
import pytest
from etils import epath
from tiny_run import MODALITIES, tiny_config

from fm4m import config as config_lib
from fm4m import files, goodput, optim, plan, profiling, run_folder, sharding, step


@pytest.fixture(scope="module")
def params():
    """Shapes and shardings of the tiny model's parameters."""
    config = tiny_config()
    model, optimizer = plan.make_model_config(config), optim.from_config(config, 10, 0, 0)
    return step.abstract_state(config, model, MODALITIES, optimizer, sharding.make_mesh())["params"]


@pytest.mark.parametrize("remote", [False, True])
def test_attempts_are_listed_and_another_configuration_is_kept(tmp_path, monkeypatch, caplog, params, remote):
    folder = tmp_path
    if remote:
        fake_remote.install(monkeypatch, tmp_path)
        folder = epath.Path("gs://bucket/run")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with caplog.at_level("INFO", "fm4m"):
        for config, at in ((tiny_config(), 0), (tiny_config(log__every=7), 10), (tiny_config(log__every=8), 10)):
            run_folder.write(folder, config, params, at)
    read = lambda name: json.loads((folder / name).read_text())["log"]["every"]  # noqa: E731
    assert (read("config-10.json"), read("config-10-2.json"), read("config.json")) == (6, 7, 8)
    assert "log.every 6 -> 7" in caplog.text
    assert "decoder_embedding/mask_token" in (folder / "parameters.txt").read_text()
    text = (folder / "environment.json").read_text()
    attempts = run_folder.read_environments(folder)
    assert [a["step"] for a in attempts] == [0, 10, 10] and "secret" not in text
    assert attempts[0]["variables"]["XLA_FLAGS"] == "--xla_dump_to=x"
    assert attempts[0]["packages"]["numpy"] and attempts[0]["devices"]["count"] == jax.device_count()
    assert attempts[0]["hosts"] == [os.uname().nodename] and attempts[0]["command"]


def test_variables_are_chosen_by_name():
    given = {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": "-x", "JAX_API_TOKEN": "t", "AWS_SECRET_ACCESS_KEY": "k",
             "HOME": "/", "TPU_WORKER_ID": "3", "MY_XLA_FLAGS": "1", "HF_TOKEN": "t"}  # fmt: skip
    kept = {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": "-x", "TPU_WORKER_ID": "3"}
    assert run_folder.allowed_variables(given) == kept


def test_the_commit_of_a_checkout(tmp_path):
    assert run_folder.source_version(tmp_path) == {}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    found = run_folder.source_version(tmp_path)
    assert len(found["commit"]) == 40 and found["changed"] is False
    (tmp_path / "a").write_text("2")
    assert run_folder.source_version(tmp_path)["changed"] is True
    (tmp_path / ".git" / "HEAD").write_text("nonsense")
    assert run_folder.source_version(tmp_path)["commit"] is None


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "file.json"
    files.write_whole(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("remote", [False, True])
def test_chosen_steps_are_profiled(tmp_path, monkeypatch, caplog, remote):
    if remote:
        fake_remote.install(monkeypatch, tmp_path)
    folder = "gs://bucket/run" if remote else tmp_path / "bucket" / "run"
    clock = goodput.Clock()
    profile = profiling.Profile("3:2", folder, clock, 0)
    double = jax.jit(lambda x: x * 2)
    with caplog.at_level("INFO", "fm4m"):
        for at in range(1, 7):
            profile.begin(at)
            with profile.annotation(at):
                values = double(jnp.ones(8))
            profile.end(at, values)
            written = list(tmp_path.glob("bucket/run/profile/plugins/profile/*/*.xplane.pb"))
            assert len(written) == (at >= 4)
    profile.close()
    assert b"train" in written[0].read_bytes() and clock.seconds["profile"] > 0
    assert f"xprof --logdir={folder}/profile" in caplog.text


def test_a_profile_that_is_cut_short_or_not_due(tmp_path, caplog):
    cut = profiling.Profile("1:50", tmp_path, goodput.Clock(), 0)
    cut.begin(1)
    cut.close()
    cut.close()
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    with caplog.at_level("INFO", "fm4m"):
        before = profiling.Profile("5:2", tmp_path, goodput.Clock(), 8)
    assert "step 5 was made by an earlier attempt" in caplog.text
    for profile in (before, profiling.Profile("1:1", tmp_path, goodput.Clock(), active=False)):
        profile.begin(1)
        profile.end(1, None)
        profile.close()


@pytest.mark.parametrize("text", ["5", "0:3", "3:0", "-1:2", "a:b", "1:2:3", " 1:2", "1:²"])
def test_steps_to_profile_are_checked(text):
    assert config_lib.profiled_steps("12:3") == (12, 3) and config_lib.profiled_steps("") is None
    with pytest.raises(config_lib.ConfigError, match="log.profile = .*START:COUNT"):
        config_lib.validate(tiny_config(log__profile=text))
