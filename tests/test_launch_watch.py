"""Runs on TPU VMs against a gcloud that fails in the ways of the real one: followed, preempted, brought back."""

from __future__ import annotations

import pytest
from fake_cloud import CAPACITY, PLACE, REMOVE, TRAINER, Cloud

from launch import watch
from launch.workers import Status


@pytest.fixture
def cloud(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "PATIENCE", 2)
    return Cloud(tmp_path, monkeypatch, capsys)


# ---- runs


def test_run_follows_the_log_and_collects_all_codes(cloud):
    cloud.play(runs=[{"polls": 2, "codes": [0, 0], "log": "step 1\nstep 2\n"}])
    cloud.create()
    code, text = cloud.run("run", "r1")
    assert code == 0 and text.count("step 2") == 1 and "done: the job is done: exit code 0 on all 2 machines." in text
    assert "costing money" in text and REMOVE in text


def test_one_worker_that_fails_is_named(cloud):
    cloud.play(runs=[{"codes": [0, 2]}])
    cloud.create()
    code, text = cloud.run("watch", "r1")
    assert code == 1 and "slice 0 worker 1: exited 2 (could not start)" in text
    assert cloud.count("tpu-vm create") == 1


def test_unreachable_worker_is_named_and_the_job_moved(cloud):
    cloud.play(runs=[{"polls": 99, "unreachable": [1]}, {"codes": [0]}])
    cloud.create()
    code, text = cloud.run("watch", "r1")
    assert code == 0 and "no answer from slice 0 worker 1, 2 of 2 times" in text and "Restart 1 of 20" in text
    assert cloud.count("tpu-vm create") == 2


@pytest.mark.parametrize("flags", [["--spot"], ["--slices=2", "--spot"]])
def test_preempted_job_is_made_anew_and_finishes(cloud, flags):
    match = "resources create" if "--slices=2" in flags else "vm create"
    full = {"match": match, "skip": 1, "times": 2, "err": CAPACITY}
    cloud.play(runs=[{"polls": 1, "preempt": True}, {"codes": [0]}], failures=[full])
    cloud.create(*flags)
    code, text = cloud.run("watch", "r1", "--delete-when-done")
    assert code == 0 and "were taken away" in text and text.count("Asking again in") == 2 and "done:" in text
    assert "Nothing of r1 is allocated" in text
    starts = [call.split("--command=")[1] for call in cloud.calls() if "worker.sh start" in call]
    slices = 2 if "--slices=2" in flags else 1
    assert len(starts) == 2 * slices and starts[:slices] == starts[slices:]


def test_trainer_that_was_told_to_stop_goes_on_where_it_was(cloud):
    cloud.play(runs=[{"codes": [75], "log": "step 1\n"}, {"codes": [0], "log": "step 1\nstep 2\n"}])
    code, text = cloud.create("--watch")
    assert code == 0 and text.count("step 1") == text.count("step 2") == 1
    assert cloud.count("tpu-vm create") == 1
    assert cloud.count("worker.sh start") == 2


@pytest.mark.parametrize("skip", (5, 7, 8))
def test_healthy_machines_outlive_a_blip_of_the_launchers_network(cloud, skip):
    """Whenever it comes: while a run is followed, after its end, before it is started again."""
    blip = {"match": "describe", "skip": skip, "times": 3, "err": "ERROR: (gcloud) Network is unreachable"}
    cloud.play(runs=[{"codes": [75], "log": "step 1\n"}, {"codes": [0], "log": "step 2\n"}], failures=[blip])
    cloud.create()
    code, text = cloud.run("watch", "r1")
    assert code == 0 and "could not be asked, again in" in text, text
    assert cloud.count("tpu-vm create") == 1 and not cloud.count("tpu-vm delete")


def test_budget_of_restarts(cloud):
    cloud.play(runs=[{"codes": [75, 134]}])
    cloud.create()
    code, text = cloud.run("watch", "r1", "--restarts=1")
    assert code == 75 and "All 1 restarts are spent" in text and "costing money" in text and REMOVE in text
    assert cloud.count("worker.sh start") == 2


