"""Runs a plan over worker processes of one machine, puts the finished parts into the set, and says how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipelines import adopt
from data_pipelines.prepare import plan as plan_lib
from data_pipelines.prepare import registration, report
from data_pipelines.prepare.crew import Crew
from data_pipelines.prepare.parts import MAIN, Part
from data_pipelines.prepare.plan import Plan
from data_pipelines.prepare.samples import VALIDATION
from data_pipelines.prepare.sources import Source
from data_pipelines.prepare.writer import SAMPLES, SUFFIX, DiskFull, is_disk_full, read_part
from fm4m.config_file import ConfigError
from fm4m.files import complete_file
from fm4m.modalities import Modality


class Unfinished(RuntimeError):
    """Parts could not be made; what is finished stays, and the same command goes on."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run did.

    Attributes:
      written: names of the modalities that were written.
      report: what report.json holds; {} if there was nothing to do.
      report_folder: where it is.
      module: path of the registration module.
      splits: of the set.
    """

    written: tuple[str, ...]
    report: Mapping[str, Any]
    report_folder: pathlib.Path
    module: pathlib.Path
    splits: tuple[str, ...]


# Makes the parts of a plan that are not there: (plan, parts, progress) -> nothing.
Execute = Callable[[Plan, list[Part], report.Progress], None]


def prepare(
    config: Any,
    out: str | os.PathLike,
    *,
    processes: int = 1,
    sources: Mapping[str, Source] | None = None,
    execute: Execute | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Makes a set, finishes one that was begun, or adds modalities to a finished one.

    Args:
      config: see `data_pipelines.prepare.config`, validated.
      out: the set's folder.
      processes: workers.
      sources: opened sources by `parts.MAIN` ("source") and "validation" instead of the configuration's.
      execute: makes the parts in another way than by worker processes.
      say: gets sentences on what was done.

    Raises:
      ConfigError, ValueError, FileNotFoundError: nothing can be done as configured.
      DiskFull, Unfinished: parts are missing; the same call goes on where this one ended.
    """
    out = pathlib.Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out), _plainly_full(out):
        plan = plan_lib.make_plan(config, out, sources, say)
        if not plan.made_from:
            say(f"{out} has all of {', '.join(plan.present)} already, nothing to do")
            return _finish(config, plan, {})
        for folder in (plan.job.work / "parts").glob(".*"):
            shutil.rmtree(folder, ignore_errors=True)
        _execute(plan, execute or Crew(processes).execute)
        return _finish(config, plan, _commit(plan))


def _execute(plan: Plan, execute: Execute) -> None:
    found = {part.number: read_part(plan.job.folder(part)) for part in plan.parts}
    todo = [part for part in plan.parts if found[part.number] is None]
    for part in todo:
        shutil.rmtree(plan.job.folder(part), ignore_errors=True)
    done = sum(p.stop - p.start for p in plan.parts) - sum(p.stop - p.start for p in todo)
    left_out = sum(sum(part["counts"]["quarantined"].values()) for part in found.values() if part)
    unit = "records" if plan.job.adding else "samples"
    progress = report.Progress(sum(p.stop - p.start for p in plan.parts), done, left_out, unit)
    if done:
        progress.say(f"resuming: {len(plan.parts) - len(todo)} of {len(plan.parts)} parts are finished")
    try:
        if todo:
            execute(plan, todo, progress)
    finally:
        progress.close()
    lacking = [part for part in todo if read_part(plan.job.folder(part)) is None]
    if lacking:
        raise Unfinished(
            f"{len(lacking)} of {len(plan.parts)} parts could not be made, the first being {lacking[0]}. The others "
            "are kept; mend what the lines above say and run the same command again"
        )


