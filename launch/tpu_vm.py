"""Training jobs on TPU VMs, by the gcloud command line tool.

    python -m launch.tpu_vm create NAME --topology=v4-128 --project=P --zone=Z -- --config=configs/4m_l.py \\
        --workdir=gs://BUCKET/NAME        checks that the step fits, makes the machines, ships the commit, installs
    python -m launch.tpu_vm run NAME      starts the trainer on all machines and follows it
    python -m launch.tpu_vm watch NAME    the same, and brings it back after every preemption
    python -m launch.tpu_vm {status,logs,stop,delete} NAME, or list

``--dry-run`` prints the commands of any of these and runs none. Every command ends with what is allocated and costs
money, and how to clean up.

Exit codes: 0; 1 if the trainer failed; 2 for a wrong command; 3 if Google Cloud refused; 75 if the job was preempted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

from fm4m import exit_codes
from launch import jobs, machines, source, watch, workers
from launch.gcloud import LaunchError, Runner
from launch.jobs import Job

CLOUD_REFUSED = 3


def main(argv: list[str] | None = None, runner: Runner | None = None) -> int:
    """The command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser().parse_args(argv[:cut])
    runner = runner or Runner(options.dry_run)
    try:
        job = _job(options, tuple(argv[cut + 1 :]))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.CANNOT_START
    code = exit_codes.DONE
    try:
        code = options.command(runner, job, options)
    except LaunchError as error:
        print(f"error: {str(error).rstrip('.')}.", file=sys.stderr)
        code = exit_codes.CANNOT_START if error.kind == "usage" else CLOUD_REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted here; what runs on the machines goes on.", file=sys.stderr)
        code = 130
    if job is not None:
        _ending(runner, job)
    return code


def _ending(runner: Runner, job: Job) -> None:
    if runner.dry_run:
        runner.say("what is allocated then:")
        machines.look(runner, job)
        runner.say(f"to clean up: {job.clean_up()}")
    else:
        print(machines.costs(runner, job), flush=True)


def _job(options: argparse.Namespace, arguments: tuple[str, ...]) -> Job | None:
    """The job of the command line, a new or a remembered one. Raises LaunchError."""
    if options.verb == "list":
        return None
    if options.verb == "create":
        queued = options.queued or options.slices > 1
        capacity = "spot" if options.spot else "reserved" if options.reserved else "on-demand"
        job = Job(
            options.name, options.topology, options.project, options.zone, options.slices, capacity, queued,
            arguments=arguments, network=options.network, service_account=options.service_account,
        )  # fmt: skip
        jobs.check_run(job)
        return job
    if arguments and options.verb not in ("run", "watch"):
        raise LaunchError(f"{options.verb} takes no arguments after --")
    job = jobs.load(options.name)
    if arguments:
        job = dataclasses.replace(job, arguments=arguments)
        jobs.check_run(job)
    return job


# ---- the commands


def create(runner: Runner, job: Job, options: argparse.Namespace) -> int:
    """Checks, makes the machines, ships and installs."""
    job = dataclasses.replace(job, commit=source.resolve(runner, options.allow_dirty))
    runner.say(job.describe())
    if not options.skip_check:
        compile_check(runner, job, options.full_check)
    if machines.look(runner, job):
        raise LaunchError(
            f"{job.name} exists already in {job.zone}; it was not touched, may be somebody else's. Take another name",
            "exists",
        )
    if not runner.dry_run and job.name in jobs.remembered():
        old = jobs.load(job.name)
        # Its file would be replaced, and with it the only memory of machines that cost money.
        if old.place != job.place and machines.look(runner, old):
            raise LaunchError(
                f"{job.name} has machines already, in {old.project}/{old.zone}. Delete them first (python -m "
                f"launch.tpu_vm delete {job.name}), or take another name",
                "exists",
            )
    source.pack(runner, job.name, job.commit)
    if not runner.dry_run:
        jobs.save(job)
    machines.create(runner, job)
    job = watch.prepare(runner, job, options.wait_hours * 60, options.poll)
    if options.watch:
        workers.start(runner, job)
        return watch_job(runner, job, options)
    runner.say(f"ready. Start it: python -m launch.tpu_vm watch {job.name}")
    return exit_codes.DONE