def test_run_reports_a_preemption(cloud):
    cloud.play(runs=[{"polls": 1, "preempt": True}])
    cloud.create("--spot")
    code, text = cloud.run("run", "r1")
    assert code == 75 and "r1 is PREEMPTED" in text and "costs nothing, its name is taken" in text and REMOVE in text


@pytest.mark.parametrize(
    ("found", "how"),
    [
        (["running", 0], None),
        (["unreachable", 0], None),
        ([0, 0], "done"),
        ([0, 1], "failed"),
        ([75, 1], "preempted"),
        ([137, 1], "crashed"),
        (["lost", 1], "crashed"),
        ([76, 76], "crashed"),
        (["lost", 76], "crashed"),
        ([137, 76], "crashed"),
        ([134, 134], "crashed"),
        # The culprit's own code counts, not how the others were ended.
        ([76, 1], "failed"),
        ([134, 2], "failed"),
        ([76, 75], "preempted"),
        (["none", 0], "lost"),
        (["stopped", 75], "stopped"),
    ],
)
def test_how_a_run_ended(found, how):
    end = watch.judge([Status(0, i, *(("exited", x) if isinstance(x, int) else (x, -1))) for i, x in enumerate(found)])
    assert (end and end.how) == how




def test_trainers_that_wait_for_a_dead_one_are_stopped(cloud):
    cloud.play(runs=[{"codes": [None, 139]}, {"codes": [0]}])
    cloud.create()
    code, text = cloud.run("watch", "r1")
    assert code == 0 and "slice 0 worker 1: exited 139 (killed by signal 11)" in text
    assert cloud.count("worker.sh stop") == 1 and cloud.count("tpu-vm create") == 1


def test_watch_continues_what_ended_before(cloud):
    cloud.play(runs=[{"codes": [75]}, {"codes": [0]}])
    cloud.create()
    assert cloud.run("watch", "r1", "--restarts=0")[0] == 75
    assert cloud.run("watch", "r1", "--restarts=0")[0] == 0
    assert cloud.run("watch", "r1")[1].startswith("done:") and cloud.count("worker.sh start") == 2


def test_machines_that_fail_while_they_are_made_ready_cost_a_restart(cloud):
    broken = {"match": "worker.sh install", "skip": 1, "times": 1, "err": "E: disk full"}
    cloud.play(runs=[{"polls": 1, "preempt": True}, {"codes": [0]}], failures=[broken])
    cloud.create("--spot")
    code, text = cloud.run("watch", "r1")
    assert code == 0 and "disk full. Restart 2 of 20" in text and cloud.count("tpu-vm create") == 3


def test_quota_that_is_gone_after_a_preemption_ends_the_watch(cloud):
    refusal = {"match": "tpu-vm create", "skip": 1, "err": "Quota limit 'X' has been exceeded."}
    cloud.play(runs=[{"polls": 1, "preempt": True}], failures=[refusal])
    cloud.create("--spot")
    code, text = cloud.run("watch", "r1")
    assert code == 3 and "quota" in text and "Nothing of r1 is allocated; nothing costs money." in text


def test_slice_that_is_silent_is_not_asked_machine_by_machine(cloud):
    cloud.play(hosts=8, runs=[{"polls": 99, "unreachable": list(range(8))}])
    cloud.run("create", "r1", "--topology=v4-64", *PLACE, "--skip-check", *TRAINER)
    cloud.run("run", "r1", "--detach")
    assert cloud.run("status", "r1")[1].count("unreachable") == 8
    assert cloud.count("worker.sh status") == 4


def test_interrupt_of_the_launcher_says_what_goes_on(cloud, monkeypatch):
    cloud.play(runs=[{"polls": 99}])
    cloud.create()
    monkeypatch.setattr(watch.workers, "log_since", interrupt)
    code, text = cloud.run("run", "r1")
    assert code == 130 and "what runs on the machines goes on" in text and "costing money" in text and REMOVE in text


def interrupt(*_):
    raise KeyboardInterrupt
