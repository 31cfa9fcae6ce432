"""Jobs on TPU VMs against a gcloud that fails in the ways of the real one: what is asked for, and refused."""

from __future__ import annotations

import pathlib
import shlex

import pytest
from fake_cloud import CAPACITY, PLACE, REMOVE, TRAINER, Cloud

from launch import jobs, tpu_vm
from launch.gcloud import Result, Runner

QUOTA = "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV4PerProjectPerZone' has been exceeded. Limit: 0"
NO_KEY = "user@1.2.3.4: Permission denied (publickey). ERROR: (gcloud.compute.tpus.tpu-vm.ssh) Could not SSH"


@pytest.fixture
def cloud(tmp_path, monkeypatch, capsys):
    return Cloud(tmp_path, monkeypatch, capsys)


# ---- what is asked for


@pytest.mark.parametrize(
    ("topology", "image", "accelerator"),
    [
        ("v4-128", "tpu-ubuntu2204-base", "v4-128"),
        ("v5e-64", "v2-alpha-tpuv5-lite", "v5litepod-64"),
        ("v5p-128", "v2-alpha-tpuv5", "v5p-128"),
        ("v6e-64", "v2-alpha-tpuv6e", "v6e-64"),
    ],
)
def test_each_generation_has_its_image_and_name(cloud, topology, image, accelerator):
    code, text = cloud.run("create", "r1", "--dry-run", f"--topology={topology}", *PLACE, *TRAINER)
    made = next(line for line in text.splitlines() if "tpu-vm create" in line)
    assert code == 0 and f"--version={image} " in made and f"--accelerator-type={accelerator} " in made


def test_dry_run_prints_everything_and_runs_nothing(cloud):
    flags = ("--dry-run", "--watch", "--slices=2", "--spot", "--topology=v5p-16")
    code, text = cloud.run("create", "r1", *flags, *PLACE, *TRAINER)
    commands = [line for line in text.splitlines() if not line.startswith("#")]
    assert code == 0 and cloud.calls() == [] and not jobs.folder().exists()
    made = [line for line in commands if "queued-resources create" in line]
    assert len(made) == 2 and all("--node-count=2 --node-prefix=r1" in line and "--spot" in line for line in made)
    assert "-m fm4m.aot --config=configs/4m_l.py --topology=v5p-16 --slices=2 --fast" in text
    starts = [line for line in commands if "worker.sh start" in line][:2]
    assert starts[0].replace("ssh r1-0", "ssh r1-1") == starts[1]
    assert "start r1 4 " in starts[0]
    assert "--config=configs/4m_l.py --workdir=gs://bucket/r1" in starts[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["create", "Run_1", "--topology=v4-16", *PLACE, *TRAINER], "cannot be the name of a run"),
        (["create", "r;rm", "--topology=v4-16", *PLACE, *TRAINER], "cannot be the name of a run"),
        (["create", "r1", "--topology=v4-100", *PLACE, *TRAINER], "the nearest: v4-64 and v4-128"),
        (["create", "r1", "--topology=v4-16", "--project=p", "--zone=$(x)", *TRAINER], "not a name"),
        (["create", "r1", "--topology=v4-16", *PLACE, "--", "--workdir=gs://b/r"], "--config is missing"),
        (["create", "r1", "--topology=v4-16", *PLACE, "--", "--config=c.py", "--workdir=runs/x"], "disk of its own"),
        (["create", "r1", "--topology=v4-8", "--spot", *PLACE, "--", "--config=c.py", "--workdir=r"], "disk is lost"),
        (["status", "never-made"], "no job never-made was created"),
    ],
)
def test_wrong_commands_are_refused_before_anything_is_asked(cloud, argv, words):
    code, text = cloud.run(*argv)
    assert code == 2 and words in text and cloud.calls() == []


def test_text_of_the_user_reaches_the_remote_shell_quoted(cloud):
    nasty = "--config.data.mixture=x; rm -rf ~ $(id) 'q'"
    cloud.create(trainer=(*TRAINER, nasty))
    cloud.run("run", "r1", "--detach")
    started = next(call for call in cloud.calls() if "worker.sh start" in call)
    assert nasty in shlex.split(started.split("--command=", 1)[1])


# ---- refusals


@pytest.mark.parametrize(("message", "words"), [(QUOTA, "quota"), (CAPACITY, "no free machines")])
@pytest.mark.parametrize("queued", [False, True])
def test_refused_create_says_why_and_that_nothing_costs(cloud, message, words, queued):
    kind = "queued-resources create" if queued else "tpu-vm create"
    cloud.play(failures=[{"match": kind, "err": message}])
    code, text = cloud.create(*(["--queued"] if queued else []))
    assert code == 3 and words in text and "Nothing of r1 is allocated; nothing costs money." in text
    assert not cloud.count("tpu-vm scp")


def test_existing_name_is_not_touched(cloud):
    assert cloud.create()[0] == 0
    before = jobs.load("r1")
    code, text = cloud.create(trainer=("--", "--config=other.py", "--workdir=gs://b/other"))
    assert code == 3 and "exists already" in text and "somebody else's" in text
    assert jobs.load("r1") == before
    assert cloud.count("tpu-vm create") == 1 and not cloud.count("tpu-vm delete")