def compile_check(runner: Runner, job: Job, full: bool) -> None:
    """Compiles the step for the slices; shows chips, days and chip-hours. Raises LaunchError if it does not fit."""
    flags = [a for a in job.arguments if not a.lstrip("-").startswith("workdir=")]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "aot.json"
        command = [sys.executable, "-m", "fm4m.aot", *flags, f"--topology={job.where.name}", f"--slices={job.slices}"]
        command += [] if full else ["--fast"]
        result = runner.run([*command, f"--json={'aot.json' if runner.dry_run else path}"], timeout=3600)
        if runner.dry_run:
            return
        if result.code:
            words = {1: "it does not fit its chips", 2: "it cannot be compiled"}.get(result.code, "the compiler failed")
            raise LaunchError(f"compile check: {words}: {result.last_words()}. --skip-check goes on without", "usage")
        numbers = json.loads(path.read_text())[0]
    runner.say(forecast(job, numbers))


def forecast(job: Job, numbers: dict) -> str:
    """Chips, days and chip-hours in a sentence, from the compile check's numbers: predicted, or the least there can be.

    Only a compilation to the end has a schedule to predict from; the least is every operation at its roof.
    """

    def chip_hours(days: float) -> str:
        return f"{days * 24 * job.where.chips:,.0f}"

    text = f"compile check: fits; {job.where.chips} chips"
    if estimate := numbers.get("estimate"):
        soon, late = estimate["expected_days"]
        hours = f"{chip_hours(soon)} to {chip_hours(late)} chip-hours"
        return f"{text}; predicted {_days(soon)} to {_days(late)} days, {hours}"
    least = numbers["roofline"]["floor_days"]
    return (
        f"{text}; at least {_days(least)} days, {chip_hours(least)} chip-hours (every operation at its roof; "
        "--full-check, some minutes, predicts)"
    )


def _days(days: float) -> str:
    return f"{days:.1f}" if days >= 1 else f"{days:.2g}"


def run(runner: Runner, job: Job, options: argparse.Namespace) -> int:
    """Starts the trainer on all machines, follows worker 0's log and collects all exit codes."""
    seen = machines.look(runner, job)
    if not runner.dry_run and not machines.ready(job, seen):
        raise LaunchError(f"the machines of {job.name} are not up; the command watch would make them")
    if not runner.dry_run:
        jobs.save(job)
    workers.start(runner, job)
    if options.detach:
        runner.say(f"started. Its log: python -m launch.tpu_vm logs {job.name} --follow")
        return exit_codes.DONE
    end = watch.follow(runner, job, options.poll)
    runner.say(f"{end.how}: {end.why}.")
    return end.code


def watch_job(runner: Runner, job: Job, options: argparse.Namespace) -> int:
    """Follows the job and brings it back after preemptions."""
    if not runner.dry_run:
        jobs.save(job)
    job, end = watch.watch(runner, job, options.restarts, options.poll, options.wait_hours * 60)
    runner.say(f"{end.how}: {end.why}.")
    if options.delete_when_done and (end.how == "done" or runner.dry_run):
        machines.delete(runner, job)
    return end.code


def status(runner: Runner, job: Job, options: argparse.Namespace) -> int:
    """What Google Cloud knows of the job, and how the trainer of every machine is."""
    runner.say(f"{job.describe()}; commit {job.commit[:12]}; {job.workdir}")
    if runner.dry_run or machines.ready(job, machines.look(runner, job)):
        found = workers.statuses(runner, job)
        for one in found if not runner.dry_run else ():
            print(one.describe())
        end = None if runner.dry_run else watch.judge(found)
        runner.say(f"{end.how}: {end.why}." if end else "running, or not to be known.")
    return exit_codes.DONE


def logs(runner: Runner, job: Job, options: argparse.Namespace) -> int:
    """The end of a machine's log."""
    if not 0 <= options.slice < job.slices or not 0 <= options.worker < job.hosts_per_slice:
        numbers = f"--slice={options.slice} --worker={options.worker}"
        raise LaunchError(f"{numbers}: the job has {job.slices} slices of {job.hosts_per_slice} workers", "usage")
    node = job.nodes[options.slice]
    code = runner.attach(workers.tail_command(job, node, options.worker, options.lines, options.follow))
    if code:
        raise LaunchError(f"the log of {node} worker {options.worker} could not be read; gcloud's words are above")
    return exit_codes.DONE


