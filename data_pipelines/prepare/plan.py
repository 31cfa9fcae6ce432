"""What a command has to do: compares the configuration with what its folder holds, and cuts the work into parts.

OUT/.prepare/run.json describes the run under way, so that it is resumed as it was begun or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipelines import manifest as manifest_lib
from data_pipelines.prepare import texts
from data_pipelines.prepare.config import plain, step_options
from data_pipelines.prepare.parts import MAIN, Job, Part
from data_pipelines.prepare.samples import VALIDATION
from data_pipelines.prepare.sources import Source, open_source
from fm4m.config_file import ConfigError
from fm4m.files import complete_file

WORK, RUN, REPORTS = ".prepare", "run.json", "reports"
# Samples in a part: enough for a file of records (which takes at least 128 KiB), few enough to lose when killed.
LEAST_SAMPLES, MOST_SAMPLES, PARTS = 64, 4096, 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
      job: what makes parts.
      parts: all of them, in order.
      identity: what decides which samples and crops the set has.
      made_from: of every modality to write, as the manifest keeps it.
      present: names of the modalities that the set has already and keeps.
      report: folder of the run's report.
    """

    job: Job
    parts: tuple[Part, ...]
    identity: Mapping[str, Any]
    made_from: Mapping[str, Mapping]
    present: tuple[str, ...]
    report: pathlib.Path


def make_plan(
    config: Any,
    out: pathlib.Path,
    sources: Mapping[str, Source] | None = None,
    say: Callable[[str], None] = print,
) -> Plan:
    """Decides what is to be done; writes nothing but the run's description and, if wanted, the text tokenizer.

    Args:
      config: validated, see `data_pipelines.prepare.config`.
      out: the set's folder.
      sources: opened sources by `MAIN` and `VALIDATION` instead of the configuration's.
      say: gets sentences on what was done.

    Raises:
      ConfigError: the configuration contradicts what the folder holds; names the keys.
      ValueError, FileNotFoundError: a source or file that cannot be used.
    """
    sources = dict(sources) if sources is not None else _open_sources(config)
    identity = _identity(config, sources)
    existing = _existing(out)
    run = _read_run(out / WORK / RUN)
    _check_set(config, identity, existing, out)
    steps = _steps(config, out, sources[MAIN], say)
    made_from = {name: _made_from(options, out) for name, options in steps.items()}
    if existing and config.other_source:
        made_from = {name: {**origin, "source": identity["source"]} for name, origin in made_from.items()}
    if run is not None:
        return _resumed(config, out, sources, steps, identity, made_from, run)
    present = _present(config, existing, made_from, out)
    todo = {name: options for name, options in steps.items() if name not in present}
    job = _job(config, out, sources, todo, adding=bool(existing), existing=existing)
    plan = Plan(
        job=job,
        parts=tuple(_parts(config, job, existing)),
        identity=identity,
        made_from={name: made_from[name] for name in todo},
        present=present,
        report=out / REPORTS / str(1 + len(list((out / REPORTS).glob("[0-9]*")))),
    )
    if todo:
        remove_work(out)
        description = {
            "adding": job.adding, "identity": identity, "made_from": dict(plan.made_from), "present": list(present),
            "parts": [dataclasses.astuple(part) for part in plan.parts], "report": plan.report.name,
        }  # fmt: skip
        with complete_file(out / WORK / RUN) as beside:
            beside.write_text(json.dumps(description))
    return plan


def _resumed(config, out, sources, steps, identity, made_from, run: Mapping) -> Plan:
    was = {name: origin["step"] for name, origin in run["made_from"].items()}
    now = {name: origin["step"] for name, origin in made_from.items() if name not in run["present"]}
    found = differences(run["identity"], identity) + differences(was, now, "modalities.")
    if found:
        raise ConfigError(
            f"{out} holds an unfinished preparation that was begun in another way: {'; '.join(found)}. Set the "
            f"configuration back to finish it, or delete {out / WORK} to begin it again"
        )
    todo = {name: steps[name] for name in run["made_from"]}
    existing = _existing(out) if run["adding"] else {}
    job = _job(config, out, sources, todo, adding=run["adding"], existing=existing)
    parts = tuple(Part(*fields) for fields in run["parts"])
    made = {name: made_from[name] for name in todo}
    return Plan(job, parts, identity, made, tuple(run["present"]), out / REPORTS / run["report"])


def _job(config, out: pathlib.Path, sources: Mapping[str, Source], todo, *, adding: bool, existing) -> Job:
    if adding:
        main = sources[MAIN]
        by_split = dict.fromkeys(existing, main)
        if VALIDATION in sources and VALIDATION in existing:
            by_split[VALIDATION] = sources[VALIDATION]
        sources = by_split
    crops = {
        "count": config.crops.count, "scale": tuple(config.crops.scale), "ratio": tuple(config.crops.ratio),
        "flip_probability": config.crops.flip,
    }  # fmt: skip
    return Job(
        out, out / WORK, adding, sources, todo, config.split, config.validation.share, crops, config.seed, config.batch
    )