def _commit(plan: Plan) -> dict:
    """Puts the parts into the set. Can be repeated."""
    parts = [(plan.job.folder(part), read_part(plan.job.folder(part))) for part in plan.parts]
    modalities = {name: Modality.from_dict(fields) for name, fields in parts[0][1]["counts"]["modalities"].items()}
    splits = sorted({split for _, part in parts for split, found in part["splits"].items() if found["records"]})
    if not splits:
        reasons = report.Counts()
        for _, part in parts:
            reasons.add(part["counts"])
        raise ConfigError(f"not one sample of the source can be used: {dict(reasons.quarantined)}")
    _check_filled(plan, parts)
    problems = {origin: source.problems for origin, source in plan.job.sources.items()}
    about = {"modalities": {name: modality.to_dict() for name, modality in modalities.items()}}
    found = report.write_report(plan.report, parts, {} if plan.job.adding else problems, about)
    for split in splits:
        having = [(path / split, part["splits"][split]) for path, part in parts if split in part["splits"]]
        finished = []
        for name, modality in modalities.items():
            files = [
                {**part["files"][name], "records": part["records"], "keys": part["keys"]} for _, part in having
            ]
            paths = [path / f"{name}{SUFFIX}" for path, _ in having]
            longest = max(file["longest"] for file in files)
            finished.append(adopt.Finished(modality, paths, files, longest, plan.made_from[name]))
        lists = [] if plan.job.adding else [path / SAMPLES for path, _ in having]
        origin = None if plan.job.adding else plan.identity
        adopt.adopt_files(plan.job.out, split, finished, samples=lists, samples_made_from=origin, overwrite=True)
    return found


def _check_filled(plan: Plan, parts: list[tuple[pathlib.Path, dict]]) -> None:
    """Raises ConfigError for a modality that not one record has."""
    for name in plan.made_from:
        files = [found for _, part in parts for found in part["splits"].values()]
        if all(found["files"][name]["empty"] == found["records"] for found in files):
            reasons = report.Counts()
            for _, part in parts:
                reasons.add(part["counts"])
            raise ConfigError(
                f"modalities.{name}: not one sample has it ({dict(reasons.missing.get(name, {})) or 'all are empty'}). "
                f"Nothing was written; see {plan.job.work}/parts/*/quarantine.jsonl, correct or leave out the "
                f"modality, delete {plan.job.work} and run the command again"
            )


def _finish(config: Any, plan: Plan, found: dict) -> Result:
    out = plan.job.out
    splits = tuple(sorted(path.parent.name for path in out.glob("*/manifest.json")))
    module = out / f"{config.name}.py"
    with complete_file(module) as beside:
        beside.write_text(registration.module_text(config.name, out, splits))
    plan_lib.remove_work(out)
    return Result(tuple(plan.made_from), found, plan.report, module, splits)


@contextlib.contextmanager
def _alone(out: pathlib.Path) -> Iterator[None]:
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another command is preparing {out} just now: wait for it, or end it") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _plainly_full(out: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        for folder in (out / plan_lib.WORK / "parts").glob(".*"):
            shutil.rmtree(folder, ignore_errors=True)
        parts = len(list((out / plan_lib.WORK / "parts").glob("[0-9]*")))
        raise DiskFull(
            f"the disk of {out} is full ({error}). The {parts} parts finished so far are kept: free some space and run "
            "the same command again, it goes on from there"
        ) from error


def run(config: Any, out: pathlib.Path, processes: int, execute: Execute | None = None) -> int:
    """`prepare` for a command line: prints the report and the registration. Returns the exit code."""

    def interrupted(signum, frame) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        result = prepare(config, out, processes=processes, execute=execute)
    except KeyboardInterrupt:
        print(f"interrupted: run the same command again to go on where {out} is now", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, ImportError, DiskFull, Unfinished) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DiskFull | Unfinished) else 2
    finally:
        signal.signal(signal.SIGTERM, before)
    if result.written:
        print(f"wrote {', '.join(result.written)} to {out}")
        print(report.summary(result.report, result.report_folder))
        print()
        print(registration.instructions(config.name, result.module.read_text(), result.module, result.splits))
    return 0


__all__ = ["MAIN", "VALIDATION", "Result", "Unfinished", "prepare", "run"]