def stop(runner: Runner, job: Job, options: argparse.Namespace) -> int:
    """Tells the trainer on all machines to save and end; the machines stay."""
    workers.stop(runner, job)
    runner.say("stopped on all machines; the run continues from its checkpoint with the command run or watch.")
    return exit_codes.DONE


def delete(runner: Runner, job: Job, options: argparse.Namespace) -> int:
    """Deletes the machines and forgets the job; its run folder stays."""
    machines.delete(runner, job)
    if not runner.dry_run:
        if left := machines.look(runner, job):
            raise LaunchError(f"still there after deleting: {', '.join(f'{s.name} {s.state}' for s in left)}")
        jobs.forget(job.name)
        source.archive_path(job.name).unlink(missing_ok=True)
    runner.say(f"deleted; the run folder {job.workdir} was not touched.")
    return exit_codes.DONE


def list_all(runner: Runner, job: None, options: argparse.Namespace) -> int:
    """All TPUs and requests of a project's zone, and the jobs that are remembered here."""
    place = [f"--project={options.project}", f"--zone={options.zone}"]
    columns = "--format=table(name.basename(),state,acceleratorType.basename(),labels.fm4m-run)"
    for kind, table in (("tpu-vm", columns), ("queued-resources", "--format=table(name.basename(),state.state)")):
        result = runner.check([*machines.TPUS, kind, "list", *place, table], f"listing in {options.zone}")
        if not runner.dry_run:
            print(f"{kind}:\n{result.out.rstrip() or '  none'}")
    known = ", ".join(sorted(path.stem for path in jobs.folder().glob("*.json"))) or "none"
    runner.say(f"jobs created from this account: {known}. A tpu-vm that is READY or CREATING costs money.")
    runner.say("Clean up: python -m launch.tpu_vm delete NAME")
    return exit_codes.DONE


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = __doc__.split("\n")[0]
    top = argparse.ArgumentParser(prog="python -m launch.tpu_vm", description=about, allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", required=True)

    def add(name: str, command, place: bool = False) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=command.__doc__, description=command.__doc__, allow_abbrev=False)
        verb.set_defaults(command=command)
        verb.add_argument("--dry-run", action="store_true", help="print all commands, run none")
        if name != "list":
            verb.add_argument("name", help="of the run and its machines")
        if place:
            verb.add_argument("--project", required=True)
            verb.add_argument("--zone", required=True)
        if name in ("create", "run", "watch"):
            verb.add_argument("--poll", type=float, default=30, help="seconds between two looks")
        if name in ("create", "watch"):
            verb.add_argument("--wait-hours", type=float, default=24, help="how long to wait for machines")
            verb.add_argument("--restarts", type=int, default=20, help="how often to bring the job back")
            verb.add_argument("--delete-when-done", action="store_true", help="delete the machines in the end")
        return verb

    verb = add("create", create, place=True)
    verb.add_argument("--topology", required=True, help="slice type, such as v4-128")
    verb.add_argument("--slices", type=int, default=1, help="more than one implies --queued")
    verb.add_argument("--queued", action="store_true", help="a queued resource: waits until there are machines")
    capacity = verb.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="cheaper, can be taken away at any time")
    capacity.add_argument("--reserved", action="store_true", help="of the project's reservation")
    verb.add_argument("--watch", action="store_true", help="then start and watch it, all in one command")
    verb.add_argument("--network", default="")
    verb.add_argument("--service-account", default="")
    verb.add_argument("--allow-dirty", action="store_true", help="ship changes that are not committed")
    check = verb.add_mutually_exclusive_group()
    check.add_argument("--skip-check", action="store_true", help="no compile check")
    check.add_argument("--full-check", action="store_true", help="compile in full, minutes: predicts days, chip-hours")
    add("run", run).add_argument("--detach", action="store_true", help="start and return")
    add("watch", watch_job)
    add("status", status)
    verb = add("logs", logs)
    verb.add_argument("--slice", type=int, default=0)
    verb.add_argument("--worker", type=int, default=0)
    verb.add_argument("--lines", type=int, default=100)
    verb.add_argument("--follow", action="store_true")
    add("stop", stop)
    add("delete", delete)
    add("list", list_all, place=True)
    return top


if __name__ == "__main__":
    sys.exit(main())