def test_machines_of_the_same_name_in_another_zone_are_not_forgotten(cloud):
    assert cloud.create()[0] == 0
    before = jobs.load("r1")
    elsewhere = ("--project=p", "--zone=us-central2-c", "--skip-check")
    code, text = cloud.run("create", "r1", "--topology=v4-16", *elsewhere, *TRAINER)
    assert code == 3 and f"r1 has machines already, in p/{before.zone}. Delete them first" in text
    assert jobs.load("r1") == before and cloud.count("tpu-vm create") == 1


def test_name_that_comes_to_exist_in_between(cloud):
    cloud.play(failures=[{"match": "tpu-vm create", "err": "ALREADY_EXISTS: the resource already exists"}])
    code, text = cloud.create()
    assert code == 3 and "of that name exists already; it was not touched" in text


def test_ssh_keys_that_arrive_late(cloud):
    cloud.play(failures=[{"match": "tpu-vm scp", "times": 2, "err": NO_KEY}])
    code, text = cloud.create()
    assert code == 0 and text.count("no connection yet") == 2 and cloud.waits == [5, 10]
    assert f"Still allocated: tpu-vm r1 (READY): 8 v4 chips, costing money.\nClean up: {REMOVE}" in text


def test_ssh_keys_that_never_arrive(cloud):
    cloud.play(failures=[{"match": "tpu-vm scp", "err": NO_KEY}])
    code, text = cloud.create()
    assert code == 3 and "no connection by ssh" in text and "costing money" in text and REMOVE in text
    assert sum(cloud.waits) == 300


def test_cloud_that_cannot_be_asked_is_assumed_to_cost(cloud):
    cloud.create()
    cloud.play(failures=[{"match": "describe", "err": "ERROR: gcloud auth login is needed: no active account"}])
    code, text = cloud.run("status", "r1")
    assert code == 3 and "not logged in" in text and "Assume that they cost money" in text and REMOVE in text


def test_queued_resource_waits(cloud):
    cloud.play(waits=3)
    code, text = cloud.create("--slices=2")
    assert code == 0 and "queued-resource r1 WAITING_FOR_RESOURCES" in text
    assert cloud.nodes() == {"r1-0", "r1-1"}
    assert "queued-resources delete r1 --force" in text


def test_queued_resource_that_never_comes(cloud):
    cloud.play(waits=10**6)
    code, text = cloud.create("--queued", "--wait-hours=1", "--poll=600")
    assert code == 3 and "not up after 1.0 hours" in text and "costs from the moment it is granted" in text


# ---- smaller things


def test_stop_status_logs_list_delete(cloud):
    cloud.play(runs=[{"polls": 99, "log": "hello"}])
    cloud.create()
    cloud.run("run", "r1", "--detach")
    assert "slice 0 worker 1: running" in cloud.run("status", "r1")[1]
    assert cloud.run("logs", "r1", "--worker=1")[0] == 0
    assert cloud.run("logs", "r1", "--worker=7")[0] == 2
    assert "r1" in cloud.run("list", *PLACE)[1]
    code, text = cloud.run("stop", "r1")
    assert code == 0 and "costing money" in text
    code, text = cloud.run("delete", "r1")
    assert code == 0 and "Nothing of r1 is allocated" in text and "gs://bucket/r1 was not touched" in text
    assert not list(jobs.folder().iterdir())


def test_forecast_is_days_and_chip_hours():
    job = jobs.Job("r1", "v4-128", "p", "z")
    text = tpu_vm.forecast(job, {"estimate": {"expected_days": [1.0, 2.0]}})
    assert "64 chips" in text and "1.0 to 2.0 days" in text and "1,536 to 3,072 chip-hours" in text
    text = tpu_vm.forecast(job, {"estimate": None, "roofline": {"floor_days": 0.3}})
    assert "64 chips; at least 0.3 days, 461 chip-hours" in text and "--full-check" in text


def test_damaged_job_file_is_a_sentence(cloud):
    jobs.folder().mkdir(parents=True)
    for text in ("{", "[]", '{"name": "r1"}', '{"arguments": 3}'):
        (jobs.folder() / "r1.json").write_text(text)
        code, said = cloud.run("status", "r1")
        assert code == 2 and "not a job file" in said


def test_compile_check_comes_before_anything_is_made(cloud, monkeypatch):
    class Compiler(Runner):
        code, err = 1, "error: it needs 40 GiB of 32 GiB"

        def run(self, command, timeout=None):
            if "fm4m.aot" not in command:
                return super().run(command, timeout)
            assert command[3:-1] == ["--config=configs/4m_l.py", "--topology=v4-16", "--slices=1", "--fast"]
            pathlib.Path(command[-1].removeprefix("--json=")).write_text(
                '[{"estimate": null, "roofline": {"floor_days": 2}}]'
            )
            return Result(self.code, "", self.err if self.code else "")

    argv = ["create", "r1", "--topology=v4-16", *PLACE, *TRAINER]
    assert tpu_vm.main(argv, Compiler()) == 2 and not cloud.count("create")
    said = cloud.capsys.readouterr()
    assert "does not fit its chips: error: it needs 40 GiB" in said.err and "nothing costs money" in said.out
    monkeypatch.setattr(Compiler, "code", 0)
    assert tpu_vm.main(argv, Compiler()) == 0 and "fits; 8 chips; at least 2.0 days" in cloud.capsys.readouterr().out
