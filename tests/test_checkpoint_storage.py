"""Checkpoints on storage that is full, read-only, or does not answer for a while."""

from __future__ import annotations

import contextlib
import json
import resource
import threading

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import describe, make_abstract, restore, run_in, save_two_steps

from fm4m import checkpoint, checkpoint_writer, stored_step
from fm4m.checkpoint import CheckpointError, DamagedError, SaveError
from fm4m.stored_step import steps_in


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """(folder of a run with steps 2 and 4, their state)."""
    workdir = tmp_path_factory.mktemp("two")
    return workdir, save_two_steps(workdir)


@pytest.fixture
def impatient(monkeypatch):
    for module in (checkpoint_writer, stored_step):
        monkeypatch.setattr(module, "PAUSES", (0.05, 0.05))


@contextlib.contextmanager
def full_disk():
    """No file may become longer than 10 kB: writing more fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_an_error_that_says_what_is_complete(two_steps, tmp_path, impatient, asynchronous, capfd):
    with run_in(tmp_path, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(two_steps[1], describe(2))
        checkpoints.wait()
        why = r"step 4 could not be written to .*: File too large; the newest complete one is step 2\. Make"
        with full_disk(), pytest.raises(SaveError, match=why):
            checkpoints.save(two_steps[1], describe(4))
            checkpoints.wait()
        # A thread of Orbax may still be writing while what is half written is removed; the next start removes the rest.
        assert steps_in(checkpoints.folder) == [2]
        # There is room again.
        checkpoints.save(two_steps[1], describe(4))
        checkpoints.wait()
    assert restore(tmp_path, two_steps[1]) == (4, True, [])
    assert "Traceback" not in capfd.readouterr().err


def test_a_write_that_failed_is_repeated(two_steps, tmp_path, impatient, caplog):
    fresh = lambda: jax.tree.map(jnp.copy, two_steps[1])  # noqa: E731
    with run_in(tmp_path, every=100) as checkpoints:
        with full_disk():
            checkpoints.save(fresh(), describe(4))
            wait_until(lambda: not checkpoints._writer._manager.is_saving_in_progress())
        # The state is still there: it is written again.
        assert not checkpoints.due(5) and checkpoints.latest() == 4
        with full_disk():
            state = fresh()
            checkpoints.save(state, describe(6))
            wait_until(lambda: not checkpoints._writer._manager.is_saving_in_progress())
        jax.tree.map(lambda x: x.delete(), state)  # as the next step does
        # It is gone: the next step is due, though no multiple of 100.
        assert checkpoints.due(7) and checkpoints.latest() == 4
        checkpoints.save(fresh(), describe(7))
        assert checkpoints.latest() == 7 and not checkpoints.due(8)
        with full_disk():
            state = fresh()
            checkpoints.save(state, describe(9))
            wait_until(lambda: not checkpoints._writer._manager.is_saving_in_progress())
        jax.tree.map(lambda x: x.delete(), state)
        assert checkpoints.due(10)
        with pytest.raises(SaveError, match=r"step 9 could not be written .* newest complete one is step 7"):
            checkpoints.wait()  # the run ends here
    assert "trying again" in caplog.text
    assert restore(tmp_path, two_steps[1])[:2] == (7, True)


def wait_until(condition):
    done = threading.Event()
    for _ in range(2000):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("waited for 20 s")


def test_a_folder_that_cannot_be_written_to(two_steps, tmp_path):
    (tmp_path / "file").write_text("")
    with run_in(tmp_path / "file" / "run") as checkpoints:
        with pytest.raises(CheckpointError, match=r"file/run/checkpoints cannot be written to: .*Not a directory"):
            checkpoints.restore_newest(make_abstract(two_steps[1]))
        with pytest.raises(SaveError, match=r"step 4 could not be .*Not a directory.*no step is complete"):
            checkpoints.save(two_steps[1], describe(4))


def test_storage_that_does_not_answer_is_no_damage(two_steps, monkeypatch, impatient, caplog):
    attempts = []

    def restore_meta(self, *_, **__):
        attempts.append(1)
        if len(attempts) < limit:
            raise OSError(110, "Connection timed out")
        return whole

    whole = json.loads((two_steps[0] / "checkpoints" / "4" / "meta" / "metadata").read_text())
    monkeypatch.setattr(stored_step.ocp.JsonCheckpointHandler, "restore", restore_meta)
    limit = 3
    assert checkpoint.load_params(two_steps[0])[1]["step"] == 4 and len(attempts) == 3
    assert "Connection timed out; trying again" in caplog.text
    limit = 99
    why = "cannot be read at the moment: .*Connection timed out"
    with run_in(two_steps[0]) as checkpoints, pytest.raises(CheckpointError, match=why) as error:
        checkpoints.restore_newest(make_abstract(two_steps[1]))
    assert not isinstance(error.value, DamagedError) and stored_step.steps_in(checkpoints.folder) == [2, 4]


def test_what_counts_as_damage():
    of_file = [FileNotFoundError("x"), OSError(5, "Input/output error"), OSError("no number")]
    of_contents = [KeyError("a"), json.JSONDecodeError("a", "b", 0)]
    of_contents += [ValueError("DATA_LOSS: a"), ValueError('Error opening "zarr" driver: b')]
    damage = of_file + of_contents
    storage = [OSError(110, "timed out"), PermissionError(13, "denied"), OSError(24, "Too many open files")]
    storage += [ValueError("UNAVAILABLE: a"), ValueError("PERMISSION_DENIED: b"), MemoryError()]
    assert not any(map(stored_step.about_storage, damage)) and all(map(stored_step.about_storage, storage))
    error = """DATA_LOSS: Error opening "zarr" driver: in "/a/b": CRC-32C failed; at byte 4 [source locations='x']"""
    assert stored_step.brief(ValueError(error)) == "DATA_LOSS: CRC-32C failed; at byte 4"
