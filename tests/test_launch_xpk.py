"""The job as a JobSet on GKE: command and manifest."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest

from launch import jobs, xpk

PLACE = ("--cluster=c", "--project=p", "--zone=us-central2-b")
TRAINER = ("--", "--config=configs/4m_l.py", "--workdir=gs://bucket/r1")
ARGUMENTS = TRAINER[1:]


def test_dry_run_prints_the_command_of_xpk(capsys):
    code = xpk.main(["create", "r1", "--topology=v5e-64", "--slices=2", "--image=i", "--dry-run", *PLACE, *TRAINER])
    out = capsys.readouterr().out
    command = shlex.split(next(line for line in out.splitlines() if line.startswith("xpk ")))
    assert code == 0 and {"--tpu-type=v5litepod-64", "--num-slices=2", "--restart-on-exit-codes=75,76"} <= set(command)
    assert f"--command=python -m fm4m.train {shlex.join(ARGUMENTS)}" in command
    assert "Clean up: xpk workload delete --workload=r1" in out


@pytest.mark.parametrize(
    ("topology", "slices", "accelerator", "shape", "hosts", "chips"),
    [
        ("v4-128", 1, "tpu-v4-podslice", "4x4x4", 16, "4"),
        ("v4-128", 2, "tpu-v4-podslice", "4x4x4", 16, "4"),
        ("v5e-64", 2, "tpu-v5-lite-podslice", "8x8", 16, "4"),
        ("v5p-8", 1, "tpu-v5p-slice", "2x2x1", 1, "4"),
        ("v6e-8", 2, "tpu-v6e-slice", "2x4", 2, "4"),
    ],
)
def test_manifest_has_a_pod_for_each_machine(topology, slices, accelerator, shape, hosts, chips):
    job = jobs.Job("r1", topology, "p", "z", slices, arguments=ARGUMENTS)
    spec = xpk.manifest(job, "image", 5)["spec"]
    replicated = spec["replicatedJobs"][0]
    one = replicated["template"]["spec"]
    pod = one["template"]["spec"]
    container = pod["containers"][0]
    assert replicated["replicas"] == slices and one["parallelism"] == one["completions"] == hosts
    assert sorted(pod["nodeSelector"].values()) == sorted([accelerator, shape])
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert int(chips) * hosts * slices == job.where.chips
    assert spec["failurePolicy"]["maxRestarts"] == 5
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert environment.get("JAX_NUM_PROCESSES") == (str(hosts * slices) if hosts * slices > 1 else None)


def test_pods_number_themselves(tmp_path):
    job = jobs.Job("r1", "v4-16", "p", "z", 2, arguments=(*ARGUMENTS, "--config.x=a b; exit 9"))
    pod = xpk.manifest(job, "image", 1)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (tmp_path / "python").write_text('#!/bin/sh\necho $JAX_PROCESS_ID; for a in "$@"; do echo "$a"; done\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FM4M_SLICE": "1", "JOB_COMPLETION_INDEX": "1"}
    done = subprocess.run(pod["containers"][0]["command"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["3", "-m", "fm4m.train", *job.arguments]


def test_manifest_file_is_json(tmp_path, capsys):
    path = tmp_path / "job.json"
    command = ["create", "r1", "--topology=v4-16", "--image=i", "--spot", f"--manifest={path}", *PLACE, *TRAINER]
    assert xpk.main([*command[:5], "--dry-run", *command[5:]]) == 0 and not path.exists()
    assert xpk.main(command) == 0 and json.loads(path.read_text())["kind"] == "JobSet"
    assert "nothing was submitted" in capsys.readouterr().out


def test_several_slices_of_one_machine_are_refused(capsys):
    flags = ("--slices=2", "--image=i", "--dry-run")
    assert xpk.main(["create", "r1", "--topology=v6e-4", *flags, *PLACE, *TRAINER]) == 2
    assert "only where each has several machines; v6e-4 has one" in capsys.readouterr().err
    # A TPU VM of 8 chips is two nodes on GKE.
    assert xpk.main(["create", "r1", "--topology=v6e-8", *flags, *PLACE, *TRAINER]) == 0
    assert "16 chips in 4 machines" in capsys.readouterr().out


def test_missing_xpk_is_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert xpk.main(["create", "r1", "--topology=v4-16", "--image=i", *PLACE, *TRAINER]) == 3
    said = capsys.readouterr()
    assert "pip install xpk" in said.err and "Clean up: xpk workload delete" in said.out
    assert xpk.main(["create", "R 1", "--topology=v4-16", "--image=i", *PLACE, *TRAINER]) == 2
