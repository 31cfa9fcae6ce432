"""The same job as a JobSet on GKE: by xpk, or as a manifest for kubectl.

    python -m launch.xpk create NAME --topology=v4-128 [--slices=2] --cluster=C --project=P --zone=Z --image=IMAGE \\
        [--manifest=FILE] [--dry-run] -- --config=configs/4m_l.py --workdir=gs://BUCKET/NAME
    python -m launch.xpk delete NAME --cluster=C --project=P --zone=Z [--dry-run]

``create`` submits the job by xpk, whose controller makes it anew after a preemption; the cluster's node pools must have
the slices. With ``--manifest`` it writes the JobSet to a file instead, for ``kubectl apply -f FILE``, and submits
nothing. IMAGE holds the checkout in its working folder, and fm4m with [tpu,data]; it is the commit that runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from typing import Any

from fm4m import exit_codes
from fm4m.files import complete_file
from launch import jobs, runtime
from launch.gcloud import LaunchError, Runner
from launch.jobs import Job

# Of process 0, for the others to join it.
PORT = 8476
# What Kubernetes waits between the notice of a preemption and the end: time to save.
GRACE_SECONDS = 300


def trainer_command(job: Job) -> list[str]:
    return ["python", "-m", "fm4m.train", *job.arguments]


def xpk_create(job: Job, cluster: str, image: str, restarts: int) -> list[str]:
    """The xpk command that submits a job. By itself xpk restarts on exit codes 42 and 127 to 255."""
    codes = f"{exit_codes.PREEMPTED},{exit_codes.HUNG}"
    return [
        "xpk", "workload", "create", f"--workload={job.name}", f"--cluster={cluster}", f"--project={job.project}",
        f"--zone={job.zone}", f"--tpu-type={runtime.accelerator_type(job.where)}", f"--num-slices={job.slices}",
        f"--docker-image={image}", f"--max-restarts={restarts}", f"--restart-on-exit-codes={codes}",
        f"--termination-grace-period-seconds={GRACE_SECONDS}",
        f"--env=FM4M_RUN_NAME={job.name}", f"--command={shlex.join(trainer_command(job))}",
    ]  # fmt: skip


def xpk_delete(name: str, cluster: str, project: str, zone: str) -> list[str]:
    """The xpk command that ends a job; the node pools stay."""
    return [
        "xpk", "workload", "delete", f"--workload={name}", f"--cluster={cluster}", f"--project={project}",
        f"--zone={zone}", "--force",
    ]  # fmt: skip


def nodes(job: Job) -> int:
    """Machines of one slice."""
    return math.prod(job.where.shape) // job.where.chips_per_node


def manifest(job: Job, image: str, restarts: int) -> dict[str, Any]:
    """The JobSet: a Kubernetes job for each slice, a pod for each machine, each slice on a node pool of its own.

    A trainer that was preempted, killed or hung makes all slices start again, at most ``restarts`` times; one that
    failed by itself (exit codes 1 and 2) ends the job. Every pod gets the same command; its number comes from
    Kubernetes.
    """
    hosts, chips = nodes(job), str(job.where.chips_per_node)
    environment: list[dict[str, Any]] = [
        {"name": "FM4M_RUN_NAME", "value": job.name},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
    ]
    command = trainer_command(job)
    if hosts * job.slices > 1:
        label = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
        environment += [
            {"name": "FM4M_SLICE", "valueFrom": label},
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{job.name}-slice-0-0.{job.name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(hosts * job.slices)},
        ]
        # exec, so that the trainer and not the shell gets the notice of a preemption.
        number = f'export JAX_PROCESS_ID=$((FM4M_SLICE * {hosts} + JOB_COMPLETION_INDEX)); exec "$@"'
        command = ["bash", "-c", number, "start", *command]
    container = {
        "name": "trainer",
        "image": image,
        "command": command,
        "env": environment,
        "ports": [{"containerPort": PORT}, {"containerPort": 8471}],
        "resources": {"limits": {"google.com/tpu": chips}},
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": runtime.generation(job.where).gke,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, job.where.shape)),
    }
    if job.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "containers": [container],
    }
    if job.slices > 1:  # the network between slices, without the detour through that of the pods
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    by_itself = {"operator": "In", "values": [exit_codes.FAILED, exit_codes.CANNOT_START]}
    one_slice = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": by_itself}]},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "labels": {"fm4m-run": job.name},
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "failurePolicy": {
                "maxRestarts": restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": job.slices, "template": {"spec": one_slice}}],
        },
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, 2 for a wrong command, or 3 if xpk failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser().parse_args(argv[:cut])
    place = (options.cluster, options.project, options.zone)
    runner = Runner(options.dry_run)
    try:
        jobs.check_name(options.name)
        remove = xpk_delete(options.name, *place)
        if options.verb == "delete":
            runner.check(remove, f"deleting {options.name}", timeout=None)
            runner.say("the job is deleted; the cluster and its node pools stay, and cost money.")
            return exit_codes.DONE
        capacity = "spot" if options.spot else "on-demand"
        job = Job(
            options.name, options.topology, options.project, options.zone, options.slices, capacity,
            arguments=tuple(argv[cut + 1 :]),
        )  # fmt: skip
        job = dataclasses.replace(job, machines=nodes(job))
        jobs.check_run(job)
        if job.slices > 1 and nodes(job) == 1:
            # "Deploy TPU Multislices in GKE": only then does it tell the slices of each other (MEGASCALE_NUM_SLICES).
            raise LaunchError(f"GKE joins several slices only where each has several machines; {job.topology} has one")
        written = json.dumps(manifest(job, options.image, options.restarts), indent=2) + "\n"
    except LaunchError as error:
        print(f"error: {str(error).rstrip('.')}.", file=sys.stderr)
        wrong = error.kind == "usage" or (error.kind == "other" and options.verb == "create")
        return exit_codes.CANNOT_START if wrong else 3
    runner.say(job.describe())
    if options.manifest:
        if runner.dry_run:
            print(written, end="")
        else:
            try:
                with complete_file(options.manifest) as path:
                    path.write_text(written)
            except OSError as error:
                print(f"error: the manifest cannot be written: {error}", file=sys.stderr)
                return exit_codes.CANNOT_START
        runner.say(f"submit it: kubectl apply -f {shlex.quote(options.manifest)}; nothing was submitted.")
        runner.say(f"Its node pools cost money with or without the job. Clean up: kubectl delete jobset {job.name}")
        return exit_codes.DONE
    code = exit_codes.DONE
    try:
        runner.check(xpk_create(job, options.cluster, options.image, options.restarts), "submitting", timeout=None)
        runner.say(f"submitted; its log: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name={job.name}")
    except LaunchError as error:
        print(f"error: {str(error).rstrip('.')}.", file=sys.stderr)
        code = 3
    finally:
        runner.say(f"Node pools of the cluster cost money with or without the job. Clean up: {shlex.join(remove)}")
    return code


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m launch.xpk", description=__doc__.split("\n")[0], allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", required=True)
    for name, about in (("create", "Submits a job, or writes its manifest."), ("delete", "Ends and deletes a job.")):
        verb = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        verb.add_argument("name")
        for flag in ("cluster", "project", "zone"):
            verb.add_argument(f"--{flag}", required=True)
        verb.add_argument("--dry-run", action="store_true", help="print the command or manifest only")
        if name == "create":
            verb.add_argument("--topology", required=True, help="slice type, such as v4-128")
            verb.add_argument("--slices", type=int, default=1)
            verb.add_argument("--image", required=True, help="container image")
            verb.add_argument("--spot", action="store_true", help="manifest: on node pools of spot machines")
            verb.add_argument("--restarts", type=int, default=20)
            verb.add_argument("--manifest", default="", help="write the JobSet to this file instead of submitting")
    return top


if __name__ == "__main__":
    sys.exit(main())