def _parts(config, job: Job, existing: Mapping[str, dict]) -> Iterator[Part]:
    number = 0
    if job.adding:
        for split, manifest in existing.items():
            start = 0
            for records, _ in manifest_lib.alignment(next(iter(manifest["modalities"].values()))):
                yield Part(number, split, start, start + records)
                number, start = number + 1, start + records
        return
    for origin, source in job.sources.items():
        total = len(source.keys)
        size = config.part_samples or min(max(-(-total // PARTS), LEAST_SAMPLES), MOST_SAMPLES)
        for start in range(0, total, size):
            yield Part(number, origin, start, min(start + size, total))
            number += 1


# ---- sources and steps


def _open_sources(config) -> dict[str, Source]:
    sources = {MAIN: open_source(plain(config.source))}
    if config.validation.source:
        sources[VALIDATION] = open_source(plain(config.validation.source))
    return sources


def _identity(config, sources: Mapping[str, Source]) -> dict:
    return plain(
        {
            "source": {origin: source.describe() for origin, source in sources.items()},
            "split": config.split,
            "validation": {"share": config.validation.share},
            "crops": plain(config.crops),
            "seed": config.seed,
        }
    )


def _steps(config, out: pathlib.Path, source: Source, say) -> dict[str, dict]:
    steps = {name: step_options(name, config.modalities[name]) for name in config.modalities}
    for name, options in steps.items():
        wanted = options.get("input")
        # Of another source some modalities only are made.
        known = None if config.other_source else source.fields
        if wanted and not options.get("label") and known is not None and wanted not in known:
            raise ConfigError(
                f"modalities.{name}: no sample of the source has {wanted!r}; there are {', '.join(known)}. Name one of "
                "them as its input, give it a label, or leave the modality out"
            )
    unnamed = [options for options in steps.values() if options.get("tokenizer") == ""]
    if unnamed:
        given = config.text.tokenizer
        path = pathlib.Path(given) if given else texts.tokenizer_file(out, plain(config.text), source, say)
        for options in unnamed:
            options["tokenizer"] = str(path)
    for name, options in steps.items():
        if "tokenizer" in options and not pathlib.Path(options["tokenizer"]).is_file():
            raise ConfigError(f"modalities.{name}: there is no tokenizer file {options['tokenizer']}")
    return steps


def _made_from(options: Mapping[str, Any], out: pathlib.Path) -> dict:
    """What the manifest says of a modality's origin: its step, and for those who decode it the tokenizer's file."""
    made_from = {"step": _fingerprint(options)}
    if "tokenizer" in options:
        path = pathlib.Path(options["tokenizer"]).absolute()
        inside = path.relative_to(out) if path.is_relative_to(out) else options["tokenizer"]
        made_from |= {"tokenizer": made_from["step"]["tokenizer"]["sha256"], "tokenizer_file": str(inside)}
    return made_from


def _fingerprint(value: Any) -> Any:
    """Options with the hashes of files in place of their paths: a set may move, and its tokenizers too."""
    if isinstance(value, dict):
        return {key: _fingerprint(v) for key, v in value.items()}
    if isinstance(value, str) and value and os.path.isfile(value):
        with open(value, "rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return plain(value)


# ---- comparing with what is there


def _existing(out: pathlib.Path) -> dict[str, dict]:
    """The manifests of the set's splits, by name."""
    found = {}
    for path in sorted(out.glob(f"*/{manifest_lib.MANIFEST}")):
        if not path.parent.name.startswith("."):
            found[path.parent.name] = manifest_lib.read_manifest(out, path.parent.name)
    return found


def _read_run(path: pathlib.Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _check_set(config, identity: Mapping, existing: Mapping[str, dict], out: pathlib.Path) -> None:
    for split, manifest in existing.items():
        if "samples" not in manifest:
            raise ConfigError(f"{out / split} was not written by data_pipelines.prepare: choose another --out")
        was, now = dict(manifest["samples"]["made_from"]), dict(identity)
        if config.other_source:
            was.pop("source"), now.pop("source")
        found = differences(was, now)
        if any(text.startswith("source.") for text in found):
            found.append(
                "if the set shall keep its samples and only get modalities from this source, set other_source = True"
            )
        if found:
            raise ConfigError(
                f"{out / split} holds samples that were chosen in another way: {'; '.join(found)}. A finished set "
                "keeps its samples and crops: set the configuration back, or choose another --out"
            )


def _present(config, existing: Mapping[str, dict], made_from: Mapping[str, dict], out: pathlib.Path) -> tuple[str, ...]:
    """Modalities that every split has, made as the configuration says. Raises ConfigError for one made otherwise."""
    present = []
    for name in made_from:
        having = [split for split, manifest in existing.items() if name in manifest["modalities"]]
        if name in config.replace:
            continue
        for split in having:
            was = existing[split]["modalities"][name]["made_from"]
            if found := differences(was.get("step", {}), made_from[name]["step"], f"modalities.{name}."):
                raise ConfigError(
                    f"{out / split} has modality {name!r} already, made in another way: {'; '.join(found)}. Choose "
                    f"another name for it, set the configuration back, or replace it: --config.replace={name}"
                )
        if existing and len(having) == len(existing):
            present.append(name)
    return tuple(present)


def differences(was: Any, now: Any, prefix: str = "") -> list[str]:
    """What differs between two JSON values, as "a.b was 1 and is 2 now"."""
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            text
            for key in sorted(was.keys() | now.keys())
            for text in differences(was.get(key), now.get(key), f"{prefix}{key}.")
        ]
    return [] if was == now else [f"{prefix[:-1]} was {_short(was)} and is {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def remove_work(out: pathlib.Path) -> None:
    """Forgets the run under way; what it wrote is in its place, or not wanted."""
    (out / WORK / RUN).unlink(missing_ok=True)
    shutil.rmtree(out / WORK, ignore_errors=True)
